"""Measure the limits of the machine: copies, matrix products, attention cores, cache reads. All data is random.

Every rate is work divided by the median time. FLOPs of a causal core count only unmasked scores. Legend: S tokens per
sequence, D head size, K inner width of a product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from headway.kernels.attention import shares_kv_heads
from headway.launcher.bench.gpu.rows import Machine, Row
from headway.launcher.bench.gpu.timing import in_turns, median, randn, rotated, short, summary
from headway.model.base import visible_keys

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
QUERY_HEADS = 16
LISTS = 32  # of the grouped product


def ceilings() -> list[Row]:
    """Rows, the most important first."""
    return [
        Row(key="ceilings/copy", what="copy from device memory to device memory", seconds=3, run=copy),
        Row(key="ceilings/matmul", what="matrix products by inner width, and one large square", seconds=6, run=matmul),
        *(
            Row(
                key=f"ceilings/core {name}",
                what=f"attention core by {name}, forward and backward",
                seconds=25,
                run=functools.partial(core, name),
            )
            for name in BACKENDS
        ),
        Row(key="ceilings/cache", what="reads from the L2 cache", seconds=3, run=cache),
        Row(key="ceilings/grouped", what=f"grouped matrix product over {LISTS} lists", seconds=4, run=grouped),
        Row(key="ceilings/launch", what="launch time of a minimal operation", seconds=2, run=launch),
    ]


def copy(machine: Machine) -> dict[str, Any]:
    """Bytes read and written per second."""
    scale = machine.scale
    count = scale.copied_bytes // 4
    source = randn((count,), machine.device, torch.float32)
    target = torch.empty_like(source)
    seconds = short({"copy": lambda i: target.copy_(source)}, machine.device, rounds=scale.rounds)["copy"]
    return {"bytes": 8 * count, "bytes_per_s": 8 * count / median(seconds), "seconds": summary(seconds)}


def cache(machine: Machine) -> dict[str, Any]:
    """Bytes per second of a reduction over a tensor that fits into the cache: a lower bound of the cache bandwidth."""
    scale = machine.scale
    kept = randn((64, scale.cached_bytes // 256), machine.device, torch.float32)
    size = kept.numel() * 4
    calls = {"largest": lambda i: kept.amax(1), "sum": lambda i: kept.sum(1)}
    found = short(calls, machine.device, rounds=scale.rounds)
    rates = {name: size / median(seconds) for name, seconds in found.items()}
    return {"bytes": size, "bytes_per_s": max(rates.values()), "by_reduction": rates}


def launch(machine: Machine) -> dict[str, Any]:
    """Seconds per operation if the host launches many small ones."""
    small = randn((16,), machine.device, torch.float32)

    def many(_: int) -> None:
        for _ in range(1000):
            small.add_(1.0)

    seconds = in_turns({"add": many}, machine.device, rounds=3)["add"]
    return {"seconds_per_operation": median(seconds) / 1000}


def matmul(machine: Machine) -> dict[str, Any]:
    """FLOP/s of [rows, K] x [K, K] for each K, in the scale's precision, and of one large square."""
    scale = machine.scale
    found = []
    for inner, rows in [*((k, scale.rows) for k in scale.inner), (scale.square, scale.square)]:
        inputs = rotated(
            lambda seed, inner=inner, rows=rows: [
                randn((rows, inner), machine.device, scale.dtype, seed),
                randn((inner, inner), machine.device, scale.dtype, seed + 100),
            ],
            most=4,
        )
        out = torch.empty(rows, inner, device=machine.device, dtype=scale.dtype)

        def product(i: int, inputs: Any = inputs, out: Tensor = out) -> None:
            torch.mm(*inputs[i % len(inputs)], out=out)

        seconds = short({"mm": product}, machine.device, rounds=scale.rounds)["mm"]
        flops = 2 * rows * inner * inner
        found.append(
            {"rows": rows, "inner": inner, "flops_per_s": flops / median(seconds), "seconds": summary(seconds)}
        )
    return {"products": found, "best_flops_per_s": max(p["flops_per_s"] for p in found)}


