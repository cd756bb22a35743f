"""Time one attention layer of each mechanism, including its router, and compare it with its baseline's."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headway.kernels.device import twins
from headway.kernels.rope import rope_tables
from headway.launcher.bench.gpu.rows import Machine, Row
from headway.launcher.bench.gpu.shapes import Size, Variant, draw_on, variants
from headway.launcher.bench.gpu.timing import Call, randn, ratio, short, summary
from headway.model.base import Attention, Context
from headway.model.init import initialise
from headway.model.layers import use_operations

FORMS = ("forward", "both", "plain", "grouped")
"""Forward; forward and backward; for routed layers also forward and backward without Headway's kernels ("plain"), and
with one product per expert over sorted rows, whose sizes the host reads ("grouped"). The latter is a PyTorch version of
published kernels for mixtures of heads.
"""


def layers(machine: Machine) -> list[Row]:
    """One row per size and length."""
    return [
        Row(
            key=f"layers/{size.name} {seq_len}",
            what=f"one attention layer of every mechanism, {size.name}, {seq_len} tokens",
            seconds=15,
            run=functools.partial(compare, size, seq_len),
        )
        for size in machine.scale.sizes
        for seq_len in machine.scale.lengths
    ]


def compare(size: Size, seq_len: int, machine: Machine) -> dict[str, Any]:
    """Per mechanism and form: seconds, and speedup over the baseline's forward, or forward and backward."""
    batch, compared = max(1, machine.scale.tokens // seq_len), variants(size)
    x = randn((batch, seq_len, size.width), machine.device, machine.scale.dtype).requires_grad_()
    grad = randn((batch, seq_len, size.width), machine.device, machine.scale.dtype, 1)
    calls: dict[str, Call] = {}
    for v in compared:
        rope = rope_tables(seq_len, v.attention.rotated, v.attention.rope_base, machine.device)
        run = _Layer(layer_of(size, v, machine), x, grad, Context(rope=rope))
        calls |= {f"{v.name}: {form}": getattr(run, form) for form in FORMS[: 3 if v.routed else 2]}
        if v.routed:
            grouped = replace(v, attention=v.attention.model_copy(update={"projections": "grouped"}))
            calls[f"{v.name}: grouped"] = _Layer(layer_of(size, grouped, machine), x, grad, Context(rope=rope)).both
    waiting = [name for name in calls if name.endswith(": grouped")]
    seconds = short(calls, machine.device, rounds=max(2, machine.scale.rounds // 3), waiting=waiting)
    found = []
    for v in compared:
        row: dict[str, Any] = {"name": v.name, "baseline": v.baseline, "active": v.active}
        for form in FORMS:
            if (own := seconds.get(f"{v.name}: {form}")) is not None:
                base = seconds[f"{v.baseline}: {form if form == 'forward' else 'both'}"]
                row[form] = {"seconds": summary(own), "ratio": ratio(base, own)}
        found.append(row)
    return {
        "size": size.name,
        "seq_len": seq_len,
        "tokens": batch * seq_len,
        "compile": machine.scale.compile,
        "contestants": found,
    }


def layer_of(size: Size, variant: Variant, machine: Machine) -> Attention:
    """A layer with random parameters, on the device, in the scale's precision."""
    config = variant.attention.layer(0, size.layers)
    with torch.device("meta"):
        layer = config.build(width=size.width, layers=size.layers, init_std=0.02, norm_eps=1e-5)
    layer = layer.to_empty(device=machine.device)
    for buffer in layer.buffers():
        buffer.zero_()
    initialise(layer, seed=1, draw=draw_on(machine.device))
    layer = layer.to(machine.scale.dtype).train()
    use_operations(layer, machine.operations())
    return layer


class _Layer:
    """The passes of one layer that are timed."""

    def __init__(self, layer: Attention, x: Tensor, grad: Tensor, context: Context) -> None:
        self.layer, self.x, self.grad, self.context = layer, x, grad, context
        layer.watch_routers(closely=False)  # training computes router details only in some steps
        self._inputs = [x, *layer.parameters()]

    def forward(self, _: int) -> None:
        with torch.no_grad():
            self.layer(self.x, self.context)

    def both(self, _: int) -> None:
        y = self.layer(self.x, self.context).y
        torch.autograd.grad(y, self._inputs, self.grad, allow_unused=True)

    def plain(self, i: int) -> None:
        with twins():
            self.both(i)
