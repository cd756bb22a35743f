"""Attention within documents by a dense mask of [B, 1, S, S]: the reference of `headway.kernels.attention.core`.

Tests compare the core with it, and `headway bench documents` times both. No model uses it: the mask grows with the
square of the sequence, and flash attention takes none.

Legend: B batch, S sequence, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 512


def document_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """segments [B, S] -> additive mask [B, 1, S, S]: 0 where a query attends to a key, -inf elsewhere.

    A token attends to itself and to the earlier tokens of its own document.
    """
    visible = (segments[:, :, None] == segments[:, None, :]).tril_()
    mask = torch.zeros(visible.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~visible, float("-inf")).unsqueeze(1)


def masked_core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, window: int | None = None) -> Tensor:
    """q [B, S, H, D]; k, v [B, S, G, D]; mask [B, 1, S, S] additive -> [B, S, H, D].

    Blocks of query rows skip the keys after their last row, which is faster than one call over all of them.
    window: w, the number of keys that a query attends to, including its own.
    """
    if window is not None:
        place = torch.arange(q.shape[1], device=q.device)
        mask = mask.masked_fill(place[:, None] - place >= window, float("-inf"))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    length = q.shape[2]
    rows = length if length < 2 * ROWS else ROWS
    blocks = []
    for start in range(0, length, rows):
        end = min(start + rows, length)
        part = mask[..., start:end, :end]
        args = (q[:, :, start:end], k[:, :, :end], v[:, :, :end])
        blocks.append(F.scaled_dot_product_attention(*args, attn_mask=part, enable_gqa=q.shape[1] != k.shape[1]))
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)
    return out.transpose(1, 2)
