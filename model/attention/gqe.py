"""Grouped Query Experts (GQE): routed query heads with one output slice per slot, a weighted slot and a shared head.

Legend: B batch, S sequence, d width, H query experts (= query heads), G groups (= KV heads), M=H/G experts per group,
k=top_k, D head size. For each token, in group g:

    p = softmax(r), r = router(x)             [G, M]     over the group's M experts, before the selection
    C = top-k of p                            [G, k]     selected experts; slot j holds the j-th best one, C_j
    o_m = softmax(q_m K_g^T / sqrt(D)) V_g    [G, k, D]  for m in C only
    w_m = p_m / (sum of p over the selected experts of all groups)
    mix = sum over g, m in C of w_m o_m       [D]        the weighted slot
    s   = head with its own query, always on  [D]        the shared head; keys and values: see `shared_head`
    y   = sum over g, j of W_O[g, j] o_(C_j) + W_mix mix + W_shared s

The slots are not scaled before W_O, so the task loss reaches the router through `mix` only. W_O has slices per slot,
not per expert. Experts that use the same slot therefore have separate queries but the same output projection, and the
order of the slots matters for k > 1. Source: Tripathi and Kumar, 2026, arXiv 2606.20945v2, read through the authors'
code and two write-ups.
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
    """GQE: every token selects `top_k` query experts in each group. Optionally, one shared head serves all tokens."""

    type: Literal["gqe"] = "gqe"
    kv_heads: int = Field(ge=1, description="G, KV heads (= groups); each has heads/kv_heads query experts")
    top_k: int = Field(ge=1, description="k, query experts a token selects in each group")
    variant: Literal["gqe", "hard_concat", "weighted_concat"] = Field(
        default="gqe",
        description="gqe: unscaled slots and the weighted slot; hard_concat: unscaled slots only; "
        "weighted_concat: only the slots, each times its p",
    )
    shared_head: Literal["published", "none", "mean", "group0", "dedicated"] = Field(
        default="published",
        description="keys and values of the shared head: mean over groups, those of group 0, or its own (dedicated); "
        "published: mean in gqe, none in the other variants",
    )
    router: AnyRouter = Field(default=LinearRouterConfig(), description="computes the routing logits")
    projections: Projections = Field(
        default="dense",
        description="of the queries; dense: project all heads, then select; grouped: one matmul per head, over the "
        "tokens that selected it; routed: the grouped matmuls in one GPU kernel; auto: routed where it is expected to "
        "be faster",
    )
    balance: BalanceConfig = Field(
        default=BalanceConfig(f_p=0.01, f_p_convention="count"), description="load balancing of the experts"
    )

    @model_validator(mode="after")
    def _router_has_a_choice(self) -> Self:
        check_groups(self.heads, self.kv_heads)
        members = self.heads_per_group
        if members == 1:
            raise ValueError(
                f"heads: {self.heads} in {self.kv_heads} groups give the router one expert per group and no gradient; "
                f"use heads {2 * self.kv_heads}, or type mha"
            )
        gate = "hard" if self.variant == "hard_concat" else "softmax"
        choice = self.top_k < members
        check_router(self.router, self.balance, gate=gate, choice=choice, hard="variant: hard_concat")
        if self.top_k > members:
            legal = "1" if members == 1 else f"1 to {members}"
            raise ValueError(
                f"top_k: {self.top_k} experts selected of {members} per group (heads {self.heads} / kv_heads "
                f"{self.kv_heads}); use top_k {legal}, or heads {self.kv_heads * self.top_k}"
            )
        if self.variant == "gqe" and self.kv_heads * self.top_k == 1:
            raise ValueError(
                "variant: gqe normalizes the weights of the selected experts over all groups, and kv_heads 1 with "
                "top_k 1 selects one, of constant weight 1, so the router would get no gradient from the task; "
                "use variant weighted_concat, or top_k 2"
            )
        return self

    @property
    def groups(self) -> int:
        return self.kv_heads

    @property
    def slots(self) -> int:
        """k G, slots of selected experts."""
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
        """The core runs once for the groups and, on every rank, once for the shared head."""
        groups = super().attended_heads(tensor=tensor)
        return groups if self.shared == "none" else (*groups, 1)

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return GroupedQueryExperts(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    @property
    def _extra(self) -> int:
        """D x d matrices other than the groups' queries, keys and values and the slots' W_O. All of them are dense."""
        shared_query_and_output = 2 * (self.shared != "none")
        shared_keys_and_values = 2 * (self.shared == "dedicated")
        return self.mixes + shared_query_and_output + shared_keys_and_values

    def num_params(self, *, width: int) -> int:
        """d(H+1)D + 2dGD + (kG+2)Dd, plus the router (linear: dH). A dedicated shared head adds 2dD."""
        matrices = self.heads + 2 * self.groups + self.slots + self._extra
        gains = 2 * self.head_dim if self.qk_norm else 0
        router = self.router.num_params(width=width, groups=self.groups, experts=self.heads_per_group)
        return width * matrices * self.head_dim + gains + router

    def flops_per_token(self, *, width: int, seq_len: int) -> Flops:
        """Useful: 2d(kG+1)D + 2(kG+2)Dd + 4dGD, plus router and core. Executed if `dense`: queries of all H experts."""
        per_head = 2 * width * self.head_dim
        rest = per_head * (2 * self.groups + self.slots + self._extra) + self.core_flops_per_token(seq_len=seq_len)
        rest += self.router.flops_per_token(width=width, groups=self.groups, experts=self.heads_per_group)
        needed = self.heads if self.router.reads_queries else self.slots
        computed = needed if self.projections == "grouped" else self.heads
        return Flops(useful=rest + per_head * needed, executed=rest + per_head * computed)

    def kv_bytes_per_token(self, *, seq_len: int, bytes_per_element: int) -> float:
        """2GD elements as in GQA (a mean over groups uses the cached keys). A dedicated shared head adds 2D."""
        return 2 * (self.groups + (self.shared == "dedicated")) * self.head_dim * bytes_per_element

    def shards(self) -> dict[str, Shard]:
        """Each rank owns whole groups with their slots and router rows, and some channels of the shared head's output.

        Two kinds of parameters are replicated. w_o_mix is linear, so each rank applies it to its groups' part of `mix`.
        The shared head's query (and dedicated keys and values) are computed in full on every rank, which then projects
        its own channels. Two tensors are all-reduced by `Ranks.sum`: the sum of the selected p, one number per token;
        and keys and values of a shared head that reads them from the groups, 2D per token.
        """
        routers = {f"{ROUTER}.{name}": Shard(0, self.groups) for name in self.router.shards()}
        shared = {"w_o_shared": Shard(1, self.head_dim)} if self.shared != "none" else {}
        return {**super().shards(), **routers, **shared}


class GroupedQueryExperts(GroupedQueryAttention):
    """The GQE layer. Parameters: w_q, w_k and w_v of GQA, a `router`, and the published W_O in parts, in its order.

    w_o [d, k G D]: slots, group-major, best expert of a group first. w_o_mix [d, D]: the weighted slot. w_o_shared
    [d, D]: the shared head. Its query is w_q_shared [D, d]; dedicated keys and values are w_k_shared, w_v_shared
    [D, d]. `ranks` is set where tensor parallelism shards the groups.
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
            assert routed is not None, "routed_choice and routed_forms apply the same condition"
            q = self.q_rope.of_routed(x, self.w_q, routed, context.rope)
        else:
            q = self.q_rope.of_chosen(queries, idx, context.rope)  # [B, S, G k, D], group-major as the core expects
        k, v = self.keys_and_values(x, context)  # [B, S, G, D]
        o = context.attend(q, k, v).unflatten(2, idx.shape[2:])  # [B, S, G, k, D]
        y = self.output(o, gate, self.shared_head(x, k, v, context))
        return AttentionOutput(y, summed(aux_loss, self.diversity_loss()))

    def forward_reference(self, x: Tensor, context: Context) -> AttentionOutput:
        """Dense reference of `forward`: computes attention for all H experts, then selects those of the slots."""
        queries = self.heads_of(x, self.w_q).unflatten(2, (-1, self.members))
        idx, gate, aux_loss = self.router(x, context, k=self.config.top_k, queries=queries)
        k, v = self.keys_and_values(x, context)
        o = context.attend(self.q_rope(queries.flatten(2, 3), context.rope), k, v)
        o = o.unflatten(2, (-1, self.members))  # [B, S, G, M, D]
        o = o.gather(3, idx.unsqueeze(-1).expand(*idx.shape, o.shape[-1]))
        y = self.output(o, gate, self.shared_head(x, k, v, context))
        return AttentionOutput(y, summed(aux_loss, self.diversity_loss()))

    def output(self, o: Tensor, gate: Tensor, shared: Tensor | None) -> Tensor:
        """Slot outputs o [B, S, G, k, D], gate [B, S, G, k], shared [B, S, D] -> y [B, S, d]."""
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
        """p of the selected experts [B, S, G, k] -> w, same shape, which sums to 1 over the groups of all ranks."""
        total = self.ranks.sum(gate.sum((2, 3), keepdim=True))
        return gate / total.clamp_min(1e-9)  # with router noise, all selected experts may have a p near 0

    def shared_head(self, x: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor | None:
        """Output of the shared head [B, S, D]; k, v [B, K, G, D] are those of the K tokens that x attends to."""
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
        """Mean over groups, or group 0: [B, K, G, D] -> [B, K, 1, D].

        Keys are already rotated. RoPE is linear, so their mean equals the rotated mean.
        """
        if self.config.shared == "mean":
            return self.ranks.sum(heads.sum(2, keepdim=True)) / self.config.groups
        # Multiply by 0 on the other ranks instead of using a constant. A constant has no gradient, so the backward
        # all-reduce would run on rank 0 only.
        return self.ranks.sum(heads[:, :, :1] * (self.ranks.index == 0))
