"""The attention core over documents in one call of a kernel for sequences of variable length (FlashAttention's varlen).

Legend: B batch, S sequence, T = B S tokens, H query heads, G KV heads, D head size, N documents.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.documents import Documents

LARGEST_HEAD = 256
"""Largest D of FlashAttention."""

CHANNELS = 8
"""D must be a multiple of this. Smaller heads are padded with zeros, which change neither scores nor outputs."""


class Varlen(Protocol):
    """A causal kernel: q [T, H, D]; k, v [T, G, D] -> [T, H, D].

    starts: Cumulative lengths of the N documents among the queries and among the keys, int32 [N+1] each. The queries of
        a document are the last positions of its keys.
    longest: Most queries and most keys of a document.
    window: Keys that a query attends to, including its own; None for all earlier ones.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        *,
        scale: float,
        window: int | None,
    ) -> Tensor: ...


def supports(dtype: torch.dtype, capability: tuple[int, int] | None) -> bool:
    """Whether FlashAttention runs in `dtype` on a GPU of this compute capability (None: unknown)."""
    return dtype in (torch.bfloat16, torch.float16) and (capability is None or capability >= (8, 0))


def documents_core(
    kernel: Varlen, q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, window: int | None = None
) -> Tensor:
    """`headway.kernels.attention.core` within documents, by `kernel`. Shapes are those of the core.

    KV heads are not repeated, and no mask is made. D must be at most `LARGEST_HEAD`.
    """
    size = q.shape[-1]
    flat_q, flat_k, flat_v = q.flatten(0, 1), documents.laid_out(k), documents.laid_out(v)
    if size % CHANNELS:
        flat_q, flat_k, flat_v = (F.pad(each, (0, CHANNELS - size % CHANNELS)) for each in (flat_q, flat_k, flat_v))
    starts, longest = documents.cumulative(q.device), documents.longest
    if window is not None and window >= longest.keys:
        window = None
    out = kernel(flat_q, flat_k, flat_v, starts, longest, scale=size**-0.5, window=window)
    return out[..., :size].unflatten(0, q.shape[:2])


def torch_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """`Varlen` by PyTorch's `varlen_attn`, which runs FlashAttention. Its window does not count the query's own key."""
    from torch.nn.attention.varlen import varlen_attn

    span = (-1 if window is None else window - 1, 0)
    out = varlen_attn(q, k, v, *starts, *longest, scale=scale, window_size=span, enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(out, Tensor)
    return out
