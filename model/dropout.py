"""Where the decoder drops: the places of dropout, and the seeds of their masks.

The mask of a place is a function of (seed of the run, tokens trained before the step, place of the sequence in the
global batch, layer, place in the block, position, channel) alone (`headway.kernels.dropout`). Recomputed activations, a
resumed run, and every micro-batch size and parallel layout therefore have the same masks, and so have runs of equal
seed, whatever their attention mechanism.

Legend: B batch, S sequence, d width, F FFN width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from headway.kernels.dropout import Rate, signed, stream
from headway.model.base import Ranks
from headway.model.config import DropoutPlace, ModelConfig

DropPlace = Literal["embedding", "head", "attention", "mlp", "hidden"]

_OUTSIDE: tuple[DropPlace, ...] = ("embedding", "head")
_IN_BLOCK: tuple[DropPlace, ...] = ("attention", "mlp", "hidden")
_SPEC = {"attention": "branches", "mlp": "branches"}
"""Name in the spec (`model.dropout_places`), where it differs."""


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Dropout of a model in a run."""

    rate: Rate
    places: frozenset[DropoutPlace]
    layers: int
    seed: int

    @classmethod
    def of(cls, model: ModelConfig, *, seed: int) -> Dropout | None:
        """None if the model has no dropout."""
        if not model.dropout:
            return None
        return cls(rate=Rate.of(model.dropout), places=frozenset(model.dropout_places), layers=model.layers, seed=seed)

    def keys(self, *, tokens: int, first: int, count: int, device: torch.device) -> Tensor:
        """One key for each sequence, int64 [count]: those at first .. first + count - 1 of the global batch.

        tokens: trained before the step. Computed on `device`, without a copy from the host.
        """
        digest = hashlib.blake2b(f"dropout/{self.seed}/{tokens}".encode(), digest_size=8).digest()
        seed = torch.full((), signed(int.from_bytes(digest, "little")), dtype=torch.int64, device=device)
        return stream(seed, first, count)

    def of_pass(self, keys: Tensor, tokens: Tensor, *, start: int) -> Drops:
        """Dropout of one forward pass. tokens [B, S]: this rank's part of the sequences, which begins at `start`."""
        seeds = stream(keys, 0, len(_OUTSIDE) + len(_IN_BLOCK) * self.layers).T.contiguous()
        return Drops(dropout=self, seeds=seeds, start=start, length=tokens.shape[1])


@dataclass(frozen=True, kw_only=True)
class Drops:
    """Dropout of one forward pass, in layer `layer` where that matters.

    seeds: int64 [places, B]: embedding, head, then three of each layer.
    start, length: of this rank's part of the sequences, in tokens.
    """

    dropout: Dropout
    seeds: Tensor
    start: int
    length: int
    layer: int = 0

    def at(self, layer: int) -> Drops:
        """The same pass, in another layer."""
        return replace(self, layer=layer)

    def of_one_layer(self) -> Drops:
        """The same masks in this layer, with its seeds alone, as layer 0."""
        first = len(_OUTSIDE) + len(_IN_BLOCK) * self.layer
        own = (self.seeds[: len(_OUTSIDE)], self.seeds[first : first + len(_IN_BLOCK)])
        return replace(self, seeds=torch.cat(own), layer=0)

    def of(self, x: Tensor, place: DropPlace, *, ranks: Ranks, dropout: Callable[..., Tensor]) -> Tensor:
        """x with dropout of this place, by an operation with the signature of `headway.kernels.dropout.dropout`.

        x: [B, S, d] of the residual stream or of a branch, or this rank's part of it; at `hidden` [B, S, F], or this
        rank's channels of it.
        """
        if _SPEC.get(place, place) not in self.dropout.places:
            return x
        start, channel = self.start, 0
        if place == "hidden":
            channel = ranks.index * x.shape[2]
        elif x.shape[1] < self.length:
            start += ranks.index * x.shape[1]  # sequence parallelism: each tensor-parallel rank holds a part
        return dropout(x, self.seeds[self._index(place)], *self.dropout.rate, start, channel)

    def _index(self, place: DropPlace) -> int:
        if place in _OUTSIDE:
            return _OUTSIDE.index(place)
        return len(_OUTSIDE) + len(_IN_BLOCK) * self.layer + _IN_BLOCK.index(place)
