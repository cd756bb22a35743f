"""Routing operations as custom operators: Triton kernels on a GPU, registered with PyTorch.

Autograd, torch.compile and CUDA graphs see each one as a single operator with known shapes, which does not synchronize
with the host. The CPU implementation of each operator is its PyTorch twin. It only serves to test the registration
(shapes, gradients) without a GPU, because `headway.kernels.routing` calls the twins directly on a CPU.

Legend: B batch, S sequence, G groups, N experts or heads per group, k selected ones, D channels, r rotated channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.kernels import twins
from headway.kernels.rope import apply_rope


def _flat(tensor: Tensor) -> Tensor:
    """[B, S, G, n] -> [B S G, n], contiguous."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def _slots(slots: Tensor) -> Tensor:
    """[B, S, G, k, D] -> [B S G, k, D], without a copy if the channels are contiguous."""
    flat = slots.flatten(0, 2)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


# ---------------------------------------------------------------- top-k


@torch.library.custom_op("headway::top_k", mutates_args=(), device_types="cuda")
def top_k(scores: Tensor, k: int) -> Tensor:
    """`routing.top_k`; no gradient."""
    from headway.kernels.triton.routing import launch_top_k

    idx = scores.new_empty((*scores.shape[:-1], k), dtype=torch.int64)
    launch_top_k(_flat(scores), idx.view(-1, k))
    return idx


@top_k.register_kernel("cpu")
def _(scores: Tensor, k: int) -> Tensor:
    return twins.top_k_twin(scores, k)


@top_k.register_fake
def _(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], k), dtype=torch.int64)


# ---------------------------------------------------------------- gates


@torch.library.custom_op("headway::gates", mutates_args=(), device_types="cuda")
def gates(logits: Tensor, idx: Tensor, gate: str) -> Tensor:
    """`routing.gates`."""
    from headway.kernels.triton.routing import launch_gates

    out = torch.empty_like(idx, dtype=logits.dtype)
    launch_gates(_flat(logits), _flat(idx), gate, out.view(-1, idx.shape[-1]))
    return out


@gates.register_kernel("cpu")
def _(logits: Tensor, idx: Tensor, gate: str) -> Tensor:
    return twins.gates_twin(logits, idx, gate).contiguous()


@gates.register_fake
def _(logits: Tensor, idx: Tensor, gate: str) -> Tensor:
    return torch.empty_like(idx, dtype=logits.dtype)


@torch.library.custom_op("headway::gates_backward", mutates_args=(), device_types="cuda")
def gates_backward(grad: Tensor, logits: Tensor, idx: Tensor, gate: str) -> Tensor:
    """Gradient with respect to the logits."""
    from headway.kernels.triton.routing import launch_gates_backward

    out = torch.empty_like(logits)
    launch_gates_backward(_flat(logits), _flat(idx), gate, _flat(grad), out.view(-1, logits.shape[-1]))
    return out


@gates_backward.register_kernel("cpu")
def _(grad: Tensor, logits: Tensor, idx: Tensor, gate: str) -> Tensor:
    given = torch.zeros_like(logits).scatter_(-1, idx, grad)  # gradients of the gates, scattered to their experts
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, idx, True)
    if gate in ("sigmoid", "sigmoid2"):
        s = torch.sigmoid(logits)
        return torch.where(chosen, given * s * (1 - s) * (2 if gate == "sigmoid2" else 1), 0)
    p = torch.softmax(logits.masked_fill(~chosen, float("-inf")) if gate == "renorm" else logits, -1)
    found = p * (given - (given * p).sum(-1, keepdim=True))
    if gate == "renorm":
        return torch.where(chosen, found, 0)  # NaN stays with the chosen
    if gate == "softmax_n":
        return found * logits.shape[-1]
    return found / (p * chosen).sum(-1, keepdim=True) if gate == "detached_renorm" else found


@gates_backward.register_fake
def _(grad: Tensor, logits: Tensor, idx: Tensor, gate: str) -> Tensor:
    return torch.empty_like(logits)


