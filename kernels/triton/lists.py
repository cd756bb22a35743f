"""Lists of the (token, slot) pairs of each expert, sorted and scheduled on the device: no atomics, no host sync.

A stable counting sort in three steps: histograms of blocks of tokens, their exclusive sums, ranks within a block.
Stable lists are sorted by token, so tile i of every list covers about the same tokens: a schedule that is tile-major
and expert-minor keeps those tokens in L2. One launch makes the schedules of all products. All sizes depend on shapes
alone.

Legend: T tokens, G groups, N experts per group, H = G N experts, k slots, P = T G k pairs; pair p = (t G + g) k + j.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.launch import TILE_PAIRS, Shipped, on_device_of_first, padded, schedule_sizes

BLOCK_TOKENS = 128
SCHEDULE_ELEMENTS = 4096
"""Parts times lists of one program that makes the schedule."""
WARPS = 4


def _chosen(IDX, t, g, experts, T, G: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """[BT, NP]: whether a token's slots hold an expert, and which slot does."""
    count = (t[:, None] * 0 + experts[None, :] * 0).to(tl.int32)
    slot = count
    for j in range(K):
        chosen = tl.load(IDX + (t.to(tl.int64) * G + g) * K + j, mask=t < T, other=N)
        hit = (chosen[:, None] == experts[None, :]) & (t[:, None] < T)
        count += hit.to(tl.int32)
        slot += tl.where(hit, j, 0)
    return count, slot


_chosen_by: Any = triton.jit(_chosen)  # the decorator would type a call as one that never returns


@triton.jit
def histogram(IDX, HIST, T, G: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr):
    """HIST [G N, blocks]: how many tokens of a block chose each expert."""
    block = tl.program_id(0)
    g = tl.program_id(1)
    experts = tl.arange(0, NP)
    count, _ = _chosen_by(IDX, block * BT + tl.arange(0, BT), g, experts, T, G, N, K)
    place = (g * N + experts) * tl.num_programs(0) + block
    tl.store(HIST + place, tl.sum(count, 0), mask=experts < N)


@triton.jit
def place(IDX, BASE, ORDER, T, G: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr):
    """ORDER [P]: the pairs in the order of their expert; BASE [G N, blocks] is where each block's pairs begin."""
    block = tl.program_id(0)
    g = tl.program_id(1)
    t = block * BT + tl.arange(0, BT)
    experts = tl.arange(0, NP)
    count, slot = _chosen_by(IDX, t, g, experts, T, G, N, K)
    base = tl.load(BASE + (g * N + experts) * tl.num_programs(0) + block, mask=experts < N, other=0)
    rank = tl.cumsum(count, 0) - count
    tl.store(ORDER + base[None, :] + rank, (t[:, None] * G + g) * K + slot, mask=(count > 0) & (experts[None, :] < N))


@triton.jit
def schedule(
    OFFSETS, OUT, chunk, tiles, items, H: tl.constexpr, HP: tl.constexpr, TILE: tl.constexpr, BI: tl.constexpr,
    FILL: tl.constexpr,
):  # fmt: skip
    """OUT [tiles + items]: entries i H + h for part i of list h, ordered by i, then h, and -1 behind them.

    First the tiles of all lists, of TILE pairs; then their chunks, at least one of each list, even of an empty one.
    """
    chunked = tl.program_id(1)
    length = tl.where(chunked == 1, chunk, TILE)
    bound = tl.where(chunked == 1, items, tiles)
    out = OUT + chunked * tiles
    h = tl.arange(0, HP)
    size = tl.load(OFFSETS + h + 1, mask=h < H, other=0) - tl.load(OFFSETS + h, mask=h < H, other=0)
    parts = tl.where(h < H, tl.maximum((size + length - 1) // length, chunked), 0)
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    used = (i[:, None] < parts[None, :]).to(tl.int32)
    before = tl.sum(tl.minimum(i[:, None], parts[None, :]), 1)  # parts with a lower number, of all lists
    rank = tl.cumsum(used, 1) - used
    tl.store(out + before[:, None] + rank, i[:, None] * H + h[None, :], mask=used > 0)
    at = tl.program_id(0) * FILL + tl.arange(0, FILL)
    tl.store(out + at, -1, mask=(at >= tl.sum(parts, 0)) & (at < bound))


@on_device_of_first
def pair_lists(idx: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`order`, `offsets` and `schedule` of `headway.kernels.routed.PairLists`; idx [T, G, k].

    A token's slots in one group must differ, as top-k makes them.
    """
    tokens, groups = idx.shape[:2]
    order, offsets = (
        _sorted(idx, experts)
        if tokens
        else (idx.new_empty(0, dtype=torch.int32), idx.new_zeros(groups * experts + 1, dtype=torch.int32))
    )
    return order, offsets, _schedule(offsets, tokens, idx.numel())


def _sorted(idx: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """idx [T, G, k], T > 0 -> pairs in the order of their expert [P] and where each expert's list begins [H + 1]."""
    tokens, groups, k = idx.shape
    blocks = -(-tokens // BLOCK_TOKENS)
    order = torch.empty(idx.numel(), dtype=torch.int32, device=idx.device)
    hist = torch.empty(groups * experts, blocks, dtype=torch.int32, device=idx.device)
    columns = 1 << (experts - 1).bit_length()
    grid = (blocks, groups)
    count: Any = histogram[grid]  # Triton types a kernel's constants as its own class
    put: Any = place[grid]
    idx = idx.contiguous()
    count(idx, hist, tokens, groups, experts, columns, k, BLOCK_TOKENS, num_warps=WARPS)
    ends = hist.flatten().cumsum(0, dtype=torch.int32)
    base = ends - hist.flatten()
    put(idx, base, order, tokens, groups, experts, columns, k, BLOCK_TOKENS, num_warps=WARPS)
    return order, torch.cat([base.view(groups * experts, blocks)[:, 0], ends[-1:]])


def _schedule(offsets: Tensor, tokens: int, pairs: int) -> Tensor:
    """`schedule` of P `pairs` of T `tokens` in lists that begin at offsets [H + 1]."""
    experts = offsets.numel() - 1
    sizes = schedule_sizes(pairs, experts)
    out = torch.empty(sizes.tiles + sizes.items, dtype=torch.int32, device=offsets.device)
    columns = padded(experts)
    rows = max(1, SCHEDULE_ELEMENTS // columns)
    programs = max(1, triton.cdiv(triton.cdiv(tokens, min(TILE_PAIRS, sizes.chunk)), rows))
    fill = padded(triton.cdiv(max(sizes.tiles, sizes.items), programs))
    make: Any = schedule[(programs, 2)]
    make(offsets, out, *sizes, experts, columns, TILE_PAIRS, rows, fill, num_warps=WARPS)
    return out


def shipped() -> list[Shipped]:
    """What is launched for four experts per group, for compilation without a GPU."""
    sizes = {"G": 4, "N": 4, "NP": 4, "K": 2, "BT": BLOCK_TOKENS}
    return [
        Shipped(histogram, {"IDX": "*i64", "HIST": "*i32", "T": "i32"}, sizes, WARPS),
        Shipped(
            schedule,
            {"OFFSETS": "*i32", "OUT": "*i32", "chunk": "i32", "tiles": "i32", "items": "i32"},
            {"H": 32, "HP": 32, "TILE": TILE_PAIRS, "BI": SCHEDULE_ELEMENTS // 32, "FILL": 1024},
            WARPS,
        ),
        Shipped(place, {"IDX": "*i64", "BASE": "*i32", "ORDER": "*i32", "T": "i32"}, sizes, WARPS),
    ]
