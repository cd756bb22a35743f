"""Time whole training passes of every mechanism at equal parameters, in turns in one process, and profile a dense pass.

A pass is forward and backward over one micro-batch, including the loss. The optimizer is timed separately, because it
is the same for all mechanisms. Both sides of a ratio are compiled alike. gqa and rgqa with one head per group are also
timed within packed documents, the default of training. Each ratio is reported with its Amdahl bound: gqa's time with
only query projection, query rotation, output projection and core reduced to the share of active heads.

Legend: B sequences, S tokens per sequence, L layers, G groups, M query heads per group, D head size.
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
from headway.kernels.documents import Documents
from headway.kernels.loss import linear_cross_entropy_sum
from headway.kernels.rope import rope_tables
from headway.kernels.routing import top_k
from headway.launcher.bench.gpu.ceilings import BACKENDS
from headway.launcher.bench.gpu.rows import Machine, Row
from headway.launcher.bench.gpu.shapes import Size, Variant, model_config, variants
from headway.launcher.bench.gpu.timing import Call, in_turns, median, ratio, short, summary
from headway.model.activations import Sharing, footprint
from headway.model.attention.grouped import GroupedConfig, GroupedQueryAttention
from headway.model.base import Context, visible_keys
from headway.model.cost import account
from headway.model.decoder import Decoder, Recompute

AGAIN = "gqa, the same again"
"""The same model a second time, to show the noise of the comparison."""
PLAIN = "rgqa, plain PyTorch"
"""R-GQA at k=1 without Headway's kernels: index_select and scatter."""

WITHIN = ", within documents"
"""Ends the name of a pass over packed documents, and of its baseline."""

CHOSEN = (1, 2)
"""Heads per group whose slots' rotation the profile times."""

ROUTED_PARTS = ("queries", "query rotation", "core", "output")
"""Parts of a dense pass that routing reduces to the share of active heads."""

MLP_PRODUCTS = "products of the mlp"


def steps(machine: Machine) -> list[Row]:
    """Per size and length: the dense profile, which gives the bound, then the comparison, then the profile within
    documents.
    """
    rows = []
    for size in machine.scale.sizes:
        for seq_len in machine.scale.lengths:
            rows += [
                profile_row(size, seq_len, documents=False),
                compare_row(size, seq_len),
                profile_row(size, seq_len, documents=True),
            ]
    return rows


def headline(machine: Machine) -> list[Row]:
    """The rows of the headline, for the first size: gqa and rgqa alone, at every length, each with its profile."""
    size = machine.scale.sizes[0]
    rows = []
    for seq_len in machine.scale.lengths:
        rows += [profile_row(size, seq_len, documents=False), headline_row(size, seq_len)]
    return [*rows, *(profile_row(size, seq_len, documents=True) for seq_len in machine.scale.lengths)]


def profile_row(size: Size, seq_len: int, *, documents: bool) -> Row:
    kind = " documents" if documents else ""
    return Row(
        key=f"steps/profile {size.name} {seq_len}{kind}",
        what=f"parts of a dense gqa pass, {size.name} {seq_len} tokens{' within documents' if documents else ''}",
        seconds=12,
        run=functools.partial(profile, size, seq_len, documents),
    )


def headline_row(size: Size, seq_len: int) -> Row:
    return Row(
        key=f"steps/headline {size.name} {seq_len}",
        what=f"forward and backward of gqa and rgqa, {size.name} {seq_len} tokens",
        seconds=25 + 12 * max(1.0, seq_len / 16_384) ** 2,
        run=functools.partial(compare, size, seq_len, True),
    )


