"""Check the initial weights of a spec (`init.weights`) before any process is started.

They are a folder of exported or imported weights, or a checkpoint of a run: PATH names its newest one, PATH@STEP
another. The run needs them until it has a checkpoint of its own. Its folder names the step that it began from, so the
same command begins from the same checkpoint, even if the other run has trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from headway.data.config import DataError, datasets_of
from headway.data.places import looked_for
from headway.launcher.base import console
from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.run.branching import hash_of, lineage
from headway.launcher.run.folders import kind_of, not_a_run
from headway.launcher.run.run_dir import SHA256, RunDir, difference, flatten, read_mapping
from headway.launcher.run.stored_spec import stored_spec
from headway.launcher.run.weights import find_checkpoint
from headway.launcher.spec.paths import split_step
from headway.launcher.spec.spec import Spec
from headway.model.convert.decoder import check_conversion
from headway.model.huggingface import folder as hf
from headway.parallel.config import CheckpointError
from headway.parallel.manifest import Checkpoint, read_manifest, steps_on_disk

_START = ("init_std", "branch_start")
"""Keys of `model` that affect only random weights."""
_SHOWN = 10
"""Differing keys in a message, at most."""


class Named(NamedTuple):
    """The place that `init.weights` names. `step`: None for a folder of weights, and for the newest of a run."""

    path: Path
    step: int | None

    @property
    def is_run(self) -> bool:
        return (self.path / "spec.json").is_file()


def named(written: str) -> Named:
    """The place of a text of `init.weights`. `PATH@STEP` names a step unless there is a folder of this very name."""
    whole, parts = Path(written).expanduser(), split_step(written)
    return Named(whole, None) if parts is None or whole.exists() else Named(Path(parts[0]).expanduser(), parts[1])


def with_initial_hash(spec: Spec) -> Spec:
    """The spec of `with_initial`."""
    return with_initial(spec)[0]


def with_initial(spec: Spec) -> tuple[Spec, dict[str, Any] | None]:
    """(spec whose `init` identifies the weights, even if their place changes; facts about them for the run card).

    `init.sha256` is filled in, and the step of a checkpoint in `init.weights`. The facts are None for a run that does
    not read the weights again, as it has a checkpoint or is complete; then they may be gone. All hashes are verified.

    Raises WeightsError if the folder is missing, incomplete or damaged, NoInputError or CheckpointError for the
    checkpoint of a run, SpecError if the weights are not those that the spec names, belong to another model, or use the
    ids of another tokenizer.
    """
    if spec.init.weights is None:
        return spec, None
    place = named(spec.init.weights)
    kept = _kept(RunDir.of(spec))
    if kept is not None and place.step in (None, kept.step) and (place.is_run or not place.path.exists()):
        place = Named(place.path, kept.step)
        if _continues(RunDir.of(spec)):
            return _pinned(spec, place, spec.init.sha256 or _hash_there(place) or kept.sha256), None
    if place.is_run:
        return _of_a_run(spec, place)
    if place.step is not None:
        raise NoInputError(f"init.weights: {not_a_run(place.path)}{looked_for(place.path)}")
    return _of_a_folder(spec, place.path)


def given_checkpoint(spec: Spec) -> Checkpoint | None:
    """The checkpoint that the resolved `init.weights` names; None for a folder of weights. Its hashes are not verified.

    Raises SpecError if it is another one than that of `init.sha256`, CheckpointError if it is damaged.
    """
    place = named(str(spec.init.weights))
    if not place.is_run or place.step is None:
        return None
    run = RunDir(place.path)
    path = _folder_of(place)
    checkpoint = Checkpoint(path=path, step=place.step, manifest=read_manifest(path, run=run.run_id()))
    _refuse_another_hash(spec, checkpoint, run)
    return checkpoint


# ---------------------------------------------------------------- a checkpoint of a run


class _Kept(NamedTuple):
    """Step and hash of the checkpoint that a run has begun from."""

    step: int
    sha256: str


def _kept(own: RunDir) -> _Kept | None:
    flat = flatten(read_mapping(own.spec))
    written, found = flat.get("init.weights"), flat.get(SHA256)
    parts = split_step(written) if isinstance(written, str) else None
    return _Kept(parts[1], found) if parts is not None and isinstance(found, str) else None


def _of_a_run(spec: Spec, place: Named) -> tuple[Spec, dict[str, Any]]:
    run = RunDir(place.path)
    if place.path.resolve() == RunDir.of(spec).path.resolve():
        raise SpecError(
            f"init.weights: {place.path} is the folder of this run itself; the same command without init.weights goes "
            "on with it, and another run_dir=... starts a new run from its weights"
        )
    before = stored_spec(run)
    _refuse_another(spec, before.model, before.attention, before.model.vocab_size, place.path)
    _refuse_another_tokenizer_of_a_run(spec, before, run)
    found = find_checkpoint(run, place.step, key="init.weights")
    _refuse_another_hash(spec, found, run)
    sha256 = hash_of(found.path)
    facts = {
        "run": run.run_id(),
        "path": str(run.path),
        "step": found.step,
        "tokens": found.state.get("tokens"),
        "sha256": sha256,
        "git_commit": found.manifest.about.get("git_commit"),
        "lineage": lineage(run, before, found.step),
        **_converted(spec),
    }
    return _pinned(spec, Named(place.path, found.step), sha256), facts


def _pinned(spec: Spec, place: Named, sha256: str) -> Spec:
    update = {"weights": f"{place.path}@{place.step}", "sha256": sha256}
    return spec.model_copy(update={"init": spec.init.model_copy(update=update)})


def _folder_of(place: Named) -> Path:
    return RunDir(place.path).checkpoints / f"step-{place.step:010d}"


def _hash_there(place: Named) -> str | None:
    try:
        return hash_of(_folder_of(place))
    except OSError:
        return None


def _refuse_another_hash(spec: Spec, checkpoint: Checkpoint, run: RunDir) -> None:
    try:
        found = hash_of(checkpoint.path)
    except OSError as e:
        raise CheckpointError(f"init.weights: {checkpoint.path}: cannot be read ({e}); name another step") from e
    if spec.init.sha256 not in (None, found):
        raise SpecError(
            f"init.sha256: the checkpoint of step {checkpoint.step} in {run.path} is another one ({found[:16]}, not "
            f"{str(spec.init.sha256)[:16]}); restore it, or give init.sha256={found} with another run_dir=..."
        )


def _refuse_another_tokenizer_of_a_run(spec: Spec, before: Spec, run: RunDir) -> None:
    ours, theirs = datasets_of(spec.data.source), datasets_of(before.data.source)
    if not ours or not theirs:  # synthetic ids are numbers of a task
        return
    from headway.data.manifest import TOKENIZER_NAME, read_manifest

    try:
        other = read_manifest(Path(theirs[0].path).expanduser()).tokenizer_sha256
    except DataError:
        console.warn(
            f"init.weights: the dataset of {run.path} ({theirs[0].path}) is not there, so nothing tells whether "
            f"{ours[0].path} was made with its tokenizer"
        )
        return
    if read_manifest(Path(ours[0].path).expanduser()).tokenizer_sha256 != other:
        file = Path(theirs[0].path) / TOKENIZER_NAME
        raise SpecError(_other_tokenizer(ours[0].path, run.path, file))


# ---------------------------------------------------------------- a folder of weights


def _of_a_folder(spec: Spec, folder: Path) -> tuple[Spec, dict[str, Any] | None]:
    """The folder may be missing if `init.sha256` is given and the run has a checkpoint or is complete."""
    if not folder.exists():
        if spec.init.sha256 is not None and _continues(RunDir.of(spec)):
            return spec, None
        raise hf.WeightsError(
            f"init.weights: {folder}: no such folder{looked_for(folder)}; name the folder of a run, or one written by "
            "`headway export RUN --to safetensors` or `headway import`, or leave init.weights out"
        )
    if not (folder / hf.CONFIG).exists():
        if kind_of(folder) is not None:
            raise NoInputError(f"init.weights: {not_a_run(folder)}")
        raise hf.WeightsError(
            f"init.weights: {folder} has neither spec.json nor config.json, so it is no run and no folder of weights; "
            "name the folder of a run (`headway ls` lists them), or one written by `headway export RUN --to "
            "safetensors` or `headway import`"
        )
    config = hf.read_exported(folder)
    found = hf.sha256_of(folder / hf.CONFIG)
    if spec.init.sha256 not in (None, found):
        raise SpecError(
            f"init.sha256: {folder} holds other weights ({found[:16]}, not {str(spec.init.sha256)[:16]}); restore the "
            f"folder, or give init.sha256={found} with another run_dir"
        )
    hf.verify_exported(folder, config)
    _refuse_another(spec, config.model, config.attention, config.vocab_size, folder)
    _refuse_another_tokenizer(spec, config, folder)
    facts = {"path": str(folder), "sha256": found, "tokens": config.tokens, "source": config.source, **_converted(spec)}
    return spec.model_copy(update={"init": spec.init.model_copy(update={"sha256": found})}), facts


def _refuse_another_tokenizer(spec: Spec, config: hf.ExportedConfig, folder: Path) -> None:
    datasets = datasets_of(spec.data.source)
    if hf.TOKENIZER not in config.files or not datasets:
        return
    source = datasets[0]
    from headway.data.manifest import read_manifest

    if read_manifest(Path(source.path).expanduser()).tokenizer_sha256 != config.files[hf.TOKENIZER].sha256:
        raise SpecError(_other_tokenizer(source.path, folder, folder / hf.TOKENIZER))


# ---------------------------------------------------------------- both


def _continues(run: RunDir) -> bool:
    """Whether a run has a checkpoint or is complete, so that it does not read its initial weights again."""
    return bool(steps_on_disk(run.checkpoints)) or run.is_complete()


def _converted(spec: Spec) -> dict[str, Any]:
    """What the facts say of a conversion."""
    return {} if spec.init.convert is None else {"convert": spec.init.convert.how}


def _refuse_another(spec: Spec, model: Any, attention: Any, vocab_size: int | None, where: Path) -> None:
    """Raise SpecError if the weights are not those of the spec, or cannot be converted to it."""
    if spec.init.convert is None:
        _refuse_another_model(spec, model, attention, vocab_size, where)
        return
    _refuse_another_model(spec, model, spec.attention, vocab_size, where)
    try:
        check_conversion(model, attention, spec.attention, spec.init.convert.how)
    except ValueError as e:
        raise SpecError(f"init.convert: the weights of {where} cannot become those of the spec: {e}") from None


def _refuse_another_model(spec: Spec, model: Any, attention: Any, vocab_size: int | None, where: Path) -> None:
    def shape(model: Any, attention: Any) -> dict[str, Any]:
        return flatten({"model": model.model_dump(mode="json"), "attention": attention.model_dump(mode="json")})

    there = shape(model, attention) | {"model.vocab_size": vocab_size}
    found = difference(there, shape(spec.model, spec.attention))
    wrong = [
        f"  {key}: {a!r} there, {b!r} in the spec"
        for key, a, b in sorted(found, key=lambda each: each[0] != "attention.type")  # the reason of many others
        if key.removeprefix("model.") not in _START
    ]
    if wrong:
        wrong[_SHOWN:] = [f"  and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise SpecError(
            "\n".join([f"init.weights: {where} holds another model:", *wrong])
            + "\nuse the values that are there (an imported folder has them in model.yaml, a run in spec.json), or "
            "leave init.weights out; init.convert.how=mean converts mha or gqa to the attention of the spec"
        )


def _other_tokenizer(dataset: str, weights: Path, tokenizer: Path) -> str:
    return (
        f"init.weights: {dataset} was made with another tokenizer than {weights}, so its ids mean other text; "
        f"build it with `tokenizer: {{type: file, path: {tokenizer}, eos_token: ...}}`, or leave init.weights out"
    )
