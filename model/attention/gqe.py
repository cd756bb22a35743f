"""Grouped Query Experts (GQE): routed query heads with one output slice per slot, a weighted slot and a shared head.

Legend: B batch, S sequence, d width, H query experts (heads of the pool), G groups (= KV heads), M=H/G experts per
group, k=top_k, D head size. Per token, in group g:

    p = softmax(r), r = router(x)             [G, M]     over the group's M experts, before the choice
    K = top-k of p                            [G, k]     best first; this is the order of the slots
    o_m = softmax(q_m K_g^T / sqrt(D)) V_g    [G, k, D]  for m in K only
    w_m = p_m / (sum of the chosen p of all groups)
    mix = sum over g, m in K of w_m o_m       [D]        the weighted slot
    s   = head with its own query, always on  [D]        the shared head; keys and values: see `shared_head`
    y   = sum over g, j of W_O[g, j] o_(K_j) + W_mix mix + W_shared s

The slots enter W_O unscaled, so the task teaches the router through `mix` alone. W_O belongs to slots, not to experts:
experts that share a slot differ in what they attend to, not in what they write, and for k > 1 the order of the slots
matters. Source: Tripathi and Kumar, 2026, arXiv 2606.20945v2, read through the authors' code and two write-ups.
"""

from __future__ import annotations

from typing import Literal, Self

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from headway.kernels.experts import Projections, project, routed_choice, routed_forms
from headway.model.attention.grouped import GroupedConfig, GroupedQueryAttention, check_groups
from headway.model.balance import BalanceConfig
from headway.model.base import Attention, AttentionOutput, Context, Flops, Shard
from headway.model.layers import parameter
from headway.model.router import AnyRouter, LinearRouterConfig, RoutingConfig, check_router, summed

ROUTER = "router"


