"""The attention core: PyTorch's scaled dot-product attention with windows, documents and grouped KV heads.

Legend: B batch, S sequence, H query heads (or slots), G KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.documents import BLOCK, Documents, rows_per_call


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
    documents: Documents | None,
    *,
    window: int | None = None,
    scores: Callable[..., Tensor] = F.scaled_dot_product_attention,
) -> Tensor:
    """Causal attention, scale 1/sqrt(D). q [B, S, H, D]; k, v [B, K, G, D], K >= S; returns [B, S, H, D].

    Query head i uses KV head i // (H/G). If K > S, the queries are the last S of K positions (decoding with a cache).

    documents: Boundaries of the documents in the B sequences, for S queries and K keys; None for one per sequence.
    window: w, the number of keys that a query attends to, including its own. Key blocks outside of all windows are
        skipped.
    scores: Function with the signature of `scaled_dot_product_attention`.

    Memory grows linearly with S: no tensor of [S, S] is made beyond S = 512. Sequences up to this length are attended
    in one call with one mask. Longer ones are attended document by document (`headway.kernels.documents`).

    `enable_gqa` and repeating the KV heads take the same time on CPU (S=2048, H=8, G=2, D=32, forward and backward:
    87 and 88 ms causal, 150 to 170 ms masked). `enable_gqa` saves one copy of K and V for the backward pass, not H/G.
    """
    if window is not None and window >= k.shape[1]:
        window = None
    if documents is not None:
        assert (len(documents.lengths), documents.queries, documents.keys) == (len(q), q.shape[1], k.shape[1])
        if documents.keys > BLOCK and not (documents.whole and window is None):
            return _by_document(q, k, v, documents, window, scores)
    return _by_position(q, k, v, documents, window, scores)


def _by_position(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, window: int | None, scores: Callable[..., Tensor]
) -> Tensor:
    """Whole sequences: one causal call, one call with the documents' mask, or blocks of query rows with a window."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    queries, keys = q.shape[2], k.shape[2]
    mask = documents.mask(q.dtype, q.device) if documents is not None and keys <= BLOCK else None
    plain = mask is None and window is None and (queries == keys or queries == 1)
    k, v, grouped = _kv_heads(q, k, v, masked=not plain)
    if plain:
        out = scores(q, k, v, is_causal=queries == keys, enable_gqa=grouped)
        return out.transpose(1, 2)
    rows = rows_per_call(queries, window)
    blocks = []
    for start in range(0, queries, rows):
        end = min(start + rows, queries)
        last = keys - queries + end  # keys up to the block's last query
        first = 0 if window is None else max(0, last - (end - start) - window + 1)
        part = _visible(start, end, first, last, keys - queries, mask, window, q.device)
        args = (q[:, :, start:end], k[:, :, first:last], v[:, :, first:last])
        blocks.append(scores(*args, attn_mask=part, enable_gqa=grouped))
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)
    return out.transpose(1, 2)