def compare_row(size: Size, seq_len: int) -> Row:
    return Row(
        key=f"steps/{size.name} {seq_len}",
        what=f"forward and backward of every mechanism, {size.name} {seq_len} tokens",
        seconds=30 + 40 * (size.width / 2048) * max(1.0, seq_len / 16_384),
        run=functools.partial(compare, size, seq_len, False),
    )


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A model whose pass is timed. `segments`: document numbers for the pass."""

    name: str
    variant: Variant
    model: Decoder
    baseline: str = "gqa"
    how: Any = contextlib.nullcontext
    segments: Tensor | None = None


def batch_of(machine: Machine, size: Size, seq_len: int) -> tuple[Tensor, Tensor]:
    """Random tokens and labels [B, S]."""
    sequences = max(1, machine.scale.tokens // seq_len)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, size.vocab_size, (sequences, seq_len + 1), generator=generator).to(machine.device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def segments_of(machine: Machine, sequences: int, seq_len: int) -> Tensor:
    """Document numbers [B, S] int32 on the host, as the loader gives them, of packed documents.

    Lengths are log-normal with the scale's median and a standard deviation of 1.2 in the logarithm, so that the mean is
    about twice the median: an assumption about web text. The last document of a sequence is cut.
    """
    generator, rows = torch.Generator().manual_seed(2), []
    for _ in range(sequences):
        drawn = torch.randn(seq_len, generator=generator).mul(1.2).exp().mul(machine.scale.document_tokens)
        lengths = drawn.round().clamp_min(1).long().clamp_max(seq_len)
        rows.append(torch.repeat_interleave(torch.arange(seq_len), lengths)[:seq_len])
    return torch.stack(rows).int()


def compare(size: Size, seq_len: int, only_headline: bool, machine: Machine) -> dict[str, Any]:
    """Seconds of each mechanism's pass, its ratio to its baseline per round, tokens/s, FLOPs, memory.

    If a pass does not fit into memory, all passes recompute their blocks (`recompute`).
    """
    try:
        return _compare(size, seq_len, machine, "none", only_headline)
    except torch.OutOfMemoryError:
        pass  # retry outside of this block, so that the memory of the failed pass is free
    machine.free()
    return _compare(size, seq_len, machine, "block", only_headline)


def _compare(size: Size, seq_len: int, machine: Machine, recompute: Recompute, only_headline: bool) -> dict[str, Any]:
    tokens, labels = batch_of(machine, size, seq_len)
    segments = segments_of(machine, *tokens.shape)
    contestants = list(_contestants(size, machine, recompute, segments, only_headline))
    passes = {c.name: functools.partial(train_pass, c.model, tokens, labels, c.how, c.segments) for c in contestants}
    memory = {name: peak(machine, run) for name, run in passes.items()}
    calls: dict[str, Call] = {name: (lambda _, run=run: run()) for name, run in passes.items()}
    seconds = in_turns(calls, machine.device, rounds=machine.scale.step_rounds)
    found = []
    for c in contestants:
        config = model_config(size, c.variant.attention)
        cost = account(config, c.variant.attention, vocab_size=size.vocab_size, seq_len=seq_len)
        core = 3 * cost.attention_core_flops.executed
        # Within documents fewer scores are visible, so that part of the FLOPs is scaled to the visible ones.
        visible = 1.0 if c.segments is None else _visible_share(c.segments)
        hidden = (1 - visible) * core
        found.append(
            {
                "name": c.name,
                "baseline": c.baseline,
                "active": c.variant.active,
                "documents": c.segments is not None,
                "params": cost.num_params,
                "ffn_width": config.ffn_width,
                "useful_flops_per_token": 3 * cost.flops_per_token.useful - hidden,
                "executed_flops_per_token": 3 * cost.flops_per_token.executed - hidden,
                "core_flops_per_token": core - hidden,
                "tokens_per_s": tokens.numel() / median(seconds[c.name]),
                "ratio": ratio(seconds[c.baseline], seconds[c.name]),
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
        "headline": only_headline,
        "compile": machine.scale.compile,
        "documents": [len(lengths) for lengths in Documents.of(segments).lengths],
        "contestants": found,
        "optimizer_s": summary(optimizer),
        "recompute": recompute,
    }


def _visible_share(segments: Tensor) -> float:
    """Scores within documents over those of whole causal sequences; segments [B, S]."""
    batch, seq_len = segments.shape
    within = sum(n * visible_keys(n) for lengths in Documents.of(segments).lengths for n in lengths)
    return within / (batch * seq_len * visible_keys(seq_len))


def _contestants(
    size: Size, machine: Machine, recompute: Recompute, segments: Tensor, only_headline: bool
) -> Iterator[Contestant]:
    """Models whose passes are compared. All are compiled alike, as the scale says."""
    for variant in variants(size):
        dense, routed_one = variant.name == "gqa", variant.name.startswith("rgqa k=1")
        if (only_headline and not variant.name.startswith(("gqa", "rgqa"))) or (only_headline and "," in variant.name):
            continue
        model = machine.decoder(size, variant.attention, recompute=recompute).train()
        yield Contestant(name=variant.name, variant=variant, model=model, baseline=variant.baseline)
        if dense:
            yield Contestant(name=AGAIN, variant=variant, model=model)
            for backend in BACKENDS if machine.is_gpu and not only_headline else ():
                other = machine.decoder(size, variant.attention, recompute=recompute, attention=backend)
                yield Contestant(name=f"gqa, {backend}", variant=variant, model=other.train())
        if dense or routed_one:
            name = f"{variant.name}{WITHIN}"
            yield Contestant(name=name, variant=variant, model=model, baseline=f"gqa{WITHIN}", segments=segments)
        if routed_one and not only_headline:
            yield Contestant(name=PLAIN, variant=variant, model=model, how=twins)


def train_pass(
    model: Decoder,
    tokens: Tensor,
    labels: Tensor,
    how: Any = contextlib.nullcontext,
    segments: Tensor | None = None,
) -> None:
    """Forward and backward of one micro-batch; gradients are discarded."""
    with how():
        out = model(tokens, labels, segments)
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


def profile(size: Size, seq_len: int, documents: bool, machine: Machine) -> dict[str, Any]:
    """Seconds of each part of a dense gqa model, and of the whole model, for forward and backward of a micro-batch.

    `slot_rotation_s`: the same for the rotation of a routed model's slots, by the number of heads per group. It is what
    the routed side has instead of the part "query rotation", and includes the selection.
    """
    device, dtype = machine.device, machine.scale.dtype
    gqa = variants(size)[0].attention
    model = machine.decoder(size, gqa).train()
    tokens, labels = batch_of(machine, size, seq_len)
    segments = segments_of(machine, *tokens.shape) if documents else None
    parts = _parts(model, gqa, tokens, labels, segments) | _slot_rotations(model, gqa, tokens)
    seconds = short({name: _both(run, inputs) for name, (run, inputs, _) in parts.items()}, device, rounds=3)
    calls: dict[str, Call] = {"whole": lambda _: train_pass(model, tokens, labels, segments=segments)}
    whole = in_turns(calls, device, rounds=machine.scale.step_rounds)["whole"]
    times = {name: parts[name][2] * median(s) for name, s in seconds.items()}
    mlp_products_s = times.pop(MLP_PRODUCTS)
    slots = {str(k): times.pop(f"slot rotation {k}") for k in CHOSEN}
    sharing = Sharing(bf16=dtype == torch.bfloat16, device=device.type, masked=documents, seq_len=seq_len)
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
        "slot_rotation_s": slots,
        "routed_share": sum(times[name] for name in ROUTED_PARTS) / median(whole),
        "compile": machine.scale.compile,
    }


Part = tuple[Any, list[Tensor], int]


def _slot_rotations(model: Decoder, gqa: Any, tokens: Tensor) -> dict[str, Part]:
    """Selection and rotation of k slots per group, as a routed layer of the same shape does it."""
    batch, seq_len = tokens.shape
    rope = rope_tables(seq_len, gqa.rotated, gqa.rope_base, tokens.device)
    shape = (batch, seq_len, gqa.groups, gqa.heads_per_group)
    scores = torch.rand(shape, device=tokens.device)
    pool = torch.randn(*shape, gqa.head_dim, device=tokens.device, dtype=model.embedding.dtype).requires_grad_()
    block: Any = model.blocks[0]
    rotation = block.attn.q_rope

    def part(k: int) -> Part:
        idx = top_k(scores, k)
        return lambda pool: rotation.of_chosen(pool, idx, rope), [pool], len(model.blocks)

    return {f"slot rotation {k}": part(k) for k in CHOSEN}


def _parts(model: Decoder, gqa: Any, tokens: Tensor, labels: Tensor, segments: Tensor | None) -> dict[str, Part]:
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
    documents = None if segments is None else Documents.of(segments)
    context = Context(rope=rope, documents=documents, tokens=tokens, sequence=model.placement.sequence)
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
        "query rotation": (lambda q: attention.q_rope(q, rope), [heads], layers),
        "key rotation": (lambda k: attention.k_rope(k, rope), [keys], layers),
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
