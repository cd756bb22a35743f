"""Routed grouped-query attention (R-GQA): each token uses k of the M query heads of every KV group.

A reconstruction. Only the authors' announcement could be read, not their paper or code: it says that a learned router
picks the most relevant query heads of a group and attention is computed for those alone. Router, gate, balancing and
per-head output slices are choices, and the ones that matter are fields of the config (docs/mechanisms.md).

Legend: B batch, S sequence, d width, H query heads in the pool, G groups (= KV heads), M=H/G heads per group,
N=M-always_on routed heads per group, k=top_k, D head size. Per token t, in group g:

    r = W_R x                      [G, N]     router logits, fp32
    K = top-k of r (+ bias)        [G, k]     ties to the lower index, no gradient
    o_m = softmax(q_m K_g^T / sqrt(D)) V_g    for m in K and the always-on heads only
    y = sum over g, m of gate(r_m) W_O[g, m] o_m

Softmax rows do not depend on each other, so slot j may hold another head at every position, and the core is ordinary
GQA with always_on + k query heads per group: mask, KV cache and kernels stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from headway.kernels.attention import core
from headway.kernels.routing import GateName, expand, gates, router_logits, select, top_k
from headway.model.attention.gqa import GroupedConfig, GroupedQueryAttention, check_groups
from headway.model.base import Attention, AttentionOutput, Flops, RouterStats, Shard
from headway.model.layers import parameter
from headway.model.router import RouterMeter, balance_loss, chosen_mask

ROUTER = "query"


class RgqaConfig(GroupedConfig):
    """Routed GQA: every token picks `top_k` of the query heads of each group.

    balance f_p: auxiliary loss, see `headway.model.router.balance_loss` for the two scopes. loss_free: a bias per head,
    raised where load is below its group's mean and lowered above, used for selection only (Wang et al., 2024,
    arXiv 2408.15664); it is added to sigmoid(r) as published, whatever the gate. none: nothing keeps heads in use.
    """

    type: Literal["rgqa"] = "rgqa"
    kv_heads: int = Field(
        ge=1, description="G, KV heads (= groups); each has heads/kv_heads query heads to choose from"
    )
    top_k: int = Field(ge=1, description="query heads a token picks in each group")
    gate: GateName = Field(default="sigmoid2", description="factor on the output of a picked head")
    always_on: int = Field(default=0, ge=0, description="heads per group outside the routing, always used, ungated")
    balance: Literal["f_p", "loss_free", "none"] = Field(default="f_p", description="what keeps heads in use")
    balance_coef: float = Field(default=0.01, ge=0, description="coefficient of the f_p loss")
    balance_scope: Literal["sequence", "micro_batch"] = Field(
        default="sequence", description="tokens over which f and P are taken; sequence: independent of micro-batches"
    )
    bias_rate: float = Field(default=1e-3, gt=0, description="loss_free: change of a head's bias per step")
    router_init_std: float = Field(default=0.02, gt=0)

    @model_validator(mode="after")
    def _routing_is_possible(self) -> Self:
        check_groups(self.heads, self.kv_heads)
        if self.routed < 1:
            raise ValueError(
                f"always_on: {self.always_on} of the {self.heads_per_group} query heads of a group leave none to "
                f"route; use always_on {self.heads_per_group - 1}, or heads {self.kv_heads * (self.always_on + 1)}"
            )
        if self.top_k > self.routed:
            legal = "1" if self.routed == 1 else f"1 to {self.routed}"
            raise ValueError(
                f"top_k: {self.top_k} heads picked of {self.routed} routed ones per group "
                f"(heads {self.heads} / kv_heads {self.kv_heads} - always_on {self.always_on}); "
                f"use top_k {legal}, or heads {self.kv_heads * (self.top_k + self.always_on)}"
            )
        if self.gate == "renorm" and self.top_k == 1:
            raise ValueError(
                "gate: renorm at top_k 1 is the constant 1, so the router would get no gradient from the task; "
                "use gate sigmoid2 or detached_renorm, or top_k 2"
            )
        return self

    @property
    def groups(self) -> int:
        return self.kv_heads

    @property
    def routed(self) -> int:
        """N, query heads per group among which the router picks."""
        return self.heads_per_group - self.always_on

    @property
    def slots(self) -> int:
        """Query heads computed per group and token."""
        return self.always_on + self.top_k

    @property
    def score_maps(self) -> int:
        return self.groups * self.slots

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return RoutedGroupedQueryAttention(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    def num_params(self, *, width: int) -> int:
        """GQA's and the router: 2dHD + 2dGD + dGN."""
        return super().num_params(width=width) + width * self.groups * self.routed

    def flops_per_token(self, *, width: int, seq_len: int) -> Flops:
        """Useful: 4d(G slots)D + 4dGD + 2dGN and the core; executed: Q and W_O for all H heads instead of the slots."""
        kv_and_router = 4 * width * self.groups * self.head_dim + 2 * width * self.groups * self.routed
        rest = kv_and_router + self.core_flops_per_token(seq_len=seq_len)
        per_head = 4 * width * self.head_dim
        return Flops(useful=rest + per_head * self.groups * self.slots, executed=rest + per_head * self.heads)

    def shards(self) -> dict[str, Shard]:
        """Whole groups with their router rows: routing needs no communication."""
        return {**super().shards(), "w_r": Shard(0, self.groups)}


