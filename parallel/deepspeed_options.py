"""DeepSpeed's options and its import. The only place that generates DeepSpeed's JSON, from the strict spec.

ZeRO-0 is never used, because its gradient clipping and its bf16 optimizer give results different from those of ZeRO-1
to 3.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

from headway.model.hidden import hidden
from headway.parallel.config import OptimizerConfig, ParallelConfig

OVERLAP_BUCKET = 40_000_000
"""Gradients that are exchanged together if exchanges overlap, as in megatron-core's default for up to 40 data ranks.

With DeepSpeed's default of 500 million, the exchange of most models would begin when the backward pass ends.
"""


def bucket_elements(largest: int) -> int:
    """Size of a bucket if exchanges overlap. `largest`: elements of the rank's largest parameter.

    A gradient that is larger than a bucket is exchanged where it is. Under ZeRO-2, DeepSpeed (0.19) then frees it
    while the exchange in the other stream may still read it, because it does not record the stream.
    """
    return max(OVERLAP_BUCKET, largest)


def deepspeed_config(
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    *,
    micro_batch: int,
    accumulation: int,
    data_ranks: int,
    device: str = "cpu",
    largest: int = 0,
) -> dict[str, Any]:
    """DeepSpeed's JSON config. Every default that has changed between its releases is set explicitly.

    `data_ranks`: number of ranks over which gradients are averaged. DeepSpeed assumes that each of them reads different
    sequences. With context parallelism, its batch size is therefore a multiple of ours; DeepSpeed uses it only for
    consistency checks. `device`: cuda or cpu. `largest`: elements of the rank's largest parameter.
    """
    overlap = parallel.overlaps(device=device, data_ranks=data_ranks)
    # If exchanges overlap without contiguous gradients, the host waits for the device before each of them.
    zero = {
        "stage": parallel.zero,
        "overlap_comm": overlap,
        "contiguous_gradients": parallel.zero > 1 or overlap,
    }
    if overlap:
        zero["reduce_bucket_size"] = bucket_elements(largest)
    bf16 = parallel.precision == "bf16"
    config: dict[str, Any] = {
        "train_batch_size": micro_batch * accumulation * data_ranks,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.clip_norm,
        "steps_per_print": 1 << 40,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
        # By default, each tensor-parallel rank sends a part of its activations, and the next stage joins the parts into
        # one tensor. This requires equal activations on all ranks, which sequence parallelism does not have.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "activation_checkpoint_interval": 0},
    }
    if bf16:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    # The default of DeepSpeed under bf16 is bf16, to which even the sum of a single process is rounded before AdamW.
    config["communication_data_type"] = parallel.gradient_reduction
    return config


def quiet_deepspeed(*, cpu: bool) -> Any:
    """Import DeepSpeed without its start-up log messages and, on CPU, without compiling its shared-memory operation.

    DeepSpeed compiles this operation at first use (about 46 s). It only speeds up CPU collectives within a host, which
    gloo can do as well. To find out whether it can be compiled, DeepSpeed runs a compiler in every rank and stores the
    result in a table; a rank that is killed meanwhile leaves a temporary folder. Setting the table avoids both.

    `cpu`: train on the CPU even if there is a GPU, which DeepSpeed would otherwise select.
    """
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # The autotuner, which Headway does not use, imports MLflow where it is installed: four seconds a rank.
    with hidden("mlflow"):
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    _import_muon()
    if cpu:
        deepspeed.ops.__dict__["__compatible_ops__"] = {"deepspeed_shm_comm": False}
    return deepspeed


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer without PyTorch's compiler.

    Every ZeRO engine imports it to ask whether it is in use. Its module wraps three functions with `torch.compile`,
    which imports the compiler: one to two seconds. Headway never uses Muon, so its functions stay as they are.
    """
    from deepspeed.runtime import compiler
    from deepspeed.runtime.zero import utils

    from headway.parallel.adamw import AdamW

    compile_of = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_of
    if AdamW not in utils.ZERO_SUPPORTED_OPTIMIZERS:  # DeepSpeed looks for the class itself, and warns otherwise
        utils.ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)
