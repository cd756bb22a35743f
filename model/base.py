"""What every layer shares: strict configs, the attention interface, cost and sharding records.

Legend: B batch, S sequence, T=B*S tokens, d width, H query heads in the pool, G KV heads (= groups), M=H/G query heads
per group, k slots (query heads active per group and token), D head size, E experts, F FFN width, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from headway.kernels.attention import core


class StrictConfig(BaseModel):
    """Frozen, keyword-only, refuses unknown keys and silent type changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Forward FLOPs per token (2 per multiply-accumulate); training costs three times as much.

    `useful` counts what the mathematics needs (only selected heads, causal half of the scores); `executed` what this
    implementation computes (a dense projection of all heads, say). Norms, RoPE, softmax and top-k are not counted.
    """

    useful: float
    executed: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(useful=self.useful + other.useful, executed=self.executed + other.executed)


class Shard(NamedTuple):
    """How one parameter is cut over tensor-parallel ranks: along `dim`, in `units` equal whole pieces."""

    dim: int
    units: int


@dataclass(frozen=True, kw_only=True)
class RouterDetail:
    """Sums over tokens a router saw in training; those of micro-batches, steps and ranks add up.

    Top-1 margin: best logit minus second-best, whatever a bias or noise made of them; 0 where there is one expert.
    `headway.model.router_meter` makes figures of the sums. Where ranks share each sequence, a rank does not see the
    token before the first of its part: `switches` and `followers` leave that pair out, and their ratio stays right.
    """

    tokens: Tensor  # []: tokens measured
    entropy: Tensor  # [G]: entropy (nats) of the softmax of the logits
    choices: Tensor  # [G]: experts chosen, k per token
    gate: Tensor  # [G]: gates of the chosen experts
    top1_margin: Tensor  # [G]
    close: Tensor  # [G]: tokens whose top-1 margin is below 0.1
    switches: Tensor  # [G]: chosen experts that the token before, in the same sequence, had not chosen
    followers: Tensor  # [G]: chosen experts of tokens that have a token before them in the sequence
    token_load: Tensor  # [buckets, G, N]: times an expert was chosen, by the token's id modulo the buckets

    def tensors(self) -> list[Tensor]:
        """In the order of the fields."""
        return [getattr(self, f.name) for f in fields(self)]

    def like(self, tensors: Sequence[Tensor]) -> RouterDetail:
        """The same fields with other values, in the order of `tensors()`."""
        return RouterDetail(**{f.name: t for f, t in zip(fields(self), tensors, strict=True)})

    def __add__(self, other: RouterDetail) -> RouterDetail:
        return self.like([a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)])


class RouterStats(NamedTuple):
    """What a router counted in training since the last reset; fp32 sums, detached."""

    load: Tensor  # [G, N]: times each of the group's N routed experts was chosen
    detail: RouterDetail | None  # None where `Attention.watch_routers` asked for loads alone
    cut: bool = False  # G are this tensor-parallel rank's groups; others count the others


class AttentionOutput(NamedTuple):
    y: Tensor  # [B, S, d]
    aux_loss: Tensor | None  # scalar fp32, already multiplied by its coefficient; mean over the sequences of the batch


class HeadPool(NamedTuple):
    """The interchangeable members of each group, all of them computed, for measures of diversity.

    Members of one group read and write one coordinate system (the group's keys, or the head's values), so their vectors
    can be compared; members of different groups cannot.
    """

    member: str  # what a member is: "query head", "value expert"
    weights: Tensor  # [G, M, d D]: each member's projection, flattened
    projections: Tensor  # [B, S, G, M, D]: what it makes of each token, before RoPE
    outputs: Tensor  # [B, S, G, M, D]: what attention makes of it, ungated


def alone(tensor: Tensor) -> Tensor:
    """What an exchange between ranks is where there is one."""
    return tensor


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The tensor-parallel ranks that share every layer: groups, FFN columns, rows of the vocabulary.

    Between layers each rank has all of the residual stream x [B, S, d], or (sequence parallel) its part, [B, S/count,
    d]. `enter` makes of it what a shared layer reads, [B, S, d]; `leave` makes of the ranks' partial results of such a
    layer their sum, cut as x is. Backward, `enter` adds up what `leave` handed out. `sum` is for partial tensors within
    a layer: the sum over ranks, whose backward pass sums the gradients likewise. `largest`: elementwise maximum over
    ranks, without gradient.
    """

    index: int = 0
    count: int = 1
    enter: Callable[[Tensor], Tensor] = alone
    leave: Callable[[Tensor], Tensor] = alone
    sum: Callable[[Tensor], Tensor] = alone
    largest: Callable[[Tensor], Tensor] = alone


