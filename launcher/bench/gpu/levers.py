"""Measure the effect of each speed option on a dense gqa pass: one option at a time, in turns with the defaults."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headway.kernels.levers import LeverError
from headway.launcher.bench.gpu.rows import Absent, Machine, Row
from headway.launcher.bench.gpu.shapes import Size, decoder, variants
from headway.launcher.bench.gpu.steps import batch_of, peak, train_pass
from headway.launcher.bench.gpu.timing import Call, in_turns, ratio, summary
from headway.model.decoder import Decoder

Pass = Callable[[], Any]
Lever = Callable[[Tensor, Tensor, Machine], Pass]
"""Takes a batch and returns a pass with the option, on its own model. Raises Absent or LeverError if not possible."""

DEFAULTS = "defaults"


def levers(machine: Machine) -> list[Row]:
    """Per size: one row per length except the longest, and one for the optimizer."""
    rows = []
    for size in machine.scale.sizes:
        for seq_len in machine.scale.lengths[:2]:
            rows.append(
                Row(
                    key=f"levers/{size.name} {seq_len}",
                    what=f"levers of a dense pass, {size.name}, {seq_len} tokens",
                    seconds=60,
                    run=functools.partial(compare, size, seq_len, False),
                )
            )
        rows.append(
            Row(
                key=f"levers/graph {size.name}",
                what=f"a dense pass as one CUDA graph, {size.name}",
                seconds=15,
                run=functools.partial(compare, size, machine.scale.lengths[0], True),
            )
        )
        rows.append(
            Row(
                key=f"levers/optimizer {size.name}",
                what=f"forms of AdamW over the parameters of {size.name}",
                seconds=8,
                run=functools.partial(optimizers, size),
            )
        )
    return rows


def compare(size: Size, seq_len: int, graphs: bool, machine: Machine) -> dict[str, Any]:
    """Seconds and memory of the pass with each option, and its speedup over the pass with the defaults.

    `graphs`: measure only CUDA graphs, which keep the memory of a whole pass allocated.
    """
    gqa = variants(size)[0].attention
    tokens, labels = batch_of(machine, size, seq_len)

    def fresh(**levers: Any) -> Decoder:
        return machine.decoder(size, gqa, **levers).train()

    base = functools.partial(train_pass, fresh(), tokens, labels)
    found: list[dict[str, Any]] = [{"name": DEFAULTS}]
    passes: dict[str, Pass] = {DEFAULTS: base}
    for name, lever in levers_of(fresh, graphs).items():
        found.append({"name": name})
        try:
            passes[name] = lever(tokens, labels, machine)
            found[-1]["peak_bytes"] = peak(machine, passes[name])
        except (Absent, LeverError) as why:
            found[-1]["refused"] = str(why)
        except RuntimeError as error:  # record why compilation or capture failed, and continue with the others
            found[-1]["refused"] = f"{type(error).__name__}: {error}"[:300]
        if "refused" in found[-1]:
            passes.pop(name, None)
    found[0]["peak_bytes"] = peak(machine, base)
    calls: dict[str, Call] = {name: (lambda _, run=run: run()) for name, run in passes.items()}
    seconds = in_turns(calls, machine.device, rounds=machine.scale.step_rounds)
    for row in found:
        if row["name"] in seconds:
            row |= {"seconds": summary(seconds[row["name"]]), "ratio": ratio(seconds[DEFAULTS], seconds[row["name"]])}
    about = (
        f"Dense gqa, {size.name}, {seq_len:,} tokens: forward and backward over {tokens.numel():,} tokens; "
        f"speed.compile: {machine.scale.compile} where the lever does not say otherwise."
    )
    return {"about": about, "levers": found}


def levers_of(fresh: Callable[..., Decoder], graphs: bool) -> dict[str, Lever]:
    """Name (the spec's key, if there is one) -> option. `fresh` creates a model with such keys."""
    if graphs:
        return {"one CUDA graph": functools.partial(_graph, fresh)}

    def keyed(**keys: Any) -> Lever:
        def pulled(tokens: Tensor, labels: Tensor, machine: Machine) -> Pass:
            return functools.partial(train_pass, fresh(**keys), tokens, labels)

        return pulled

    spec_keys: dict[str, dict[str, str]] = {
        "speed.compile: none": {"compile": "none"},
        **{f"speed.attention: {name}": {"attention": name} for name in ("cudnn", "flash", "fa3")},
        **{f"speed.norm: {name}": {"norm": name} for name in ("apex", "liger")},
        **{f"speed.loss: {name}": {"loss": name} for name in ("torch", "liger")},
        "speed.matmul: fp8": {"matmul": "fp8"},
        **{f"parallel.recompute: {name}": {"recompute": name} for name in ("selective", "block")},
    }
    return {name: keyed(**keys) for name, keys in spec_keys.items()} | {
        "whole blocks by torch.compile": functools.partial(_compiled, fresh),
        "two passes of half the tokens": functools.partial(_half, fresh),
    }


def _compiled(fresh: Callable[..., Decoder], tokens: Tensor, labels: Tensor, machine: Machine) -> Pass:
    """Compile whole blocks. On a CPU they are only traced, because there only the code path is tested."""
    model = fresh()
    for block in model.blocks:
        block.compile(dynamic=False, backend="inductor" if machine.is_gpu else "aot_eager")
    return functools.partial(train_pass, model, tokens, labels)


def _graph(fresh: Callable[..., Decoder], tokens: Tensor, labels: Tensor, machine: Machine) -> Pass:
    if not machine.is_gpu:
        raise Absent("CUDA graphs need a GPU")
    model = fresh()
    machine.free()  # the graph allocates its own memory
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            train_pass(model, tokens, labels)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train_pass(model, tokens, labels)
    return graph.replay


def _half(fresh: Callable[..., Decoder], tokens: Tensor, labels: Tensor, machine: Machine) -> Pass:
    """The same tokens in two passes of half as many."""
    if len(tokens) < 2:
        raise Absent("a batch of one sequence cannot be halved")
    model, halves = fresh(), list(zip(tokens.chunk(2), labels.chunk(2), strict=True))

    def run() -> None:
        for part in halves:
            train_pass(model, *part)

    return run


def optimizers(size: Size, machine: Machine) -> dict[str, Any]:
    """Time AdamW over fp32 parameters: the fused form, which training uses, and other forms."""
    shapes = [
        p.shape for p in decoder(size, variants(size)[0].attention, machine.device, machine.scale.dtype).parameters()
    ]
    found: list[dict[str, Any]] = []
    calls: dict[str, Call] = {}
    for name, make in _optimizers().items():
        found.append({"name": name})
        if make is None:
            found[-1]["refused"] = "not installed"
            continue
        parameters = [torch.zeros(s, device=machine.device).requires_grad_() for s in shapes]
        for p in parameters:
            p.grad = torch.full_like(p, 1e-3)
        calls[name] = functools.partial(_step, make(parameters))
    seconds = in_turns(calls, machine.device, rounds=machine.scale.step_rounds)
    first = next(iter(calls))
    for row in found:
        if row["name"] in seconds:
            row |= {"seconds": summary(seconds[row["name"]]), "ratio": ratio(seconds[first], seconds[row["name"]])}
    return {"about": f"One AdamW step over the parameters of {size.name}, fp32.", "levers": found}


def _optimizers() -> dict[str, Callable[[list[Tensor]], torch.optim.Optimizer] | None]:
    apex = None
    if importlib.util.find_spec("amp_C") is not None:  # NVIDIA's apex; the package of that name on PyPI is another
        apex = importlib.import_module("apex.optimizers").FusedAdam
    return {
        "torch, fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
        "torch, foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, foreach=True),
        "apex": None if apex is None else lambda parameters: apex(parameters, lr=1e-4),
    }


def _step(optimizer: torch.optim.Optimizer, _: int) -> None:
    optimizer.step()
