"""Twins: the routing operations in plain PyTorch. They are references for the Triton kernels, and run on a CPU.

Legend: B batch, S sequence, G groups, N experts per group, k selected experts (slots), D channels of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels.launch import TILE_PAIRS, schedule_sizes
from headway.kernels.rope import apply_rope


@torch.no_grad()
def top_k_twin(scores: Tensor, k: int) -> Tensor:
    """`top_k` in PyTorch.

    As in the kernel, NaN counts as infinity, so a tie with it goes to the lower index. -inf is replaced by the lowest
    finite value, because -inf marks what is chosen: no expert is chosen twice, even if all others have -inf.
    """
    scores = scores.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=torch.finfo(scores.dtype).min)
    chosen = []
    for i in range(k):
        best = scores.argmax(-1, keepdim=True)
        chosen.append(best)
        if i + 1 < k:
            scores = scores.scatter(-1, best, float("-inf"))
    return torch.cat(chosen, -1)


def gates_twin(logits: Tensor, idx: Tensor, gate: str) -> Tensor:
    """`gates` in PyTorch, for all gates except "hard"."""
    if gate == "sigmoid2":
        return 2 * torch.sigmoid(logits.gather(-1, idx))
    if gate == "sigmoid":
        return torch.sigmoid(logits.gather(-1, idx))
    if gate == "renorm":
        return torch.softmax(logits.gather(-1, idx), -1)
    p = torch.softmax(logits, -1).gather(-1, idx)
    if gate == "softmax_n":
        return logits.shape[-1] * p
    if gate == "straight_through":
        return 1 + (p - p.detach())
    return p if gate == "softmax" else p / p.detach().sum(-1, keepdim=True)


def balance_sums_twin(logits: Tensor, idx: Tensor, sigmoid: bool) -> Tensor:
    """`balance_sums` in PyTorch, stacked: [2, B, G, N]."""
    chosen = torch.zeros_like(logits).scatter(-1, idx, 1.0)
    scores = torch.sigmoid(logits)
    p = scores / scores.sum(-1, keepdim=True) if sigmoid else torch.softmax(logits, -1)
    return torch.stack([chosen.sum(1), p.sum(1)])


def _rows(idx: Tensor, experts: int) -> Tensor:
    """idx [B, S, G, k] -> row indices [B S G k] in a pool flattened to [B S G N, D]; they are unique."""
    first = torch.arange(idx.numel() // idx.shape[-1], device=idx.device) * experts
    return (first[:, None] + idx.flatten(0, -2)).flatten()


def select(pool: Tensor, idx: Tensor) -> Tensor:
    """Select slots: pool [B, S, G, N, D], idx [B, S, G, k] -> [B, S, G, k, D].

    Copies whole rows. On CPU, forward and backward take a quarter of the time of `gather` along N.
    """
    chosen = pool.flatten(0, -2).index_select(0, _rows(idx, pool.shape[-2]))
    return chosen.view(*idx.shape, pool.shape[-1])


def select_rope_twin(pool: Tensor, idx: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """`select_rope` in PyTorch."""
    return apply_rope(select(pool, idx).flatten(2, 3), rope).unflatten(2, idx.shape[2:])


def expand_twin(slots: Tensor, idx: Tensor, gate: Tensor, experts: int) -> Tensor:
    """`expand` in PyTorch."""
    channels = slots.shape[-1]
    gated = (slots * gate.to(slots.dtype).unsqueeze(-1)).reshape(-1, channels)
    pool = gated.new_zeros(idx.numel() // idx.shape[-1] * experts, channels)
    return pool.index_copy(0, _rows(idx, experts), gated).view(*idx.shape[:-1], experts, channels)


def schedule_twin(offsets: Tensor, tokens: int, pairs: int) -> Tensor:
    """`schedule` of `headway.kernels.routed.PairLists`, int32, for P `pairs` of T `tokens`; offsets [H + 1]."""
    sizes = schedule_sizes(pairs, offsets.shape[0] - 1)
    tiles = _parts(offsets, TILE_PAIRS, sizes.tiles, tokens)
    return torch.cat([tiles, _parts(offsets, sizes.chunk, sizes.items, tokens, at_least=1)])


def _parts(offsets: Tensor, length: int, bound: int, longest: int, at_least: int = 0) -> Tensor:
    """Parts of `length` pairs of all lists: entries i H + h for part i of list h, ordered by i, then h; then -1.

    int32 [bound]. `longest` bounds the length of a list; every list has `at_least` that many parts, even when empty.
    """
    experts = offsets.shape[0] - 1
    parts = ((offsets.diff() + length - 1) // length).clamp(min=at_least)  # [H]
    rows = max(-(-longest // length), at_least)
    number = torch.arange(rows * experts, dtype=torch.int32, device=offsets.device)
    used = (number.view(rows, experts) < (parts * experts)[None, :]).flatten()
    # Unused numbers are written to one entry behind the end, which is cut off.
    at = torch.where(used, used.cumsum(0) - 1, bound)
    made = torch.full((bound + 1,), -1, dtype=torch.int32, device=offsets.device)
    return made.scatter(0, at, number)[:bound]
