"""Context of the numbers of a study: epochs, noise of the baseline and of validation, clipped steps, spikes.

None of these figures is tested. They say what differences of the study can be compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headway.launcher.compare.analyse import StudyResult
from headway.launcher.compare.cell_results import CellResult

SMALL = 0.1
"""Validation noise below this share of the spread of a run is small."""


@dataclass(frozen=True, kw_only=True)
class Steadiness:
    """Steps of one variant, summed over its finished full runs. None: not recorded, or `spikes`: not watched for.

    `clipped`: steps whose gradient norm exceeded `optimizer.clip_norm`. `spikes`: as `guard.spike` defines them.
    `skipped`: steps whose update was not applied.
    """

    steps: int
    clipped: int | None
    clip_norm: float | None
    spikes: int | None
    skipped: int


@dataclass(frozen=True, kw_only=True)
class ValidationNoise:
    """Standard error of a validation loss from the finite number of validation tokens, mean over finished full runs.

    `needed_tokens`: validation tokens that make it `SMALL` of `spread`; None if no spread is known. `spread`: the
    standard deviation of a run given its variant and seed, pooled over variants. `groups`: what the error is
    over, as a number and a noun: documents, or micro-batches in runs of earlier versions.
    """

    tokens: int
    groups: str
    standard_error: float
    spread: float | None
    needed_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class Context:
    """`epochs`: tokens of one run over the training tokens of the dataset; None for synthetic or unrecorded data.

    `baseline_sd`: standard deviation of the loss of the baseline over its `baseline_seeds`; None with one seed.
    `paired_sd`: that of a paired difference of one seed, by the spread that is pooled over variants; None without it.
    """

    trained_tokens: int | None
    data_tokens: int | None
    synthetic: bool
    baseline_seeds: int
    baseline_sd: float | None
    paired_sd: float | None
    steadiness: dict[str, Steadiness]
    validation: ValidationNoise | None

    @property
    def epochs(self) -> float | None:
        if not self.trained_tokens or not self.data_tokens:
            return None
        return self.trained_tokens / self.data_tokens

    @property
    def pair_sd(self) -> float | None:
        """Standard deviation of the difference of two runs of the baseline with different seeds."""
        return None if self.baseline_sd is None else math.sqrt(2) * self.baseline_sd


def context_of(result: StudyResult) -> Context:
    """Collect the context of a study from the records of its finished full runs."""
    done = [c for c in result.cells if c.done]
    sources = {c.planned.get("data", {}).get("source", {}).get("type") for c in done}
    loss = result.baseline.loss
    return Context(
        trained_tokens=result.tokens,
        data_tokens=result.card("train_tokens_of_data"),
        synthetic=sources == {"synthetic"},
        baseline_seeds=0 if loss is None else loss.n,
        baseline_sd=None if loss is None else loss.sd,
        paired_sd=math.sqrt(2) * spread if (spread := result.comparison.spread) is not None else None,
        steadiness={
            v.name: _steadiness(mine) for v in result.variants if (mine := [c for c in done if c.variant == v.name])
        },
        validation=validation_noise(result),
    )


def _steadiness(cells: Sequence[CellResult]) -> Steadiness:
    limits = {c.steps.clip_norm for c in cells}
    limit = limits.pop() if len(limits) == 1 else None
    clipped = [c.steps.clipped for c in cells if c.steps.clipped is not None]
    watched = all(c.planned.get("guard", {}).get("spike", "off") != "off" for c in cells)
    return Steadiness(
        steps=sum(c.steps.count for c in cells),
        clipped=sum(clipped) if len(clipped) == len(cells) and limit is not None else None,
        clip_norm=limit,
        spikes=sum(c.steps.spikes for c in cells) if watched else None,
        skipped=sum(c.steps.skipped for c in cells),
    )


def validation_noise(result: StudyResult) -> ValidationNoise | None:
    """Of the finished full runs of a study; None where none of them recorded it."""
    spread, cells = result.comparison.spread, [c for c in result.cells if c.done]
    last = [c.record for c in cells if c.record.standard_error.size and np.isfinite(c.record.standard_error[-1])]
    if not last:
        return None
    error = float(np.mean([r.standard_error[-1] for r in last]))
    tokens = int(np.mean([r.targets[-1] for r in last]))
    documents = min(r.documents[-1] for r in last)
    parts = min(r.micro_batches[-1] for r in last)
    groups = f"{parts:,.0f} micro-batches" if math.isnan(documents) else f"{documents:,.0f} documents"
    return ValidationNoise(
        tokens=tokens,
        groups=groups,
        standard_error=error,
        spread=spread or None,
        needed_tokens=math.ceil(tokens * (error / (SMALL * spread)) ** 2) if spread else None,
    )
