"""Checkpoints: logical tensors as safetensors, a manifest with the hash of every file, and a rename that commits them.

A checkpoint is the folder `step-NNNNNNNNNN`. It exists only whole: files are written into a hidden staging folder, the
manifest last, then the folder is renamed. The newest folder whose manifest and hashes are right is the truth; there is
no pointer file that could be wrong. Tensors are full (logical) fp32 tensors under their single-device names, each
written once by one rank, so any layout reads them. Nothing is a pickle.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headway.parallel.config import CheckpointError
from headway.parallel.layout import Layout
from headway.parallel.logical import LogicalBuffer, gathered, own_part

FORMAT = 1
MANIFEST = "MANIFEST.json"
_STEP = re.compile(r"step-(\d{10})")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Trained(Protocol):
    """What a checkpoint saves and restores; `headway.parallel.engine.Engine` is one. Collective on every rank."""

    def logical_shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def buffers(self) -> Mapping[str, LogicalBuffer]: ...

    def read_logical(self) -> Iterator[tuple[str, Tensor]]: ...

    def write_logical(self, tensors: Mapping[str, Tensor], *, applied_steps: int) -> None: ...

    def adam_steps(self) -> set[int]: ...


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One committed checkpoint. `state` is what the trainer asked to keep (step, tokens, seconds, hashes)."""

    path: Path
    step: int
    manifest: dict[str, Any]

    @property
    def state(self) -> dict[str, Any]:
        return self.manifest["state"]


