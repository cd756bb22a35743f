"""Projections into and out of chosen experts: all of them densely, or each for the tokens that chose it alone.

All forms are the same function. Dense makes one large product and moves rows afterwards; grouped sorts the chosen
(token, expert) pairs by expert and makes one product per expert, so that only what was chosen is multiplied, and reads
the number of pairs per expert on the host. Routed does the same on a GPU in one kernel per product, without the host
(`headway.kernels.routed`); auto takes it where it is expected to be faster, and dense elsewhere.

Legend: B batch, S sequence, T = B S tokens, d width, G groups, N experts per group, k chosen ones (slots), D channels.
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
    """One choice of experts as the routed operators read it: lists of pairs, and which products are routed."""

    lists: PairLists
    forms: Forms


def routed_forms(form: Projections, x: Tensor, *, groups: int, experts: int, k: int, head_dim: int) -> Forms | None:
    """Which products of x [B, S, d] with k of N `experts` are routed; None: none is, and all are made densely.

    A function of shapes, x's dtype and the GPU's architecture, so all ranks agree. Where kernels do not run, auto is
    dense; so it is in fp32, which the model of costs does not know: routed products have no tensor cores for it.
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
    """`routed_forms` for the choice idx [B, S, G, k], with its lists; None: products are dense, or grouped."""
    forms = routed_forms(form, x, groups=idx.shape[2], experts=experts, k=idx.shape[3], head_dim=head_dim)
    return None if forms is None else Routed(pair_lists(idx.flatten(0, 1), experts), forms)


def project_routed(x: Tensor, weight: Tensor, routed: Routed, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """`project` by the routed operators, turned by `rope` (cos and sin [S, R]) where given."""
    made = routed_project(x.flatten(0, 1), weight, routed.lists, rope, routed.forms)
    return made.unflatten(0, x.shape[:2])


def project(
    x: Tensor, weight: Tensor, idx: Tensor, experts: int, form: Projections, routed: Routed | None = None
) -> Tensor:
    """x [B, S, d], weight [G N D, d], idx [B, S, G, k] -> what each token's experts make of it [B, S, G, k, D].

    `routed` of that idx, where it was found for another product too.
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
    """Gated sum of what chosen experts make of their slots: slots [B, S, G, k, D], weight [d, G N D] -> [B, S, d].

    idx, gate [B, S, G, k]; `routed` as in `project`. Gathering each pair's [D, d] slice instead would move d D numbers
    per slot.
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
