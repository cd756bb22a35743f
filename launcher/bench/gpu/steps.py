"""Time whole training passes of every mechanism at equal parameters, in turns in one process, and profile a dense pass.

A pass is forward and backward over one micro-batch, including the loss. The optimizer is timed separately, because it
is the same for all mechanisms. Each ratio is reported with its Amdahl bound: gqa's time with only query projection,
output projection and core reduced to the share of active heads. Legend: S tokens per sequence, L layers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.device import twins
from headway.kernels.loss import linear_cross_entropy_sum
from headway.kernels.rope import rope_tables
from headway.launcher.bench.gpu.ceilings import BACKENDS
from headway.launcher.bench.gpu.rows import Machine, Row
from headway.launcher.bench.gpu.shapes import Size, Variant, decoder, model_config, variants
from headway.launcher.bench.gpu.timing import Call, in_turns, median, ratio, short, summary
from headway.model.activations import Sharing, footprint
from headway.model.attention.grouped import GroupedConfig, GroupedQueryAttention
from headway.model.base import Context
from headway.model.cost import account
from headway.model.decoder import Decoder, Recompute

AGAIN = "gqa, the same again"
"""The same model a second time, to show the noise of the comparison."""
PLAIN = "rgqa, plain PyTorch"
"""R-GQA at k=1 without Headway's kernels: index_select and scatter."""

MLP_PRODUCTS = "products of the mlp"


