"""Mixture of heads (MoH): each token uses all shared heads and k routed ones (Jin et al., 2024, arXiv 2410.11842).

Legend: B batch, S sequence, d width, H query heads, G KV heads (the source: G=H), D head size, s=shared_heads,
N=H-s routed heads, k=top_k. The first s heads are shared. Per token, with o_h as in (grouped) multi-head attention:

    r = router(x)                 N logits, fp32; one selection over all routed heads, independent of their KV heads
    C = top-k of r                selected heads
    [a, b] = softmax(W_A x)       weight of the shared and of the routed heads
    y = sum over h of g_h W_O[h] o_h

    form              g_h of a shared head        g_h of a routed head in C (others: 0)
    paper             a softmax(W_S x)_h          b softmax(r)_h
    code              2a s softmax(W_S x)_h       2b k softmax(r)_h / (sum over C of softmax(r))
    straight_through  1                           1, with the gradient of softmax(r)_h

`paper` is the published equation. `code` is what the authors' vision models compute (every factor is 1 at zero logits).
`straight_through` is their continued training of LLaMA3, whose router is `query_norm`. W_A exists only if there are
shared heads (otherwise b = 1, in `code` 2b = 1), and W_S only if there are at least two. The number of selected heads
per KV head differs by token, so the heads cannot be packed into slots. All H heads are computed, and those that are
not selected are multiplied by 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from headway.kernels.routing import GateName, router_logits
from headway.model.attention.grouped import GroupedConfig, GroupedQueryAttention, check_groups
from headway.model.balance import BalanceConfig
from headway.model.base import Attention, AttentionOutput, Context, Flops, Shard
from headway.model.k_schedule import KSchedule, all_k, check_k_schedule, check_k_schedule_of_run, k_after, staged
from headway.model.layers import parameter
from headway.model.router import AnyRouter, LinearRouterConfig, RoutingConfig, check_router, of_layer, summed

ROUTER = "router"
GATES: dict[str, GateName] = {"paper": "softmax", "code": "renorm", "straight_through": "straight_through"}
GATE_INIT_STD = 0.02
"""Initial standard deviation of W_A and W_S; equal to the router's default."""


