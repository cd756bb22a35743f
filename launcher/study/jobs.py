"""How many cells of a study train at once on this host, and which GPUs each of them has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headway.launcher.base.errors import SpecError
from headway.launcher.base.text import disk_size

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec
    from headway.launcher.study.plan import Cell

PROCESS_BYTES = 0.5e9
"""Memory of a rank besides the planned one: Python, torch and DeepSpeed."""

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class Jobs:
    """`count` cells at once. `devices`: for each of them, the GPUs that it sees; empty if cells train on the CPU."""

    count: int
    devices: tuple[tuple[str, ...], ...] = ()

    def environment(self, place: int) -> dict[str, str]:
        """Environment variables of the cell in one of the `count` places."""
        return {VISIBLE: ",".join(self.devices[place])} if self.devices else {}


def jobs_for(cells: Sequence[Cell], wanted: int | None) -> Jobs:
    """The jobs for unfinished cells: `wanted`, or as many as this host has cores or GPUs for.

    Cells on the CPU whose spec does not set launch.threads use all cores: one at a time. Raises SpecError if `wanted`
    needs more cores, GPUs or memory than this host has.
    """
    specs = [cell.spec for cell in cells]
    alone = _alone(specs)
    if wanted is not None and wanted > 1 and alone:
        raise SpecError(f"--jobs: {wanted} cells cannot train at once: {alone}; use --jobs 1")
    if not cells or wanted == 1 or alone:
        return Jobs(count=1)
    on_gpu = [not on_this_cpu(spec) for spec in specs]
    if any(on_gpu):
        return _on_gpus(specs, wanted)
    return _on_cores(cells, wanted)


def _alone(specs: Sequence[Spec]) -> str:
    """Why the cells can only train one after another; empty if they need not."""
    for spec in specs:
        if spec.launch.hosts > 1:
            return f"launch.hosts is {spec.launch.hosts}, and each cell needs all hosts"
        if spec.launch.port is not None:
            return f"launch.port is {spec.launch.port} for all cells, and one of them would use it (leave it out)"
        if VISIBLE in spec.launch.env:
            return f"launch.env sets {VISIBLE}, and all cells would share these GPUs (set it for the command instead)"
    return ""


def on_this_cpu(spec: Spec) -> bool:
    """Whether the ranks of a run train on the CPU of this host alone."""
    launch = spec.launch
    on_cpu = launch.device == "cpu" or (launch.device == "auto" and not has_nvidia_gpu())
    return on_cpu and launch.hosts == 1


def has_nvidia_gpu() -> bool:
    """Whether this host has the device file of an NVIDIA GPU that `CUDA_VISIBLE_DEVICES` does not hide."""
    return os.environ.get(VISIBLE, "all") not in ("", "-1") and any(Path("/dev").glob("nvidia[0-9]*"))


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    count = torch.cuda.device_count()
    names = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
    return names[:count] if names else [str(number) for number in range(count)]


def _on_gpus(specs: Sequence[Spec], wanted: int | None) -> Jobs:
    processes = max(spec.launch.processes for spec in specs)
    gpus = visible_gpus()
    most = max(1, len(gpus) // processes)
    if wanted is not None and wanted > most:
        raise SpecError(
            f"--jobs: {wanted} cells of {_count(processes, 'GPU')} each need {wanted * processes} GPUs, and this host "
            f"shows {len(gpus)}; use --jobs {most} at most"
        )
    count = min(wanted or most, len(specs))
    if count == 1:
        return Jobs(count=1)
    return Jobs(count=count, devices=tuple(tuple(gpus[i * processes : (i + 1) * processes]) for i in range(count)))


def _on_cores(cells: Sequence[Cell], wanted: int | None) -> Jobs:
    cores = len(os.sched_getaffinity(0))
    launches = [cell.spec.launch for cell in cells]
    if any(launch.threads is None for launch in launches):
        if wanted is None:
            return Jobs(count=1)
        raise SpecError(
            f"--jobs: launch.threads is not set, so each cell uses all {_count(cores, 'core')}; add launch.threads=1 "
            f"for {wanted} cells at once (the number of threads changes the last bits of results)"
        )
    each = max((launch.threads or cores) * launch.processes for launch in launches)
    most = max(1, cores // each)
    if wanted is not None and wanted > most:
        raise SpecError(
            f"--jobs: {wanted} cells of {_count(each, 'thread')} each need {wanted * each} cores, and this process may "
            f"use {cores}; use --jobs {most} at most{'' if each == 1 else ', or fewer launch.threads'}"
        )
    most = min(wanted or most, len(cells))
    each_bytes, available = _bytes(cells), _available()
    fitting = max(1, int(min(available / each_bytes, most)))
    if wanted is not None and most > fitting:
        raise SpecError(
            f"--jobs: {most} cells need about {disk_size(int(most * each_bytes))} of memory, and "
            f"{disk_size(int(available))} are available; use --jobs {fitting} at most, or a smaller train.micro_batch"
        )
    return Jobs(count=fitting)


def _available() -> float:
    from headway.launcher.plan.free_memory import available_bytes

    return available_bytes()


def _bytes(cells: Sequence[Cell]) -> float:
    """Planned peak memory of the largest cell, over all its processes."""
    from headway.launcher.plan.memory import worst
    from headway.launcher.plan.stages import grid_of

    found: dict[Path, float] = {}
    for cell in cells:
        variant = cell.run_dir.parent
        if variant not in found:
            model = cell.spec.model.model_copy(update={"vocab_size": cell.vocab_size})
            peak = worst(grid_of(cell.spec.model_copy(update={"model": model})))[1].peak
            found[variant] = cell.spec.launch.processes * (peak + PROCESS_BYTES)
    return max(found.values())


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
