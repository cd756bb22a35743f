"""Gated DeltaNet (Yang, Kautz and Hatamizadeh, 2024, arXiv 2412.06464): linear attention with the gated delta rule.

Legend: B batch, S sequence, d width, H heads of queries and keys, V heads of values (V/H per head of keys), D=head_dim
channels of a query or key, E channels of a value, W taps of the convolutions, L tokens of a chunk.

    q, k, v = silu(conv(W_Q x)), silu(conv(W_K x)), silu(conv(W_V x))     causal, each channel alone, W tokens
    a = exp(-exp(A) softplus(W_A x + c)),   b = sigmoid(W_B x)            one number per head of values, fp32
    M_t = a_t (I - b_t k_t k_t^T) M_{t-1} + b_t k_t v_t^T                 state [D, E] of a head; k of length 1
    o_t = M_t^T q_t / sqrt(D)                                             q of length 1
    y   = W_O [silu(W_gate x) * norm(o_1) .. silu(W_gate x) * norm(o_V)]

Head v of values reads the queries and keys of head v // (V/H). There is no softmax, and there are no positions: order
enters by the convolutions and the decay. State and convolutions begin anew with each document. `headway.kernels.delta`
computes the rule, in chunks of L tokens.

A layer caches its states, and the last W - 1 inputs of the convolutions: numbers that do not grow with the sequence.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from headway.kernels.delta.convolution import short_convolution
from headway.kernels.delta.rule import recurrent_delta
from headway.kernels.operations import Operations
from headway.model.base import Attention, AttentionConfig, AttentionOutput, Context, Flops, Shard
from headway.model.layers import Replaceable, RMSNorm, parameter

STATE = "state"
LARGEST_RATE = 16.0
"""exp(A) starts uniform in (0, 16], as published (the source takes both starts from Mamba-2)."""

STEPS = (1e-3, 0.1)
"""softplus(c) starts between these, uniform in the logarithm."""


class GatedDeltaConfig(AttentionConfig):
    """Gated DeltaNet; `head_dim` is D."""

    type: Literal["gated_delta"] = "gated_delta"
    no_context_parallel: ClassVar[str | None] = (
        "attention.type gated_delta passes a state from token to token, and ranks that share a sequence do not pass it "
        "on"
    )
    no_compiled_blocks: ClassVar[str | None] = (
        "attention.type gated_delta, whose loop over chunks would be unrolled for each length"
    )
    heads: int = Field(ge=1, le=65_536, description="H, heads of queries and keys")
    value_heads: int | None = Field(
        default=None,
        ge=1,
        le=65_536,
        description="V, heads of values, a multiple of heads; each has a state; null: heads",
    )
    value_dim: int | None = Field(
        default=None, ge=1, description="E, channels per head of values; null: 2 head_dim, as published"
    )
    conv: int = Field(default=4, ge=1, le=64, description="W, tokens that the convolutions see, including their own")
    chunk: int = Field(
        default=64, ge=1, le=1024, description="L, tokens computed at once; changes time and rounding, not the function"
    )

    @model_validator(mode="after")
    def _heads_and_positions(self) -> Self:
        if self.values % self.heads:
            near = max(1, round(self.values / self.heads)) * self.heads
            raise ValueError(
                f"value_heads: {self.values} heads of values do not divide among {self.heads} heads of keys; use "
                f"value_heads {near} (a multiple of heads), or heads {math.gcd(self.values, self.heads)}"
            )
        for name in ("rope_base", "rope_fraction"):
            if getattr(self, name) != (default := type(self).model_fields[name].default):
                raise ValueError(
                    f"{name}: gated_delta rotates nothing, as the order of tokens enters by convolutions and decay; "
                    f"leave {name} out, or set back that of a base to {default!r}"
                )
        if self.qk_norm:
            raise ValueError(
                "qk_norm: queries and keys of gated_delta always have length 1 (without a gain); use qk_norm false"
            )
        return self

    @model_validator(mode="after")
    def _rotated_channels_are_pairs(self) -> Self:
        """Replaces the rule for `head_dim`: nothing is rotated."""
        return self

    @property
    def values(self) -> int:
        """V"""
        return self.heads if self.value_heads is None else self.value_heads

    @property
    def value_size(self) -> int:
        """E"""
        return 2 * self.head_dim if self.value_dim is None else self.value_dim

    @property
    def rotated(self) -> int:
        return 0

    @property
    def score_maps(self) -> int:
        return 0

    def attended_heads(self, *, tensor: int = 1) -> tuple[int, ...]:
        """The attention core is not called."""
        return ()

    @property
    def convolved(self) -> int:
        """Channels of the convolutions: those of queries, keys and values."""
        return 2 * self.heads * self.head_dim + self.values * self.value_size

    def useful_core_flops_per_token(self, *, seq_len: int) -> float:
        """6DEV, token by token: the state is read by the key, written, and read by the query, 2DE each. Decay is not
        counted, as no factor on a tensor is but for gates.
        """
        return 6.0 * self.head_dim * self.value_size * self.values

    def core_flops_per_token(self, *, seq_len: int) -> float:
        """In chunks of n tokens, besides: 4Dn^2 for k k^T and q k^T of each head of keys; for each head of values 2En^2
        for the values of the chunk, and En(n - 1) for the triangular system. n is L, and less in the last chunk.
        """
        full, rest = divmod(seq_len, self.chunk)
        squares, pairs = full * self.chunk**2 + rest**2, full * self.chunk * (self.chunk - 1) + rest * (rest - 1)
        of_keys = 4 * self.head_dim * self.heads * squares
        of_values = self.value_size * self.values * (2 * squares + pairs)
        return self.useful_core_flops_per_token(seq_len=seq_len) + (of_keys + of_values) / seq_len

    def recomputed_core_bytes(self, *, seq_len: int) -> float:
        """The states before all chunks, and the tensors of the one chunk whose gradients are computed, all in fp32. A
        chunk of n tokens has at most about 9 of n by n, 7 of n by E and 6 of D by E for each head of values, and 9 of n
        by D for each head of keys: fitted to allocations of this kernel. The test of this file compares four shapes.
        """
        size, chunks, n = self.value_size, math.ceil(seq_len / self.chunk), min(self.chunk, seq_len)
        of_values = 9 * n * n + 7 * n * size + (6 + chunks) * self.head_dim * size
        return 4.0 * (self.values * of_values + 9 * self.heads * n * self.head_dim)

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return GatedDelta(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    def _matrices(self, width: int) -> int:
        """d (2HD + VE) of queries, keys and values; 2dVE of gate and output; 2dV of decay and writing strength."""
        return width * (self.convolved + 2 * self.values * self.value_size + 2 * self.values)

    def num_params(self, *, width: int) -> int:
        """The matrices; W (2HD + VE) taps; 2V numbers of the decay; E gains of the norm, which the heads share."""
        return self._matrices(width) + self.conv * self.convolved + 2 * self.values + self.value_size

    def gating_flops_per_token(self) -> int:
        """The convolutions."""
        return 2 * self.conv * self.convolved

    def flops_per_token(self, *, width: int, seq_len: int) -> Flops:
        """2 per element of the matrices and the taps, and the core."""
        rest = 2 * self._matrices(width) + self.gating_flops_per_token()
        return Flops(
            useful=rest + self.useful_core_flops_per_token(seq_len=seq_len),
            executed=rest + self.core_flops_per_token(seq_len=seq_len),
        )

    def kv_bytes_per_token(self, *, seq_len: int, bytes_per_element: int) -> float:
        """DEV numbers of the state, in fp32 at least, and (W - 1)(2HD + VE) of the convolutions, whatever `seq_len`: a
        sequence has a fixed number of bytes, and a token none.
        """
        state = self.head_dim * self.value_size * self.values * max(4, bytes_per_element)
        return (state + (self.conv - 1) * self.convolved * bytes_per_element) / seq_len

    def shards(self) -> dict[str, Shard]:
        """By heads of queries and keys, with the heads of values that read them. The gain of the norm is whole."""
        rows = ("w_q", "w_k", "w_v", "w_gate", "w_a", "w_b", "conv_q", "conv_k", "conv_v", "a_log", "dt_bias")
        return {name: Shard(0, self.heads) for name in rows} | {"w_o": Shard(1, self.heads)}


class _Rule(Replaceable):
    """The operations of a layer that `speed` can replace."""

    def __init__(self) -> None:
        super().__init__()
        self.use(Operations())

    def use(self, operations: Operations) -> None:
        self.delta, self.silu_mul = operations.delta, operations.silu_mul


class GatedDelta(Attention):
    """The layer. Parameters: w_q, w_k [H D, d], w_v and w_gate [V E, d], w_a and w_b [V, d], conv_q, conv_k [H D, W],
    conv_v [V E, W] (the last tap is that of the token itself), a_log and dt_bias (A and c) [V], the gain of `norm` [E],
    w_o [d, V E].
    """

    gate_matrices = ("w_gate", "w_a", "w_b", "conv_q", "conv_k", "conv_v")

    def __init__(self, config: GatedDeltaConfig, *, width: int, layers: int, init_std: float, norm_eps: float) -> None:
        super().__init__()
        self.config = config
        keys, values = config.heads * config.head_dim, config.values * config.value_size
        self.w_q, self.w_k, self.w_v = parameter(keys, width), parameter(keys, width), parameter(values, width)
        self.w_gate = parameter(values, width)
        self.w_a, self.w_b = parameter(config.values, width), parameter(config.values, width)
        self.conv_q, self.conv_k = parameter(keys, config.conv), parameter(keys, config.conv)
        self.conv_v = parameter(values, config.conv)
        self.a_log, self.dt_bias = parameter(config.values), parameter(config.values)
        self.norm = RMSNorm(config.value_size, norm_eps)
        self.w_o = parameter(width, values)
        self.rule = _Rule()
        self.init_stds = dict.fromkeys(("w_q", "w_k", "w_v", "w_gate", "w_a", "w_b"), init_std)
        # The std of PyTorch's convolutions, which published layers use: uniform within 1/sqrt(W).
        self.init_stds |= dict.fromkeys(("conv_q", "conv_k", "conv_v"), (3 * config.conv) ** -0.5)
        self.init_stds |= {"a_log": 1.0, "dt_bias": 1.0, "w_o": init_std / (2 * layers) ** 0.5}

    @torch.no_grad()
    def after_init(self) -> None:
        """Turn the normal numbers drawn for A and c into those of `LARGEST_RATE` and `STEPS`."""
        share = [torch.special.ndtr(p.double()).clamp(1e-6, 1) for p in (self.a_log, self.dt_bias)]
        self.a_log.copy_((LARGEST_RATE * share[0]).log())
        low, high = (math.log(step) for step in STEPS)
        step = (low + share[1] * (high - low)).exp()
        self.dt_bias.copy_(step + (-torch.expm1(-step)).log())  # the inverse of softplus

    def forward(self, x: Tensor, context: Context) -> AttentionOutput:
        held = {} if context.cache is None else context.cache.state.held
        kept: dict[str, Tensor] = {}
        q, k, v = (self._convolved(name, x, context, held, kept) for name in ("q", "k", "v"))
        q, k = (t.unflatten(-1, (-1, self.config.head_dim)) for t in (q, k))  # [B, S, H, D]
        v = v.unflatten(-1, (-1, self.config.value_size))  # [B, S, V, E]
        wide = torch.promote_types(x.dtype, torch.float32)
        step = F.softplus(F.linear(x, self.w_a).to(wide) + self.dt_bias.to(wide))
        log_decay, beta = -self.a_log.to(wide).exp() * step, F.linear(x, self.w_b).to(wide).sigmoid()
        if context.cache is None:
            o, _ = self.rule.delta(q, k, v, log_decay, beta, documents=context.documents, chunk=self.config.chunk)
        else:
            state = held.get(STATE)
            if state is None:
                state = x.new_zeros(len(x), v.shape[2], self.config.head_dim, self.config.value_size, dtype=wide)
            delta = recurrent_delta if x.shape[1] == 1 else self.rule.delta
            o, last = delta(q, k, v, log_decay, beta, state=state, chunk=self.config.chunk)
            assert last is not None, "a state was given"
            context.cache.state.held = {name: t.detach() for name, t in (kept | {STATE: last}).items()}
        o = context.head_outputs(o)
        gate = F.linear(x, self.w_gate).unflatten(-1, (-1, self.config.value_size))
        return AttentionOutput(F.linear(self.rule.silu_mul(gate, self.norm(o)).flatten(2), self.w_o), None)

    def _convolved(
        self, name: str, x: Tensor, context: Context, held: dict[str, Tensor], kept: dict[str, Tensor]
    ) -> Tensor:
        """Queries, keys or values [B, S, C] after their convolution. With a cache, its tail goes into `kept`."""
        projected, weight = F.linear(x, self.get_parameter(f"w_{name}")), self.get_parameter(f"conv_{name}")
        if context.cache is None:
            return short_convolution(projected, weight, documents=context.documents)
        size = self.config.conv - 1
        tail = held.get(name)
        if tail is None:
            tail = projected.new_zeros(len(x), size, projected.shape[2])
        kept[name] = torch.cat([tail, projected], 1)[:, x.shape[1] :].clone()  # without the storage of all of x
        return short_convolution(projected, weight, tail=tail)
