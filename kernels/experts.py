"""Projections into and out of selected experts.

All forms compute the same function:

dense    one large matmul for all experts, then selection of rows
grouped  sorts the selected (token, expert) pairs by expert and runs one matmul per expert, so that only selected pairs
         are computed; synchronizes with the device to read the number of pairs per expert
routed   the same as grouped with one GPU kernel per product and no synchronization (`headway.kernels.routed`)
auto     routed where it is expected to be faster, else dense

Legend: B batch, S sequence, T = B S tokens, d width, G groups, N experts per group, k selected experts (slots), D
channels of one expert.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.choice import Product, Shape, choose
from headway.kernels.device import architecture, fused
from headway.kernels.launch import LARGEST_HEAD
from headway.kernels.routed import DENSE, ROUTED, Forms, PairLists, pair_lists, routed_combine, routed_project
from headway.kernels.routing import expand
from headway.kernels.twins import select

Projections = Literal["dense", "grouped", "routed", "auto"]


class Routed(NamedTuple):
    """Arguments of the routed operators: the selected pairs sorted by expert, and which matmuls are routed."""

    lists: PairLists
    forms: Forms


def routed_forms(form: Projections, x: Tensor, *, groups: int, experts: int, k: int, head_dim: int) -> Forms | None:
    """Which matmuls of x [B, S, d] with k of N `experts` are routed, or None if all are dense or grouped.

    The result depends only on shapes, dtype and GPU architecture, so all ranks agree. `auto` is dense where kernels do
    not run, and in fp32, which the cost model does not cover: routed matmuls cannot use tensor cores in fp32.
    """
    if form == "routed":
        return ROUTED
    if form != "auto" or not fused(x) or x.element_size() > 2 or head_dim > LARGEST_HEAD:
        return None
    batch, seq_len, width = x.shape
    shape = Shape(tokens=batch * seq_len, width=width, head_dim=head_dim, groups=groups, experts=experts, k=k)
    products: tuple[Product, Product] = ("gather", "weight_grad")
    gather, weight_grad = (choose(product, shape, architecture(x.device)) == "routed" for product in products)
    forms = Forms(gather=gather, weight_grad=weight_grad)
    return None if forms == DENSE else forms


def routed_choice(form: Projections, x: Tensor, idx: Tensor, experts: int, *, head_dim: int) -> Routed | None:
    """`routed_forms` and the pair lists for the selection idx [B, S, G, k]; None if matmuls are dense or grouped."""
    forms = routed_forms(form, x, groups=idx.shape[2], experts=experts, k=idx.shape[3], head_dim=head_dim)
    return None if forms is None else Routed(pair_lists(idx.flatten(0, 1), experts), forms)


def project_routed(x: Tensor, weight: Tensor, routed: Routed, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """`project` with the routed operators, then RoPE if `rope` (cos and sin [S, R]) is given."""
    made = routed_project(x.flatten(0, 1), weight, routed.lists, rope, routed.forms)
    return made.unflatten(0, x.shape[:2])


def project(
    x: Tensor, weight: Tensor, idx: Tensor, experts: int, form: Projections, routed: Routed | None = None
) -> Tensor:
    """Projection by the selected experts: x [B, S, d], weight [G N D, d], idx [B, S, G, k] -> [B, S, G, k, D].

    `routed`: result of `routed_choice` for idx, or None.
    """
    if routed is not None:
        return project_routed(x, weight, routed)
    head_dim = weight.shape[0] // (idx.shape[2] * experts)
    if form != "grouped":
        return select(F.linear(x, weight).unflatten(-1, (idx.shape[2], experts, head_dim)), idx)
    flat = x.flatten(0, 1)  # [T, d]
    order, sizes = _by_expert(idx, experts)
    rows = flat.index_select(0, order // (idx.shape[2] * idx.shape[3]))  # the token of each pair
    matrices = weight.unflatten(0, (-1, head_dim))  # [G N, D, d]
    made = _products(rows, [matrices[e].t() for e in range(len(sizes))], sizes)
    return _unsorted(made, order).view(*idx.shape, head_dim)


def combine(
    slots: Tensor,
    weight: Tensor,
    idx: Tensor,
    gate: Tensor,
    experts: int,
    form: Projections,
    routed: Routed | None = None,
) -> Tensor:
    """Gated sum of the selected experts' output projections: slots [B, S, G, k, D], weight [d, G N D] -> [B, S, d].

    idx, gate [B, S, G, k]; `routed` as in `project`. Gathering the [D, d] slice of each pair instead would move d D
    elements per slot.
    """
    if routed is not None:
        y = routed_combine(slots.flatten(0, 1), weight, routed.lists, gate.flatten(0, 1), routed.forms)
        return y.unflatten(0, slots.shape[:2])
    if form != "grouped":
        return F.linear(expand(slots, idx, gate, experts).flatten(2), weight)
    gated = (slots * gate.to(slots.dtype).unsqueeze(-1)).flatten(0, 3)  # [pairs, D]
    order, sizes = _by_expert(idx, experts)
    matrices = weight.unflatten(1, (-1, slots.shape[-1]))  # [d, G N, D]
    made = _products(gated.index_select(0, order), [matrices[:, e].t() for e in range(len(sizes))], sizes)  # [pairs, d]
    return _unsorted(made, order).unflatten(0, (*idx.shape[:2], -1)).sum(2)


def _by_expert(idx: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """Pair indices sorted by expert (stable), and the number of pairs per expert [G N]; idx [B, S, G, k]."""
    groups = idx.shape[2]
    expert = (idx + experts * torch.arange(groups, device=idx.device)[:, None]).flatten()
    return expert.argsort(stable=True), torch.bincount(expert, minlength=groups * experts).tolist()


def _products(rows: Tensor, matrices: list[Tensor], sizes: list[int]) -> Tensor:
    """Each segment of the sorted rows times its expert's matrix. Experts without rows get a zero gradient."""
    return torch.cat([part @ matrix for part, matrix in zip(rows.split(sizes), matrices, strict=True)])


def _unsorted(made: Tensor, order: Tensor) -> Tensor:
    """Undo the sort: rows in the original order of the pairs. `order` is a permutation."""
    return torch.empty_like(made).index_copy(0, order, made)
