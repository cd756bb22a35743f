"""Check the folder of the initial weights of a spec (`init.weights`) before any process is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headway.data.config import datasets_of
from headway.data.places import looked_for
from headway.launcher.base.errors import SpecError
from headway.launcher.run.run_dir import RunDir, difference, flatten
from headway.launcher.spec.spec import Spec
from headway.model.huggingface import folder as hf
from headway.parallel.manifest import steps_on_disk

_START = ("init_std", "branch_start")
"""Keys of `model` that affect only random weights."""


def with_initial_hash(spec: Spec) -> Spec:
    """The spec with `init.sha256` filled in, so that it identifies the weights even if their folder changes.

    The folder may be missing if `init.sha256` is given and the run has a checkpoint or is complete.

    Raises WeightsError if the folder is missing, incomplete or damaged, SpecError if its weights are not those that the
    spec names, belong to another model, or use the ids of another tokenizer.
    """
    if spec.init.weights is None:
        return spec
    folder = Path(spec.init.weights).expanduser()
    if not folder.exists():
        if spec.init.sha256 is not None and _continues(RunDir.of(spec)):
            return spec
        raise hf.WeightsError(
            f"init.weights: {folder}: no such folder{looked_for(folder)}; name a folder written by `headway export RUN "
            "--to safetensors` or `headway import`, or leave init.weights out"
        )
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


def _continues(run: RunDir) -> bool:
    """Whether a run has a checkpoint or is complete, so that it does not read its initial weights again."""
    return bool(steps_on_disk(run.checkpoints)) or run.is_complete()


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
    datasets = datasets_of(spec.data.source)
    if hf.TOKENIZER not in config.files or not datasets:
        return
    source = datasets[0]
    from headway.data.manifest import read_manifest

    if read_manifest(Path(source.path).expanduser()).tokenizer_sha256 != config.files[hf.TOKENIZER].sha256:
        raise SpecError(
            f"init.weights: {source.path} was made with another tokenizer than {folder}, so its ids mean other text; "
            f"build it with `tokenizer: {{type: file, path: {folder / hf.TOKENIZER}, eos_token: ...}}`, or leave "
            f"init.weights out"
        )
