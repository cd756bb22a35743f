"""Asynchronous checkpoint writer.

`start` copies what this rank holds of the logical tensors to the host's memory while training waits. No tensor is
exchanged between ranks. A thread then writes, hashes and fsyncs the rank's file while training continues. When the
threads of all ranks have finished, `commit` writes the manifest and renames the staging folder, which makes the
checkpoint valid. Each element of a logical tensor is written by one rank.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from headway.parallel.config import CheckpointConfig, CheckpointError
from headway.parallel.fault_points import point
from headway.parallel.layout import Layout
from headway.parallel.logical import LogicalBuffer, part_span
from headway.parallel.manifest import (
    FORMAT,
    MANIFEST,
    FileEntry,
    Manifest,
    fsync,
    read_manifest,
    step_of,
    steps_on_disk,
    write_manifest,
)
from headway.parallel.tensors.image import HostBuffer, Image, write_image
from headway.parallel.tensors.spans import Span


class Saved(Protocol):
    """Interface that a checkpoint saves, for example `headway.parallel.engine.Engine`."""

    def buffers(self) -> Mapping[str, LogicalBuffer]: ...

    def read_spans(self) -> Iterator[tuple[str, Span, Tensor]]: ...


DELETED = ".deleted-"
"""Begin of the names of removed checkpoints whose files are not deleted yet."""

MEND = "Free space or mend the disk"
"""What helps against most errors of a save."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a save. It is equal on all ranks, except for the times in seconds.

    error: None, or why the save failed.
    mend: What helps against the error, for its message.
    stall_s: Time that training waited for copy and commit.
    write_s: Time that this rank's thread wrote in the background.
    """

    step: int
    error: str | None
    stall_s: float
    write_s: float
    mend: str = MEND


@dataclass
class _Pending:
    step: int
    state: Mapping[str, Any]
    error: str | None
    stall_s: float
    mend: str = MEND
    image: Image | None = None
    elements: tuple[int, int] = (0, 0)  # that this rank writes, and of the tensors that it accounts for
    thread: threading.Thread | None = None
    files: dict[str, Any] | None = None
    write_s: float = 0.0


class Saver:
    """Saves checkpoints of one engine to the folder `root`. `about` is stored in their manifests.

    A failed save (for example, on a full disk) does not affect earlier checkpoints, and training can continue.
    """

    def __init__(
        self, root: Path, engine: Saved, layout: Layout, config: CheckpointConfig, *, about: Mapping[str, Any]
    ) -> None:
        self._root, self._engine, self._layout, self._config = root, engine, layout, config
        self._about = dict(about)
        self._buffer = HostBuffer(pinned=layout.device.type == "cuda")
        self._pending: _Pending | None = None
        self._deletion: threading.Thread | None = None  # of old checkpoints

    @property
    def pending_step(self) -> int | None:
        """Step of the save that was started and not committed yet, or None; equal on all ranks."""
        return None if self._pending is None else self._pending.step

    @property
    def written(self) -> bool:
        """Whether this rank's thread has finished the pending save, successfully or not."""
        return self._pending is not None and not (self._pending.thread and self._pending.thread.is_alive())

    def start(self, step: int, state: Mapping[str, Any]) -> None:
        """Start saving the current state to `root/step-NNNNNNNNNN`. Collective. No other save may be pending."""
        assert self._pending is None
        begin, layout, staging = time.perf_counter(), self._layout, self._staging(step)
        self._finish_deletion()  # the new checkpoint needs the space
        error, mend = self._make(staging) if layout.is_main else (None, MEND)
        layout.barrier()
        pending = _Pending(step=step, state=dict(state), error=error, stall_s=0.0, mend=mend)
        self._pending = pending
        if error is None:
            try:
                pending.image, pending.elements = self._copied()
            except (MemoryError, RuntimeError) as e:  # PyTorch raises RuntimeError if there is no memory
                pending.error, pending.mend = f"the copy of the state failed: {e}", "Free memory of the host"
            else:
                pending.thread = threading.Thread(
                    target=self._write, args=(pending, staging), name="checkpoint", daemon=True
                )
                pending.thread.start()
        pending.stall_s = time.perf_counter() - begin

    def commit(self, *, last: bool = False) -> Outcome:
        """Wait for the pending save and commit it. Collective.

        A thread deletes old checkpoints. `last`: wait for it, because the process may end.
        """
        pending, layout, begin = self._pending, self._layout, time.perf_counter()
        assert pending is not None
        if pending.thread is not None:
            pending.thread.join()
        staging, final = self._staging(pending.step), self._root / f"step-{pending.step:010d}"
        error = pending.error and f"rank {layout.rank}: {pending.error}"
        report = {"files": pending.files or {}, "elements": pending.elements, "error": error, "mend": pending.mend}
        reports = layout.gather_json(report)
        mend = next((r["mend"] for r in reports if r["error"]), MEND)
        error = next((r["error"] for r in reports if r["error"]), None)
        if error is None and layout.is_main:
            try:
                self._commit(staging, final, reports, pending)
            except (OSError, CheckpointError) as e:
                error = f"{final}: {e}"
        error = next((r["error"] for r in layout.gather_json({"error": error}) if r["error"]), None)
        if layout.is_main:
            if error is not None:
                shutil.rmtree(staging, ignore_errors=True)
            else:
                self._delete(retain(self._root, self._config, step=pending.step))
        if last:
            self._finish_deletion()
        self._pending = None
        stall_s = pending.stall_s + time.perf_counter() - begin
        return Outcome(step=pending.step, error=error, mend=mend, stall_s=stall_s, write_s=pending.write_s)

    def _make(self, staging: Path) -> tuple[str | None, str]:
        """Make an empty staging folder. Returns the error, if there is one, and what helps against it."""
        found = staging
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            # Delete staging folders of all steps: a killed save leaves gigabytes, and its step may not come again.
            for found in sorted(self._root.glob(".staging-*")):
                if found.is_symlink() or not found.is_dir():
                    what = "a link" if found.is_symlink() else "no folder"
                    return f"{found}: {what}, but only saves make entries of this name, as folders", "Move it elsewhere"
                shutil.rmtree(found)
            _remove(list(self._root.glob(f"{DELETED}*")))  # of a killed process
            found = staging
            staging.mkdir()
        except OSError as e:
            return f"{found}: {e}", MEND
        return None, MEND

    def _delete(self, folders: list[Path]) -> None:
        """Delete folders in a thread. For a file of 1 GB, a file system may take as long as the copy of the state."""
        if folders:
            self._deletion = threading.Thread(target=_remove, args=(folders,), name="deletion", daemon=True)
            self._deletion.start()

    def _finish_deletion(self) -> None:
        if self._deletion is not None:
            self._deletion.join()
            self._deletion = None

    def _staging(self, step: int) -> Path:
        return self._root / f".staging-{step:010d}"

    def _copied(self) -> tuple[Image, tuple[int, int]]:
        """Copies of what this rank writes, and numbers of elements: written, and of the tensors it accounts for.

        Nothing is exchanged between ranks. One rank of each pipeline stage accounts for all tensors of the stage.
        """
        layout, held, whole = self._layout, dict[str, tuple[Span, Tensor]](), 0
        accounts = layout.tp_rank == 0 and layout.data_index == 0
        for key, span, tensor in self._engine.read_spans():
            whole += math.prod(span.shape) * accounts
            if span.size:
                held[key] = (span, tensor.detach())
        for name, (buffer, dim) in self._engine.buffers().items():
            shape = list(buffer.shape)
            if dim is not None:
                shape[dim] *= layout.tp_size
            span = part_span(tuple(shape), dim, layout)
            whole += math.prod(span.shape) * accounts
            if layout.data_index == 0 and (span.ranks > 1 or layout.tp_rank == 0):
                held[f"buffer/{name}"] = (span, buffer.detach().reshape(-1) if span.ranks > 1 else buffer.detach())
        return self._buffer.image(held), (sum(span.size for span, _ in held.values()), whole)

    def _write(self, pending: _Pending, staging: Path) -> None:
        begin, layout, image = time.perf_counter(), self._layout, pending.image
        pending.error = "the writing thread died"  # replaced when the thread finishes
        try:
            assert image is not None
            point("save:begin")
            name = f"tensors-{layout.rank:05d}-of-{layout.world_size:05d}.safetensors"
            size, digest = write_image(staging / name, image)
            fsync(staging / name)
            entry = FileEntry(bytes=size, xxh3_128=digest, tensors=image.whole, spans=image.spans)
            point("save:after_file")
            pending.files, pending.error = {name: entry.model_dump()}, None
        except Exception as e:  # report any error to the other ranks
            pending.error = str(e) or type(e).__name__
        finally:
            pending.write_s = time.perf_counter() - begin

    def _commit(self, staging: Path, final: Path, reports: list[Any], pending: _Pending) -> None:
        point("save:before_manifest")
        layout = self._layout
        written, whole = (sum(report["elements"][i] for report in reports) for i in (0, 1))
        if written != whole:
            raise CheckpointError(f"the ranks wrote {written} elements of tensors with {whole}")
        # For information only: every layout can read the checkpoints of every other.
        sizes = {"tensor": layout.tp_size, "context": layout.cp_size}
        sizes |= {"data": layout.dp_size, "pipeline": layout.pp_size}
        manifest = Manifest(
            format=FORMAT,
            step=pending.step,
            layout=sizes,
            state=dict(pending.state),
            files={name: FileEntry(**entry) for report in reports for name, entry in report["files"].items()},
            about=self._about,
        )
        write_manifest(staging, manifest)
        fsync(staging)
        point("save:after_manifest")
        if final.exists():
            shutil.rmtree(final)
        staging.rename(final)
        point("save:after_rename")
        fsync(final.parent)


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def retain(root: Path, config: CheckpointConfig, *, step: int) -> list[Path]:
    """Remove old checkpoints after the one of `step` was written. Returns the folders with their files, to be deleted.

    Kept are the newest `keep` up to `step`, the milestones (`keep_every_tokens`, `keep_at_tokens`) and the best one
    (`keep_best`).
    Checkpoints of later steps and `bad-*` folders were skipped as damaged when the run was resumed. They are removed:
    they must not count as kept, and must not be loaded later, because the run has since trained those steps again.
    """
    folders = steps_on_disk(root)
    later = [p for p in folders if step_of(p) > step]
    older = folders[len(later) + config.keep :]
    if config.keep_every_tokens is not None or config.keep_at_tokens or config.keep_best:
        older = _not_worth_keeping(folders[len(later) :], older, best=config.keep_best)
    removed = []
    for path in [*later, *older, *root.glob("bad-step-*")]:
        with contextlib.suppress(OSError):  # the new checkpoint is valid; failing to delete an old one is no error
            # Without its manifest, a checkpoint is not valid. The next save deletes what a killed process leaves.
            point("retention:before_delete")
            (path / MANIFEST).unlink(missing_ok=True)
            point("retention:after_manifest")
            aside = path.with_name(f"{DELETED}{path.name}")
            with contextlib.suppress(OSError):
                path = path.rename(aside)
            removed.append(path)
    return removed


def _not_worth_keeping(folders: list[Path], older: list[Path], *, best: bool) -> list[Path]:
    states: dict[Path, Mapping[str, Any]] = {}
    for path in folders:
        with contextlib.suppress(CheckpointError):
            states[path] = read_manifest(path).state
    losses = {p: s["validation_loss"] for p, s in states.items() if s.get("validation_step") == s.get("step")}
    losses = {p: loss for p, loss in losses.items() if isinstance(loss, float)}
    stays = {min(losses, key=lambda p: losses[p])} if best and losses else set()
    return [p for p in older if p not in stays and not states.get(p, {}).get("milestone")]
