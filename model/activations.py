"""Memory of one block on one rank: its parameters and its activations (tensors saved for the backward pass).

The activations are measured, not derived from formulas per mechanism: a block of full width runs on the CPU for a few
tokens, and the bytes that autograd saves are counted. Two sequence lengths give the slope per token and the constant
part. The attention core is a stand-in that saves the tensors of a fused kernel (queries, keys, values, output, one
log-sum-exp per row and head), never the [S, S] scores. For GPUs, the norms are stand-ins as well, because they are one
fused operation there and several operations on the CPU.

Legend: B batch, S sequence, d width, H query heads (or slots), G KV heads, D head size; n tokens of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway.kernels.attention import shares_kv_heads
from headway.kernels.documents import BLOCK, Documents, rows_per_call
from headway.kernels.operations import Operations
from headway.kernels.rope import rope_tables
from headway.model.base import AttentionConfig, Context, Ranks, RoutingMemory, SequenceRanks
from headway.model.config import ModelConfig
from headway.model.contexts import rotated
from headway.model.decoder import Block, Placement
from headway.model.dropout import Dropout
from headway.model.selective import SelectiveRecompute


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Properties of the layout and the kernels that affect the saved activations.

    tensor, context: Number of tensor- and context-parallel ranks.
    bf16: bf16 if True, else fp32.
    device: "cuda" or "cpu". Their fused attention kernels differ.
    masked: Whether attention is masked by document.
    selective: Whether norms and the MLP's activation function are recomputed.
    seq_len: S, length of the whole sequence.
    """

    tensor: int = 1
    context: int = 1
    sequence_parallel: bool = False
    bf16: bool = True
    device: str = "cuda"
    masked: bool = True
    selective: bool = False
    seq_len: int

    @property
    def element_bytes(self) -> int:
        return 2 if self.bf16 else 4


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """One block on one rank, in bytes. "Per token" refers to the n tokens in the rank's attention."""

    kept_per_token: float  # activations, including the block's input
    kept_once: float  # activations that do not depend on the number of tokens
    routing_per_token: float  # router selections, which activation recomputation keeps
    sums_per_token: float  # all-reduced over tensor-parallel ranks within the layer, forward
    dealt_per_token: float  # exchanged by context-parallel ranks around the attention core, forward
    handed_per_token: float = 0.0  # heads that it hands on to later blocks, which keep them under recomputation too

    def kept(self, tokens: float) -> float:
        """Bytes of activations for `tokens` tokens."""
        return self.kept_per_token * tokens + self.kept_once


@dataclass(frozen=True, kw_only=True)
class BlockParameters:
    """Parameter counts of one rank's part of a block."""

    by_part: dict[str, int]  # attention, mlp, norm
    replicated: int  # of attention and mlp, those replicated over tensor-parallel ranks; norms are always replicated

    @property
    def total(self) -> int:
        return sum(self.by_part.values())


_PARTS = {
    "attn": "attention",
    "mlp": "mlp",
    "attn_out": "attention",
    "attn_positions": "attention",
    "mlp_out": "mlp",
    "attn_norm": "norm",
    "mlp_norm": "norm",
}