def _visible(
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
    part = None if mask is None else mask[..., start:end, first:last]
    if part is not None and window is None:
        return part
    distance = torch.arange(past + start, past + end, device=device)[:, None] - torch.arange(first, last, device=device)
    near = distance >= 0
    if window is not None:
        near &= distance < window
    return near if part is None else part.masked_fill(~near, float("-inf"))


def _by_document(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, scores: Callable[..., Tensor]
) -> Tensor:
    """The pieces of the documents, over the queries and keys of all sequences laid end to end."""
    if window is not None and window >= documents.longest.keys:
        window = None
    pieces, batch = documents.pieces(window), len(q)
    q, k, v = q.flatten(0, 1), documents.laid_out(k), documents.laid_out(v)
    k, v, grouped = _kv_heads(q, k, v, masked=any(piece.masked for piece in pieces))
    bounds = [(piece.first, piece.last) for piece in pieces]
    parts = (q.split([piece.queries for piece in pieces]), _ranges(k, bounds), _ranges(v, bounds))
    outs = []
    for piece, *heads in zip(pieces, *parts, strict=True):
        args = [part.transpose(0, 1).unsqueeze(0) for part in heads]
        mask = documents.piece_mask(piece, window, q.dtype, q.device) if piece.masked else None
        out = scores(*args, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        outs.append(out.squeeze(0).transpose(0, 1))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out.unflatten(0, (batch, -1))


def _kv_heads(q: Tensor, k: Tensor, v: Tensor, *, masked: bool) -> tuple[Tensor, Tensor, bool]:
    """k, v with heads at dimension 1, repeated if no fused kernel supports fewer than q has; and whether some do."""
    if q.shape[1] == k.shape[1] or shares_kv_heads(q.device.type, q.dtype, masked=masked):
        return k, v, q.shape[1] != k.shape[1]
    repeats = q.shape[1] // k.shape[1]
    return k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), False


def _ranges(tensor: Tensor, bounds: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    """Rows first .. last - 1 for each of `bounds`, as views.

    The gradient is made once, in time and memory that grow with the rows taken. Plain slices make a gradient of the
    whole tensor for each.
    """
    ends = [0, *(last for _, last in bounds)]
    if ends[-1] == len(tensor) and ends[:-1] == [first for first, _ in bounds]:
        return tensor.split([last - first for first, last in bounds])
    return _Ranges.apply(tensor, bounds)


class _Ranges(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, bounds: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        ctx.bounds, ctx.shape = bounds, tensor.shape
        return tuple(tensor[first:last] for first, last in bounds)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].new_zeros(ctx.shape)
        for (first, last), grad in zip(ctx.bounds, grads, strict=True):
            total[first:last] += grad
        return total, None


# ---------------------------------------------------------------- one operator, for compiled blocks


@dataclass(frozen=True, eq=False)
class Packed:
    """Documents as a tensor, `numbers` [B, S] int64: the index of each token's document.

    A compiled function reads the lengths of `Documents` as constants, and would be compiled again for each micro-batch.
    """

    numbers: Tensor

    @classmethod
    def of(cls, documents: Documents, device: torch.device) -> Packed:
        assert documents.start == 0, "training has no cache"
        return cls(documents.numbers(device))


def core_of_blocks(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | Packed | None, *, window: int | None = None
) -> Tensor:
    """`core` for blocks that are compiled for the CPU: for `Packed` documents a single operator, with the same bits."""
    if not isinstance(documents, Packed):
        return core(q, k, v, documents, window=window)
    return torch.ops.headway.packed_core(q, k, v, documents.numbers, window)[0]


class _Call(NamedTuple):
    """A call of the kernel: query rows start .. end - 1 over keys first .. last - 1, causal without a `mask`."""

    start: int
    end: int
    first: int
    last: int
    mask: Tensor | None


@lru_cache(maxsize=8)
def _documents_of(numbers: bytes, shape: tuple[int, int]) -> Documents:
    """The documents of a micro-batch, which all layers and both passes share with the masks they have built."""
    return Documents.of(torch.frombuffer(bytearray(numbers), dtype=torch.int64).view(shape))


def _calls(like: Tensor, numbers: Tensor, window: int | None) -> tuple[bool, list[_Call]]:
    """The calls of `core` for queries `like` [B, S, H, D], and whether their sequences are laid end to end."""
    count = like.shape[1]
    documents = _documents_of(numbers.numpy().tobytes(), (len(numbers), count))
    if window is not None and window >= count:
        window = None
    if count > BLOCK and documents.whole and window is None:
        return False, [_Call(0, count, 0, count, None)]
    if count > BLOCK:
        if window is not None and window >= documents.longest.keys:
            window = None
        calls, row = [], 0
        for piece in documents.pieces(window):
            mask = documents.piece_mask(piece, window, like.dtype, like.device) if piece.masked else None
            calls.append(_Call(row, row + piece.queries, piece.first, piece.last, mask))
            row += piece.queries
        return True, calls
    mask, rows = documents.mask(like.dtype, like.device), rows_per_call(count, window)
    calls = []
    for start in range(0, count, rows):
        end = min(start + rows, count)
        first = 0 if window is None else max(0, start - window + 1)
        calls.append(_Call(start, end, first, end, _visible(start, end, first, end, 0, mask, window, like.device)))
    return False, calls


def _heads_first(tensor: Tensor, flat: bool) -> Tensor:
    """[B, S, H, D] -> [B, H, S, D], or [1, H, B S, D] where sequences are laid end to end; a view if contiguous."""
    return (tensor.flatten(0, 1).unsqueeze(0) if flat else tensor).transpose(1, 2)


@torch.library.custom_op("headway::packed_core", mutates_args=(), device_types="cpu")
def packed_core(q: Tensor, k: Tensor, v: Tensor, numbers: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """`core` within documents, and the log-sum-exp of each row of scores [B, S, H], fp32 or wider, for the gradient.

    q [B, S, H, D]; k, v [B, S, G, D]; numbers as in `Packed`.
    """
    flat, calls = _calls(q, numbers, window)
    out, sums = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    q, k, v, outs, rows = (_heads_first(t, flat) for t in (q, k, v, out, sums.unsqueeze(-1)))
    for start, end, first, last, mask in calls:
        part = (q[:, :, start:end], k[:, :, first:last], v[:, :, first:last])
        found, found_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *part, 0.0, mask is None, attn_mask=mask
        )
        outs[:, :, start:end], rows[:, :, start:end, 0] = found, found_sums
    return out, sums


@packed_core.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, numbers: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("headway::packed_core_backward", mutates_args=(), device_types="cpu")
def packed_core_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, numbers: Tensor, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    flat, calls = _calls(q, numbers, window)
    found = [t.new_empty(t.shape) if len(calls) == 1 else t.new_zeros(t.shape) for t in (q, k, v)]
    grad, q, k, v, out, rows, *grads = (
        _heads_first(t, flat) for t in (grad.contiguous(), q, k, v, out, sums.unsqueeze(-1), *found)
    )
    for start, end, first, last, mask in calls:
        part = (q[:, :, start:end], k[:, :, first:last], v[:, :, first:last])
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(grad[:, :, start:end], *part, out[:, :, start:end], rows[:, :, start:end, 0], 0.0, mask is None),
            attn_mask=mask,
        )
        for whole, piece, (begin, stop) in zip(grads, parts, ((start, end), (first, last), (first, last)), strict=True):
            if len(calls) == 1:
                whole.copy_(piece)
            else:
                whole[:, :, begin:stop] += piece
    return found[0], found[1], found[2]


@packed_core_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, numbers: Tensor, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, numbers, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, numbers)


def _differentiate_packed(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    return *packed_core_backward(grad, *ctx.saved_tensors, ctx.window), None, None


packed_core.register_autograd(_differentiate_packed, setup_context=_save_packed)
