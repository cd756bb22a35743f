"""How long 8 processes on this machine's CPU take from the command to the end of their first step.

`python tests/parity/start_up.py` writes docs/results/start-up.json; its exit status says whether the limit holds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from headway.launcher.run.machine import git_commit, machine, versions

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S, ROUNDS = 60.0, 3
OVERRIDES = (
    *("launch.processes=8", "launch.threads=1", "launch.device=cpu", "parallel.tensor=2", "parallel.pipeline=2"),
    *("attention.type=rgqa", "attention.top_k=1", "train.micro_batch=4", "train.tokens=4096"),
)


def first_step_s(folder: Path) -> float:
    """Seconds from the start of the command to the record of the first step."""
    words = ["-m", "headway.launcher", "train", str(ROOT / "yaml" / "base" / "tiny.yaml"), *OVERRIDES]
    began = time.perf_counter()
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", *words, f"run_dir={folder / 'run'}"], cwd=folder, stdout=log, stderr=log
        )
        try:
            while not any('"train"' in line for line in _records(folder / "run")):
                if process.poll() is not None or time.perf_counter() - began > 4 * LIMIT_S:
                    raise SystemExit(f"no first step: {(folder / 'log.txt').read_text()[-2000:]}")
                time.sleep(0.02)
            return time.perf_counter() - began
        finally:
            process.terminate()  # the ranks save and end
            process.wait()


def _records(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "start-up.json")
    out = parser.parse_args().out
    seconds = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory(prefix="start-up-") as folder:
            seconds.append(round(first_step_s(Path(folder)), 2))
        print(f"8 processes: first step {seconds[-1]} s after the command", flush=True)
    record = {
        "kind": "start-up",
        "command": "make parity",
        "spec": "yaml/base/tiny.yaml",
        "overrides": OVERRIDES,
        "commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
        "limit_s": LIMIT_S,
        "seconds": seconds,
    }
    out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if max(seconds) <= LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())
