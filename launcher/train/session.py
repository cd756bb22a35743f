"""Everything one training process holds: model, engine, loader, tracker, and where the run stands."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from headway.data.config import DataError
from headway.data.loader import Loader, StepBatch, validation_batches
from headway.launcher.run import heartbeat
from headway.launcher.run.identity import check_identity
from headway.launcher.run.run_dir import RunDir, read_json, write_json
from headway.launcher.run.stored_spec import stored_spec
from headway.launcher.spec.spec import Spec
from headway.launcher.train.guard import Guard, NumericError, dump
from headway.launcher.train.heads import HeadProbe, probe_batch
from headway.launcher.train.initial import load_initial
from headway.launcher.train.router import RouterMonitor
from headway.launcher.train.saving import Saving
from headway.launcher.train.tracking import Tracker, say
from headway.parallel import checkpoint, replicas
from headway.parallel.build import make_engine
from headway.parallel.engine import StepStats
from headway.parallel.fault_points import memory
from headway.parallel.layout import Layout, init_layout
from headway.parallel.schedule import learning_rate

_UINT64 = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """Targets and hash of the global batch; whether any rank wants to stop, rank 0's clock asks for a checkpoint, every
    rank has written its part of the pending one.
    """

    targets: int
    digest: str
    stop: bool
    save: bool
    written: bool


class Session:
    """State of a training process. `step` counts finished optimizer steps; made by `Session.open`."""

    def __init__(self, run: RunDir, spec: Spec, layout: Layout) -> None:
        self.run, self.spec, self.layout = run, spec, layout
        train, data = spec.train, spec.data
        assert spec.model.vocab_size is not None, "the launcher resolves the vocabulary"
        self._seed_everything(0)
        sequence_parts = layout.cp_size * (layout.tp_size if spec.parallel.sequence_parallel else 1)
        self.engine = make_engine(
            spec.model,
            spec.attention,
            vocab_size=spec.model.vocab_size,
            seed=spec.seed,
            seq_len=data.seq_len,
            parallel=spec.parallel,
            speed=spec.speed,
            optimizer=spec.optimizer,
            layout=layout,
            micro_batch=train.micro_batch,
            accumulation=train.global_batch // (train.micro_batch * layout.dp_size),
        )
        self.router = RouterMonitor(
            self.engine.attention_layers,
            layout,
            every_steps=spec.tracking.router_every_steps,
            total_steps=spec.steps,
            tokens_per_step=spec.tokens_per_step,
        )
        self.heads = HeadProbe(self.engine, layout, probe_batch(data, parts=sequence_parts))
        self.validation = validation_batches(
            data,
            tokens=train.validation_tokens,
            micro_batch=train.micro_batch,
            dp_rank=layout.dp_rank,
            dp_size=layout.dp_size,
        )
        self.step, self.train_s, self.resumes = 0, 0.0, 0
        self._last_validation: float | None = None
        self._validated_step: int | None = None
        self.saving = Saving(run, spec, layout, self.engine)
        self.guard = Guard(spec.guard)
        self._compared_step: int | None = None  # that of the last comparison of replicas
        self._step_times: deque[float] = deque(maxlen=50)
        self._resume()
        self.loader = Loader(
            data,
            split="train",
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            dp_rank=layout.dp_rank,
            dp_size=layout.dp_size,
            start_step=self.step,
            # Before the launcher, or another rank, ends a run that could still say what it waits for.
            timeout_s=0.8 * min(spec.launch.hang_s, spec.launch.timeout_s),
            fingerprint=read_json(run.card, {}).get("data_fingerprint"),  # of what the launcher has verified
        )
        self.compare_replicas()
        if self.step == 0:
            self._measure_heads()  # where they start from: random heads are nearly orthogonal

    @classmethod
    @contextlib.contextmanager
    def open(cls, run: RunDir) -> Iterator[Session]:
        """Join the process group, build or resume everything, and close it in the right order."""
        spec = stored_spec(run)
        fingerprint = read_json(run.card, {}).get("data_fingerprint")
        layout = init_layout(
            device=spec.launch.device,
            timeout_s=spec.launch.timeout_s,
            parallel=spec.parallel,
            check=partial(check_identity, spec, fingerprint),
        )
        # The launcher's lock dies with the launcher; this one tells a new launcher that a rank is still alive.
        lock = run.locked("worker.lock") if layout.is_main else contextlib.nullcontext()
        with lock:
            session = cls(run, spec, layout)
            try:
                yield session
            finally:
                session.loader.close()
                session.tracker.close()
        layout.barrier()
        torch.distributed.destroy_process_group()

    # ------------------------------------------------------------ one step

    @property
    def tokens(self) -> int:
        return self.step * self.spec.tokens_per_step

    def lr(self) -> float:
        """Learning rate of the step about to be taken."""
        total = self.spec.steps * self.spec.tokens_per_step
        after = self.tokens + self.spec.tokens_per_step
        return learning_rate(
            self.spec.optimizer, self.spec.schedule, tokens_before=self.tokens, tokens_after=after, total_tokens=total
        )

    def agree(self, batch: StepBatch, stop: bool) -> Agreed:
        """What all ranks must know of the step about to be taken: one small all-reduce.

        The hash is the sum of the data-parallel ranks' parts modulo 2^64, added in two halves that cannot overflow.
        Raises DataError where ranks that work on the same sequences have read different ones, and where the ranks
        together have not read the whole global batch of this step.
        """
        self._seed_everything(self.step + 1)
        self.engine.before_step(self.tokens)
        self.router.before_step(self.step + 1)
        low, high = batch.digest & 0xFFFFFFFF, batch.digest >> 32
        part = [batch.targets, low, high, batch.sequences] if self.layout.is_data_lead else [0, 0, 0, 0]
        wishes = [int(stop), int(self.saving.overdue), int(self.saving.written)]
        mine = torch.tensor([*part, low, high, batch.step, *wishes], dtype=torch.int64, device=self.layout.device)
        targets, low, high, sequences, all_low, all_high, steps, stops, overdue, written = self.layout.sum(
            mine
        ).tolist()
        digest = (low + (high << 32)) & _UINT64
        readers = self.layout.world_size // self.layout.dp_size
        if (all_low + (all_high << 32)) & _UINT64 != digest * readers & _UINT64:
            raise DataError(
                f"step {self.step + 1}: ranks that share a model have read different sequences; "
                "every host must see the same dataset (data.source), whole and of one version"
            )
        world, expected = self.layout.world_size, self.spec.train.global_batch
        if sequences != expected or steps != self.step * world:
            raise DataError(
                f"step {self.step + 1}: all ranks together have read {sequences} sequences of step "
                f"{steps / world + 1:g} on average, instead of {expected} of this one: a rank has skipped or repeated "
                "data; start the same command again"
            )
        return Agreed(
            targets=targets,
            digest=f"{digest:016x}",
            stop=stops > 0,
            save=overdue > 0,
            written=written == world,
        )

    def train_step(self, batch: StepBatch, agreed: Agreed) -> StepStats:
        """Forward, backward and update."""
        allows = self.guard.allows if self.guard.vetoes else None
        return self.engine.train_step(batch.micro, targets=agreed.targets, lr=self.lr(), allows=allows)

    def record(self, stats: StepStats, *, digest: str, data_s: float, step_s: float) -> None:
        """Count the step, update router biases, write its record."""
        router = self.router.after_step(self.step + 1, applied=not stats.skipped)
        lr = self.lr()
        self.step += 1
        self.train_s += step_s
        self._step_times.append(step_s)
        record: dict[str, Any] = {
            "kind": "train",
            "step": self.step,
            "tokens": self.tokens,
            "loss": stats.loss,
            "aux_loss": stats.aux_loss,
            "grad_norm": stats.grad_norm,
            "lr": lr,
            "targets": stats.targets,
            "skipped": stats.skipped,
            "batch_hash": digest,
            "step_s": step_s,
            "data_s": data_s,
            "forward_s": stats.forward_s,
            "backward_s": stats.backward_s,
            "optimizer_s": stats.optimizer_s,
            "train_s": self.train_s,
            "tokens_per_s": self.spec.tokens_per_step / step_s,
        }
        if router:
            record["router"] = router
        recent = sorted(self._step_times)
        left = (self.spec.steps - self.step) * recent[len(recent) // 2]
        self.tracker.train(record, seconds_left=left)
        if stats.skipped:
            self.saving.settle(self.tracker)  # the run may end here: what was saved before must not be lost
            dump(self.run.path / "skipped", self.step, digest, self.loader, self.engine, self.layout)
        self.guard.after_step(self.step, stats, self.tracker, saved_step=self.saving.saved_step)
        memory("step:weights", self.engine.logical[0].parameter.data)
        every = self.spec.guard.replicas_every_steps
        if every and self.step % every == 0:
            self.compare_replicas()

    def compare_replicas(self) -> None:
        """Compare what ranks hold alike, once per step; collective. Raises NumericError (70) where it differs.

        It is done before the first step and before each checkpoint too, so that a checkpoint always follows a good
        comparison; reading the weights costs less than the copy of them, of masters and moments that follows.
        """
        if not self.spec.guard.replicas_every_steps or self._compared_step == self.step:
            return
        mismatch = replicas.compare(self.engine, self.layout)
        if mismatch is None:
            self._compared_step = self.step
            return
        self.saving.settle(self.tracker)  # it was begun after a good comparison
        begun = "before the first step" if self._compared_step is None else f"after step {self._compared_step}"
        raise NumericError(
            f"step {self.step}: {mismatch} (guard.replicas_every_steps): memory, a processor or a link is at fault, "
            f"look at the hosts named. The last good comparison was {begun}; the checkpoint of step "
            f"{self.saving.saved_step} was saved by then, and the same command continues from it. Anything written "
            "later, exports and validation losses, is suspect"
        )

    def due(self, what: str) -> bool:
        """Whether the step just taken crossed the interval of "validation" or "checkpoint", or was the last."""
        every = self.spec.train.validate_every_tokens if what == "validation" else self.spec.checkpoint.every_tokens
        if self.step == self.spec.steps:
            return True
        return every is not None and self.tokens // every > (self.tokens - self.spec.tokens_per_step) // every

    def validate(self) -> None:
        """Loss and accuracy on the fixed validation tokens; head diversity on the probe batch."""
        heartbeat.beat("validate", self.step)
        t0 = time.perf_counter()
        self.engine.before_step(self.tokens)  # schedules as they stand now, also where a stage just ended
        result = self.engine.evaluate(self.validation)
        self._last_validation, self._validated_step = result.loss, self.step
        self.tracker.validation(
            {
                "kind": "validation",
                "step": self.step,
                "tokens": self.tokens,
                "loss": result.loss,
                "accuracy": result.accuracy,
                "targets": result.targets,
                "train_s": self.train_s,
                "seconds": time.perf_counter() - t0,
            }
        )
        self._measure_heads()

    def _measure_heads(self) -> None:
        t0 = time.perf_counter()
        layers = self.heads.measure()
        if layers:
            record = {"kind": "heads", "step": self.step, "tokens": self.tokens, "layers": layers}
            self.tracker.heads(record | {"seconds": time.perf_counter() - t0})

    # ------------------------------------------------------------ saving, resuming, ending

    def checkpoint(self, *, last: bool = False) -> None:
        """Save; training goes on while the files are written. `last`: it does not, and they are waited for.

        Raises CheckpointError as `Saving.settle` does, NumericError as `compare_replicas` does.
        """
        self.compare_replicas()
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "train_s": self.train_s,
            "applied_steps": self.engine.applied_steps,
            "resumes": self.resumes,
            "validation_loss": self._last_validation,
            "validation_step": self._validated_step,
            "guard": self.guard.state(),
        }
        self.saving.begin(self.tracker, state)
        if last:
            self.saving.settle(self.tracker, last=True)

    def _resume(self) -> None:
        found = checkpoint.newest_valid(self.run.checkpoints, self.layout, warn=say, run=self.run.run_id())
        if found is not None:
            checkpoint.load(found, self.engine, self.layout)
            self.step = found.step
            self.saving.resumed(found.step, self.tokens)
            self.train_s, self.resumes = found.state["train_s"], found.state["resumes"] + 1
            self._last_validation = found.state.get("validation_loss")
            self._validated_step = found.state.get("validation_step")
            self.guard.restore(found.state.get("guard", {}))
        elif self.spec.init.weights is not None:
            load_initial(self.spec, self.engine, self.layout)
        self.engine.before_step(self.tokens)
        lost = self.run.truncate_metrics(last_step=self.step) if self.layout.is_main else None
        self.tracker = Tracker(
            self.run,
            main=self.layout.is_main,
            tensorboard=self.spec.tracking.tensorboard,
            log_every_steps=self.spec.tracking.log_every_steps,
            total_steps=self.spec.steps,
            start_step=self.step,
        )
        if found is not None:
            self.tracker.event(
                {"kind": "resume", "step": self.step, "ranks": self.layout.world_size, "zero": self.spec.parallel.zero},
                f"resumed from {found.path} (step {self.step}/{self.spec.steps})",
            )
        if lost:
            record = {"kind": "records_lost", "step": self.step, "lines": lost.lines, "gaps": lost.gaps}
            self.tracker.event(record, f"RECORDS WERE LOST in {self.run.metrics}: {lost}")

    def finish(self) -> None:
        """Write summary.json: the run is complete."""
        if self._last_validation is None:
            self.validate()
        heartbeat.beat("finish", self.step)
        if not self.layout.is_main:
            return
        self.tracker.require()
        steady = sorted(r["step_s"] for r in self.run.read_metrics() if r.get("kind") == "train" and r["step"] > 2)
        median = steady[len(steady) // 2] if steady else None
        summary = {
            "complete": True,
            "exit": "complete",
            "steps": self.step,
            "tokens": self.tokens,
            "final_validation_loss": self._last_validation,
            "train_s": self.train_s,
            "tokens_per_s_median": self.spec.tokens_per_step / median if median else None,
            "resumes": self.resumes,
        }
        write_json(self.run.summary, summary)
        say(
            f"done: {self.tokens:,} tokens in {self.train_s:.1f} s of training, validation loss "
            f"{self._last_validation:.4f}; records in {self.run.path}",
        )

    def _seed_everything(self, step: int) -> None:
        """Random numbers of a step depend on (seed, step, part of the batch, stage) alone: a resumed run draws the same
        ones, and ranks that share a layer choose alike.
        """
        layout = self.layout
        key = f"{self.spec.seed}/{step}/{layout.data_index + layout.data_ranks * layout.pp_rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1)
