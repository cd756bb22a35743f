"""Checkpoints: logical tensors as safetensors, a manifest with the hash of every file, and an atomic rename.

A checkpoint is the folder `step-NNNNNNNNNN`. It never exists partially: files are written to a hidden staging folder,
the manifest last, and then the folder is renamed. The newest folder with a valid manifest and valid hashes is loaded;
there is no pointer file that could be wrong. Tensors are fp32 and have their single-device names. Each rank writes what
it holds of them, and says which elements of the unsharded (logical) tensor these are, so every layout can read them.
There are no pickles.

`headway.parallel.saver` writes checkpoints, `headway.parallel.manifest` defines the format, `headway.parallel.tensors`
reads and writes the files of tensors, and this module finds and loads checkpoints.
"""

from __future__ import annotations

import contextlib
import itertools
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
from headway.parallel.manifest import (
    MANIFEST,
    Checkpoint,
    ForeignCheckpointError,
    read_manifest,
    steps_on_disk,
    verify_hashes,
)
from headway.parallel.saver import Saved, Saver
from headway.parallel.tensors.reader import FreshMoments, Tensors

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
    """Interface that a checkpoint restores, for example `headway.parallel.engine.Engine`. Methods are collective."""

    def logical_shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def buffers(self) -> Mapping[str, LogicalBuffer]: ...

    def write_logical(self, tensors: Mapping[str, Tensor], *, applied_steps: int) -> None: ...

    def adam_steps(self) -> set[int]: ...


def save(root: Path, engine: Saved, layout: Layout, *, step: int, state: Mapping[str, Any], keep: int) -> str | None:
    """Write `root/step-NNNNNNNNNN` synchronously. Collective. Returns None, or the reason of a failure."""
    saver = Saver(root, engine, layout, CheckpointConfig(keep=keep), about={})
    saver.start(step, state)
    return saver.commit(last=True).error


def newest_valid(
    root: Path, layout: Layout, *, warn: Callable[[str], None], run: str | None = None
) -> Checkpoint | None:
    """The newest checkpoint that is valid on all ranks, or None. Damaged ones are reported and skipped. Collective.

    `run`: id of the run that must have written it. Raises CheckpointError if there are checkpoints but none is valid.
    """
    candidates, foreign = _seen_by_any(root, layout), set[Path]()
    for path in candidates:
        error, manifest = None, None
        try:
            manifest = read_manifest(path, run=run)
            verify_hashes(path, manifest, rank=layout.rank, size=layout.world_size)
        except ForeignCheckpointError as e:
            error = str(e)
            foreign.add(path)
        except CheckpointError as e:
            error = str(e)
        except OSError as e:
            error = f"{path}: cannot be read ({e})"
        digest = xxhash.xxh3_128(manifest.model_dump_json().encode() if manifest else b"").hexdigest()
        votes = layout.gather_json({"error": error, "manifest": digest})
        error = next((v["error"] for v in votes if v["error"]), None)
        if error is None and any(v["manifest"] != votes[0]["manifest"] for v in votes):
            error = f"{path}: the ranks see different manifests; use a run folder that all hosts share"
        if error is None:
            assert manifest is not None
            point("load:after_verify")
            _set_aside(candidates[: candidates.index(path)], foreign, layout)
            return Checkpoint(path=path, step=manifest.step, manifest=manifest)
        warn(f"checkpoint skipped: {error}")
    if candidates:
        raise CheckpointError(
            f"{root}: none of {len(candidates)} checkpoints is valid; restore one from a copy, or delete the run "
            f"folder to start from the beginning"
        )
    return None


def newest_readable(root: Path, *, warn: Callable[[str], None], run: str | None) -> Checkpoint:
    """The newest valid checkpoint, for a single process that only reads. Training may run at the same time.

    `run`: id of the run that must have written it; None if it is not known. Raises CheckpointError if there is none,
    ForeignCheckpointError if another run wrote the newest one: its owner expects another step than an older one.
    """
    candidates: list[Path] | None = None
    while (now := steps_on_disk(root)) != candidates:  # retry if training replaced the checkpoints meanwhile
        candidates = now
        for path in candidates:
            try:
                manifest = read_manifest(path, run=run)
                verify_hashes(path, manifest)
                return Checkpoint(path=path, step=manifest.step, manifest=manifest)
            except ForeignCheckpointError:
                raise
            except (CheckpointError, OSError) as e:
                warn(f"checkpoint skipped: {e}")
    found = f"none of {len(candidates)} checkpoints is valid" if candidates else "there is no checkpoint yet"
    raise CheckpointError(f"{root}: {found}; train the run until it has saved one (checkpoint.every_tokens)")


