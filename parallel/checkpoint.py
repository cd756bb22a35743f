"""Checkpoints: logical tensors as safetensors, a manifest with the hash of every file, and a rename that commits them.

A checkpoint is the folder `step-NNNNNNNNNN`. It exists only whole: files are written into a hidden staging folder, the
manifest last, then the folder is renamed. The newest folder whose manifest and hashes are right is the truth; there is
no pointer file that could be wrong. Tensors are full (logical) fp32 tensors under their single-device names, each
written once by one rank, so any layout reads them. Nothing is a pickle. `headway.parallel.saver` writes them,
`headway.parallel.manifest` says what a folder must be, this module finds and loads them.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from headway.parallel.config import CheckpointConfig, CheckpointError
from headway.parallel.fault_points import point
from headway.parallel.layout import Layout
from headway.parallel.logical import LogicalBuffer, own_part
from headway.parallel.manifest import MANIFEST, Checkpoint, Tensors, read_manifest, steps_on_disk, verify_hashes
from headway.parallel.saver import Saved, Saver

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "load",
    "load_weights",
    "newest_readable",
    "newest_valid",
    "persistent_buffers",
    "read_manifest",
    "save",
    "steps_on_disk",
    "verify_hashes",
]


class Loaded(Protocol):
    """What a checkpoint restores; `headway.parallel.engine.Engine` is one. Collective on every rank."""

    def logical_shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def buffers(self) -> Mapping[str, LogicalBuffer]: ...

    def write_logical(self, tensors: Mapping[str, Tensor], *, applied_steps: int) -> None: ...

    def adam_steps(self) -> set[int]: ...


def save(root: Path, engine: Saved, layout: Layout, *, step: int, state: Mapping[str, Any], keep: int) -> str | None:
    """Write `root/step-NNNNNNNNNN` and wait for it; collective. Returns None, or why it could not be written."""
    saver = Saver(root, engine, layout, CheckpointConfig(keep=keep), about={})
    saver.start(step, state)
    return saver.commit().error


def newest_valid(
    root: Path, layout: Layout, *, warn: Callable[[str], None], run: str | None = None
) -> Checkpoint | None:
    """The newest checkpoint that is whole, agreed by all ranks; damaged ones are reported and passed over.

    `run`: the run that it must be of. Raises CheckpointError when there are checkpoints but none of them is whole.
    """
    candidates = _seen_by_any(root, layout)
    for path in candidates:
        error, manifest = None, None
        try:
            manifest = read_manifest(path, run=run)
            verify_hashes(path, manifest, rank=layout.rank, size=layout.world_size)
        except CheckpointError as e:
            error = str(e)
        except OSError as e:
            error = f"{path}: cannot be read ({e})"
        digest = xxhash.xxh3_128(manifest.model_dump_json().encode() if manifest else b"").hexdigest()
        votes = layout.gather_json({"error": error, "manifest": digest})
        error = next((v["error"] for v in votes if v["error"]), None)
        if error is None and any(v["manifest"] != votes[0]["manifest"] for v in votes):
            error = f"{path}: the ranks see different manifests; the run folder must be shared by all of them"
        if error is None:
            assert manifest is not None
            point("load:after_verify")
            _set_aside(candidates[: candidates.index(path)], layout)
            return Checkpoint(path=path, step=manifest.step, manifest=manifest)
        warn(f"checkpoint passed over: {error}")
    if candidates:
        raise CheckpointError(
            f"{root}: none of {len(candidates)} checkpoints is whole; restore one from a copy, or delete the run "
            f"folder to start anew"
        )
    return None


def newest_readable(root: Path, *, warn: Callable[[str], None]) -> Checkpoint:
    """The newest whole checkpoint, for one process that only reads: nothing is renamed, a training may be going on.

    Raises CheckpointError where there is none.
    """
    candidates: list[Path] | None = None
    while (now := steps_on_disk(root)) != candidates:  # the training may have replaced all that stood there
        candidates = now
        for path in candidates:
            try:
                manifest = read_manifest(path)
                verify_hashes(path, manifest)
                return Checkpoint(path=path, step=manifest.step, manifest=manifest)
            except (CheckpointError, OSError) as e:
                warn(f"checkpoint passed over: {e}")
    found = f"none of {len(candidates)} checkpoints is whole" if candidates else "there is no checkpoint yet"
    raise CheckpointError(f"{root}: {found}; train the run until it has saved one (checkpoint.every_tokens)")


def load_weights(checkpoint: Checkpoint, module: torch.nn.Module) -> None:
    """Set a plain module's parameters and persistent buffers, and nothing of the optimizer.

    Raises CheckpointError when the checkpoint's tensors are not the module's (names or shapes).
    """
    tensors = Tensors(checkpoint)
    wanted = {f"param/{name}": tensor for name, tensor in module.named_parameters()}
    wanted |= {f"buffer/{name}": tensor for name, tensor in persistent_buffers(module)}
    there = {key for key in tensors if key.startswith(("param/", "buffer/"))}
    wrong = set(wanted) ^ there or {k for k, t in wanted.items() if tuple(t.shape) != tensors.shape(k)}
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path}: it is the checkpoint of another model ({sorted(wrong)[:3]} differ); "
            "use the spec it was trained with"
        )
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(tensors[key])


def _set_aside(damaged: list[Path], layout: Layout) -> None:
    """Rename checkpoints that were passed over: one that becomes readable again must not be taken for the newest."""
    if layout.is_main:
        for path in damaged:
            with contextlib.suppress(OSError):
                aside = path.with_name(f"bad-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)


def _seen_by_any(root: Path, layout: Layout) -> list[Path]:
    """Checkpoint folders that any rank sees, newest first: every rank must walk through the same ones."""
    mine: dict[str, Any] = {"names": [], "error": None}
    try:
        mine["names"] = [p.name for p in steps_on_disk(root)]
    except OSError as e:
        mine["error"] = f"rank {layout.rank} cannot list {root} ({e}); mend that, then start the same command again"
    seen = layout.gather_json(mine)
    error = next((r["error"] for r in seen if r["error"]), None)
    if error is not None:
        raise CheckpointError(error)
    return [root / name for name in sorted({n for r in seen for n in r["names"]}, reverse=True)]


def load(checkpoint: Checkpoint, engine: Loaded, layout: Layout) -> None:
    """Set parameters, masters, moments, Adam's counter and persistent buffers of this rank's part. Collective.

    Raises CheckpointError when the checkpoint's tensors are not the model's (names or shapes).
    """
    tensors = Tensors(checkpoint)
    shapes, buffers = engine.logical_shapes(), engine.buffers()
    wanted = {f"{part}/{name}" for name in shapes for part in ("param", "exp_avg", "exp_avg_sq")}
    wanted |= {f"buffer/{name}" for name in buffers}
    everyones = {key for keys in layout.gather_json(sorted(wanted)) for key in keys}
    if everyones != set(tensors):
        missing, extra = sorted(everyones - set(tensors)), sorted(set(tensors) - everyones)
        raise CheckpointError(
            f"{checkpoint.path}: it is the checkpoint of another model (missing {missing[:3]}, unknown {extra[:3]}); "
            f"use the spec it was trained with, or another run_dir"
        )
    for name, want in shapes.items():
        there = tensors.shape(f"param/{name}")
        if want != there:
            raise CheckpointError(
                f"{checkpoint.path}: it is the checkpoint of another model ({name} is {list(there)}, not "
                f"{list(want)}); use the spec it was trained with, or another run_dir"
            )
    applied = int(checkpoint.state["applied_steps"])
    engine.write_logical(tensors, applied_steps=applied)
    with torch.no_grad():
        for name, (buffer, dim) in buffers.items():
            buffer.copy_(own_part(tensors[f"buffer/{name}"], dim, layout))
    counters = engine.adam_steps()
    if counters != {applied}:
        raise CheckpointError(f"{checkpoint.path}: Adam's step counters are {sorted(counters)}, not {applied}")


def persistent_buffers(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that belong to the state of the model (router biases), by name."""
    names = set(module.state_dict(keep_vars=True)) if module is not None else set()
    return [(n, b) for n, b in module.named_buffers() if n in names]
