"""Routing operations: top-k selection of experts, gates, balancing sums, gather and scatter of slots.

An expert is a query head (routed GQA) or a value or output projection (SwitchHead). The pool holds the data of all N
experts of a group, the slots those of the k selected ones. On a GPU these functions run Triton kernels
(`headway.kernels.ops`), elsewhere their PyTorch twins (`headway.kernels.twins`).
Legend: B batch, S sequence, G groups, N experts per group, k selected experts (slots), D channels of one expert.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.device import fused
from headway.kernels.twins import balance_sums_twin, expand_twin, gates_twin, select_rope_twin, top_k_twin

GateName = Literal[
    "sigmoid2", "sigmoid", "softmax", "softmax_n", "detached_renorm", "straight_through", "renorm", "hard"
]


def router_logits(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """x [B, S, d], weight [G N, d] -> logits [B, S, G, N], in fp32 (float64 if x is).

    Logits are never rounded to bf16. Nearly equal ones would become ties, and two runs could select different experts
    for the same token. A product of two bf16 numbers is exact in fp32, so operands in bf16 lose nothing.
    """
    with torch.autocast(x.device.type, enabled=False):
        if x.dtype in (torch.bfloat16, torch.float16):
            logits = _WideProduct.apply(x, weight)
        else:
            logits = F.linear(x, weight.to(x.dtype))
    return logits.unflatten(-1, (groups, weight.shape[0] // groups))


def _on_tensor_cores(x: Tensor, weight: Tensor) -> bool:
    """Whether products of bf16 operands with a result in fp32 are available (`out_dtype` of `torch.mm`)."""
    return x.is_cuda and x.dtype == weight.dtype == torch.bfloat16


class _WideProduct(torch.autograd.Function):
    """x W^T in fp32 for x [..., d] in bf16 or fp16 and W [n, d]; keeps x as it is for the backward pass.

    A conversion before the matmul would keep 4 d bytes per token. On a GPU in bf16, products read bf16 and accumulate
    in fp32. There, the gradient of the logits is rounded to bf16 (relative error 2^-9), as in every other linear layer.
    Elsewhere the operands are converted for the time of the product. The gradients of x and W are accumulated in fp32
    and rounded once, to their dtypes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if _on_tensor_cores(x, weight):
            logits = torch.mm(x.flatten(0, -2), weight.t(), out_dtype=torch.float32)
            return logits.view(*x.shape[:-1], weight.shape[0])
        return F.linear(x.float(), weight.float())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x, weight), grad = ctx.saved_tensors, grad_outputs[0].flatten(0, -2)
        d_x = d_weight = None
        with torch.autocast(x.device.type, enabled=False):
            if _on_tensor_cores(x, weight):
                grad = grad.to(x.dtype)
                if ctx.needs_input_grad[0]:
                    d_x = (grad @ weight).view(x.shape)
                if ctx.needs_input_grad[1]:
                    d_weight = torch.mm(grad.t(), x.flatten(0, -2), out_dtype=torch.float32).to(weight.dtype)
            else:
                if ctx.needs_input_grad[0]:
                    d_x = (grad @ weight.float()).to(x.dtype).view(x.shape)
                if ctx.needs_input_grad[1]:
                    d_weight = (grad.t() @ x.flatten(0, -2).float()).to(weight.dtype)
        return d_x, d_weight


@torch.no_grad()
def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k largest `scores` [..., N], largest first. Ties go to the lower index.

    The k indices of a row always differ. NaN counts as infinity.

    The order of ties is undefined in `torch.topk`, while `argmax` is documented to return the first maximum. On CPU, k
    passes of argmax take a quarter of the time of a stable sort at N=4, k=2. On a GPU this is one kernel
    (`headway.kernels.triton.routing`).
    """
    if fused(scores):
        from headway.kernels import ops

        return ops.top_k(scores, k)
    return top_k_twin(scores, k)


def gates(logits: Tensor, idx: Tensor, gate: GateName) -> Tensor:
    """Gates [..., k], the factors on the outputs of the selected experts; logits r [..., N], idx [..., k].

    sigmoid2         2 sigmoid(r): depends on the expert's own logit only; 1 at r = 0
    sigmoid          sigmoid(r); 1/2 at r = 0
    softmax          p = softmax(r) over all N, not renormalized; gradient to all N logits
    softmax_n        N p; 1 at equal logits
    detached_renorm  p / stopgrad(sum of p over the selected experts): the value of renorm, gradient to all N logits
    straight_through 1 + (p - stopgrad(p)): value exactly 1, gradient of softmax
    renorm           softmax over the selected logits; constant 1 at k = 1, so there is no gradient
    hard             1, no gradient
    """
    if gate == "hard":
        return torch.ones_like(idx, dtype=logits.dtype)
    if fused(logits):
        from headway.kernels import ops

        return ops.gates(logits, idx, gate)
    return gates_twin(logits, idx, gate)


def balance_sums(logits: Tensor, idx: Tensor, *, sigmoid: bool) -> tuple[Tensor, Tensor]:
    """Per sequence, the number of tokens that selected each expert and the sum of its probabilities; both [B, G, N].

    logits [B, S, G, N], idx [B, S, G, k]. The probabilities of a token are the softmax of its logits over the group or,
    with `sigmoid`, their sigmoids divided by the sum. Counts have no gradient.
    """
    if fused(logits):
        from headway.kernels import ops

        counts, shares = ops.balance_sums(logits, idx, sigmoid).unbind()
        return counts.detach(), shares
    counts, shares = balance_sums_twin(logits, idx, sigmoid).unbind()
    return counts.detach(), shares


def select_rope(pool: Tensor, idx: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Select slots from the pool, then apply RoPE: pool [B, S, G, N, D], idx [B, S, G, k] -> [B, S, G, k, D].

    RoPE after the selection rotates fewer vectors with the same result, because the angle depends on the token only. On
    a GPU this is one pass over memory.
    """
    if fused(pool):
        from headway.kernels import ops

        return ops.select_rope(pool, idx, *rope)
    return select_rope_twin(pool, idx, rope)


def expand(slots: Tensor, idx: Tensor, gate: Tensor, experts: int) -> Tensor:
    """Scatter gated slots to the pool: slots [B, S, G, k, D] times gate [B, S, G, k] -> [B, S, G, N, D], else 0."""
    if fused(slots):
        from headway.kernels import ops

        return ops.expand(slots, idx, gate, experts)
    return expand_twin(slots, idx, gate, experts)
