"""Set up a rank before its first step: engine, initial weights, data and records.

The state is loaded from the newest complete checkpoint, or else from the checkpoint of another run (`init.run`). The
weights are loaded from `init.weights` if the spec sets it. Otherwise they are random.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from headway.data.loader import Loader
from headway.data.validation import validation_data
from headway.launcher.board.trackers.background import Background
from headway.launcher.board.trackers.opening import open_trackers
from headway.launcher.run.branching import Parent
from headway.launcher.run.chain import Chain
from headway.launcher.run.identity import check_identity
from headway.launcher.run.run_dir import RunDir, read_mapping
from headway.launcher.run.stored_spec import stored_spec
from headway.launcher.spec.spec import Spec
from headway.launcher.train.branch_start import start_scales
from headway.launcher.train.guard import Guard
from headway.launcher.train.heads import probe_batch
from headway.launcher.train.hooks import run_hooks
from headway.launcher.train.initial import load_initial, load_parent
from headway.launcher.train.saving import Saving
from headway.launcher.train.session import Session, seed_step
from headway.launcher.train.tracking import Tracker, say
from headway.parallel import checkpoint
from headway.parallel.build import make_engine
from headway.parallel.checkpoint import Checkpoint
from headway.parallel.engine import Engine
from headway.parallel.layout import Layout, init_layout


@contextlib.contextmanager
def open_session(run: RunDir) -> Iterator[Session]:
    """Join the process group, build or resume the session, and close everything in the correct order."""
    spec = stored_spec(run)
    layout = init_layout(
        device=spec.launch.device,
        timeout_s=spec.launch.timeout_s,
        parallel=spec.parallel,
        check=partial(check_identity, spec, read_mapping(run.card).get("data_fingerprint")),
    )
    # The lock of the launcher is released when it ends; this lock tells a new launcher that a rank is still alive.
    lock = run.locked("worker.lock") if layout.is_main else contextlib.nullcontext()
    with lock:
        session = load_session(run, spec, layout)
        try:
            yield session
        finally:
            session.close()
    layout.barrier()
    torch.distributed.destroy_process_group()


def _bytes_per_token(card: dict[str, Any]) -> dict[str, float]:
    found = {name: one.get("bytes_per_token") for name, one in (card.get("validation_sets") or {}).items()}
    found[""] = card.get("validation_bytes_per_token")
    return {name: value for name, value in found.items() if value}


def load_session(run: RunDir, spec: Spec, layout: Layout) -> Session:
    """Build the session of this rank in its state before the next step of the run. Collective."""
    train, data = spec.train, spec.data
    seed_step(spec, layout, 0)
    engine = _engine(run, spec, layout)
    validation = validation_data(
        data,
        tokens=train.validation_tokens,
        micro_batch=train.micro_batch,
        dp_rank=layout.dp_rank,
        dp_size=layout.dp_size,
    )
    saving = Saving(run, spec, layout, engine)
    found, parent = _load_weights(run, spec, engine, layout)
    session = Session(
        run=run,
        spec=spec,
        layout=layout,
        engine=engine,
        validation=validation,
        saving=saving,
        tracker=_tracker(run, spec, layout, resumed=found, parent=parent),
        loader=_loader(run, spec, layout, start_step=0 if found is None else found.step),
        guard=Guard(spec.guard),
        bytes_per_token=_bytes_per_token(read_mapping(run.card)),
    )
    if found is not None:
        session.restore(found.step, found.state, branched=parent is not None)
    engine.before_step(session.tokens)
    session.hooks = run_hooks(session)
    for hook in session.hooks:
        hook.on_start(session)
    return session


def _engine(run: RunDir, spec: Spec, layout: Layout) -> Engine:
    """The engine for this rank's part of the model, with random weights."""
    assert spec.model.vocab_size is not None, "the launcher resolves the vocabulary"
    return make_engine(
        spec.model,
        spec.attention,
        vocab_size=spec.model.vocab_size,
        seed=spec.seed,
        seq_len=spec.data.seq_len,
        parallel=spec.parallel,
        speed=spec.speed,
        optimizer=spec.optimizer,
        layout=layout,
        micro_batch=spec.train.micro_batch,
        accumulation=spec.train.global_batch // (spec.train.micro_batch * layout.dp_size),
        scales=None if spec.model.is_encoder_decoder else start_scales(run, spec, layout, probe_batch(spec.data)),
    )


