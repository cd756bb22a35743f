"""The attention core: scaled dot products, softmax, weighted sum of values. Always PyTorch's own operation.

Legend: B batch, S sequence, H query heads (or slots), G KV heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of queries per call where a mask is given. Keys after the block's last row are not touched, which recovers what a
# masked call loses against `is_causal` (2 CPU cores, S=4096, H=4, D=32, forward and backward: causal 210 ms, one masked
# call 390 to 480 ms, blocks of 512 rows 165 ms; S=1024: 35 -> 33 ms).
MASKED_BLOCK = 512


def shares_kv_heads(device_type: str, dtype: torch.dtype, *, masked: bool) -> bool:
    """Whether a fused operation of PyTorch takes fewer KV heads than query heads.

    On CUDA only flash attention does for sure, which has no masks and no fp32; the memory-efficient operation refuses,
    and what is left writes out the [S, S] scores.
    """
    return device_type == "cpu" or (not masked and dtype in (torch.bfloat16, torch.float16))


def core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention, scale 1/sqrt(D). q [B, S, H, D]; k, v [B, S, G, D]; returns [B, S, H, D].

    Query head i uses KV head i // (H/G). `mask` is None (plain causal) or broadcastable to [B, H, S, S]: bool (True =
    may see) or additive in q's dtype; it must already forbid later positions.

    `enable_gqa` and repeating the KV heads take the same time on CPU (S=2048, H=8, G=2, D=32, forward and backward:
    87 and 88 ms causal, 150 to 170 ms masked); the former keeps one copy of K and V for the backward pass, not H/G.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    if grouped and not shares_kv_heads(q.device.type, q.dtype, masked=mask is not None):
        repeats, grouped = q.shape[1] // k.shape[1], False
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    seq_len = q.shape[2]
    if mask is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    elif seq_len < 2 * MASKED_BLOCK:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    else:
        blocks = []
        for start in range(0, seq_len, MASKED_BLOCK):
            end = min(start + MASKED_BLOCK, seq_len)
            part = mask[..., start:end, :end]
            args = (q[:, :, start:end], k[:, :, :end], v[:, :, :end])
            blocks.append(F.scaled_dot_product_attention(*args, attn_mask=part, enable_gqa=grouped))
        out = torch.cat(blocks, 2)
    return out.transpose(1, 2)