class MohConfig(GroupedConfig):
    """MoH: each token uses all `shared_heads` and `top_k` of the other heads.

    The balancing loss is the published one: f.P with coefficient 0.01 and f not divided by k. The authors average it
    over layers, and the paper's equation omits the factor N; here losses are summed over layers.
    """

    type: Literal["moh"] = "moh"
    kv_heads: int = Field(ge=1, description="G, KV heads; equal to heads in the source's own models")
    shared_heads: int = Field(ge=0, description="s, the first heads, which every token uses")
    top_k: int | list[int] = Field(description="routed heads a token uses; a list: one number per layer")
    k_schedule: KSchedule = Field(
        default=[],
        description="more heads early in training: stages with their top_k, or a linear decrease from `start`; costs "
        "per token are those of the final top_k, costs of training count the stages",
    )
    form: Literal["paper", "code", "straight_through"] = Field(default="paper", description="factors on the heads")
    router: AnyRouter = Field(default=LinearRouterConfig(), description="computes the logits of the routed heads")
    balance: BalanceConfig = Field(
        default=BalanceConfig(f_p=0.01, f_p_convention="count"), description="load balancing of the routed heads"
    )

    @model_validator(mode="after")
    def _routing_is_possible(self) -> Self:
        check_groups(self.heads, self.kv_heads)
        if self.routed < 2:
            enough = -(-(self.shared_heads + 2) // self.kv_heads) * self.kv_heads
            fewer = f"shared_heads {self.heads - 2}" if self.heads > 1 else "type gqa"
            raise ValueError(
                f"shared_heads: {self.shared_heads} of {self.heads} heads leave {max(self.routed, 0)} to route, and "
                f"routing needs at least 2; use {fewer}, or heads {enough}"
            )
        for k in all_k(self.k_schedule, self.top_k):
            self._check_k(k)
        check_k_schedule(self.k_schedule, self.top_k)
        check_router(self.router, self.balance, gate="softmax", choice=True)
        return self

    def _check_k(self, k: int) -> None:
        if k < 1 or k > self.routed:
            enough = -(-(self.shared_heads + k) // self.kv_heads) * self.kv_heads
            legal = f"top_k 1 to {self.routed}, or heads {enough}" if k > 0 else f"top_k 1 or {self.routed}"
            raise ValueError(
                f"top_k: {k} heads selected of {self.routed} routed ones (heads {self.heads} - shared_heads "
                f"{self.shared_heads}); use {legal}"
            )
        if self.form == "code" and k == 1:
            raise ValueError(
                "form: code renormalizes over the selected heads; at top_k 1 the result is the constant 1, so the "
                "router would get no gradient from the task; use form paper or straight_through, or top_k 2"
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

    @property
    def groups(self) -> int:
        return self.kv_heads

    @property
    def routed(self) -> int:
        """N, heads that the router chooses from."""
        return self.heads - self.shared_heads

    @property
    def k(self) -> int:
        """Heads selected per token. The config must be that of one layer (`layer`)."""
        assert isinstance(self.top_k, int), "k differs by layer: ask the config of one layer"
        return self.top_k

    @property
    def active(self) -> int:
        """Heads with a nonzero factor for a token."""
        return self.shared_heads + self.k

    @property
    def shared_rows(self) -> int:
        """Rows of W_S. 0 for a single shared head, whose softmax would be the constant 1."""
        return self.shared_heads if self.form != "straight_through" and self.shared_heads > 1 else 0

    @property
    def stage_rows(self) -> int:
        """Rows of W_A: 2 if there are shared heads and the form weights them, else 0."""
        return 2 if self.form != "straight_through" and self.shared_heads else 0

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return MixtureOfHeads(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    def num_params(self, *, width: int) -> int:
        """Those of GQA, plus the router (linear: dN), plus ds if s > 1, plus 2d. `straight_through` omits ds and 2d."""
        router = self.router.num_params(width=width, groups=1, experts=self.routed)
        return super().num_params(width=width) + router + width * (self.shared_rows + self.stage_rows)

    def flops_per_token(self, *, width: int, seq_len: int) -> Flops:
        """Executed: GQA and the router. Useful: queries, core and W_O of the s+k active heads only.

        Keys and values count in full, because a later token may select any head. So do the queries that a query-norm
        router reads.
        """
        dense = super().flops_per_token(width=width, seq_len=seq_len).executed
        dense += self.router.flops_per_token(width=width, groups=1, experts=self.routed)
        dense += 2 * width * (self.shared_rows + self.stage_rows)
        idle = (self.heads - self.active) / self.heads
        matrices = 1 if self.router.reads_queries else 2
        unused = matrices * 2 * width * self.heads * self.head_dim + self.core_flops_per_token(seq_len=seq_len)
        return Flops(useful=dense - idle * unused, executed=dense)

    def useful_core_flops_per_token(self, *, seq_len: int) -> float:
        return self.core_flops_per_token(seq_len=seq_len) * self.active / self.heads

    def shards(self) -> dict[str, Shard]:
        """Each rank owns whole KV heads with their query heads. The router selects over all heads and is replicated.

        The layer is not sharded in two cases. A query-norm router reads the queries of all ranks' heads. Router buffers
        (fixed or hashed rows, loss-free bias) can be sharded by group only, and MoH has a single group.
        """
        if self.router.shards() and not self.balance.loss_free_rate:
            return super().shards()
        return {name: Shard(shard.dim, 1) for name, shard in super().shards().items()}


class MixtureOfHeads(GroupedQueryAttention):
    """The MoH layer. Parameters: those of GQA, a `router`, `w_shared` [s, d] (W_S) and `w_stage` [2, d] (W_A).

    `ranks` is set where tensor parallelism shards the heads.
    """

    gate_matrices = ("w_shared", "w_stage")

    def __init__(self, config: MohConfig, *, width: int, layers: int, init_std: float, norm_eps: float) -> None:
        super().__init__(config, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)
        self.config, self.top_k = config, config.k
        routing = RoutingConfig(gate=GATES[config.form], balance=config.balance, router=config.router)
        self.router = config.router.build(routing, width=width, groups=1, experts=config.routed)
        if config.shared_rows:
            self.w_shared = parameter(config.shared_rows, width)
            self.init_stds["w_shared"] = GATE_INIT_STD
        if config.stage_rows:
            self.w_stage = parameter(config.stage_rows, width)
            self.init_stds["w_stage"] = GATE_INIT_STD

    def forward(self, x: Tensor, context: Context) -> AttentionOutput:
        q = self.heads_of(x, self.w_q)  # [B, S, H, D]
        factors, aux_loss = self.factors(x, context, q)
        own = q.shape[2]  # H, or this rank's part
        factors = factors[..., self.ranks.index * own : (self.ranks.index + 1) * own]
        k, v = self.keys_and_values(x, context)  # [B, S, G, D]
        o = context.attend(self.q_rope(q, context.rope), k, v)  # [B, S, H, D]
        o = o * factors.to(o.dtype).unsqueeze(-1)
        return AttentionOutput(F.linear(o.flatten(2), self.w_o), summed(aux_loss, self.diversity_loss()))

    def factors(self, x: Tensor, context: Context, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, S, d], q [B, S, H, D] before RoPE -> factors g [B, S, H], fp32 or wider, and the router's loss."""
        config = self.config
        routing = self.router(x, context, k=self.top_k, queries=q[:, :, None, config.shared_heads :])
        idx, gate = routing.idx.squeeze(2), routing.gate.squeeze(2)  # [B, S, k]
        if config.form == "code":
            gate = self.top_k * gate
        shared = gate.new_ones(*gate.shape[:2], config.shared_heads)
        if config.shared_rows:
            shared = torch.softmax(router_logits(x, self.w_shared, 1).squeeze(2), -1)
            if config.form == "code":
                shared = config.shared_heads * shared
        if config.stage_rows:
            stages = torch.softmax(router_logits(x, self.w_stage, 1), -1)  # [B, S, 1, 2]
            if config.form == "code":
                stages = 2 * stages
            shared, gate = shared * stages[..., 0], gate * stages[..., 1]
        routed = gate.new_zeros(*gate.shape[:2], config.routed).scatter(-1, idx, gate)
        return torch.cat([shared, routed], -1), routing.aux_loss

    def before_step(self, tokens: int) -> None:
        """Set k to that of the current stage of `k_schedule`."""
        self.top_k = k_after(self.config.k_schedule, self.config.k, tokens)
