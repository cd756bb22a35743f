"""Routed projections as custom operators, which compute matmuls for the selected (token, expert) pairs only.

Routed are the matmuls with one row per slot: the projection, its weight gradient, and the gradient of the slots. They
read, for each expert, the list of its pairs. Matmuls that sum over slots into a row of width d (the gradient of x, the
output projection) are dense, because a routed one would write 4 d bytes of partial sums per slot. On a GPU the routed
matmuls are Triton kernels; elsewhere PyTorch computes the same function.

Legend: T tokens, S sequence, d width, G groups, N experts per group, k slots, D channels of one expert, R rotated
channels, P = T G k pairs.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.device import fused
from headway.kernels.launch import LARGEST_HEAD, schedule_sizes
from headway.kernels.rope import apply_rope
from headway.kernels.routing import expand
from headway.kernels.twins import schedule_twin, select


class Forms(NamedTuple):
    """Which matmuls are routed; the others are dense."""

    gather: bool  # the projection, and the gradient of the slots
    weight_grad: bool  # the gradient of the weight


ROUTED, DENSE = Forms(gather=True, weight_grad=True), Forms(gather=False, weight_grad=False)


class PairLists(NamedTuple):
    """The selected experts and their (token, expert) pairs sorted by expert. Built once per layer for all matmuls."""

    idx: Tensor  # [T, G, k], int64, selected experts
    order: Tensor  # [P], int32, indices into the flattened idx, sorted by expert
    offsets: Tensor  # [G N + 1], int32, start of each expert's pairs in `order`
    schedule: Tensor  # int32, which part of which list each program of a kernel reads: tiles, then chunks


def pair_lists(idx: Tensor, experts: int) -> PairLists:
    """Build the pair lists of idx [T, G, k], whose experts are distinct within a group."""
    return PairLists(idx, *make_lists(idx, experts))


def routed_project(
    x: Tensor, w: Tensor, lists: PairLists, rope: tuple[Tensor, Tensor] | None = None, forms: Forms = ROUTED
) -> Tensor:
    """Projection by the selected experts, then RoPE if `rope` is given: x [T, d], w [G N D, d] -> [T, G, k, D].

    rope (cos, sin): each [S, R], as returned by `rope_tables`; T is a multiple of S. Raises ValueError if the dtypes of
    x and w differ, and on a GPU if D is above 128 and the matmul is routed.
    """
    _check(x, w, w.shape[0] // (lists.offsets.shape[0] - 1), forms)
    cos, sin = rope if rope is not None else (x.new_zeros(1, 0, dtype=torch.float32),) * 2
    return project(x, w, cos, sin, *lists, *forms)


def routed_combine(slots: Tensor, w: Tensor, lists: PairLists, gate: Tensor, forms: Forms = ROUTED) -> Tensor:
    """Gated sum of the selected experts' output projections: slots [T, G, k, D], w [d, G N D] -> [T, d].

    Raises ValueError under the conditions of `routed_project`, because the gradient of the slots is such a projection.
    """
    _check(slots, w, slots.shape[-1], forms)
    return combine(slots, w, gate, *lists, *forms)


def _check(a: Tensor, w: Tensor, head_dim: int, forms: Forms) -> None:
    if a.dtype != w.dtype:
        raise ValueError(
            f"routed projections need equal dtypes: activations are {a.dtype}, the weight is {w.dtype}; cast one of "
            "them, or use projections dense"
        )
    if forms.gather and head_dim > LARGEST_HEAD and fused(a):
        raise ValueError(
            f"routed projections support at most {LARGEST_HEAD} channels per expert, not {head_dim}; use projections "
            f"auto, or head_dim {LARGEST_HEAD}"
        )


@torch.library.custom_op("headway::pair_lists", mutates_args=())
def make_lists(idx: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`order`, `offsets` and `schedule` of `PairLists`."""
    if fused(idx.new_empty(0, dtype=torch.float32)):
        from headway.kernels.triton import lists as triton_lists

        return triton_lists.pair_lists(idx, experts)
    groups = idx.shape[1]
    expert = (idx + experts * torch.arange(groups, device=idx.device)[:, None]).flatten()
    sizes = expert.new_zeros(groups * experts).index_add_(0, expert, torch.ones_like(expert))
    offsets = F.pad(sizes.cumsum(0), (1, 0)).int()
    return expert.argsort(stable=True).int(), offsets, schedule_twin(offsets, idx.shape[0], idx.numel())