def _save_gates(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    logits, idx, ctx.gate = inputs
    ctx.save_for_backward(logits, idx)


def _differentiate_gates(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return gates_backward(grad, *ctx.saved_tensors, ctx.gate), None, None


gates.register_autograd(_differentiate_gates, setup_context=_save_gates)


# ---------------------------------------------------------------- sums for load balancing


@torch.library.custom_op("headway::balance_sums", mutates_args=(), device_types="cuda")
def balance_sums(logits: Tensor, idx: Tensor, sigmoid: bool) -> Tensor:
    """`routing.balance_sums`, stacked: [2, B, G, N]."""
    from headway.kernels.triton.balance import launch_sums

    out = logits.new_empty((2, logits.shape[0], *logits.shape[2:]))
    launch_sums(logits.contiguous(), idx.contiguous(), sigmoid, out)
    return out


@balance_sums.register_kernel("cpu")
def _(logits: Tensor, idx: Tensor, sigmoid: bool) -> Tensor:
    return twins.balance_sums_twin(logits, idx, sigmoid)


@balance_sums.register_fake
def _(logits: Tensor, idx: Tensor, sigmoid: bool) -> Tensor:
    return logits.new_empty((2, logits.shape[0], *logits.shape[2:]))


@torch.library.custom_op("headway::balance_sums_backward", mutates_args=(), device_types="cuda")
def balance_sums_backward(grad: Tensor, logits: Tensor, sigmoid: bool) -> Tensor:
    """Gradient of the sums of probabilities [B, G, N] -> gradient of the logits [B, S, G, N]."""
    from headway.kernels.triton.balance import launch_sums_backward

    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    launch_sums_backward(logits.contiguous(), grad.contiguous(), sigmoid, out)
    return out


@balance_sums_backward.register_kernel("cpu")
def _(grad: Tensor, logits: Tensor, sigmoid: bool) -> Tensor:
    s, g = torch.sigmoid(logits), grad.unsqueeze(1)
    p = s / s.sum(-1, keepdim=True) if sigmoid else torch.softmax(logits, -1)
    found = p * (g - (p * g).sum(-1, keepdim=True))
    return (found * (1 - s) if sigmoid else found).contiguous()


@balance_sums_backward.register_fake
def _(grad: Tensor, logits: Tensor, sigmoid: bool) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_balance_sums(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    logits, _, ctx.sigmoid = inputs
    ctx.save_for_backward(logits)


def _differentiate_balance_sums(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return balance_sums_backward(grad[1], *ctx.saved_tensors, ctx.sigmoid), None, None


balance_sums.register_autograd(_differentiate_balance_sums, setup_context=_save_balance_sums)


# ---------------------------------------------------------------- pool -> slots, rotated


@torch.library.custom_op("headway::select_rope", mutates_args=(), device_types="cuda")
def select_rope(pool: Tensor, idx: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """pool [B, S, G, N, D], idx [B, S, G, k], cos and sin [S, r] -> [B, S, G, k, D]."""
    from headway.kernels.triton.slots import launch_select_rope, select_rope_forward

    out = pool.new_empty((*idx.shape, pool.shape[-1]))
    arguments = (pool.contiguous(), idx.contiguous(), cos.contiguous(), sin.contiguous())
    launch_select_rope(select_rope_forward, *arguments, pool.shape[-2], out)
    return out


@select_rope.register_kernel("cpu")
def _(pool: Tensor, idx: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return twins.select_rope_twin(pool, idx, (cos, sin)).contiguous()


@select_rope.register_fake
def _(pool: Tensor, idx: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return pool.new_empty((*idx.shape, pool.shape[-1]))


@torch.library.custom_op("headway::select_rope_backward", mutates_args=(), device_types="cuda")
def select_rope_backward(grad: Tensor, idx: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """grad [B, S, G, k, D] -> gradient of the pool [B, S, G, N, D]."""
    from headway.kernels.triton import slots as triton_slots

    out = grad.new_empty((*idx.shape[:-1], heads, grad.shape[-1]))
    arguments = (grad.contiguous(), idx.contiguous(), cos.contiguous(), sin.contiguous())
    triton_slots.launch_select_rope(triton_slots.select_rope_backward, *arguments, heads, out)
    return out


@select_rope_backward.register_kernel("cpu")
def _(grad: Tensor, idx: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    turned = apply_rope(grad.flatten(2, 3), (cos, -sin)).view_as(grad)
    return twins.expand_twin(turned, idx, torch.ones_like(idx, dtype=grad.dtype), heads).contiguous()


@select_rope_backward.register_fake
def _(grad: Tensor, idx: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    return grad.new_empty((*idx.shape[:-1], heads, grad.shape[-1]))


def _save_select(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
    pool, *rest = inputs
    ctx.heads = pool.shape[-2]
    ctx.save_for_backward(*rest)


def _differentiate_select(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return select_rope_backward(grad, *ctx.saved_tensors, ctx.heads), None, None, None


select_rope.register_autograd(_differentiate_select, setup_context=_save_select)


# ---------------------------------------------------------------- slots -> pool, gated


@torch.library.custom_op("headway::expand", mutates_args=(), device_types="cuda")
def expand(slots: Tensor, idx: Tensor, gate: Tensor, experts: int) -> Tensor:
    """`routing.expand`."""
    from headway.kernels.triton.slots import launch_expand

    out = slots.new_empty((*idx.shape[:-1], experts, slots.shape[-1]))
    launch_expand(_slots(slots), _flat(idx), _flat(gate), experts, out)
    return out


@expand.register_kernel("cpu")
def _(slots: Tensor, idx: Tensor, gate: Tensor, experts: int) -> Tensor:
    return twins.expand_twin(slots, idx, gate, experts).contiguous()


@expand.register_fake
def _(slots: Tensor, idx: Tensor, gate: Tensor, experts: int) -> Tensor:
    return slots.new_empty((*idx.shape[:-1], experts, slots.shape[-1]))


@torch.library.custom_op("headway::expand_backward", mutates_args=(), device_types="cuda")
def expand_backward(grad: Tensor, slots: Tensor, idx: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """grad [B, S, G, N, D] -> gradients of slots [B, S, G, k, D] and of gate [B, S, G, k], in their dtypes."""
    from headway.kernels.triton.slots import launch_expand_backward

    grad_slots, grad_gate = slots.new_empty(slots.shape), torch.empty_like(gate, memory_format=torch.contiguous_format)
    arguments = (grad.contiguous(), _slots(slots), _flat(idx), _flat(gate))
    launch_expand_backward(*arguments, grad.shape[-2], grad_slots, grad_gate)
    return grad_slots, grad_gate


@expand_backward.register_kernel("cpu")
def _(grad: Tensor, slots: Tensor, idx: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    picked = twins.select(grad, idx)
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad_gate = (picked.to(wide) * slots.to(wide)).sum(-1).to(gate.dtype)
    return (picked * gate.to(slots.dtype).unsqueeze(-1)).contiguous(), grad_gate.contiguous()


@expand_backward.register_fake
def _(grad: Tensor, slots: Tensor, idx: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return slots.new_empty(slots.shape), torch.empty_like(gate, memory_format=torch.contiguous_format)


def _save_expand(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _differentiate_expand(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
    grad_slots, grad_gate = expand_backward(grad, *ctx.saved_tensors)
    return grad_slots, None, grad_gate, None


expand.register_autograd(_differentiate_expand, setup_context=_save_expand)
