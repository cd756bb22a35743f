"""Asynchronous checkpoint writer.

`start` copies this rank's part of the logical tensors to the CPU while training waits. A thread then writes, fsyncs and
hashes the rank's file while training continues. When the threads of all ranks have finished, `commit` writes the
manifest and renames the staging folder, which makes the checkpoint valid. Each logical tensor is written by one rank.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from headway.parallel.config import CheckpointConfig, CheckpointError
from headway.parallel.fault_points import point
from headway.parallel.layout import Layout
from headway.parallel.logical import LogicalBuffer, gathered
from headway.parallel.manifest import (
    FORMAT,
    MANIFEST,
    FileEntry,
    Manifest,
    file_hash,
    fsync,
    read_manifest,
    step_of,
    steps_on_disk,
    write_manifest,
)


class Saved(Protocol):
    """Interface that a checkpoint saves, for example `headway.parallel.engine.Engine`. Its methods are collective."""

    def buffers(self) -> Mapping[str, LogicalBuffer]: ...

    def read_logical(self) -> Iterator[tuple[str, Tensor]]: ...


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
        self._pending: _Pending | None = None

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
        error, mend = self._make(staging) if layout.is_main else (None, MEND)
        layout.barrier()
        pending = _Pending(step=step, state=dict(state), error=error, stall_s=0.0, mend=mend)
        tensors = self._share()
        self._pending = pending
        if error is None:
            pending.thread = threading.Thread(
                target=self._write, args=(pending, staging, tensors), name="checkpoint", daemon=True
            )
            pending.thread.start()
        pending.stall_s = time.perf_counter() - begin

    def commit(self) -> Outcome:
        """Wait for the pending save and commit it. Collective."""
        pending, layout, begin = self._pending, self._layout, time.perf_counter()
        assert pending is not None
        if pending.thread is not None:
            pending.thread.join()
        staging, final = self._staging(pending.step), self._root / f"step-{pending.step:010d}"
        error = pending.error and f"rank {layout.rank}: {pending.error}"
        reports = layout.gather_json({"files": pending.files or {}, "error": error, "mend": pending.mend})
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
                retain(self._root, self._config, step=pending.step)
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
            found = staging
            staging.mkdir()
        except OSError as e:
            return f"{found}: {e}", MEND
        return None, MEND

    def _staging(self, step: int) -> Path:
        return self._root / f".staging-{step:010d}"

    def _share(self) -> dict[str, Tensor]:
        """CPU copies of the tensors that this rank writes.

        Reading a logical tensor is collective over a pipeline stage: its ranks read all tensors and keep some of them.
        """
        layout, share = self._layout, dict[str, Tensor]()
        ranks, mine = layout.tp_size * layout.data_ranks, layout.tp_rank + layout.tp_size * layout.data_index
        for i, (key, tensor) in enumerate(self._engine.read_logical()):
            if i % ranks == mine:
                share[key] = tensor.detach().to("cpu", copy=True).contiguous()
        for name, (buffer, dim) in self._engine.buffers().items():
            whole = gathered(buffer.detach(), dim, layout)
            if mine == 0:
                share[f"buffer/{name}"] = whole.to("cpu", copy=True).contiguous()
        return share

    def _write(self, pending: _Pending, staging: Path, tensors: dict[str, Tensor]) -> None:
        begin, layout = time.perf_counter(), self._layout
        pending.error = "the writing thread died"  # replaced when the thread finishes
        try:
            point("save:begin")
            name = f"tensors-{layout.rank:05d}-of-{layout.world_size:05d}.safetensors"
            path = staging / name
            save_file(tensors, path)
            fsync(path)
            entry = FileEntry(bytes=path.stat().st_size, xxh3_128=file_hash(path), tensors=sorted(tensors))
            point("save:after_file")
            pending.files, pending.error = {name: entry.model_dump()}, None
        except Exception as e:  # report any error to the other ranks
            pending.error = str(e) or type(e).__name__
        finally:
            tensors.clear()
            pending.write_s = time.perf_counter() - begin

    def _commit(self, staging: Path, final: Path, reports: list[Any], pending: _Pending) -> None:
        point("save:before_manifest")
        layout = self._layout
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


def retain(root: Path, config: CheckpointConfig, *, step: int) -> None:
    """Delete old checkpoints after the one of `step` was written.

    Kept are the newest `keep` up to `step`, the milestones (`keep_every_tokens`, `keep_at_tokens`) and the best one
    (`keep_best`).
    Checkpoints of later steps and `bad-*` folders were skipped as damaged when the run was resumed. They are deleted:
    they must not count as kept, and must not be loaded later, because the run has since trained those steps again.
    """
    folders = steps_on_disk(root)
    later = [p for p in folders if step_of(p) > step]
    older = folders[len(later) + config.keep :]
    if config.keep_every_tokens is not None or config.keep_at_tokens or config.keep_best:
        older = _not_worth_keeping(folders[len(later) :], older, best=config.keep_best)
    for path in [*later, *older, *root.glob("bad-step-*")]:
        with contextlib.suppress(OSError):  # the new checkpoint is valid; failing to delete an old one is no error
            # Delete the manifest first, so that a partly deleted checkpoint is not valid.
            point("retention:before_delete")
            (path / MANIFEST).unlink(missing_ok=True)
            point("retention:after_manifest")
            shutil.rmtree(path, ignore_errors=True)


def _not_worth_keeping(folders: list[Path], older: list[Path], *, best: bool) -> list[Path]:
    states: dict[Path, Mapping[str, Any]] = {}
    for path in folders:
        with contextlib.suppress(CheckpointError):
            states[path] = read_manifest(path).state
    losses = {p: s["validation_loss"] for p, s in states.items() if s.get("validation_step") == s.get("step")}
    losses = {p: loss for p, loss in losses.items() if isinstance(loss, float)}
    stays = {min(losses, key=lambda p: losses[p])} if best and losses else set()
    return [p for p in older if p not in stays and not states.get(p, {}).get("milestone")]
