"""Mixture of attention heads (MoA): a token picks k of E query and output projections over one key and value head
(Zhang et al., 2022, arXiv 2210.05144).

Legend: B batch, S sequence, d width, E experts (the query heads), k=top_k, D head size. Per token:

    r = W_R x,  p = softmax(r)                    E logits, fp32
    K = top-k of r
    w_e = p_e / stopgrad(sum over K of p)         the paper; the authors' code leaves the division out
    y = sum over e in K of w_e W_O[e] softmax(q_e K^T / sqrt(D)) V

It is routed GQA with one group: module, cost and diagnostics are `headway.model.attention.rgqa`'s, under this name,
with the published gates and losses. Under tensor parallelism it stays whole, as any mechanism with one KV head.
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

    The balancing is that of the authors' WMT14 run: f.P 0.01 and z-loss 0.001; the code has a CV^2 loss, which that
    run leaves at 0. Their routers start at zero, which is refused here: all logits would tie, and every token would
    use the first k experts until a gradient happens to part them.
    """

    type: Literal["moa"] = "moa"
    top_k: int = Field(ge=1, description="k, experts a token uses")
    gate: Literal["detached_renorm", "softmax"] = Field(
        default="detached_renorm", description="factor on a picked expert; the paper's, or that of the authors' code"
    )
    router: AnyRouter = Field(default=LinearRouterConfig(), description="where the logits come from")
    projections: Projections = Field(
        default="dense",
        description="dense: all heads, then the chosen ones; grouped: one product per head; routed: that in one kernel "
        "on a GPU; auto: routed where it is expected to be faster",
    )
    balance: BalanceConfig = Field(default=BalanceConfig(f_p=0.01, z=0.001), description="what keeps experts in use")

    @model_validator(mode="after")
    def _experts_suffice(self) -> Self:
        if self.heads < 2:
            raise ValueError(
                f"heads: {self.heads} expert leaves the router nothing to choose, and its gate is the constant 1; "
                "use heads 2, or type mqa"
            )
        if self.top_k > self.heads:
            raise ValueError(
                f"top_k: {self.top_k} experts picked of {self.heads}; "
                f"use top_k 1 to {self.heads}, or heads {self.top_k}"
            )
        check_router(self.router, self.balance, gate=self.gate, choice=True)
        return self

    @property
    def rgqa(self) -> RgqaConfig:
        """The same mechanism under its general name."""
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
        """Useful: 4dkD + 4dD + 2dE and the core of k maps; executed: queries and outputs of all E experts."""
        return self.rgqa.flops_per_token(width=width, seq_len=seq_len)

    def shards(self) -> dict[str, Shard]:
        """One whole piece each."""
        return self.rgqa.shards()