def file_hash(path: Path) -> str:
    """xxh3-128 of a file, hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save(root: Path, engine: Trained, layout: Layout, *, step: int, state: Mapping[str, Any], keep: int) -> str | None:
    """Write `root/step-NNNNNNNNNN`; collective. Returns None, or why it could not be written (the same on all ranks).

    A failed save (a full disk, say) leaves earlier checkpoints as they were and training may go on.
    """
    staging, final = root / f".staging-{step:010d}", root / f"step-{step:010d}"
    error: str | None = None
    mine: dict[str, Any] = {}
    try:
        if layout.is_main:
            root.mkdir(parents=True, exist_ok=True)
            # Of any step: a save that was killed leaves gigabytes behind, and its step may never be saved again.
            for left in root.glob(".staging-*"):
                shutil.rmtree(left)
            staging.mkdir()
    except OSError as e:
        error = f"{staging}: {e}"
    layout.barrier()
    tensors = _my_share(engine, layout)
    if error is None:
        try:
            mine = _write_share(staging, tensors, layout)
        except (OSError, SafetensorError) as e:
            error = f"rank {layout.rank}: {e}"
    reports = layout.gather_json({"files": mine, "error": error})
    error = next((r["error"] for r in reports if r["error"]), None)
    if error is None and layout.is_main:
        try:
            _commit(staging, final, reports, step=step, state=state, layout=layout)
        except OSError as e:
            error = f"{final}: {e}"
    error = next((r["error"] for r in layout.gather_json({"error": error}) if r["error"]), None)
    if layout.is_main:
        if error is not None:
            shutil.rmtree(staging, ignore_errors=True)
        else:
            _retain(root, keep, step=step)
    return error


def _my_share(engine: Trained, layout: Layout) -> dict[str, Tensor]:
    """Reading a logical tensor is collective over a stage: each of its ranks reads all and keeps its share of them."""
    share: dict[str, Tensor] = {}
    ranks, mine = layout.tp_size * layout.data_ranks, layout.tp_rank + layout.tp_size * layout.data_index
    for i, (key, tensor) in enumerate(engine.read_logical()):
        if i % ranks == mine:
            share[key] = tensor.detach().to("cpu", copy=True).contiguous()
    for name, (buffer, dim) in engine.buffers().items():
        whole = gathered(buffer.detach(), dim, layout)
        if mine == 0:
            share[f"buffer/{name}"] = whole.to("cpu", copy=True).contiguous()
    return share


def _write_share(staging: Path, tensors: dict[str, Tensor], layout: Layout) -> dict[str, Any]:
    name = f"tensors-{layout.rank:05d}-of-{layout.world_size:05d}.safetensors"
    path = staging / name
    save_file(tensors, path)
    _fsync(path)
    return {name: {"bytes": path.stat().st_size, "xxh3_128": file_hash(path), "tensors": sorted(tensors)}}


def _commit(
    staging: Path, final: Path, reports: list[Any], *, step: int, state: Mapping[str, Any], layout: Layout
) -> None:
    files = {name: entry for report in reports for name, entry in report["files"].items()}
    manifest = {"format": FORMAT, "step": step, "layout": _sizes(layout), "state": dict(state), "files": files}
    path = staging / MANIFEST
    body = json.dumps(manifest, indent=1, sort_keys=True)
    path.write_text(
        json.dumps(
            {"xxh3_128": xxhash.xxh3_128(body.encode()).hexdigest(), "manifest": manifest}, indent=1, sort_keys=True
        )
    )
    _fsync(path)
    _fsync(staging)
    if final.exists():
        shutil.rmtree(final)
    staging.rename(final)
    _fsync(final.parent)


def _sizes(layout: Layout) -> dict[str, int]:
    """For people: any layout reads what any other wrote."""
    return {"tensor": layout.tp_size, "context": layout.cp_size, "data": layout.dp_size, "pipeline": layout.pp_size}


def _retain(root: Path, keep: int, *, step: int) -> None:
    """Delete all but the newest `keep` up to the one of `step`, which was just written.

    Folders of later steps, and those set aside, were passed over as damaged when the run was resumed: they must not
    take the place of whole ones, nor come back later, when the records of their steps belong to another history.
    """
    folders = steps_on_disk(root)
    later = [p for p in folders if _step_of(p) > step]
    for path in [*later, *folders[len(later) + keep :], *root.glob("bad-step-*")]:
        with contextlib.suppress(OSError):  # the new checkpoint is whole; one that cannot be deleted is no failure
            # The manifest goes first: a half-deleted checkpoint must not look whole.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def steps_on_disk(root: Path) -> list[Path]:
    """Checkpoint folders, newest step first, valid or not."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if p.is_dir() and _STEP.fullmatch(p.name)), reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, its own hash and every file's presence and size checked.

    Raises CheckpointError naming the file that is wrong.
    """
    try:
        outer = json.loads((path / MANIFEST).read_text())
        manifest = outer["manifest"]
        body = json.dumps(manifest, indent=1, sort_keys=True)
        if outer["xxh3_128"] != xxhash.xxh3_128(body.encode()).hexdigest():
            raise CheckpointError(f"{path / MANIFEST}: its own hash does not match")
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {manifest['format']} is not {FORMAT}; use the release that wrote it")
        match = _STEP.fullmatch(path.name)
        if match is None or int(match[1]) != manifest["step"]:
            raise CheckpointError(f"{path}: the manifest is that of step {manifest['step']}")
        for name, entry in manifest["files"].items():
            if not _SAFE_NAME.fullmatch(name):
                raise CheckpointError(f"{path}: illegal file name {name!r} in the manifest")
            size = (path / name).lstat().st_size
            if (path / name).is_symlink() or size != entry["bytes"]:
                raise CheckpointError(f"{path / name}: {size} bytes, the manifest says {entry['bytes']}")
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path}: not a whole checkpoint ({type(e).__name__}: {e})") from e


def verify_hashes(path: Path, manifest: Mapping[str, Any], *, rank: int = 0, size: int = 1) -> None:
    """Check the hash of every `size`-th file, beginning with `rank`. Raises CheckpointError naming the file."""
    for i, (name, entry) in enumerate(sorted(manifest["files"].items())):
        if i % size == rank and file_hash(path / name) != entry["xxh3_128"]:
            raise CheckpointError(f"{path / name}: its contents changed after it was written (hash differs)")


def newest_valid(root: Path, layout: Layout, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, agreed by all ranks; damaged ones are reported and passed over.

    Raises CheckpointError when there are checkpoints but none of them is whole.
    """
    candidates = _seen_by_any(root, layout)
    for path in candidates:
        error, manifest = None, None
        try:
            manifest = read_manifest(path)
            verify_hashes(path, manifest, rank=layout.rank, size=layout.world_size)
        except CheckpointError as e:
            error = str(e)
        except OSError as e:
            error = f"{path}: cannot be read ({e})"
        digest = xxhash.xxh3_128(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        votes = layout.gather_json({"error": error, "manifest": digest})
        error = next((v["error"] for v in votes if v["error"]), None)
        if error is None and any(v["manifest"] != votes[0]["manifest"] for v in votes):
            error = f"{path}: the ranks see different manifests; the run folder must be shared by all of them"
        if error is None:
            assert manifest is not None
            _set_aside(candidates[: candidates.index(path)], layout)
            return Checkpoint(path=path, step=manifest["step"], manifest=manifest)
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
    candidates = steps_on_disk(root)
    for path in candidates:
        try:
            manifest = read_manifest(path)
            verify_hashes(path, manifest)
            return Checkpoint(path=path, step=manifest["step"], manifest=manifest)
        except (CheckpointError, OSError) as e:
            warn(f"checkpoint passed over: {e}")
    found = f"none of {len(candidates)} checkpoints is whole" if candidates else "there is no checkpoint yet"
    raise CheckpointError(f"{root}: {found}; train the run until it has saved one (checkpoint.every_tokens)")


def load_weights(checkpoint: Checkpoint, module: torch.nn.Module) -> None:
    """Set a plain module's parameters and persistent buffers, and nothing of the optimizer.

    Raises CheckpointError when the checkpoint's tensors are not the module's (names or shapes).
    """
    tensors = _Tensors(checkpoint)
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


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by key, read when asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._where = {
            key: checkpoint.path / name
            for name, entry in checkpoint.manifest["files"].items()
            for key in entry["tensors"]
        }
        self._open: dict[Path, Any] = {}

    def __getitem__(self, key: str) -> Tensor:
        return self._file(key).get_tensor(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return tuple(self._file(key).get_slice(key).get_shape())

    def _file(self, key: str) -> Any:
        path = self._where[key]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt", device="cpu")
        return self._open[path]

    def __iter__(self):
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def load(checkpoint: Checkpoint, engine: Trained, layout: Layout) -> None:
    """Set parameters, masters, moments, Adam's counter and persistent buffers of this rank's part. Collective.

    Raises CheckpointError when the checkpoint's tensors are not the model's (names or shapes).
    """
    tensors = _Tensors(checkpoint)
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
