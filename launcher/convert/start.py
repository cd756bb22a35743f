"""The start of a run with `init.convert`: its initial weights are converted once, into its folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.new_folder import new_folder
from headway.launcher.convert.converting import CARD, card_lines, convert
from headway.launcher.run.initial_weights import given_checkpoint, named
from headway.launcher.run.run_dir import RunDir, read_mapping, write_json
from headway.launcher.run.stored_spec import stored_spec
from headway.launcher.run.weights import load_decoder
from headway.launcher.spec.spec import Spec
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder
from headway.model.huggingface import folder as hf
from headway.parallel.manifest import steps_on_disk


def prepare_start(run: RunDir, spec: Spec) -> dict[str, Any] | None:
    """Convert the weights that the resolved `spec` names into `run.converted`, unless that is done or no longer needed.

    Returns the card of the conversion; None for a spec without one, or for a run that has a checkpoint. The caller
    holds the lock of the run. Raises SpecError for weights that cannot be converted, and what reading them raises.
    """
    if spec.init.convert is None or steps_on_disk(run.checkpoints) or run.is_complete():
        return None
    folder, options = run.converted, spec.init.convert
    if not (folder / hf.CONFIG).is_file():
        decoder, model, where = _source(spec)
        change = convert(
            decoder,
            model,
            spec.attention,
            how=options.how,
            by=options.by,
            tokens=options.tokens,
            data=spec.data,
            seq_len=spec.data.seq_len,
            seed=spec.seed,
            source=where,
        )
        write_weights(folder, change.decoder, _exported(spec, where), change.card, option="run_dir")
        for line in card_lines(change.card):
            console.say(line)
    return read_mapping(folder / CARD)


def _source(spec: Spec) -> tuple[Decoder, ModelConfig, str]:
    """(decoder, its config, where it is from) of `init.weights` of a resolved spec."""
    place = named(str(spec.init.weights))
    found = given_checkpoint(spec)
    if found is not None:
        before = stored_spec(RunDir(place.path))
        return load_decoder(before, found), before.model, f"{place.path}, step {found.step}"
    config = hf.read_exported(place.path)
    return hf.load_exported(place.path).requires_grad_(False), config.model, str(place.path)


def _exported(spec: Spec, where: str) -> hf.ExportedConfig:
    assert spec.model.vocab_size is not None, "the spec is resolved"
    return hf.ExportedConfig(
        source=f"converted from {where}",
        model=spec.model,
        attention=spec.attention,
        vocab_size=spec.model.vocab_size,
        seq_len=spec.data.seq_len,
        tokens=0,
        bos_token_id=None,
        eos_token_id=None,
        files={},
    )


def write_weights(
    out: Path,
    decoder: Decoder,
    exported: hf.ExportedConfig,
    card: dict[str, Any],
    *,
    option: str,
    tokenizer: Path | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write a new folder of weights with the card of their conversion.

    `tokenizer`: file to copy. `finish`: called with the folder when its config.json is there, to add more files.
    `option`: see `new_folder`.
    """
    with new_folder(out, option=option) as folder:
        with console.progress("write tensors", lines=False):
            files = hf.write_tensors(folder, decoder.state_dict(), max_shard_bytes=hf.MAX_SHARD_BYTES)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / hf.TOKENIZER)
            files.append(hf.TOKENIZER)
        write_json(folder / CARD, card)
        hf.write_exported(folder, exported, [*files, CARD])
        if finish is not None:
            finish(folder)