def _load_weights(run: RunDir, spec: Spec, engine: Engine, layout: Layout) -> tuple[Checkpoint | None, Parent | None]:
    """Load and return the newest complete checkpoint. Without one, load what `init` of the spec names.

    Returns the checkpoint that training continues from, and the parent if the checkpoint is that of another run.
    """
    found = checkpoint.newest_valid(run.checkpoints, layout, warn=say, run=run.run_id())
    if found is not None:
        checkpoint.load(found, engine, layout)
    elif spec.init.run is not None:
        parent = load_parent(spec, read_mapping(run.card).get("data_fingerprint"), engine, layout)
        return parent.checkpoint, parent
    elif spec.init.weights is not None:
        load_initial(spec, engine, layout)
    return found, None


def _tracker(run: RunDir, spec: Spec, layout: Layout, *, resumed: Checkpoint | None, parent: Parent | None) -> Tracker:
    """The records of the run up to the step of `resumed`, with events for the resume and lost records.

    `parent`: the run that the records are copied from, since this run is a branch of it that starts now.
    """
    step = 0 if resumed is None else resumed.step
    last_step = -1 if resumed is None else step  # without a checkpoint the run starts anew, also its records of step 0
    source = None if parent is None else parent.run
    anchor = Chain.restored(resumed.state.get("records")) if resumed is not None and parent is None else None
    cut = run.cut_metrics(last_step=last_step, source=source, anchor=anchor) if layout.is_main else None
    tracker = Tracker(
        run,
        main=layout.is_main,
        tensorboard=spec.tracking.tensorboard,
        log_every_steps=spec.tracking.log_every_steps,
        total_steps=spec.steps,
        start_step=step,
        per_layer=spec.tracking.per_layer,
        chain=None if cut is None else cut.chain,
        sinks=_sinks(run, spec, step) if layout.is_main else (),
    )
    if parent is not None:
        note = "" if parent.note is None else f"\nnote: {parent.note}"
        text = f"branched from {parent.checkpoint.path} (step {step}/{spec.steps}){note}"
        tracker.event({"kind": "branch", **parent.facts()}, text)
    elif resumed is not None:
        tracker.event(
            {"kind": "resume", "step": step, "ranks": layout.world_size, "zero": spec.parallel.zero},
            f"resumed from {resumed.path} (step {step}/{spec.steps})",
        )
    if cut is not None and (lost := cut.lost):
        record = {"kind": "records_lost", "step": step, **asdict(lost)}
        tracker.event(record, f"RECORDS WERE LOST in {(source or run).metrics}: {lost}")
    return tracker


def _sinks(run: RunDir, spec: Spec, start_step: int) -> list[Background]:
    """The trackers of the spec. They may not hold up the end for so long that this rank counts as hung."""
    patience_s = min(spec.launch.hang_s, spec.launch.timeout_s) / 2
    return open_trackers(run, spec.tracking, start_step=start_step, patience_s=patience_s, say=say)


def _loader(run: RunDir, spec: Spec, layout: Layout, *, start_step: int) -> Loader:
    """The batches of this rank, beginning with the first one after `start_step`."""
    return Loader(
        spec.data,
        split="train",
        global_batch=spec.train.global_batch,
        micro_batch=spec.train.micro_batch,
        dp_rank=layout.dp_rank,
        dp_size=layout.dp_size,
        start_step=start_step,
        # Time out before the launcher or another rank ends the run, so that this rank can report what it waits for.
        timeout_s=0.8 * min(spec.launch.hang_s, spec.launch.timeout_s),
        fingerprint=read_mapping(run.card).get("data_fingerprint"),  # of the data that the launcher verified
    )
