"""What a run says of itself in TensorBoard and other trackers: its spec, its result, and its hyperparameters."""

from __future__ import annotations

import calendar
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from headway.launcher.base.loss_unit import loss_unit
from headway.launcher.base.text import duration
from headway.launcher.board.summaries import HParam
from headway.launcher.run.run_dir import RunDir, flatten, read_mapping
from headway.launcher.spec.merge import format_value

_SECTIONS = ("model", "attention", "optimizer", "schedule", "train", "speed", "init")
_KEYS = ("seed", "data.seq_len", "data.seed", "parallel.precision")


def spec_text(run: RunDir) -> str:
    """The spec of a run and what was recorded about its start, in Markdown."""
    rows = [(key, format_value(value)) for key, value in public_values(read_mapping(run.spec)).items()]
    wide = max((len(key) for key, _ in rows), default=0)
    lines = [f"{key:<{wide}} = {value}" for key, value in rows]
    return "\n".join([*_table(_start(read_mapping(run.card))), "", "```", *lines, "```"])


def report_text(run: RunDir, summary: Mapping[str, Any]) -> str:
    """The result of a complete run, in Markdown. `summary`: of summary.json."""
    return "\n".join(_table([*_result(summary, loss_unit(read_mapping(run.spec))), *_start(read_mapping(run.card))]))


def hparams(spec: Mapping[str, Any]) -> dict[str, HParam]:
    """The values of a spec that describe a run in a table of runs: dotted keys of what defines its result."""
    found = {
        key: value
        for key, value in flatten(dict(spec)).items()
        if value is not None and (key in _KEYS or key.partition(".")[0] in _SECTIONS)
    }
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in found.items()}


def differing(found: Sequence[Mapping[str, HParam]]) -> dict[str, str]:
    """Hyperparameters that differ between runs -> their kind: `bool`, `float64` or `string`."""
    names = dict.fromkeys(key for one in found for key in one)
    values = {key: [one.get(key) for one in found] for key in names}
    return {key: _kind(some) for key, some in values.items() if any(value != some[0] for value in some)}


def _kind(values: Iterable[HParam | None]) -> str:
    known = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in known):
        return "bool"
    return "string" if any(isinstance(value, str) for value in known) else "float64"


def public_values(spec: Mapping[str, Any]) -> dict[str, Any]:
    """All values of a spec by dotted keys, without variables of the environment."""
    return {key: value for key, value in flatten(dict(spec)).items() if not key.startswith("launch.env")}


def started_s(run: RunDir) -> float:
    """Wall-clock time of the run's first start in seconds; 0 if unknown."""
    card = read_mapping(run.card)
    attempts = card.get("attempts")
    first = attempts[0] if isinstance(attempts, list) and attempts and isinstance(attempts[0], dict) else card
    try:
        return float(calendar.timegm(time.strptime(str(first.get("started_at")), "%Y-%m-%dT%H:%M:%SZ")))
    except (ValueError, OverflowError):
        return 0.0


def _result(summary: Mapping[str, Any], unit: str) -> Iterator[tuple[str, str]]:
    loss, speed = summary.get("final_validation_loss"), summary.get("tokens_per_s_median")
    yield f"validation loss, {unit}", "-" if loss is None else f"{loss:.4f}"
    yield "tokens", f"{summary.get('tokens', 0):,} in {summary.get('steps', 0):,} steps"
    yield "training time", duration(summary.get("train_s"))
    if speed is not None:
        yield "tokens per second, median", f"{speed:,.0f}"
    yield "resumes", str(summary.get("resumes", 0))


def _start(card: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    cost, machine = card.get("cost"), card.get("machine")
    if isinstance(cost, dict):
        yield "parameters", f"{cost.get('num_params', 0):,}"
        yield "forward FLOPs per token, useful", f"{cost.get('flops_per_token_useful', 0):,.0f}"
        yield "KV bytes per token", f"{cost.get('kv_bytes_per_token', 0):,.0f}"
    if isinstance(machine, dict):
        yield "machine", f"{machine.get('gpu') or machine.get('cpu')}, {machine.get('cores')} cores"
    for key in ("git_commit", "started_at", "data_fingerprint"):
        if card.get(key):
            yield key.replace("_", " "), str(card[key])


def _table(rows: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> list[str]:
    """A table in Markdown, without a head; nothing without rows."""
    lines = [f"| {name} | {value.replace('|', '/')} |" for name, value in rows]
    return ["| | |", "|---|---|", *lines] if lines else []
