"""`headway checkpoint list|verify|show`: list the checkpoints of a run, verify their hashes, show their contents.

These commands only read, because the run may still be training.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.errors import NoInputError
from headway.launcher.base.text import age
from headway.launcher.run.folders import not_a_run
from headway.launcher.run.run_dir import RunDir
from headway.parallel.config import CheckpointError
from headway.parallel.manifest import (
    MANIFEST,
    Checkpoint,
    read_manifest,
    step_of,
    steps_on_disk,
    verify_hashes,
)

DAMAGED = 74
_DELETION_S = 1.0


def checkpoint_rows(path: Path) -> list[dict[str, Any]]:
    """One row per checkpoint of a run, newest first; empty if there is none. `error` describes a damaged checkpoint."""
    run = RunDir(path)
    return [row for folder in steps_on_disk(run.checkpoints) if (row := _row(folder, run.run_id())) is not None]


def list_checkpoints(path: Path, *, step: int | None, as_json: bool) -> int:
    """List checkpoints, newest first: step, tokens, validation loss, size, layout, age.

    Sizes and manifests are checked; hashes are not.
    """
    run = RunDir(path).run_id()
    rows = [row for folder in _folders(path, step) if (row := _row(folder, run)) is not None]
    if as_json:
        console.emit(rows)
        return 0
    console.result(f"{'step':>10}  {'tokens':>15}  {'validation':>10}  {'size':>10}  {'age':>8}  layout")
    for row in rows:
        if row["error"] is not None:
            console.result(console.paint(f"{row['step']:>10}  DAMAGED: {row['error']}", "red", sys.stdout))
            continue
        loss = "-" if row["validation_loss"] is None else f"{row['validation_loss']:.4f}"
        layout = " ".join(f"{name} {size}" for name, size in row["layout"].items() if size > 1) or "one process"
        console.result(
            f"{row['step']:>10}  {row['tokens']:>15,}  {loss:>10}  {row['bytes'] / 1e6:>7.1f} MB  "
            f"{age(row['age_s']):>8}  {layout}"
        )
    return 0


def verify_checkpoints(path: Path, *, step: int | None, as_json: bool) -> int:
    """Verify the hash of every file. Returns 74 and names the file if one differs from its recorded hash."""
    results = []
    for folder in _folders(path, step):
        error = None
        try:
            manifest = read_manifest(folder, run=RunDir(path).run_id())
            size = sum(entry.bytes for entry in manifest.files.values())
            with console.progress(f"verify step {step_of(folder)}", size, "B") as bar:
                verify_hashes(folder, manifest, checked=bar.update)
        except (CheckpointError, OSError) as e:
            if _deleted(folder):
                continue
            error = str(e)
        results.append({"step": step_of(folder), "error": error})
        if not as_json:
            shown = f"step {step_of(folder)}: {'every byte as it was written' if error is None else error}"
            console.result(shown if error is None else console.paint(shown, "red", sys.stdout))
    if as_json:
        console.emit(results)
    return DAMAGED if any(r["error"] for r in results) else 0


def show_checkpoint(path: Path, *, step: int | None, as_json: bool) -> int:
    """Show the origin, files and tensors of the newest checkpoint, or of the checkpoint of `step`."""
    from headway.parallel.tensors.reader import Tensors

    folder = _folders(path, step)[0]
    manifest = read_manifest(folder, run=RunDir(path).run_id())
    found = Checkpoint(path=folder, step=manifest.step, manifest=manifest)
    tensors = Tensors(found)
    shapes = {key: list(tensors.shape(key)) for key in sorted(tensors)}
    about = {key: value for key, value in manifest.about.items() if key != "spec"}
    if as_json:
        console.emit({**manifest.model_dump(mode="json"), "shapes": shapes})
        return 0
    console.result(f"{folder}  ({found.bytes / 1e6:.1f} MB in {len(manifest.files)} files, format {manifest.format})")
    for name, facts in (("state", manifest.state), ("layout", manifest.layout), ("about", about)):
        console.result(f"{name}:")
        for key, value in facts.items():
            console.result(f"  {key}: {json.dumps(value)}")
    console.result(
        f"tensors ({len(shapes)}; param fp32 master, exp_avg and exp_avg_sq Adam's moments, buffer router state):"
    )
    for key, shape in shapes.items():
        console.result(f"  {key} {shape}")
    return 0


def _folders(path: Path, step: int | None) -> list[Path]:
    run = RunDir(path)
    folders = steps_on_disk(run.checkpoints)
    if not folders and not run.spec.exists():
        raise NoInputError(not_a_run(path))
    if step is not None:
        there = ", ".join(str(step_of(p)) for p in folders) or "none"
        folders = [p for p in folders if step_of(p) == step]
        if not folders:
            raise NoInputError(f"{run.checkpoints}: there is no checkpoint of step {step}; there are: {there}")
    if not folders:
        raise NoInputError(f"{path}: there is no checkpoint (it has saved none yet)")
    return folders


def _deleted(folder: Path) -> bool:
    """Whether a training process is deleting this checkpoint: the manifest is deleted first, the other files later."""
    end = time.monotonic() + _DELETION_S
    while folder.is_dir() and not (folder / MANIFEST).exists() and time.monotonic() < end:
        time.sleep(0.02)
    return not folder.is_dir()


def _row(folder: Path, run: str | None) -> dict[str, Any] | None:
    row: dict[str, Any] = {"step": step_of(folder), "error": None}
    try:
        manifest = read_manifest(folder, run=run)
        age_s = max(0.0, time.time() - (folder / MANIFEST).stat().st_mtime)
    except (CheckpointError, OSError) as e:
        return None if _deleted(folder) else row | {"error": str(e)}
    state, at_step = manifest.state, manifest.state.get("validation_step") == manifest.step
    return row | {
        "tokens": state.get("tokens", 0),
        "validation_loss": state.get("validation_loss") if at_step else None,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "layout": manifest.layout,
        "age_s": age_s,
        "milestone": bool(state.get("milestone")),
    }
