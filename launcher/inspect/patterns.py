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

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

CLASSES = {
    "previous": "the token before",
    "first": "the first token of the sequence",
    "self": "the token itself",
    "duplicate": "the same token earlier",
    "induction": "the token after the same token earlier",
}
"""Score -> what is attended to."""
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
        best = max(found, key=lambda kind: found[kind])
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


def head_scores(model: Opened, tokens: Tensor) -> list[HeadScores | None]:
    """Scores of all heads of each layer; None for layers without known attention (relative positions, states).

    tokens [N, S]: see `headway.launcher.inspect.sample.repeated`.
    """
    import torch

    from headway.model.measure.observe import observed

    decoder, device = model.decoder, model.decoder.embedding.device
    with torch.no_grad(), observed(decoder) as layers:
        decoder.hidden(tokens.to(device))
    found: list[HeadScores | None] = []
    for layer in layers:
        if not layer.maps:
            found.append(None)
            continue
        attention = torch.cat([m.double() for m in layer.maps], 1).cpu()  # [N, rows, S, S]
        rows = torch.cat(layer.rows, -1).cpu()  # [N, S, rows]
        scores = {kind: _mean(attention, rows, at, layer.heads) for kind, at in places(tokens.shape[1]).items()}
        counts = torch.bincount(rows.flatten(), minlength=layer.heads)
        share = counts.double() / rows.shape[:2].numel()
        found.append(HeadScores(share=share.numpy(), scores=scores))
    return found


def _mean(attention: Tensor, rows: Tensor, at: tuple[Tensor, Tensor], heads: int) -> np.ndarray:
    """Mean over sequences and places of the attention of each head [H]."""
    import torch

    queries, keys = at
    values = attention[:, :, queries, keys].transpose(1, 2)  # [N, places, rows]
    owners = rows[:, queries].flatten()
    total = torch.zeros(heads, dtype=torch.float64).index_add_(0, owners, values.flatten())
    return (total / torch.bincount(owners, minlength=heads)).numpy()  # 0 / 0 is nan