def steps(machine: Machine) -> list[Row]:
    """Per size and length: the dense profile, which gives the bound, and then the comparison."""
    rows = []
    for size in machine.scale.sizes:
        for seq_len in machine.scale.lengths:
            name = f"{size.name} {seq_len}"
            seconds = 12 + 30 * (size.width / 2048) * max(1.0, seq_len / 16_384) ** 0.5
            rows.append(
                Row(
                    key=f"steps/profile {name}",
                    what=f"parts of a dense gqa pass, {name} tokens",
                    seconds=8,
                    run=functools.partial(profile, size, seq_len),
                )
            )
            rows.append(
                Row(
                    key=f"steps/{name}",
                    what=f"forward and backward of every mechanism, {name} tokens",
                    seconds=seconds,
                    run=functools.partial(compare, size, seq_len),
                )
            )
    return rows


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A model whose pass is timed."""

    name: str
    variant: Variant
    model: Decoder
    how: Any = contextlib.nullcontext


def batch_of(machine: Machine, size: Size, seq_len: int) -> tuple[Tensor, Tensor]:
    """Random tokens and labels [B, S]."""
    sequences = max(1, machine.scale.tokens // seq_len)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, size.vocab_size, (sequences, seq_len + 1), generator=generator).to(machine.device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def compare(size: Size, seq_len: int, machine: Machine) -> dict[str, Any]:
    """Seconds of each mechanism's pass, its ratio to its baseline per round, tokens/s, FLOPs, memory.

    If a pass does not fit into memory, all passes recompute their blocks (`recompute`).
    """
    try:
        return _compare(size, seq_len, machine, "none")
    except torch.OutOfMemoryError:
        pass  # retry outside of this block, so that the memory of the failed pass is free
    machine.free()
    return _compare(size, seq_len, machine, "block")


def _compare(size: Size, seq_len: int, machine: Machine, recompute: Recompute) -> dict[str, Any]:
    tokens, labels = batch_of(machine, size, seq_len)
    contestants = list(_contestants(size, machine, recompute))
    passes = {c.name: functools.partial(train_pass, c.model, tokens, labels, c.how) for c in contestants}
    memory = {name: peak(machine, run) for name, run in passes.items()}
    calls: dict[str, Call] = {name: (lambda _, run=run: run()) for name, run in passes.items()}
    seconds = in_turns(calls, machine.device, rounds=machine.scale.step_rounds)
    found = []
    for c in contestants:
        baseline = c.variant.baseline if c.name == c.variant.name else "gqa"
        config = model_config(size, c.variant.attention)
        cost = account(config, c.variant.attention, vocab_size=size.vocab_size, seq_len=seq_len)
        found.append(
            {
                "name": c.name,
                "baseline": baseline,
                "active": c.variant.active,
                "params": cost.num_params,
                "ffn_width": config.ffn_width,
                "useful_flops_per_token": 3 * cost.flops_per_token.useful,
                "executed_flops_per_token": 3 * cost.flops_per_token.executed,
                "core_flops_per_token": 3 * cost.attention_core_flops.executed,
                "tokens_per_s": tokens.numel() / median(seconds[c.name]),
                "ratio": ratio(seconds[baseline], seconds[c.name]),
                "useful_flop_ratio": None,
                "peak_bytes": memory[c.name],
                "seconds": summary(seconds[c.name]),
            }
        )
    flops = {row["name"]: row["useful_flops_per_token"] for row in found}
    for row in found:
        row["useful_flop_ratio"] = flops[row["baseline"]] / row["useful_flops_per_token"]
    optimizer = _optimizer_seconds(contestants[0].model, machine)
    return {
        "size": size.name,
        "seq_len": seq_len,
        "tokens": tokens.numel(),
        "contestants": found,
        "optimizer_s": summary(optimizer),
        "recompute": recompute,
    }


def _contestants(size: Size, machine: Machine, recompute: Recompute) -> Iterator[Contestant]:
    device, dtype = machine.device, machine.scale.dtype
    for variant in variants(size):
        model = decoder(size, variant.attention, device, dtype, recompute=recompute).train()
        yield Contestant(name=variant.name, variant=variant, model=model)
        if variant.name == "gqa":
            yield Contestant(name=AGAIN, variant=variant, model=model)
            for backend in BACKENDS if machine.is_gpu else ():
                other = decoder(size, variant.attention, device, dtype, recompute=recompute, attention=backend)
                yield Contestant(name=f"gqa, {backend}", variant=variant, model=other.train())
        if variant.name.startswith("rgqa k=1"):
            yield Contestant(name=PLAIN, variant=variant, model=model, how=twins)


def train_pass(model: Decoder, tokens: Tensor, labels: Tensor, how: Any = contextlib.nullcontext) -> None:
    """Forward and backward of one micro-batch; gradients are discarded."""
    with how():
        out = model(tokens, labels)
        (out.loss_sum / tokens.numel() + out.aux_loss).backward()
    model.zero_grad(set_to_none=True)


def peak(machine: Machine, call: Any) -> int | None:
    """Peak memory of a call in bytes, in addition to the memory in use before it."""
    if not machine.is_gpu:
        call()
        return None
    call()
    torch.cuda.reset_peak_memory_stats(machine.device)
    before = torch.cuda.memory_allocated(machine.device)
    call()
    return torch.cuda.max_memory_allocated(machine.device) - before or None  # a replayed graph allocates no memory


def _optimizer_seconds(model: Decoder, machine: Machine) -> list[float]:
    """A step of fused AdamW on fp32 master weights and moments of all parameters."""
    masters = [torch.zeros_like(p, dtype=torch.float32).requires_grad_() for p in model.parameters()]
    for master in masters:
        master.grad = torch.full_like(master, 1e-3)
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)
    return in_turns({"adamw": lambda _: optimizer.step()}, machine.device, rounds=machine.scale.step_rounds)["adamw"]


# ---------------------------------------------------------------- where the dense pass spends its time


def profile(size: Size, seq_len: int, machine: Machine) -> dict[str, Any]:
    """Seconds of each part of a dense gqa model, and of the whole model, for forward and backward of a micro-batch."""
    device, dtype = machine.device, machine.scale.dtype
    gqa = variants(size)[0].attention
    model = decoder(size, gqa, device, dtype).train()
    tokens, labels = batch_of(machine, size, seq_len)
    parts = _parts(model, gqa, tokens, labels)
    seconds = short({name: _both(run, inputs) for name, (run, inputs, _) in parts.items()}, device, rounds=3)
    whole = in_turns({"whole": lambda _: train_pass(model, tokens, labels)}, device, rounds=machine.scale.step_rounds)[
        "whole"
    ]
    times = {name: parts[name][2] * median(s) for name, s in seconds.items()}
    mlp_products_s = times.pop(MLP_PRODUCTS)
    sharing = Sharing(bf16=dtype == torch.bfloat16, device=device.type, masked=False, seq_len=seq_len)
    kept = footprint(model_config(size, gqa), gqa, sharing).kept(tokens.numel()) * size.layers
    return {
        "size": size.name,
        "seq_len": seq_len,
        "tokens": tokens.numel(),
        "parts_s": times,
        "within_mlp_s": mlp_products_s,
        "kept_bytes": kept,  # for the backward pass, by the planner's count
        "rest_s": median(whole) - sum(times.values()),
        "whole_s": summary(whole),
        "routed_share": sum(times[name] for name in ("queries", "core", "output")) / median(whole),
    }


def _parts(model: Decoder, gqa: Any, tokens: Tensor, labels: Tensor) -> dict[str, tuple[Any, list[Tensor], int]]:
    """Name -> (function, its inputs, number of calls per pass). Gradients are computed for the inputs."""
    block: Any = model.blocks[0]
    attention, layers = block.attn, len(model.blocks)
    assert isinstance(attention, GroupedQueryAttention) and isinstance(gqa, GroupedConfig)
    kind = {"device": tokens.device, "dtype": model.embedding.dtype}
    batch, seq_len = tokens.shape
    x = torch.randn(batch, seq_len, model.embedding.shape[1], **kind).requires_grad_()
    heads = torch.randn(batch, seq_len, gqa.query_heads, gqa.head_dim, **kind).requires_grad_()
    keys, values = (torch.randn(batch, seq_len, gqa.groups, gqa.head_dim, **kind).requires_grad_() for _ in range(2))
    rope = rope_tables(seq_len, gqa.rotated, gqa.rope_base, tokens.device)
    context = Context(rope=rope, tokens=tokens, sequence=model.placement.sequence)
    mlp, norm = block.mlp, block.attn_norm
    head = model.embedding if model.head is None else model.head

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy_sum(x.flatten(0, 1), weight, labels.flatten())

    return {
        "queries": (F.linear, [x, attention.w_q], layers),
        "keys and values": (
            lambda x, k, v: F.linear(x, k) + F.linear(x, v),
            [x, attention.w_k, attention.w_v],
            layers,
        ),
        "rotation": (
            lambda q, k: attention.q_rope(q, rope).sum() + attention.k_rope(k, rope).sum(),
            [heads, keys],
            layers,
        ),
        "core": (context.attend, [heads, keys, values], layers),
        "output": (F.linear, [heads.detach().flatten(2).requires_grad_(), attention.w_o], layers),
        "mlp": (lambda x, *_: mlp(x), [x, *mlp.parameters()], layers),
        MLP_PRODUCTS: (
            lambda x, gate, up, down: F.linear(F.linear(x, gate) + F.linear(x, up), down),
            [x, mlp.w_gate, mlp.w_up, mlp.w_down],
            layers,
        ),
        "norms": (lambda x, _: norm(x), [x, norm.gain], 2 * layers),
        "loss": (loss, [x, head], 1),
    }


def _both(run: Any, inputs: list[Tensor]) -> Call:
    with torch.no_grad():
        out = run(*inputs)
    grad = torch.randn_like(out)

    def call(_: int) -> None:
        torch.autograd.grad(run(*inputs), inputs, grad)

    return call
