"""Read the records of a run from its folder. Does not import torch. Every line is checked, since a killed process may
leave an incomplete last line.

spec.json     the resolved Spec
run.json      the run card: spec hash, versions, machine, data fingerprint, cost per token; `attempts`: all starts
metrics.jsonl one JSON object per line: `kind` train (every optimizer step), validation, heads (their diversity), start,
              spike, and kinds this reader ignores
summary.json  written last; `complete` is true only for a run that reached its last step
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headway.launcher.run.lines import Damage, Lost, decode, gaps
from headway.launcher.run.records_heads import Floats, Heads, Router, read_heads, read_routers
from headway.launcher.run.run_dir import RunDir, read_mapping

KINDS = ("train", "validation", "heads", "start", "spike")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A loss (nats per token) over training progress. All arrays have one entry per record, in order of steps.

    `tokens` and `train_s` are cumulative; `train_s` excludes validation and checkpoints.
    """

    step: Floats
    tokens: Floats
    loss: Floats
    train_s: Floats

    def __len__(self) -> int:
        return int(self.step.size)

    def loss_at_tokens(self, tokens: int) -> float | None:
        """The loss recorded at exactly `tokens`; None if there is no such record."""
        found = np.flatnonzero(self.tokens == tokens)
        return float(self.loss[found[-1]]) if found.size else None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Records of one run folder. Missing files result in empty dicts and curves.

    `accuracy`: fraction (0..1) of targets with the largest logit at the label, at each validation; nan if not
    recorded. `start`: layer -> {"attention", "mlp"}, ratio of the rms of the branch output to the rms of the residual
    stream before the first step; empty if not recorded. `grad_norm`: of each step, before clipping. `skipped`: steps
    whose update was not applied. `spikes`: steps with a loss spike (`guard.spike`). `standard_error`: of each
    validation loss, from the spread over `micro_batches`; nan if not recorded. `targets`: of each validation. `lost`:
    records that metrics.jsonl and all curves lack.
    """

    path: Path
    spec: dict[str, Any]
    run: dict[str, Any]
    summary: dict[str, Any]
    train: Curve
    validation: Curve
    accuracy: Floats
    standard_error: Floats
    micro_batches: Floats
    targets: Floats
    grad_norm: Floats
    skipped: int
    spikes: int
    step_s: Floats
    data_s: Floats
    batch_hash: dict[int, str] = field(repr=False)
    routers: tuple[Router, ...] = field(repr=False)
    heads: Heads | None = field(repr=False)
    start: dict[str, dict[str, float]] = field(repr=False)
    lost: Lost

    @property
    def complete(self) -> bool:
        return self.summary.get("complete") is True

    @property
    def tokens(self) -> int:
        """Number of tokens trained."""
        return int(self.train.tokens[-1]) if len(self.train) else 0

    @property
    def train_s(self) -> float | None:
        """Training time in seconds, without validation and checkpoints."""
        value = self.summary.get("train_s")
        if isinstance(value, int | float):
            return float(value)
        return float(self.train.train_s[-1]) if len(self.train) else None


def read_run(path: Path) -> RunRecord:
    """Read a run folder. If a step has two records, because it was repeated after a kill, the later one is used."""
    by_kind: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in KINDS}
    damage = Damage()
    for record in _records(RunDir(path), damage):
        kind, step = record.get("kind"), record.get("step")
        if isinstance(step, int) and isinstance(kind, str) and kind in by_kind:
            by_kind[kind][step] = record
    steps, validations, heads, starts, spikes = ([found[step] for step in sorted(found)] for found in by_kind.values())
    return RunRecord(
        path=path,
        spec=read_mapping(path / "spec.json"),
        run=read_mapping(path / "run.json"),
        summary=read_mapping(path / "summary.json"),
        train=_curve(steps),
        validation=_curve(validations),
        accuracy=_column(validations, "accuracy"),
        standard_error=_column(validations, "standard_error"),
        micro_batches=_column(validations, "micro_batches"),
        targets=_column(validations, "targets"),
        grad_norm=_column(steps, "grad_norm"),
        skipped=sum(r.get("skipped") is True for r in steps),
        spikes=len(spikes),
        step_s=_column(steps, "step_s"),
        data_s=_column(steps, "data_s"),
        batch_hash={r["step"]: r["batch_hash"] for r in steps if isinstance(r.get("batch_hash"), str)},
        routers=read_routers(steps),
        heads=read_heads(heads),
        start=_start(starts),
        lost=Lost.of(damage, gaps(step for step in by_kind["train"] if step > 0)),
    )


def last_progress(path: Path) -> tuple[int, float | None]:
    """(tokens, training loss) of the last complete record in metrics.jsonl. Reads only the end of the file."""
    record = _last(path, "train")
    if record is None:
        return 0, None
    tokens = _number(record.get("tokens"))
    return int(tokens) if math.isfinite(tokens) else 0, _number(record.get("loss"))


def last_validation(path: Path) -> float | None:
    """Validation loss of the last complete validation record in metrics.jsonl; None if there is none."""
    record = _last(path, "validation")
    return None if record is None else _number(record.get("loss"))


def _last(path: Path, kind: str) -> dict[str, Any] | None:
    """The last complete record of a kind. Validations may be far apart; if needed, more of the file is read."""
    mark = f'"{kind}"'.encode()
    for most in (1 << 20, 1 << 26):
        try:
            with (path / "metrics.jsonl").open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - most))
                lines = file.read().splitlines()
        except OSError:
            return None
        records = (_parse(line) for line in reversed(lines) if mark in line)
        found = next((record for record in records if record.get("kind") == kind), None)
        if found is not None or size <= most:
            return found
    return None


def _records(run: RunDir, damage: Damage) -> list[dict[str, Any]]:
    try:
        return list(run.read_metrics(damage))
    except OSError:
        return []


def _parse(line: bytes) -> dict[str, Any]:
    return decode(line.decode(errors="replace")) or {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _column(records: list[dict[str, Any]], key: str) -> Floats:
    return np.array([_number(record.get(key)) for record in records], dtype=np.float64)


def _start(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    layers = records[0].get("layers") if records else None
    found = layers if isinstance(layers, dict) else {}
    return {
        str(name): {branch: _number(values.get(branch)) for branch in ("attention", "mlp")}
        for name, values in found.items()
        if isinstance(values, dict)
    }


def _curve(records: list[dict[str, Any]]) -> Curve:
    return Curve(**{key: _column(records, key) for key in ("step", "tokens", "loss", "train_s")})
