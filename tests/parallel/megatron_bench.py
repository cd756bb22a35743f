"""Compare the loss over a split vocabulary with megatron-core's: difference, time in turns, peak memory; 2 processes.

    python -P tests/parallel/megatron_bench.py docs/results/bench/megatron.json

The file also says which of megatron-core's other functions run on a CPU. Not a test module.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from headway.kernels.loss import VocabularyPart, linear_cross_entropy_sum
from headway.launcher.base.spread import spread
from headway.launcher.run.machine import git_commit, machine, versions

RANKS, ROUNDS = 2, 15
TOKENS, WIDTH = 2048, 512
VOCABULARIES = (4096, 32768)


def reduced(tensor: Tensor, op: Any) -> Tensor:
    result = tensor.clone()
    dist.all_reduce(result, op=op)
    return result


def losses(vocabulary: int, rank: int) -> dict[str, Any]:
    """Functions that return the loss and the gradients of hidden states and rows of this rank."""
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import mappings

    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, WIDTH, generator=g).requires_grad_()
    rows = (torch.randn(vocabulary, WIDTH, generator=g) / WIDTH**0.5).chunk(RANKS)[rank].clone().requires_grad_()
    labels = torch.randint(0, vocabulary, (TOKENS,), generator=g)
    part = VocabularyPart(
        start=rank * vocabulary // RANKS,
        sum=lambda tensor: reduced(tensor, dist.ReduceOp.SUM),
        largest=lambda tensor: reduced(tensor, dist.ReduceOp.MAX),
    )

    def ours() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy_sum(hidden, rows, labels, part=part)
        x_grad, w_grad = torch.autograd.grad(loss, (hidden, rows))
        return loss.detach(), reduced(x_grad, dist.ReduceOp.SUM), w_grad

    def megatron() -> tuple[Tensor, ...]:
        entered = mappings.copy_to_tensor_model_parallel_region(hidden)
        loss = tensor_parallel.vocab_parallel_cross_entropy(entered @ rows.T, labels).sum()
        return loss.detach(), *torch.autograd.grad(loss, (hidden, rows))

    return {"headway": ours, "megatron": megatron}


def timed(vocabulary: int, rank: int) -> dict[str, Any]:
    forms = losses(vocabulary, rank)
    results = {name: form() for name, form in forms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(ROUNDS):
        for name in list(forms) if turn % 2 else list(forms)[::-1]:
            dist.barrier()
            begin = time.perf_counter()
            forms[name]()
            seconds[name].append(time.perf_counter() - begin)
    ratios = [a / b for a, b in zip(seconds["headway"], seconds["megatron"], strict=True)]
    names = ("loss", "hidden", "rows")
    pairs = zip(names, results["headway"], results["megatron"], strict=True)
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "headway_over_megatron": spread(ratios),
        "largest_relative_difference": {name: float((a - b).abs().max() / b.abs().max()) for name, a, b in pairs},
    }


def peak(vocabulary: int, rank: int, form: str) -> int:
    """Bytes by which forward and backward raise the process's peak memory."""
    run = losses(vocabulary, rank)[form]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at the current size
    before = _peak_bytes()
    run()
    return _peak_bytes() - before


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def runs_on_cpu() -> dict[str, str]:
    """megatron-core's function -> "yes", or the error."""
    from megatron.core.tensor_parallel import mappings, random

    tracker: Any = random.get_cuda_rng_tracker()
    x = torch.randn(4, 2, 8)
    tried = {
        "gather_from_sequence_parallel_region": lambda: mappings.gather_from_sequence_parallel_region(x),
        "reduce_scatter_to_sequence_parallel_region": lambda: mappings.reduce_scatter_to_sequence_parallel_region(x),
        "model_parallel_cuda_manual_seed": lambda: random.model_parallel_cuda_manual_seed(1),
        "get_cuda_rng_tracker().fork": lambda: tracker.fork().__enter__(),
    }
    found = {}
    for name, call in tried.items():
        try:
            call()
            found[name] = "yes"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return found


def rank_main(rank: int, root: Path, task: str) -> None:
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/meet", rank=rank, world_size=RANKS, timeout=timedelta(seconds=300)
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    kind, *arguments = task.split(":")
    if kind == "time":
        result: Any = timed(int(arguments[0]), rank)
    elif kind == "peak":
        result = peak(int(arguments[0]), rank, arguments[1])
    else:
        result = runs_on_cpu()
    (root / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)


def in_ranks(task: str) -> Any:
    """Result of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", __file__, "--rank", str(rank), folder, task],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(RANKS)
        ]
        assert [process.wait(600) for process in started] == [0] * RANKS
        return json.loads(Path(folder, "0.json").read_text())


def main(out: Path) -> None:
    result = {
        "command": "python -P tests/parallel/megatron_bench.py docs/results/bench/megatron.json",
        "shapes": {"tokens": TOKENS, "width": WIDTH, "ranks": RANKS, "threads_per_rank": 1, "dtype": "fp32"},
        "git_commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
        "runs_on_cpu": in_ranks("cpu"),
        "loss": {},
    }
    for vocabulary in VOCABULARIES:
        peaks = {form: in_ranks(f"peak:{vocabulary}:{form}") for form in ("headway", "megatron")}
        result["loss"][vocabulary] = {**in_ranks(f"time:{vocabulary}"), "peak_bytes": peaks}
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("runs_on_cpu", "loss")}, indent=1))


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        rank_main(int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        main(Path(sys.argv[1]))
