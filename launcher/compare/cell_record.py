"""The record of a finished cell: one small JSON file with all that a report needs, made to be kept in git.

A run folder grows with the steps of the run; a record has figures of all steps, the validation curve, and digests of
the batches instead (`headway.launcher.compare.step_figures`). It contains the checksum of its own content, and the end
of the chain of checksums of metrics.jsonl. This detects damage and mistakes, not forgery.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from headway.launcher.base.errors import HeadwayError, printable
from headway.launcher.compare.batch_hashes import Marks, marks_of
from headway.launcher.compare.fairness import changing_attempts
from headway.launcher.compare.stats import Speed
from headway.launcher.compare.step_figures import StepFigures, step_figures
from headway.launcher.run.lines import Lost
from headway.launcher.run.record_check import check_records
from headway.launcher.run.records import Curve, RunRecord, read_run
from headway.launcher.run.records_heads import Floats, Heads, Router
from headway.launcher.run.run_dir import RunDir, write_text

FORMAT = 1
_OF_THE_FOLDER = ("working_dir",)
"""Keys of a run card that are true of one machine only."""
SHA256 = "sha256"
"""Last key of a record: hash of all others."""

_UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError)

_CURVE = ("step", "tokens", "loss", "train_s")
_VALIDATION = ("accuracy", "standard_error", "documents", "micro_batches", "targets")


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """A record after reading. `note`: a note of `cell_state` on the records that it was made from. `beside`: most other
    cells that trained at the same time.

    `run`: its curve `train` is the running mean, and fields with one value for each step are empty: `steps` has their
    figures. `chain`: the end of metrics.jsonl as summary.json named it; None for a run of an earlier version.
    """

    key: str
    variant: str
    seed: int
    budget: float
    beside: int
    run_id: str | None
    note: str
    run: RunRecord
    steps: StepFigures

    @property
    def chain(self) -> dict[str, Any] | None:
        return self.run.summary.get("records")


@dataclass(frozen=True, kw_only=True)
class DamagedRecord:
    """A file that is no undamaged record. `why`: the reason, in words that follow its path."""

    why: str


class NoRecordError(HeadwayError):
    """A run folder of which no record can be made; the message says why."""


def record_file(records: Path, key: str) -> Path:
    """The file of a cell in a folder of records: `VARIANT/seed-N.json`."""
    return records / f"{key}.json"


def write_record(
    run_dir: Path, path: Path, *, key: str, variant: str, seed: int, budget: float, beside: int = 0
) -> None:
    """Write the record of the finished run in `run_dir`, atomically. `beside`: most cells that trained at its side.

    Raises NoRecordError if the run is not finished, is damaged, or lacks records of some steps; OSError.
    """
    content = record_of(run_dir, key=key, variant=variant, seed=seed, budget=budget, beside=beside)
    try:
        _restored(path, json.loads(_compact(content)))
    except _UNREADABLE as e:
        raise NoRecordError(f"{run_dir}: its records cannot be kept ({e})") from e
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, record_text(content))


def record_of(run_dir: Path, *, key: str, variant: str, seed: int, budget: float, beside: int = 0) -> dict[str, Any]:
    """The content of a record, without its checksum. Raises NoRecordError as `write_record` does."""
    check, run = check_records(run_dir), read_run(run_dir)
    if not run.complete:
        raise NoRecordError(f"{run_dir}: the run is not finished")
    if check.damage or run.lost:
        raise NoRecordError(f"{run_dir}: {check.damage or run.lost}")
    steps = step_figures(run)
    hashes = run.batch_hash
    marks = marks_of(hashes)
    if hashes and marks is None:
        raise NoRecordError(f"{run_dir}: some steps have no hash of their batch")
    return {
        "format": FORMAT,
        "cell": {"key": key, "variant": variant, "seed": seed, "budget": budget, "beside": beside},
        "run": RunDir(run_dir).run_id(),
        "note": check.note,
        "spec": run.spec,
        "card": {key: value for key, value in run.run.items() if key not in _OF_THE_FOLDER} | _attempts(run.run),
        "summary": run.summary,
        "validation": _columns(run.validation, _CURVE) | {key: _column(getattr(run, key)) for key in _VALIDATION},
        **({"sets": {name: _column(losses) for name, losses in run.sets.items()}} if run.sets else {}),
        **({"set_noise": {name: dict(found) for name, found in run.set_noise.items()}} if run.set_noise else {}),
        **({"mix": {name: dict(found) for name, found in run.mix.items()}} if run.mix else {}),
        "train": _figures(steps),
        "batches": None if marks is None else {"first": marks.first, "at": _listed(marks)},
        "start": {layer: {k: _number(v) for k, v in found.items()} for layer, found in run.start.items()},
        "routers": [_router(router) for router in run.routers],
        "heads": None if run.heads is None else _heads(run.heads),
    }


def record_text(content: dict[str, Any]) -> str:
    """The text of a record, whose last key is its checksum. Git shows which keys differ between two records."""
    return lines_of_json({**content, SHA256: content_hash(content)})


def lines_of_json(content: dict[str, Any]) -> str:
    """JSON with one line for each key."""
    lines = [f" {json.dumps(key)}: {_compact(value)}" for key, value in content.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def content_hash(content: dict[str, Any]) -> str:
    """sha256 of a record without its checksum."""
    return hashlib.sha256(_compact({k: v for k, v in content.items() if k != SHA256}, sort=True).encode()).hexdigest()


def read_record(path: Path, key: str | None = None) -> CellRecord | DamagedRecord | None:
    """Read a record; None if there is no such file. `key`: the cell that it should be of; None: any."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as e:
        return DamagedRecord(why=f"cannot be read ({getattr(e, 'strerror', None) or 'it is no text'})")
    try:
        content = json.loads(text)
        named = content_hash(content) if isinstance(content, dict) else ""
    except (ValueError, RecursionError):
        return DamagedRecord(why="is cut or changed: it is no JSON")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return DamagedRecord(why="is no record of a cell in the format of this version")
    if content.get(SHA256) != named:
        return DamagedRecord(why="was changed: its content does not have the checksum that it names")
    try:
        found = _restored(path, content)
    except _UNREADABLE as e:
        return DamagedRecord(why=f"is no whole record ({type(e).__name__}: {printable(str(e))})")
    return found if key in (None, found.key) else DamagedRecord(why=f"is the record of another cell, {found.key}")