class KVCache:
    """Keys (rotated) and values of one layer, grown as tokens come. Parts are groups that see the past differently."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[Tensor, Tensor]] = {}

    def extend(self, k: Tensor, v: Tensor, *, part: str, window: int | None) -> tuple[Tensor, Tensor]:
        """k, v [B, S, G, D] of the new tokens -> those of all tokens a new one may see, the new ones last.

        With a `window` of w tokens (itself included) the w - 1 before the next token are kept, and no more.
        """
        if part in self._parts:
            old_k, old_v = self._parts[part]
            k, v = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)
        drop = 0 if window is None else max(0, k.shape[1] - (window - 1))
        # A slice alone would keep the whole storage alive.
        self._parts[part] = (k[:, drop:].clone(), v[:, drop:].clone()) if drop else (k, v)
        return k, v

    @property
    def numbers(self) -> int:
        """Numbers held, over the batch."""
        return sum(k.numel() + v.numel() for k, v in self._parts.values())


@dataclass(frozen=True, kw_only=True)
class SequenceRanks:
    """The context-parallel ranks that share each sequence, of which rank i has the i-th of `count` equal parts.

    `mean` averages a tensor over the ranks; its backward pass sums the gradients over them and divides likewise.
    `attend` is the attention core over whole sequences, given this rank's part of queries, keys and values. `gather`
    puts the parts of a tensor [B, S/count, ...] together, without gradient.
    """

    index: int = 0
    count: int = 1
    mean: Callable[[Tensor], Tensor] = alone
    attend: Callable[..., Tensor] = core
    gather: Callable[[Tensor], Tensor] = alone


class RoutingMemory:
    """What the routers of a block chose in its first pass, in order, to be given again in every later one.

    `choices`: [B, S, G, k] each, in the smallest integers that hold an expert's number.
    """

    def __init__(self) -> None:
        self.choices: list[Tensor] = []
        self._passes, self._next = 0, 0

    def begin(self) -> None:
        """Called before each pass of the block."""
        self._passes, self._next = self._passes + 1, 0

    @property
    def repeats(self) -> bool:
        """Whether the pass is not the first."""
        return self._passes > 1

    def choice(self, choose: Callable[[], Tensor], experts: int) -> Tensor:
        """The next router's choice [B, S, G, k] int64 among `experts`; `choose` is asked in the first pass alone."""
        if self.repeats:
            self._next += 1
            return self.choices[self._next - 1].long()
        idx = choose()
        kinds = (torch.uint8, torch.int16, torch.int32)
        self.choices.append(idx.to(next(kind for kind in kinds if experts - 1 <= torch.iinfo(kind).max)))
        return idx


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a layer's attention is given besides x [B, S, d].

    `rope`: cos and sin of the S tokens' positions, as `kernels.rope.rope_tables` returns them. `mask`: None (plain
    causal) or [B, 1, S, S]: bool, True where a query (row) may see a key (column), or additive in x's dtype, 0 and
    -inf; it already includes causality, and one tensor serves every layer and mechanism. The decoder passes the
    additive form: PyTorch turns a bool one into a copy per layer, kept for the backward pass. `tokens` [B, S]: ids, for
    routers and statistics that read them. `cache`: incremental decoding; x then continues what the cache holds, and
    `mask` is None. `sequence`: where ranks share each sequence, x, `rope` and `tokens` are this rank's part and `mask`
    is of the whole. `memory`: where a block is computed again for its backward pass.
    """

    rope: tuple[Tensor, Tensor]
    mask: Tensor | None = None
    tokens: Tensor | None = None
    cache: KVCache | None = None
    sequence: SequenceRanks = SequenceRanks()
    memory: RoutingMemory | None = None

    @property
    def counts(self) -> bool:
        """Whether statistics count the pass: not where it repeats one."""
        return self.memory is None or not self.memory.repeats

    def choice(self, choose: Callable[[], Tensor], experts: int) -> Tensor:
        """choose() -> [B, S, G, k] int64, or what it gave in the pass that this one repeats; each router asks once."""
        return choose() if self.memory is None else self.memory.choice(choose, experts)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None) -> Tensor:
        """The attention core under this context's mask; shapes as `headway.kernels.attention.core`."""
        return self.sequence.attend(q, k, v, self.mask, window=window)

    def keys_and_values(
        self, k: Tensor, v: Tensor, *, part: str = "", window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """k, v [B, S, G, D] of x's tokens -> of all tokens they may see; every mechanism asks before its core."""
        return (k, v) if self.cache is None else self.cache.extend(k, v, part=part, window=window)


def visible_keys(seq_len: int, window: int | None = None) -> float:
    """Keys a token sees, itself included, averaged over a causal sequence; (S+1)/2 without a window."""
    w = seq_len if window is None else min(window, seq_len)
    return w * (w + 1) / 2 / seq_len + (seq_len - w) * w / seq_len


class AttentionConfig(StrictConfig):
    """Interface of a mechanism's config. `type` is the name under which the registry knows it."""

    type: Any  # a Literal with the one name, in each mechanism
    head_dim: int = Field(ge=1, description="D, channels per head")
    rope_base: float = Field(default=10_000.0, gt=0, description="base of the rotary frequencies")
    rope_fraction: float = Field(default=1.0, ge=0, le=1, description="share of head_dim that is rotated")
    qk_norm: bool = Field(default=False, description="RMSNorm of queries and keys over head_dim, before RoPE")

    @model_validator(mode="before")
    @classmethod
    def _keys_stay_dense(cls, data: Any) -> Any:
        names = [str(name) for name in data] if isinstance(data, dict) else []
        for name in names:
            if name.startswith("key_") or name == "route_keys":
                raise ValueError(
                    f"{name}: keys are never routed, because a slot would hold another expert's keys at each position "
                    "and a query would be scored against subspaces that are not its own; use type hybrid or switchhead "
                    "to route values, or more kv_heads"
                )
        return data

    @model_validator(mode="after")
    def _rotated_channels_are_pairs(self) -> Self:
        rotated = self.head_dim * self.rope_fraction
        if rotated % 2:
            pairs = max(1, round(rotated / 2)) * 2
            if pairs <= self.head_dim:
                other = f"rope_fraction {pairs / self.head_dim!r} ({pairs} channels)"
            else:
                other = "rope_fraction 0.0 (no rotation)"
            raise ValueError(
                f"rope_fraction: {self.rope_fraction} of head_dim {self.head_dim} rotates {rotated:g} channels, and "
                f"RoPE turns pairs; use {other} or head_dim {2 * (self.head_dim // 2 + 1)} with rope_fraction 1.0"
            )
        return self

    @property
    def rotated(self) -> int:
        """Channels of a head that RoPE turns (even)."""
        return int(self.head_dim * self.rope_fraction)

    def layer(self, index: int, layers: int) -> Self:
        """This mechanism in layer `index` of `layers`; another config where a field differs by layer.

        Raises ValueError where a per-layer field does not have `layers` entries.
        """
        return self

    def at_size(self, num_params: int) -> Self:
        """The config with every rule that depends on the size of the whole model resolved to numbers."""
        return self

    def check_run(self, *, seq_len: int, tokens: int, tokens_per_step: int) -> None:
        """Raises ValueError (its text names the spec's key) where the config does not go with a run's shape.

        `seq_len`: tokens of a training sequence; `tokens`: those of the whole training, whole steps.
        """
        return None

    @property
    @abstractmethod
    def score_maps(self) -> int:
        """Softmax rows computed per token: query heads (or slots) that enter the attention core."""
        raise NotImplementedError

    @abstractmethod
    def attended_heads(self, *, tensor: int = 1) -> tuple[int, ...]:
        """KV heads that each call of the attention core in one layer is given on each of `tensor` ranks.

        `tensor` must divide the units of `shards`. Context-parallel ranks deal out the heads of every call, so each
        number must be a multiple of their count; or 1, as a single head's keys and values are gathered instead. Needs
        a config of one layer (`layer`).
        """
        raise NotImplementedError

    def core_flops_per_token(self, *, seq_len: int) -> float:
        """Q K^T and P V of one layer as executed: 2 x 2 D per visible key and score map."""
        return 4 * self.head_dim * self.score_maps * visible_keys(seq_len)

    def useful_core_flops_per_token(self, *, seq_len: int) -> float:
        """The same for the score maps that the mathematics needs."""
        return self.core_flops_per_token(seq_len=seq_len)

    @abstractmethod
    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        """The module of one layer. `layers` scales the output projection's init: std / sqrt(2 layers)."""
        raise NotImplementedError

    @abstractmethod
    def num_params(self, *, width: int) -> int:
        """Parameters of one layer's attention."""
        raise NotImplementedError

    @abstractmethod
    def flops_per_token(self, *, width: int, seq_len: int) -> Flops:
        """Forward FLOPs of one layer per token at `seq_len`, causal: (S+1)/2 visible keys on average."""
        raise NotImplementedError

    def gating_flops_per_token(self) -> int:
        """Of `flops_per_token`, those of gates times vectors and their sums, which are no matrix products."""
        return 0

    @abstractmethod
    def kv_bytes_per_token(self, *, seq_len: int, bytes_per_element: int) -> float:
        """KV cache of one layer after `seq_len` tokens, divided by them, in bytes."""
        raise NotImplementedError

    @abstractmethod
    def shards(self) -> dict[str, Shard]:
        """Sharding declaration: parameter name (as in the module) -> how it is cut. Not named: replicated."""
        raise NotImplementedError


class Attention(nn.Module):
    """Interface of a mechanism's module. Also one for what it holds: routers and norms.

    `init_stds` gives the standard deviation of each of the module's own matrices (and fixed random buffers) at the
    start, `init_means` a mean other than 0; a vector in neither starts at 1 (`headway.model.init` draws them).
    `ranks` is replaced where a layer's groups are dealt to several tensor-parallel ranks. `output_matrices` names the
    parameters of which y is a linear function: multiplied by a number, all of them together multiply y by it.
    """

    output_matrices: tuple[str, ...] = ("w_o",)
    init_stds: dict[str, float]
    init_means: dict[str, float]
    ranks: Ranks = Ranks()

    def forward(self, x: Tensor, context: Context) -> AttentionOutput:
        """x [B, S, d] is already normed."""
        raise NotImplementedError

    def pool(self, x: Tensor, context: Context) -> HeadPool | None:
        """Every member of every group, chosen or not; None where groups have one member only, or differ in size."""
        return None

    def router_stats(self) -> dict[str, RouterStats]:
        """Name of the router -> sums since the last `reset_router_stats`; evaluation mode does not count."""
        return {}

    def step_sums(self) -> dict[str, Tensor]:
        """Name -> other sums over training tokens since the last `reset_router_stats`; the same names on every rank."""
        return {}

    def watch_routers(self, *, closely: bool) -> None:
        """Whether routers sum up details from now on (they do at first), or loads alone, which costs less."""
        return None

    def reset_router_stats(self) -> None:
        return None

    def before_step(self, tokens: int) -> None:
        """Called before each optimizer step, and after loading, with the training tokens done so far (schedules)."""
        return None

    def after_step(self, global_load: dict[str, Tensor]) -> None:
        """Called once per optimizer step with each router's load [G, N] (loss-free bias) and each of `step_sums`, under
        their names, summed over all ranks.
        """
        return None
