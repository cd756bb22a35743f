"""Fuzz all readers of foreign bytes: only Headway's own errors may result, with limited time and memory.

    python tests/security/fuzz.py --inputs 100000          # of each reader; writes docs/results/fuzz.json
    python tests/security/fuzz.py --only spec --at 812     # one input again, with its traceback
    python tests/security/fuzz.py --only spec --inputs 99  # of one reader; its part of the file is replaced

An input is made from (seed, reader, number) alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz_mutate import mutated
from fuzz_targets import ROOT, Target, outcome, targets

from headway.launcher.run.machine import git_commit, machine, versions

LIMIT_S, LIMIT_BYTES = 2.0, 200 << 20


@dataclass
class Tally:
    """Outcomes of the inputs of one reader."""

    classes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest_s: float = 0.0
    grown_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        counts = dict(sorted(self.classes.items()))
        return {
            **{"inputs": self.classes.total(), "classes": counts, "failures": len(self.failures)},
            **{
                "seconds": round(self.seconds, 2),
                "slowest_s": round(self.slowest_s, 3),
                "grown_bytes": self.grown_bytes,
            },
        }


def broken_input(target: Target, seed: int, number: int) -> bytes:
    """Input `number` of a reader."""
    rng = random.Random(f"{seed} {target.name} {number}")
    at = rng.randrange(len(target.good))
    return mutated(rng, target.good[at], tree=target.trees[at], seal=target.seal, text=target.text)


def fuzz(target: Target, seed: int, numbers: range) -> Tally:
    """Run a reader on these inputs. Failures: an exception that is not Headway's, more than 2 s of CPU, or 200 MB."""
    tally = Tally()
    begin, memory = time.process_time(), peak_bytes()
    for number in numbers:
        data = broken_input(target, seed, number)
        what, spent = _tried(target, data)
        grown = peak_bytes() - memory
        tally.slowest_s = max(tally.slowest_s, spent)
        tally.grown_bytes = max(tally.grown_bytes, grown)
        if what.startswith("FAILED") or spent > LIMIT_S or grown > LIMIT_BYTES:
            memory += grown
            why = what if what.startswith("FAILED") else f"{spent:.1f} s, {grown:,} bytes more than before ({what})"
            tally.failures.append(f"--only '{target.name}' --seed {seed} --at {number}: {why}: {data[:300]!r}")
            what = "FAILED"
        tally.classes[what] += 1
    tally.seconds = time.process_time() - begin
    return tally


def _tried(target: Target, data: bytes) -> tuple[str, float]:
    begin = time.process_time()
    try:
        with _alarm():
            what = outcome(target, data)
    except BaseException as error:  # a Rust panic is not a subclass of Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        what = f"FAILED {type(error).__name__}: {str(error)[:200]} ({Path(at.filename).name}:{at.lineno})"
    return what, time.process_time() - begin


class TooLong(BaseException):
    """Reading an input took more than five times its limit."""


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, 5 * LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def peak_bytes() -> int:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """A new working folder, in memory if possible, because hundreds of thousands of files are written."""
    before, memory = Path.cwd(), Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=500, help="of each reader")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", help="name of a reader, once or more; default all")
    parser.add_argument("--at", type=int, help="this input alone, not caught")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "fuzz.json")
    args = parser.parse_args()
    commit, out = git_commit(), args.out.absolute()
    warnings.simplefilter("ignore")  # numpy warns about invalid headers, a hundred thousand times
    tallies: dict[str, Tally] = {}
    with own_folder() as folder:
        for target in targets(folder):
            if args.only and target.name not in args.only:
                continue
            if args.at is not None:
                data = broken_input(target, args.seed, args.at)
                print(f"{target.name}: {data!r}")
                print(outcome(target, data))
                continue
            tally = tallies[target.name] = fuzz(target, args.seed, range(args.inputs))
            print(f"{target.name:20} {tally.as_json()}", flush=True)
            print("\n".join(tally.failures[:20]), end="\n" if tally.failures else "")
    if args.at is not None:
        return 0
    _write(out, {name: tally.as_json() for name, tally in tallies.items()}, args, commit)
    return 1 if any(tally.failures for tally in tallies.values()) else 0


def _write(out: Path, readers: dict[str, Any], args: argparse.Namespace, commit: str | None) -> None:
    """The result. If only some readers were run, their part replaces that of the existing result."""
    before = json.loads(out.read_text()) if args.only and out.exists() else {}
    for counts in readers.values():
        counts["commit"] = commit
    readers = {**before.get("readers", {}), **readers}
    result = {
        **{
            "inputs": sum(r["inputs"] for r in readers.values()),
            "failures": sum(r["failures"] for r in readers.values()),
        },
        **{"cpu_seconds": round(sum(r["seconds"] for r in readers.values())), "seed": args.seed},
        **{"limit_s": LIMIT_S, "limit_bytes": LIMIT_BYTES, "readers": readers},
        **{"command": f"python tests/security/fuzz.py --inputs {args.inputs}", "commit": commit},
        **{"versions": versions(), "machine": machine()},
    }
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
