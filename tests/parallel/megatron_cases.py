"""Run by test_megatron_agrees.py in 2 processes: layers and loss of megatron-core, each with its slice of the weights.

Arguments: rank, and the folder where the processes meet and leave what they got. Not a test module itself.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.loss import VocabularyPart, linear_cross_entropy_by_token, linear_cross_entropy_sum

RANKS = 2
BATCH, SEQUENCE, WIDTH, FFN, VOCAB = 3, 7, 10, 14, 22


def problem() -> dict[str, Tensor]:
    """What every process starts from: whole weights, inputs, and the gradients that come in from above."""
    g = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tokens, labels = (torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=g) for _ in range(2))
    labels[0, 3:] = -100
    x, rows = normal(BATCH, SEQUENCE, WIDTH), normal(VOCAB, WIDTH)
    labels[1] = (x[1] @ rows.T).argmax(-1)  # right guesses
    return {
        "w_gate": normal(FFN, WIDTH),
        "w_up": normal(FFN, WIDTH),
        "w_down": normal(WIDTH, FFN),
        "rows": rows,
        "x": x,
        "grad_y": normal(BATCH, SEQUENCE, WIDTH),
        "tokens": tokens,
        "labels": labels,
    }


def with_gradients(
    run: Callable[[Tensor], Tensor], x: Tensor, grad_y: Tensor, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Output of run(x), and the gradients of x and of the weights."""
    x = x.clone().requires_grad_()
    y = run(x)
    x_grad, *grads = torch.autograd.grad(y, (x, *weights.values()), grad_y)
    return {"y": y.detach(), "x": x_grad} | dict(zip(weights, grads, strict=True))


def slice_of(weight: Tensor, rank: int, dim: int) -> Tensor:
    return weight.chunk(RANKS, dim)[rank].contiguous()


def swiglu(p: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    gate, up = (column_parallel(p[name], rank) for name in ("w_gate", "w_up"))
    down = tensor_parallel.RowParallelLinear(
        FFN,
        WIDTH,
        config=config(torch.float64),
        init_method=no_init,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
    )
    down.weight.data.copy_(slice_of(p["w_down"], rank, 1))
    weights = {"w_gate": gate.weight, "w_up": up.weight, "w_down": down.weight}
    return with_gradients(lambda x: down(F.silu(gate(x)[0]) * up(x)[0])[0], p["x"], p["grad_y"], weights)


def embedding(p: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    layer = tensor_parallel.VocabParallelEmbedding(VOCAB, WIDTH, init_method=no_init, config=config(torch.float64))
    layer.weight.data.copy_(slice_of(p["rows"], rank, 0))
    y = layer(p["tokens"])
    return {"y": y.detach(), "rows": torch.autograd.grad(y, layer.weight, p["grad_y"])[0]}


def megatron_loss(p: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """In float32 for every input dtype, because megatron-core's loss casts its logits."""
    head = column_parallel(p["rows"].float(), rank)

    def loss(x: Tensor) -> Tensor:
        each = tensor_parallel.vocab_parallel_cross_entropy(head(x)[0], p["labels"])
        return torch.where(p["labels"] == -100, 0, each).sum()

    return with_gradients(loss, p["x"].float(), torch.tensor(0.3), {"rows": head.weight})


def our_loss(p: dict[str, Tensor], rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    def reduced(tensor: Tensor, op: Any) -> Tensor:
        result = tensor.clone()
        dist.all_reduce(result, op=op)
        return result

    part = VocabularyPart(
        start=rank * VOCAB // RANKS,
        sum=lambda tensor: reduced(tensor, dist.ReduceOp.SUM),
        largest=lambda tensor: reduced(tensor, dist.ReduceOp.MAX),
    )
    rows = slice_of(p["rows"].to(dtype), rank, 0).requires_grad_()
    labels = p["labels"].flatten()
    got = with_gradients(
        lambda x: linear_cross_entropy_sum(x.flatten(0, 1), rows, labels, chunk_tokens=4, part=part),
        p["x"].to(dtype),
        torch.tensor(0.3, dtype=dtype),
        {"rows": rows},
    )
    losses, hits = linear_cross_entropy_by_token(
        p["x"].to(dtype).flatten(0, 1), rows, labels, chunk_tokens=4, part=part
    )
    return got | {"x": reduced(got["x"], dist.ReduceOp.SUM), "evaluated": losses, "hits": hits}


def column_parallel(weight: Tensor, rank: int) -> Any:
    layer: Any = tensor_parallel.ColumnParallelLinear(
        weight.shape[1], weight.shape[0], config=config(weight.dtype), init_method=no_init, bias=False
    )
    layer.weight.data.copy_(slice_of(weight, rank, 0))
    return layer


def config(dtype: torch.dtype) -> Any:
    return ModelParallelConfig(
        tensor_model_parallel_size=RANKS, use_cpu_initialization=True, perform_initialization=False, params_dtype=dtype
    )


def no_init(weight: Tensor) -> None:
    raise AssertionError("weights are given")


def main(rank: int, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/meet", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    p = problem()
    results = {
        "swiglu": swiglu(p, rank),
        "embedding": embedding(p, rank),
        "megatron_loss": megatron_loss(p, rank),
        "loss": our_loss(p, rank, torch.float32),
        "loss64": our_loss(p, rank, torch.float64),
    }
    torch.save(results, root / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    # Here, so that the test, which takes `problem` from this file, does not wait for it.
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.model_parallel_config import ModelParallelConfig

    main(int(sys.argv[1]), Path(sys.argv[2]))
    # Skip the interpreter's teardown: on a loaded machine a thread of gloo has aborted a rank there, after all results.
    sys.stdout.flush()
    os._exit(0)
