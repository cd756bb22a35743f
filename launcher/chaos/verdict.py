"""Judge a run after a fault, by the same rule for stock DeepSpeed and for Headway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

RULE = """After the fault, the same command is started once more. *Resumed*: it continued from a complete checkpoint, \
and its losses equal those of the uninterrupted training bit for bit. *Stopped*: it refused or failed with an error, \
so a person has to act. *Wrong*: it continued from a damaged or foreign checkpoint without an error, restarted at \
step 0 although there were checkpoints, had different losses at the end, left processes that continue to write, or \
did not detect a stopped rank."""

Kind = Literal["resumed", "stopped", "wrong"]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Observations of one side after one fault.

    `begun_from`: steps from which the starts after the fault continued. `had`: step of the newest checkpoint, 0 for
    none. `damaged`: steps whose checkpoints were damaged. `orphans`: processes that outlived their launcher.
    `unnoticed_s`: seconds for which a stopped rank was not detected; None if it was. `said`: last error message of a
    training that did not complete.
    """

    begun_from: tuple[int, ...] = ()
    had: int = 0
    damaged: frozenset[int] = frozenset()
    complete: bool = False
    same_losses: bool = False
    orphans: int = 0
    orphan_steps: int = 0
    unnoticed_s: float | None = None
    said: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`why`: short reason, with equal texts for equal causes, because they are counted."""

    kind: Kind
    why: str = ""


def judge(seen: Seen) -> Verdict:
    """Apply `RULE`. A wrong behaviour takes precedence over a stop."""
    if seen.orphans:
        return Verdict(kind="wrong", why=f"{seen.orphans} orphans trained {seen.orphan_steps} more steps in 5 s")
    if seen.unnoticed_s is not None:
        return Verdict(kind="wrong", why=f"not noticed in {seen.unnoticed_s:.0f} s")
    if set(seen.begun_from) & seen.damaged:
        return Verdict(kind="wrong", why="continued from the damaged checkpoint")
    if seen.had and 0 in seen.begun_from:
        return Verdict(kind="wrong", why="restarted at step 0")
    if not seen.complete:
        return Verdict(kind="stopped", why=seen.said or "ended without an error message")
    if not seen.same_losses:
        return Verdict(kind="wrong", why="different losses at the end")
    return Verdict(kind="resumed")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One fault injected into one side. `facts`: numbers of this kind of fault (seconds until detection, ...)."""

    fault: str
    number: int
    side: str
    variant: str
    verdict: Verdict
    seconds: float
    facts: dict[str, Any]

    def record(self) -> dict[str, Any]:
        value = asdict(self)
        return {**value, **value.pop("verdict")}


@dataclass(frozen=True, kw_only=True)
class Readings:
    """Counts of how a side's checkpoint reader handled damaged files, without training.

    `refused`: reading failed. `changed`: read with a different value and without an error. `equal`: read, and no value
    differs.
    """

    fault: str
    side: str
    refused: int
    changed: int
    equal: int


def held(trials: Sequence[Trial], readings: Sequence[Readings], side: str, faults: Sequence[str]) -> bool:
    """Whether a side resumed in all trials of these faults, with at least one trial each, and its reader accepted no
    changed value.
    """
    kinds = {fault: {t.verdict.kind for t in trials if t.side == side and t.fault == fault} for fault in faults}
    return all(found == {"resumed"} for found in kinds.values()) and not any(
        r.changed for r in readings if r.side == side
    )
