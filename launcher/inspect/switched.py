"""What a head or an expert is worth: how much the loss rises when it is switched off, with an interval over documents.

Nothing is trained again, so the rest of the model cannot take over: the numbers say what this model uses, not what a
model without the head would lose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headway.launcher.base.intervals import interval
from headway.launcher.exchange.opened import Opened
from headway.launcher.inspect.sample import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from headway.model.measure.observe import Off


@dataclass(frozen=True, kw_only=True)
class Worth:
    """Rise of the loss in nats per token without `off`; `low`, `high`: 95 % interval over sequences, None with one."""

    off: Off
    rise: float
    low: float | None
    high: float | None


def worths(model: Opened, sample: Sample, done: Callable[[], None] = lambda: None) -> tuple[float, list[Worth]]:
    """(loss of the whole model, what each head and expert is worth)."""
    import torch

    targets = (sample.labels >= 0).sum(1).double()
    whole = _losses(model, sample, None)
    loss = float(whole.sum() / targets.sum())
    found = []
    for off in switches(model, sample):
        rise = _losses(model, sample, off) - whole  # [N]
        mean = float(rise.sum() / targets.sum())
        kept = targets > 0
        count = int(kept.sum())
        low = high = None
        if count > 1:
            spread = float(((rise - mean * targets)[kept] ** 2).sum())
            error = math.sqrt(count / (count - 1) * spread) / float(targets.sum())
            low, high = interval(mean, error, groups=count)
        found.append(Worth(off=off, rise=mean, low=low, high=high))
        done()
    assert torch.isfinite(whole).all()
    return loss, found


def switches(model: Opened, sample: Sample) -> list[Off]:
    """Everything that can be switched off: all query heads, and the experts of all routers but those of query heads."""
    import torch

    from headway.model.attention.gqe import GroupedQueryExperts
    from headway.model.attention.moh import MixtureOfHeads
    from headway.model.attention.namoh import Namoh
    from headway.model.attention.rgqa import RoutedGroupedQueryAttention
    from headway.model.measure.observe import Off, observed

    first = sample.rows(0, 1)
    with torch.no_grad(), observed(model.model, first.segments, maps=False) as layers:
        first.read(model.model)
    found = []
    for number, (layer, module) in enumerate(zip(layers, model.model.attention_layers(), strict=True)):
        found += [Off(number, head) for head in range(layer.heads)]
        of_heads = isinstance(module, RoutedGroupedQueryAttention | GroupedQueryExperts | MixtureOfHeads | Namoh)
        for name, routing in layer.routings.items():
            if of_heads and name == "router":
                continue  # its experts are the query heads
            groups, experts = range(routing.idx.shape[2]), range(layer.experts[name])
            found += [Off(number, expert, name, group) for group in groups for expert in experts]
    return found


def _losses(model: Opened, sample: Sample, off: Off | None) -> Tensor:
    """Sum of the losses of each sequence [N], float64."""
    import torch

    from headway.model.measure.observe import observed

    sums = []
    for part in sample.passes():
        with torch.no_grad(), observed(model.model, part.segments, maps=False, off=off):
            out = part.read(model.model)
        assert out.by_token is not None
        sums.append(out.by_token.losses.double().sum(1).cpu())
    return torch.cat(sums)