def _restored(path: Path, content: dict[str, Any]) -> CellRecord:
    if not all(isinstance(content[key], dict) for key in ("cell", "spec", "card", "summary", "validation", "train")):
        raise ValueError("a part is no mapping")
    cell, validation, train = content["cell"], content["validation"], content["train"]
    curve = _curve(train["curve"])
    floats = np.array([], dtype=np.float64)
    batches, heads = content["batches"], content["heads"]
    speed = train["speed"]
    run = RunRecord(
        path=path,
        spec=content["spec"],
        run=content["card"],
        summary=content["summary"],
        train=curve,
        validation=_curve(validation),
        # Records of earlier versions have no documents.
        **{key: _array(validation.get(key), len(validation["step"])) for key in _VALIDATION},
        sets={name: _array(found, len(validation["step"])) for name, found in content.get("sets", {}).items()},
        set_noise=_numbers(content.get("set_noise", {})),
        mix=_numbers(content.get("mix", {})),
        grad_norm=floats,
        skipped=train["skipped"],
        spikes=train["spikes"],
        step_s=floats,
        data_s=floats,
        batch_hash={},
        routers=tuple(_restored_router(router) for router in content["routers"]),
        heads=None if heads is None else _restored_heads(heads),
        start={layer: {k: _float(v) for k, v in found.items()} for layer, found in content["start"].items()},
        lost=Lost(lines=0, gaps=()),
    )
    steps = StepFigures(
        curve=curve,
        speed=None if speed is None else Speed(**speed),
        hashes={} if batches is None else _restored_marks(batches),
        **{f.name: train[f.name] for f in fields(StepFigures) if f.name not in ("curve", "speed", "hashes")},
    )
    marks = steps.hashes.at if isinstance(steps.hashes, Marks) else ()
    whole = (cell["seed"], *marks, steps.count, steps.skipped, steps.spikes, steps.window)
    if not all(type(number) is int for number in whole) or not isinstance(cell["key"], str):
        raise ValueError("a count is no whole number")
    if not np.isfinite([*curve.step, *curve.tokens, *run.validation.step]).all():
        raise ValueError("a step or its number of tokens is missing")
    return CellRecord(
        key=cell["key"],
        variant=cell["variant"],
        seed=cell["seed"],
        budget=float(cell["budget"]),
        beside=int(cell["beside"]),
        run_id=content["run"],
        note=str(content["note"]),
        run=run,
        steps=steps,
    )


