"""SwitchHead."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from headway.model.base import AttentionConfig


class SwitchHeadConfig(AttentionConfig):
    """SwitchHead: n heads with dense queries and keys; values and outputs are mixtures of experts."""

    type: Literal["switchhead"] = "switchhead"
    kv_heads: int = Field(
        ge=1, description="n, heads; each has its own query, key and pools of value and output experts"
    )
    experts: int = Field(ge=1, description="E, value experts and output experts per head")
    top_k: int = Field(ge=1, description="value experts and output experts a token uses per head")
    router_init_std: float = Field(default=0.02, gt=0)

    @model_validator(mode="after")
    def _experts_suffice(self) -> Self:
        if self.top_k > self.experts:
            legal = "1" if self.experts == 1 else f"1 to {self.experts}"
            raise ValueError(
                f"top_k: {self.top_k} experts picked of {self.experts} per head; use top_k {legal}, or experts {self.top_k}"
            )
        return self
