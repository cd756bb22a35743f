"""What a head attends to: scores of its attention, from 0 to 1, on random tokens that come twice.

Such sequences have no text to understand, so a head that attends to a place does so because of the place, or because of
the repetition. The score of induction is that of Olsson et al. (2022, arXiv 2209.11895): attention from a token to the
one after its first occurrence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headway.launcher.exchange.opened import Opened
from headway.launcher.inspect.places import places_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from headway.model.measure.observe import Layer
    from headway.model.seq2seq.model import EncoderDecoder

CLASSES = {
    "previous": "the token before",
    "first": "the first token of the sequence",
    "self": "the token itself",
    "duplicate": "the same token earlier",
    "induction": "the token after the same token earlier",
}
"""Score -> what is attended to, in a decoder."""
ENCODER_CLASSES = {
    "previous": "the token before",
    "next": "the token after",
    "first": "the first token of the source",
    "self": "the token itself",
    "duplicate": "the same token at its other place",
}
"""In an encoder, whose tokens see each other."""
CROSS_CLASSES = {
    "first": "the first token of the source",
    "last": "its last token",
    "same": "the token of the source that the decoder reads",
    "next": "the one after it, which the decoder is to predict",
}
"""In cross attention, where the target repeats the source."""
CLASSES_OF = {"": CLASSES, "encoder": ENCODER_CLASSES, "decoder": CLASSES, "cross": CROSS_CLASSES}
"""Of each stack (`headway.launcher.inspect.places`)."""
LEAST = 0.4
"""Score from which a head is called by it."""
HALF = 32
"""Tokens that are repeated."""


@dataclass(frozen=True, kw_only=True)
class HeadScores:
    """Scores of the query heads of a layer: mean attention to a place, over the tokens that use the head.

    `share`: share of tokens that use the head; 1 unless it is routed. Scores of a head that no token uses are nan.
    """

    share: np.ndarray  # [H]
    scores: Mapping[str, np.ndarray]  # each [H]

    def name(self, head: int) -> str:
        """Its class, `mixed` for a head with no score of `LEAST`, or `unused`."""
        found = {kind: float(values[head]) for kind, values in self.scores.items()}
        if not self.share[head]:
            return "unused"
        best = max(found, key=lambda kind: -1 if found[kind] != found[kind] else found[kind])  # nan: no such place
        return best if found[best] >= LEAST else "mixed"


def places(length: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Score -> (queries, keys) of a sequence whose second half of `length` / 2 tokens repeats the first."""
    import torch

    half = length // 2
    late = torch.arange(half, length)
    return {
        "previous": (late, late - 1),
        "first": (late, torch.zeros_like(late)),
        "self": (late, late),
        "duplicate": (late, late - half),
        # The token after the first occurrence is the query's own next token; at the end it would be the query itself.
        "induction": (late[:-1], late[:-1] - half + 1),
    }


def encoder_places(length: int) -> dict[str, tuple[Tensor, Tensor]]:
    """As `places`, of an encoder."""
    import torch

    every, half = torch.arange(length), length // 2
    return {
        "previous": (every[1:], every[:-1]),
        "next": (every[:-1], every[1:]),
        "first": (every[1:], torch.zeros_like(every[1:])),
        "self": (every, every),
        "duplicate": (every, (every + half) % length),
    }


def cross_places(length: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Score -> (queries, keys) of a target of `length` tokens that are those of the source."""
    import torch

    every = torch.arange(length)
    return {  # without queries at which two of them are the same place
        "first": (every[1:], torch.zeros_like(every[1:])),
        "last": (every[:-2], torch.full_like(every[:-2], length - 1)),
        "same": (every[1:-1], every[1:-1]),
        "next": (every[:-2], every[1:-1]),
    }


def head_scores(model: Opened, tokens: Tensor) -> list[HeadScores | None]:
    """Scores of all heads of each layer; None for layers without known attention (relative positions, states).

    tokens [N, S]: see `headway.launcher.inspect.sample.repeated`.
    """
    import torch

    from headway.model.measure.observe import observed

    decoder, device = model.decoder, model.decoder.embedding.device
    with torch.no_grad(), observed(decoder) as layers:
        decoder.hidden(tokens.to(device))
    return [_scores(layer, places(tokens.shape[1])) for layer in layers]


def pair_scores(model: EncoderDecoder, source: Tensor, tokens: Tensor, copied: Tensor) -> list[HeadScores | None]:
    """Scores of all heads of each attention of an encoder-decoder.

    source [N, s], tokens [N, S]: random tokens that come twice, of which the scores of the encoder and of the decoder's
    self-attention are. copied [N, C]: random tokens, which encoder and decoder read for the scores of cross attention.
    """
    import torch

    from headway.model.measure.observe import observed

    device = model.embedding.device
    with torch.no_grad():
        with observed(model) as layers:
            model.hidden(source.to(device), tokens.to(device))
        with observed(model) as copying:
            model.hidden(copied.to(device), copied.to(device))
    at = {"encoder": encoder_places(source.shape[1]), "decoder": places(tokens.shape[1])}
    at["cross"] = cross_places(copied.shape[1])
    read = zip(places_of(model), layers, copying, strict=True)
    return [_scores(copy if place.stack == "cross" else layer, at[place.stack]) for place, layer, copy in read]


def _scores(layer: Layer, at: Mapping[str, tuple[Tensor, Tensor]]) -> HeadScores | None:
    import torch

    if not layer.maps:
        return None
    attention = torch.cat([m.double() for m in layer.maps], 1).cpu()  # [N, rows, S, K]
    rows = torch.cat(layer.rows, -1).cpu()  # [N, S, rows]
    scores = {kind: _mean(attention, rows, pair, layer.heads) for kind, pair in at.items()}
    counts = torch.bincount(rows.flatten(), minlength=layer.heads)
    share = counts.double() / rows.shape[:2].numel()
    return HeadScores(share=share.numpy(), scores=scores)


def _mean(attention: Tensor, rows: Tensor, at: tuple[Tensor, Tensor], heads: int) -> np.ndarray:
    """Mean over sequences and places of the attention of each head [H]."""
    import torch

    queries, keys = at
    values = attention[:, :, queries, keys].transpose(1, 2)  # [N, places, rows]
    owners = rows[:, queries].flatten()
    total = torch.zeros(heads, dtype=torch.float64).index_add_(0, owners, values.flatten())
    return (total / torch.bincount(owners, minlength=heads)).numpy()  # 0 / 0 is nan
