"""Base classes of the model: strict configs, the attention interface, and records of cost and sharding.

Legend: B batch, S sequence, T=B*S tokens, d width, H query heads, G KV heads (= groups), M=H/G query heads per group,
k slots (query heads active per group and token), D head size, E experts, F FFN width, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from headway.kernels.attention import core
from headway.kernels.documents import Documents
from headway.kernels.relative import Relative, relative_core
from headway.model.blocks import Blocks, blocks_core
from headway.model.kv_cache import KVCache, SourceCache
from headway.model.router_stats import RouterStats
from headway.model.segments import Past, Segments, segments_core


class StrictConfig(BaseModel):
    """Base of all configs: frozen, keyword-only; unknown keys and implicit type conversions are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Forward FLOPs per token (2 per multiply-accumulate); training costs three times as much.

    `useful` counts the FLOPs that the definition of the layer needs (selected heads only, causal half of the scores).
    `executed` counts those of this implementation, such as dense projections. Norms, RoPE and softmax are not counted.
    """

    useful: float
    executed: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(useful=self.useful + other.useful, executed=self.executed + other.executed)


class Shard(NamedTuple):
    """How one parameter is sharded over tensor-parallel ranks.

    It consists of `units` equal, indivisible pieces along `dim`. Each rank gets the same number of consecutive pieces,
    so the number of ranks must divide `units`.
    """

    dim: int
    units: int


class AttentionOutput(NamedTuple):
    y: Tensor  # [B, S, d]
    aux_loss: Tensor | None  # scalar fp32, including its coefficient; mean over the sequences of the batch
    handed: tuple[Tensor, ...] = ()  # heads [B, K, n, D] for later layers that take them (`takes_from`)


class HeadPool(NamedTuple):
    """All interchangeable members of each group (query heads or value experts), selected or not, to measure diversity.

    Members of one group share a coordinate system (the group's keys, or the head's values), so their vectors are
    comparable. Members of different groups are not.
    """

    member: str  # "query head" or "value expert"
    weights: Tensor  # [G, M, d D]: each member's projection matrix, flattened
    projections: Tensor  # [B, S, G, M, D]: projection of each token, before RoPE
    outputs: Tensor  # [B, S, G, M, D]: attention output, before gates


def alone(tensor: Tensor) -> Tensor:
    """Identity: every collective on a single rank."""
    return tensor


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This rank's place among the tensor-parallel ranks, and their collectives.

    The ranks shard every layer (groups of heads, FFN columns) and the rows of the vocabulary. Between layers, each rank
    holds the residual stream x [B, S, d] or, with sequence parallelism, its part [B, S/count, d].

    enter: Converts x to the input of a sharded layer, [B, S, d] (an all-gather with sequence parallelism, else the
        identity). Its backward sums the gradients over the ranks, and keeps the rank's part with sequence parallelism.
    leave: Sums the ranks' partial outputs of a sharded layer (a reduce-scatter with sequence parallelism, else an
        all-reduce). Its backward is an all-gather of the gradient with sequence parallelism, else the identity.
    sum: All-reduce of a partial tensor within a layer. Its backward sums the gradients as well.
    largest: Elementwise maximum over the ranks, without gradient.
    """

    index: int = 0
    count: int = 1
    enter: Callable[[Tensor], Tensor] = alone
    leave: Callable[[Tensor], Tensor] = alone
    sum: Callable[[Tensor], Tensor] = alone
    largest: Callable[[Tensor], Tensor] = alone


@dataclass(frozen=True, kw_only=True)
class SequenceRanks:
    """This rank's place among the context-parallel ranks, and their collectives. Rank i holds the i-th equal part of
    each sequence.

    mean: Averages a tensor over the ranks. Its backward averages the gradients.
    attend: The attention core over whole sequences, given this rank's part of queries, keys and values.
    gather: All-gathers the parts of a tensor [B, S/count, ...] along the sequence, without gradient.
    """

    index: int = 0
    count: int = 1
    mean: Callable[[Tensor], Tensor] = alone
    attend: Callable[..., Tensor] = core
    gather: Callable[[Tensor], Tensor] = alone


class RoutingMemory:
    """Stores the selections of a block's routers in its first forward pass, and replays them when it is recomputed.

    `choices`: one tensor [B, S, G, k] per router call, in the smallest integer dtype that can hold the expert indices.
    """

    def __init__(self) -> None:
        self.choices: list[Tensor] = []
        self._passes, self._next = 0, 0

    def begin(self) -> None:
        """Must be called before each forward pass of the block."""
        self._passes, self._next = self._passes + 1, 0

    @property
    def repeats(self) -> bool:
        """Whether the current pass is a recomputation."""
        return self._passes > 1

    def choice(self, choose: Callable[[], Tensor], experts: int) -> Tensor:
        """The next router's selection [B, S, G, k] int64 of `experts` experts. `choose` runs in the first pass only."""
        if self.repeats:
            self._next += 1
            return self.choices[self._next - 1].long()
        idx = choose()
        kinds = (torch.uint8, torch.int16, torch.int32)
        self.choices.append(idx.to(next(kind for kind in kinds if experts - 1 <= torch.iinfo(kind).max)))
        return idx


