"""Grouped-query attention (Ainslie et al., 2023, arXiv 2305.13245) and its two ends, MHA and MQA.

Legend: B batch, S sequence, d width, H query heads, G KV heads (= groups), M=H/G query heads per group, D head size.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from headway.model.base import Attention, AttentionConfig, AttentionOutput, Flops, Shard


class GroupedConfig(AttentionConfig):
    """What every mechanism with groups of query heads over shared keys and values has."""

    heads: int = Field(ge=1, description="H, query heads")

    @property
    @abstractmethod
    def groups(self) -> int:
        """G, KV heads."""
        raise NotImplementedError

    @property
    def heads_per_group(self) -> int:
        """M."""
        return self.heads // self.groups


def check_groups(heads: int, kv_heads: int) -> None:
    """Raises ValueError unless the query heads divide into `kv_heads` equal groups."""
    if heads % kv_heads:
        legal = [g for g in range(1, heads + 1) if heads % g == 0]
        below, above = (
            max((g for g in legal if g < kv_heads), default=1),
            min((g for g in legal if g > kv_heads), default=heads),
        )
        raise ValueError(
            f"kv_heads: {heads} query heads do not divide into {kv_heads} equal groups; "
            f"use kv_heads {below} or {above}, or heads {-(-heads // kv_heads) * kv_heads}"
        )


class GqaConfig(GroupedConfig):
    """GQA: G KV heads, each shared by H/G query heads."""

    type: Literal["gqa"] = "gqa"
    kv_heads: int = Field(ge=1, description="G, KV heads; each serves heads/kv_heads query heads")

    @model_validator(mode="after")
    def _groups_are_equal(self) -> Self:
        check_groups(self.heads, self.kv_heads)
        return self

    @property
    def groups(self) -> int:
        return self.kv_heads


class MhaConfig(GroupedConfig):
    """Multi-head attention: GQA with one query head per KV head."""

    type: Literal["mha"] = "mha"

    @property
    def groups(self) -> int:
        return self.heads


class MqaConfig(GroupedConfig):
    """Multi-query attention: GQA with a single KV head."""

    type: Literal["mqa"] = "mqa"

    @property
    def groups(self) -> int:
        return 1