# ---------------------------------------------------------------- parts of a record


def _attempts(card: dict[str, Any]) -> dict[str, Any]:
    """The starts of a run that changed something, of a card that lists starts."""
    return {"attempts": changing_attempts(card)} if isinstance(card.get("attempts"), list) else {}


def _figures(steps: StepFigures) -> dict[str, Any]:
    speed = steps.speed
    plain = {f.name: getattr(steps, f.name) for f in fields(steps) if f.name not in ("curve", "speed", "hashes")}
    return {
        **{key: _number(value) if isinstance(value, float) else value for key, value in plain.items()},
        "speed": None if speed is None else {f.name: getattr(speed, f.name) for f in fields(speed)},
        "curve": _columns(steps.curve, _CURVE),
    }


def _listed(marks: Marks) -> list[list[Any]]:
    return [[step, digest, own] for step, (digest, own) in sorted(marks.at.items())]


def _restored_marks(batches: dict[str, Any]) -> Marks:
    marks = Marks(first=batches["first"], at={step: (digest, own) for step, digest, own in batches["at"]})
    if type(marks.first) is not int or marks.first not in marks.at:
        raise ValueError("the first batch has no hash")
    return marks


def _router(router: Router) -> dict[str, Any]:
    return {
        "layer": router.layer,
        "name": router.name,
        "load": router.load.tolist(),
        "means": {key: _number(value) for key, value in router.means.items()},
        "dead": router.dead,
    }


def _restored_router(found: dict[str, Any]) -> Router:
    return Router(
        layer=found["layer"],
        name=found["name"],
        load=np.array(found["load"], dtype=np.float64),
        means={key: _float(value) for key, value in found["means"].items()},
        dead=found["dead"],
    )


def _heads(heads: Heads) -> dict[str, Any]:
    return {
        "member": heads.member,
        "members": heads.members,
        "tokens": _column(heads.tokens),
        "layers": {layer: {key: _column(v) for key, v in found.items()} for layer, found in heads.layers.items()},
    }


def _restored_heads(found: dict[str, Any]) -> Heads:
    count = len(found["tokens"])
    return Heads(
        member=found["member"],
        members=found["members"],
        tokens=_array(found["tokens"], count),
        layers={
            layer: {key: _array(values, count) for key, values in measures.items()}
            for layer, measures in found["layers"].items()
        },
    )


# ---------------------------------------------------------------- numbers


def _columns(curve: Curve, keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: [_number(v) for v in getattr(curve, key).tolist()] for key in keys}


def _curve(found: dict[str, Any]) -> Curve:
    return Curve(**{key: _array(found[key], len(found["step"])) for key in _CURVE})


def _column(values: Floats) -> Any:
    """A list, or for equal values the value itself. The first column of a table is always a list."""
    numbers = [_number(v) for v in values.tolist()]
    return numbers[0] if len(numbers) > 1 and all(v == numbers[0] for v in numbers) else numbers


def _numbers(content: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {name: {key: _float(value) for key, value in found.items()} for name, found in content.items()}


def _array(column: Any, count: int) -> Floats:
    values = column if isinstance(column, list) else [column] * count
    if len(values) != count:
        raise ValueError(f"{len(values)} values instead of {count}")
    return np.array([_float(v) for v in values], dtype=np.float64)


def _number(value: float) -> float | int | str | None:
    """A number for JSON: whole ones without a point, NaN as null, an infinite one as text."""
    if math.isnan(value):
        return None
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return int(value) if value == int(value) and abs(value) < 2**53 else value


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _compact(value: Any, *, sort: bool = False) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=sort, allow_nan=False)
