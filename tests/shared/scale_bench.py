"""Compare this checkout with another one where runs and studies are large: CPU time and peak memory, in turns.

    python -P tests/shared/scale_bench.py OLD_CHECKOUT docs/results/bench

It writes report-1000.json (the report of 1,000 cells), plan-memory.json (the search for layouts) and read-run.json (the
records of a long run). Not a test module.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from headway.launcher.run.chain import Chain
from headway.launcher.run.machine import machine, versions
from headway.launcher.run.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, SEEDS, STEPS = 3, 250, 300_000
VARIANTS = ["gqa", "rgqa-k1", "rgqa-k2", "switchhead"]
READ = (
    "import sys; from pathlib import Path; from headway.launcher.run.records import read_run; "
    "read_run(Path(sys.argv[1]))"
)
MAIN = "import sys; from headway.launcher.cli.main import main; sys.exit(main(sys.argv[1:]))"
REPORT = "import sys; from headway.launcher.report.study import report; report(sys.argv[1])"


def measure(checkout: Path, code: str, words: list[str], folder: Path) -> dict[str, float]:
    """CPU seconds (user and system) and peak memory of a process that runs the code of a checkout."""
    names = folder / f"path-{abs(hash(checkout))}"
    names.mkdir(exist_ok=True)
    if not (names / "headway").exists():
        (names / "headway").symlink_to(checkout)
    environment = {**os.environ, "PYTHONPATH": str(names), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", code, *words]
    child = subprocess.Popen(command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{checkout}: {' '.join(words)} ended with exit code {child.returncode}")
    return {"cpu_s": round(used.ru_utime + used.ru_stime, 2), "peak_mib": round(used.ru_maxrss / 1024, 1)}


def in_turns(old: Path, what: str, code: str, words: list[str], folder: Path) -> dict[str, object]:
    """Measure both checkouts in turns, after one run of each that fills the caches of files."""
    sides = {"before": old, "after": ROOT}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name, checkout in sides.items():
            found = measure(checkout, code, words, folder)
            if turn:
                rounds[name].append(found)
                print(what, name, found, file=sys.stderr, flush=True)
    middle = {
        name: {key: statistics.median(r[key] for r in found) for key in found[0]} for name, found in rounds.items()
    }
    ratio = {key: round(middle["before"][key] / middle["after"][key], 2) for key in middle["before"]}
    return {
        "what": what,
        "rounds": rounds,
        "median": middle,
        "before_over_after": ratio,
        "commits": {name: commit(checkout) for name, checkout in sides.items()},
        "machine": machine(),
        "versions": versions(),
    }


def commit(checkout: Path) -> str:
    return subprocess.check_output(["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], text=True).strip()


def study(folder: Path) -> Path:
    """A study of 1,000 cells of 40 steps, with routers and heads."""
    sys.path.append(str(Path(__file__).parent))
    from study_folders import StudyFolder, bind

    made = StudyFolder(folder / "study", VARIANTS, list(range(SEEDS)))
    made.write()
    for variant in made.variants:
        for seed in made.seeds:
            bind(made.run_dir(variant, seed))
    return made.out


def run(folder: Path) -> Path:
    """A run folder with records of 300,000 steps."""
    out, draw = RunDir(folder / "run"), random.Random(0)
    out.path.mkdir()
    out.id.write_text(json.dumps("0123456789abcdef"))
    chain = Chain.start(out.tag)
    with out.metrics.open("w") as file:
        for step in range(1, STEPS + 1):
            record = {"kind": "train", "step": step, "tokens": 4096 * step, "loss": draw.random(), "aux_loss": 0.0}
            record |= {"grad_norm": draw.random(), "lr": 1e-3 * draw.random(), "targets": 4064, "skipped": False}
            record |= {"batch_hash": f"{draw.getrandbits(64):016x}", "step_s": draw.random(), "data_s": draw.random()}
            record |= {key: draw.random() for key in ("forward_s", "backward_s", "optimizer_s")}
            record |= {"train_s": step * draw.random(), "tokens_per_s": 1000 * draw.random()}
            file.write(chain.line(record) + "\n")
    return out.path


def main() -> None:
    old, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    wanted = sys.argv[3:] or ["report-1000", "plan-memory", "read-run"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        jobs = {
            "report-1000": ("report of 1,000 cells", REPORT, lambda: [str(study(folder))]),
            "plan-memory": (
                "headway plan yaml/models/3b.yaml --gpus 64",
                MAIN,
                lambda: ["plan", "yaml/models/3b.yaml", "--gpus", "64"],
            ),
            "read-run": ("read_run of 300,000 training records", READ, lambda: [str(run(folder))]),
        }
        for name in wanted:
            what, code, words = jobs[name]
            found = in_turns(old, what, code, words(), folder)
            (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
