"""`headway chaos`: inject faults in rounds until each fault has had its trials or the time is up."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.errors import SpecError
from headway.launcher.chaos import report
from headway.launcher.chaos.faults import FAULTS, HALF, Fault, Missed
from headway.launcher.chaos.readers import readings
from headway.launcher.chaos.sides import STEPS, Headway, Side, Stock
from headway.launcher.chaos.verdict import Readings, Trial, held, judge
from headway.launcher.hosts.forked import ForkServer
from headway.launcher.run.machine import git_commit, machine, versions

BROKEN = 70
_MARGIN = 1.3  # a trial may take this many times as long as the previous trial of the same fault


def chaos(
    *,
    faults: Sequence[str] | None,
    seconds: float,
    seed: int | None,
    out: Path | None,
    server: ForkServer | None = None,
) -> int:
    """Inject the named faults (default: all) into both sides. Prints a line per trial, then the table.

    Every fault is tried at least once, even if that takes longer than `seconds`. Returns 0 if Headway resumed after
    each fault, else 70. `server`: a running fork server; None starts one. Raises SpecError for an unknown fault, and if
    `out` cannot be a file of JSON beside its table.
    """
    chosen = _chosen(faults)
    if out is not None and (out.suffix == ".md" or out.is_dir()):
        what = "is a folder" if out.is_dir() else "is the name of the table, which is written beside the file"
        raise SpecError(f"--json: {out} {what}; name a file of JSON, such as {out.with_suffix('.json')}")
    seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
    command = f"headway chaos --faults {','.join(f.key for f in chosen)} --seconds {seconds:g} --seed {seed}"
    if out is not None:
        command += f" --json {shlex.quote(str(out))}"
    console.say(f"seed {seed}: run with --seed {seed} to use the same ranks, steps and bits")
    begin = time.monotonic()
    with _orderly(), _own_folder() as folder, contextlib.nullcontext(server) if server else ForkServer() as ready:
        drill = Drill(ready, folder, seed)
        with console.progress("chaos", unit="trials", lines=False) as bar:
            drill.prepare()
            drill.campaign(chosen, end_s=begin + seconds, bar=bar)
        setting = drill.setting()
    names = [side.name for side in drill.sides]
    shown = report.table(drill.trials, drill.readings, names)
    console.result(f"\n{shown}\n\n{report.about(setting)}\n")
    good = held(drill.trials, drill.readings, Headway.name, [fault.key for fault in chosen])
    result = {
        "kind": "chaos",
        "seed": seed,
        "command": command,
        "seconds": round(time.monotonic() - begin, 1),
        "trials_done": len(drill.trials),
        "headway_held": good,
        "setting": setting,
        **report.rows(drill.trials, drill.readings),
        "commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
    }
    if out is not None:
        report.write(out, result, shown)
        console.say(f"written: {out} and {out.with_suffix('.md')}")
    verdict = (
        "Headway kept the guarantees in docs/faults.md"
        if good
        else "HEADWAY DID NOT KEEP THE GUARANTEES in docs/faults.md: report this with the seed and the table above"
    )
    console.result(console.paint(verdict, "green" if good else "red", sys.stdout))
    return 0 if good else BROKEN


def _chosen(names: Sequence[str] | None) -> list[Fault]:
    known = {fault.key: fault for fault in FAULTS}
    wrong = [name for name in names or () if name.upper() not in known]
    if wrong:
        raise SpecError(
            f"--faults: {wrong[0]!r:.40} is not one of {', '.join(known)}; use for example F1,F8, or omit --faults to "
            "run all"
        )
    return [fault for fault in FAULTS if names is None or fault.key in {name.upper() for name in names}]


class Drill:
    """Runs trials on both sides, in `folder`. `trials` and `readings` hold the results so far."""

    def __init__(self, server: ForkServer, folder: Path, seed: int) -> None:
        self.sides: list[Side] = [Stock(server, folder / "stock"), Headway(server, folder / "headway")]
        self.trials: list[Trial] = []
        self.readings: list[Readings] = []
        self._folder, self._seed, self._begin = folder, seed, time.monotonic()

    def prepare(self) -> None:
        """Train each side without a fault, and make a copy that ends at the checkpoint after half of the steps."""
        for side in self.sides:
            side.back_to(side.copy(side.undisturbed("reference"), side.folder / "half"), HALF)
            self._say(f"{side.name}: uninterrupted training done, {STEPS} steps")

    def campaign(self, faults: Sequence[Fault], *, end_s: float, bar: console.Bar | None = None) -> None:
        """Try each fault once, then repeatedly the fault with the smallest share of its trials, while there is time."""
        done, took = dict.fromkeys(faults, 0), dict.fromkeys(faults, 0.0)
        while True:
            left = end_s - time.monotonic()
            open_to = [f for f in faults if done[f] == 0 or (done[f] < f.wanted and _MARGIN * took[f] < left)]
            if not open_to:
                return
            fault = min(open_to, key=lambda f: done[f] / f.wanted)
            begin = time.monotonic()
            self._trial(fault, done[fault])
            if bar is not None:
                bar.update()
            took[fault] = time.monotonic() - begin
            if done[fault] == 0 and fault.key in ("F7", "F8"):
                self._read(fault)
            done[fault] += 1

    def _trial(self, fault: Fault, number: int) -> None:
        for side in self.sides:
            chance = random.Random(f"{self._seed}/{fault.key}/{number}")
            run, begin = side.folder / "run", time.monotonic()
            what = " ".join(word for word in (fault.key, fault.variant(side, number)) if word)
            try:
                seen, facts = fault.act(side, run, number, chance)
            except Missed:
                self._say(f"{what}: {side.name} finished before the fault; trial not counted")
                continue
            finally:
                shutil.rmtree(run, ignore_errors=True)
            trial = Trial(
                fault=fault.key,
                number=number,
                side=side.name,
                variant=fault.variant(side, number),
                verdict=judge(seen),
                seconds=round(time.monotonic() - begin, 2),
                facts=facts,
            )
            self.trials.append(trial)
            why = f" ({trial.verdict.why})" if trial.verdict.why else ""
            self._say(f"{what}: {side.name} {trial.verdict.kind}{why}")

    def _read(self, fault: Fault) -> None:
        for side in self.sides:
            chance = random.Random(f"{self._seed}/{fault.key}/reader")
            found = readings(side, fault.key, side.folder / "reader", chance)
            self.readings.append(found)
            self._say(
                f"{fault.key}: reader of {side.name}: {found.refused} files refused, {found.changed} read with changed "
                "values"
            )

    def setting(self) -> dict[str, Any]:
        """Numbers for the text below the table."""
        sizes = [sum(f.stat().st_size for f in s.saved(s.folder / "half")[0].iterdir()) for s in self.sides]
        return {"steps": STEPS, "stock_bytes": f"{sizes[0]:,}", "headway_bytes": f"{sizes[1]:,}"}

    def _say(self, text: str) -> None:
        console.say(f"{time.monotonic() - self._begin:5.0f} s  {text}")


@contextlib.contextmanager
def _orderly() -> Iterator[None]:
    """Let SIGTERM end the drill like Ctrl-C, so that all started processes are ended."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """A temporary folder for all files of the drill, including temporary files of libraries. Removed at the end."""
    before = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="headway-chaos-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        (folder / "tmp").mkdir()
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")
        try:
            yield folder
        finally:
            tempfile.tempdir = None
            os.environ.pop("TMPDIR")
            if before is not None:
                os.environ["TMPDIR"] = before
