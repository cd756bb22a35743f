"""The engine for one process: the arithmetic of DeepSpeed's ZeRO-1 without its copies, and without DeepSpeed.

With one process there is nothing to shard or to exchange, so every stage of ZeRO has the same result. Losses, gradient
norms, weights and moments equal those of ZeRO-1 bit for bit on a CPU (tests/parallel/test_single_engine.py). There is
one exception: in fp32, the squares of a gradient with more than `NORM_BLOCK` elements are summed in another order. The
sum is in fp64, so this changes the norm, which is rounded to fp32, only if a rounding boundary lies between both sums.

What is left out: the flat tensor of all gradients, its copies before and after the reduction, fp64 copies of whole
gradients, and the flat tensor of all parameters. In bf16, each gradient is added to its fp32 sum as soon as it is
complete, and its memory is freed then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from headway.model.seq2seq.build import Model
from headway.parallel.adamw import AdamW
from headway.parallel.config import OptimizerConfig, ParallelConfig
from headway.parallel.engine import MOMENTS, STATE, Engine, parameter_groups
from headway.parallel.layout import Layout
from headway.parallel.masters import Piece, pieces_of
from headway.parallel.tensors.reader import copy_span
from headway.parallel.tensors.spans import Span, whole

EPS = 1e-6
"""Added to the gradient norm before clipping, as DeepSpeed does."""

NORM_BLOCK = 1 << 20
"""Elements of a gradient that are converted to fp64 at once, for its norm: 8 MiB."""


class SingleEngine(Engine):
    """An engine for a decoder in a single process. `accumulation`: forward passes per optimizer step."""

    def __init__(
        self,
        model: Model,
        *,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        layout: Layout,
        accumulation: int,
    ) -> None:
        assert layout.world_size == 1
        self.layout, self.accumulation = layout, accumulation
        self._adopt(model)
        model.to(layout.device)
        self._prepare()
        self._engine = model
        self._bf16, self._clip_norm = parallel.precision == "bf16", optimizer.clip_norm
        self._sums: dict[nn.Parameter, Tensor] = {}  # bf16: fp32 sums of gradients over micro-batches
        if self._bf16:
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16()
                parameter.register_post_accumulate_grad_hook(self._widen)
        groups = parameter_groups(model, optimizer.weight_decay)
        self._groups: list[list[nn.Parameter]] = [group["params"] for group in groups]
        self._pieces: list[Piece] = []
        for group in groups:
            pieces = pieces_of(group["params"])
            group["params"] = [piece.value for piece in pieces]
            self._pieces += pieces
        self._inner = AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True)
        for piece in self._pieces:  # checkpoints are loaded before the first step
            state = self._inner.state[piece.value]
            state["step"] = torch.zeros((), dtype=torch.float32, device=layout.device)
            for key in MOMENTS:
                state[key] = torch.zeros_like(piece.value, requires_grad=False)
        self._passed, self._applied, self._norm = 0, False, 0.0
        self._buffer: Tensor | None = None  # fp64, for norms on a CPU
        self._ask: Callable[[], bool] | None = None

    @property
    def module(self) -> nn.Module:
        return self._engine

    def _begin(self, lr: float, ask: Callable[[], bool] | None) -> None:
        for group in self._inner.param_groups:
            group["lr"] = lr
        self._passed, self._ask = 0, ask

    def _backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def _widen(self, parameter: Tensor) -> None:
        """Add a complete bf16 gradient to its fp32 sum, and free it."""
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        held = self._sums.get(parameter)
        if held is None:
            self._sums[parameter] = parameter.grad.float()
        else:
            held.add_(parameter.grad)
        parameter.grad = None

    def _advance(self) -> None:
        self._passed += 1
        if self._passed == self.accumulation:
            self._update()

    def _outcome(self) -> tuple[bool, float]:
        return self._applied, self._norm

    @torch.no_grad()
    def _update(self) -> None:
        """Clip the gradients and apply AdamW, unless they are not finite or the step is refused."""
        gradients = self._take_gradients()
        norm, factor = self._norm_and_factor(gradients)
        self._norm, scale = torch.stack([norm, factor]).tolist()
        if not math.isfinite(self._norm):
            self._norm, self._applied = math.inf, False
            return
        self._applied = self._ask is None or self._ask()
        if not self._applied:
            return
        if scale < 1:
            torch._foreach_mul_(list(gradients.values()), factor)
        for piece in self._pieces:
            piece.value.grad = piece.gradient([gradients[p] for p in piece.parameters])
        self._inner.step()
        for piece in self._pieces:
            piece.value.grad = None
        if self._bf16:
            self._round()

    def _take_gradients(self) -> dict[nn.Parameter, Tensor]:
        """fp32 gradients of all parameters; zeros for one that no loss depends on. The engine forgets them."""
        found: dict[nn.Parameter, Tensor] = {}
        for parameter in (p for group in self._groups for p in group):
            gradient = self._sums.pop(parameter, None) if self._bf16 else parameter.grad
            parameter.grad = None
            found[parameter] = torch.zeros_like(parameter, dtype=torch.float32) if gradient is None else gradient
        return found

    def _norm_and_factor(self, gradients: Mapping[nn.Parameter, Tensor]) -> tuple[Tensor, Tensor]:
        """The norm of all gradients, and the factor that clips them (at most 1). fp32 scalars on the device.

        Precision and order of the sums are DeepSpeed's. In fp32 squares are summed in fp64 within each parameter group;
        in bf16 (another class in DeepSpeed) in fp32 over all parameters.
        """
        groups = [[gradients[p] for p in group] for group in self._groups]
        if self._bf16:
            norm = _root(torch._foreach_norm([g for group in groups for g in group], 2))
            return norm, (self._clip_norm / (norm + EPS)).clamp(max=1.0)
        norm = torch.linalg.vector_norm(torch.stack([_root(self._norms(group)) for group in groups]))
        return norm, 1.0 / ((norm + EPS) / self._clip_norm).clamp(min=1.0)

    def _norms(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Norms of gradients in fp64: of each or, on a CPU, of each block of a large one.

        On a CPU, PyTorch converts a whole gradient first. A block is converted into a buffer that is used again.
        """
        if self.layout.device.type != "cpu":
            return torch._foreach_norm(list(gradients), 2, dtype=torch.float64)
        if self._buffer is None:
            largest = max(p.numel() for group in self._groups for p in group)
            self._buffer = torch.empty(min(largest, NORM_BLOCK), dtype=torch.float64)
        norms = []
        for block in (b for gradient in gradients for b in gradient.view(-1).split(NORM_BLOCK)):
            norms.append(torch.linalg.vector_norm(self._buffer[: block.numel()].copy_(block)))
        return norms

    def _round(self) -> None:
        """Set the bf16 parameters to their fp32 weights."""
        parts = [part for piece in self._pieces for part in piece.parts(piece.value)]
        torch._foreach_copy_([p for piece in self._pieces for p in piece.parameters], parts)

    # ------------------------------------------------------------ logical tensors, for checkpoints

    def _held(self) -> dict[nn.Parameter, tuple[Tensor, ...]]:
        """Views of the fp32 weights and of the moments of each parameter."""
        found: dict[nn.Parameter, tuple[Tensor, ...]] = {}
        for piece in self._pieces:
            state = self._inner.state[piece.value]
            wholes: Sequence[Tensor] = (piece.value.detach(), *(state[key] for key in MOMENTS))
            found |= dict(zip(piece.parameters, zip(*map(piece.parts, wholes), strict=True), strict=True))
        return found

    def read_spans(self) -> Iterator[tuple[str, Span, Tensor]]:
        held = self._held()
        for name, parameter, *_ in self._logical:
            span = whole(tuple(parameter.shape))
            for part, tensor in zip(STATE, held[parameter], strict=True):
                yield f"{part}/{name}", span, tensor

    @torch.no_grad()
    def write_logical(self, tensors: Mapping[str, Tensor], *, applied_steps: int) -> None:
        held = self._held()
        for name, parameter, *_ in self._logical:
            for part, tensor in zip(STATE, held[parameter], strict=True):
                copy_span(tensors, f"{part}/{name}", whole(tuple(parameter.shape)), tensor.view(-1))
        if self._bf16:
            self._round()
        for state in self._inner.state.values():
            state["step"].fill_(float(applied_steps))
        self.applied_steps = applied_steps


def _root(norms: Sequence[Tensor]) -> Tensor:
    """The norm of several tensors from their norms, in fp32."""
    return torch.stack(list(norms)).pow(2).sum().float().pow(0.5)