class _Key:
    """A config of a layer as a key. Layers are equal that differ only in the layer that they take heads from."""

    def __init__(self, config: AttentionConfig) -> None:
        self.config = config
        self._compared = (type(config), config.model_dump_json(), config.takes_from is None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._compared == other._compared

    def __hash__(self) -> int:
        return hash(self._compared)


@lru_cache(maxsize=256)
def _block_parameters(model: str, attention: _Key, tensor: int) -> BlockParameters:
    with torch.device("meta"):
        block = Block(ModelConfig.model_validate_json(model), attention.config)
    parts, replicated = {"attention": 0, "mlp": 0, "norm": 0}, 0
    for name, parameter in block.named_parameters():
        cut = name in block.shards
        part = _PARTS[name.partition(".")[0]]
        parts[part] += parameter.numel() // (tensor if cut else 1)
        replicated += 0 if cut or part == "norm" else parameter.numel()
    return BlockParameters(by_part=parts, replicated=replicated)


def block_parameters(model: ModelConfig, attention: AttentionConfig, *, tensor: int) -> BlockParameters:
    """Parameters of a block, given the config of its layer, sharded over `tensor` ranks. Allocates no memory."""
    return _block_parameters(model.model_dump_json(), _Key(attention), tensor)


def footprint(model: ModelConfig, attention: AttentionConfig, sharing: Sharing) -> Footprint:
    """Memory and communication of a block, given the config of its layer. About 1 s for 100 million parameters."""
    return _footprint(model.model_dump_json(), _Key(attention), sharing)


@lru_cache(maxsize=256)
def _footprint(model: str, attention: _Key, sharing: Sharing) -> Footprint:
    probe = _Probe(ModelConfig.model_validate_json(model), attention.config, sharing)
    small, large = (probe.run(tokens) for tokens in (8 * sharing.tensor, 16 * sharing.tensor))
    tokens = large.tokens - small.tokens
    slope = (large.kept - small.kept) / tokens
    return Footprint(
        kept_per_token=slope,
        kept_once=small.kept - slope * small.tokens,
        routing_per_token=large.routing / large.tokens,
        sums_per_token=large.sums / large.tokens,
        dealt_per_token=large.dealt / large.tokens,
        handed_per_token=large.handed / large.tokens,
    )


@dataclass(frozen=True)
class _Run:
    tokens: int
    kept: float
    routing: float
    sums: float
    dealt: float
    handed: float


class _Probe:
    """A block whose collectives and attention core are stand-ins that return zeros of the right shape."""

    def __init__(self, model: ModelConfig, attention: AttentionConfig, sharing: Sharing) -> None:
        self.model, self.attention, self.sharing = model, attention, sharing
        self.dtype = torch.bfloat16 if sharing.bf16 else torch.float32
        self.summed_bytes = self.dealt_bytes = 0
        ranks = Ranks()
        if sharing.tensor > 1:
            parts = sharing.tensor if sharing.sequence_parallel else 1
            ranks = Ranks(
                count=sharing.tensor,
                enter=partial(_Resized.apply, parts, 1) if sharing.sequence_parallel else _Same.apply,
                leave=partial(_Resized.apply, 1, parts),
                sum=self._sum,
            )
        with torch.device("meta"):
            block = Block(model, attention).to(self.dtype)
        integers = [name for name, buffer in block.named_buffers() if not buffer.is_floating_point()]
        if integers:  # sizes of groups, say: shapes follow from them
            built = Block(model, attention)
            for name in integers:
                owner, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(owner), leaf, built.get_buffer(name))
        operations = Operations()
        if sharing.device == "cuda":
            operations = replace(operations, norm=_fused_norm, add_norm=_fused_add_norm)
        recompute = "selective" if sharing.selective else "none"
        block.place(Placement(ranks=ranks, operations=operations, recompute=recompute))
        self.block = block._apply(_zeros).train()  # after the cut, which copies

    def run(self, tokens: int) -> _Run:
        """Forward pass of `tokens` tokens of one sequence."""
        sharing, memory = self.sharing, RoutingMemory()
        self.summed_bytes = self.dealt_bytes = 0
        own = tokens // (sharing.tensor if sharing.sequence_parallel else 1)
        x = torch.zeros(1, own, self.model.width, dtype=self.dtype, requires_grad=True)
        rope = rope_tables(tokens, rotated(self.model, self.attention), self.attention.rope_base, x.device)
        numbers = torch.zeros(1, tokens, dtype=torch.int64)
        distances = torch.zeros(tokens, self.model.width, dtype=self.dtype) if self.model.relative else None
        attend = SequenceRanks(attend=self._attend)
        taken = self._taken(tokens)
        even = _Even(sharing.tensor) if getattr(self.attention, "experts_over_ranks", False) else None
        context = Context(rope=rope, tokens=numbers, sequence=attend, distances=distances, handed=taken, memory=even)
        dropout = Dropout.of(self.model, seed=0)
        drops = None if dropout is None else dropout.of_pass(torch.zeros_like(numbers[:, 0]), numbers, start=0)
        known = [*self.block.parameters(), *self.block.buffers(), *rope, numbers]
        known += [] if distances is None else [distances]  # one for all layers
        known += taken  # kept by the block that hands them on
        with saved_storages(besides=known, selective=self.block.selective) as saved:
            handed = self.block(x, context, drops).handed
        of_handed = {heads.untyped_storage().data_ptr(): heads.untyped_storage().nbytes() for heads in handed}
        with torch.no_grad():
            self.block(x, replace(context, memory=memory))
        routing = sum(choice.numel() * choice.element_size() for choice in memory.choices)
        kept = sum((saved | of_handed).values())
        return _Run(tokens, kept, routing, self.summed_bytes, self.dealt_bytes, sum(of_handed.values()))

    def _taken(self, tokens: int) -> tuple[Tensor, ...]:
        """What an earlier block hands on to this one."""
        if self.attention.takes_from is None:
            return ()
        heads = self.attention.handed_heads(tensor=self.sharing.tensor)
        shapes = [(1, tokens, count, self.attention.head_dim) for count in heads]
        return tuple(torch.zeros(shape, dtype=self.dtype, requires_grad=True) for shape in shapes)

    def _sum(self, tensor: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.summed_bytes += tensor.numel() * tensor.element_size()
        return _Resized.apply(1, 1, tensor)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, *, window: int | None = None
    ) -> Tensor:
        """Stand-in for `headway.kernels.attention.core`, including the all-to-all of context parallelism.

        q [B, n, H, D]; k, v [B, n, G, D] -> zeros [B, n, H, D]. Saves the tensors that the core saves: queries; keys
        and values, expanded to one per query head if no fused kernel supports fewer; the output, once more if it is
        assembled from several calls and once more if it is exchanged between ranks; one fp32 number per row and head.
        """
        batch, tokens, heads, _ = q.shape
        groups, sharing = k.shape[2], self.sharing
        if sharing.context > 1 and torch.is_grad_enabled():
            sent = 2 * (q.numel() + k.numel()) if groups > 1 else 2 * k.numel() * sharing.context
            self.dealt_bytes += sent * q.element_size()
        output = torch.zeros_like(q, memory_format=torch.contiguous_format)
        others = [q.new_zeros(batch, heads, tokens, dtype=torch.float32)]
        if window is not None and window >= sharing.seq_len:
            window = None
        varlen = sharing.masked and sharing.device == "cuda" and sharing.bf16  # one call for documents of any length
        calls = not varlen and (sharing.masked or window is not None)
        if groups != heads and not shares_kv_heads(sharing.device, q.dtype, masked=calls):
            others += [torch.zeros_like(q), torch.zeros_like(q)]
        elif sharing.context > 1 and groups == 1:
            others += [k.new_zeros(batch, tokens * sharing.context, *k.shape[2:]) for _ in range(2)]
        else:
            others += [k, v] if sharing.context == 1 else [torch.zeros_like(k), torch.zeros_like(v)]
        if window is not None and calls:
            others += self._mask_of_window(q, window)
        several = rows_per_call(sharing.seq_len, window) < sharing.seq_len
        several = calls and (several or (sharing.masked and sharing.seq_len > BLOCK))
        copies = int(several) + int(sharing.context > 1 and groups > 1)
        others += [torch.zeros_like(output) for _ in range(copies)]
        return _Kept.apply(q, output, *others)

    def _mask_of_window(self, q: Tensor, window: int) -> list[Tensor]:
        """The additive masks of a layer's calls with a window, which it keeps for its backward pass. q [B, n, H, D].

        Without documents, all sequences share the masks of rows and the keys that they see. In short sequences with
        documents, each has its own; in longer ones, all layers share small ones, which are not counted here.
        """
        length, rows = self.sharing.seq_len, rows_per_call(self.sharing.seq_len, window)
        if self.sharing.masked and length > BLOCK:
            return []
        bounds = [(start, min(start + rows, length)) for start in range(0, length, rows)]
        scores = sum((end - start) * (end - max(0, start - window + 1)) for start, end in bounds)
        if self.sharing.masked:
            scores = round(scores * q.shape[0] * q.shape[1] * self.sharing.context / length)
        return [_zeros(torch.empty(scores, dtype=q.dtype, device="meta"))]


