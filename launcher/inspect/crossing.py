"""Where heads of cross attention look in real sources: entropy, and the places and tokens with most of their attention.

Everything is over the target tokens that see a source, and compared with attention that is equal over the source tokens
that they see. Places are counted from the first token of the source, in packed sequences that of the same document.

Legend: B batch, S target tokens, K source tokens, H heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headway.launcher.exchange.opened import Opened
from headway.launcher.inspect.places import places_of
from headway.launcher.inspect.sample import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from headway.model.measure.observe import Layer

TOP = 3
"""Places and tokens that are shown of a head."""
_SEEN = 3
"""A token counts if the sources have it this often."""


@dataclass(frozen=True, kw_only=True)
class Attended:
    """A place or a token. `share`: of all attention of the head. `ratio`: to that of equal attention."""

    what: int | str
    share: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class CrossHead:
    """A head of cross attention of block `layer`.

    entropy: Mean over target tokens, in nats. of_uniform: Mean entropy over that of equal attention, 0 to 1; None if
    every token sees one source token. places: Those with the largest shares. tokens: Among tokens that are in the
    sources three times or more and get more than equal attention gives, those with the largest share times logarithm of
    the ratio.
    """

    layer: int
    head: int
    entropy: float
    of_uniform: float | None
    places: tuple[Attended, ...]
    tokens: tuple[Attended, ...]


def cross_heads(model: Opened, sample: Sample) -> list[CrossHead]:
    """All heads of cross attention of an encoder-decoder on `sample`; none if no target token sees a source."""
    import torch

    from headway.model.measure.observe import observed

    assert sample.source is not None, "the sample of an encoder-decoder has a source"
    stacks = [place.layer if place.stack == "cross" else None for place in places_of(model.model)]
    sums = {layer: _Sums() for layer in stacks if layer is not None}
    vocabulary = model.model.embedding.shape[0]
    for part in sample.passes():
        with torch.no_grad(), observed(model.model, part.segments) as layers:
            part.read(model.model)
        seen = _seen(part)
        for layer, done in zip(stacks, layers, strict=True):
            if layer is not None:
                sums[layer].add(part, done, seen, vocabulary)
    return [head for layer, found in sums.items() for head in found.heads(model, layer)]


def _seen(part: Sample) -> Tensor:
    """bool [B, S, K]: the source tokens that each target token sees; none where the sequence has ended."""
    import torch

    from headway.kernels.visible import same_document

    assert part.source is not None
    shape = len(part.tokens), part.tokens.shape[1], part.source.shape[1]
    same = same_document(part.segments, part.source_segments, shape=shape)
    same = torch.ones(shape, dtype=torch.bool) if same is None else same.cpu()
    return same & part.real.unsqueeze(-1)


def _place_in_document(part: Sample) -> Tensor:
    """Place of each source token in the source of its own document [B, K]."""
    import torch

    assert part.source is not None
    place = torch.arange(part.source.shape[1]).expand_as(part.source)
    if part.source_segments is None:
        return place
    begins = torch.ones_like(part.source, dtype=torch.bool)
    begins[:, 1:] = part.source_segments[:, 1:] != part.source_segments[:, :-1]
    return place - torch.where(begins, place, 0).cummax(1).values


@dataclass
class _Sums:
    """Sums over target tokens, float64: of each head, and of equal attention. By place [H, places], by token [H, V]."""

    queries: int = 0
    entropy: Tensor | None = None  # [H]
    uniform_entropy: float = 0.0
    by_place: list[Tensor] = field(
        default_factory=list
    )  # of each pass [H + 1, places], the last row of equal attention
    by_token: Tensor | None = None  # [H + 1, V]
    occurrences: Tensor | None = None  # [V]

    def add(self, part: Sample, layer: Layer, seen: Tensor, vocabulary: int) -> None:
        import torch

        assert part.source is not None
        attention = torch.cat([m.double() for m in layer.maps], 1).cpu() * seen.unsqueeze(1)  # [B, H, S, K]
        count = seen.sum(-1)  # [B, S]
        equal = seen.double() / count.clamp_min(1).unsqueeze(-1)
        self.queries += int((count > 0).sum())
        entropy = torch.special.entr(attention).sum((0, 2, 3))
        self.entropy = entropy if self.entropy is None else self.entropy + entropy
        self.uniform_entropy += float(count.clamp_min(1).double().log().sum())
        both = torch.cat([attention, equal.unsqueeze(1)], 1).sum(2).transpose(0, 1).flatten(1)  # [H + 1, B K]
        place = _place_in_document(part).flatten()
        self.by_place.append(_grouped(both, place, int(place.max()) + 1))
        by_token = _grouped(both, part.source.flatten(), vocabulary)
        occurrences = torch.bincount(part.source[seen.any(1)], minlength=vocabulary)
        self.by_token = by_token if self.by_token is None else self.by_token + by_token
        self.occurrences = occurrences if self.occurrences is None else self.occurrences + occurrences

    def heads(self, model: Opened, layer: int) -> list[CrossHead]:
        import torch

        if not self.queries:
            return []
        assert self.entropy is not None and self.by_token is not None and self.occurrences is not None
        size = max(each.shape[1] for each in self.by_place)
        widened = [torch.nn.functional.pad(each, (0, size - each.shape[1])) for each in self.by_place]
        by_place, by_token = torch.stack(widened).sum(0) / self.queries, self.by_token / self.queries
        common = self.occurrences >= _SEEN
        found = []
        for head, entropy in enumerate(self.entropy.tolist()):
            share, equal = by_token[head], by_token[-1]
            ratio = share / equal.clamp_min(1e-300)
            weight = torch.where(common & (ratio > 1), share * ratio.log(), 0.0)
            best = [i for i in weight.argsort(descending=True, stable=True)[:TOP].tolist() if weight[i] > 0]
            most = by_place[head].argsort(descending=True, stable=True)[:TOP].tolist()
            found.append(
                CrossHead(
                    layer=layer,
                    head=head,
                    entropy=entropy / self.queries,
                    of_uniform=entropy / self.uniform_entropy if self.uniform_entropy else None,
                    places=tuple(_attended(i, by_place, head, i) for i in most if by_place[-1, i] > 0),
                    tokens=tuple(_attended(model.codec.decode([i]), by_token, head, i) for i in best),
                )
            )
        return found


def _attended(what: int | str, shares: Tensor, head: int, number: int) -> Attended:
    share, equal = float(shares[head, number]), float(shares[-1, number])
    return Attended(what=what, share=share, ratio=share / equal)


def _grouped(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Sums of values [H, n] of the same group [n] -> [H, count]."""
    return values.new_zeros(len(values), count).index_add_(1, group, values)
