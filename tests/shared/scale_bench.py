"""Compare this checkout with another one where runs and studies are large: CPU time and peak memory, in turns.

    git worktree add ../before e828acd
    python -P tests/shared/scale_bench.py --old ../before docs/results/bench/scale.json [NAME ...]

Each measurement is a process of its own, with one thread. NAME: parts of `PARTS` to measure; all by default. Not a test
module.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headway.launcher.base.spread import spread
from headway.launcher.run.chain import Chain
from headway.launcher.run.machine import machine, versions
from headway.launcher.run.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "python -P tests/shared/scale_bench.py --old CHECKOUT docs/results/bench/scale.json"
ROUNDS, SEEDS = 5, 250
VARIANTS = ["gqa", "rgqa-k1", "rgqa-k2", "switchhead"]
TAIL = 100
"""Steps after the checkpoint that a run resumes from."""

TIMED = """
import json, resource, sys, time
from pathlib import Path
{imports}
path = Path(sys.argv[1])
wall, cpu = time.perf_counter(), time.process_time()
{call}
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("RESULT", json.dumps(dict(cpu_s=cpu, wall_s=wall, peak_mib=peak / 1024)))
"""
RUN = "from headway.launcher.run.run_dir import RunDir"
CHAIN = f"{RUN}; from headway.launcher.run.chain import Chain"
ANCHOR = "anchor = Chain.restored(json.loads((path / 'anchor.json').read_text()))"
PARTS: dict[str, tuple[str, str, str, str]] = {
    "resume": (
        "cut the records of 1,000,000 steps 100 steps before their end, with the chain in the checkpoint",
        "run-1000000",
        CHAIN,
        f"{ANCHOR}; RunDir(path).cut_metrics(last_step=anchor.step, anchor=anchor)",
    ),
    "resume-unanchored": (
        "the same where the checkpoint names no chain that fits, so that the file is written anew",
        "run-1000000",
        CHAIN,
        f"{ANCHOR}; RunDir(path).cut_metrics(last_step=anchor.step)",
    ),
    "branch": (
        "copy the records of 1,000,000 steps into a branch",
        "run-1000000",
        RUN,
        "b = RunDir(path / 'b'); b.path.mkdir(); b.cut_metrics(last_step=999_900, source=RunDir(path))",
    ),
    "read": (
        "read_run of 1,000,000 steps",
        "run-1000000",
        "from headway.launcher.run.records import read_run",
        "read_run(path)",
    ),
    "board": (
        "rebuild the event files of 100,000 steps",
        "run-100000",
        f"{RUN}; from headway.launcher.board.files import rebuild",
        "rebuild(RunDir(path))",
    ),
    "report": (
        "report of a study of 1,000 cells",
        "study",
        "from headway.launcher.report.study import report",
        "report(path)",
    ),
    "plan": (
        "headway plan yaml/models/3b.yaml --gpus 64",
        "",
        "from headway.launcher.cli.main import main",
        "assert main(['plan', 'yaml/models/3b.yaml', '--gpus', '64']) == 0",
    ),
}
"""Name -> what is measured, the folder it needs, imports and call. Imports are not in the time, but in the memory."""


def measure(checkout: Path, name: str, folders: Path) -> dict[str, float]:
    """Seconds and peak memory of a process that runs a part with the code of a checkout."""
    _, needs, imports, call = PARTS[name]
    names = folders / f"path-{'after' if checkout == ROOT else 'before'}"
    names.mkdir(exist_ok=True)
    if not (names / "headway").exists():
        (names / "headway").symlink_to(checkout)
    work = folders / "work"
    if needs:
        shutil.copytree(folders / needs, work)
    environment = {**os.environ, "PYTHONPATH": str(names), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", TIMED.format(imports=imports, call=call), str(work)]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    shutil.rmtree(work, ignore_errors=True)
    if done.returncode:
        raise SystemExit(f"{name} with {checkout} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))


def in_turns(old: Path, name: str, folders: Path) -> dict[str, Any]:
    """Measure both checkouts in turns. A first round, which fills the caches of files, is not counted."""
    sides = {"before": old, "after": ROOT}
    raw: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for turn in range(ROUNDS + 1):
        for side in sides if turn % 2 else list(sides)[::-1]:
            found = measure(sides[side], name, folders)
            raw[side] += [found] * (turn > 0)
    figures: dict[str, Any] = {}
    for key in raw["before"][0]:
        before, after = ([found[key] for found in raw[side]] for side in sides)
        ratio = spread([b / a for b, a in zip(before, after, strict=True)])
        figures[key] = {"before": spread(before), "after": spread(after), "before_over_after": ratio}
    return {"what": PARTS[name][0], **figures, "raw": raw}


def commit(checkout: Path) -> str:
    return subprocess.check_output(["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], text=True).strip()


def make_study(path: Path) -> None:
    """A study of 1,000 cells of 40 steps, with routers and heads."""
    sys.path.append(str(Path(__file__).parent))
    from study_folders import StudyFolder, bind

    made = StudyFolder(path, VARIANTS, list(range(SEEDS)))
    made.write()
    for variant in made.variants:
        for seed in made.seeds:
            bind(made.run_dir(variant, seed))


def make_run(path: Path, steps: int) -> None:
    """A run folder with the records of many steps, a validation every 1,000, and the chain of a checkpoint."""
    run, draw = RunDir(path), random.Random(0)
    run.path.mkdir()
    run.id.write_text(json.dumps("0123456789abcdef"))
    chain = Chain.start(run.tag)
    with run.metrics.open("w") as file:
        for step in range(1, steps + 1):
            common = {"step": step, "tokens": 4096 * step, "loss": draw.random()}
            record = {"kind": "train", **common, "aux_loss": 0.0, "grad_norm": draw.random(), "lr": draw.random()}
            record |= {"targets": 4064, "skipped": False, "batch_hash": f"{draw.getrandbits(64):016x}"}
            times = ("step_s", "data_s", "forward_s", "backward_s", "optimizer_s", "train_s", "tokens_per_s")
            file.write(chain.line(record | {key: draw.random() for key in times}) + "\n")
            if step % 1000 == 0:
                result = {"accuracy": draw.random(), "targets": 4096, "standard_error": 0.01, "documents": 8}
                record = {"kind": "validation", **common, **result, "train_s": draw.random(), "seconds": 1.0}
                file.write(chain.line(record) + "\n")
            if step == steps - TAIL:
                (path / "anchor.json").write_text(json.dumps(chain.state()))


FOLDERS: dict[str, Callable[[Path], None]] = {
    "run-1000000": lambda path: make_run(path, 1_000_000),
    "run-100000": lambda path: make_run(path, 100_000),
    "study": make_study,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="*", metavar="NAME", help=", ".join(PARTS))
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; use some of {', '.join(PARTS)}")
    old = args.old.resolve()
    result: dict[str, Any] = {
        "kind": "scale",
        "command": COMMAND,
        "threads": 1,
        "versions": versions(),
        "machine": machine(),
        "parts": json.loads(args.out.read_text())["parts"] if args.out.exists() else {},
    }
    commits = {"before": commit(old), "after": commit(ROOT)}
    with tempfile.TemporaryDirectory(prefix="scale-bench-") as temporary:
        folders = Path(temporary)
        for name in args.parts or PARTS:
            needs = PARTS[name][1]
            if needs and not (folders / needs).exists():
                FOLDERS[needs](folders / needs)
            load = {"load_average_at_start": os.getloadavg(), "commits": commits}
            found = result["parts"][name] = in_turns(old, name, folders) | load
            for key in ("cpu_s", "peak_mib"):
                middle = [f"{side} {found[key][side]['median']:.2f}" for side in ("before", "after")]
                print(name, key, *middle, flush=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
