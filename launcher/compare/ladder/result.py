"""All statistics of a ladder of sizes from its losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from headway.launcher.compare.ladder.curve import Law, Range, law_of
from headway.launcher.compare.ladder.noise import Means, means_of
from headway.launcher.compare.ladder.slope import Lines, lines_of
from headway.launcher.compare.ladder.table import Refusal, Size
from headway.launcher.compare.simultaneous import Simultaneous, compare_paired

Quantity = Literal["params", "flops"]


@dataclass(frozen=True, kw_only=True)
class LadderResult:
    """Each of `means`, `lines`, `by_params` and `by_flops` is a text with the reason if it is refused.

    `by_params`, `by_flops`: the law over parameters and over useful training FLOPs.
    """

    sizes: tuple[Size, ...]
    variants: tuple[str, ...]
    baseline: str
    means: Means | str
    lines: Lines | str
    by_params: Law | str
    by_flops: Law | str

    @property
    def others(self) -> list[str]:
        return [v for v in self.variants if v != self.baseline]

    def index(self, variant: str) -> int:
        return self.variants.index(variant)

    def size_x(self) -> Any:
        """[I]: ln of the parameters of the baseline at each size that has finished runs."""
        assert not isinstance(self.means, str)
        return np.log([s.params[self.baseline] for s in self.means.sizes])

    @cached_property
    def differences(self) -> dict[str, Mapping[str, Simultaneous]]:
        """Size -> variant -> difference to the baseline, as the runs of this size alone give it."""
        return {s.name: compare_paired(s.losses, self.baseline).differences for s in self.sizes}

    def speed_up_at(self, law: Law, variant: str, size: str) -> Range | None:
        """By the law, at one size; None without finished runs there. The ends are 0 and infinite with one seed."""
        at = next((i for i, s in enumerate(law.means.sizes) if s.name == size), None)
        difference = self.differences.get(size, {}).get(variant)
        if at is None or difference is None:
            return None
        return law.speed_up_at(self.index(variant), self.index(self.baseline), at, difference)

    def change_of_ratio(self, variant: str) -> Range | str:
        """How the difference relative to the baseline's reducible loss changes per unit of ln N, or why not."""
        law, lines = self.by_params, self.lines
        if isinstance(law, str) or isinstance(lines, str):
            return law if isinstance(law, str) else str(lines)
        line = lines.by_variant.get(variant)
        if line is None:
            return lines.refused.get(variant, "it has no finished run")
        names = self.index(variant), self.index(self.baseline)
        return law.change_of_ratio(*names, self.size_x(), line, lines.lack.sd)


def ladder_result(sizes: Sequence[Size], variants: Sequence[str], baseline: str) -> LadderResult:
    """Compute everything that the losses allow. Sizes without a finished run are left out. Raises nothing."""
    begun = [s for s in sizes if any(s.losses.get(v) for v in variants)]
    means: Means | str = "no run has finished: train the ladder"
    if begun:
        means = _or_reason(lambda: means_of(begun, variants))

    def law(quantity: Quantity) -> Law | str:
        if isinstance(means, str):
            return means
        found = means
        pairs = zip(found.variant, found.size, strict=True)
        values = [getattr(found.sizes[i], quantity)[found.variants[v]] for v, i in pairs]
        return _or_reason(lambda: law_of(found, np.log(values)))

    def lines() -> Lines | str:
        if isinstance(means, str):
            return means
        found = means
        x = np.log([s.params[baseline] for s in found.sizes])
        return _or_reason(lambda: lines_of(found, x, baseline))

    return LadderResult(
        sizes=tuple(begun),
        variants=tuple(variants),
        baseline=baseline,
        means=means,
        lines=lines(),
        by_params=law("params"),
        by_flops=law("flops"),
    )


def _or_reason(compute: Any) -> Any:
    try:
        return compute()
    except Refusal as refused:
        return str(refused)
