"""Search all legal layouts on a number of GPUs, and sort those that fit by estimated speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from headway.launcher.base import console
from headway.launcher.base.errors import SpecError
from headway.launcher.plan.hardware import Gpu, Network, usable_bytes
from headway.launcher.plan.memory import Memory, worst
from headway.launcher.plan.speed import Speed, speed
from headway.launcher.plan.stages import Grid, grid_of
from headway.launcher.spec.layouts import legal_tensor, why_not

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec

NEAR = 0.05
"""Estimates within this share of the best count as equal, and the simpler layout comes first."""

PASS_TOKENS = 16_384
"""Tokens per forward pass and rank from which matrix products are large enough; more tokens only take memory."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A spec in one layout, with its estimated memory and speed."""

    spec: Spec
    grid: Grid
    memory: Memory
    stage: int  # the stage that needs most memory
    speed: Speed
    useful_flops_per_token: float  # forward and backward

    @property
    def overrides(self) -> list[str]:
        """Command-line arguments that select this layout. The user replaces `first-host` by an address."""
        parallel, launch = self.spec.parallel, self.spec.launch
        meet = launch.hosts > 1 and launch.address is None and launch.method != "slurm"
        return [
            f"launch.hosts={launch.hosts}",
            f"launch.processes={launch.processes}",
            *(["launch.address=first-host"] * meet),
            f"parallel.tensor={parallel.tensor}",
            f"parallel.pipeline={parallel.pipeline}",
            f"parallel.sequence_parallel={str(parallel.sequence_parallel).lower()}",
            f"parallel.zero={parallel.zero}",
            f"parallel.recompute={parallel.recompute}",
            f"train.micro_batch={self.spec.train.micro_batch}",
        ]

    def fits(self, gpu: Gpu) -> bool:
        return self.memory.peak <= usable_bytes(gpu)

    @property
    def complexity(self) -> tuple[int, ...]:
        """Sort key, smaller is simpler: stages, tensor parallel ranks, ZeRO and recomputation, size of the passes."""
        parallel = self.spec.parallel
        extras = parallel.zero + (parallel.recompute == "block")
        return (parallel.pipeline, parallel.tensor, extras, -min(self.grid.tokens, PASS_TOKENS), self.grid.tokens)


@dataclass(frozen=True, kw_only=True)
class Search:
    """Result of a search.

    `best`: layouts that fit, fastest first, each with its best micro-batch. `too_big`: layouts that fit with no
    micro-batch, each with the one that needs least memory. `illegal`: key that forbids a layout -> number of layouts.
    """

    best: list[Layout]
    too_big: list[Layout]
    illegal: Counter[str]


def search(spec: Spec, *, gpus: int, gpu: Gpu, network: Network, useful_flops_per_token: float) -> Search:
    """Layouts of `spec` on `gpus` GPUs. Context parallel size, precision, batch and model are not changed.

    Raises SpecError if `gpus` is below 1, or exceeds one host and is not a multiple of a host's GPUs.
    """
    illegal: Counter[str] = Counter()
    fitting, too_big = list[Layout](), list[Layout]()
    shape = _hosts(gpus, gpu)
    total = sum(1 for _ in _candidates(spec, *shape))
    with console.progress(f"search layouts of {gpus} GPUs", total, "layouts") as bar:
        for _, candidates in groupby(_candidates(spec, *shape), _but_for_micro_batch):
            alike = list[Layout]()
            for candidate in candidates:
                bar.update()
                reason = why_not(candidate)
                if reason is None:
                    alike.append(plan_layout(candidate, gpu, network, useful_flops_per_token=useful_flops_per_token))
                else:
                    illegal[reason.partition(":")[0]] += 1
            if fits := [layout for layout in alike if layout.fits(gpu)]:
                fitting.append(_ordered(fits)[0])
            elif alike:
                too_big.append(min(alike, key=lambda layout: layout.memory.peak))
    return Search(best=_ordered(fitting), too_big=_ordered(too_big), illegal=illegal)


def plan_layout(spec: Spec, gpu: Gpu, network: Network, *, useful_flops_per_token: float) -> Layout:
    """Memory and speed of a legal spec in its own layout."""
    grid = grid_of(spec)
    stage, memory = worst(grid)
    estimate = speed(grid, gpu, network, useful_flops_per_token=useful_flops_per_token)
    return Layout(
        spec=spec,
        grid=grid,
        memory=memory,
        stage=stage.index,
        speed=estimate,
        useful_flops_per_token=useful_flops_per_token,
    )


def _ordered(layouts: list[Layout]) -> list[Layout]:
    """Sort by speed; among layouts within `NEAR` of the fastest remaining one, the simplest comes first."""
    rest, ordered = sorted(layouts, key=lambda layout: -layout.speed.middle), []
    while rest:
        near = [layout for layout in rest if layout.speed.middle >= (1 - NEAR) * rest[0].speed.middle]
        chosen = min(near, key=lambda layout: (layout.complexity, -layout.speed.middle))
        ordered.append(chosen)
        rest.remove(chosen)
    return ordered


def _hosts(gpus: int, gpu: Gpu) -> tuple[int, int]:
    """(number of hosts, GPUs per host)."""
    if gpus < 1:
        raise SpecError(f"--gpus: {gpus} is not a number of GPUs; use 1 or more")
    if gpus <= gpu.per_host:
        return 1, gpus
    if gpus % gpu.per_host:
        near = gpus // gpu.per_host * gpu.per_host
        raise SpecError(
            f"--gpus: {gpus} is not a multiple of the {gpu.per_host} GPUs of a host, and all hosts must run the same "
            f"number of processes; use {near} or {near + gpu.per_host}"
        )
    return gpus // gpu.per_host, gpu.per_host


def _candidates(spec: Spec, hosts: int, processes: int) -> Iterator[Spec]:
    """Candidate layouts: tensor parallel ranks within a host, and sequence parallelism wherever they can share
    sequences.
    """
    launch = spec.launch.model_copy(update={"hosts": hosts, "processes": processes})
    world, context = hosts * processes, spec.parallel.context
    for tensor in (t for t in legal_tensor(spec) if processes % (t * context) == 0):
        ranks = world // (tensor * context)
        for pipeline in (p for p in range(1, spec.model.layers + 1) if ranks % p == 0):
            batch = spec.train.global_batch // (ranks // pipeline)
            for zero in (1, 2, 3) if pipeline == 1 and ranks * context > 1 else (1,):
                for recompute in ("none", "block"):
                    for micro_batch in _powers(batch):
                        update = {
                            "tensor": tensor,
                            "pipeline": pipeline,
                            "zero": zero,
                            "recompute": recompute,
                            "sequence_parallel": tensor > 1 and spec.data.seq_len % (tensor * context) == 0,
                        }
                        parallel = spec.parallel.model_copy(update=update)
                        train = spec.train.model_copy(update={"micro_batch": micro_batch})
                        yield spec.model_copy(update={"launch": launch, "parallel": parallel, "train": train})


def _but_for_micro_batch(spec: Spec) -> tuple[object, ...]:
    """Equal for candidates that differ in their micro-batch only, which follow each other."""
    parallel = spec.parallel
    return parallel.tensor, parallel.pipeline, parallel.zero, parallel.recompute


def _powers(most: int) -> list[int]:
    """1, 2, 4 ... up to `most`."""
    return [1 << i for i in range(max(most, 1).bit_length())]
