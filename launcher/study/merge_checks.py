"""Checks of `headway study merge`: what may not differ between cells of one study.

Each function returns one line for each difference, with the cell, the key and both values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.launcher.compare.batch_hashes import compare_hashes
from headway.launcher.compare.step_figures import StepFigures
from headway.launcher.run.records import RunRecord
from headway.launcher.run.run_dir import identity


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished and undamaged cell of one source. `path`: its run folder, or its record if `is_record`.
    `folder`: that of its study.

    `changes`: (key, value planned, value trained) where its spec is not the one of the study.
    """

    key: str
    source: str
    variant: str
    seed: int
    run: RunRecord
    steps: StepFigures
    folder: Path
    path: Path
    is_record: bool
    changes: list[tuple[str, Any, Any]]


def cell_differences(cells: Sequence[Finished]) -> Iterator[str]:
    """Specs that are not the planned ones, and cells that occur twice with different results."""
    first: dict[str, Finished] = {}
    for cell in cells:
        for key, planned, trained in cell.changes:
            yield f"cell {cell.key}: {key}: {planned!r} planned, {trained!r} in {cell.source}"
        other = first.setdefault(cell.key, cell)
        if other is not cell and (found := _result_difference(other, cell)):
            yield f"cell {cell.key}: {found}"


def data_differences(cells: Sequence[Finished]) -> Iterator[str]:
    """Cells with the same keys of `data` whose datasets have different fingerprints."""
    first: dict[str, Finished] = {}
    for cell in cells:
        keys = {k: v for k, v in identity(cell.run.spec).items() if k.startswith("data.") and k != "data.seed"}
        other = first.setdefault(json.dumps(keys, sort_keys=True), cell)
        yield from _difference("data fingerprint", "data_fingerprint", other, cell, other.run.run, cell.run.run)


def version_differences(cells: Sequence[Finished]) -> Iterator[str]:
    """Versions that decide about results: of Headway, of PyTorch without its build, and of the variant's own package.

    Other versions, commits and machines are confounds that the report names.
    """
    variants: dict[str, Finished] = {}
    for cell in cells:
        yield from _difference("version of headway", "headway", cells[0], cell, *_versions(cells[0], cell))
        yield from _difference("version of torch", "torch", cells[0], cell, *_versions(cells[0], cell))
        other = variants.setdefault(cell.variant, cell)
        yield from _difference("mechanism sources", "mechanism", other, cell, other.run.run, cell.run.run)


def _versions(*cells: Finished) -> Iterator[dict[str, Any]]:
    for cell in cells:
        found = cell.run.run.get("versions")
        found = found if isinstance(found, dict) else {}
        yield {key: str(value).partition("+")[0] for key, value in found.items()}


def _difference(
    what: str, key: str, one: Finished, other: Finished, card: dict[str, Any], other_card: dict[str, Any]
) -> Iterator[str]:
    a, b = card.get(key), other_card.get(key)
    if a != b:
        yield f"cell {other.key}: {what}: {b!r} in {other.source}, but {a!r} in {one.source} (cell {one.key})"


def _result_difference(one: Finished, other: Finished) -> str | None:
    """How two results of one cell differ; None if they do not."""
    where = one.source, other.source
    if one.steps.count != other.steps.count:
        return f"steps: {one.steps.count:,} in {where[0]}, {other.steps.count:,} in {where[1]}"
    if (found := compare_hashes(one.steps.hashes, other.steps.hashes).difference) is not None:
        return f"batches: {where[0]} and {where[1]} differ, {found}"
    curves = [cell.run.validation for cell in (one, other)]
    losses = [dict(zip(c.tokens.astype(int).tolist(), c.loss.tolist(), strict=True)) for c in curves]
    for tokens in sorted(losses[0].keys() | losses[1].keys()):
        a, b = (found.get(tokens) for found in losses)
        if a != b and not (a != a and b != b):  # two NaN are alike
            return f"validation loss at {tokens:,} tokens: {a} in {where[0]}, {b} in {where[1]}"
    return None
