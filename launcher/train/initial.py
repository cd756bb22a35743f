"""Start training from given weights (`init.weights` of a spec) or from a checkpoint of another run (`init.run`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from headway.launcher.base.errors import HeadwayError, SpecError
from headway.launcher.run.branching import Parent, find_parent
from headway.launcher.run.initial_weights import given_checkpoint, with_initial_hash
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.spec import Spec
from headway.model.huggingface import folder as hf
from headway.parallel import checkpoint
from headway.parallel.config import CheckpointError
from headway.parallel.logical import own_part
from headway.parallel.manifest import Checkpoint

if TYPE_CHECKING:
    from headway.parallel.engine import Engine
    from headway.parallel.layout import Layout


def load_initial(spec: Spec, engine: Engine, layout: Layout) -> None:
    """Load the parameters and buffers of this rank from `init.weights`, with optimizer moments of 0. Collective.

    With `init.convert`, they are what the launcher converted into the folder of the run. Raises WeightsError,
    CheckpointError or SpecError if they have changed since the launcher checked them.
    """
    if spec.init.convert is not None:
        folder = RunDir.of(spec).converted
        hf.verify_exported(folder, hf.read_exported(folder))
        _load_folder(folder, engine, layout)
        return
    if (given := _found(lambda: given_checkpoint(spec), layout)) is not None:
        checkpoint.load(given, engine, layout, fresh_optimizer=True)
        return
    spec = with_initial_hash(spec)
    _load_folder(Path(str(spec.init.weights)).expanduser(), engine, layout)


def _load_folder(folder: Path, engine: Engine, layout: Layout) -> None:
    files = hf.TensorFiles(folder)
    engine.write_logical(_Start(files), applied_steps=0)
    with torch.no_grad():
        for name, (buffer, dim) in engine.buffers().items():
            buffer.copy_(own_part(files[name], dim, layout))


def load_parent(spec: Spec, fingerprint: str | None, engine: Engine, layout: Layout) -> Parent:
    """Load the state of this rank from the checkpoint that `init.run` names: weights, buffers, and moments unless the
    optimizer is fresh. Collective.

    `fingerprint`: of the data; None for synthetic data. The hash of each file is verified by one rank. If a check fails
    on any rank, all ranks raise: SpecError if the parent has changed since the launcher checked it, CheckpointError if
    the checkpoint is damaged.
    """
    parents: list[Parent] = []

    def find() -> Checkpoint:
        parents.append(find_parent(spec, fingerprint))
        return parents[-1].checkpoint

    checkpoint.load(_found(find, layout), engine, layout, fresh_optimizer=spec.init.optimizer == "fresh")
    return parents[-1]


Found = TypeVar("Found", bound=Checkpoint | None)


def _found(find: Callable[[], Found], layout: Layout) -> Found:
    """The checkpoint of `find`, verified: the hash of each file by one rank. Collective.

    If a check fails on any rank, all ranks raise: SpecError for an error of Headway, CheckpointError for damage.
    """
    found, problem = None, None
    try:
        found = find()
        if found is not None:
            checkpoint.verify_hashes(found.path, found.manifest, rank=layout.rank, size=layout.world_size)
    except (HeadwayError, CheckpointError, OSError) as e:
        problem = [f"rank {layout.rank}: {e}", isinstance(e, HeadwayError)]
    problems = [other for other in layout.gather_json(problem) if other]
    if problems:
        text, of_spec = problems[0]
        raise SpecError(text) if of_spec else CheckpointError(f"{text}; restore the checkpoint from a copy")
    return cast("Found", found)


class _Start(Mapping[str, Tensor]):
    """State for the engine: parameters from the files, and the moments of Adam before the first step."""

    def __init__(self, files: hf.TensorFiles) -> None:
        self._files = files

    def __getitem__(self, key: str) -> Tensor:
        part, _, name = key.partition("/")
        tensor = self._files[name]
        return tensor if part == "param" else torch.zeros_like(tensor)

    def __iter__(self) -> Iterator[str]:
        return (f"param/{name}" for name in self._files)

    def __len__(self) -> int:
        return len(self._files)
