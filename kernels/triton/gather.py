"""Gather-GEMM: each expert's matrix times the rows of the tokens that chose it, gathered while they are loaded.

Nothing is permuted in memory: at d = 2048, D = 64 and eight slots a permuted copy of x costs more time than the whole
dense product. Epilogues: rotate-half RoPE, plain, and the gate's (d slots and d gate from one accumulator).

Legend: T tokens, S sequence, d width, G groups, N experts per group, H = G N, k slots, P = T G k pairs, D head size,
R rotated channels; pair p = (t G + g) k + j, so its token is p // (G k).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.launch import LARGEST_HEAD, TILE_PAIRS, Shipped, on_device_of_first, padded, schedule_sizes


@triton.jit
def _channel(n, D: tl.constexpr, R: tl.constexpr):
    """The output channel in accumulator column n: planes (i, i + R/2) stand side by side, so do the unrotated halves.

    Rows of W are output channels, so this costs nothing in the load; both halves are stored contiguously. Where D - R
    is odd the second half of the unrotated ones ends one early: its last would be channel D, which there is not.
    """
    turned = (n % 2) * (R // 2) + n // 2
    tail = R + (n % 2) * ((D - R + 1) // 2) + (n - R) // 2
    return tl.where(n < R, turned, tail)


@triton.jit
def gather_gemm(
    A, W, OUT, ORDER, OFFSETS, TILES, SLOTS, GATE, DGATE, COS, SIN, S,
    d: tl.constexpr, D: tl.constexpr, H: tl.constexpr, GK: tl.constexpr, R: tl.constexpr, GATED: tl.constexpr,
    W_EXPERT: tl.constexpr, W_IN: tl.constexpr, W_OUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT[p] = epilogue(A[token of p] @ W[expert of p]); W of expert h at h W_EXPERT + c W_IN + n W_OUT."""
    entry = tl.load(TILES + tl.program_id(0))
    if entry >= 0:
        h = entry % H
        row = tl.load(OFFSETS + h) + (entry // H) * BM + tl.arange(0, BM)
        real = row < tl.load(OFFSETS + h + 1)
        pair = tl.load(ORDER + row, mask=real, other=0)
        token = pair // GK
        n = tl.arange(0, BN)
        channel = n
        made = n < D
        if R > 0:
            channel = _channel(n, D, R)
            made = (n < D + D % 2) & (channel < D)
        kk = tl.arange(0, BK)
        a_at = A + token[:, None].to(tl.int64) * d + kk[None, :]
        w_at = W + h.to(tl.int64) * W_EXPERT + kk[:, None] * W_IN + channel[None, :] * W_OUT
        acc = tl.zeros([BM, BN], tl.float32)
        for k0 in range(0, d, BK):
            inside = kk < d - k0
            a = tl.load(a_at + k0, mask=real[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_at + k0 * W_IN, mask=inside[:, None] & made[None, :], other=0.0)
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
        out_at = OUT + pair[:, None].to(tl.int64) * D
        if R > 0:
            u = tl.arange(0, BN // 2)
            plane = real[:, None] & (u < R // 2)[None, :]
            angle = (token % S)[:, None] * R + (R // 2) + u[None, :]  # the table's second half: its sine is not negated
            cos = tl.load(COS + angle, mask=plane, other=1.0)
            sin = tl.load(SIN + angle, mask=plane, other=0.0)
            x1, x2 = tl.split(tl.reshape(acc, (BM, BN // 2, 2)))
            first = tl.where(u < R // 2, u, u + R // 2)
            second = first + tl.where(u < R // 2, R // 2, (D - R + 1) // 2)
            kept = real[:, None] & (u < (D + 1) // 2)[None, :]
            kind = OUT.dtype.element_ty
            y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
            if R < D:  # a sine of 0 would not keep an infinity of the other half out
                turned = (u < R // 2)[None, :]
                y1, y2 = tl.where(turned, y1, x1), tl.where(turned, y2, x2)
            tl.store(out_at + first[None, :], y1.to(kind), mask=kept)
            tl.store(out_at + second[None, :], y2.to(kind), mask=kept & (second < D)[None, :])
        else:
            kept = real[:, None] & made[None, :]
            if GATED:
                slots = tl.load(SLOTS + pair[:, None].to(tl.int64) * D + n[None, :], mask=kept, other=0.0)
                product = acc * slots.to(tl.float32)
                if D < BN:  # beyond D the accumulator is NaN where a row of A holds an infinity
                    product = tl.where(made[None, :], product, 0.0)
                tl.store(DGATE + pair, tl.sum(product, 1), mask=real)
                acc = acc * tl.load(GATE + pair, mask=real, other=0.0)[:, None].to(tl.float32)
            tl.store(out_at + n[None, :], acc.to(OUT.dtype.element_ty), mask=kept)


PRECISION: dict[str, Any] = {"PRECISION": "ieee"}
"""Of products of fp32 operands; others run on tensor cores as they are."""


def _config(D: int, element_bytes: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tile and launch options: 128 wide accumulators need 8 warps, or registers spill; fp32 tiles are half as deep.

    In fp32, operands are in registers too, and twice as many warps are needed. With half of them, Triton 3.6 spills in
    the gate's epilogue (48 instructions at 128 channels, 2 at 64) and where part of the channels is rotated (4 at 128).
    """
    assert D <= LARGEST_HEAD, "wider heads are refused before"
    width = padded(D)
    blocks = {"BM": TILE_PAIRS, "BN": width, "BK": 128 // element_bytes}
    warps = 4 if width <= 64 else 8
    return blocks, {"num_warps": 2 * warps if element_bytes == 4 and width > 32 else warps, "num_stages": 4}


def _launch(
    a: Tensor, w: Tensor, out: Tensor, lists: tuple[Tensor, Tensor, Tensor], extra: tuple[Any, ...], sizes: Any
) -> None:
    order, offsets, schedule = lists
    D, GK, R, gated, strides = sizes
    blocks, options = _config(D, a.element_size())
    tiles = schedule_sizes(order.numel(), offsets.numel() - 1).tiles
    launch: Any = gather_gemm[(tiles,)]  # Triton types a kernel's constants as its own class
    launch(
        a.contiguous(), w.contiguous(), out, order, offsets, schedule, *extra, d=a.shape[1], D=D, H=offsets.numel() - 1,
        GK=GK, R=R, GATED=gated, W_EXPERT=strides[0], W_IN=strides[1], W_OUT=strides[2], **PRECISION,
        **blocks, **options,
    )  # fmt: skip


@on_device_of_first
def gather_project(
    x: Tensor, w: Tensor, lists: tuple[Tensor, Tensor, Tensor], rope: tuple[Tensor, Tensor], out: Tensor
) -> None:
    """out [T, G, k, D] = rope(x [T, d] times the chosen experts' rows of w [G N D, d]); cos and sin [S, R], R even."""
    (cos, sin), D, GK, d = rope, out.shape[3], out.shape[1] * out.shape[2], x.shape[1]
    seq, rotated = cos.shape
    extra = (out, out, out, cos.contiguous(), sin.contiguous(), seq)
    _launch(x, w, out, lists, extra, (D, GK, rotated, False, (D * d, 1, d)))


@on_device_of_first
def gather_slot_grad(
    dy: Tensor,
    w: Tensor,
    slots: Tensor,
    gate: Tensor,
    lists: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    d_gate: Tensor,
) -> None:
    """Backward of the gated combination: out = gate (dy W), d_gate = <dy W, slots>.

    dy [T, d], w [d, G N D], slots and out [T, G, k, D], gate and d_gate [T, G, k] (d_gate in fp32).
    """
    D, GK = slots.shape[3], slots.shape[1] * slots.shape[2]
    extra = (slots.contiguous(), gate.contiguous(), d_gate, slots, slots, 1)
    _launch(dy, w, out, lists, extra, (D, GK, 0, True, (D, w.shape[1], 1)))


def shipped() -> list[Shipped]:
    """What is launched for head sizes 16 to 128 in bf16, 64 and 128 in fp32, for compilation without a GPU."""
    signature = dict.fromkeys(["ORDER", "OFFSETS", "TILES"], "*i32")
    signature |= dict.fromkeys(["GATE", "DGATE", "COS", "SIN"], "*fp32") | {"S": "i32"}
    found = []
    sizes = [(D, "bf16", D) for D in (16, 64, 96, 128)] + [(64, "fp32", 64), (128, "fp32", 128), (128, "fp32", 64)]
    for D, kind, rotated in sizes:
        blocks, options = _config(D, 2 if kind == "bf16" else 4)
        types = signature | dict.fromkeys(["A", "W", "OUT", "SLOTS"], f"*{kind}")
        for gated in (False, True):
            if gated and rotated < D:
                continue  # nothing is rotated there
            strides = (D, 16 * D, 1) if gated else (D * 2048, 1, 2048)
            constants = dict(zip(("W_EXPERT", "W_IN", "W_OUT"), strides, strict=True)) | blocks
            constants |= {"d": 2048, "D": D, "H": 16, "GK": 4, "R": 0 if gated else rotated, "GATED": gated}
            warps, stages = options["num_warps"], options["num_stages"]
            found.append(Shipped(gather_gemm, types, constants | PRECISION, warps, stages, kind == "bf16"))
    return found
