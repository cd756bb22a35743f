"""The attention core: PyTorch's scaled dot-product attention with windows, masks and grouped KV heads.

Legend: B batch, S sequence, H query heads (or slots), G KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Query rows per call if there is a mask. Keys after the block's last row are skipped, which makes masked calls as fast
# as `is_causal` (2 CPU cores, S=4096, H=4, D=32, forward and backward: causal 210 ms, one masked call 390 to 480 ms,
# blocks of 512 rows 165 ms; S=1024: 35 -> 33 ms).
MASKED_BLOCK = 512


def shares_kv_heads(device_type: str, dtype: torch.dtype, *, masked: bool) -> bool:
    """Whether a fused kernel of PyTorch supports fewer KV heads than query heads.

    On CUDA only flash attention certainly does, without masks and not in fp32. The memory-efficient kernel does not,
    and the math fallback materializes the [S, S] scores.
    """
    return device_type == "cpu" or (not masked and dtype in (torch.bfloat16, torch.float16))


def core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    window: int | None = None,
    scores: Callable[..., Tensor] = F.scaled_dot_product_attention,
) -> Tensor:
    """Causal attention, scale 1/sqrt(D). q [B, S, H, D]; k, v [B, K, G, D], K >= S; returns [B, S, H, D].

    Query head i uses KV head i // (H/G). If K > S, the queries are the last S of K positions (decoding with a cache).

    mask: None (causal), or broadcastable to [B, H, S, S] with K = S: bool (True: attend) or additive in q's dtype. It
        must mask later positions.
    window: w, the number of keys that a query attends to, including its own. Key blocks outside of all windows are
        skipped.
    scores: Function with the signature of `scaled_dot_product_attention`.

    `enable_gqa` and repeating the KV heads take the same time on CPU (S=2048, H=8, G=2, D=32, forward and backward:
    87 and 88 ms causal, 150 to 170 ms masked). `enable_gqa` saves one copy of K and V for the backward pass, not H/G.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    queries, keys = q.shape[2], k.shape[2]
    if window is not None and window >= keys:
        window = None
    plain = mask is None and window is None and (queries == keys or queries == 1)
    grouped = q.shape[1] != k.shape[1]
    if grouped and not shares_kv_heads(q.device.type, q.dtype, masked=not plain):
        repeats, grouped = q.shape[1] // k.shape[1], False
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    if plain:
        out = scores(q, k, v, is_causal=queries == keys, enable_gqa=grouped)
        return out.transpose(1, 2)
    rows = MASKED_BLOCK if window is None else max(32, min(MASKED_BLOCK, window))
    if queries < 2 * rows:
        rows = queries
    blocks = []
    for start in range(0, queries, rows):
        end = min(start + rows, queries)
        last = keys - queries + end  # keys up to the block's last query
        first = 0 if window is None else max(0, last - (end - start) - window + 1)
        part = visible(start, end, first, last, keys - queries, mask, window, q.device)
        args = (q[:, :, start:end], k[:, :, first:last], v[:, :, first:last])
        blocks.append(scores(*args, attn_mask=part, enable_gqa=grouped))
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)
    return out.transpose(1, 2)


def visible(
    start: int,
    end: int,
    first: int,
    last: int,
    past: int,
    mask: Tensor | None,
    window: int | None,
    device: torch.device,
) -> Tensor:
    """Mask of query rows start..end (at positions past + row) over keys first..last, combining `mask` and `window`."""
    if mask is not None and window is None:
        return mask[..., start:end, first:last]
    distance = torch.arange(past + start, past + end, device=device)[:, None] - torch.arange(first, last, device=device)
    near = distance >= 0
    if window is not None:
        near &= distance < window
    if mask is None:
        return near
    part = mask[..., start:end, first:last]
    return part & near if part.dtype == torch.bool else part.masked_fill(~near, float("-inf"))
