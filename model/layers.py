"""Norms and MLP of the decoder, and helpers to declare parameters.

Legend: B batch, S sequence, d width, F FFN width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.kernels.operations import Operations
from headway.kernels.relative import Relative
from headway.model.base import RelativeForm, Shard, alone
from headway.model.config import MlpType, ModelConfig

Drop = Callable[[Tensor], Tensor]


def parameter(*shape: int) -> nn.Parameter:
    """An uninitialized parameter. `headway.model.init` initializes it by its full name."""
    return nn.Parameter(torch.empty(*shape))


class FixedBuffers(nn.Module):
    """A module whose own buffers keep their dtype in `.to(dtype)`.

    Example: in bf16, adding 1e-3 to a bias of 0.25 would leave it unchanged.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class Replaceable(nn.Module):
    """A module whose functions can be replaced by faster kernels with the same semantics."""

    @abstractmethod
    def use(self, operations: Operations) -> None: ...


def use_operations(module: nn.Module, operations: Operations) -> None:
    """Set `operations` on every `Replaceable` in `module`."""
    for part in module.modules():
        if isinstance(part, Replaceable):
            part.use(operations)


class _Gain(Replaceable):
    """Base of the norms: a gain [width]."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.gain = parameter(width)
        self.eps = eps
        self.use(Operations())


class RMSNorm(_Gain):
    """RMSNorm over the last dimension, with a gain."""

    def use(self, operations: Operations) -> None:
        self._norm = operations.norm

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x, self.gain, self.eps)


class AddNorm(_Gain):
    """Residual addition and the following RMSNorm: returns x + y and norm(x + y)."""

    def use(self, operations: Operations) -> None:
        self._add_norm = operations.add_norm

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._add_norm(x, y, self.gain, self.eps)


class _GainAndBias(_Gain):
    """A gain and a bias [width]; the bias starts at 0."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.bias = parameter(width)
        self.init_stds = {"bias": 0.0}


class LayerNorm(_GainAndBias):
    """LayerNorm over the last dimension, with a gain and a bias."""

    def use(self, operations: Operations) -> None:
        self._norm = operations.layer_norm

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x, self.gain, self.bias, self.eps)


class AddLayerNorm(_GainAndBias):
    """Residual addition and the following LayerNorm: returns x + y and norm(x + y)."""

    def use(self, operations: Operations) -> None:
        self._add_norm = operations.add_layer_norm

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._add_norm(x, y, self.gain, self.bias, self.eps)


def make_norm(model: ModelConfig) -> RMSNorm | LayerNorm:
    """The norm before attention, or before the head."""
    return (LayerNorm if model.norm == "layernorm" else RMSNorm)(model.width, model.norm_eps)


def make_add_norm(model: ModelConfig) -> AddNorm | AddLayerNorm:
    """The residual addition after attention, and the norm before the MLP."""
    return (AddLayerNorm if model.norm == "layernorm" else AddNorm)(model.width, model.norm_eps)


class Positions(nn.Module):
    """A learned vector [d] per position of the sequence, added to the embedding: `weight` [length, d].

    Positions count from the start of the sequence, not of a document in it.
    """

    def __init__(self, length: int, width: int, *, init_std: float) -> None:
        super().__init__()
        self.weight = parameter(length, width)
        self.init_stds = {"weight": init_std}

    def forward(self, start: int, count: int) -> Tensor:
        """The vectors [count, d] of positions start .. start + count - 1."""
        length = self.weight.shape[0]
        if start + count > length:
            raise ValueError(
                f"model.max_positions: {length} positions are learned, and token {start + count} has none; use "
                f"{length} tokens at most, or a model with positions rope or none"
            )
        return self.weight[start : start + count]


