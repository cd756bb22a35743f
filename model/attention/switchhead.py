"""SwitchHead (Csordas et al., 2024, arXiv 2312.07987v3): values and output projections are mixtures of experts.

Legend: B batch, S sequence, d width, n heads, E experts per head, k=top_k, D head size. For head h:

    Q = W_Q x,  K = W_K x                                                  dense
    V(s) = sum over e in top-k of r^V(s), of gate(r^V_e) W_V[e] x_s        source: the token attended to, s
    y_h(t) = sum over e in top-k of r^O(t), of gate(r^O_e) W_O[e] (A V)    destination: the querying token, t

A is the attention matrix of head h, and the layer's output is the sum of y_h over heads. Gates are independent
sigmoids, not renormalized; there is no auxiliary loss. With n=G and E=M, SwitchHead is the dual of R-GQA: projection
weights, projection FLOPs (except for gating) and KV cache are equal. R-GQA routes query and output slices and computes
k G score maps; SwitchHead routes value and output slices and computes G score maps.

E = 1 is the authors' gate-only layer: values and outputs are dense, and one sigmoid gate per head scales its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from headway.kernels.experts import Projections, combine, project, routed_choice
from headway.model.attention.grouped import QkNorm
from headway.model.balance import BalanceConfig
from headway.model.base import (
    Attention,
    AttentionConfig,
    AttentionOutput,
    Context,
    Flops,
    HeadPool,
    RelativeForm,
    Shard,
)
from headway.model.k_schedule import KSchedule, all_k, check_k_schedule, check_k_schedule_of_run, k_after, staged
from headway.model.layers import parameter
from headway.model.router import AnyRouter, LinearRouterConfig, RoutedAttention, Routing, RoutingConfig, summed


class SwitchHeadConfig(AttentionConfig):
    """SwitchHead: n heads with dense queries and keys; values and outputs are mixtures of experts.

    The authors rotate half of the channels (rope_fraction 0.5), scale the initial weights by the fan-in and initialize
    the router rows to nearly equal norm (router.init equal_rows). The defaults here are those of the other mechanisms,
    so that comparisons differ in the mechanism only.
    """

    type: Literal["switchhead"] = "switchhead"
    kv_heads: int = Field(
        ge=1, description="n, heads; each has its own query, key and pools of value and output experts"
    )
    experts: int = Field(ge=1, description="E, value and output experts per head; 1: only a gate per head")
    top_k: int = Field(ge=1, description="value experts and output experts a token uses per head")
    k_schedule: KSchedule = Field(
        default=[],
        description="more experts early in training: stages with their top_k, or a linear decrease from `start`; costs "
        "per token are those of the final top_k, costs of training count the stages",
    )
    gate: Literal["sigmoid", "sigmoid2", "renorm"] = Field(
        default="sigmoid", description="factor on a selected expert; published: sigmoid, and renorm as an option"
    )
    shared_selection: bool = Field(
        default=False, description="one router selects both: a token's value and output experts have the same indices"
    )
    router: AnyRouter = Field(default=LinearRouterConfig(), description="type of the two routers")
    balance: BalanceConfig = Field(
        default=BalanceConfig(), description="load balancing of each router; published: none"
    )
    projections: Projections = Field(
        default="dense",
        description="dense: project all experts, then select; grouped: one matmul per expert, over the tokens that "
        "selected it; routed: the grouped matmuls in one GPU kernel; auto: routed where it is expected to be faster",
    )

    @model_validator(mode="after")
    def _experts_suffice(self) -> Self:
        check_k_schedule(self.k_schedule, self.top_k)
        every = all_k(self.k_schedule, self.top_k)
        if max(every) > self.experts:
            legal = "1" if self.experts == 1 else f"1 to {self.experts}"
            raise ValueError(
                f"top_k: {max(every)} experts selected of {self.experts} per head; "
                f"use top_k {legal}, or experts {max(every)}"
            )
        if self.gate == "renorm" and min(every) == 1:
            raise ValueError(
                "gate: renorm at top_k 1 is the constant 1, so the routers would get no gradient; "
                "use gate sigmoid, or top_k 2"
            )
        if self.shared_selection and self.experts == 1:
            raise ValueError(
                "shared_selection: with experts 1 there is only the output router, so there is no selection to share; "
                "use shared_selection false, or experts 2"
            )
        if self.router.reads_queries:
            raise ValueError(
                f"router: {self.router.type} ranks query heads, but SwitchHead routes values and outputs; "
                "use router.type linear or two_layer"
            )
        return self

    def check_run(self, *, seq_len: int, tokens: int, tokens_per_step: int) -> None:
        super().check_run(seq_len=seq_len, tokens=tokens, tokens_per_step=tokens_per_step)
        check_k_schedule_of_run(self.k_schedule, tokens=tokens, tokens_per_step=tokens_per_step)

    def stages(self) -> Sequence[tuple[int, Self]]:
        return staged(self, self.k_schedule, self.top_k)

    @property
    def router_names(self) -> tuple[str, ...]:
        """`source` and `destination`; only `destination` where one router serves both or values are dense."""
        return ("destination",) if self.shared_selection or self.experts == 1 else ("source", "destination")

    @property
    def score_maps(self) -> int:
        return self.kv_heads

    def attended_heads(self, *, tensor: int = 1) -> tuple[int, ...]:
        return (self.kv_heads // tensor,)

    @property
    def relative_form(self) -> RelativeForm | None:
        """As in the authors' code: position keys for each head, and no u and v."""
        return RelativeForm(self.kv_heads, 0)

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return SwitchHeadAttention(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    def num_params(self, *, width: int) -> int:
        """2dnD + 2dnED, plus the routers (two linear ones: 2dnE), plus 2D (two gains) with QK-norm."""
        dense = 2 * width * self.kv_heads * self.head_dim
        gains = 2 * self.head_dim if self.qk_norm else 0
        router = self.router.num_params(width=width, groups=self.kv_heads, experts=self.experts)
        return dense + dense * self.experts + len(self.router_names) * router + gains

    def gating_flops_per_token(self) -> int:
        """Products with the gates and their sums: 2knD each for values and outputs; only outputs at E = 1."""
        sides = 1 if self.experts == 1 else 2
        return sides * 2 * self.top_k * self.kv_heads * self.head_dim

    def flops_per_token(self, *, width: int, seq_len: int) -> Flops:
        """Useful: 4dnD + 4knD(d+1) + 4dnE, plus the core. Executed if `dense`: V and O of all E experts, not of k."""
        per_expert = 4 * width * self.kv_heads * self.head_dim
        router = self.router.flops_per_token(width=width, groups=self.kv_heads, experts=self.experts)
        rest = per_expert + self.gating_flops_per_token() + len(self.router_names) * router
        rest += self.core_flops_per_token(seq_len=seq_len)
        executed = self.top_k if self.projections == "grouped" else self.experts
        return Flops(useful=rest + per_expert * self.top_k, executed=rest + per_expert * executed)

    def kv_bytes_per_token(self, *, seq_len: int, bytes_per_element: int) -> float:
        return 2 * self.kv_heads * self.head_dim * bytes_per_element

    def shards(self) -> dict[str, Shard]:
        """Each rank owns whole heads with their experts and router rows, so routing needs no communication."""
        rows = ["w_q", "w_k", "w_v", *(f"{r}.{name}" for r in self.router_names for name in self.router.shards())]
        return {**{name: Shard(0, self.kv_heads) for name in rows}, "w_o": Shard(1, self.kv_heads)}


class SwitchHeadAttention(RoutedAttention):
    """Parameters w_q, w_k [n D, d], w_v [n E D, d], w_o [d, n E D], all head-major; routers `source`, `destination`."""

    def __init__(self, config: SwitchHeadConfig, *, width: int, layers: int, init_std: float, norm_eps: float) -> None:
        super().__init__()
        self.config, self.top_k = config, config.top_k
        heads, experts, head_dim = config.kv_heads, config.experts, config.head_dim
        self.w_q = parameter(heads * head_dim, width)
        self.w_k = parameter(heads * head_dim, width)
        self.w_v = parameter(heads * experts * head_dim, width)
        self.w_o = parameter(width, heads * experts * head_dim)
        routing = RoutingConfig(gate=config.gate, balance=config.balance, router=config.router)
        for name in config.router_names:
            self.add_module(name, config.router.build(routing, width=width, groups=heads, experts=experts))
        self.q_rope = QkNorm(config, norm_eps)
        self.k_rope = QkNorm(config, norm_eps)
        self.init_stds = {"w_q": init_std, "w_k": init_std, "w_v": init_std, "w_o": init_std / (2 * layers) ** 0.5}

    def forward(self, x: Tensor, context: Context) -> AttentionOutput:
        experts, form, head_dim = self.config.experts, self.config.projections, self.config.head_dim
        source, destination = self.route(x, context)
        out = routed_choice(form, x, destination.idx, experts, head_dim=head_dim)
        q, k = self._queries_and_keys(x, context)
        if source is None:
            v = self._each_value(x).squeeze(-2)
        else:
            into = out if source is destination else routed_choice(form, x, source.idx, experts, head_dim=head_dim)
            chosen = project(x, self.w_v, source.idx, experts, form, into)  # [B, S, n, k, D]
            v = (chosen * source.gate.to(x.dtype).unsqueeze(-1)).sum(-2)
        k, v = context.keys_and_values(k, v)
        o = context.attend(q, k, v)  # [B, S, n, D]
        slots = o.unsqueeze(-2).expand(*destination.idx.shape, o.shape[-1])  # one output, k output experts
        y = combine(slots, self.w_o, destination.idx, destination.gate, experts, form, out)
        return AttentionOutput(y, _aux_loss(source, destination))

    def forward_reference(self, x: Tensor, context: Context) -> AttentionOutput:
        """Dense reference of `forward`: computes every expert times its gate, 0 where not selected."""
        experts = self.config.experts
        source, destination = self.route(x, context)
        q, k = self._queries_and_keys(x, context)
        v = self._each_value(x)
        weights = torch.ones_like(v[..., 0]) if source is None else _all_gates(source, experts).to(x.dtype)
        k, v = context.keys_and_values(k, torch.einsum("bsne,bsned->bsnd", weights, v))
        o = context.attend(q, k, v)
        o = torch.einsum("bsne,bsnd->bsned", _all_gates(destination, experts).to(x.dtype), o)
        return AttentionOutput(F.linear(o.flatten(2), self.w_o), _aux_loss(source, destination))

    def route(self, x: Tensor, context: Context) -> tuple[Routing | None, Routing]:
        """x [B, S, d] -> value routing (None if values are dense) and output routing, [B, S, n, k] each."""
        routings = {name: router(x, context, k=self.top_k) for name, router in self.routers.items()}
        destination = routings["destination"]
        if self.config.shared_selection:
            return destination, destination
        return routings.get("source"), destination

    def pool(self, x: Tensor, context: Context) -> HeadPool | None:
        """The value experts of each head. Each is run through attention with the head's own queries and keys."""
        experts = self.config.experts
        if experts == 1:
            return None
        q, k = self._queries_and_keys(x, context)
        v = self._each_value(x)
        q, k = q.repeat_interleave(experts, 2), k.repeat_interleave(experts, 2)
        o = context.attend(q, k, v.flatten(2, 3)).unflatten(2, (-1, experts))
        weights = self.w_v.unflatten(0, (-1, experts, self.config.head_dim)).flatten(2)
        return HeadPool("value expert", weights, v, o)

    def before_step(self, tokens: int) -> None:
        """Set k to that of the current stage of `k_schedule`."""
        self.top_k = k_after(self.config.k_schedule, self.config.top_k, tokens)

    def _queries_and_keys(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys [B, S, n, D]."""
        head_dim = self.config.head_dim
        q = self.q_rope(F.linear(x, self.w_q).unflatten(-1, (-1, head_dim)), context.rope)
        k = self.k_rope(F.linear(x, self.w_k).unflatten(-1, (-1, head_dim)), context.rope)
        return q, k

    def _each_value(self, x: Tensor) -> Tensor:
        """x [B, S, d] -> values of all experts [B, S, n, E, D]."""
        return F.linear(x, self.w_v).unflatten(-1, (-1, self.config.experts, self.config.head_dim))


def _aux_loss(source: Routing | None, destination: Routing) -> Tensor | None:
    """Sum of the routers' losses. A router that serves both sides counts once."""
    other = None if source is None or source is destination else source.aux_loss
    return summed(other, destination.aux_loss)


def _all_gates(routing: Routing, experts: int) -> Tensor:
    """Gate of each expert [B, S, n, E]: 0 where not selected."""
    gate = routing.gate
    return gate.new_zeros(*gate.shape[:-1], experts).scatter(-1, routing.idx, gate)
