"""Between the pool of all heads and the chosen slots on a GPU: one pass each way instead of gather, RoPE and scatter.

Importing this module needs Triton; `headway.kernels.ops` does so on a GPU. Twins in PyTorch: `select_rope_twin` and
`expand_twin` of `headway.kernels.twins`. Every number is written once, by one program, and what is summed is summed
in one order: equal inputs give equal bits.

Legend: S sequence, R = B S G rows (tokens x groups), N heads per group, k chosen ones (slots), D head size, r rotated
channels (even, at most D). Contiguous unless strides are given.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.launch import Shipped, on_device_of_first, padded, rows_per_program

WARPS = 4


@triton.jit
def _slot_of(idx, row, ok, n, K: tl.constexpr, BR: tl.constexpr):
    """(whether head n is chosen, in which slot) of each row; idx [R, k]."""
    slot = tl.zeros([BR], tl.int32)
    here = tl.zeros([BR], tl.int32)
    for j in tl.static_range(K):
        hit = (tl.load(idx + row * K + j, mask=ok, other=-1) == n).to(tl.int32)
        here += hit
        slot += hit * j
    return here > 0, slot


@triton.jit
def select_rope_forward(
    pool, idx, cos, sin, out, rows, S, G: tl.constexpr, N: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    ROTATED: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out[row, j] = pool[row, idx[row, j]] with its first ROTATED channels turned by the row's position."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    ok = row < rows
    half: tl.constexpr = ROTATED // 2
    h = tl.arange(0, BH)
    ok_h = ok[:, None] & (h < half)[None, :]
    angle = ((row // G) % S)[:, None] * ROTATED + h[None, :]
    if ROTATED > 0:
        cos_a = tl.load(cos + angle, mask=ok_h, other=0.0)
        cos_b = tl.load(cos + angle + half, mask=ok_h, other=0.0)
        sin_a = tl.load(sin + angle, mask=ok_h, other=0.0)
        sin_b = tl.load(sin + angle + half, mask=ok_h, other=0.0)
    for j in tl.static_range(K):
        chosen = tl.load(idx + row * K + j, mask=ok, other=0)
        source = (row * N + chosen)[:, None] * D
        target = (row * K + j)[:, None] * D
        if ROTATED > 0:
            a = tl.load(pool + source + h[None, :], mask=ok_h, other=0.0).to(tl.float32)
            b = tl.load(pool + source + h[None, :] + half, mask=ok_h, other=0.0).to(tl.float32)
            tl.store(out + target + h[None, :], (a * cos_a + b * sin_a).to(out.dtype.element_ty), mask=ok_h)
            tl.store(out + target + h[None, :] + half, (b * cos_b + a * sin_b).to(out.dtype.element_ty), mask=ok_h)
        if ROTATED < D:
            c = ROTATED + tl.arange(0, BC)
            ok_c = ok[:, None] & (c < D)[None, :]
            tl.store(out + target + c[None, :], tl.load(pool + source + c[None, :], mask=ok_c, other=0.0), mask=ok_c)


@triton.jit
def select_rope_backward(
    grad, idx, cos, sin, out, rows, S, G: tl.constexpr, N: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    ROTATED: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out[row, n] = grad[row, j] turned back, where slot j holds head n; zero where no slot does."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    ok = row < rows
    half: tl.constexpr = ROTATED // 2
    h = tl.arange(0, BH)
    ok_h = ok[:, None] & (h < half)[None, :]
    angle = ((row // G) % S)[:, None] * ROTATED + h[None, :]
    if ROTATED > 0:
        cos_a = tl.load(cos + angle, mask=ok_h, other=0.0)
        cos_b = tl.load(cos + angle + half, mask=ok_h, other=0.0)
        sin_a = tl.load(sin + angle, mask=ok_h, other=0.0)
        sin_b = tl.load(sin + angle + half, mask=ok_h, other=0.0)
    for n in range(N):
        here, slot = _slot_of(idx, row, ok, n, K, BR)
        source = (row * K + slot)[:, None] * D
        target = (row * N + n)[:, None] * D
        if ROTATED > 0:
            from_h = ok_h & here[:, None]
            a = tl.load(grad + source + h[None, :], mask=from_h, other=0.0).to(tl.float32)
            b = tl.load(grad + source + h[None, :] + half, mask=from_h, other=0.0).to(tl.float32)
            tl.store(out + target + h[None, :], (a * cos_a + b * sin_b).to(out.dtype.element_ty), mask=ok_h)
            tl.store(out + target + h[None, :] + half, (b * cos_b + a * sin_a).to(out.dtype.element_ty), mask=ok_h)
        if ROTATED < D:
            c = ROTATED + tl.arange(0, BC)
            ok_c = ok[:, None] & (c < D)[None, :]
            rest = tl.load(grad + source + c[None, :], mask=ok_c & here[:, None], other=0.0)
            tl.store(out + target + c[None, :], rest, mask=ok_c)


@triton.jit
def expand_forward(
    slots, idx, gate, out, rows, row_stride, slot_stride, N: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[row, n] = gate[row, j] slots[row, j], where slot j holds head n; zero where no slot does."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    ok = row < rows
    c = tl.arange(0, BD)
    ok_c = ok[:, None] & (c < D)[None, :]
    for n in range(N):
        here, slot = _slot_of(idx, row, ok, n, K, BR)
        factor = tl.load(gate + row * K + slot, mask=ok & here, other=0.0).to(tl.float32)
        source = (row * row_stride + slot * slot_stride)[:, None] + c[None, :]
        x = tl.load(slots + source, mask=ok_c & here[:, None], other=0.0).to(tl.float32)
        y = tl.where(here[:, None], x * factor[:, None], 0.0)
        tl.store(out + (row * N + n)[:, None] * D + c[None, :], y.to(out.dtype.element_ty), mask=ok_c)


@triton.jit
def expand_backward(
    grad, slots, idx, gate, grad_slots, grad_gate, rows, row_stride, slot_stride, N: tl.constexpr, K: tl.constexpr,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """With p = grad[row, idx[row, j]]: grad_slots[row, j] = gate[row, j] p, grad_gate[row, j] = <p, slots[row, j]>."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    ok = row < rows
    c = tl.arange(0, BD)
    ok_c = ok[:, None] & (c < D)[None, :]
    for j in tl.static_range(K):
        chosen = tl.load(idx + row * K + j, mask=ok, other=0)
        factor = tl.load(gate + row * K + j, mask=ok, other=0.0).to(tl.float32)
        picked = tl.load(grad + (row * N + chosen)[:, None] * D + c[None, :], mask=ok_c, other=0.0).to(tl.float32)
        x = tl.load(slots + (row * row_stride + j * slot_stride)[:, None] + c[None, :], mask=ok_c, other=0.0)
        target = (row * K + j)[:, None] * D + c[None, :]
        tl.store(grad_slots + target, (picked * factor[:, None]).to(grad_slots.dtype.element_ty), mask=ok_c)
        tl.store(grad_gate + row * K + j, tl.sum(picked * x.to(tl.float32), 1), mask=ok)


