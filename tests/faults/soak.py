"""Soak test: real trainings of several processes under random kills, full disks, damage and layout changes.

    python tests/faults/soak.py --minutes 30 --kills 200 --out docs/results/soak.json

Trainings run one after another. A fault is injected at a random moment: a rank, the launcher or all processes are
killed, a rank is stopped, a signal requests a stop, a save is interrupted at one of its points, or the file system is
full for a while. Before the next start, the newest checkpoint may be damaged and the layout may change. At the end,
batches and losses of each training must equal those of the uninterrupted one: bit for bit if the layout did not change,
within rounding otherwise. Every start must continue from the newest complete checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headway.launcher.hosts.forked import Forked, ForkServer
from headway.launcher.run.machine import git_commit, machine, versions
from headway.parallel import checkpoint

SPEC = """
name: soak
model: {width: 32, layers: 2, ffn_width: 48, init_std: 0.05}
attention: {type: gqa, heads: 4, kv_heads: 2, head_dim: 8}
data:
  seq_len: 32
  source: {type: synthetic, task: mqar, vocab_size: 32, pairs: 4, queries: 4}
optimizer: {lr: 1.0e-4}
train: {tokens: 38400, global_batch: 8, micro_batch: 1, validation_tokens: 512, validate_every_tokens: 12800}
checkpoint: {every_tokens: 1280, keep: 3, max_failures: 1000}
tracking: {tensorboard: false}
launch: {processes: 2, threads: 1, hang_s: 3, timeout_s: 60}
"""
LAYOUTS = {
    "one": (1, ()),
    "dp2": (2, ()),
    "dp2 zero 3": (2, ("parallel.zero=3",)),
    "tp2": (2, ("parallel.tensor=2",)),
    "pp2": (2, ("parallel.pipeline=2",)),
    "cp2": (2, ("parallel.context=2",)),
    "tp2 pp2": (4, ("parallel.tensor=2", "parallel.pipeline=2")),
    "dp4 zero 2": (4, ("parallel.zero=2",)),
}
FIXED = ("dp2", "dp2 zero 3", "pp2")
"""Layouts for trainings without layout changes, which are compared bit for bit."""

SAVE_POINTS = ("save:begin", "save:after_file", "save:before_manifest", "save:after_manifest", "save:after_rename")
ANY_RANK = SAVE_POINTS[:2]  # only rank 0 passes the later points
FAULTS = {"rank": 20, "launcher": 8, "all": 8, "save": 12, "stopped": 1, "term": 3, "full": 3, "none": 2}
"""Fault -> its relative frequency."""
KILLS = ("rank", "launcher", "all", "save", "stopped")

MEAN_LIFE_S = 2.0
LIMIT_S = 60.0
"""A start without output for this time counts as hung. The set-up may take 18 s, torchrun's grace period 30 s."""
DISK_BYTES = 24 << 20
SHARED_MEMORY = Path("/dev/shm")


class Broken(AssertionError):
    """A guarantee was violated."""


@dataclass
class Figures:
    """Statistics of a campaign, for docs/results/soak.json."""

    faults: Counter[str] = field(default_factory=Counter)
    damaged: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    trainings: int = 0
    compared_bitwise: int = 0
    layout_changes: int = 0
    steps: int = 0
    steps_repeated: int = 0
    most_steps_repeated: int = 0
    useful_s: float = 0.0
    """Seconds of the steps in the final record, each counted once."""
    training_s: float = 0.0
    """Seconds from the first start of each training to its end, summed."""

    @property
    def kills(self) -> int:
        return sum(self.faults[name] for name in KILLS)

    @property
    def effective_share(self) -> float:
        """Effective training time ratio (ETTR). It is low, because steps take milliseconds here and starts seconds, and
        is not an estimate for large models.
        """
        return self.useful_s / max(1e-9, self.training_s)


