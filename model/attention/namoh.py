"""NAMOH: every token is routed to K of H heads for queries, keys and values; a head attends within its own tokens.

Legend: B batch, S sequence, d width, H heads that tokens are routed to, k=top_k heads of a token (K of the source),
D head size, s=shared_heads, P packed (token, head) pairs. Per token t, with T_h the tokens of the document up to t that
are routed to head h, in order:

    p   = softmax(router(x))          H, fp32
    C   = top-k of the logits         k heads: a token's own choice, which no later token can change
    q_h, k_h, v_h = W_Q[h] x, W_K[h] x, W_V[h] x              for h in C only
    o_h = softmax over u in T_h of (R(rank_h(t)) q_h(t) . R(rank_h(u)) k_h(u) / sqrt(D))  v_h(u)
    y   = sum over h in C of p_h W_O[h] o_h  +  sum over the shared heads of W_O[j] o_j

R is RoPE, and rank_h(t) the number of earlier tokens of the document in T_h: positions count within the head. Shared
heads see every token, within a sliding window. Each head caches the keys and values of its own tokens, so the cache has
k heads per token, and its scores grow with (k/H) S per head and token.

Source: NAMOH (Peking University, 2026), read through a copy of the text. It fixes token-choice routing of queries, keys
and values, the softmax gate that is not renormalized, positions within the head, f.P (0.001) or loss-free balancing
(0.001), and, in its best model, 4 shared heads with a window of 128 besides 32 routed ones of which 16 act. Choices of
this project: shared heads have no gate and are added to the pool; their positions are those of the sequence.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from headway.kernels.norm import rms_norm
from headway.kernels.operations import Operations
from headway.kernels.rope import rope_tables
from headway.kernels.routing import GateName
from headway.model.attention.grouped import QkNorm
from headway.model.balance import BalanceConfig
from headway.model.base import Attention, AttentionConfig, AttentionOutput, Context, Flops, Shard, visible_keys
from headway.model.layers import RMSNorm, parameter
from headway.model.router import AnyRouter, LinearRouterConfig, RoutedAttention, RoutingConfig, check_router, of_layer
from headway.model.segments import Segments, rotate_rows

ROUTER = "router"


class NamohConfig(AttentionConfig):
    """NAMOH: `heads` heads with keys and values of their own tokens, of which a token is routed to `top_k`."""

    type: Literal["namoh"] = "namoh"
    experts_over_ranks: ClassVar[bool] = True  # tensor-parallel ranks hold parts of the heads of one choice
    no_context_parallel: ClassVar[str | None] = (
        "attention.type namoh attends within the tokens of each head, which lie in unequal numbers on the ranks that "
        "share a sequence"
    )
    heads: int = Field(ge=2, le=65_536, description="H, heads that tokens are routed to")
    top_k: int | list[int] = Field(description="heads a token is routed to; a list: one number per layer")
    shared_heads: int = Field(default=0, ge=0, description="additional heads that every token uses, without a gate")
    window: int | None = Field(
        default=None, ge=1, description="tokens a shared head attends to, including its own; null: all; published: 128"
    )
    gate: GateName = Field(default="softmax", description="factor on the output of a head; published: softmax")
    rank_positions: bool = Field(
        default=True,
        description="true: RoPE counts the tokens of the head, as published; false: all tokens of the sequence",
    )
    router: AnyRouter = Field(default=LinearRouterConfig(), description="computes the logits of the heads")
    balance: BalanceConfig = Field(default=BalanceConfig(f_p=0.001), description="load balancing of the heads")
    projections: Literal["dense", "grouped"] = Field(
        default="dense",
        description="dense: project all heads, then select; grouped: one matmul per head, over the tokens routed to it",
    )

    @model_validator(mode="after")
    def _routing_is_possible(self) -> Self:
        every = self.top_k if isinstance(self.top_k, list) else [self.top_k]
        for k in every:
            if not 1 <= k <= self.heads:
                raise ValueError(
                    f"top_k: a token is routed to {k} of {self.heads} heads; use top_k 1 to {self.heads}, or heads "
                    f"{max(k, 2)}"
                )
            if self.gate == "renorm" and k == 1:
                raise ValueError(
                    "gate: renorm at top_k 1 is the constant 1, so the router would get no gradient from the task; "
                    "use gate softmax or detached_renorm, or top_k 2"
                )
        if self.window is not None and not self.shared_heads:
            raise ValueError(
                "window: it is that of shared heads, and there are none; use shared_heads 4, or leave window out"
            )
        if self.router.reads_queries:
            raise ValueError(
                f"router: {self.router.type} ranks the queries of all heads, and a token has queries of its own heads "
                "alone; use router.type linear or two_layer"
            )
        check_router(self.router, self.balance, gate=self.gate, choice=min(every, default=1) < self.heads)
        return self

    def layer(self, index: int, layers: int) -> Self:
        if not isinstance(self.top_k, list):
            return self
        return self.model_copy(update={"top_k": of_layer(self.top_k, index, layers)})

    def check_run(self, *, seq_len: int, tokens: int, tokens_per_step: int) -> None:
        super().check_run(seq_len=seq_len, tokens=tokens, tokens_per_step=tokens_per_step)
        if self.window is not None and self.window > seq_len:
            raise ValueError(
                f"attention.window: a window of {self.window} tokens is longer than the sequences of {seq_len}; "
                f"use null (all tokens) or {seq_len} at most, or data.seq_len {self.window}"
            )

    @property
    def k(self) -> int:
        """Heads of a token. The config must be that of one layer (`layer`)."""
        assert isinstance(self.top_k, int), "k differs by layer: ask the config of one layer"
        return self.top_k

    @property
    def score_maps(self) -> int:
        return self.k + self.shared_heads

    @property
    def reads_routing(self) -> bool:
        return True

    def attended_heads(self, *, tensor: int = 1) -> tuple[int, ...]:
        """The packed pairs are one call with a single head."""
        return (1, self.shared_heads // tensor) if self.shared_heads else (1,)

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return Namoh(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    def num_params(self, *, width: int) -> int:
        """4d(H + s)D, plus the router (linear: dH), plus 2D (two gains) with QK-norm."""
        gains = 2 * self.head_dim if self.qk_norm else 0
        router = self.router.num_params(width=width, groups=1, experts=self.heads)
        return 4 * width * (self.heads + self.shared_heads) * self.head_dim + router + gains

    def head_keys(self, *, seq_len: int) -> float:
        """Keys that a token attends to in one of its heads, itself included: 1 + (k/H) (S - 1)/2.

        The mean over tokens, if each earlier token is in the head with probability k/H, independently. For given
        segments of L_i tokens the exact sum over tokens and heads is that of L_i (L_i + 1) / 2 (`Segments.scores`),
        which an uneven load increases.
        """
        return 1 + self.k / self.heads * (seq_len - 1) / 2

    def core_flops_per_token(self, *, seq_len: int) -> float:
        """4D per key: k heads over their own tokens at even load, and the shared heads over their window."""
        shared = self.shared_heads * visible_keys(seq_len, self.window)
        return 4 * self.head_dim * (self.k * self.head_keys(seq_len=seq_len) + shared)

    def flops_per_token(self, *, width: int, seq_len: int) -> Flops:
        """Useful: 8d(k + s)D, router and core. Executed if `dense`: projections of all H heads."""
        per_head = 8 * width * self.head_dim
        rest = per_head * self.shared_heads + self.core_flops_per_token(seq_len=seq_len)
        rest += self.router.flops_per_token(width=width, groups=1, experts=self.heads)
        computed = self.k if self.projections == "grouped" else self.heads
        return Flops(useful=rest + per_head * self.k, executed=rest + per_head * computed)

    def kv_bytes_per_token(self, *, seq_len: int, bytes_per_element: int) -> float:
        """2kD elements whatever the load. A shared head with a window of w keeps the last w - 1 tokens."""
        kept = seq_len if self.window is None else min(seq_len, self.window - 1)
        return 2 * self.head_dim * bytes_per_element * (self.k + self.shared_heads * kept / seq_len)

    def shards(self) -> dict[str, Shard]:
        """Each rank owns whole heads, of the pool and of the shared ones. The router is whole on every rank.

        A router without parameters has buffers that are sharded by group, and there is one group: the layer is whole.
        """
        cut = bool(self.router.shards())
        shards = _shards("", self.heads if cut else 1)
        return shards | (_shards("_shared", self.shared_heads if cut else 1) if self.shared_heads else {})


def _shards(suffix: str, units: int) -> dict[str, Shard]:
    rows = {f"{name}{suffix}": Shard(0, units) for name in ("w_q", "w_k", "w_v")}
    return rows | {f"w_o{suffix}": Shard(1, units)}


class _PackedNorm(RMSNorm):
    """RMSNorm that is never compiled: the number of packed pairs of a tensor-parallel rank follows the routing."""

    def use(self, operations: Operations) -> None:
        self._norm = rms_norm


class Namoh(RoutedAttention):
    """The NAMOH layer. Parameters: w_q, w_k, w_v [H D, d], w_o [d, H D], a `router`; the same four with the suffix
    `_shared` for s heads; gains `q_norm`, `k_norm`, which all heads share.

    `ranks` is set where tensor parallelism shards the heads.
    """

    def __init__(self, config: NamohConfig, *, width: int, layers: int, init_std: float, norm_eps: float) -> None:
        super().__init__()
        self.config, self.head_dim = config, config.head_dim
        self.init_stds = {}
        for suffix, heads in (("", config.heads), ("_shared", config.shared_heads)):
            for name in ("w_q", "w_k", "w_v") if heads else ():
                self.register_parameter(name + suffix, parameter(heads * config.head_dim, width))
                self.init_stds[name + suffix] = init_std
            if heads:
                self.register_parameter(f"w_o{suffix}", parameter(width, heads * config.head_dim))
                self.init_stds[f"w_o{suffix}"] = init_std / (2 * layers) ** 0.5
        if config.shared_heads:
            self.output_matrices += ("w_o_shared",)
        routing = RoutingConfig(gate=config.gate, balance=config.balance, router=config.router)
        self.router = config.router.build(routing, width=width, groups=1, experts=config.heads)
        self.q_norm = _PackedNorm(config.head_dim, norm_eps) if config.qk_norm else None
        self.k_norm = _PackedNorm(config.head_dim, norm_eps) if config.qk_norm else None
        self.rope = QkNorm(config.model_copy(update={"qk_norm": False}), norm_eps)  # of the shared heads
        self._table: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, context: Context) -> AttentionOutput:
        routing = self.router(x, context, k=self.config.k)
        idx, gate = routing.idx.squeeze(2), routing.gate.squeeze(2)  # [B, S, k]
        own = len(self.get_parameter("w_q")) // self.head_dim  # H, or this rank's part
        numbers = None if context.documents is None else context.documents.numbers(x.device)
        segments = Segments.of(idx, heads=own, first=self.ranks.index * own, numbers=numbers)
        q, k, v = self._projected(x, segments)
        rope, rows = self._positions(context, segments)
        q, k = rotate_rows(q, rope, rows), rotate_rows(k, rope, rows)
        past = None if context.cache is None else context.cache.of_heads.extend(k, v, segments)
        o = context.attend_segments(q, k, v, segments, past)  # [P, D]
        o = o * gate.flatten().index_select(0, segments.in_slots()).to(o.dtype).unsqueeze(1)
        return AttentionOutput(self._with_shared(self._combined(o, segments), x, context), routing.aux_loss)

    def forward_reference(self, x: Tensor, context: Context) -> AttentionOutput:
        """Dense reference of `forward`, without a cache: all heads over all tokens, with one mask [B, H, S, S]."""
        assert context.cache is None, "decoding has no dense form"
        routing = self.router(x, context, k=self.config.k)
        batch, seq_len, heads = *x.shape[:2], self.config.heads
        idx, chosen_gate = routing.idx.squeeze(2), routing.gate.squeeze(2)
        gate = chosen_gate.new_zeros(batch, seq_len, heads).scatter(-1, idx, chosen_gate)
        routed = torch.zeros_like(gate, dtype=torch.bool).scatter(-1, idx, True)  # [B, S, H]
        seen = torch.ones(seq_len, seq_len, dtype=torch.bool, device=x.device).tril().expand(batch, 1, -1, -1)
        if context.documents is not None:
            numbers = context.documents.numbers(x.device)
            seen = seen & (numbers[:, None, :, None] == numbers[:, None, None, :])
        seen = seen & routed.transpose(1, 2).unsqueeze(2)  # [B, H, S, S]: the key is one of the head's tokens
        rank = (seen.sum(-1) - 1).clamp_min(0).transpose(1, 2)  # [B, S, H]
        if not self.config.rank_positions:
            rank = torch.arange(seq_len, device=x.device)[:, None].expand_as(rank)
        q, k, v = (F.linear(x, self.get_parameter(name)).unflatten(-1, (heads, -1)) for name in ("w_q", "w_k", "w_v"))
        q, k = self._normed(q, k)
        q, k = (rotate_rows(t.flatten(0, 2), context.rope, rank.flatten()).view_as(t) for t in (q, k))
        scores = torch.einsum("bshd,bthd->bhst", q, k) / self.head_dim**0.5
        lost = ~routed.transpose(1, 2).unsqueeze(-1)  # rows of tokens that are elsewhere: a gate of 0 removes them
        o = torch.einsum("bhst,bthd->bshd", scores.masked_fill(~(seen | lost), float("-inf")).softmax(-1), v)
        y = F.linear((o * gate.to(o.dtype).unsqueeze(-1)).flatten(2), self.get_parameter("w_o"))
        return AttentionOutput(self._with_shared(y, x, context), routing.aux_loss)

    def _projected(self, x: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """Packed queries, keys and values [P, D] of x [B, S, d], before RoPE."""
        matrices = [self.get_parameter(name) for name in ("w_q", "w_k", "w_v")]
        if self.config.projections == "grouped":
            rows = x.flatten(0, 1).index_select(0, segments.token).split(segments.per_head)
            q, k, v = (
                torch.cat([part @ w.t() for part, w in zip(rows, matrix.split(self.head_dim), strict=True)])
                for matrix in matrices
            )
        else:
            q, k, v = (segments.select(F.linear(x, w).unflatten(-1, (-1, self.head_dim))) for w in matrices)
        return *self._normed(q, k), v

    def _combined(self, o: Tensor, segments: Segments) -> Tensor:
        """Sum of the heads' output projections: gated packed outputs [P, D] -> [B, S, d]."""
        w_o = self.get_parameter("w_o")
        if self.config.projections == "dense":
            return F.linear(segments.expand(o).flatten(2), w_o)
        parts = zip(o.split(segments.per_head), w_o.split(self.head_dim, 1), strict=True)
        made = torch.cat([part @ w.t() for part, w in parts])  # [P, d]
        batch, seq_len, k = segments.shape
        slots = made.new_zeros(batch * seq_len * k, made.shape[1]).index_copy(0, segments.in_slots(), made)
        return slots.view(batch, seq_len, k, -1).sum(2)  # a slot is 0 where its head is on another rank

    def _with_shared(self, y: Tensor, x: Tensor, context: Context) -> Tensor:
        """Add the shared heads' outputs to y [B, S, d]."""
        if not self.config.shared_heads:
            return y
        q, k, v = (
            F.linear(x, self.get_parameter(f"{name}_shared")).unflatten(-1, (-1, self.head_dim))
            for name in ("w_q", "w_k", "w_v")
        )
        q, k = (self.rope(t, context.rope) for t in self._normed(q, k))
        k, v = context.keys_and_values(k, v, part="shared", window=self.config.window)
        o = context.attend(q, k, v, window=self.config.window)
        return y + F.linear(o.flatten(2), self.get_parameter("w_o_shared"))

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (q, k) if self.q_norm is None or self.k_norm is None else (self.q_norm(q), self.k_norm(k))

    def _positions(self, context: Context, segments: Segments) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Tables of RoPE, and their row for each pair [P].

        Without a cache the context's tables begin at position 0, so they have a row for each place in a segment. With
        one they begin after the cached tokens, of which a head holds a part.
        """
        if not self.config.rank_positions:
            return context.rope, segments.token % segments.shape[1]
        if context.cache is None:
            return context.rope, segments.place
        cache = context.cache.of_heads
        rows, rotated = cache.places(segments), context.rope[0].shape[-1]
        return self._grown_table(cache.longest + segments.shape[1], rotated, rows.device), rows

    def _grown_table(self, length: int, rotated: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables of RoPE of `length` positions or more, kept between passes."""
        table = self._table
        if table is None or len(table[0]) < length or table[0].device != device or table[0].shape[-1] != rotated:
            with torch.inference_mode(False):  # the table outlives this pass
                self._table = table = rope_tables(2 * length, rotated, self.config.rope_base, device)
        return table
