"""What the experts of a router specialise in: the tokens that choose them, and contexts in which they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from headway.launcher.exchange.opened import Opened
from headway.launcher.inspect.sample import Sample

if TYPE_CHECKING:
    from torch import Tensor

TOP = 5
"""Tokens and contexts that are shown of an expert."""
AROUND = 6
"""Tokens before the one of a context."""
_SEEN = 3
"""A token counts if it occurs this often."""


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One expert of a group of a router.

    `share`: share of the group's choices. `tokens`: (text, how much more often it chooses the expert than all tokens
    do, number of its choices), ordered by number times logarithm of the ratio. `contexts`: texts whose last token gave
    the expert the largest gates.
    """

    layer: int
    router: str
    group: int
    expert: int
    share: float
    gate: float
    tokens: tuple[tuple[str, float, int], ...]
    contexts: tuple[str, ...]


def experts_of(model: Opened, sample: Sample) -> list[Expert]:
    """All experts of all routers; none for dense models."""
    import torch

    from headway.model.measure.observe import observed

    seen: dict[tuple[int, str, int], list[tuple[Tensor, Tensor]]] = {}
    for part in sample.passes():
        with torch.no_grad(), observed(model.model, part.segments, maps=False) as layers:
            part.read(model.model)
        for number, layer in enumerate(layers):
            for name, routing in layer.routings.items():
                key = number, name, layer.experts[name]
                seen.setdefault(key, []).append((routing.idx.cpu(), routing.gate.double().cpu()))
    found = []
    for (number, name, count), parts in sorted(seen.items(), key=lambda item: item[0]):
        idx, gate = (torch.cat(tensors) for tensors in zip(*parts, strict=True))  # [N, S, G, k]
        for group in range(idx.shape[2]):
            for expert in range(count):
                found.append(_expert(model, sample, number, name, group, expert, idx[:, :, group], gate[:, :, group]))
    return found


def _expert(
    model: Opened, sample: Sample, layer: int, router: str, group: int, expert: int, idx: Tensor, gate: Tensor
) -> Expert:
    """idx, gate [N, S, k] of a group."""
    import torch

    real = sample.real
    chosen = (idx == expert) & real[..., None]
    uses, weight = chosen.any(-1), torch.where(chosen, gate, 0).sum(-1)  # [N, S]
    vocabulary = int(sample.tokens.max()) + 1
    all_counts = torch.bincount(sample.tokens[real], minlength=vocabulary).double()
    counts = torch.bincount(sample.tokens[uses], minlength=vocabulary).double()
    share = float(counts.sum() / all_counts.sum())
    lift = counts / all_counts.clamp_min(1) / max(share, 1e-12)
    lift[all_counts < _SEEN] = 0
    weight_of = torch.where(lift > 1, counts * lift.log(), 0.0)
    best = [int(token) for token in weight_of.argsort(descending=True, stable=True)[:TOP] if weight_of[int(token)]]
    order = weight.flatten().argsort(descending=True, stable=True)[: 4 * TOP].tolist()
    contexts: list[str] = []
    for place in order:
        row, column = divmod(place, weight.shape[1])
        if not uses[row, column] or len(contexts) == TOP:
            break
        text = model.codec.decode(sample.tokens[row, max(0, column - AROUND) : column + 1].tolist())
        if text not in contexts:
            contexts.append(text)
    return Expert(
        layer=layer,
        router=router,
        group=group,
        expert=expert,
        share=float(chosen.sum() / max(1, int(real.sum()) * idx.shape[-1])),
        gate=float(weight[uses].mean()) if uses.any() else 0.0,
        tokens=tuple((model.codec.decode([token]), float(lift[token]), int(counts[token])) for token in best),
        contexts=tuple(contexts),
    )