class RelativePositions(nn.Module):
    """Relative positions of one layer (`headway.kernels.relative`): `w_r` [G D, d] projects the vectors of distances.

    With biased heads, `b_u` and `b_v` [H D] are the biases of the queries, which start at 0.
    """

    def __init__(self, form: RelativeForm, head_dim: int, width: int, *, init_std: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.w_r = parameter(form.groups * head_dim, width)
        self.init_stds = {"w_r": init_std}
        self.shards = {"w_r": Shard(0, form.groups)}
        for name in ("b_u", "b_v"):
            self.register_parameter(name, parameter(form.biased_heads * head_dim) if form.biased_heads else None)
            if form.biased_heads:
                self.init_stds[name], self.shards[name] = 0.0, Shard(0, form.groups)

    def forward(self, distances: Tensor) -> Relative:
        """distances [K, d] -> position keys [K, G, D] of this rank's groups, and biases [H, D]."""
        biases = (self._parameters["b_u"], self._parameters["b_v"])
        u, v = (None if b is None else b.unflatten(0, (-1, self.head_dim)) for b in biases)
        return Relative(F.linear(distances, self.w_r).unflatten(-1, (-1, self.head_dim)), u, v)


class OutputBias(nn.Module):
    """Adds the bias [d] of a branch's output projection.

    It is not part of the branch: tensor parallelism shards the projection over its inputs, and the bias is added once,
    to the sum over the ranks. Like the gains of the norms, it acts on the residual stream.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = parameter(width)
        self.init_stds = {"bias": 0.0}

    def forward(self, y: Tensor) -> Tensor:
        return y + self.bias


class Mlp(Replaceable):
    """Base of the MLPs: matrices `inner` [F, d] into the hidden width and w_down [d, F]; with `biases`, b_* [F] of the
    inner ones, which start at 0. The bias of w_down is an `OutputBias` of the block.

    `w_down` is the last matrix: the MLP's output depends linearly on it. `forward` gets dropout of the hidden
    activations [B, S, F] as a function `drop`.
    """

    output_matrices = ("w_down",)
    inner: tuple[str, ...]

    def __init__(self, width: int, ffn_width: int, *, layers: int, init_std: float, biases: bool = False) -> None:
        super().__init__()
        self.init_stds: dict[str, float] = {}
        self.shards: dict[str, Shard] = {}
        for name in self.inner:
            self.register_parameter(name, parameter(ffn_width, width))
            self.init_stds[name] = init_std
            self.shards[name] = Shard(0, ffn_width)
        self.w_down = parameter(width, ffn_width)
        self.init_stds["w_down"] = init_std / (2 * layers) ** 0.5
        self.shards["w_down"] = Shard(1, ffn_width)
        for name in self.inner:
            bias = name.replace("w_", "b_")
            self.register_parameter(bias, parameter(ffn_width) if biases else None)
            if biases:
                self.init_stds[bias] = 0.0
                self.shards[bias] = Shard(0, ffn_width)
        self.use(Operations())


class _Gated(Mlp):
    """w_down f(w_gate x, w_up x), with the function `function` of `Operations`."""

    inner = ("w_gate", "w_up")
    function: str
    w_gate: nn.Parameter
    w_up: nn.Parameter
    b_gate: nn.Parameter | None
    b_up: nn.Parameter | None

    def use(self, operations: Operations) -> None:
        self._function = getattr(operations, self.function)

    def forward(self, x: Tensor, drop: Drop = alone) -> Tensor:
        inner = self._function(F.linear(x, self.w_gate, self.b_gate), F.linear(x, self.w_up, self.b_up))
        return F.linear(drop(inner), self.w_down)


class SwiGLU(_Gated):
    """w_down (silu(w_gate x) * w_up x) (Shazeer, 2020, arXiv 2002.05202).

    w_gate and w_up are separate matrices. One fused matmul with 2F rows was not faster on CPU (56 against 54 ms for
    forward and backward at T=2048, d=256, F=704), and separate matrices can be sharded without reordering rows.
    """

    function = "silu_mul"


class GeGlu(_Gated):
    """w_down (gelu(w_gate x) * w_up x) with the tanh approximation, as in T5 v1.1 (the same source)."""

    function = "gelu_tanh_mul"


class _Plain(Mlp):
    """w_down f(w_up x), with the function `function` of `Operations`."""

    inner = ("w_up",)
    function: str
    w_up: nn.Parameter
    b_up: nn.Parameter | None

    def use(self, operations: Operations) -> None:
        self._function = getattr(operations, self.function)

    def forward(self, x: Tensor, drop: Drop = alone) -> Tensor:
        return F.linear(drop(self._function(F.linear(x, self.w_up, self.b_up))), self.w_down)


class Gelu(_Plain):
    """w_down gelu(w_up x)."""

    function = "gelu"


class GeluTanh(_Plain):
    """w_down gelu(w_up x) with the tanh approximation, as in GPT-2."""

    function = "gelu_tanh"


class Relu(_Plain):
    """w_down relu(w_up x)."""

    function = "relu"


MLPS: dict[MlpType, type[Mlp]] = {"swiglu": SwiGLU, "geglu": GeGlu, "gelu": Gelu, "gelu_tanh": GeluTanh, "relu": Relu}
"""By the name in the spec (`model.mlp`)."""
