"""Attention with any visibility: the encoder's, cross attention, and scores with an added bias (T5).

Legend: B batch, S queries, K keys, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.attention import shares_kv_heads


@dataclass(frozen=True, eq=False)
class Visible:
    """What the queries of a pass see, and what is added to their scores. All layers of a stack share one object.

    mask: None: each query sees every key. Else bool [B or 1, 1, S, K], or the added bias [B or 1, H, S, K] with -inf
        where a key is hidden. A query without keys sees all of them here, because a softmax needs one.
    blind: bool [B, S, 1, 1], queries without keys, whose output is 0; None if there is none.
    scale: Factor on the products of queries and keys; None: 1/sqrt(D).
    """

    mask: Tensor | None = None
    blind: Tensor | None = None
    scale: float | None = None

    @classmethod
    def of(
        cls, seen: Tensor | None, device: torch.device, *, bias: Tensor | None = None, scale: float | None = None
    ) -> Visible:
        """seen: bool [B or 1, S, K], None: all keys; where it is on the host, a GPU is not waited for. bias [H, S, K].

        device: that of the queries.
        """
        if seen is None:
            return cls(mask=None if bias is None else bias.unsqueeze(0), scale=scale)
        some = seen.any(-1)  # [B, S]
        blind = None
        if not bool(some.all()):
            blind = (~some[:, :, None, None]).to(device)
            seen = seen | ~some.unsqueeze(-1)
        mask = seen.unsqueeze(1).to(device)
        if bias is not None:
            mask = bias.unsqueeze(0).masked_fill(~mask, float("-inf"))
        return cls(mask=mask, blind=blind, scale=scale)


def visible_core(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """q [B, S, H, D]; k, v [B, K, G, D]; returns [B, S, H, D]. Query head i uses KV head i // (H/G).

    PyTorch's scaled dot-product attention. Where the mask is a bias that needs a gradient, PyTorch keeps the weights
    [B, H, S, K] for the backward pass.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    repeats = q.shape[1] // k.shape[1]
    grouped = repeats > 1 and shares_kv_heads(q.device.type, q.dtype, masked=visible.mask is not None)
    if repeats > 1 and not grouped:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.mask, scale=visible.scale, enable_gqa=grouped)
    out = out.transpose(1, 2)
    return out if visible.blind is None else out.masked_fill(visible.blind, 0.0)


def same_document(queries: Tensor | None, keys: Tensor | None, *, shape: tuple[int, int, int]) -> Tensor | None:
    """bool [B, S, K]: whether query and key have the same document number; None if all have.

    queries [B, S], keys [B, K]: document numbers from 0, -1 for padding; None: all tokens belong to document 0.
    shape: (B, S, K).
    """
    if queries is None and keys is None:
        return None
    batch, rows, columns = shape
    some = queries if queries is not None else keys
    assert some is not None
    zero = torch.zeros((), dtype=some.dtype, device=some.device)
    left = zero.expand(batch, rows) if queries is None else queries
    right = zero.expand(batch, columns) if keys is None else keys
    return left.unsqueeze(-1) == right.unsqueeze(-2)
