"""The faults F1 to F10 of docs/faults.md, each injected into one side at a time."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headway.launcher.chaos.options import damaged
from headway.launcher.chaos.sides import STEPS, Headway, Process, Settings, Side, Stock, alive
from headway.launcher.chaos.verdict import Seen
from headway.launcher.hosts.processes import send

HALF = STEPS // 2
LIMIT_S = 5.0
GONE_S = 5.0
"""Ranks must end within this time after their launcher was killed."""
_WATCHED_S = 3 * LIMIT_S
_ROOM_BYTES = 200_000  # smaller than the larger files of a checkpoint, larger than any record
_LONG = 100_000


class Missed(Exception):
    """The training ended before the fault, so the trial does not count."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind of fault.

    `wanted`: number of trials if time allows. `variants`: names of the variants, selected by the number of the trial.
    `act` injects the fault into a side, in the folder of a new run, and returns the observations and facts to show.
    """

    key: str
    title: str
    wanted: int
    act: Callable[[Side, Path, int, random.Random], tuple[Seen, dict[str, Any]]]
    variants: Callable[[Side], tuple[str, ...]] = lambda _: ("",)

    def variant(self, side: Side, number: int) -> str:
        words = self.variants(side)
        return words[number % len(words)]


def _reach(side: Side, run: Path, process: Process, step: int) -> None:
    """Wait for `step`. A training that fails earlier is judged like one that fails later."""
    if not side.wait_until(run, process, step) and side.is_complete(run):
        raise Missed


def _kill_rank(side: Side, run: Path, number: int, chance: random.Random) -> tuple[Seen, dict[str, Any]]:
    settings = Settings()
    process, victim = side.start(run, settings), chance.randrange(2)
    step = chance.randint(2, STEPS - 5)
    _reach(side, run, process, step)
    time.sleep(chance.uniform(0, 0.15))
    had, pids = side.newest(run), side.pids(run)
    for pid in pids[victim : victim + 1]:
        send(pid, signal.SIGKILL)
    return _after(side, run, process, settings, had=had, facts={"rank": victim, "after_step": step})


STOCK_POINTS = (
    "rank 1 before its file",
    "rank 0 in its second file",
    "rank 1 in its file",
    "rank 0 before `latest`",
    "rank 0 in its first file",
    "rank 0 between its files",
    "rank 1 after its file",
    "rank 0 before its files",
)
_STOCK_DIES = (
    *("1/5/optim/before", "0/5/optim/inside", "1/5/optim/inside", "0/5/latest/before"),
    *("0/5/model/inside", "0/5/model/after", "1/5/optim/after", "0/5/model/before"),
)
HEADWAY_POINTS = (
    *("save:after_file@1", "save:before_manifest@0", "save:begin@1", "save:after_manifest@0", "save:begin@0"),
    *("retention:after_manifest@0", "save:after_rename@0", "save:after_file@0", "retention:before_delete@0"),
)


def _kill_in_save(side: Side, run: Path, number: int, chance: random.Random) -> tuple[Seen, dict[str, Any]]:
    if isinstance(side, Headway):
        die = HEADWAY_POINTS[number % len(HEADWAY_POINTS)] + ("#3" if number % len(HEADWAY_POINTS) in (5, 8) else "#5")
    else:
        die = _STOCK_DIES[number % len(_STOCK_DIES)]
    settings = Settings(die=die, keep=2, restarts=0)
    process = side.start(run, settings)
    side.ended(process)
    if side.is_complete(run):
        raise Missed
    assert not isinstance(side, Stock) or "exitcode  : -9" in side.log(run).read_text(errors="replace"), "not killed"
    return _after(side, run, process, replace(settings, die=None), had=4, facts={})


def _kill_launcher(side: Side, run: Path, number: int, chance: random.Random) -> tuple[Seen, dict[str, Any]]:
    """Start the programs without the fork server, because it would end the ranks itself."""
    settings = Settings(steps=_LONG, keep=3)
    process, pids = side.start(run, settings, alone=True), list[int]()
    try:
        side.wait_until(run, process, 3)
        pids = side.pids(run)
        send(process.pid, signal.SIGKILL)
        killed, step = time.monotonic(), max(side.losses(run), default=0)
        while any(alive(pid) for pid in pids) and time.monotonic() < killed + GONE_S:
            time.sleep(0.01)
        facts = {"gone_s": round(time.monotonic() - killed, 2)}
        orphans, more = sum(alive(pid) for pid in pids), max(side.losses(run), default=0) - step
    finally:
        for pid in (process.pid, *pids):
            send(pid, signal.SIGKILL)
        side.ended(process)
    if orphans or not pids:
        return Seen(orphans=orphans, orphan_steps=more, said=side.last_words(run)), {}
    had, again = side.newest(run), side.start(run, settings)
    try:
        side.wait_until(run, again, max(side.losses(run)) + 1)
    finally:
        side.stop(run, again)
    begun = side.begun_from(run)
    said = "" if begun else side.last_words(run)
    right = _begins_alike(side, run)
    return Seen(begun_from=begun, had=had, complete=bool(begun), same_losses=right, said=said), facts


def _begins_alike(side: Side, run: Path) -> bool:
    """Whether steps 1 to n are each recorded. Losses are not compared, because this longer training has a different
    schedule.
    """
    losses = side.losses(run)
    return bool(losses) and sorted(losses) == list(range(1, len(losses) + 1))


def _stop_rank(side: Side, run: Path, number: int, chance: random.Random) -> tuple[Seen, dict[str, Any]]:
    """Stop a rank within a step and not within a save, because training spends most of its time in steps."""
    settings, victim = Settings(limit_s=LIMIT_S, save_every=4), chance.randrange(2)
    process = side.start(run, settings)
    _reach(side, run, process, chance.randint(5, 6))
    end = time.monotonic() + LIMIT_S
    while side.newest(run) < 4 and time.monotonic() < end:  # during a save, the limit would be longer
        time.sleep(0.005)
    _reach(side, run, process, max(side.losses(run), default=0) + 1)
    pids, had = side.pids(run), side.newest(run)
    began = time.monotonic()
    if pids:
        send(pids[victim], signal.SIGSTOP)
    while all(alive(pid) for pid in pids) and process.poll() is None and time.monotonic() < began + _WATCHED_S:
        time.sleep(0.01)
    seconds = round(time.monotonic() - began, 1)
    facts: dict[str, Any] = {"rank": victim, "limit_s": LIMIT_S, "noticed_s": seconds}
    if pids and all(alive(pid) for pid in pids) and process.poll() is None:
        side.stop(run, process)
        return Seen(had=had, unnoticed_s=seconds), facts | {"noticed_s": None}
    if isinstance(side, Stock):  # torchrun waits half a minute for a stopped process to handle SIGTERM
        side.stop(run, process)
    return _after(side, run, process, settings, had=had, facts=facts)


def _ask_to_end(side: Side, run: Path, number: int, chance: random.Random) -> tuple[Seen, dict[str, Any]]:
    settings = Settings(save_every=4)
    process = side.start(run, settings)
    _reach(side, run, process, chance.randint(5, 7))
    send(process.pid, signal.SIGTERM)
    status = side.ended(process)
    if status is None:
        side.stop(run, process)
    had, done = side.newest(run), max(side.losses(run), default=0)
    facts = {"exit": status, "steps_lost": done - had}
    return _after(side, run, process, settings, had=had, facts=facts)


def _fill_disk(side: Side, run: Path, number: int, chance: random.Random) -> tuple[Seen, dict[str, Any]]:
    """Simulate a full disk for one rank by a limit on file sizes, which is removed once a save has failed."""
    settings, victim = Settings(save_every=2), number % 2
    process = side.start(run, settings)
    _reach(side, run, process, 5)
    pids, had = side.pids(run), side.newest(run)
    _limit_files(pids[victim : victim + 1], _ROOM_BYTES)
    end = time.monotonic() + 20
    while process.poll() is None and not side.save_failed(run) and time.monotonic() < end:
        time.sleep(0.005)
    went_on = process.poll() is None
    _limit_files(pids[victim : victim + 1], resource.RLIM_INFINITY)
    return _after(side, run, process, settings, had=had, facts={"training_went_on": went_on})


def _limit_files(pids: list[int], size: int) -> None:
    for pid in pids:
        if alive(pid):
            hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))


def _after(
    side: Side, run: Path, process: Process, settings: Settings, *, had: int, facts: dict[str, Any]
) -> tuple[Seen, dict[str, Any]]:
    """Wait until the start has ended, and start the same command again if the training is not complete."""
    if side.ended(process) is None:
        side.stop(run, process)
        return Seen(had=had, said="neither continued nor ended"), facts
    before = side.begun_from(run)[1:]  # steps from which ranks continued after restarts by the launcher
    facts = facts | {"commands": 1 if side.is_complete(run) else 2}
    return side.finish(run, settings, had=had, before=before), facts


# ---------------------------------------------------------------- damage to checkpoints between two starts


def _halfway(side: Side, run: Path) -> Path:
    """Copy the run that ended at step HALF to `run`. Returns its newest checkpoint."""
    side.copy(side.folder / "half", run)
    return side.saved(run)[0]


def _resume(side: Side, run: Path, *, damaged: bool) -> tuple[Seen, dict[str, Any]]:
    seen = side.finish(run, Settings(), had=HALF)
    return replace(seen, damaged=frozenset({HALF} if damaged else ())), {"begun_from": list(seen.begun_from)}


def _truncate(side: Side, run: Path, number: int, chance: random.Random) -> tuple[Seen, dict[str, Any]]:
    path = chance.choice(sorted(_halfway(side, run).iterdir()))
    body = path.read_bytes()
    path.write_bytes(damaged(body, 0 if number == 0 else chance.randrange(len(body)), -1))
    return _resume(side, run, damaged=True)


def _flip(side: Side, run: Path, number: int, chance: random.Random) -> tuple[Seen, dict[str, Any]]:
    """Flip a bit in the middle of rank 1's file, which contains only tensor data."""
    path = side.rank_file(_halfway(side, run), 1)
    body = path.read_bytes()
    bit = 8 * (len(body) // 4) + chance.randrange(4 * len(body))
    path.write_bytes(damaged(body, len(body), bit))
    return _resume(side, run, damaged=True)


MISSING = ("missing", "of an older step", "of another training")


def _replace_file(side: Side, run: Path, number: int, chance: random.Random) -> tuple[Seen, dict[str, Any]]:
    path = side.rank_file(_halfway(side, run), 1)
    path.unlink()
    if number % 3 == 1:
        older = next(p for p in side.saved(run) if side.step_of(p) == HALF - 1)
        shutil.copy(side.rank_file(older, 1), path)
    if number % 3 == 2:
        other = next(p for p in side.saved(side.undisturbed("other", seed=2)) if side.step_of(p) == HALF)
        shutil.copy(side.rank_file(other, 1), path)
    return _resume(side, run, damaged=True)


POINTERS = ("empty", "missing", "garbage", "of another training", "a folder", "of a missing step")


def _point_elsewhere(side: Side, run: Path, number: int, chance: random.Random) -> tuple[Seen, dict[str, Any]]:
    """Change the file `latest` beside the checkpoints. Headway has no such file and must ignore it."""
    newest = _halfway(side, run)
    latest, kind = newest.parent / "latest", POINTERS[number % len(POINTERS)]
    latest.unlink(missing_ok=True)
    texts = {"empty": "", "garbage": "\x00%s\n?", "of a missing step": "global_step999"}
    if kind == "a folder":
        latest.mkdir()
    elif kind == "of another training":
        other = side.undisturbed("other", seed=2) / "checkpoints" / newest.name
        latest.write_text(os.path.relpath(other, newest.parent))
    elif kind != "missing":
        latest.write_text(texts[kind])
    return _resume(side, run, damaged=False)


def _points(side: Side) -> tuple[str, ...]:
    return HEADWAY_POINTS if isinstance(side, Headway) else STOCK_POINTS


FAULTS = (
    Fault(key="F1", title="SIGKILL of a rank at a random moment", wanted=12, act=_kill_rank),
    Fault(key="F2", title="SIGKILL of a rank inside a save", wanted=9, act=_kill_in_save, variants=_points),
    Fault(key="F3", title="SIGKILL of the launcher", wanted=1, act=_kill_launcher),
    Fault(key="F4", title=f"a rank is stopped in a step (SIGSTOP), limit {LIMIT_S:g} s", wanted=2, act=_stop_rank),
    Fault(key="F5", title="SIGTERM to the launcher, saves every 4 steps", wanted=2, act=_ask_to_end),
    Fault(
        key="F6",
        title="no disk space for a save",
        wanted=2,
        act=_fill_disk,
        variants=lambda _: ("on rank 0", "on rank 1"),
    ),
    Fault(key="F7", title="a truncated checkpoint file", wanted=3, act=_truncate),
    Fault(key="F8", title="a flipped bit in a checkpoint file", wanted=3, act=_flip),
    Fault(
        key="F9",
        title="a rank's file missing or replaced",
        wanted=3,
        act=_replace_file,
        variants=lambda _: MISSING,
    ),
    Fault(
        key="F10",
        title="a changed file `latest` beside the checkpoints",
        wanted=6,
        act=_point_elsewhere,
        variants=lambda _: POINTERS,
    ),
)
