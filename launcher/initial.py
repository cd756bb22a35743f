"""Training that starts from exported or imported weights instead of random ones (`init.weights` of a spec)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headway.data.config import MdsSource
from headway.launcher.errors import SpecError
from headway.launcher.run_dir import difference, flatten
from headway.launcher.spec import Spec
from headway.model import hf
from headway.model.hf import TensorFiles
from headway.parallel.logical import own_part

if TYPE_CHECKING:
    from headway.parallel.engine import Engine
    from headway.parallel.layout import Layout

_START = ("init_std",)
"""Keys of `model` that decide random weights alone."""


def with_initial_hash(spec: Spec) -> Spec:
    """The spec with `init.sha256` filled in, so that it names the weights whatever their folder becomes.

    Raises WeightsError where the folder is not whole, SpecError where its weights are not those the spec names, are
    another model's, or read another tokenizer's ids.
    """
    if spec.init.weights is None:
        return spec
    folder = Path(spec.init.weights).expanduser()
    if spec.init.sha256 is not None and not folder.exists():
        return spec  # a run that goes on needs them no more; one that begins says so when it reads them
    config = hf.read_exported(folder)
    found = hf.sha256_of(folder / hf.CONFIG)
    if spec.init.sha256 not in (None, found):
        raise SpecError(
            f"init.sha256: {folder} holds other weights ({found[:16]}, not {str(spec.init.sha256)[:16]}); restore the "
            f"folder, or give init.sha256={found} with another run_dir"
        )
    hf.verify_exported(folder, config)
    _refuse_another_model(spec, config, folder)
    _refuse_another_tokenizer(spec, config, folder)
    return spec.model_copy(update={"init": spec.init.model_copy(update={"sha256": found})})


def _refuse_another_model(spec: Spec, config: hf.ExportedConfig, folder: Path) -> None:
    def shape(model: Any, attention: Any) -> dict[str, Any]:
        return flatten({"model": model.model_dump(mode="json"), "attention": attention.model_dump(mode="json")})

    there = shape(config.model, config.attention) | {"model.vocab_size": config.vocab_size}
    wrong = [
        f"  {key}: {a!r} there, {b!r} in the spec"
        for key, a, b in difference(there, shape(spec.model, spec.attention))
        if key.removeprefix("model.") not in _START
    ]
    if wrong:
        raise SpecError(
            "\n".join([f"init.weights: {folder} holds another model:", *wrong[:10]])
            + "\nuse the values that are there (an imported folder has them in model.yaml), or leave init.weights out"
        )


def _refuse_another_tokenizer(spec: Spec, config: hf.ExportedConfig, folder: Path) -> None:
    source = spec.data.source
    if hf.TOKENIZER not in config.files or not isinstance(source, MdsSource):
        return
    from headway.data.manifest import read_manifest

    if read_manifest(Path(source.path).expanduser()).tokenizer_sha256 != config.files[hf.TOKENIZER].sha256:
        raise SpecError(
            f"init.weights: {source.path} was made with another tokenizer than {folder}, so its ids mean other text; "
            f"build it with `tokenizer: {{type: file, path: {folder / hf.TOKENIZER}, eos_token: ...}}`, or leave "
            f"init.weights out"
        )


def load_initial(spec: Spec, engine: Engine, layout: Layout) -> None:
    """Set parameters and buffers of this rank's part from `init.weights`, with moments of 0. Collective.

    Raises WeightsError or SpecError where the folder is no longer what the launcher saw.
    """
    spec = with_initial_hash(spec)
    files = TensorFiles(Path(str(spec.init.weights)).expanduser())
    engine.write_logical(_Start(files), applied_steps=0)
    with torch.no_grad():
        for name, (buffer, dim) in engine.buffers().items():
            buffer.copy_(own_part(files[name], dim, layout))


class _Start(Mapping[str, Tensor]):
    """What an engine is given: parameters of the files, and Adam's moments before the first step."""

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
