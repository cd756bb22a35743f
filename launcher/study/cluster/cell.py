"""`headway array-cell`: train one cell of an element of an array job, on one of the hosts of the job."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from headway.launcher.base.command import COMMAND
from headway.launcher.base.errors import PREEMPTED
from headway.launcher.compare.cells import OUTCOMES, failure
from headway.launcher.run.run_dir import read_mapping
from headway.launcher.study.branches import no_full_run, not_run, start_of
from headway.launcher.study.cluster.elements import Part, read_element
from headway.launcher.study.config import FULL
from headway.launcher.study.keeping import conclude, keep, needs_no_training, stored_record
from headway.launcher.study.plan import cell_key
from headway.launcher.study.pool import Pool
from headway.launcher.study.training import begun, judged, log_file


def train_part(index: Path, element: int, part: int, found: Sequence[str] = (), *, host: int = 0) -> int:
    """Train cell number `part` of an element, and record its outcome. An element with fewer cells: nothing to do.

    `found`: arguments of `headway train` that only the job knows. `host`: number of this host; the first one records.
    Returns the exit status of the cell. Raises NoInputError or HeadwayError if the index file is not usable.
    """
    parts = read_element(index, element)
    if part >= len(parts):
        return 0
    cell = parts[part]
    if needs_no_training(cell):
        if host == 0:
            _say(keep(cell))
        return 0
    arguments = _arguments(cell)
    if arguments is None:
        return 0 if host else _not_run(cell)
    words = [*train_command(arguments), *found, "--node-rank", str(host)]
    if host:
        os.execv(words[0], words)
    return _train(cell, words)


def train_command(arguments: Sequence[str]) -> list[str]:
    """The command that trains a cell."""
    return [*COMMAND, "train", *arguments]


def _arguments(cell: Part) -> tuple[str, ...] | None:
    """Arguments of `headway train` with the files that exist now; None if the full run of the cell has failed."""
    if cell.whole is None or cell.parent is None:
        return cell.arguments
    record = stored_record(cell.record, cell.key)
    start = start_of(
        begun=read_mapping(cell.run_dir / "spec.json") or ({} if record is None else record.run.spec),
        whole_init=cell.whole_init,
        parent=cell.parent,
        parent_record=cell.parent_record,
        branch_step=cell.branch_step,
    )
    return {"branch": cell.arguments, "whole": cell.whole, "waits": None}[start]


def _train(cell: Part, words: Sequence[str]) -> int:
    log = log_file(cell.out, cell.key)
    conclude(cell.out, cell.key, begun(log))
    with Pool() as pool:
        pool.start(cell, words, log=log, show=lambda line: print(line, flush=True))
        while not (ended := pool.wait()):
            pass
        stopping = pool.stopping
    outcome = judged(ended[0].outcome, cell.run_dir, stopping=stopping)
    conclude(cell.out, cell.key, outcome)
    _say(keep(cell))
    code = outcome["exit_code"]
    if code not in (0, PREEMPTED):
        print(f"[{cell.key}] FAILED: {failure(outcome)}; all its output: {log}", flush=True)
    return code if 0 <= code < 256 else 1


def _not_run(cell: Part) -> int:
    full_run = read_mapping(cell.out / OUTCOMES).get(cell_key(cell.variant, cell.seed, FULL)) or {}
    outcome = not_run(no_full_run(cell.branch_step), full_run, log_file(cell.out, cell.key))
    conclude(cell.out, cell.key, outcome)
    print(f"[{cell.key}] FAILED: {failure(outcome)}", flush=True)
    return outcome["exit_code"]


def _say(note: str | None) -> None:
    if note:
        print(f"note: {note}", flush=True)