class Routing(NamedTuple):
    """One layer's decision for a batch; heads are numbered within their group, always-on ones first."""

    idx: Tensor  # [B, S, G, slots] int64
    gate: Tensor  # [B, S, G, slots], fp32 or wider
    aux_loss: Tensor | None  # scalar, with its coefficient


class RoutedGroupedQueryAttention(GroupedQueryAttention):
    """GQA's parameters under GQA's names, and a router `w_r` [G N, d]."""

    router_bias: Tensor

    def __init__(self, config: RgqaConfig, *, width: int, layers: int, init_std: float, norm_eps: float) -> None:
        super().__init__(config, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)
        self.config = config
        self.w_r = parameter(config.groups * config.routed, width)
        self.init_stds["w_r"] = config.router_init_std
        self._meter = RouterMeter(config.top_k)
        if config.balance == "loss_free":
            self.register_buffer("router_bias", torch.zeros(config.groups, config.routed, dtype=torch.float32))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> AttentionOutput:
        heads_per_group = self.config.heads_per_group
        idx, gate, aux_loss = self.route(x)
        pool = self.heads_of(x, self.w_q).unflatten(2, (-1, heads_per_group))  # [B, S, G, M, D]
        q = select(pool, idx).flatten(2, 3)  # [B, S, G slots, D], group-major as the core expects
        q = self.q_rope(q, rope)  # after the gather: fewer rotations, and the same, since the angle is the token's
        k = self.k_rope(self.heads_of(x, self.w_k), rope)  # [B, S, G, D]
        v = self.heads_of(x, self.w_v)  # [B, S, G, D]
        o = core(q, k, v, mask).unflatten(2, idx.shape[2:])  # [B, S, G, slots, D]
        # Zeros and one dense W_O. Gathering W_O slices per token instead would move d D numbers per slot.
        o = expand(o, idx, gate, heads_per_group)  # [B, S, G, M, D]
        return AttentionOutput(F.linear(o.flatten(2), self.w_o), aux_loss)

    def forward_reference(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> AttentionOutput:
        """The same function, masked dense: GQA over all H heads, outputs times the gate, zero where not chosen."""
        idx, gate, aux_loss = self.route(x)
        q = self.q_rope(self.heads_of(x, self.w_q), rope)
        k = self.k_rope(self.heads_of(x, self.w_k), rope)
        o = core(q, k, self.heads_of(x, self.w_v), mask).unflatten(2, (-1, self.config.heads_per_group))
        factor = gate.new_zeros(o.shape[:-1]).scatter(-1, idx, gate)  # [B, S, G, M]
        o = o * factor.unsqueeze(-1).to(o.dtype)
        return AttentionOutput(F.linear(o.flatten(2), self.w_o), aux_loss)

    def route(self, x: Tensor) -> Routing:
        """x [B, S, d] -> which heads each token uses, and how much of each."""
        config = self.config
        always_on = config.always_on
        logits = router_logits(x, self.w_r, self.w_r.shape[0] // config.routed)  # [B, S, G, N]
        loss_free = config.balance == "loss_free"
        scores = torch.sigmoid(logits.detach()) + self.router_bias if loss_free else logits
        idx = top_k(scores, config.top_k)
        gate = gates(logits, idx, config.gate)
        aux_loss = self._balance(logits, idx)
        if always_on:
            fixed = torch.arange(always_on, device=idx.device).expand(*idx.shape[:-1], always_on)
            idx = torch.cat([fixed, idx + always_on], -1)
            gate = torch.cat([torch.ones_like(fixed, dtype=gate.dtype), gate], -1)
        return Routing(idx, gate, aux_loss)

    def _balance(self, logits: Tensor, idx: Tensor) -> Tensor | None:
        """Records the choice; returns the balancing loss where the config asks for one."""
        config = self.config
        if not self.training and config.balance != "f_p":
            return None
        chosen = chosen_mask(logits.detach(), idx)
        if self.training:
            self._meter.update(logits.detach(), chosen)
        if config.balance != "f_p":
            return None
        if config.gate == "sigmoid2":  # the distribution whose parts the gates are
            score = torch.sigmoid(logits)
            p = score / score.sum(-1, keepdim=True)
        else:
            p = torch.softmax(logits, -1)
        return config.balance_coef * balance_loss(p, chosen, slots=config.top_k, scope=config.balance_scope)

    def router_stats(self) -> dict[str, RouterStats]:
        stats = self._meter.stats()
        return {} if stats is None else {ROUTER: stats}

    def reset_router_stats(self) -> None:
        self._meter.reset()

    @torch.no_grad()
    def after_step(self, global_load: dict[str, Tensor]) -> None:
        if self.config.balance != "loss_free":
            return
        load = global_load[ROUTER].to(self.router_bias)
        self.router_bias += self.config.bias_rate * torch.sign(load.mean(-1, keepdim=True) - load)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves like any module, but keeps the bias in fp32: a step of 1e-3 vanishes in bf16 beyond 0.25."""
        bias = self._buffers.get("router_bias")
        super()._apply(fn, recurse)
        if bias is not None:
            moved = self.router_bias
            self.router_bias = bias.to(moved.device) if moved.dtype != bias.dtype else moved
        return self
