"""Inference with one sequence: prefill time by length, then time per decoded token, and KV cache per token.

Ratios are those of a whole model, and of its core alone if the share of active heads bounds it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from headway.launcher.bench.gpu.rows import Machine, Row
from headway.launcher.bench.gpu.shapes import Size, model_config, variants
from headway.launcher.bench.gpu.timing import Call, in_turns, median, ratio, summary
from headway.model.cost import account
from headway.model.decoder import Decoder

DECODED = 8
"""Tokens that one timed decoding adds to the cache."""
COMPARED = ("gqa", "gqa, half as many KV heads as heads", "gqe", "switchhead")
"""Mechanisms to measure, in addition to rgqa with one head per group."""


def prefill(machine: Machine) -> list[Row]:
    """One row per size and length, the largest size first."""
    return [
        Row(
            key=f"prefill/{size.name} {seq_len}",
            what=f"prefill of {seq_len} tokens and decoding after them, {size.name}",
            seconds=8 + 0.3 * (seq_len / 8192) ** 2,
            run=functools.partial(compare, size, seq_len),
        )
        for size in machine.scale.sizes
        for seq_len in machine.scale.prefill_lengths
    ]


def compare(size: Size, seq_len: int, machine: Machine) -> dict[str, Any]:
    """Seconds of prefill and per decoded token, pairwise ratios, bytes of the cache per token."""
    compared = [v for v in variants(size) if v.name in COMPARED or v.name.startswith("rgqa k=1")]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, size.vocab_size, (1, seq_len), generator=generator).to(machine.device)
    models = {v.name: machine.decoder(size, v.attention).eval() for v in compared}
    rounds = max(2, machine.scale.step_rounds // 2)
    fills: dict[str, Call] = {name: functools.partial(_prefill, model, tokens) for name, model in models.items()}
    filled = in_turns(fills, machine.device, rounds=rounds)
    steps: dict[str, Call] = {}
    for name, model in models.items():
        cache = model.new_cache()
        with torch.no_grad():
            model.logits(tokens, cache=cache, last=True)
        steps[name] = functools.partial(_decode, model, tokens[:, -1:], cache)
    decoded = in_turns(steps, machine.device, rounds=rounds)
    found = []
    for v in compared:
        cost = account(model_config(size, v.attention), v.attention, vocab_size=size.vocab_size, seq_len=seq_len)
        found.append(
            {
                "name": v.name,
                "baseline": v.baseline,
                "active": v.active,
                "prefill": summary(filled[v.name]),
                "prefill_ratio": ratio(filled[v.baseline], filled[v.name]),
                "decode_s_per_token": median(decoded[v.name]) / DECODED,
                "decode_ratio": ratio(decoded[v.baseline], decoded[v.name]),
                "kv_bytes_per_token": cost.kv_bytes_per_token,
            }
        )
    return {"size": size.name, "seq_len": seq_len, "compile": machine.scale.compile, "contestants": found}


@torch.no_grad()
def _prefill(model: Decoder, tokens: torch.Tensor, _: int) -> None:
    model.logits(tokens, cache=model.new_cache(), last=True)


@torch.no_grad()
def _decode(model: Decoder, token: torch.Tensor, cache: Any, _: int) -> None:
    """Decode a few tokens. Each call extends the cache, equally for all models."""
    for _ in range(DECODED):
        model.logits(token, cache=cache, last=True)
