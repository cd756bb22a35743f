"""Weight gradient of each expert over its own list of pairs, summed in fp32 in a fixed order.

Lists longer than twice the mean are cut into chunks of fixed length that run beside each other; an ordered second pass
adds them. So skewed routing stays fast and equal runs are equal bit for bit. There are at most H/2 partial sums.

Legend: T tokens, d width, G groups, N experts per group, H = G N, k slots, P = T G k pairs, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.launch import Shipped, on_device_of_first, padded, schedule_sizes
from headway.kernels.triton.gather import PRECISION


@triton.jit
def grouped_dw(
    A, B, GATE, DW, PART, ORDER, OFFSETS, ITEMS, chunk,
    d: tl.constexpr, D: tl.constexpr, H: tl.constexpr, GK: tl.constexpr, GATED: tl.constexpr,
    W_EXPERT: tl.constexpr, W_IN: tl.constexpr, W_OUT: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum over one chunk of A[token]^T (gate B[pair]): the first chunk of a list goes to DW, later ones to PART."""
    item = tl.program_id(0)
    entry = tl.load(ITEMS + item)
    if entry >= 0:
        h = entry % H
        low = tl.load(OFFSETS + h) + (entry // H) * chunk
        high = tl.minimum(tl.load(OFFSETS + h + 1), low + chunk)
        c = tl.program_id(1) * BD + tl.arange(0, BD)
        n = tl.arange(0, BN)
        acc = tl.zeros([BD, BN], tl.float32)
        for r0 in range(low, high, BT):
            row = r0 + tl.arange(0, BT)
            real = row < high
            pair = tl.load(ORDER + row, mask=real, other=0)
            token = (pair // GK).to(tl.int64)
            a = tl.load(A + token[None, :] * d + c[:, None], mask=real[None, :] & (c < d)[:, None], other=0.0)
            kept = real[:, None] & (n < D)[None, :]
            b = tl.load(B + pair[:, None].to(tl.int64) * D + n[None, :], mask=kept, other=0.0)
            if GATED:
                gate = tl.load(GATE + pair, mask=real, other=0.0).to(tl.float32)
                b = (b.to(tl.float32) * gate[:, None]).to(B.dtype.element_ty)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        inside = (c < d)[:, None] & (n < D)[None, :]
        if item < H:  # the schedule is tile-major: its first H entries are the first chunks of all lists, in order
            tl.store(DW + h.to(tl.int64) * W_EXPERT + c[:, None] * W_IN + n[None, :] * W_OUT, acc, mask=inside)
        else:
            tl.store(PART + (item - H).to(tl.int64) * d * D + c[:, None] * D + n[None, :], acc, mask=inside)


@triton.jit
def add_chunks(
    DW, PART, ITEMS, extra, d: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    W_EXPERT: tl.constexpr, W_IN: tl.constexpr, W_OUT: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """DW[h] += the partial sums of h's later chunks, in the order of the list."""
    h = tl.program_id(0)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    inside = (c < d)[:, None] & (n < D)[None, :]
    at = DW + h.to(tl.int64) * W_EXPERT + c[:, None] * W_IN + n[None, :] * W_OUT
    acc = tl.load(at, mask=inside, other=0.0)
    for item in range(0, extra):
        entry = tl.load(ITEMS + H + item)
        own = (entry >= 0) & (entry % H == h)
        part = PART + tl.cast(item, tl.int64) * d * D + c[:, None] * D + n[None, :]
        acc += tl.load(part, mask=inside & own, other=0.0)
    tl.store(at, acc, mask=inside)


def _config(D: int, element_bytes: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tile and launch options by head size. Products in fp32 are made in registers, which larger tiles would spill."""
    width = padded(D)
    if element_bytes == 4:
        return {"BD": 64, "BN": width, "BT": 32 if width <= 64 else 16}, {
            "num_warps": 4 if width <= 32 else 8,
            "num_stages": 3,
        }
    blocks = {"BD": 128 if width != 128 else 256, "BN": width, "BT": 64}
    return blocks, {"num_warps": 4 if width <= 64 else 8, "num_stages": 3}


@on_device_of_first
def weight_grad(
    a: Tensor, b: Tensor, gate: Tensor | None, lists: tuple[Tensor, Tensor, Tensor], rows_are_experts: bool, out: Tensor
) -> None:
    """Gradient, fp32, of a weight [H D, d] (rows_are_experts) or [d, H D]: for each expert the sum of a^T (gate b).

    a [T, d], b [T, G, k, D], gate [T, G, k] or None.
    """
    order, offsets, schedule = lists
    d, D, experts = a.shape[1], b.shape[3], offsets.numel() - 1
    blocks, options = _config(D, a.element_size())
    sizes = schedule_sizes(order.numel(), experts)
    items, extra = schedule[sizes.tiles :], sizes.items - experts
    part = torch.empty(max(extra, 1), d, D, dtype=torch.float32, device=a.device)
    strides = (D * d, 1, d) if rows_are_experts else (D, experts * D, 1)
    layout = {"d": d, "D": D, "H": experts, "W_EXPERT": strides[0], "W_IN": strides[1], "W_OUT": strides[2]}
    a, b = a.contiguous(), b.contiguous()
    # Triton types a kernel's constants as its own class.
    launch: Any = grouped_dw[(sizes.items, -(-d // blocks["BD"]))]
    launch(
        a, b, b if gate is None else gate.contiguous(), out, part, order, offsets, items, sizes.chunk,
        GK=b.shape[1] * b.shape[2], GATED=gate is not None, **PRECISION,
        **layout, **blocks, **options,
    )  # fmt: skip
    if extra:
        add: Any = add_chunks[(experts, -(-d // 32))]
        add(out, part, items, extra, BD=32, BN=blocks["BN"], num_warps=4, **layout)


def shipped() -> list[Shipped]:
    """What is launched for head sizes 16 to 128 in bf16, and 128 in fp32, for compilation without a GPU."""
    lists = {"ORDER": "*i32", "OFFSETS": "*i32", "ITEMS": "*i32", "chunk": "i32"}
    signature = {"GATE": "*fp32", "DW": "*fp32", "PART": "*fp32", **lists}
    sums = {"DW": "*fp32", "PART": "*fp32", "ITEMS": "*i32", "extra": "i32"}
    found = []
    for D, kind in ((16, "bf16"), (64, "bf16"), (96, "bf16"), (128, "bf16"), (128, "fp32")):
        blocks, options = _config(D, 2 if kind == "bf16" else 4)
        types = signature | {"A": f"*{kind}", "B": f"*{kind}"}
        layout = {"d": 2048, "D": D, "H": 16, "W_EXPERT": D * 2048, "W_IN": 1, "W_OUT": 2048}
        warps, stages = options["num_warps"], options["num_stages"]
        for gated in (False, True):
            constants = layout | blocks | {"GK": 4, "GATED": gated} | PRECISION
            found.append(Shipped(grouped_dw, types, constants, warps, stages, tensor_cores=kind == "bf16"))
        found.append(Shipped(add_chunks, sums, layout | {"BD": 32, "BN": blocks["BN"]}, 4))
    return found
