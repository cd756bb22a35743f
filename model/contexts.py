"""The context of each layer in a forward pass: positions, documents, tokens.

Legend: B batch, S sequence, K distances, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from headway.kernels.documents import Documents
from headway.kernels.relative import sinusoids
from headway.kernels.rope import rope_tables
from headway.model.base import AttentionConfig, AttentionSection, Context, SequenceRanks
from headway.model.config import ModelConfig
from headway.model.kv_cache import KVCache

RopeForm = tuple[int, float]
"""Rotated channels of a head, and the base of their frequencies."""


class LayerContexts:
    """The `Context` of each layer in one forward pass, and what layers hand on to later ones in this pass.

    Layers whose positions are encoded alike share one object.
    """

    def __init__(self, each: Sequence[Context], sources: Sequence[int | None]) -> None:
        self._each, self._sources = each, sources
        self._last = {source: taker for taker, source in enumerate(sources) if source is not None}
        self._handed: dict[int, tuple[Tensor, ...]] = {}

    def at(self, index: int, cache: KVCache | None = None) -> Context:
        """That of layer `index`, with the KV cache of the layer in incremental decoding."""
        context, source = self._each[index], self._sources[index]
        if source is not None:
            context = replace(context, handed=self._handed[source])
        return context if cache is None else replace(context, cache=cache)

    def hand_on(self, index: int, heads: tuple[Tensor, ...]) -> None:
        """Keep what layer `index` has handed on, up to the last layer that takes it. Call it after each layer."""
        if index in self._last:
            self._handed[index] = heads
        source = self._sources[index]
        if source is not None and self._last[source] == index:
            del self._handed[source]


class Contexts:
    """Builds the `Context` of each layer for a forward pass. Tables of positions are cached between passes."""

    def __init__(self, model: ModelConfig, attention: AttentionSection, sequence: SequenceRanks) -> None:
        self._model, self._sequence = model, sequence
        each = [attention.layer(i, model.layers) for i in range(model.layers)]
        self._forms = [(rotated(model, mechanism), mechanism.rope_base) for mechanism in each]
        self._sources = [mechanism.takes_from for mechanism in each]
        self._distances: Tensor | None = None
        # A plain attribute: a buffer would be cast to bf16 with the module and lose precision at late positions.
        self._rope: dict[RopeForm, tuple[Tensor, Tensor]] = {}

    def of(self, tokens: Tensor, segments: Tensor | None, *, dtype: torch.dtype, start: int = 0) -> LayerContexts:
        """tokens [B, S]; the first one is at position `start` of the sequence (or of this rank's part of it). segments
        cover the whole sequence; on the host they are read without waiting for the device. dtype: the model's.
        """
        documents = None if segments is None else Documents.of(segments)
        first = start + self._sequence.index * tokens.shape[1]
        distances = self._distance_vectors(tokens, start, dtype) if self._model.relative else None
        own = partial(Context, documents=documents, tokens=tokens, sequence=self._sequence, distances=distances)
        contexts = {form: own(rope=self._rope_tables(form, tokens, first)) for form in dict.fromkeys(self._forms)}
        return LayerContexts([contexts[form] for form in self._forms], self._sources)

    def _distance_vectors(self, tokens: Tensor, start: int, dtype: torch.dtype) -> Tensor:
        """The vectors [start + S, d] of all distances in the sequence; the table grows as that of RoPE does."""
        end = start + tokens.shape[1]
        if self._distances is None or len(self._distances) < end or self._distances.device != tokens.device:
            with torch.inference_mode(False):  # the table outlives this pass, and training may read it later
                self._distances = sinusoids(end if start == 0 else 2 * end, self._model.width, tokens.device)
        return self._distances[:end].to(dtype)

    def _rope_tables(self, form: RopeForm, tokens: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Rows start .. start + S - 1 of the RoPE tables, which grow to the longest sequence seen."""
        end = start + tokens.shape[1]
        found = self._rope.get(form)
        if found is None or len(found[0]) < end or found[0].device != tokens.device:
            length = end if start == 0 else 2 * end  # double the table, as decoding adds one position at a time
            with torch.inference_mode(False):  # as in `_distance_vectors`
                found = self._rope[form] = rope_tables(length, *form, tokens.device)
        return found[0][start:end], found[1][start:end]


def rotated(model: ModelConfig, attention: AttentionConfig) -> int:
    """Channels of a head that RoPE rotates: none unless `model.positions` is rope."""
    return attention.rotated if model.positions == "rope" else 0
