"""Projections into and out of chosen experts: all of them densely, or each for the tokens that chose it alone.

Both forms are the same function. Dense makes one large product and moves rows afterwards; grouped sorts the chosen
(token, expert) pairs by expert and makes one product per expert, so that only what was chosen is multiplied. It reads
the number of pairs per expert on the host.

Legend: B batch, S sequence, T = B S tokens, d width, G groups, N experts per group, k chosen ones (slots), D channels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.routing import expand, select

Projections = Literal["dense", "grouped"]


def project(x: Tensor, weight: Tensor, idx: Tensor, experts: int, form: Projections) -> Tensor:
    """x [B, S, d], weight [G N D, d], idx [B, S, G, k] -> what each token's experts make of it [B, S, G, k, D]."""
    head_dim = weight.shape[0] // (idx.shape[2] * experts)
    if form == "dense":
        return select(F.linear(x, weight).unflatten(-1, (idx.shape[2], experts, head_dim)), idx)
    flat = x.flatten(0, 1)  # [T, d]
    order, sizes = _by_expert(idx, experts)
    rows = flat.index_select(0, order // (idx.shape[2] * idx.shape[3]))  # the token of each pair
    matrices = weight.unflatten(0, (-1, head_dim))  # [G N, D, d]
    made = _products(rows, [matrices[e].t() for e in range(len(sizes))], sizes)
    return _unsorted(made, order).view(*idx.shape, head_dim)


def combine(slots: Tensor, weight: Tensor, idx: Tensor, gate: Tensor, experts: int, form: Projections) -> Tensor:
    """Gated sum of what chosen experts make of their slots: slots [B, S, G, k, D], weight [d, G N D] -> [B, S, d].

    idx, gate [B, S, G, k]. Gathering each pair's [D, d] slice instead would move d D numbers per slot.
    """
    if form == "dense":
        return F.linear(expand(slots, idx, gate, experts).flatten(2), weight)
    gated = (slots * gate.to(slots.dtype).unsqueeze(-1)).flatten(0, 3)  # [pairs, D]
    order, sizes = _by_expert(idx, experts)
    matrices = weight.unflatten(1, (-1, slots.shape[-1]))  # [d, G N, D]
    made = _products(gated.index_select(0, order), [matrices[:, e].t() for e in range(len(sizes))], sizes)  # [pairs, d]
    return _unsorted(made, order).unflatten(0, (*idx.shape[:2], -1)).sum(2)


def _by_expert(idx: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """Pairs, in the order of their expert (stable), and how many each of the G N experts has; idx [B, S, G, k]."""
    groups = idx.shape[2]
    expert = (idx + experts * torch.arange(groups, device=idx.device)[:, None]).flatten()
    return expert.argsort(stable=True), torch.bincount(expert, minlength=groups * experts).tolist()


def _products(rows: Tensor, matrices: list[Tensor], sizes: list[int]) -> Tensor:
    """Each segment of the sorted rows times its expert's matrix; an expert that nobody chose still has a gradient."""
    return torch.cat([part @ matrix for part, matrix in zip(rows.split(sizes), matrices, strict=True)])


def _unsorted(made: Tensor, order: Tensor) -> Tensor:
    """Rows back in the order of the pairs; no row occurs twice."""
    return torch.empty_like(made).index_copy(0, order, made)
