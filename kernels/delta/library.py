"""The gated delta rule of flash-linear-attention (`fla`), with the signature of our own.

No GPU has run it here. So the first call with heads of a size compares it with our own form on random tokens, in values
and gradients, and a difference beyond rounding in bf16 ends the run.

Legend: B batch, S sequence, H heads of queries and keys, V heads of values, D and E their channels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from headway.kernels.delta.rule import chunked_delta
from headway.kernels.documents import Documents
from headway.kernels.levers import FLA_MODULE, LeverError, importable

Delta = Literal["auto", "torch", "fla"]

PLACE = "fla.ops.gated_delta_rule"

LIMIT = 0.03
"""Largest relative difference (Euclidean norms) from our own form in fp32, of values and of each gradient. The kernel
multiplies in bf16, whose roundings are 2^-9; a wrong decay, order or boundary differs by more than 0.1."""


def delta_on(device_type: str, name: Delta, dtype: torch.dtype) -> Literal["torch", "fla"]:
    """What `name` means: auto is the library on CUDA in bf16 where it is installed, and our own form elsewhere."""
    if name != "auto":
        return name
    return "fla" if device_type == "cuda" and dtype == torch.bfloat16 and importable(FLA_MODULE) else "torch"


def delta_of(name: Delta, *, device_type: str, dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`chunked_delta`, or the library's kernel. Raises LeverError (64) if the library is asked for and not there."""
    if delta_on(device_type, name, dtype) == "torch":
        return chunked_delta
    legal = "use speed.delta: auto or torch"
    if not importable(FLA_MODULE):
        raise LeverError(f"speed.delta: fla needs flash-linear-attention, which is not installed; {legal}")
    if device_type != "cuda":
        raise LeverError(f"speed.delta: fla has kernels for GPUs alone, and this run is on {device_type}; {legal}")
    if dtype != torch.bfloat16:
        raise LeverError(f"speed.delta: fla takes no fp32; {legal}, or parallel.precision: bf16")
    return Library()


def _imported() -> Callable[..., tuple[Tensor, Tensor | None]]:
    try:
        return importlib.import_module(PLACE).chunk_gated_delta_rule
    except (ImportError, AttributeError, OSError) as error:
        raise LeverError(
            f"speed.delta: flash-linear-attention is installed without {PLACE}.chunk_gated_delta_rule ({error}); "
            "install another release, or use speed.delta: torch"
        ) from error


class Library:
    """The kernel, imported at its first use, and compared with `chunked_delta` at that with heads of each size."""

    def __init__(self) -> None:
        self._kernel: Callable[..., tuple[Tensor, Tensor | None]] | None = None
        self._compared: set[tuple[int, ...]] = set()

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        *,
        documents: Documents | None = None,
        state: Tensor | None = None,
        chunk: int = 64,
    ) -> tuple[Tensor, Tensor | None]:
        """As `chunked_delta`, in chunks of the kernel's own size. Raises LeverError if its results differ."""
        sizes = (v.shape[2] // q.shape[2], q.shape[3], v.shape[3])
        if sizes not in self._compared:
            self._compare(*sizes, v.device)
            self._compared.add(sizes)
        return self._call(documents, state, q, k, v, log_decay, beta)

    def _call(
        self,
        documents: Documents | None,
        state: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        scale, (batch, length), repeats = q.shape[3] ** -0.5, v.shape[:2], v.shape[2] // q.shape[2]
        if repeats > 1:
            q, k = (t.repeat_interleave(repeats, 2) for t in (q, k))
        inputs: dict[str, Any] = {"q": q, "k": k, "v": v, "g": log_decay, "beta": beta.to(v.dtype)}
        if documents is not None and not documents.whole:
            inputs = {name: t.flatten(0, 1).unsqueeze(0) for name, t in inputs.items()}
            inputs["cu_seqlens"] = documents.cumulative(v.device)[0].long()
        if self._kernel is None:
            self._kernel = _imported()
        o, last = self._kernel(
            **inputs,
            scale=scale,
            initial_state=state,
            output_final_state=state is not None,
            use_qk_l2norm_in_kernel=True,
        )
        return o.view(batch, length, *o.shape[2:]), last if state is not None else None

    def _compare(self, repeats: int, key: int, value: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        heads, shape = 2, (2, 200)
        sizes = [(heads, key), (heads, key), (heads * repeats, value), (heads * repeats,), (heads * repeats,)]
        drawn = [torch.randn(*shape, *size, generator=generator).to(device) for size in sizes]
        drawn[3], drawn[4] = -drawn[3].exp() / 8, drawn[4].sigmoid()
        upstream = torch.randn(*shape, *sizes[2], generator=generator).to(device)
        documents = Documents(((90, 110), (200,)))
        found: list[list[Tensor]] = []
        with torch.enable_grad():
            for dtype in (torch.float32, torch.bfloat16):
                inputs = [t.to(torch.bfloat16).to(dtype) if i < 3 else t for i, t in enumerate(drawn)]
                inputs = [t.detach().requires_grad_() for t in inputs]
                if dtype == torch.float32:
                    o, _ = chunked_delta(*inputs, documents=documents)
                else:
                    o, _ = self._call(documents, None, *inputs)
                found.append([o.detach(), *torch.autograd.grad(o, inputs, upstream.to(o.dtype))])
        for name, ours, theirs in zip(("o", "q", "k", "v", "decay", "beta"), *found, strict=True):
            difference = float((theirs.float() - ours.float()).norm() / ours.float().norm())
            if not difference <= LIMIT:  # also if it is not a number
                what = "values" if name == "o" else f"gradients of {name}"
                raise LeverError(
                    f"speed.delta: {what} of flash-linear-attention differ from Headway's own form by "
                    f"{difference:.3g} of their size, and {LIMIT} is rounding; install another release, or use "
                    "speed.delta: torch"
                )
