"""Runs the parity table: `python parity_run.py [--out FOLDER] [--only WORDS]`; exit status 1 where a case fails.

All cases of one world size run one after the other in one process group, as starting it takes longer than a case. A
case that fails or hangs is noted, and the group is started again for those after it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from parity_cases import Case, every_case, groups, with_references
from parity_compare import Verdict, check_reference, compare

from headway.launcher.hosts.forked import Forked, ForkServer

HERE = Path(__file__).resolve().parent
WORKER = HERE / "parity_worker.py"
PER_START = 32  # cases that one start of processes trains: the process groups of each stay, with gloo's threads
START_S, CASE_S = 120, 90  # of a group that starts, with its first case; of each further case


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`result`: what the worker wrote, None where it failed; `verdict.faults` then says how."""

    case: Case
    result: dict[str, Any] | None
    verdict: Verdict

    @property
    def passed(self) -> bool:
        return self.verdict.equal


def run(
    cases: list[Case], folder: Path, *, server: ForkServer | None = None, say: Callable[[str], None] = print
) -> dict[Case, Outcome]:
    """Train every case and its reference, and compare them. `folder`: an empty one, for what workers write. `server`:
    forks the workers; it can import tests/shared/rank_script.py. Without it they start as torchrun starts them.
    """
    cases = with_references(cases)
    outcomes: dict[Case, Outcome] = {}
    results: dict[Case, dict[str, Any]] = {}
    for number, (size, todo) in enumerate(groups(cases)):
        for case, result in _trained(todo, size, folder, server, name=f"group-{number}"):
            if "error" not in result:
                results[case] = result
            outcomes[case] = outcome = _judged(case, result, results)
            done = f"[{len(outcomes):3d}/{len(cases)}] {case.name}"
            if outcome.passed:
                say(f"{done}: {_shown(outcome.verdict)}, {result['seconds']:.1f} s")
            else:
                say(f"{done}: FAIL: {'; '.join(outcome.verdict.faults)[:600]}")
    return outcomes


def _shown(verdict: Verdict) -> str:
    return f"loss {verdict.differences['loss']:.1e}, norm {verdict.differences['grad_norm']:.1e}"


def _judged(case: Case, result: dict[str, Any], results: dict[Case, dict[str, Any]]) -> Outcome:
    reference = results.get(case.reference)
    if "error" in result or reference is None:
        fault = result.get("error", "its reference failed")
        return Outcome(case=case, result=None, verdict=Verdict(differences={}, faults=(fault,)))
    verdict = compare(case, result, reference)
    if case == case.reference:
        verdict = Verdict(differences=verdict.differences, faults=(*verdict.faults, *check_reference(result)))
    return Outcome(case=case, result=result, verdict=verdict)


def _trained(
    cases: list[Case], size: int, folder: Path, server: ForkServer | None, *, name: str
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Yield (case, result of its workers, or {"error": text})."""
    attempt = 0
    while cases:
        attempt += 1
        place = folder / f"{name}-{attempt}"
        place.mkdir()
        done = 0
        for result in _group(cases[:PER_START], size, place, server, shared=folder):
            yield cases[done], result
            done += 1
        cases = cases[done:]


def _group(
    cases: list[Case], size: int, place: Path, server: ForkServer | None, *, shared: Path
) -> Iterator[dict[str, Any]]:
    """Results in the order of the cases, up to the first that fails."""
    (place / "cases.json").write_text(json.dumps([case.to_json() for case in cases]))
    with (place / "log.txt").open("wb") as log:
        process = _started([str(WORKER), str(place), str(shared)], size, server, log)
        try:
            yield from _followed(process, place, len(cases))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _started(
    script: list[str], size: int, server: ForkServer | None, log: IO[bytes]
) -> subprocess.Popen[bytes] | Forked:
    """A group of processes, the leader of its session."""
    if server is not None:
        request = {"worker": ["rank_script", *script], "processes": size, "env": _environment(size)}
        return Forked(server.path, request, log.fileno(), log.fileno())
    command = [*_launcher(size), *script]
    return subprocess.Popen(
        command, env=_environment(size), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def _followed(process: subprocess.Popen[bytes] | Forked, place: Path, count: int) -> Iterator[dict[str, Any]]:
    path, seen, limit = place / "results.jsonl", 0, time.monotonic() + START_S
    while seen < count:
        ended = process.poll() is not None
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        for line in lines[seen:]:
            yield json.loads(line)
            seen, limit = seen + 1, time.monotonic() + CASE_S
        if seen < count and (ended or time.monotonic() > limit):
            yield {"error": _error(place) if ended else f"no result within its time; {_error(place)}"}
            return
        time.sleep(0.05)
    limit = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)


def _error(place: Path) -> str:
    """Error of the rank that failed first. The other ranks fail as a consequence."""
    reports = sorted(place.glob("error-*.txt"), key=lambda path: path.stat().st_mtime)
    text = reports[0].read_text() if reports else (place / "log.txt").read_text(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-4:])


def _launcher(size: int) -> list[str]:
    """One process needs no launcher, which takes seconds to start."""
    python = [sys.executable, "-P", "-W", "ignore"]
    if size == 1:
        return python
    return [*python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]


def _environment(size: int) -> dict[str, str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore"}
    if size == 1:
        env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    return env


def main() -> int:
    from parity_table import write

    from headway.launcher.run.machine import git_commit

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "docs" / "results")
    parser.add_argument("--only", default="", help="cases whose names contain all of these words")
    arguments = parser.parse_args()
    words = set(arguments.only.split())
    cases = [case for case in every_case() if words <= set(case.name.split())]
    if not cases:
        parser.error("--only: no case has these words in its name; use words of one name, or leave it out")
    commit, began = git_commit(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        outcomes = run(cases, Path(folder), say=lambda line: print(line, flush=True))
    failed = [outcome for outcome in outcomes.values() if not outcome.passed]
    seconds = time.monotonic() - began
    if not words:
        write(outcomes, arguments.out, seconds=seconds, commit=commit)
    print(f"{len(outcomes)} cases in {seconds:.0f} s, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
