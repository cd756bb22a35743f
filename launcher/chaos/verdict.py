"""What is right: the same rule for stock DeepSpeed and for Headway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

RULE = """After the fault the same command is started again, once. *Resumed*: it went on from a whole checkpoint to \
the losses of the uninterrupted training, bit for bit. *Stopped*: it refused or failed with an error, and somebody \
has to look. *Wrong*: it went on from a damaged or foreign checkpoint without noticing, began anew at step 0 although \
there were checkpoints, had other losses in the end, left processes that go on writing, or did not notice a rank that \
stands still."""

Kind = Literal["resumed", "stopped", "wrong"]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was seen of one side after one fault.

    `begun_from`: the steps that starts after the fault went on from; `had`: the newest checkpoint there was, 0 for
    none; `damaged`: steps whose checkpoints were damaged; `orphans`: processes that were there when they should not
    have been any more; `unnoticed_s`: so long a standing rank was watched in vain; `said`: last words of one that did
    not come to its end.
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
    """`why`: in a few words, equal for what is alike."""

    kind: Kind
    why: str = ""


def judge(seen: Seen) -> Verdict:
    """By the rule; what is wrong comes before what stopped."""
    if seen.orphans:
        return Verdict(kind="wrong", why=f"{seen.orphans} orphans trained {seen.orphan_steps} more steps in 5 s")
    if seen.unnoticed_s is not None:
        return Verdict(kind="wrong", why=f"not noticed in {seen.unnoticed_s:.0f} s")
    if set(seen.begun_from) & seen.damaged:
        return Verdict(kind="wrong", why="went on from the damaged checkpoint")
    if seen.had and 0 in seen.begun_from:
        return Verdict(kind="wrong", why="began anew at step 0")
    if not seen.complete:
        return Verdict(kind="stopped", why=seen.said or "ended without a word")
    if not seen.same_losses:
        return Verdict(kind="wrong", why="other losses in the end")
    return Verdict(kind="resumed")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One fault against one side. `facts`: numbers of this kind of fault (seconds until it was noticed, ...)."""

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
    """What a side's reader of checkpoints did with damaged files: one damage each, no training around it.

    `changed`: read, with another value, and nothing said; `equal`: read, and no value differs.
    """

    fault: str
    side: str
    refused: int
    changed: int
    equal: int


def held(trials: Sequence[Trial], readings: Sequence[Readings], side: str, faults: Sequence[str]) -> bool:
    """Whether a side resumed after every trial of these faults, one at least each, and its reader let no changed value
    through.
    """
    kinds = {fault: {t.verdict.kind for t in trials if t.side == side and t.fault == fault} for fault in faults}
    return all(found == {"resumed"} for found in kinds.values()) and not any(
        r.changed for r in readings if r.side == side
    )
