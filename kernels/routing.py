"""Choosing k of N experts per token and group, and moving data between the pool and the chosen slots.

An expert is a query head (routed GQA) or a value or output projection (SwitchHead).
Legend: B batch, S sequence, G groups, N experts per group, k chosen ones (slots), D channels of one expert.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.device import fused
from headway.kernels.twins import balance_sums_twin, expand_twin, gates_twin, select_rope_twin, top_k_twin

GateName = Literal[
    "sigmoid2", "sigmoid", "softmax", "softmax_n", "detached_renorm", "straight_through", "renorm", "hard"
]


def router_logits(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """x [B, S, d], weight [G N, d] -> logits [B, S, G, N], in fp32 (float64 where x is).

    Weights and activations are widened before the product: in bf16 nearly equal logits collapse into ties, and two runs
    of one token could choose differently.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        logits = F.linear(x.to(wide), weight.to(wide))
    return logits.unflatten(-1, (groups, -1))


@torch.no_grad()
def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k largest of `scores` [..., N], largest first; of equal scores the lower index wins.

    `torch.topk` leaves ties to chance; `argmax` is documented to return the first maximum. k passes of it take a
    quarter of a stable sort's time at N=4, k=2 on CPU. On a GPU one kernel of ours (`headway.kernels.triton.routing`).
    """
    if fused(scores):
        from headway.kernels import ops

        return ops.top_k(scores, k)
    return top_k_twin(scores, k)


def gates(logits: Tensor, idx: Tensor, gate: GateName) -> Tensor:
    """Factors [..., k] on the outputs of the chosen experts; logits [..., N], idx [..., k].

    sigmoid2         2 sigmoid(r): own logit only; 1 at r = 0
    sigmoid          sigmoid(r); 1/2 at r = 0
    softmax          p = softmax(r) over all N, not renormalised: gradient reaches all N logits
    softmax_n        N p; 1 at equal logits
    detached_renorm  p / stopgrad(sum of the chosen p): value of renorm, gradient to all N logits
    straight_through 1 + (p - stopgrad(p)): value exactly 1, gradient of softmax
    renorm           softmax over the chosen logits; constant 1 at k = 1, so no gradient there
    hard             1: no gradient
    """
    if gate == "hard":
        return torch.ones_like(idx, dtype=logits.dtype)
    if fused(logits):
        from headway.kernels import ops

        return ops.gates(logits, idx, gate)
    return gates_twin(logits, idx, gate)


def balance_sums(logits: Tensor, idx: Tensor, *, sigmoid: bool) -> tuple[Tensor, Tensor]:
    """Over each sequence: how often each expert is chosen, and the sum of its shares; both [B, G, N].

    logits [B, S, G, N], idx [B, S, G, k]. Shares of a token sum to 1 over the experts of a group: the softmax of its
    logits, or with `sigmoid` their sigmoids over the sum of them. Counts have no gradient.
    """
    if fused(logits):
        from headway.kernels import ops

        counts, shares = ops.balance_sums(logits, idx, sigmoid).unbind()
        return counts.detach(), shares
    counts, shares = balance_sums_twin(logits, idx, sigmoid).unbind()
    return counts.detach(), shares


def select_rope(pool: Tensor, idx: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """The chosen slices of `select`, turned by their token's position; [B, S, G, k, D].

    After the gather: fewer rotations than before it, and the same ones, as the angle is the token's. On a GPU one pass.
    """
    if fused(pool):
        from headway.kernels import ops

        return ops.select_rope(pool, idx, *rope)
    return select_rope_twin(pool, idx, rope)


def expand(slots: Tensor, idx: Tensor, gate: Tensor, experts: int) -> Tensor:
    """Inverse of `select`, gated: slots [B, S, G, k, D] times gate [B, S, G, k] -> [B, S, G, N, D], zero elsewhere."""
    if fused(slots):
        from headway.kernels import ops

        return ops.expand(slots, idx, gate, experts)
    return expand_twin(slots, idx, gate, experts)