# ---------------------------------------------------------------- launches: any device that the kernels run on


@on_device_of_first
def launch_select_rope(kernel: Any, x: Tensor, idx: Tensor, cos: Tensor, sin: Tensor, heads: int, out: Tensor) -> None:
    """`select_rope_forward` (x the pool) or `select_rope_backward` (x the gradient) into `out`."""
    batch, seq_len, groups, k = idx.shape
    rows, channels, rotated = batch * seq_len * groups, x.shape[-1], cos.shape[-1]
    per = rows_per_program(channels)
    kernel[(triton.cdiv(rows, per),)](
        x, idx, cos, sin, out, rows, seq_len, groups, heads, k, channels, rotated,
        per, padded(rotated // 2), padded(channels - rotated), num_warps=WARPS,
    )  # fmt: skip


@on_device_of_first
def launch_expand(slots: Tensor, idx: Tensor, gate: Tensor, heads: int, out: Tensor) -> None:
    """`expand_forward` into `out`; slots [R, k, D] of any strides but 1 in the last."""
    rows, k, channels = slots.shape
    per = rows_per_program(channels)
    expand_forward[(triton.cdiv(rows, per),)](
        slots, idx, gate, out, rows, slots.stride(0), slots.stride(1), heads, k, channels, per, padded(channels),
        num_warps=WARPS,
    )  # fmt: skip


@on_device_of_first
def launch_expand_backward(
    grad: Tensor, slots: Tensor, idx: Tensor, gate: Tensor, heads: int, grad_slots: Tensor, grad_gate: Tensor
) -> None:
    """`expand_backward` into `grad_slots` and `grad_gate`; slots as in `launch_expand`."""
    rows, k, channels = slots.shape
    per = rows_per_program(channels)
    expand_backward[(triton.cdiv(rows, per),)](
        grad, slots, idx, gate, grad_slots, grad_gate, rows, slots.stride(0), slots.stride(1), heads, k, channels,
        per, padded(channels), num_warps=WARPS,
    )  # fmt: skip


def shipped() -> list[Shipped]:
    """What is launched for head sizes 64, 96 and 128 in bf16, for compilation without a GPU."""
    found = []
    tensors = {"idx": "*i64", "rows": "i32"}
    for channels in (64, 96, 128):
        shape = {"N": 4, "K": 1, "D": channels, "BR": rows_per_program(channels)}
        for kernel, first in ((select_rope_forward, "pool"), (select_rope_backward, "grad")):
            signature = {first: "*bf16", **tensors, "cos": "*fp32", "sin": "*fp32", "out": "*bf16", "S": "i32"}
            sizes = {"G": 8, "ROTATED": channels, "BH": padded(channels // 2), "BC": padded(0)}
            found.append(Shipped(kernel, signature, shape | sizes, WARPS))
        strides = {"row_stride": "i32", "slot_stride": "i32", "gate": "*fp32"}
        signature = {"slots": "*bf16", **tensors, **strides, "out": "*bf16"}
        found.append(Shipped(expand_forward, signature, shape | {"BD": padded(channels)}, WARPS))
        signature = {
            "grad": "*bf16",
            "slots": "*bf16",
            **tensors,
            **strides,
            "grad_slots": "*bf16",
            "grad_gate": "*fp32",
        }
        found.append(Shipped(expand_backward, signature, shape | {"BD": padded(channels)}, WARPS))
    return found
