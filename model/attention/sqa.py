"""Sparse query attention (Filipek, 2025, arXiv 2510.01817): GQA with fewer query heads than the dense baseline.

Legend: B batch, S sequence, d width, H query heads of the dense baseline, G KV heads (= groups), k=kept query heads per
group, D head size. The layer is GQA with kG query heads:

    y = W_O [o_1 .. o_kG],  o_h = softmax(q_h K_g^T / sqrt(D)) V_g,  g = floor(h / k),  W_O [d, kG D]

SQA is the static control of routed query heads: it costs as much as k of M heads per group, and has no router. The
published variants, for a baseline of 16 heads: SQA has 8 query and 4 KV heads (kv_heads 4, kept 2), symmetric sSQA 8
and 8 (kv_heads 8, kept 1), extreme xSQA 4 and 4 (kv_heads 4, kept 1).
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from headway.model.attention.gqa import DenseConfig
from headway.model.attention.grouped import check_groups


class SqaConfig(DenseConfig):
    """SQA: `kept` of the dense model's H/G query heads per KV head exist."""

    type: Literal["sqa"] = "sqa"
    crosses: ClassVar[bool] = True
    reads_layers: ClassVar[bool] = True
    heads: int = Field(ge=1, le=65_536, description="H, query heads of the dense baseline")
    kv_heads: int = Field(ge=1, description="G, KV heads")
    kept: int = Field(ge=1, description="query heads per KV head in this model, at most heads/kv_heads")

    @model_validator(mode="after")
    def _kept_at_most_heads_per_group(self) -> Self:
        check_groups(self.heads, self.kv_heads)
        per_group = self.heads // self.kv_heads
        if self.kept > per_group:
            raise ValueError(
                f"kept: {self.kept} is more than the {per_group} query heads per KV head "
                f"(heads {self.heads} / kv_heads {self.kv_heads}); "
                f"use kept {per_group}, or heads {self.kept * self.kv_heads}"
            )
        return self

    @property
    def groups(self) -> int:
        return self.kv_heads

    @property
    def query_heads(self) -> int:
        return self.kept * self.kv_heads
