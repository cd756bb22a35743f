"""Hybrid-QVO: routed query heads as in R-GQA, and values that are mixtures of experts as in SwitchHead.

This is an unpublished proposal of this project. R-GQA routes queries and outputs; SwitchHead (Csordas et al., 2024,
arXiv 2312.07987v3) routes values and outputs; Hybrid-QVO routes queries, values and outputs. Keys are dense. With
routed keys, a slot would hold a different expert's keys at each position, so a query would be scored against keys from
different subspaces.

Legend: B batch, S sequence, d width, H query heads, G groups (= KV heads), M=H/G query heads per group, k=top_k,
E_v value experts per group, k_v=value_top_k, E_o output experts per group, k_o=output_top_k, D head size. In group g:

    K(s) = W_K x_s                                                         dense, RoPE
    V(s) = sum over e in top-k_v of r^V(s), of gate(r^V_e) W_V[g, e] x_s   source: the token attended to, s
    o_m  = softmax(q_m K^T / sqrt(D)) V                                    m in top-k of r^Q(t) and the always-on heads
    y(t) = sum over g, m of gate(r^Q_m) W_O[g, m] o_m                      destination: the querying token, t

With output experts, query heads have no slices of W_O, and a third router reads the querying token:

    y(t) = sum over g, over e in top-k_o of r^O(t), of gate(r^O_e) W_O[g, e] (sum over m of gate(r^Q_m) o_m)

Gates of value and output experts are independent sigmoids, not renormalized. The KV cache holds K and the mixed V,
2GD elements per token as in GQA. All routers read the token's own x, so decoding needs no other state.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from headway.kernels.experts import combine, project, routed_choice
from headway.model.attention.rgqa import RoutedGroupedConfig, RoutedGroupedQueryAttention
from headway.model.balance import BalanceConfig
from headway.model.base import Attention, AttentionOutput, Context, Flops, HeadPool, Shard
from headway.model.layers import parameter
from headway.model.router import AnyRouter, LinearRouterConfig, Routing, RoutingConfig, summed

ExpertGate = Literal["sigmoid", "sigmoid2"]

VALUES, OUTPUTS = "value_router", "output_router"


class ExpertPool(NamedTuple):
    """The value or the output experts: `experts` per group, of which a token mixes `top_k`."""

    experts: int
    top_k: int
    routing: RoutingConfig


class HybridConfig(RoutedGroupedConfig):
    """Hybrid-QVO: routed query heads as in rgqa; values (and optionally outputs) are mixed from experts."""

    type: Literal["hybrid"] = "hybrid"
    value_experts: int = Field(ge=1, description="E_v, value experts per group; 1: rgqa with a gate on its values")
    value_top_k: int = Field(ge=1, description="value experts a token mixes in each group")
    value_gate: ExpertGate = Field(default="sigmoid2", description="factor on a selected value expert")
    value_router: AnyRouter = Field(default=LinearRouterConfig(), description="selects value experts")
    value_balance: BalanceConfig = Field(
        default=BalanceConfig(f_p=0.01), description="load balancing of the value experts"
    )
    value_init_scale: float = Field(
        default=1.0, gt=0, description="factor on the initial std of W_V; use 2/value_top_k with sigmoid gates"
    )
    output_experts: int = Field(
        default=0, ge=0, description="E_o, output experts per group, instead of a slice of W_O per query head; 0: none"
    )
    output_top_k: int = Field(default=1, ge=1, description="output experts a token uses in each group")
    output_gate: ExpertGate = Field(default="sigmoid2", description="factor on a selected output expert")
    output_router: AnyRouter = Field(default=LinearRouterConfig(), description="selects output experts")
    output_balance: BalanceConfig = Field(
        default=BalanceConfig(f_p=0.01), description="load balancing of the output experts"
    )

    @model_validator(mode="after")
    def _experts_suffice(self) -> Self:
        self._check_pool("value", self.value_experts, self.value_top_k, self.value_router)
        if self.output_experts:
            self._check_pool("output", self.output_experts, self.output_top_k, self.output_router)
            if self.output == "slot":
                raise ValueError(
                    "output: slot gives W_O a slice per slot, and output_experts replaces those slices; "
                    "use output head, or output_experts 0"
                )
            return self
        for name in ("output_top_k", "output_gate", "output_router", "output_balance"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name}: applies to output experts, and output_experts is 0; "
                    f"use output_experts {max(2, self.output_top_k)}, or leave {name} out"
                )
        return self

    def _check_pool(self, kind: str, experts: int, top_k: int, router: AnyRouter) -> None:
        if top_k > experts:
            legal = "1" if experts == 1 else f"1 to {experts}"
            raise ValueError(
                f"{kind}_top_k: {top_k} experts selected of {experts} per group; "
                f"use {kind}_top_k {legal}, or {kind}_experts {top_k}"
            )
        if router.reads_queries:
            raise ValueError(
                f"{kind}_router: {router.type} ranks query heads, but {kind} experts have no queries; "
                f"use {kind}_router.type linear or token_hash"
            )

    @property
    def pools(self) -> dict[str, ExpertPool]:
        """Router name -> the experts that it selects from."""
        values = RoutingConfig(gate=self.value_gate, balance=self.value_balance, router=self.value_router)
        pools = {VALUES: ExpertPool(self.value_experts, self.value_top_k, values)}
        if self.output_experts:
            outputs = RoutingConfig(gate=self.output_gate, balance=self.output_balance, router=self.output_router)
            pools[OUTPUTS] = ExpertPool(self.output_experts, self.output_top_k, outputs)
        return pools

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return HybridAttention(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    def num_params(self, *, width: int) -> int:
        """2dHD + dGD + G E_v dD + dH + d G E_v. Output experts have G E_o dD + d G E_o instead of dHD."""
        per_expert = width * self.groups * self.head_dim
        params = super().num_params(width=width) - per_expert
        if self.output_experts:
            params -= width * self.heads * self.head_dim
        for pool in self.pools.values():
            params += per_expert * pool.experts
            params += pool.routing.router.num_params(width=width, groups=self.groups, experts=pool.experts)
        return params

    def gating_flops_per_token(self) -> int:
        """Products with the gates and their sums: 2kGD for value experts, and for output experts if there are any."""
        return sum(2 * pool.top_k * self.groups * self.head_dim for pool in self.pools.values())

    def flops_per_token(self, *, width: int, seq_len: int) -> Flops:
        """Useful: 4dkGD + 2dGD + 2k_v GD(d+1) + 2dH + 2dGE_v, plus the core. Executed: every head and every expert.

        With output experts, 2k_o GD(d+1) + 2dGE_o replaces 2dkGD, the FLOPs of the query heads' W_O.
        """
        rgqa = super().flops_per_token(width=width, seq_len=seq_len)
        per_expert = 2 * width * self.groups * self.head_dim
        rest = self.gating_flops_per_token() - per_expert
        useful, executed = rgqa.useful + rest, rgqa.executed + rest
        if self.output_experts:
            useful -= per_expert * self.slots
            executed -= per_expert * self.heads_per_group
        for pool in self.pools.values():
            router = pool.routing.router.flops_per_token(width=width, groups=self.groups, experts=pool.experts)
            useful += per_expert * pool.top_k + router
            executed += per_expert * pool.experts + router
        return Flops(useful=useful, executed=useful if self.projections == "grouped" else executed)

    def shards(self) -> dict[str, Shard]:
        """Each rank owns whole groups with their experts and router rows, so routing needs no communication."""
        rows = [f"{name}.{row}" for name, pool in self.pools.items() for row in pool.routing.router.shards()]
        return {**super().shards(), **{name: Shard(0, self.groups) for name in rows}}


class HybridAttention(RoutedGroupedQueryAttention):
    """The Hybrid-QVO layer. Parameters are those of R-GQA, except for w_v [G E_v D, d] and, with output experts, w_o
    [d, G E_o D], both group-major. Routers: `router` (query heads), `value_router`, `output_router`.
    """

    config: HybridConfig

    def __init__(self, config: HybridConfig, *, width: int, layers: int, init_std: float, norm_eps: float) -> None:
        super().__init__(config, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)
        groups, head_dim = config.groups, config.head_dim
        self.w_v = parameter(groups * config.value_experts * head_dim, width)
        self.init_stds["w_v"] = init_std * config.value_init_scale
        if config.output_experts:
            self.w_o = parameter(width, groups * config.output_experts * head_dim)
        for name, pool in config.pools.items():
            routing = pool.routing
            self.add_module(name, routing.router.build(routing, width=width, groups=groups, experts=pool.experts))

    def forward(self, x: Tensor, context: Context) -> AttentionOutput:
        q, heads, routed = self.chosen_queries(x, context)  # [B, S, G slots, D]
        values, outputs = self.route_experts(x, context)
        k, v = self._attended(x, context, values)  # [B, S, G, D]
        o = context.attend(q, k, v).unflatten(2, heads.idx.shape[2:])  # [B, S, G, slots, D]
        aux_loss, form = self._aux_loss(heads, values, outputs), self.config.projections
        if outputs is None and self.config.output == "head":
            return AttentionOutput(combine(o, self.w_o, heads.idx, heads.gate, self.members, form, routed), aux_loss)
        o = o * heads.gate.to(o.dtype).unsqueeze(-1)
        if outputs is None:
            return AttentionOutput(F.linear(o.flatten(2), self.w_o), aux_loss)
        # W_O is linear and the slots share their output experts, so each expert reads one sum per group.
        slots = o.sum(3, keepdim=True).expand(*outputs.idx.shape, o.shape[-1])
        experts = self.config.output_experts
        routed = routed_choice(form, x, outputs.idx, experts, head_dim=self.head_dim)
        y = combine(slots, self.w_o, outputs.idx, outputs.gate, experts, form, routed)
        return AttentionOutput(y, aux_loss)

    def forward_reference(self, x: Tensor, context: Context) -> AttentionOutput:
        """Dense reference of `forward`: computes all heads and experts times their gates, 0 where not selected."""
        queries = self.heads_of(x, self.w_q).unflatten(2, (-1, self.members))
        heads = self.route(x, context, queries)
        values, outputs = self.route_experts(x, context)
        v = torch.einsum("bsge,bsged->bsgd", _all_gates(values, self.config.value_experts).to(x), self.each_value(x))
        k, v = context.keys_and_values(self.k_rope(self.heads_of(x, self.w_k), context.rope), v)
        o = context.attend(self.q_rope(queries.flatten(2, 3), context.rope), k, v).unflatten(2, (-1, self.members))
        o = o * _all_gates(heads, self.members).to(o).unsqueeze(-1)  # [B, S, G, M, D]
        if outputs is not None:
            o = torch.einsum("bsgmd,bsge->bsged", o, _all_gates(outputs, self.config.output_experts).to(o))
        elif self.config.output == "slot":
            o = o.gather(3, heads.idx.unsqueeze(-1).expand(*heads.idx.shape, o.shape[-1]))
        return AttentionOutput(F.linear(o.flatten(2), self.w_o), self._aux_loss(heads, values, outputs))

    def route_experts(self, x: Tensor, context: Context) -> tuple[Routing, Routing | None]:
        """x [B, S, d] -> routing to value experts [B, S, G, k_v] and to output experts [B, S, G, k_o] (or None)."""
        routers = self.routers
        routings = {name: routers[name](x, context, k=pool.top_k) for name, pool in self.config.pools.items()}
        return routings[VALUES], routings.get(OUTPUTS)

    def each_value(self, x: Tensor) -> Tensor:
        """x [B, S, d] -> values of all experts [B, S, G, E_v, D]."""
        return self.heads_of(x, self.w_v).unflatten(2, (-1, self.config.value_experts))

    def keys_and_values(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        return self._attended(x, context, self.route_experts(x, context)[0])

    def pool(self, x: Tensor, context: Context) -> HeadPool | None:
        """The query heads of each group. For groups of one query head: the value experts, run with that head."""
        experts = self.config.value_experts
        if self.members > 1 or experts == 1:
            return super().pool(x, context)
        q = self.q_rope(self.heads_of(x, self.w_q), context.rope)
        k = self.k_rope(self.heads_of(x, self.w_k), context.rope)
        q, k = (heads.repeat_interleave(experts, 2) for heads in (q, k))
        v = self.each_value(x)
        o = context.attend(q, k, v.flatten(2, 3)).unflatten(2, (-1, experts))
        return HeadPool("value expert", self.w_v.unflatten(0, (-1, experts, self.head_dim)).flatten(2), v, o)

    def _attended(self, x: Tensor, context: Context, values: Routing) -> tuple[Tensor, Tensor]:
        """Keys and mixed values [B, K, G, D] of the K tokens that x attends to."""
        config = self.config
        experts, form = config.value_experts, config.projections
        routed = routed_choice(form, x, values.idx, experts, head_dim=self.head_dim)
        chosen = project(x, self.w_v, values.idx, experts, form, routed)  # [B, S, G, k_v, D]
        v = (chosen * values.gate.to(x.dtype).unsqueeze(-1)).sum(-2)
        return context.keys_and_values(self.k_rope(self.heads_of(x, self.w_k), context.rope), v)

    def _aux_loss(self, heads: Routing, values: Routing, outputs: Routing | None) -> Tensor | None:
        other = None if outputs is None else outputs.aux_loss
        return summed(heads.aux_loss, values.aux_loss, other, self.diversity_loss())


def _all_gates(routing: Routing, experts: int) -> Tensor:
    """Gate of each expert [B, S, G, experts]: 0 where not selected."""
    gate = routing.gate
    return gate.new_zeros(*gate.shape[:-1], experts).scatter(-1, routing.idx, gate)