@dataclass(frozen=True, kw_only=True)
class Source:
    """The output of an encoder, of which cross attention takes keys and values.

    states: [B, K, d], as the input of a sharded layer (`Ranks.enter`).
    rope: cos and sin of its tokens' positions, as in `Context`.
    cache: In incremental decoding, keys and values of one layer.
    """

    states: Tensor
    rope: tuple[Tensor, Tensor]
    cache: SourceCache | None = None

    def keys_and_values(
        self, project: Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, G, D], which `project` computes of states and rope."""
        if self.cache is None:
            return project(self.states, self.rope)
        return self.cache.once(lambda: project(self.states, self.rope))


@dataclass(frozen=True, kw_only=True)
class Context:
    """Inputs of a layer's attention besides x [B, S, d].

    rope: cos and sin of the S tokens' positions, as returned by `kernels.rope.rope_tables`.
    documents: Boundaries of the documents in the whole sequences; None for one document per sequence. All layers and
        mechanisms share one object.
    tokens: Token ids [B, S], for routers and statistics that read them.
    cache: KV cache of incremental decoding. x then continues the cached tokens, and `documents` is None.
    sequence: Context-parallel ranks. x, `rope` and `tokens` are this rank's part; `documents` cover the whole
        sequence.
    memory: Router selections, for activation recomputation.
    distances: With `model.positions: relative_xl`, the vectors [K, d] of the distances 0 .. K - 1; x continues K - S
        cached tokens.
    relative: The position keys of this layer, which the block computes from `distances`.
    core: In encoder-decoders, attention of q [B, S, H, D] to k, v [B, K, G, D] that is not causal, or has a bias.
    source: In cross attention, the output of the encoder, of which keys and values are taken instead of x.
    across: In the decoder of an encoder-decoder, the context of the layer's cross attention.
    handed: What the layer `AttentionConfig.takes_from` handed on in this pass.
    """

    rope: tuple[Tensor, Tensor]
    documents: Documents | None = None
    tokens: Tensor | None = None
    cache: KVCache | None = None
    sequence: SequenceRanks = SequenceRanks()
    memory: RoutingMemory | None = None
    distances: Tensor | None = None
    relative: Relative | None = None
    core: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    source: Source | None = None
    across: Context | None = None
    handed: tuple[Tensor, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether statistics include this pass. False in a recomputation."""
        return self.memory is None or not self.memory.repeats

    def choice(self, choose: Callable[[], Tensor], experts: int) -> Tensor:
        """choose() -> [B, S, G, k] int64, or its stored result in a recomputation. Each router calls this once."""
        return choose() if self.memory is None else self.memory.choice(choose, experts)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None) -> Tensor:
        """The attention core within this context's documents; shapes as `headway.kernels.attention.core`."""
        if self.core is not None:
            assert window is None and self.sequence.count == 1, "the spec check refuses them in encoder-decoders"
            return self.core(q, k, v)
        if self.relative is not None:
            assert window is None and self.sequence.count == 1, "the spec check refuses them with relative positions"
            return relative_core(q, k, v, self.relative, self.documents)
        return self.sequence.attend(q, k, v, self.documents, window=window)

    def attend_segments(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, past: Past | None) -> Tensor:
        """Causal attention of heads that see different tokens: `headway.model.segments.segments_core`."""
        assert self.core is None and self.relative is None and self.sequence.count == 1, "the spec check refuses them"
        return segments_core(q, k, v, segments, past, attend=self.sequence.attend)

    def attend_blocks(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, blocks: Blocks) -> Tensor:
        """Causal attention to chosen blocks of keys: `headway.model.blocks.blocks_core`."""
        assert self.core is None and self.relative is None and self.sequence.count == 1, "the spec check refuses them"
        return blocks_core(q, k, v, chosen, blocks)

    def head_outputs(self, o: Tensor) -> Tensor:
        """o [B, S, H, E]: outputs of heads that no call of an attention core gives. Observers see and change them."""
        return o

    def keys_and_values(
        self, k: Tensor, v: Tensor, *, part: str = "", window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Prepend cached keys and values to k, v [B, S, G, D]. Mechanisms must call this before the attention core."""
        return (k, v) if self.cache is None else self.cache.extend(k, v, part=part, window=window)


def visible_keys(seq_len: int, window: int | None = None) -> float:
    """Keys that a token attends to (including itself), averaged over a causal sequence; (S+1)/2 without a window."""
    w = seq_len if window is None else min(window, seq_len)
    return w * (w + 1) / 2 / seq_len + (seq_len - w) * w / seq_len


class RelativeForm(NamedTuple):
    """Relative positions of one layer: KV heads, each with position keys, and query heads with biases u, v or 0."""

    groups: int
    biased_heads: int


class AttentionSection(StrictConfig):
    """Interface of the section `attention` of a spec: one mechanism, or several (`headway.model.mixed`)."""

    type: Any  # a Literal with its name

    @property
    @abstractmethod
    def no_encoder_decoder(self) -> str | None:
        """Why there is no form of it in `model.type: encoder_decoder`; None if there is one."""
        raise NotImplementedError

    @abstractmethod
    def layer(self, index: int, layers: int) -> AttentionConfig:
        """The config of layer `index` of `layers`, with per-layer fields resolved.

        Raises ValueError if a per-layer field does not have `layers` entries.
        """
        raise NotImplementedError

    def at_size(self, num_params: int) -> Self:
        """The config with rules that depend on the size of the whole model resolved to numbers."""
        return self

    def check_run(self, *, seq_len: int, tokens: int, tokens_per_step: int) -> None:
        """Raise ValueError, which names the key of the spec, if the config is not compatible with a run.

        `seq_len`: tokens per training sequence. `tokens`: training tokens, a multiple of `tokens_per_step`.
        """

    @abstractmethod
    def mechanisms(self) -> Iterator[tuple[str, AttentionConfig]]:
        """The config of each mechanism in it, with the prefix of its keys below `attention.`."""
        raise NotImplementedError


class AttentionConfig(AttentionSection):
    """Interface of a mechanism's config. `type` is its name in the registry."""

    crosses: ClassVar[bool] = False
    """Whether the module takes keys and values of `Context.source` where there is one, and attends by `Context.attend`
    in one call. Not inherited: a mechanism that changes another one's layer must say so itself.
    """
    no_context_parallel: ClassVar[str | None] = None  # why ranks cannot share a layer's sequences; None if they can
    own_core: ClassVar[bool] = False  # whether it attends by a core of its own, which `speed.attention` cannot replace
    no_compiled_blocks: ClassVar[str | None] = None  # why `speed.compile: block` is refused; None if it depends on keys
    head_dim: int = Field(ge=1, description="D, channels per head")
    rope_base: float = Field(default=10_000.0, gt=0, description="base of the rotary frequencies")
    rope_fraction: float = Field(default=1.0, ge=0, le=1, description="fraction of head_dim that is rotated")
    qk_norm: bool = Field(default=False, description="RMSNorm of queries and keys over head_dim, before RoPE")

    @model_validator(mode="before")
    @classmethod
    def _keys_stay_dense(cls, data: Any) -> Any:
        names = [str(name) for name in data] if isinstance(data, dict) else []
        for name in names:
            if name.startswith("key_") or name == "route_keys":
                raise ValueError(
                    f"{name}: keys cannot be routed, because a slot would hold a different expert's keys at each "
                    "position and a query would be scored against keys of other subspaces; use type hybrid or "
                    "switchhead to route values, or more kv_heads"
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
                f"rope_fraction: {self.rope_fraction} of head_dim {self.head_dim} is {rotated:g} channels, but RoPE "
                f"rotates pairs; use {other} or head_dim {2 * (self.head_dim // 2 + 1)} with rope_fraction 1.0; "
                "with model.positions other than rope, use rope_fraction 0.0"
            )
        return self

    @property
    def output_bias(self) -> bool:
        """Whether the output projection has a bias [d]. `num_params` counts it; the block holds and adds it."""
        return False

    @property
    def relative_form(self) -> RelativeForm | None:
        """What a layer needs for `model.positions: relative_xl`; None if the mechanism has no such form."""
        return None

    @property
    def no_encoder_decoder(self) -> str | None:
        if vars(type(self)).get("crosses", False):
            return None
        return (
            f"attention.type: {self.type} has no encoder-decoder form: its layer computes queries and keys of the same "
            "tokens, and cross attention takes keys and values of others; use type mha, mqa, gqa, sqa or wgqa, or "
            "model.type decoder"
        )

    @property
    def takes_from(self) -> int | None:
        """The earlier layer whose values, or keys and values, it uses (`Context.handed`); None: its own alone."""
        return None

    def handed_heads(self, *, tensor: int = 1) -> tuple[int, ...]:
        """Heads of each tensor that a layer hands on, or takes, on each of `tensor` ranks; () if layers do not."""
        return ()

    @property
    def reads_routing(self) -> bool:
        """Whether the host reads which experts were selected, as shapes follow them: a block is then not one graph."""
        return getattr(self, "projections", "dense") == "grouped"

    @property
    def rotated(self) -> int:
        """Number of channels of a head that RoPE rotates (even)."""
        return int(self.head_dim * self.rope_fraction)

    @property
    def core_channels(self) -> int:
        """Channels of each query, key and value in the attention core."""
        return self.head_dim

    def layer(self, index: int, layers: int) -> Self:
        return self

    def stages(self) -> Sequence[tuple[int, Self]]:
        """(training tokens from which it applies, config) of each stage of training, in order; the first begins at 0.

        The configs give the costs of their stages; the last one has those of the config itself. The config must be that
        of one layer (`layer`).
        """
        return [(0, self)]

    def mechanisms(self) -> Iterator[tuple[str, AttentionConfig]]:
        yield "", self

    @property
    @abstractmethod
    def score_maps(self) -> int:
        """Softmax rows per token: the number of query heads (or slots) in the attention core; 0 without a softmax."""
        raise NotImplementedError

    @abstractmethod
    def attended_heads(self, *, tensor: int = 1) -> tuple[int, ...]:
        """KV heads in each call of the attention core of one layer, on each of `tensor` ranks.

        `tensor` must divide the units of `shards`. Context parallelism distributes the heads of every call over its
        ranks, so each number must be a multiple of their count, or 1: the keys and values of a single head are
        gathered instead. The config must be that of one layer (`layer`).
        """
        raise NotImplementedError

    def core_flops_per_token(self, *, seq_len: int) -> float:
        """Q K^T and P V of one layer as executed: 2 x 2 D per visible key and score map."""
        return 4 * self.core_channels * self.score_maps * visible_keys(seq_len)

    def useful_core_flops_per_token(self, *, seq_len: int) -> float:
        """The same, for the useful score maps only (see `Flops`)."""
        return self.core_flops_per_token(seq_len=seq_len)

    def recomputed_core_bytes(self, *, seq_len: int) -> float:
        """Bytes of one sequence that the backward pass of one layer's core computes again and holds while it runs."""
        return 0.0

    @abstractmethod
    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        """Build the module of one layer. `layers` scales the init of the output projection: std / sqrt(2 layers)."""
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
        """The part of `flops_per_token` not in matmuls: gating (vectors times gates, and their sums), convolutions."""
        return 0

    @abstractmethod
    def kv_bytes_per_token(self, *, seq_len: int, bytes_per_element: int) -> float:
        """Bytes of one layer's KV cache after `seq_len` tokens, divided by `seq_len`; a state counts as one."""
        raise NotImplementedError

    @abstractmethod
    def shards(self) -> dict[str, Shard]:
        """Sharding declaration: name of a parameter or buffer, as in the module -> shard. Others are replicated."""
        raise NotImplementedError


class Attention(nn.Module):
    """Interface of a mechanism's module.

    `init_stds` gives the initial standard deviation of each matrix (and fixed random buffer) that belongs to the module
    itself, `init_means` the mean where it is not 0. Vectors in neither start at 1 (see `headway.model.init`). `ranks`
    is set where tensor parallelism shards the layer. `output_matrices` names the parameters on which y depends
    linearly: scaling all of them by a factor scales y by it. `gate_matrices`: own matrices that are no projections.
    """

    output_matrices: tuple[str, ...] = ("w_o",)
    gate_matrices: tuple[str, ...] = ()
    init_stds: dict[str, float]
    init_means: dict[str, float]
    ranks: Ranks = Ranks()

    def forward(self, x: Tensor, context: Context) -> AttentionOutput:
        """x [B, S, d], after the norm -> output [B, S, d] and auxiliary loss."""
        raise NotImplementedError

    def pool(self, x: Tensor, context: Context) -> HeadPool | None:
        """All members of all groups, selected or not; None if groups have a single member or differ in size."""
        return None

    def router_stats(self) -> dict[str, RouterStats]:
        """Router name -> sums since the last `reset_router_stats`. Only training mode counts."""
        return {}

    def step_sums(self) -> dict[str, Tensor]:
        """Name -> other sums over training tokens since `reset_router_stats`. The names are equal on all ranks."""
        return {}

    def watch_routers(self, *, closely: bool) -> None:
        """Turn the collection of `RouterDetail` on (the default) or off. Loads alone cost less."""

    def reset_router_stats(self) -> None:
        return None

    def before_step(self, tokens: int) -> None:
        """Update schedules. Called before each optimizer step, and after loading, with the tokens trained so far."""

    def after_step(self, global_load: dict[str, Tensor]) -> None:
        """Called after each optimizer step with the sums over all ranks, by name: the load [G, N] of each router, which
        updates its loss-free bias, and `step_sums`.
        """
