"""Backends of the attention core: PyTorch's backends by name and priority, or FlashAttention-3.

Within documents, `auto` and `flash` use PyTorch's `varlen_attn`, and `fa3` uses `flash_attn_varlen_func`: one call for
all documents. `cudnn` and `math` attend document by document (`headway.kernels.documents`).

Legend: B batch, S sequence, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from headway.kernels.attention import core
from headway.kernels.documents import Documents
from headway.kernels.levers import FA3_MODULE, LeverError, importable
from headway.kernels.varlen import LARGEST_HEAD, Varlen, documents_core, supports, torch_varlen

Backend = Literal["auto", "cudnn", "flash", "fa3", "math"]

_CUDNN, _FLASH, _MATH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
_ORDER: dict[str, list[SDPBackend]] = {
    "auto": [_CUDNN, _FLASH, SDPBackend.EFFICIENT_ATTENTION, _MATH],
    "cudnn": [_CUDNN],
    "flash": [_FLASH],
    "math": [_MATH],
}


def attention_core(backend: Backend, *, device_type: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """`headway.kernels.attention.core` on a backend, for tensors of `dtype` on `device_type`.

    On the CPU this is the unchanged core, for which PyTorch selects the backend. Raises LeverError (64) if the backend
    is not available.
    """
    if device_type != "cuda":
        if backend in ("auto", "math"):
            return core
        raise LeverError(f"speed.attention: {backend} runs on NVIDIA GPUs, and this run is on {device_type}; {_ANY}")
    if backend in ("cudnn", "flash", "fa3") and dtype == torch.float32:
        raise LeverError(f"speed.attention: {backend} takes no fp32; {_ANY}, or parallel.precision: bf16")
    if backend == "cudnn" and torch.are_deterministic_algorithms_enabled():
        raise LeverError(
            "speed.attention: cudnn has no deterministic backward pass, which is asked for; use speed.attention: auto "
            "or flash"
        )
    if backend != "fa3":
        plain = partial(core, scores=partial(ordered_scores, backend))
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        if backend in ("auto", "flash") and supports(dtype, capability):
            return partial(_packed_core, torch_varlen, plain)
        return plain
    if not importable(FA3_MODULE):
        raise LeverError(
            f"speed.attention: fa3 needs FlashAttention-3 ({FA3_MODULE}), which is not installed; use speed.attention: "
            "auto or flash"
        )
    library = importlib.import_module(FA3_MODULE)
    kernel = partial(_fa3_varlen, library.flash_attn_varlen_func)
    return partial(_packed_core, kernel, partial(_fa3_core, library.flash_attn_func))


_ANY = "use speed.attention: auto or math"


def order(backend: Backend) -> list[SDPBackend]:
    """PyTorch's backends by priority. With deterministic algorithms, flash is first: cuDNN's backward pass is not."""
    backends = _ORDER[backend]
    if backend == "auto" and torch.are_deterministic_algorithms_enabled():
        return [_FLASH, *(each for each in backends if each != _FLASH)]
    return backends


def ordered_scores(backend: Backend, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """`scaled_dot_product_attention` on the first backend of `order(backend)` that supports the arguments.

    q [B, H, S, D]; k, v [B, G, S, D].
    """
    if backend == "flash" and options.get("attn_mask") is not None:
        raise LeverError(
            "speed.attention: flash takes no masks, and so no windows without documents; use speed.attention: auto or "
            "cudnn, or data.document_mask: true"
        )
    with sdpa_kernel(order(backend), set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, **options)


def _packed_core(
    kernel: Varlen,
    plain: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None,
    *,
    window: int | None = None,
) -> Tensor:
    """`kernel` within documents; the core `plain` for whole sequences, and for heads that the kernel does not take."""
    if documents is None or (documents.whole and window is None):
        return plain(q, k, v, None, window=window)
    if q.shape[-1] > LARGEST_HEAD:
        return plain(q, k, v, documents, window=window)
    return documents_core(kernel, q, k, v, documents, window=window)


def _fa3_core(
    attention: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None,
    *,
    window: int | None = None,
) -> Tensor:
    """The core on FlashAttention-3 without documents. As in `core`, the queries are the last positions: query i attends
    to keys up to K - S + i.
    """
    if documents is not None:
        raise LeverError(
            f"speed.attention: fa3 takes heads of at most {LARGEST_HEAD} channels; use speed.attention: auto or cudnn"
        )
    return _output(attention(q, k, v, **_fa3_options(window)))


def _fa3_varlen(
    attention: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """`headway.kernels.varlen.Varlen` by FlashAttention-3's `flash_attn_varlen_func`."""
    return _output(attention(q, k, v, *starts, *longest, softmax_scale=scale, **_fa3_options(window)))


def _fa3_options(window: int | None) -> dict[str, Any]:
    return {
        "causal": True,
        "window_size": (-1, -1) if window is None else (window - 1, 0),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _output(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out  # some releases also return the log-sum-exp