def load_weights(checkpoint: Checkpoint, module: torch.nn.Module) -> None:
    """Load the parameters and persistent buffers of a single-device module, without optimizer state.

    Raises CheckpointError if names or shapes of the tensors differ.
    """
    tensors = Tensors(checkpoint)
    wanted = {f"param/{name}": tensor for name, tensor in module.named_parameters()}
    wanted |= {f"buffer/{name}": tensor for name, tensor in persistent_buffers(module)}
    there = {key for key in tensors if key.startswith(("param/", "buffer/"))}
    wrong = set(wanted) ^ there or {k for k, t in wanted.items() if tuple(t.shape) != tensors.shape(k)}
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path}: this is a checkpoint of another model ({sorted(wrong)[:3]} differ); "
            "use the spec it was trained with"
        )
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(tensors[key])


def _set_aside(skipped: list[Path], foreign: set[Path], layout: Layout) -> None:
    """Rename damaged checkpoints to `bad-*`, so that they are not loaded if they become readable again.

    Those in `foreign`, which another run wrote, become `foreign-*`, which no save deletes.
    """
    if layout.is_main:
        for path in skipped:
            with contextlib.suppress(OSError):
                if path in foreign:
                    names = (path.with_name(f"foreign-{path.name}" + (f".{n}" if n else "")) for n in itertools.count())
                    path.rename(next(name for name in names if not name.exists()))
                    continue
                aside = path.with_name(f"bad-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)


def _seen_by_any(root: Path, layout: Layout) -> list[Path]:
    """Checkpoint folders that any rank sees, newest first, so that all ranks check the same ones. Collective."""
    mine: dict[str, Any] = {"names": [], "error": None}
    try:
        mine["names"] = [p.name for p in steps_on_disk(root)]
    except OSError as e:
        mine["error"] = f"rank {layout.rank} cannot list {root} ({e}); fix that, then start the same command again"
    seen = layout.gather_json(mine)
    error = next((r["error"] for r in seen if r["error"]), None)
    if error is not None:
        raise CheckpointError(error)
    return [root / name for name in sorted({n for r in seen for n in r["names"]}, reverse=True)]


def load(checkpoint: Checkpoint, engine: Loaded, layout: Layout, *, fresh_optimizer: bool = False) -> None:
    """Load this rank's part of parameters, fp32 masters, moments, Adam's counter and persistent buffers. Collective.

    `fresh_optimizer`: moments and Adam's counter become 0 instead. Raises CheckpointError if names or shapes of the
    tensors differ from the model's.
    """
    tensors = FreshMoments(checkpoint) if fresh_optimizer else Tensors(checkpoint)
    shapes, buffers = engine.logical_shapes(), engine.buffers()
    wanted = {f"{part}/{name}" for name in shapes for part in ("param", "exp_avg", "exp_avg_sq")}
    wanted |= {f"buffer/{name}" for name in buffers}
    everyones = {key for keys in layout.gather_json(sorted(wanted)) for key in keys}
    if everyones != set(tensors):
        missing, extra = sorted(everyones - set(tensors)), sorted(set(tensors) - everyones)
        raise CheckpointError(
            f"{checkpoint.path}: this is a checkpoint of another model (missing {missing[:3]}, unknown {extra[:3]}); "
            f"use the spec it was trained with, or another run_dir"
        )
    for name, want in shapes.items():
        there = tensors.shape(f"param/{name}")
        if want != there:
            raise CheckpointError(
                f"{checkpoint.path}: this is a checkpoint of another model ({name} is {list(there)}, not "
                f"{list(want)}); use the spec it was trained with, or another run_dir"
            )
    applied = 0 if fresh_optimizer else int(checkpoint.state["applied_steps"])
    engine.write_logical(tensors, applied_steps=applied)
    with torch.no_grad():
        for name, (buffer, dim) in buffers.items():
            buffer.copy_(own_part(tensors[f"buffer/{name}"], dim, layout))
    counters = engine.adam_steps()
    if counters != {applied}:
        raise CheckpointError(
            f"{checkpoint.path}: Adam's step counters are {sorted(counters)}, not {applied}; restore another "
            "checkpoint, or use another run_dir"
        )


def persistent_buffers(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Persistent buffers of a module (router biases), by name."""
    names = set(module.state_dict(keep_vars=True)) if module is not None else set()
    return [(n, b) for n, b in module.named_buffers() if n in names]