class _Even(RoutingMemory):
    """Chooses experts so that tensor-parallel ranks which hold equal parts of them have equally many choices.

    The router of a probe, whose weights are 0, chooses the first experts, which all lie on the first rank.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks

    def choice(self, choose: Callable[[], Tensor], experts: int) -> Tensor:
        like = choose()  # [B, n, G, k]
        token, slot = torch.arange(like.shape[1])[:, None], torch.arange(like.shape[3])
        first = token % self.ranks * (experts // self.ranks) + token // self.ranks
        chosen = (first + slot * (experts // like.shape[3])) % experts  # [n, k], all k different
        return chosen[None, :, None].expand_as(like).contiguous()


@contextmanager
def saved_storages(
    *, besides: Iterable[Tensor], selective: SelectiveRecompute | None = None
) -> Iterator[dict[int, int]]:
    """Context manager that records the storages that autograd saves. Yields address -> bytes.

    `besides`: tensors to ignore. `selective`: the selective recomputation of the block, whose hooks hide the tensors it
    handles from other hooks.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # keeps storages alive, so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    if selective is not None:
        selective.observe = pack
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def _zeros(like: Tensor) -> Tensor:
    """Zeros in place of a tensor on the meta device, in pages that take no memory while they are only read."""
    if not like.is_meta:
        return like
    pages = np.zeros(max(1, like.numel()) * like.element_size(), dtype=np.uint8)
    return torch.from_numpy(pages).view(like.dtype)[: like.numel()].view(like.shape)


class _Resized(torch.autograd.Function):
    """Zeros of shape [B, n * grow / shrink, ...] for x [B, n, ...]. Saves no tensor, like a collective."""

    @staticmethod
    def forward(ctx: Any, grow: int, shrink: int, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], x.shape[1] * grow // shrink, *x.shape[2:])


class _Same(torch.autograd.Function):
    """The tensor itself, as `headway.parallel.collectives` passes it to each rank: nothing is copied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)


def _fused_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return _FusedNorm.apply(gain, x)


def _fused_add_norm(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    added = x + y
    return added, _FusedNorm.apply(gain, added)


class _FusedNorm(torch.autograd.Function):
    """Saves the tensors of PyTorch's fused norm on a GPU: input, gain and one fp32 number per row."""

    @staticmethod
    def forward(ctx: Any, gain: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gain, x, x.new_zeros(x.shape[:-1], dtype=torch.float32))
        return torch.zeros_like(x)


class _Kept(torch.autograd.Function):
    """Saves all of its inputs and returns the second one."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, output: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(query, output, *others)
        return output