@make_lists.register_fake
def _(idx: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    lists = idx.shape[1] * experts
    sizes = schedule_sizes(idx.numel(), lists)
    order, offsets, schedule = idx.numel(), lists + 1, sizes.tiles + sizes.items
    return (
        idx.new_empty(order, dtype=torch.int32),
        idx.new_empty(offsets, dtype=torch.int32),
        idx.new_empty(schedule, dtype=torch.int32),
    )


def _turned(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to q [T, G, k, D]. The position of token t is t modulo S."""
    if not cos.shape[1]:
        return q
    return apply_rope(q.flatten(1, 2).unflatten(0, (-1, cos.shape[0])), (cos, sin)).view(q.shape)


# ---------------------------------------------------------------- projection: x -> one row per slot


@torch.library.custom_op("headway::routed_project", mutates_args=())
def project(
    x: Tensor, w: Tensor, cos: Tensor, sin: Tensor, idx: Tensor, order: Tensor, offsets: Tensor, schedule: Tensor,
    gather: bool, weight_grad: bool,
) -> Tensor:  # fmt: skip
    """Operator of `routed_project`, with flattened `lists` and `forms`."""
    experts = offsets.numel() - 1
    if gather and fused(x):
        from headway.kernels.triton import gather as triton_gather

        out = x.new_empty(*idx.shape, w.shape[0] // experts)
        triton_gather.gather_project(x, w, (order, offsets, schedule), (cos, sin), out)
        return out
    pool = F.linear(x, w).view(1, *idx.shape[:2], experts // idx.shape[1], w.shape[0] // experts)
    return _turned(select(pool, idx[None])[0], cos, sin).contiguous()


@project.register_fake
def _(
    x: Tensor, w: Tensor, cos: Tensor, sin: Tensor, idx: Tensor, order: Tensor, offsets: Tensor, schedule: Tensor,
    gather: bool, weight_grad: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(*idx.shape, w.shape[0] // (offsets.shape[0] - 1))


@torch.library.custom_op("headway::routed_weight_grad", mutates_args=())
def make_weight_grad(
    a: Tensor,
    b: Tensor,
    gate: Tensor | None,
    idx: Tensor,
    order: Tensor,
    offsets: Tensor,
    schedule: Tensor,
    rows: bool,
    routed: bool,
) -> Tensor:
    """Gradient of a weight [G N D, d] (if `rows`) or [d, G N D]: per expert a^T (gate b); fp32, or float64 if a is.

    Dense matmuls accumulate in fp32 and are rounded to a's dtype, as in any linear layer.
    """
    experts, d, channels = offsets.numel() - 1, a.shape[1], b.shape[3]
    wide = torch.promote_types(a.dtype, torch.float32)
    if routed and fused(a):
        from headway.kernels.triton import weight_grad as triton_weight_grad

        out = a.new_empty((experts * channels, d) if rows else (d, experts * channels), dtype=torch.float32)
        triton_weight_grad.weight_grad(a, b, gate, (order, offsets, schedule), rows, out)
        return out
    if routed and not a.is_cuda:  # on a GPU the twin is a baseline of measurements, and must not synchronize
        out = a.new_empty((experts * channels, d) if rows else (d, experts * channels), dtype=wide)
        _weight_grad_of_lists(a, b, gate, order, offsets, out if rows else out.t())
        return out
    factor = torch.ones_like(idx, dtype=b.dtype) if gate is None else gate
    pool = expand(b[None], idx[None], factor[None], experts // idx.shape[1])[0].flatten(1)  # [T, G N D]
    return (pool.t() @ a if rows else a.t() @ pool).to(wide)


def _weight_grad_of_lists(
    a: Tensor, b: Tensor, gate: Tensor | None, order: Tensor, offsets: Tensor, out: Tensor
) -> None:
    """Twin of the kernel: one matmul per expert, over its list, into out [G N D, d].

    As in the kernel, a token adds nothing to experts that it did not select, even if its row holds NaN. In the dense
    form, 0 times NaN is NaN.
    """
    slots = b.shape[1] * b.shape[2]
    starts = offsets.tolist()
    for part, (start, end) in zip(out.chunk(len(starts) - 1), itertools.pairwise(starts), strict=True):
        pairs = order[start:end]
        own = b.flatten(0, 2).index_select(0, pairs)
        if gate is not None:
            own = own * gate.flatten().index_select(0, pairs).to(own.dtype)[:, None]
        part.copy_(own.t() @ a.index_select(0, pairs // slots))


@make_weight_grad.register_fake
def _(
    a: Tensor,
    b: Tensor,
    gate: Tensor | None,
    idx: Tensor,
    order: Tensor,
    offsets: Tensor,
    schedule: Tensor,
    rows: bool,
    routed: bool,
) -> Tensor:
    columns = (offsets.shape[0] - 1) * b.shape[3]
    shape = (columns, a.shape[1]) if rows else (a.shape[1], columns)
    return a.new_empty(shape, dtype=torch.promote_types(a.dtype, torch.float32))


def _project_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.weight_grad = inputs[9]


def _project_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    x, w, cos, sin, *lists = ctx.saved_tensors
    idx, _, offsets, _ = lists
    d_slots = _turned(d_out.contiguous(), cos, -sin).contiguous()  # inverse rotation
    d_x = d_w = None
    if ctx.needs_input_grad[0]:
        ones = torch.ones_like(idx, dtype=d_slots.dtype)
        pool = expand(d_slots[None], idx[None], ones[None], (offsets.shape[0] - 1) // idx.shape[1])
        d_x = pool[0].flatten(1) @ w
    if ctx.needs_input_grad[1]:
        d_w = make_weight_grad(x, d_slots, None, *lists, True, ctx.weight_grad).to(w.dtype)
    return d_x, d_w, *([None] * 8)


project.register_autograd(_project_backward, setup_context=_project_context)


# ---------------------------------------------------------------- output projection: slots -> one row per token


@torch.library.custom_op("headway::routed_combine", mutates_args=())
def combine(
    slots: Tensor, w: Tensor, gate: Tensor, idx: Tensor, order: Tensor, offsets: Tensor, schedule: Tensor,
    gather: bool, weight_grad: bool,
) -> Tensor:  # fmt: skip
    """Operator of `routed_combine`, with flattened `lists` and `forms`."""
    experts = (offsets.numel() - 1) // idx.shape[1]
    return F.linear(expand(slots[None], idx[None], gate[None], experts)[0].flatten(1), w)


@combine.register_fake
def _(
    slots: Tensor, w: Tensor, gate: Tensor, idx: Tensor, order: Tensor, offsets: Tensor, schedule: Tensor,
    gather: bool, weight_grad: bool,
) -> Tensor:  # fmt: skip
    return slots.new_empty(slots.shape[0], w.shape[0])


@torch.library.custom_op("headway::routed_slot_grad", mutates_args=())
def make_slot_grad(
    dy: Tensor,
    w: Tensor,
    slots: Tensor,
    gate: Tensor,
    idx: Tensor,
    order: Tensor,
    offsets: Tensor,
    schedule: Tensor,
    routed: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of slots, gate (dy W) [T, G, k, D], and of gate, <dy W, slots> [T, G, k] in fp32 (float64 if dy is)."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    if routed and fused(dy):
        from headway.kernels.triton import gather as triton_gather

        out, d_gate = slots.new_empty(slots.shape), gate.new_empty(gate.shape, dtype=torch.float32)
        triton_gather.gather_slot_grad(dy, w, slots, gate, (order, offsets, schedule), out, d_gate)
        return out, d_gate
    experts = (offsets.numel() - 1) // idx.shape[1]
    pool = (dy @ w).view(1, *idx.shape[:2], experts, slots.shape[3])
    made = select(pool, idx[None])[0].to(wide)  # [T, G, k, D]
    return (made * gate.unsqueeze(-1)).to(slots.dtype), (made * slots).sum(-1)


@make_slot_grad.register_fake
def _(
    dy: Tensor,
    w: Tensor,
    slots: Tensor,
    gate: Tensor,
    idx: Tensor,
    order: Tensor,
    offsets: Tensor,
    schedule: Tensor,
    routed: bool,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(dy.dtype, torch.float32)
    return slots.new_empty(slots.shape), gate.new_empty(gate.shape, dtype=wide)


def _combine_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.forms = inputs[7:]


def _combine_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    slots, w, gate, *lists = ctx.saved_tensors
    gather, weight_grad = ctx.forms
    dy = dy.contiguous()
    d_slots = d_w = d_gate = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
        d_slots, d_gate = make_slot_grad(dy, w, slots, gate, *lists, gather)
        d_gate = d_gate.to(gate.dtype)
    if ctx.needs_input_grad[1]:
        d_w = make_weight_grad(dy, slots, gate, *lists, False, weight_grad).to(w.dtype)
    return d_slots, d_w, d_gate, *([None] * 6)


combine.register_autograd(_combine_backward, setup_context=_combine_context)