class GqeConfig(GroupedConfig):
    """GQE: every token picks `top_k` of the query experts of each group; one expert for all tokens may stand beside."""

    type: Literal["gqe"] = "gqe"
    kv_heads: int = Field(ge=1, description="G, KV heads (= groups); each has heads/kv_heads query experts")
    top_k: int = Field(ge=1, description="k, query experts a token picks in each group")
    variant: Literal["gqe", "hard_concat", "weighted_concat"] = Field(
        default="gqe",
        description="gqe: slots unscaled, and a weighted slot; hard_concat: slots unscaled, alone; "
        "weighted_concat: each slot times its p, alone",
    )
    shared_head: Literal["published", "none", "mean", "group0", "dedicated"] = Field(
        default="published",
        description="keys and values of the always-on head: mean over groups, those of group 0, or its own; "
        "published: mean in gqe, none in the other variants",
    )
    router: AnyRouter = Field(default=LinearRouterConfig(), description="where the logits come from")
    projections: Projections = Field(
        default="dense",
        description="of queries; dense: all heads, then the chosen ones; grouped: one product per head; routed: that "
        "in one kernel on a GPU; auto: routed where it is expected to be faster",
    )
    balance: BalanceConfig = Field(
        default=BalanceConfig(f_p=0.01, f_p_convention="count"), description="what keeps experts in use"
    )

    @model_validator(mode="after")
    def _router_has_a_choice(self) -> Self:
        check_groups(self.heads, self.kv_heads)
        members = self.heads_per_group
        if members == 1:
            raise ValueError(
                f"heads: {self.heads} in {self.kv_heads} groups leave the routers nothing to choose, and no gradient; "
                f"use heads {2 * self.kv_heads}, or type mha"
            )
        gate = "hard" if self.variant == "hard_concat" else "softmax"
        choice = self.top_k < members
        check_router(self.router, self.balance, gate=gate, choice=choice, hard="variant: hard_concat")
        if self.top_k > members:
            legal = "1" if members == 1 else f"1 to {members}"
            raise ValueError(
                f"top_k: {self.top_k} experts picked of {members} per group (heads {self.heads} / kv_heads "
                f"{self.kv_heads}); use top_k {legal}, or heads {self.kv_heads * self.top_k}"
            )
        if self.variant == "gqe" and self.kv_heads * self.top_k == 1:
            raise ValueError(
                "variant: gqe weighs the picked experts of all groups against each other, and kv_heads 1 with top_k 1 "
                "leaves one, of constant weight 1, so the router would get no gradient from the task; "
                "use variant weighted_concat, or top_k 2"
            )
        return self

    @property
    def groups(self) -> int:
        return self.kv_heads

    @property
    def slots(self) -> int:
        """k G, slots that hold picked experts."""
        return self.groups * self.top_k

    @property
    def mixes(self) -> bool:
        """Whether there is a weighted slot."""
        return self.variant == "gqe"

    @property
    def shared(self) -> Literal["none", "mean", "group0", "dedicated"]:
        """Keys and values of the shared head, `published` resolved."""
        if self.shared_head != "published":
            return self.shared_head
        return "mean" if self.variant == "gqe" else "none"

    @property
    def score_maps(self) -> int:
        return self.slots + (self.shared != "none")

    def attended_heads(self, *, tensor: int = 1) -> tuple[int, ...]:
        """The shared head is attended to on every rank, by itself."""
        groups = super().attended_heads(tensor=tensor)
        return groups if self.shared == "none" else (*groups, 1)

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return GroupedQueryExperts(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    @property
    def _extra(self) -> int:
        """D x d matrices besides queries, keys and values of the groups and W_O of the slots; each is used densely."""
        shared_query_and_output = 2 * (self.shared != "none")
        shared_keys_and_values = 2 * (self.shared == "dedicated")
        return self.mixes + shared_query_and_output + shared_keys_and_values

    def num_params(self, *, width: int) -> int:
        """d(H+1)D + 2dGD + (kG+2)Dd and the router, dH with a linear one; a dedicated shared head adds 2dD."""
        matrices = self.heads + 2 * self.groups + self.slots + self._extra
        gains = 2 * self.head_dim if self.qk_norm else 0
        router = self.router.num_params(width=width, groups=self.groups, experts=self.heads_per_group)
        return width * matrices * self.head_dim + gains + router

    def flops_per_token(self, *, width: int, seq_len: int) -> Flops:
        """Useful: 2d(kG+1)D + 2(kG+2)Dd + 4dGD, router and core; executed densely: queries of all H experts."""
        per_head = 2 * width * self.head_dim
        rest = per_head * (2 * self.groups + self.slots + self._extra) + self.core_flops_per_token(seq_len=seq_len)
        rest += self.router.flops_per_token(width=width, groups=self.groups, experts=self.heads_per_group)
        needed = self.heads if self.router.reads_queries else self.slots
        computed = needed if self.projections == "grouped" else self.heads
        return Flops(useful=rest + per_head * needed, executed=rest + per_head * computed)

    def kv_bytes_per_token(self, *, seq_len: int, bytes_per_element: int) -> float:
        """2GD numbers, as GQA: a mean is taken of what is cached. A dedicated shared head adds 2D."""
        return 2 * (self.groups + (self.shared == "dedicated")) * self.head_dim * bytes_per_element

    def shards(self) -> dict[str, Shard]:
        """Whole groups with their slots and router rows; the shared head's output by channels.

        Not cut: w_o_mix, which is linear, so each rank applies it to its groups' part of `mix`; and the shared head's
        query (and dedicated keys and values), of which every rank computes all and writes its channels. What crosses
        ranks, through `Ranks.sum`: one number per token, the sum of the chosen p; and 2D per token, K and V of a shared
        head that reads them from the groups.
        """
        routers = {f"{ROUTER}.{name}": Shard(0, self.groups) for name in self.router.shards()}
        shared = {"w_o_shared": Shard(1, self.head_dim)} if self.shared != "none" else {}
        return {**super().shards(), **routers, **shared}


class GroupedQueryExperts(GroupedQueryAttention):
    """GQA's w_q, w_k, w_v, a `router`, and the output by parts, in the order of the published W_O.

    w_o [d, k G D]: slots, group-major, best expert of a group first. w_o_mix [d, D]: the weighted slot. w_o_shared
    [d, D]: the shared head, whose query is w_q_shared [D, d] and dedicated keys and values w_k_shared, w_v_shared
    [D, d]. `ranks` is replaced where the groups are dealt to several ranks.
    """

    def __init__(self, config: GqeConfig, *, width: int, layers: int, init_std: float, norm_eps: float) -> None:
        super().__init__(config, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)
        self.config = config
        routing = RoutingConfig(gate="softmax", balance=config.balance, router=config.router)
        self.router = config.router.build(routing, width=width, groups=config.groups, experts=config.heads_per_group)
        self.w_o = parameter(width, config.slots * config.head_dim)
        if config.mixes:
            self.w_o_mix = parameter(width, config.head_dim)
            self.init_stds["w_o_mix"] = self.init_stds["w_o"]
            self.output_matrices += ("w_o_mix",)
        if config.shared != "none":
            self.w_q_shared = parameter(config.head_dim, width)
            self.w_o_shared = parameter(width, config.head_dim)
            self.init_stds |= {"w_q_shared": init_std, "w_o_shared": self.init_stds["w_o"]}
            self.output_matrices += ("w_o_shared",)
        if config.shared == "dedicated":
            self.w_k_shared = parameter(config.head_dim, width)
            self.w_v_shared = parameter(config.head_dim, width)
            self.init_stds |= {"w_k_shared": init_std, "w_v_shared": init_std}

    def forward(self, x: Tensor, context: Context) -> AttentionOutput:
        config, form, queries = self.config, self.config.projections, None
        reads, members, head_dim = config.router.reads_queries, self.members, self.head_dim
        groups = self.w_q.shape[0] // (members * head_dim)
        forms = routed_forms(form, x, groups=groups, experts=members, k=config.top_k, head_dim=head_dim)
        if reads or (form != "grouped" and forms is None):
            queries = self.heads_of(x, self.w_q).unflatten(2, (-1, self.members))  # [B, S, G, M, D]
        idx, gate, aux_loss = self.router(x, context, k=config.top_k, queries=queries if reads else None)
        if queries is None and forms is None:
            q = self.q_rope(project(x, self.w_q, idx, members, form).flatten(2, 3), context.rope)
        elif queries is None:
            routed = routed_choice(form, x, idx, members, head_dim=head_dim)
            assert routed is not None, "the same question as before"
            q = self.q_rope.of_routed(x, self.w_q, routed, context.rope)
        else:
            q = self.q_rope.of_chosen(queries, idx, context.rope)  # [B, S, G k, D], group-major as the core expects
        k, v = self.keys_and_values(x, context)  # [B, S, G, D]
        o = context.attend(q, k, v).unflatten(2, idx.shape[2:])  # [B, S, G, k, D]
        y = self.output(o, gate, self.shared_head(x, k, v, context))
        return AttentionOutput(y, summed(aux_loss, self.diversity_loss()))

    def forward_reference(self, x: Tensor, context: Context) -> AttentionOutput:
        """The same function, dense: attention of all H experts, of which each slot takes its own."""
        queries = self.heads_of(x, self.w_q).unflatten(2, (-1, self.members))
        idx, gate, aux_loss = self.router(x, context, k=self.config.top_k, queries=queries)
        k, v = self.keys_and_values(x, context)
        o = context.attend(self.q_rope(queries.flatten(2, 3), context.rope), k, v)
        o = o.unflatten(2, (-1, self.members))  # [B, S, G, M, D]
        o = o.gather(3, idx.unsqueeze(-1).expand(*idx.shape, o.shape[-1]))
        y = self.output(o, gate, self.shared_head(x, k, v, context))
        return AttentionOutput(y, summed(aux_loss, self.diversity_loss()))

    def output(self, o: Tensor, gate: Tensor, shared: Tensor | None) -> Tensor:
        """o [B, S, G, k, D] in the order of the slots, gate [B, S, G, k], shared [B, S, D] -> y [B, S, d]."""
        slots = o * gate.to(o.dtype).unsqueeze(-1) if self.config.variant == "weighted_concat" else o
        y = F.linear(slots.flatten(2), self.w_o)
        if self.config.mixes:
            weight = self.mixing_weights(gate).to(o.dtype).unsqueeze(-1)
            y = y + F.linear((o * weight).sum((2, 3)), self.w_o_mix)
        if shared is not None:
            mine = shared if self.ranks.count == 1 else shared.chunk(self.ranks.count, -1)[self.ranks.index]
            y = y + F.linear(mine, self.w_o_shared)
        return y

    def mixing_weights(self, gate: Tensor) -> Tensor:
        """p of the chosen experts [B, S, G, k] -> w, same shape; the sum over all groups, of all ranks, is 1."""
        total = self.ranks.sum(gate.sum((2, 3), keepdim=True))
        return gate / total.clamp_min(1e-9)  # noise in the choice can pick nothing but experts of vanishing p

    def shared_head(self, x: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor | None:
        """[B, S, D]; k, v [B, K, G, D] of all tokens x's may see."""
        if self.config.shared == "none":
            return None
        q = self.q_rope(self.heads_of(x, self.w_q_shared), context.rope)  # [B, S, 1, D]
        if self.config.shared == "dedicated":
            k = self.k_rope(self.heads_of(x, self.w_k_shared), context.rope)
            k, v = context.keys_and_values(k, self.heads_of(x, self.w_v_shared), part="shared")
        else:
            k, v = self._of_all_groups(k), self._of_all_groups(v)  # [B, K, 1, D]
        return context.attend(q, k, v).squeeze(2)

    def _of_all_groups(self, heads: Tensor) -> Tensor:
        """[B, K, G, D] -> [B, K, 1, D]; of rotated keys, whose mean is the rotated mean key."""
        if self.config.shared == "mean":
            return self.ranks.sum(heads.sum(2, keepdim=True)) / self.config.groups
        # Times 0 on the other ranks: a constant would have no gradient, and rank 0 would sum gradients alone.
        return self.ranks.sum(heads[:, :, :1] * (self.ranks.index == 0))
