"""Read what a training run left in its folder. Needs no torch, trusts no line: a torn last line is normal after a kill.

spec.json     the resolved Spec
run.json      what ran: spec hash, versions, machine, data fingerprint, cost per token
metrics.jsonl one JSON object per line: `kind` train (every optimizer step), validation, and kinds this reader ignores
summary.json  written last; `complete` is true only for a run that reached its last step
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A loss (nats per token) against training progress; all arrays have one entry per record, in order of steps.

    `tokens` and `train_s` are cumulative; `train_s` leaves out validation and checkpoints.
    """

    step: Floats
    tokens: Floats
    loss: Floats
    train_s: Floats

    def __len__(self) -> int:
        return int(self.step.size)

    def loss_at_seconds(self, seconds: float) -> float | None:
        """Linear interpolation between the two records around `seconds`; None outside the recorded range."""
        known = np.isfinite(self.train_s) & np.isfinite(self.loss)
        x, y = self.train_s[known], self.loss[known]
        if x.size == 0 or not x[0] <= seconds <= x[-1]:
            return None
        return float(np.interp(seconds, x, y))

    def loss_at_tokens(self, tokens: int) -> float | None:
        """The loss recorded at exactly `tokens`; None where there is no such record."""
        found = np.flatnonzero(self.tokens == tokens)
        return float(self.loss[found[-1]]) if found.size else None


@dataclass(frozen=True, kw_only=True)
class Router:
    """One router over the last tenth of a run, averaged over the steps that report it.

    `load` [G, M]: share of each expert within its group (rows sum to 1). `entropy`: mean over tokens of the entropy of
    the router's softmax, in nats, at most ln M. `dead`: experts never selected, at the last report.
    """

    layer: str
    name: str
    load: Floats
    entropy: float
    margin: float
    dead: int


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run folder. Missing files leave empty dicts and curves; nothing is invented."""

    path: Path
    spec: dict[str, Any]
    run: dict[str, Any]
    summary: dict[str, Any]
    train: Curve
    validation: Curve
    step_s: Floats
    data_s: Floats
    batch_hash: dict[int, str] = field(repr=False)
    routers: tuple[Router, ...] = field(repr=False)

    @property
    def complete(self) -> bool:
        return self.summary.get("complete") is True

    @property
    def tokens(self) -> int:
        """Training tokens done."""
        return int(self.train.tokens[-1]) if len(self.train) else 0

    @property
    def train_s(self) -> float | None:
        """Training seconds done, without validation and checkpoints."""
        value = self.summary.get("train_s")
        if isinstance(value, int | float):
            return float(value)
        return float(self.train.train_s[-1]) if len(self.train) else None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where the file is missing, torn or not an object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_run(path: Path) -> RunRecord:
    """Read a run folder. Where a step stands twice (it was repeated after a kill), the later record counts."""
    train: dict[int, dict[str, Any]] = {}
    validation: dict[int, dict[str, Any]] = {}
    for record in _records(path / "metrics.jsonl"):
        kind, step = record.get("kind"), record.get("step")
        if isinstance(step, int) and kind in ("train", "validation"):
            (train if kind == "train" else validation)[step] = record
    steps = [train[step] for step in sorted(train)]
    return RunRecord(
        path=path,
        spec=read_json(path / "spec.json"),
        run=read_json(path / "run.json"),
        summary=read_json(path / "summary.json"),
        train=_curve(steps),
        validation=_curve([validation[step] for step in sorted(validation)]),
        step_s=_column(steps, "step_s"),
        data_s=_column(steps, "data_s"),
        batch_hash={r["step"]: r["batch_hash"] for r in steps if isinstance(r.get("batch_hash"), str)},
        routers=tuple(_routers(steps[len(steps) - max(1, len(steps) // 10) :])) if steps else (),
    )


def last_progress(path: Path) -> tuple[int, float | None]:
    """(tokens, training loss) of the last whole record in metrics.jsonl, reading only the end of the file."""
    try:
        with (path / "metrics.jsonl").open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - (1 << 20)))
            lines = file.read().splitlines()
    except OSError:
        return 0, None
    for line in reversed(lines):
        record = _parse(line)
        if record.get("kind") == "train":
            return int(record.get("tokens", 0)), _number(record.get("loss"))
    return 0, None


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            return [_parse(line) for line in file]
    except OSError:
        return []


def _parse(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _column(records: list[dict[str, Any]], key: str) -> Floats:
    return np.array([_number(record.get(key)) for record in records], dtype=np.float64)


def _curve(records: list[dict[str, Any]]) -> Curve:
    return Curve(**{key: _column(records, key) for key in ("step", "tokens", "loss", "train_s")})


def _routers(records: list[dict[str, Any]]) -> list[Router]:
    seen: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        layers = record.get("router")
        for layer, routers in layers.items() if isinstance(layers, dict) else ():
            for name, values in routers.items() if isinstance(routers, dict) else ():
                if isinstance(values, dict) and values.get("load"):
                    seen.setdefault((layer, name), []).append(values)
    return [
        Router(
            layer=layer,
            name=name,
            load=np.mean([np.asarray(v["load"], dtype=np.float64) for v in values], axis=0),
            entropy=float(np.mean(_column(values, "entropy"))),
            margin=float(np.mean(_column(values, "margin"))),
            dead=int(values[-1].get("dead") or 0),
        )
        for (layer, name), values in sorted(seen.items())
    ]
