"""Routed GQA."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from headway.model.attention.gqa import GroupedConfig, check_groups
from headway.model.base import GateName


class RgqaConfig(GroupedConfig):
    """Routed GQA: every token picks `top_k` of the query heads of each group."""

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
        default="sequence", description="over which tokens f and P are taken before their product"
    )
    bias_rate: float = Field(default=1e-3, gt=0, description="loss_free: change of a head's bias per step")
    router_init_std: float = Field(default=0.02, gt=0)

    @model_validator(mode="after")
    def _routing_is_possible(self) -> Self:
        check_groups(self.heads, self.kv_heads)
        if self.routed < 1:
            raise ValueError(
                f"always_on: {self.always_on} of the {self.heads_per_group} query heads of a group leave none to route; "
                f"use always_on {self.heads_per_group - 1} or less, or more heads per group"
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
        """Query heads per group among which the router picks, M - always_on."""
        return self.heads_per_group - self.always_on

    @property
    def slots(self) -> int:
        """Query heads computed per group and token."""
        return self.always_on + self.top_k
