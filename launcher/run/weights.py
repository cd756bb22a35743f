"""Load the decoder of a run with the weights of one of its checkpoints, in a single process."""

from __future__ import annotations

from headway.launcher.base import console
from headway.launcher.base.errors import NoInputError
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.encoder_decoder import decoders_only
from headway.launcher.spec.spec import Spec
from headway.model.decoder import Decoder
from headway.model.seq2seq.build import Model, build_model
from headway.parallel import checkpoint


def find_checkpoint(run: RunDir, step: int | None = None, *, key: str = "--step") -> checkpoint.Checkpoint:
    """The newest complete checkpoint, or the checkpoint of `step`. All hashes are verified. `key`: for messages.

    Raises CheckpointError if it is incomplete, if another run wrote it, or if there is none, NoInputError if there is
    none for `step`.
    """
    if step is None:
        with console.progress("verify checkpoint", lines=False):
            return checkpoint.newest_readable(run.checkpoints, warn=console.warn, run=run.run_id())
    steps = {int(path.name.removeprefix("step-")): path for path in checkpoint.steps_on_disk(run.checkpoints)}
    if step not in steps:
        there = ", ".join(map(str, sorted(steps))) or "none"
        raise NoInputError(
            f"{key}: {run.path} has no checkpoint of step {step} (there: {there}); name one, or leave it out"
        )
    manifest = checkpoint.read_manifest(steps[step], run=run.run_id())
    size = sum(entry.bytes for entry in manifest.files.values())
    with console.progress("verify checkpoint", size, "B") as bar:
        checkpoint.verify_hashes(steps[step], manifest, checked=bar.update)
    return checkpoint.Checkpoint(path=steps[step], step=step, manifest=manifest)


def load_decoder(spec: Spec, found: checkpoint.Checkpoint) -> Decoder:
    """The whole decoder on CPU in fp32 and evaluation mode, with its schedules at the state of the checkpoint.

    Raises SpecError for an encoder-decoder.
    """
    decoders_only(spec, "what reads the weights as those of a decoder (convert, Run.model)")
    model = load_model(spec, found)
    assert isinstance(model, Decoder)
    return model


def load_model(spec: Spec, found: checkpoint.Checkpoint) -> Model:
    """As `load_decoder`, also an encoder-decoder."""
    assert spec.model.vocab_size is not None, "a run folder holds a resolved spec"
    model = build_model(spec.model, spec.attention, vocab_size=spec.model.vocab_size, seed=spec.seed)
    checkpoint.load_weights(found, model)
    model.before_step(int(found.state["tokens"]))
    return model.eval().requires_grad_(False)
