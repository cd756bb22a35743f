"""Read the records of a run from its folder. Does not import torch. Every line is checked, since a killed process may
leave an incomplete last line.

spec.json     the resolved Spec
run.json      the run card: spec hash, versions, machine, data fingerprint, cost per token; `attempts`: all starts
metrics.jsonl one JSON object per line: `kind` train (every optimizer step), validation, heads (their diversity), start,
              spike, and kinds this reader ignores
summary.json  written last; `complete` is true only for a run that reached its last step
"""

from __future__ import annotations

import contextlib
import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from headway.launcher.run.columns.form import NUMBERS, Forms, kind_and_step, number, row_of
from headway.launcher.run.columns.table import Table, TrainTable, gaps_between
from headway.launcher.run.lines import Damage, Found, Lost, decode, is_step, lines_of, parse_raw
from headway.launcher.run.records_heads import Floats, Heads, Router, read_heads, read_routers
from headway.launcher.run.run_dir import RunDir, read_mapping

_VALIDATION = ("tokens", "loss", "train_s", "accuracy", "standard_error", "documents", "micro_batches", "targets")


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
    validation loss, from the spread over `documents` (in older runs over `micro_batches`, and nan `documents`); nan if
    not recorded. `targets`: of each validation. `sets`: losses of each validation set, at each validation; nan if not
    recorded. `set_noise`: standard error and documents of each set, and `mix`: tokens and epochs of each dataset of a
    mixture, at the last validation. `step_s`, `data_s`: seconds of each step, and of its wait for data, without
    steps that were profiled. `lost`: records that metrics.jsonl and all curves lack.
    """

    path: Path
    spec: dict[str, Any]
    run: dict[str, Any]
    summary: dict[str, Any]
    train: Curve
    validation: Curve
    accuracy: Floats
    standard_error: Floats
    documents: Floats
    micro_batches: Floats
    targets: Floats
    sets: Mapping[str, Floats]
    set_noise: Mapping[str, Mapping[str, float]]
    mix: Mapping[str, Mapping[str, float]]
    grad_norm: Floats
    skipped: int
    spikes: int
    step_s: Floats
    data_s: Floats
    batch_hash: Mapping[int, str] = field(repr=False)
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
    """Read a run folder. If a step has two records, because it was repeated after a kill, the later one is used.

    A record of training takes about 100 bytes of memory while it is read.
    """
    run, damage = RunDir(path), Damage()
    found = _Records.of(run.metrics, damage, tag=run.tag)
    train, validation = found.train, found.validation
    kept, validated = train.kept(), validation.kept()
    steps = train.steps(kept)
    return RunRecord(
        path=path,
        spec=read_mapping(path / "spec.json"),
        run=read_mapping(path / "run.json"),
        summary=read_mapping(path / "summary.json"),
        train=_curve(train, kept),
        validation=_curve(validation, validated),
        accuracy=validation.column("accuracy", validated),
        standard_error=validation.column("standard_error", validated),
        documents=validation.column("documents", validated),
        micro_batches=validation.column("micro_batches", validated),
        targets=validation.column("targets", validated),
        sets=_sets(found.sets, validation.steps(validated)),
        set_noise=_noise(found.sets, validation.steps(validated)),
        mix=found.mix,
        grad_norm=train.column("grad_norm", kept),
        skipped=train.skipped(kept),
        spikes=len(found.spikes),
        step_s=_timed(train, kept, "step_s"),
        data_s=_timed(train, kept, "data_s"),
        batch_hash=train.hashes(kept),
        routers=found.routers,
        heads=read_heads(_by_step(found.heads)),
        start=_start(_by_step(found.starts)),
        lost=Lost.of(damage, gaps_between(steps[steps > 0])),
    )


def _timed(train: TrainTable, kept: NDArray[np.intp], key: str) -> Floats:
    """A time of each step that has one: steps with a trace have none."""
    found = train.column(key, kept)
    return found[~np.isnan(found)]


class _Records:
    """The records of one file, by kind; those of training and validation as columns."""

    def __init__(self) -> None:
        self.train, self.validation = TrainTable(NUMBERS), Table(_VALIDATION)
        self.heads, self.starts, self.spikes = dict[int, dict[str, Any]](), dict[int, dict[str, Any]](), set[int]()
        self.routers: tuple[Router, ...] = ()
        self.sets, self.mix = dict[int, dict[str, Any]](), dict[str, dict[str, float]]()

    @classmethod
    def of(cls, path: Path, damage: Damage, *, tag: str) -> _Records:
        """Read a file. There are no records if there is no file, or if it cannot be read."""
        found = cls()
        try:
            with path.open("rb") as file:
                lines = _Placed(file)
                for line in lines_of(lines, damage, tag=tag, parse=Forms().read):
                    found._add(line, lines.place)
                found._read_routers(file)
        except OSError:
            return cls()
        return found

    def _add(self, line: Found, place: int) -> None:
        record = line.record
        kind = "train" if line.row is not None else record.get("kind")
        if kind == "train":
            if (row := line.row or row_of(record)) is not None:
                self.train.add_row(row, place)
        elif is_step(step := record.get("step")):
            if kind == "validation":
                self.validation.add(step, [number(record.get(key)) for key in _VALIDATION])
                self.sets[step] = _mappings(record.get("sets"))
                self.mix = _mappings(record.get("mix"))
            elif kind == "spike":
                self.spikes.add(step)
            elif kind == "heads":
                self.heads[step] = record
            elif kind == "start":
                self.starts[step] = record

    def _read_routers(self, file: BinaryIO) -> None:
        """Read the routers in the last tenth of the steps again: most of a file need not stay in memory for them."""
        if self.train.routers:
            kept = self.train.kept()
            places = self.train.places(kept[len(kept) - max(1, len(kept) // 10) :])
            self.routers = read_routers(_record_at(file, place) for place in places)


def _mappings(value: Any) -> dict[str, Any]:
    """The mappings in a recorded mapping; none of anything else."""
    return {key: inner for key, inner in value.items() if isinstance(inner, dict)} if isinstance(value, dict) else {}


def _sets(by_step: Mapping[int, dict[str, Any]], steps: NDArray[np.int64]) -> dict[str, Floats]:
    """Name of a validation set -> its loss at each of `steps`."""
    names = dict.fromkeys(name for step in steps.tolist() for name in by_step.get(step, {}))
    return {
        name: np.array([number(by_step.get(step, {}).get(name, {}).get("loss")) for step in steps.tolist()])
        for name in names
    }


def _noise(by_step: Mapping[int, dict[str, Any]], steps: NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """Name of a validation set -> standard error and documents at the last of `steps`, where they are recorded."""
    last = by_step.get(int(steps[-1]), {}) if steps.size else {}
    found = {name: {key: number(one.get(key)) for key in ("standard_error", "documents")} for name, one in last.items()}
    return {name: noise for name, noise in found.items() if np.isfinite([*noise.values()]).all()}


class _Placed:
    """The lines of a file. `place`: offset of the latest one in bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.place = file, 0

    def __iter__(self) -> Iterator[bytes]:
        following = 0
        for raw in self._file:
            self.place, following = following, following + len(raw)
            yield raw