class Soak:
    """A campaign in `folder`. `small_disk`: the folder is a separate small file system, which may be filled."""

    def __init__(self, server: ForkServer, folder: Path, seed: int, *, small_disk: bool) -> None:
        self.server, self.folder, self.chance = server, folder, random.Random(seed)
        self.figures = Figures()
        self.faults = {name: weight for name, weight in FAULTS.items() if small_disk or name != "full"}
        self.spec = folder / "soak.yaml"
        self.spec.write_text(SPEC)
        self._references: dict[str, list[tuple[Any, ...]]] = {}

    def campaign(self, *, seconds: float, kills: int, rank_kills: int, at_most_s: float) -> None:
        """Train until `seconds` have passed, `kills` and `rank_kills` are reached, and one training was compared bit
        for bit. Raises Broken after `at_most_s`.
        """
        begin, figures = time.monotonic(), self.figures
        while (
            (passed := time.monotonic() - begin) < seconds
            or figures.kills < kills
            or figures.faults["rank"] < rank_kills
            or not figures.compared_bitwise
        ):
            if passed > at_most_s:
                raise Broken(f"{self.figures.kills} kills in {passed:.0f} s; {kills} are required")
            self.training()
            happened = ", ".join(f"{name} {count}" for name, count in sorted(self.figures.faults.items()))
            print(f"{time.monotonic() - begin:5.0f} s  {self.figures.trainings} trainings  {happened}", flush=True)

    def training(self) -> None:
        """One training, from its first step to its end, with all its starts."""
        moves, layout = self.chance.random() < 0.5, self.chance.choice(FIXED)
        run, begin = self.folder / "run", time.monotonic()
        while not (run / "summary.json").exists():
            if moves and (other := self.chance.choice(list(LAYOUTS))) != layout:
                layout = other
                self.figures.layout_changes += 1
            whole = self._damage(run)
            before = len(steps(run))
            said = self._start(run, layout)
            self._check(run, said, whole=whole, before=before)
        self.figures.training_s += time.monotonic() - begin
        self.figures.useful_s += sum(r["step_s"] for r in records(run) if r["kind"] == "train")
        self._compare(run, layout, moved=moves)
        self.figures.trainings += 1
        shutil.rmtree(run)

    def _damage(self, run: Path) -> int:
        """Sometimes damage the newest checkpoint. Returns the step of the newest complete one (0: none)."""
        folders = checkpoint.steps_on_disk(run / "checkpoints")
        if len(folders) > 1 and self.chance.random() < 0.15:
            kind = self.chance.choice(DAMAGES)
            damage(folders[0], kind, self.chance)
            self.figures.damaged[kind] += 1
        return checkpoint.newest_readable(run / "checkpoints", warn=lambda _: None, run=None).step if folders else 0

    def _start(self, run: Path, layout: str) -> str:
        """Start the training, inject a fault, and wait for its end. Returns its output."""
        fault = self.chance.choices(list(self.faults), list(self.faults.values()))[0]
        processes, overrides = LAYOUTS[layout]
        env: dict[str, str] = {}
        if fault == "save":
            point = self.chance.choice(SAVE_POINTS)
            rank = self.chance.randrange(processes) if point in ANY_RANK else 0
            env["HEADWAY_FAULT"] = f"{point}@{rank}#{self.chance.randint(1, 4)}:kill"
        restarts = self.chance.choice((0, 0, 0, 2)) if fault in ("rank", "stopped") else 0
        words = [f"launch.processes={processes}", f"launch.restarts={restarts}", *overrides, f"run_dir={run}"]
        log = self.folder / "log"
        with log.open("wb") as out:
            launcher = Forked.headway(
                self.server, ["train", str(self.spec), *words], cwd=self.folder, log=out.fileno(), **env
            )
            self.figures.starts += 1
            life = time.monotonic() + self.chance.expovariate(1 / MEAN_LIFE_S)
            while launcher.poll() is None and (time.monotonic() < life or fault in ("save", "none")):
                time.sleep(0.005)
            if self._inflict(fault, run, launcher):
                self.figures.faults[fault] += 1
            status = ended(launcher, log)
        nobody_left(run)
        self.figures.exits[str(status)] += 1
        said = log.read_text(errors="replace")
        # A signal before the command has set its handlers ends it at once, without output.
        in_order = (0, 75) if said else (0, 75, -signal.SIGTERM)
        if status in (64, 65, 66) or (fault == "term" and status not in in_order) or (fault == "none" and status):
            raise Broken(f"{fault}: ended with {status}: {said[-3000:]}")
        return said

    def _inflict(self, fault: str, run: Path, launcher: Forked) -> bool:
        """Inject the fault. Returns whether that was possible."""
        if fault == "save":
            return launcher.returncode != 0
        if launcher.poll() is not None:
            return False
        ranks = live_ranks(run)
        match fault:
            case "rank" | "stopped" if ranks:
                return send(self.chance.choice(ranks), signal.SIGKILL if fault == "rank" else signal.SIGSTOP)
            case "launcher":
                return send(launcher.pid, signal.SIGKILL)
            case "all":
                return sum(send(pid, signal.SIGKILL) for pid in [*ranks, launcher.pid]) > 0
            case "term":
                return send(launcher.pid, signal.SIGTERM)
            case "full":
                self._fill(launcher)
                return True
        return False

    def _fill(self, launcher: Forked) -> None:
        """Fill the file system for a while, then free the space again."""
        ballast = self.folder / "ballast"
        with ballast.open("wb", buffering=0) as f, contextlib.suppress(OSError):
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        f.write(bytes(size))
        end = time.monotonic() + self.chance.uniform(0.2, 1.5)
        while launcher.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        ballast.unlink()

    # ------------------------------------------------------------ checks

    def _check(self, run: Path, said: str, *, whole: int, before: int) -> None:
        """Check that the start continued from the newest complete checkpoint, and that each step is recorded once."""
        said = said.partition("restarting the ranks")[0]  # ignore restarts by the launcher
        resumed = [int(step) for step in re.findall(r"resumed from .* \(step (\d+)/", said)]
        if resumed and resumed[0] != whole:
            raise Broken(f"resumed from step {resumed[0]}; the newest whole checkpoint was of step {whole}")
        if whole and not resumed and re.search(r"^step +1/", said, re.MULTILINE):
            raise Broken(f"started from step 0 although there was a checkpoint of step {whole}")
        recorded = steps(run)
        if recorded != list(range(1, len(recorded) + 1)):
            raise Broken(f"steps recorded are not 1, 2, 3 ...: {recorded}")
        if resumed:
            again = max(0, before - whole)
            self.figures.steps_repeated += again
            self.figures.most_steps_repeated = max(self.figures.most_steps_repeated, again)

    def _compare(self, run: Path, layout: str, *, moved: bool) -> None:
        reference, found = self._reference("one" if moved else layout), trajectory(run)
        self.figures.steps += len(steps(run))
        if not moved:
            self.figures.compared_bitwise += 1
        same = close if moved else tuple.__eq__
        wrong = [(a, b) for a, b in zip(reference, found, strict=False) if not same(a, b)]
        if wrong or len(found) != len(reference):
            raise Broken(f"{layout}, moved {moved}: not the uninterrupted training: {len(found)} records, {wrong[:1]}")

    def _reference(self, layout: str) -> list[tuple[Any, ...]]:
        """The uninterrupted training."""
        if layout not in self._references:
            processes, overrides = LAYOUTS[layout]
            run, log = self.folder / "reference", self.folder / "log"
            words = [f"launch.processes={processes}", *overrides, f"run_dir={run}"]
            with log.open("wb") as out:
                arguments = ["train", str(self.spec), *words]
                launcher = Forked.headway(self.server, arguments, cwd=self.folder, log=out.fileno())
                if ended(launcher, log) != 0:
                    raise Broken(log.read_text())
            self._references[layout] = trajectory(run)
            shutil.rmtree(run)
        return self._references[layout]


