"""Lists of the (token, slot) pairs of each expert, sorted and scheduled on the device: no atomics, no host sync.

A stable counting sort in three steps: histograms of blocks of tokens, their exclusive sums, ranks within a block.
Stable lists are sorted by token, so tile i of every list covers about the same tokens: a schedule that is tile-major
and expert-minor keeps those tokens in L2. All sizes depend on shapes alone.

Legend: T tokens, G groups, N experts per group, H = G N experts, k slots, P = T G k pairs; pair p = (t G + g) k + j.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.launch import Shipped, on_device_of_first

BLOCK_TOKENS = 128
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


@on_device_of_first
def pair_lists(idx: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """idx [T, G, k] -> pairs in the order of their expert [P] and where each expert's list begins [H + 1], int32.

    A token's slots in one group must differ, as top-k makes them.
    """
    tokens, groups, k = idx.shape
    if not tokens:
        return idx.new_empty(0, dtype=torch.int32), idx.new_zeros(groups * experts + 1, dtype=torch.int32)
    blocks = -(-tokens // BLOCK_TOKENS)
    order = torch.empty(idx.numel(), dtype=torch.int32, device=idx.device)
    hist = torch.empty(groups * experts, blocks, dtype=torch.int32, device=idx.device)
    padded = 1 << (experts - 1).bit_length()
    grid = (blocks, groups)
    count: Any = histogram[grid]  # Triton types a kernel's constants as its own class
    put: Any = place[grid]
    idx = idx.contiguous()
    count(idx, hist, tokens, groups, experts, padded, k, BLOCK_TOKENS, num_warps=WARPS)
    ends = hist.flatten().cumsum(0, dtype=torch.int32)
    base = ends - hist.flatten()
    put(idx, base, order, tokens, groups, experts, padded, k, BLOCK_TOKENS, num_warps=WARPS)
    return order, torch.cat([base.view(groups * experts, blocks)[:, 0], ends[-1:]])


def schedule(offsets: Tensor, tile: int, pairs: int, longest: int, at_least: int = 0) -> Tensor:
    """Tiles of all lists, tile-major: entries i H + h, then -1; int32 [pairs // tile + H], a bound by shapes alone.

    offsets [H + 1]; `longest` bounds a list's length (T); every list has `at_least` that many tiles, even when empty.
    """
    experts = offsets.numel() - 1
    tiles = ((offsets.diff() + tile - 1) // tile).clamp(min=at_least)  # [H]
    rows = max(-(-longest // tile), at_least)
    number = torch.arange(rows * experts, dtype=torch.int32, device=offsets.device)
    used = (number.view(rows, experts) < (tiles * experts)[None, :]).flatten()
    bound = pairs // tile + experts
    # What is not used is written to one entry behind the end, which is cut off.
    at = torch.where(used, used.cumsum(0) - 1, bound)
    made = torch.full((bound + 1,), -1, dtype=torch.int32, device=offsets.device)
    return made.scatter(0, at, number)[:bound]


def shipped() -> list[Shipped]:
    """What is launched for four experts per group, for compilation without a GPU."""
    sizes = {"G": 4, "N": 4, "NP": 4, "K": 2, "BT": BLOCK_TOKENS}
    return [
        Shipped(histogram, {"IDX": "*i64", "HIST": "*i32", "T": "i32"}, sizes, WARPS),
        Shipped(place, {"IDX": "*i64", "BASE": "*i32", "ORDER": "*i32", "T": "i32"}, sizes, WARPS),
    ]
