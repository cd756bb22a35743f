"""GQA whose groups grow and shrink in training: query heads move to the KV heads with the stronger keys.

A causal form of key-driven grouping. KDGQA and DGQA (Khan et al., 2024, arXiv 2408.08454, made for images) allot the
query heads in every forward pass, from the norms of the keys of the whole batch and sequence: a token would see later
ones and other sequences, and generation could not repeat training. Here the allocation is a saved vector of integers,
the same for all tokens and ranks, that changes between optimizer steps only. This form is a proposal of this project.

Legend: B batch, S sequence, H query heads, G KV heads (= groups), D head size. With a_g >= 1 query heads in group g,
consecutive, and a_1 + .. + a_G = H, the layer is GQA with those group sizes. In training, per layer and step:

    n_g = mean over the tokens of the global batch of |W_K[g] x|^2       the keys before QK-norm, which would even them
    e_g = beta e_g + (1 - beta) n_g                                      from e_g = n_g at the first step
    a   = largest-remainder rounding of H e_g / sum e, each at least 1   every N steps

A change re-labels which KV head a query head reads; W_Q and W_O stay. From `freeze_after_tokens` on, and at inference,
a stays. Parameters, FLOPs and KV cache are GQA's.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from headway.model.attention.gqa import DenseAttention, DenseConfig
from headway.model.attention.grouped import group_of_head, uneven_orthogonality_loss
from headway.model.base import Attention, Context, HeadPool, Shard
from headway.model.layers import FixedBuffers


class DynamicGqaConfig(DenseConfig):
    """GQA with group sizes that follow the power of the keys during training."""

    type: Literal["dynamic_gqa"] = "dynamic_gqa"
    kv_heads: int = Field(ge=1, description="G, KV heads; each always has one query head at least")
    update_every_steps: int = Field(default=300, ge=1, description="optimizer steps between changes of the allocation")
    ema_decay: float = Field(default=0.99, ge=0, lt=1, description="beta, of the mean key power over steps")
    freeze_after_tokens: int = Field(
        ge=0, description="training tokens after which the allocation stays; 80 % of train.tokens is proposed"
    )

    @model_validator(mode="after")
    def _heads_can_move(self) -> Self:
        if self.heads < self.kv_heads:
            raise ValueError(
                f"kv_heads: {self.kv_heads} KV heads need one query head each, and there are {self.heads}; "
                f"use kv_heads {self.heads}, or heads {self.kv_heads}"
            )
        for name, entries in (("windows", [self.windows]), ("window_pattern", self.window_pattern)):
            if any(isinstance(entry, list) for entry in entries):
                raise ValueError(
                    f"{name}: a window per KV head would let the cost change as query heads move between them; "
                    "use one integer per layer, or type gqa"
                )
        return self

    def check_run(self, *, seq_len: int, tokens: int, tokens_per_step: int) -> None:
        super().check_run(seq_len=seq_len, tokens=tokens, tokens_per_step=tokens_per_step)
        if self.freeze_after_tokens > tokens:
            raise ValueError(
                f"attention.freeze_after_tokens: {self.freeze_after_tokens} comes after the end of training, so query "
                f"heads would move up to its last step; use {tokens * 4 // 5} (80 %), or train.tokens "
                f"{self.freeze_after_tokens * 5 // 4}"
            )

    @property
    def groups(self) -> int:
        return self.kv_heads

    @property
    def sizes(self) -> list[int]:
        """At the start: as even as can be."""
        return allocate([1.0] * self.groups, self.heads)

    def attended_heads(self, *, tensor: int = 1) -> tuple[int, ...]:
        """Each query head has a copy of its KV head; never cut."""
        return (self.heads // tensor,)

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return DynamicGroupedQueryAttention(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    def shards(self) -> dict[str, Shard]:
        """One piece: a query head may move to any KV head."""
        return {name: Shard(shard.dim, 1) for name, shard in super().shards().items()}


class DynamicGroupedQueryAttention(FixedBuffers, DenseAttention):
    """Buffers: `allocation` [G] int64, `key_power` [G] fp32 (e), `steps` (seen by e)."""

    allocation: Tensor
    key_power: Tensor
    steps: Tensor

    def __init__(self, config: DynamicGqaConfig, *, width: int, layers: int, init_std: float, norm_eps: float) -> None:
        super().__init__(config, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)
        self.config, self.frozen = config, False
        self.register_buffer("allocation", torch.tensor(config.sizes))
        self.register_buffer("key_power", torch.zeros(config.groups))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._sums: dict[str, Tensor] = {}

    def attend(self, q: Tensor, x: Tensor, context: Context) -> Tensor:
        k = self.heads_of(x, self.w_k)  # [B, S, G, D]
        if self.training and not self.frozen and context.counts:
            self._count(k.detach())
        k, v = self.k_rope(k, context.rope), self.heads_of(x, self.w_v)
        k, v = context.keys_and_values(k, v, window=self.windows[0])
        group_of = group_of_head(self.allocation, q.shape[2])
        return context.attend(q, k[:, :, group_of], v[:, :, group_of], window=self.windows[0])

    def diversity_loss(self) -> Tensor | None:
        if not self.orthogonality or not self.training:
            return None
        return self.orthogonality * uneven_orthogonality_loss(self.w_q, self.allocation, head_dim=self.head_dim)

    def pool(self, x: Tensor, context: Context) -> HeadPool | None:
        """None: groups differ in size."""
        return None

    def _count(self, k: Tensor) -> None:
        power = torch.linalg.vector_norm(k, dim=(0, 1, 3), dtype=torch.promote_types(k.dtype, torch.float32)).square()
        sums = {"key_power": power, "tokens": power.new_full((1,), k.shape[0] * k.shape[1])}
        self._sums = {name: value + self._sums[name] if self._sums else value for name, value in sums.items()}

    def step_sums(self) -> dict[str, Tensor]:
        return self._sums

    def reset_router_stats(self) -> None:
        super().reset_router_stats()
        self._sums = {}

    def before_step(self, tokens: int) -> None:
        self.frozen = tokens >= self.config.freeze_after_tokens

    @torch.no_grad()
    def after_step(self, global_load: dict[str, Tensor]) -> None:
        if not global_load:  # frozen: nothing was counted
            return
        mean = (global_load["key_power"] / global_load["tokens"]).to(self.key_power)
        done = int(self.steps)
        decay = self.config.ema_decay if done else 0.0
        self.key_power.mul_(decay).add_(mean, alpha=1 - decay)
        self.steps += 1
        if (done + 1) % self.config.update_every_steps == 0:
            power = self.key_power.tolist()
            if math.isfinite(sum(power)):
                self.allocation.copy_(torch.tensor(allocate(power, self.config.heads)))


def allocate(weights: list[float], heads: int) -> list[int]:
    """Heads per group in proportion to finite `weights` [G] >= 0, each at least 1, by largest remainder.

    Groups that are due less than one head get one, and the others share the rest in proportion; ties go to the lower
    index, and weights that are all 0 count as equal.
    """
    free = list(range(len(weights)))
    while True:
        left, total = heads - (len(weights) - len(free)), sum(weights[g] for g in free)
        due = {g: left * weights[g] / total if total > 0 else left / len(free) for g in free}
        enough = [g for g in free if due[g] >= 1]
        if len(enough) == len(free):
            break
        free = enough
    sizes = [int(due.get(g, 1)) for g in range(len(weights))]
    by_remainder = sorted(free, key=lambda g: (sizes[g] - due[g], g))
    for g in by_remainder[: heads - sum(sizes)]:
        sizes[g] += 1
    return sizes