DAMAGES = ("flip", "truncate", "remove", "manifest")


def damage(folder: Path, kind: str, chance: random.Random) -> None:
    """Change one file of a checkpoint."""
    name = checkpoint.MANIFEST
    path = folder / name if kind == "manifest" else chance.choice(sorted(p for p in folder.iterdir() if p.name != name))
    if kind == "remove":
        return path.unlink()
    body = bytearray(path.read_bytes())
    if kind == "truncate":
        body = body[: chance.randrange(len(body))]
    else:
        body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
    path.write_bytes(body)


def close(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Equal within rounding, accumulated over 150 steps."""
    return len(a) == len(b) and all(
        math.isclose(x, y, rel_tol=1e-4) if isinstance(x, float) and isinstance(y, float) else x == y
        for x, y in zip(a, b, strict=True)
    )


def records(run: Path) -> list[dict[str, Any]]:
    """Complete records of metrics.jsonl."""
    found = []
    with contextlib.suppress(OSError):
        for line in (run / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):  # cut off by the fault
                found.append(json.loads(line))
    return found


def steps(run: Path) -> list[int]:
    return [r["step"] for r in records(run) if r["kind"] == "train"]


def trajectory(run: Path) -> list[tuple[Any, ...]]:
    keys = ("kind", "step", "loss", "grad_norm", "lr", "batch_hash", "targets")
    return [tuple(r.get(key) for key in keys) for r in records(run) if r["kind"] in ("train", "validation")]


def live_ranks(run: Path) -> list[int]:
    """Process ids of the ranks that run."""
    found = []
    for path in sorted((run / "logs").glob("rank-*.pid")):
        with contextlib.suppress(OSError, ValueError):
            pid = int(path.read_text())
            if str(run).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def nobody_left(run: Path) -> None:
    """Check that no rank runs 5 s after its launcher has ended."""
    end = time.monotonic() + 5
    while left := live_ranks(run):
        if time.monotonic() > end:
            raise Broken(f"processes {left} outlived their launcher by 5 s")
        time.sleep(0.01)


def ended(launcher: Forked, log: Path) -> int:
    end, said = time.monotonic() + LIMIT_S, 0
    while (status := launcher.poll()) is None:
        if (size := log.stat().st_size) != said:
            end, said = time.monotonic() + LIMIT_S, size
        if time.monotonic() > end:
            raise Broken(f"no output for {LIMIT_S:.0f} s: {log.read_text()[-3000:]}")
        time.sleep(0.01)
    return status


def send(pid: int, signum: int) -> bool:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return False
    return True


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a file system of DISK_BYTES at `folder` if this user may; yields whether it is mounted."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "headway-soak", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def soak(*, seconds: float, kills: int, rank_kills: int, at_most_s: float, seed: int) -> dict[str, Any]:
    """Run a campaign in a temporary folder. Returns its statistics. Raises Broken if a guarantee was violated."""
    begin, shared = time.monotonic(), set(SHARED_MEMORY.iterdir())
    with tempfile.TemporaryDirectory(prefix="headway-soak-") as home:
        folder, temporary = Path(home) / "disk", Path(home) / "tmp"
        folder.mkdir()
        temporary.mkdir()
        before = os.environ.get("TMPDIR")
        os.environ["TMPDIR"] = str(temporary)
        try:
            with ForkServer() as server, small_disk(folder) as mounted:
                campaign = Soak(server, folder, seed, small_disk=mounted)
                campaign.campaign(seconds=seconds, kills=kills, rank_kills=rank_kills, at_most_s=at_most_s)
        finally:
            os.environ.pop("TMPDIR")
            if before is not None:
                os.environ["TMPDIR"] = before
        left = sorted(str(p.relative_to(temporary)) for p in temporary.rglob("*"))
        left += sorted(p.name for p in set(SHARED_MEMORY.iterdir()) - shared)
        if left:
            raise Broken(f"left behind: {left}")
    return {
        "kind": "soak",
        "seed": seed,
        "seconds": round(time.monotonic() - begin, 1),
        "kills": campaign.figures.kills,
        "effective_training_share": round(campaign.figures.effective_share, 4),
        **{key: dict(v) if isinstance(v, Counter) else v for key, v in vars(campaign.figures).items()},
        "disk_filled": mounted,
        "left_behind": 0,
        "wrong": 0,
        "commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill, starve, corrupt and move real trainings.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="default: another one every time, printed")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}", flush=True)
    seconds = 60 * args.minutes
    figures = soak(
        seconds=seconds, kills=args.kills, rank_kills=args.kills // 4, at_most_s=1.5 * seconds + 120, seed=seed
    )
    figures["command"] = f"python tests/faults/soak.py --minutes {args.minutes:g} --kills {args.kills} --seed {seed}"
    text = json.dumps(figures, indent=1)
    if args.out is not None:
        args.out.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
