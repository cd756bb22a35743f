"""Check whether the records of a finished run are the ones that its summary.json names.

`summary.json` of a finished run names the end of metrics.jsonl: tag of the run, number of lines and bytes, step of the
last line, and the checksum of all bytes. Runs of earlier versions lack this: only the last values are compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.launcher.run.chain import Chain, begins_as
from headway.launcher.run.lines import Damage, Lost
from headway.launcher.run.run_dir import RunDir, read_mapping
from headway.launcher.run.tail import end_of_records

UNCHECKED = "without checksums"
"""Note on a finished run of an earlier version, whose records cannot be checked as a whole."""


@dataclass(frozen=True, kw_only=True)
class RecordCheck:
    """`damage`: how records and summary differ; None if they agree, or if the run has not finished.

    `checked`: whether all bytes of the records were compared with a checksum.
    """

    damage: str | None = None
    checked: bool = False

    @property
    def note(self) -> str:
        """`UNCHECKED` for a finished run whose records have no chain of checksums; otherwise empty."""
        return "" if self.checked or self.damage else UNCHECKED


def check_records(path: Path) -> RecordCheck:
    """Compare metrics.jsonl with summary.json of a run folder. Does not parse the records of an undamaged run."""
    run = RunDir(path)
    summary = read_mapping(run.summary)
    if summary.get("complete") is not True:
        return RecordCheck(checked=True)
    if not run.metrics.is_file():
        return RecordCheck(damage="metrics.jsonl is missing")
    named = Chain.restored(summary.get("records"))
    if named is None:
        return _by_values(run, summary)
    if named.run != run.tag:
        whose = "summary.json belongs to another run" if run.run_id() else "run_id.json is missing or unreadable"
        return RecordCheck(damage=whose)
    try:
        with run.metrics.open("rb") as file:
            whole = begins_as(file, named) and not file.read(1)
    except OSError as e:
        return RecordCheck(damage=f"metrics.jsonl cannot be read ({e.strerror})")
    wrong = _wrong_values(run, summary) if whole else _difference(run, named)
    return RecordCheck(damage=wrong, checked=True)


def _by_values(run: RunDir, summary: dict[str, Any]) -> RecordCheck:
    damage = Damage()
    try:
        chained = next(run.read_metrics(damage), None) is not None and not damage.unchained
    except OSError as e:
        return RecordCheck(damage=f"metrics.jsonl cannot be read ({e.strerror})")
    if chained or damage.foreign or "records" in summary:
        return RecordCheck(damage="summary.json does not name the last record of metrics.jsonl, so it is not its own")
    return RecordCheck(damage=_wrong_values(run, summary))


def _wrong_values(run: RunDir, summary: dict[str, Any]) -> str | None:
    """How the last records differ from the totals of the summary, or None. Totals that are missing are not compared."""
    step, _, loss, at = end_of_records(run.metrics)
    steps, final = summary.get("steps"), summary.get("final_validation_loss")
    if isinstance(steps, int) and step != steps:
        return f"the last training step in metrics.jsonl is {step}, summary.json says {steps}"
    if not isinstance(final, int | float) or not math.isfinite(final):
        return None
    if loss is None or (isinstance(steps, int) and at != steps):
        return f"metrics.jsonl has no validation of the last step, summary.json says {final:.4f}"
    return None if loss == final else f"the last validation loss is {loss:.4f}, summary.json says {final:.4f}"


def _difference(run: RunDir, named: Chain) -> str:
    damage = Damage()
    lines = sum(1 for _ in run.read_metrics(damage)) + len(damage.lines) + len(damage.foreign)
    lost, parts = Lost.of(damage, ()), []
    if lines != named.lines:
        parts.append(f"metrics.jsonl has {lines:,} of the {named.lines:,} lines that summary.json names")
    if lost:
        parts.append(str(lost))
    return "; ".join(parts) or "metrics.jsonl is not the file that summary.json names"