def core(backend: str, machine: Machine) -> dict[str, Any]:
    """FLOP/s of the causal core, forward, and forward with backward (3.5 times the FLOPs), per shape."""
    found = []
    for head_dim, seq_len, kv_heads in _core_shapes(machine):
        found.append(_core(machine, backend, head_dim, seq_len, kv_heads))
    return {"shapes": found}


def _core_shapes(machine: Machine) -> Iterator[tuple[int, int, int]]:
    for head_dim in machine.scale.head_dims:
        for seq_len in machine.scale.lengths:
            for kv_heads in (QUERY_HEADS // 4, QUERY_HEADS):
                yield head_dim, seq_len, kv_heads


def _core(machine: Machine, backend: str, head_dim: int, seq_len: int, kv_heads: int) -> dict[str, Any]:
    scale, device = machine.scale, machine.device
    batch = max(1, scale.tokens // seq_len)
    heads = {"q": QUERY_HEADS, "k": kv_heads, "v": kv_heads}
    q, k, v = (
        randn((batch, seq_len, n, head_dim), device, scale.dtype, i).transpose(1, 2).requires_grad_()
        for i, n in enumerate(heads.values())
    )
    grad = randn((batch, seq_len, QUERY_HEADS, head_dim), device, scale.dtype, 9).transpose(1, 2)
    shape = {"head_dim": head_dim, "seq_len": seq_len, "sequences": batch, "heads": QUERY_HEADS, "kv_heads": kv_heads}
    grouped = kv_heads != QUERY_HEADS and shares_kv_heads(device.type, scale.dtype, masked=False)

    def forward(_: int) -> Tensor:
        with with_backend(backend, device):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    def both(i: int) -> None:
        torch.autograd.grad(forward(i), (q, k, v), grad)

    try:
        seconds = short({"forward": forward, "both": both}, device, rounds=max(3, scale.rounds // 2))
    except RuntimeError as error:  # raised by a backend that does not support the shape
        return {**shape, "refused": str(error).splitlines()[0][:200]}
    flops = 4 * head_dim * QUERY_HEADS * visible_keys(seq_len) * batch * seq_len
    return {
        **shape,
        "forward_flops_per_s": flops / median(seconds["forward"]),
        "both_flops_per_s": 3.5 * flops / median(seconds["both"]),
        "seconds": {name: summary(s) for name, s in seconds.items()},
    }


def with_backend(name: str, device: torch.device) -> Any:
    """Restrict SDPA to one backend on a GPU. A CPU has only one backend."""
    return sdpa_kernel(BACKENDS[name]) if device.type == "cuda" else sdpa_kernel(SDPBackend.MATH)


def grouped(machine: Machine) -> dict[str, Any]:
    """FLOP/s of PyTorch's grouped product of sorted rows: an upper bound for permute-and-multiply."""
    product: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if product is None:
        return {"refused": f"torch {torch.__version__} has no grouped_mm"}
    scale, device = machine.scale, machine.device
    inner, wide = scale.inner[len(scale.inner) // 2], max(16, scale.head_dims[-1])
    rows = randn((scale.rows, inner), device, torch.bfloat16)
    matrices = randn((LISTS, inner, wide), device, torch.bfloat16, 1)
    offsets = torch.arange(1, LISTS + 1, dtype=torch.int32, device=device) * (scale.rows // LISTS)
    calls = {
        "grouped": lambda i: product(rows, matrices, offs=offsets),
        "dense": lambda i: torch.mm(rows, matrices[0]),
    }
    seconds = short(calls, device, rounds=scale.rounds)
    flops = 2 * scale.rows * inner * wide
    return {
        "lists": LISTS,
        "rows": scale.rows,
        "inner": inner,
        "wide": wide,
        "flops_per_s": {name: flops / median(s) for name, s in seconds.items()},
        "seconds": {name: summary(s) for name, s in seconds.items()},
    }
