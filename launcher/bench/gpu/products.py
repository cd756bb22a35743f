"""Time each of Headway's operations alone, and compare it with plain PyTorch and with a lower bound of its time.

Legend: T tokens, d width, G groups, N query heads per group, k chosen ones, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headway.kernels import routing
from headway.kernels.device import twins
from headway.kernels.rope import rope_tables
from headway.launcher.bench.gpu.rows import Machine, Row, product_rows
from headway.launcher.bench.gpu.shapes import Size
from headway.launcher.bench.gpu.timing import Call, randn, ratio, short, summary


@dataclass(frozen=True, kw_only=True)
class Operation:
    """`run`: forward pass on `inputs`. `moved_bytes`: minimum memory traffic of forward and backward pass."""

    name: str
    run: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    moved_bytes: float


def products(machine: Machine) -> list[Row]:
    """One row per size, number of selected heads, and number of tokens."""
    return product_rows(machine, "products", "operations", compare, seconds=8)


def compare(size: Size, k: int, tokens: int, machine: Machine) -> dict[str, Any]:
    """Seconds of each operation, forward and backward, and its speedup over plain PyTorch."""
    found = []
    for op in operations(size, k, tokens, machine):
        differentiable = [t for t in op.inputs if t.requires_grad]
        with torch.no_grad():
            grad = randn(op.run(*op.inputs).shape, machine.device, machine.scale.dtype, 9)
        calls: dict[str, Call] = {
            "ours": functools.partial(_pass, op, differentiable, grad),
            "plain": functools.partial(_plain_pass, op, differentiable, grad),
        }
        seconds = short(calls, machine.device, rounds=max(2, machine.scale.rounds // 3))
        found.append(
            {
                "name": op.name,
                "seconds": summary(seconds["ours"]),
                "plain": summary(seconds["plain"]),
                "ratio": ratio(seconds["plain"], seconds["ours"]),
                "moved_bytes": op.moved_bytes,
            }
        )
    members = size.heads // size.kv_heads
    shape = f"T={tokens} d={size.width} D={size.head_dim} G={size.kv_heads} N={members} k={k}"
    return {"shape": shape, "operations": found}


def operations(size: Size, k: int, tokens: int, machine: Machine) -> list[Operation]:
    """Operations with random inputs on the device. Forward and backward are counted together."""
    groups, heads, head_dim = size.kv_heads, size.heads // size.kv_heads, size.head_dim
    device, dtype, wide = machine.device, machine.scale.dtype, torch.empty((), dtype=machine.scale.dtype).element_size()
    logits = randn((1, tokens, groups, heads), device, torch.float32).requires_grad_()
    idx = routing.top_k(logits.detach(), k)
    gate = torch.sigmoid(randn((1, tokens, groups, k), device, torch.float32, 1)).requires_grad_()
    pool = randn((1, tokens, groups, heads, head_dim), device, dtype, 2).requires_grad_()
    slots = randn((1, tokens, groups, k, head_dim), device, dtype, 3).requires_grad_()
    rope = rope_tables(tokens, head_dim, 1e4, device)
    chosen, every = tokens * groups * k * head_dim * wide, tokens * groups * heads * head_dim * wide
    routed = tokens * groups * heads * 4
    return [
        Operation(
            name="route: top-k and gates",
            run=lambda logits: routing.gates(logits, routing.top_k(logits.detach(), k), "sigmoid2"),
            inputs=(logits,),
            moved_bytes=3 * routed,
        ),
        Operation(
            name="select and rotate",
            run=lambda pool: routing.select_rope(pool, idx, rope),
            inputs=(pool,),
            moved_bytes=3 * chosen + every,  # read and write the chosen; back: read them, write all
        ),
        Operation(
            name="gate and expand",
            run=lambda slots, gate: routing.expand(slots, idx, gate, heads),
            inputs=(slots, gate),
            moved_bytes=4 * chosen + every,  # read the slots, write all; back: read gradient and slots, write gradient
        ),
    ]


def _pass(op: Operation, inputs: list[Tensor], grad: Tensor, _: int) -> None:
    torch.autograd.grad(op.run(*op.inputs), inputs, grad.to(op.inputs[0].dtype))


def _plain_pass(op: Operation, inputs: list[Tensor], grad: Tensor, i: int) -> None:
    with twins():
        _pass(op, inputs, grad, i)
