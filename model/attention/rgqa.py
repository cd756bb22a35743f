"""Routed grouped-query attention (R-GQA): each token uses k of the M query heads in every KV group.

This is a reconstruction: the authors' announcement was available, their paper and code were not. The announcement says
that a learned router selects the most relevant query heads of each group, and that attention is computed for the
selected heads only. The router, the gate, load balancing and the layout of W_O are choices of this project. Each is a
field of the config (docs/mechanisms.md).

Legend: B batch, S sequence, d width, H query heads, G groups (= KV heads), M=H/G query heads per group,
N=M-always_on routed heads per group, k=top_k, D head size. For each token, in group g:

    r = router(x)                  [G, N]     logits, fp32
    C = top-k of r (+ bias, noise) [G, k]     selected heads; ties go to the lower index; selection has no gradient
    o_m = softmax(q_m K_g^T / sqrt(D)) V_g    for m in C and for the always-on heads
    y = sum over g, m of gate(r_m) W_O[g, m] o_m

A slot is one of the always_on + k query heads that are computed per group and token. A softmax row depends on its own
query only, so a slot may hold a different head at each position. The attention core therefore runs ordinary GQA with
always_on + k query heads per group. The mask, the KV cache and the kernels are those of GQA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from headway.kernels.experts import Projections, Routed, combine, project, routed_choice, routed_forms
from headway.kernels.routing import GateName
from headway.model.attention.grouped import GroupedConfig, GroupedQueryAttention, check_groups
from headway.model.balance import BalanceConfig
from headway.model.base import Attention, AttentionOutput, Context, Flops, Shard, StrictConfig
from headway.model.k_schedule import (
    KSchedule,
    LinearK,
    all_k,
    check_k_schedule,
    check_k_schedule_of_run,
    k_after,
    staged,
)
from headway.model.layers import parameter
from headway.model.router import AnyRouter, LinearRouterConfig, Routing, RoutingConfig, check_router, of_layer, summed

ROUTER = "router"


class SizeRule(StrictConfig):
    """k = ceil(min(1, ratio + slope log10(P / at_params)) N) for a model of P parameters: larger models use more heads.

    The rule is a proposal of this project. Two published observations exist (fine at 0.1B, harmful at 0.94B), too few
    to fit its constants.
    """

    ratio: float = Field(gt=0, le=1, description="fraction of the routed heads selected at `at_params` parameters")
    slope: float = Field(ge=0, description="increase of that fraction per factor of ten in parameters")
    at_params: float = Field(gt=0)

    def top_k(self, *, num_params: int, routed: int) -> int:
        """Heads to select per group: at least 1, at most `routed`."""
        ratio = min(1.0, self.ratio + self.slope * math.log10(num_params / self.at_params))
        return max(1, math.ceil(ratio * routed - 1e-9))


class RoutedGroupedConfig(GroupedConfig):
    """Options shared by the mechanisms that route query heads within groups."""

    kv_heads: int = Field(
        ge=1, description="G, KV heads (= groups); each has heads/kv_heads query heads to choose from"
    )
    top_k: int | list[int] | SizeRule = Field(
        description="query heads a token selects in each group; a list: one number per layer; a rule: by model size"
    )
    k_schedule: KSchedule = Field(
        default=[],
        description="more heads early in training: stages with their top_k, or a linear decrease from `start`; costs "
        "per token are those of the final top_k, costs of training count the stages",
    )
    gate: GateName = Field(default="sigmoid2", description="factor on the output of a selected head")
    always_on: int = Field(default=0, ge=0, description="heads per group that every token uses; they are not routed")
    always_on_gate: Literal["none", "sigmoid2"] = Field(default="none", description="factor on always-on heads")
    output: Literal["head", "slot"] = Field(
        default="head", description="head: each query head has a slice of W_O; slot: each slot has one, as in GQE"
    )
    router: AnyRouter = Field(default=LinearRouterConfig(), description="computes the routing logits")
    balance: BalanceConfig = Field(default=BalanceConfig(f_p=0.01), description="load balancing of the routed heads")
    projections: Projections = Field(
        default="dense",
        description="dense: project all heads, then select; grouped: one matmul per head, over the tokens that "
        "selected it; routed: the grouped matmuls in one GPU kernel; auto: routed where it is expected to be faster",
    )

    @model_validator(mode="after")
    def _routing_is_possible(self) -> Self:
        check_groups(self.heads, self.kv_heads)
        if self.routed < 1:
            raise ValueError(
                f"always_on: {self.always_on} of the {self.heads_per_group} query heads of a group leave none to "
                f"route; use always_on {self.heads_per_group - 1}, or heads {self.kv_heads * (self.always_on + 1)}"
            )
        if self.always_on_gate != "none" and not self.always_on:
            raise ValueError("always_on_gate: there are no always-on heads; use always_on 1, or always_on_gate none")
        for k in self._all_k():
            self._check_k(k)
        choice = isinstance(self.top_k, SizeRule) or min(self._all_k()) < self.routed
        check_router(self.router, self.balance, gate=self.gate, choice=choice)
        if self.routed == 1 and self.gate not in ("hard", "sigmoid", "sigmoid2"):
            raise ValueError(
                f"gate: {self.gate} of a single routed head per group is constant and teaches the router nothing; "
                f"use gate sigmoid2, or heads {self.kv_heads * (self.always_on + 2)}"
            )
        if self.gate == "renorm" and isinstance(self.top_k, SizeRule):
            raise ValueError(
                "gate: renorm needs at least two selected heads, and a size rule may resolve to one; "
                "use gate sigmoid2 or detached_renorm, or top_k as a number"
            )
        if isinstance(self.top_k, SizeRule):
            if isinstance(self.k_schedule, LinearK):
                raise ValueError(
                    "k_schedule: a linear decrease needs the number that it ends at, and a size rule gives it later; "
                    "use top_k as a number, or a list of stages"
                )
            check_k_schedule(self.k_schedule, 1)
        else:
            check_k_schedule(self.k_schedule, self.top_k)
        if self.output == "slot" and (self.k_schedule or not isinstance(self.top_k, int)):
            raise ValueError(
                "output: slot has one slice of W_O per slot, so k must be the same in all layers and throughout "
                "training; use output head, or top_k as an integer without k_schedule"
            )
        return self

    def _all_k(self) -> list[int]:
        return all_k(self.k_schedule, [] if isinstance(self.top_k, SizeRule) else self.top_k)

    def _check_k(self, k: int) -> None:
        if k < 1 or k > self.routed:
            legal = "1" if self.routed == 1 else f"1 to {self.routed}"
            raise ValueError(
                f"top_k: {k} heads selected of {self.routed} routed ones per group "
                f"(heads {self.heads} / kv_heads {self.kv_heads} - always_on {self.always_on}); "
                f"use top_k {legal}, or heads {self.kv_heads * (max(k, 1) + self.always_on)}"
            )
        if self.gate == "renorm" and k == 1:
            raise ValueError(
                "gate: renorm at top_k 1 is the constant 1, so the router would get no gradient from the task; "
                "use gate sigmoid2 or detached_renorm, or top_k 2"
            )

    def layer(self, index: int, layers: int) -> Self:
        if not isinstance(self.top_k, list):
            return self
        return self.model_copy(update={"top_k": of_layer(self.top_k, index, layers)})

    def check_run(self, *, seq_len: int, tokens: int, tokens_per_step: int) -> None:
        super().check_run(seq_len=seq_len, tokens=tokens, tokens_per_step=tokens_per_step)
        check_k_schedule_of_run(self.k_schedule, tokens=tokens, tokens_per_step=tokens_per_step)

    def stages(self) -> Sequence[tuple[int, Self]]:
        return staged(self, self.k_schedule, self.k)

    def at_size(self, num_params: int) -> Self:
        if not isinstance(self.top_k, SizeRule):
            return self
        return self.model_copy(update={"top_k": self.top_k.top_k(num_params=num_params, routed=self.routed)})

    @property
    def groups(self) -> int:
        return self.kv_heads

    @property
    def routed(self) -> int:
        """N, query heads per group that the router chooses from."""
        return self.heads_per_group - self.always_on

    @property
    def k(self) -> int:
        """Heads selected per group and token. The config must be that of one layer (`layer`, `at_size`)."""
        assert isinstance(self.top_k, int), "k differs by layer or model size: ask the config of one layer"
        return self.top_k

    @property
    def slots(self) -> int:
        """Query heads computed per group and token."""
        return self.always_on + self.k

    @property
    def score_maps(self) -> int:
        return self.groups * self.slots

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return RoutedGroupedQueryAttention(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    def num_params(self, *, width: int) -> int:
        """2dHD + 2dGD, plus the router (linear: dGN). With output `slot`, W_O has d(G slots)D instead of dHD."""
        params = super().num_params(width=width)
        params += self.router.num_params(width=width, groups=self.groups, experts=self.routed)
        if self.always_on_gate != "none":
            params += width * self.groups * self.always_on
        if self.output == "slot":
            params -= width * (self.heads - self.groups * self.slots) * self.head_dim
        return params

    def flops_per_token(self, *, width: int, seq_len: int) -> Flops:
        """Useful: 4d(G slots)D + 4dGD, the router and the core. Executed if `dense`: queries and W_O of all H heads.

        Projections `routed` count as dense: the forward matmul of W_O and the gradient of x are dense, and the work
        saved in the other matmuls depends on the GPU.
        """
        rest = 4 * width * self.groups * self.head_dim + self.core_flops_per_token(seq_len=seq_len)
        rest += self.router.flops_per_token(width=width, groups=self.groups, experts=self.routed)
        if self.always_on_gate != "none":
            rest += 2 * width * self.groups * self.always_on
        per_head, slots = 2 * width * self.head_dim, self.groups * self.slots
        queries = self.heads if self.router.reads_queries else slots
        useful = rest + per_head * (queries + slots)
        if self.projections == "grouped":
            return Flops(useful=useful, executed=useful)
        outputs = self.heads if self.output == "head" else slots
        return Flops(useful=useful, executed=rest + per_head * (self.heads + outputs))

    def shards(self) -> dict[str, Shard]:
        """Each rank owns whole groups and their router rows, so routing needs no communication."""
        names = [f"{ROUTER}.{name}" for name in self.router.shards()]
        names += ["w_always_on"] if self.always_on_gate != "none" else []
        return {**super().shards(), **{name: Shard(0, self.groups) for name in names}}


class RgqaConfig(RoutedGroupedConfig):
    """Routed GQA: every token selects `top_k` query heads in each group."""

    type: Literal["rgqa"] = "rgqa"


class RoutedGroupedQueryAttention(GroupedQueryAttention):
    """The R-GQA layer: parameters of GQA, a `router` and, with `always_on_gate`, `w_always_on` [G always_on, d]."""

    gate_matrices = ("w_always_on",)

    def __init__(
        self, config: RoutedGroupedConfig, *, width: int, layers: int, init_std: float, norm_eps: float
    ) -> None:
        super().__init__(config, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)
        self.config, self.top_k = config, config.k
        routing = RoutingConfig(gate=config.gate, balance=config.balance, router=config.router)
        self.router = config.router.build(routing, width=width, groups=config.groups, experts=config.routed)
        if config.always_on_gate != "none":
            self.w_always_on = parameter(config.groups * config.always_on, width)
            self.init_stds["w_always_on"] = 0.02
        if config.output == "slot":
            self.w_o = parameter(width, config.groups * config.slots * config.head_dim)

    def forward(self, x: Tensor, context: Context) -> AttentionOutput:
        q, (idx, gate, aux_loss), routed = self.chosen_queries(x, context)
        k, v = self.keys_and_values(x, context)  # [B, S, G, D]
        o = context.attend(q, k, v).unflatten(2, idx.shape[2:])  # [B, S, G, slots, D]
        if self.config.output == "slot":
            y = F.linear((o * gate.to(o.dtype).unsqueeze(-1)).flatten(2), self.w_o)
        else:
            y = combine(o, self.w_o, idx, gate, self.members, self.config.projections, routed)
        return AttentionOutput(y, summed(aux_loss, self.diversity_loss()))

    def chosen_queries(self, x: Tensor, context: Context) -> tuple[Tensor, Routing, Routed | None]:
        """Compute the queries of the selected heads from x [B, S, d].

        Returns the rotated queries [B, S, G slots, D], group-major as the core expects; the routing that selected
        them; and, where the routed kernels run, the token lists per head that they read (else None).
        """
        form, reads, queries = self.config.projections, self.config.router.reads_queries, None
        if reads or self._is_dense(x):
            queries = self.heads_of(x, self.w_q).unflatten(2, (-1, self.members))  # [B, S, G, M, D]
        heads = self.route(x, context, queries if reads else None)
        routed = routed_choice(form, x, heads.idx, self.members, head_dim=self.head_dim)
        if queries is not None:
            return self.q_rope.of_chosen(queries, heads.idx, context.rope), heads, routed
        if routed is not None:
            return self.q_rope.of_routed(x, self.w_q, routed, context.rope), heads, routed
        q = project(x, self.w_q, heads.idx, self.members, form)
        return self.q_rope(q.flatten(2, 3), context.rope), heads, None

    def _is_dense(self, x: Tensor) -> bool:
        """Whether the queries of all heads are computed before the selection."""
        form, slots = self.config.projections, self.config.always_on + self.top_k
        groups = self.w_q.shape[0] // (self.members * self.head_dim)
        return form != "grouped" and (
            routed_forms(form, x, groups=groups, experts=self.members, k=slots, head_dim=self.head_dim) is None
        )

    def forward_reference(self, x: Tensor, context: Context) -> AttentionOutput:
        """Dense reference of `forward`: GQA over all H heads; each output times its gate, 0 where not selected."""
        queries = self.heads_of(x, self.w_q).unflatten(2, (-1, self.members))
        idx, gate, aux_loss = self.route(x, context, queries)
        k, v = self.keys_and_values(x, context)
        o = context.attend(self.q_rope(queries.flatten(2, 3), context.rope), k, v)
        o = o.unflatten(2, (-1, self.members))  # [B, S, G, M, D]
        if self.config.output == "slot":
            o = o.gather(3, idx.unsqueeze(-1).expand(*idx.shape, o.shape[-1])) * gate.unsqueeze(-1).to(o.dtype)
        else:
            factor = gate.new_zeros(o.shape[:-1]).scatter(-1, idx, gate)  # [B, S, G, M]
            o = o * factor.unsqueeze(-1).to(o.dtype)
        return AttentionOutput(F.linear(o.flatten(2), self.w_o), summed(aux_loss, self.diversity_loss()))

    def route(self, x: Tensor, context: Context, queries: Tensor | None) -> Routing:
        """x [B, S, d] -> head of each slot [B, S, G, slots], as an index within its group; always-on heads come first.

        queries [B, S, G, M, D]: those of all heads, for a router that reads them; else None.
        """
        always_on = self.config.always_on
        routed = None if queries is None else queries[..., always_on:, :]
        routing = self.router(x, context, k=self.top_k, queries=routed)
        if not always_on:
            return routing
        fixed = torch.arange(always_on, device=x.device).expand(*routing.idx.shape[:-1], always_on)
        factor = torch.ones_like(fixed, dtype=routing.gate.dtype)
        if self.config.always_on_gate != "none":
            logits = F.linear(x, self.w_always_on).unflatten(-1, (-1, always_on))
            factor = 2 * torch.sigmoid(logits.to(routing.gate.dtype))
        return Routing(
            torch.cat([fixed, routing.idx + always_on], -1), torch.cat([factor, routing.gate], -1), routing.aux_loss
        )

    def before_step(self, tokens: int) -> None:
        """Set k to that of the current stage of `k_schedule`."""
        self.top_k = k_after(self.config.k_schedule, self.config.k, tokens)
