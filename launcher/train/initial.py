"""Start training from exported or imported weights instead of random ones (`init.weights` of a spec)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headway.launcher.run.initial_weights import with_initial_hash
from headway.launcher.spec.spec import Spec
from headway.model.huggingface.folder import TensorFiles
from headway.parallel.logical import own_part

if TYPE_CHECKING:
    from headway.parallel.engine import Engine
    from headway.parallel.layout import Layout


def load_initial(spec: Spec, engine: Engine, layout: Layout) -> None:
    """Load the parameters and buffers of this rank from `init.weights`, with optimizer moments of 0. Collective.

    Raises WeightsError or SpecError if the folder has changed since the launcher checked it.
    """
    spec = with_initial_hash(spec)
    files = TensorFiles(Path(str(spec.init.weights)).expanduser())
    engine.write_logical(_Start(files), applied_steps=0)
    with torch.no_grad():
        for name, (buffer, dim) in engine.buffers().items():
            buffer.copy_(own_part(files[name], dim, layout))


class _Start(Mapping[str, Tensor]):
    """State for the engine: parameters from the files, and the moments of Adam before the first step."""

    def __init__(self, files: TensorFiles) -> None:
        self._files = files

    def __getitem__(self, key: str) -> Tensor:
        part, _, name = key.partition("/")
        tensor = self._files[name]
        return tensor if part == "param" else torch.zeros_like(tensor)

    def __iter__(self) -> Iterator[str]:
        return (f"param/{name}" for name in self._files)

    def __len__(self) -> int:
        return len(self._files)
