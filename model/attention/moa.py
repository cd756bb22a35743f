"""Mixture of attention heads (MoA): each token selects k of E query heads, which share one key and value head
(Zhang et al., 2022, arXiv 2210.05144).

Legend: B batch, S sequence, d width, E experts (a query head and its slice of W_O), k=top_k, D head size. Per token:

    r = W_R x,  p = softmax(r)                    E logits, fp32
    C = top-k of r                                selected experts
    w_e = p_e / stopgrad(sum over C of p)         as in the paper; the authors' code omits the division
    y = sum over e in C of w_e W_O[e] softmax(q_e K^T / sqrt(D)) V

MoA is routed GQA with one group. Module, cost and diagnostics are those of `headway.model.attention.rgqa`; the gates
and the losses are the published ones. Tensor parallelism does not shard it, as it has a single KV head.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from headway.kernels.experts import Projections
from headway.model.attention.grouped import GroupedConfig
from headway.model.attention.rgqa import RgqaConfig, RoutedGroupedQueryAttention
from headway.model.balance import BalanceConfig
from headway.model.base import Attention, Flops, Shard
from headway.model.router import AnyRouter, LinearRouterConfig, check_router


class MoaConfig(GroupedConfig):
    """MoA: `heads` query experts with an output projection each, over a single key and value head.

    The default balancing losses are those of the authors' WMT14 run: f.P 0.01 and z-loss 0.001. Their code also has a
    CV^2 loss, whose coefficient is 0 in that run. The authors initialize the router to zero. This is not allowed here:
    all logits would tie, and every token would use the first k experts until the gradients break the tie.
    """

    type: Literal["moa"] = "moa"
    top_k: int = Field(ge=1, description="k, experts a token uses")
    gate: Literal["detached_renorm", "softmax"] = Field(
        default="detached_renorm",
        description="factor on a selected expert; detached_renorm: the paper; softmax: the authors' code",
    )
    router: AnyRouter = Field(default=LinearRouterConfig(), description="computes the routing logits")
    projections: Projections = Field(
        default="dense",
        description="dense: project all heads, then select; grouped: one matmul per head, over the tokens that "
        "selected it; routed: the grouped matmuls in one GPU kernel; auto: routed where it is expected to be faster",
    )
    balance: BalanceConfig = Field(
        default=BalanceConfig(f_p=0.01, z=0.001), description="load balancing of the experts"
    )

    @model_validator(mode="after")
    def _experts_suffice(self) -> Self:
        if self.heads < 2:
            raise ValueError(
                f"heads: {self.heads} expert leaves the router nothing to choose, and its gate is the constant 1; "
                "use heads 2, or type mqa"
            )
        if self.top_k > self.heads:
            raise ValueError(
                f"top_k: {self.top_k} experts selected of {self.heads}; "
                f"use top_k 1 to {self.heads}, or heads {self.top_k}"
            )
        check_router(self.router, self.balance, gate=self.gate, choice=True)
        return self

    @property
    def rgqa(self) -> RgqaConfig:
        """The equivalent R-GQA config, with one group."""
        shared = {name: getattr(self, name) for name in type(self).model_fields if name != "type"}
        return RgqaConfig(kv_heads=1, **shared)

    @property
    def groups(self) -> int:
        return 1

    @property
    def score_maps(self) -> int:
        return self.top_k

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return RoutedGroupedQueryAttention(self.rgqa, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    def num_params(self, *, width: int) -> int:
        """2dED + 2dD + dE."""
        return self.rgqa.num_params(width=width)

    def flops_per_token(self, *, width: int, seq_len: int) -> Flops:
        """Useful: 4dkD + 4dD + 2dE, and the core for k heads. Executed: queries and outputs of all E experts."""
        return self.rgqa.flops_per_token(width=width, seq_len=seq_len)

    def shards(self) -> dict[str, Shard]:
        """One unit per parameter: nothing is sharded."""
        return self.rgqa.shards()
