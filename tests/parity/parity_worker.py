"""One process of a parity run: trains all given cases in one process group. Rank 0 writes the results.

`python parity_worker.py PLACE SHARED` under torchrun, with this folder on PYTHONPATH. Cases are in PLACE/cases.json,
results are lines of PLACE/results.jsonl; checkpoints go to SHARED. A case that fails ends the process, and
PLACE/error-RANK.txt says why.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parity_cases import (
    GLOBAL_BATCH,
    MECHANISMS,
    OPTIMIZER,
    SAVED_STEP,
    SEED,
    SEQ_LEN,
    STEPS,
    VOCAB,
    Case,
    batch_of,
    micro_batches,
)
from parity_faults import FAULTS

from headway.launcher.train.heads import HeadProbe
from headway.launcher.train.router import RouterMonitor
from headway.parallel import checkpoint, deepspeed_options
from headway.parallel.build import make_engine
from headway.parallel.engine import Engine
from headway.parallel.layout import Layout, arrange, init_layout
from headway.parallel.tensors.reader import Tensors

SMALL_BUCKET = 1  # elements; a bucket then holds the largest parameter


def engine_of(case: Case, layout: Layout) -> Engine:
    deepspeed_options.OVERLAP_BUCKET = SMALL_BUCKET
    return make_engine(
        case.model,
        MECHANISMS[case.mechanism],
        vocab_size=VOCAB,
        seed=SEED,
        seq_len=SEQ_LEN,
        parallel=case.parallel,
        optimizer=OPTIMIZER,
        layout=layout,
        micro_batch=case.micro_batch,
        accumulation=GLOBAL_BATCH // (layout.dp_size * case.micro_batch),
    )


def train(case: Case, layout: Layout, folder: Path) -> dict[str, Any]:
    """Figures of every step, of the validation and of the heads at the end; what came of checkpoints."""
    engine = engine_of(case, layout)
    found: dict[str, Any] = {}
    if case.load:
        again = folder / f"{case.load}-in-{case.layout.replace('·', '-')}-z{case.zero}"
        found["moved_unchanged"] = load(engine, layout, folder / case.load, again=again)
    steps = steps_of(case, engine, layout, case.first_step, folder)
    last = batch_of(case, STEPS)
    validation = engine.evaluate(micro_batches(last, case, layout.dp_rank, layout.dp_size))
    heads = {} if case.model.is_encoder_decoder else HeadProbe(engine, layout, last).measure()
    if case.save:
        fresh = engine_of(case, layout)
        load(fresh, layout, folder / case.save)
        again = steps_of(case, fresh, layout, SAVED_STEP, folder)
        found["resumed_exactly"] = again == steps[SAVED_STEP:]
    return found | {
        "steps": steps,
        "validation": {"loss": validation.loss, "accuracy": validation.accuracy, "targets": validation.targets},
        "heads": heads,
    }


def steps_of(case: Case, engine: Engine, layout: Layout, first: int, folder: Path) -> list[dict[str, Any]]:
    """Train from step `first` (from 0) to the end."""
    per_step = GLOBAL_BATCH * SEQ_LEN
    monitor = RouterMonitor(engine.attention_layers, layout, every_steps=1, total_steps=STEPS, tokens_per_step=per_step)
    steps = []
    for step in range(first, STEPS):
        batch = batch_of(case, step)
        engine.before_step(step * per_step)
        monitor.before_step(step + 1)
        targets = int((batch.labels != -100).sum())
        stats = engine.train_step(
            micro_batches(batch, case, layout.dp_rank, layout.dp_size), targets=targets, lr=OPTIMIZER.lr
        )
        routers = monitor.after_step(step + 1)
        figures = {"loss": stats.loss, "aux_loss": stats.aux_loss, "grad_norm": stats.grad_norm}
        steps.append(figures | {"routers": routers})
        if case.save and first == 0 and step + 1 == SAVED_STEP:
            save(engine, layout, folder / case.save)
    return steps


def save(engine: Engine, layout: Layout, root: Path) -> None:
    state = {"applied_steps": engine.applied_steps}
    error = checkpoint.save(root, engine, layout, step=SAVED_STEP, state=state, keep=1)
    assert error is None, error


def load(engine: Engine, layout: Layout, root: Path, *, again: Path | None = None) -> bool | None:
    """With `again`: saved there once more; whether every tensor is the one that was loaded, bit for bit."""
    saved = checkpoint.newest_valid(root, layout, warn=print)
    assert saved is not None
    checkpoint.load(saved, engine, layout)
    if again is None:
        return None
    save(engine, layout, again)
    layout.barrier()
    one, other = (tensors_of(path / saved.path.name) for path in (root, again))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.read_manifest(path)
    return dict(Tensors(checkpoint.Checkpoint(path=path, step=found.step, manifest=found)))


def main() -> None:
    torch.set_num_threads(1)
    place, shared = Path(sys.argv[1]), Path(sys.argv[2])
    layouts: dict[Any, Layout] = {}
    base = init_layout(device="cpu", timeout_s=60)
    for case in [Case(**c) for c in json.loads((place / "cases.json").read_text())]:
        began = time.perf_counter()
        try:
            parallel = case.parallel
            sizes = (parallel.tensor, parallel.context, parallel.pipeline)
            if sizes not in layouts:
                layouts[sizes] = arrange(parallel, local_rank=base.local_rank, device=base.device)
            fault = FAULTS[case.sabotage]() if case.sabotage else contextlib.nullcontext()
            torch.manual_seed(0)
            with fault:
                result = train(case, layouts[sizes], shared)
        except BaseException:
            (place / f"error-{base.rank}.txt").write_text(traceback.format_exc())
            # Peers may wait for this rank in a collective; closed connections end them too.
            os._exit(1)
        if base.is_main:
            with (place / "results.jsonl").open("a") as f:
                f.write(json.dumps({"case": case.to_json(), "seconds": time.perf_counter() - began, **result}) + "\n")
        gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Skip the interpreter's teardown: on a loaded machine a thread of gloo has aborted a rank there, after all results.
    sys.stdout.flush()
    os._exit(0)
