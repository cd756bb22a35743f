"""Compare forms of the loss and of RoPE that make more or fewer copies: CPU time of operations and of whole steps.

    python -P tests/kernels/copies_bench.py docs/results/bench/copies.json

`loss` and `step`: the loss that overwrites its logits, as it is in use, against one that does not. `rope`: a form with
products and sum in place, which is not in use, against the one in use. Both forms take turns in one process with one
thread, and give equal bits. Whole steps need the data of yaml/base/quickstart.yaml.
Not a test module.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels import loss, rope
from headway.launcher.base.spread import spread
from headway.launcher.run.machine import git_commit, machine, versions

sys.path.append(str(Path(__file__).resolve().parents[2]))
from tests.parallel.engine_bench import Loop, in_child, join_group

SIZES: dict[str, tuple[list[str], dict[str, int], int]] = {
    "1.2M": ([], {"width": 128, "head_dim": 16}, 80),
    "11M": (
        ["model.width=256", "model.layers=14", "model.ffn_width=704", "attention.head_dim=32"],
        {"width": 256, "head_dim": 32},
        24,
    ),
    "47M": (
        ["model.width=512", "model.layers=16", "model.ffn_width=1408", "attention.head_dim=64"],
        {"width": 512, "head_dim": 64},
        12,
    ),
}
"""Name -> overrides, shapes, measured steps. Batches have 4 sequences of 256 tokens; 8 query heads, 2 KV heads."""
BATCH, SEQ_LEN, HEADS, KV_HEADS, VOCAB = 4, 256, 8, 2, 4096
ROUNDS, WARMUP = 60, 3


def old_log_p_and_gradient(logits: Tensor, labels: Tensor, want_grad: bool) -> tuple[Tensor, Tensor | None]:
    """`headway.kernels.loss._log_p_and_gradient` before it overwrote the logits."""
    label = labels.clamp_min(0)[:, None]
    log_p = F.log_softmax(logits, -1)
    log_p_of_label = log_p.gather(1, label)[:, 0]
    if not want_grad:
        return log_p_of_label, None
    minus_one = log_p.new_full((1, 1), -1.0).expand_as(label)
    return log_p_of_label, log_p.exp_().scatter_add_(1, label, minus_one)


def rope_in_place(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """`headway.kernels.rope.apply_rope` with fewer new tensors, for fp32. All channels are rotated."""
    cos, sin = (table[:, None, :] for table in tables)
    return torch.roll(x, cos.shape[-1] // 2, -1).mul_(sin).add_(x * cos)


FORMS = ("new", "old")
LOSS = {"new": loss._log_p_and_gradient, "old": old_log_p_and_gradient}
ROPE = {"new": rope_in_place, "old": rope.apply_rope}


def in_turns(work: dict[str, Callable[[], tuple[float, Any]]], rounds: int) -> dict[str, Any]:
    """Call both functions in turns; each returns CPU seconds and a result, which must be equal bit for bit."""
    found: dict[str, list[float]] = {form: [] for form in FORMS}
    for turn in range(WARMUP + rounds):
        results = {}
        for form in FORMS if turn % 2 else FORMS[::-1]:
            seconds, results[form] = work[form]()
            found[form] += [seconds] * (turn >= WARMUP)
        assert all(map(torch.equal, results["new"], results["old"]))
    ratios = [new / old for new, old in zip(found["new"], found["old"], strict=True)]
    seconds = {form: spread(values) for form, values in found.items()}
    return {"equal_bits": True, "new_over_old": spread(ratios), "cpu_seconds": seconds, "raw": found}


def timed(form: str, run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds and result of a call with the loss of a form."""
    loss._log_p_and_gradient = LOSS[form]
    began = time.process_time()
    result = run()
    return time.process_time() - began, result


def loss_of_a_batch(width: int) -> dict[str, Any]:
    """Forward and backward of the loss of one batch."""
    tokens = BATCH * SEQ_LEN
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(VOCAB, width, requires_grad=True)
    labels = torch.randint(VOCAB, (tokens,))

    def run() -> tuple[Tensor, ...]:
        found = loss.linear_cross_entropy_sum(hidden, weight, labels)
        return found.detach(), *torch.autograd.grad(found, (hidden, weight))

    return in_turns({form: partial(timed, form, run) for form in FORMS}, ROUNDS)


def rope_of_a_layer(head_dim: int) -> dict[str, Any]:
    """Forward and backward of RoPE of the queries and keys of one layer."""
    tables = rope.rope_tables(SEQ_LEN, head_dim, 10_000.0, torch.device("cpu"))
    heads = [torch.randn(BATCH, SEQ_LEN, n, head_dim, requires_grad=True) for n in (HEADS, KV_HEADS)]
    grads = [torch.randn_like(x) for x in heads]

    def run(form: str) -> tuple[Tensor, ...]:
        turned = [ROPE[form](x, tables) for x in heads]
        return *(x.detach() for x in turned), *torch.autograd.grad(turned, heads, grads)

    return in_turns({form: partial(timed, form, partial(run, form)) for form in FORMS}, 5 * ROUNDS)


def step_of_both(words: list[str], steps: int) -> dict[str, Any]:
    """Whole training steps of two engines on equal batches; their losses must be equal."""
    loops = {form: Loop(words, "auto") for form in FORMS}

    def run(form: str) -> tuple[Tensor]:
        loops[form].step()
        return (torch.tensor(loops[form].losses[-1]),)

    return in_turns({form: partial(timed, form, partial(run, form)) for form in FORMS}, steps)


def measure(size: str) -> dict[str, Any]:
    """All of one size, in this process."""
    join_group()
    torch.manual_seed(0)
    words, shape, steps = SIZES[size]
    found = {
        "loss": loss_of_a_batch(shape["width"]),
        "rope": rope_of_a_layer(shape["head_dim"]),
        "step": step_of_both(words, steps),
    }
    return {"overrides": words, **found}


def main() -> None:
    result: dict[str, Any] = {
        "kind": "copies",
        "command": "python -P tests/kernels/copies_bench.py docs/results/bench/copies.json",
        "threads": 1,
        "git_commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
        "load_average_at_start": os.getloadavg(),
        "sizes": {},
    }
    for size in SIZES:
        found = result["sizes"][size] = in_child(Path(__file__), "measure", size)
        shown = {part: found[part]["new_over_old"] for part in ("loss", "rope", "step")}
        print(
            size, {part: [round(s[key], 3) for key in ("q1", "median", "q3")] for part, s in shown.items()}, flush=True
        )
    result["load_average_at_end"] = os.getloadavg()
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "measure":
        print("RESULT", json.dumps(measure(sys.argv[2])), flush=True)
        os._exit(0)
    main()
