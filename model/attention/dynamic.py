"""Dynamic GQA: group sizes change during training, and query heads move to the KV heads with the largest keys.

This is a causal variant of key-driven grouping, proposed by this project. KDGQA and DGQA (Khan et al., 2024, arXiv
2408.08454, for images) allocate the query heads in every forward pass, from key norms over the whole batch and
sequence. In a language model, a token would then depend on later tokens and on other sequences, and generation could
not reproduce training. Here the allocation is a vector of integers, saved in checkpoints. It is the same for all
tokens and ranks, and it changes only between optimizer steps.

Legend: B batch, S sequence, H query heads, G KV heads (= groups), D head size. With a_g >= 1 query heads in group g,
consecutive, and a_1 + .. + a_G = H, the layer is GQA with those group sizes. In training, per layer and step:

    n_g = mean over the tokens of the global batch of |K_g|^2            before QK-norm, which would equalize the norms;
                                                                         K_g = W_K[g] x, plus b_K[g] with `biases`
    e_g = beta e_g + (1 - beta) n_g                                      EMA; e_g = n_g at the first step
    a   = largest-remainder rounding of H e_g / sum e, each at least 1   every `update_every_steps` steps

An update changes which KV head a query head reads; W_Q and W_O are unchanged. After `freeze_after_tokens`, and at
inference, a is constant. Parameters, FLOPs and KV cache equal those of GQA.
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
    """GQA whose group sizes follow the mean squared key norm (key power) during training."""

    type: Literal["dynamic_gqa"] = "dynamic_gqa"
    kv_heads: int = Field(ge=1, description="G, KV heads; each always has at least one query head")
    update_every_steps: int = Field(default=300, ge=1, description="optimizer steps between updates of the allocation")
    ema_decay: float = Field(default=0.99, ge=0, lt=1, description="beta, decay of the EMA of the key power")
    freeze_after_tokens: int = Field(
        ge=0, description="training tokens after which the allocation is constant; 80 % of train.tokens is recommended"
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
                    f"{name}: with a window per KV head, the cost would change as query heads move between KV heads; "
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
        """Initial group sizes, as equal as possible."""
        return allocate([1.0] * self.groups, self.heads)

    def attended_heads(self, *, tensor: int = 1) -> tuple[int, ...]:
        """One KV head per query head: keys and values are copied. The layer is never sharded."""
        return (self.heads // tensor,)

    @property
    def relative_form(self) -> None:
        """None: heads change their group, and position keys belong to groups."""
        return None

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return DynamicGroupedQueryAttention(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    def shards(self) -> dict[str, Shard]:
        """One unit per parameter (not sharded), because a query head may move to any KV head."""
        return {name: Shard(shard.dim, 1) for name, shard in super().shards().items()}


class DynamicGroupedQueryAttention(FixedBuffers, DenseAttention):
    """Buffers: `allocation` [G] int64 (a), `key_power` [G] fp32 (e), `steps` int64 (number of updates of e)."""

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
        k = self.heads_of(x, self.w_k, self.b_k)  # [B, S, G, D]
        if self.training and not self.frozen and context.counts:
            self._count(k.detach())
        k, v = self.k_rope(k, context.rope), self.heads_of(x, self.w_v, self.b_v)
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
    """Heads per group in proportion to `weights` [G] (finite, >= 0), at least 1 each, by the largest-remainder method.

    A group whose proportional part is below one head gets one head; the other groups share the rest in proportion. Ties
    go to the lower index. Weights that are all 0 count as equal.
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
