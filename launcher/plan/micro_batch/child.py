"""`python -m headway.launcher.plan.micro_batch.child`: run the passes of one rank in a separate process.

If memory runs out, only this process ends, and all its memory is freed. It reads and writes lines of JSON. The first
line is the spec, and the answer is the device. Each further line is {"micro_batch": m}, and the answer is {"seconds":
[...], "passes_bytes": n} or {"out_of_memory": text}. n is the peak memory in addition to parameters and gradients on a
GPU, and null on a CPU.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from headway.launcher.plan.micro_batch.search import ROUNDS, WARM_UP
from headway.launcher.spec.spec import Spec
from headway.model.base import SequenceRanks
from headway.model.cost import heaviest, layer_configs
from headway.model.decoder import Decoder, Placement
from headway.parallel.operations import operations_of

if TYPE_CHECKING:
    from collections.abc import Callable

ENOUGH_S = 1.0
"""Passes are timed for at least this long, and at least `ROUNDS` times."""

LONG_S = 10.0
"""If passes take longer than this in total, two timed passes of a size and one warm-up pass are enough."""

MOST = 25
"""Maximum number of timed passes."""


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep the output of libraries out of the answers
    with contextlib.suppress(OSError):  # if the host's memory runs out, the kernel shall kill this process first
        Path("/proc/self/oom_score_adj").write_text("1000")
    spec = Spec.model_validate_json(sys.stdin.readline())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    cuda = spec.launch.device == "cuda" or (spec.launch.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    _say(answers, _device(device))
    model = None
    for line in sys.stdin:
        size = json.loads(line)["micro_batch"]
        try:
            model = model or model_of(spec, device)
            answer = _measure(model, spec, size, device)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
            if not is_out_of_memory(e):
                raise
            answer = {"out_of_memory": str(e).splitlines()[0][:200] if str(e) else "out of memory"}
        _say(answers, answer)
    return 0


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"device": "cpu", "free_bytes": None, "total_bytes": None}
    free, total = torch.cuda.mem_get_info()
    return {"device": torch.cuda.get_device_name(), "free_bytes": free, "total_bytes": total}


def model_of(spec: Spec, device: torch.device) -> Decoder:
    """The whole model, as a rank of the spec runs it, with all gradients set to zero."""
    assert spec.model.vocab_size is not None, "the launcher resolves the vocabulary"
    operations = operations_of(spec.speed, spec.parallel, device)
    placement = Placement(
        recompute=spec.parallel.recompute, operations=operations, sequence=SequenceRanks(attend=operations.core)
    )
    model = Decoder(
        spec.model, spec.attention, vocab_size=spec.model.vocab_size, seed=spec.seed, placement=placement
    ).to(device, torch.bfloat16 if spec.parallel.precision == "bf16" else torch.float32)
    layers = layer_configs(spec.model, spec.attention, vocab_size=spec.model.vocab_size)
    # The stage of schedules that needs the most memory; without stages, the final state.
    begins = [begin for layer in layers[:1] for begin, config in layer.stages() if config == heaviest(layer)]
    model.before_step(begins[0] if len(layers[0].stages()) > 1 else spec.train.tokens)
    for parameter in model.parameters():  # allocate gradients now, so that they do not count as memory of the passes
        parameter.grad = torch.zeros_like(parameter)
    return model.train()


def _measure(model: Decoder, spec: Spec, size: int, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(spec.seed)
    shape = (size, spec.data.seq_len + 1)
    assert spec.model.vocab_size is not None
    ids = torch.randint(spec.model.vocab_size, shape, generator=generator).to(device)
    tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    segments = torch.zeros_like(tokens, dtype=torch.int32) if spec.data.document_mask else None

    def run() -> float:
        start = _now_s(device)
        out = model(tokens, labels, segments)
        (out.loss_sum / tokens.numel() + out.aux_loss).backward()
        return _now_s(device) - start

    gc.collect()
    warm_up(run)
    if device.type == "cpu":
        return {"seconds": times(run), "passes_bytes": None}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = times(run)
    return {"seconds": seconds, "passes_bytes": torch.cuda.max_memory_allocated() - before}


def warm_up(run: Callable[[], float]) -> None:
    """Passes that are not timed: the first passes of a shape may compile, select kernels, and allocate memory."""
    for _ in range(WARM_UP):
        if run() > LONG_S:
            break


def times(run: Callable[[], float]) -> list[float]:
    """Seconds of each timed pass: `ROUNDS` passes or more, fewer if they are slow."""
    seconds: list[float] = []
    while len(seconds) < MOST:
        seconds.append(run())
        spent = sum(seconds)
        if (spent > ENOUGH_S and len(seconds) >= ROUNDS) or (spent > LONG_S and len(seconds) >= 2):
            break
    return seconds


def _now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. On a CPU, PyTorch raises a plain RuntimeError for that."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "allocate memory" in str(error) or "not enough memory" in str(error)


if __name__ == "__main__":
    sys.exit(main())