def _record_at(file: BinaryIO, place: int) -> dict[str, Any]:
    file.seek(place)
    return parse_raw(file.readline()).record or {}


def _by_step(records: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [records[step] for step in sorted(records)]


def step_seconds(run: RunDir, *, after: int) -> Floats:
    """Seconds of the recorded training steps after the step `after`. Raises OSError; there are none without a file."""
    seconds, place = array("d"), NUMBERS.index("step_s")
    with contextlib.suppress(FileNotFoundError), run.metrics.open("rb") as file:
        for line in lines_of(file, Damage(), tag=run.tag, parse=Forms().read):
            row = line.row or (row_of(line.record) if line.record.get("kind") == "train" else None)
            if row is not None and row.step > after:
                seconds.append(row.values[place])
    found = np.array(seconds, dtype=np.float64)
    return found[~np.isnan(found)]


def kinds_and_steps(run: RunDir) -> Iterator[tuple[Any, Any]]:
    """(kind, step) of each undamaged record, in the order of the file, whatever they are. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), run.metrics.open("rb") as file:
        yield from map(kind_and_step, lines_of(file, Damage(), tag=run.tag, parse=Forms().read))


def last_progress(path: Path) -> tuple[int, float | None]:
    """(tokens, training loss) of the last complete record in metrics.jsonl. Reads only the end of the file."""
    record = _last(path, "train")
    if record is None:
        return 0, None
    tokens = number(record.get("tokens"))
    return int(tokens) if math.isfinite(tokens) else 0, number(record.get("loss"))


def last_validation(path: Path) -> float | None:
    """Validation loss of the last complete validation record in metrics.jsonl; None if there is none."""
    record = _last(path, "validation")
    return None if record is None else number(record.get("loss"))


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


def _parse(line: bytes) -> dict[str, Any]:
    return decode(line.decode(errors="replace")) or {}


def _start(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    layers = records[0].get("layers") if records else None
    found = layers if isinstance(layers, dict) else {}
    return {
        str(name): {branch: number(values.get(branch)) for branch in ("attention", "mlp")}
        for name, values in found.items()
        if isinstance(values, dict)
    }


def _curve(table: Table, kept: NDArray[np.intp]) -> Curve:
    return Curve(
        step=table.steps(kept).astype(np.float64),
        tokens=table.column("tokens", kept),
        loss=table.column("loss", kept),
        train_s=table.column("train_s", kept),
    )
