"""`headway convert`: write the weights of a trained model in the form of another attention mechanism, with a card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from headway.data import tokenizer as tokenizers
from headway.data.config import DataConfig, DataError, MdsSource
from headway.data.manifest import MANIFEST_NAME, read_manifest
from headway.launcher.base import console
from headway.launcher.base.errors import NoInputError, SpecError, printable
from headway.launcher.base.new_folder import refuse_taken
from headway.launcher.convert.converting import card_lines, convert
from headway.launcher.convert.start import write_weights
from headway.launcher.exchange.export import readme
from headway.launcher.exchange.import_hf import SPEC, read_foreign, read_raw, spec_text
from headway.launcher.run.codec import Codec
from headway.launcher.run.folders import not_a_run
from headway.launcher.run.run_dir import RunDir
from headway.launcher.run.stored_spec import stored_spec
from headway.launcher.run.weights import find_checkpoint, load_decoder
from headway.launcher.spec.fields import root_shape
from headway.launcher.spec.merge import override_layer
from headway.model.attention.gqa import DenseConfig
from headway.model.attention.registry import MECHANISMS
from headway.model.base import AttentionConfig, AttentionSection
from headway.model.convert.decoder import target_fields
from headway.model.convert.methods import SOURCES, By, How
from headway.model.decoder import Decoder
from headway.model.huggingface import folder as hf

LONGEST = 2048
"""Tokens of a sequence of calibration, at most, for weights that were trained on longer ones."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Options of the command. `overrides`: arguments attention.KEY=value."""

    to: str
    kv_heads: int | None
    how: How
    by: By = "activations"
    unequal: bool = False
    by_layer: bool = False
    overrides: tuple[str, ...] = ()
    tokens: int = 16_384
    data: Path | None = None
    step: int | None = None
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class Source:
    """A trained model. `exported`: its config, whose `source` is for people. `data`: None if none is at hand.

    `note`: what the user should know of it; empty for nothing.
    """

    decoder: Decoder
    exported: hf.ExportedConfig
    tokenizer: Path | None
    data: DataConfig | None
    note: str = ""


def convert_folder(path: Path, out: Path, asked: Asked) -> int:
    """Convert the model in `path` and write weights, tokenizer, card and spec into the new folder `out`. Returns 0.

    `path`: a run, exported or imported weights, or a Llama of Hugging Face. Raises NoInputError if it is none of these,
    SpecError for what cannot be converted, DataError for a dataset that does not fit, WeightsError and CheckpointError
    for damaged sources. After an error `out` does not exist.
    """
    refuse_taken(out, option="--out")
    source = _open(path, asked)
    if source.note:
        console.note(source.note)
    target = _target(source.decoder.attention, asked)
    change = convert(
        source.decoder,
        source.exported.model,
        target,
        how=asked.how,
        by=asked.by,
        unequal=asked.unequal,
        by_layer=asked.by_layer,
        tokens=asked.tokens,
        data=source.data,
        seq_len=source.exported.seq_len,
        seed=asked.seed,
        source=printable(str(path), 300),
        why_no_data="no dataset was named (--data DATASET)",
    )
    exported = source.exported.model_copy(
        update={
            "attention": change.decoder.attention,
            "tokens": 0,
            "source": f"{source.exported.source}, converted to {target.type} by {asked.how}",
        }
    )

    def finish(folder: Path) -> None:
        text = "\n".join(f"    {line}" for line in card_lines(change.card))
        (folder / "README.md").write_text(f"{readme(exported)}\n## Conversion\n\n{text}\n", encoding="utf-8")
        (folder / SPEC).write_text(spec_text(exported, out, folder), encoding="utf-8")

    write_weights(out, change.decoder, exported, change.card, option="--out", tokenizer=source.tokenizer, finish=finish)
    if console.wants_json():
        console.emit({"out": str(out), "spec": str(out / SPEC), **change.card})
        return 0
    for line in card_lines(change.card):
        console.result(line)
    console.result(f"{out}: {sum(p.numel() for p in change.decoder.parameters()):,} parameters")
    console.say(f"to train from these weights, begin a spec with `base: {out / SPEC}`")
    return 0


# ---------------------------------------------------------------- the source


def _open(path: Path, asked: Asked) -> Source:
    if RunDir(path).spec.is_file():
        return _of_run(path, asked)
    if asked.step is not None:
        raise NoInputError(f"--step: {path} is not the folder of a run; leave --step out")
    if not (path / hf.CONFIG).is_file():
        raise NoInputError(not_a_run(path))
    raw = hf.read_mapping(path / hf.CONFIG)
    if hf.is_huggingface(raw):
        foreign = read_foreign(path, read_raw(path))
        decoder, exported = foreign.decoder.eval(), foreign.exported
        tokenizer = path / hf.TOKENIZER if (path / hf.TOKENIZER).exists() else None
    else:
        exported = hf.read_exported(path)
        decoder = hf.load_exported(path)
        tokenizer = path / hf.TOKENIZER if hf.TOKENIZER in exported.files else None
    _refuse_type(path, decoder.attention)
    data = None if asked.data is None else _dataset(asked.data, tokenizer, exported)
    return Source(decoder=decoder.requires_grad_(False), exported=exported, tokenizer=tokenizer, data=data)


def _of_run(path: Path, asked: Asked) -> Source:
    run = RunDir(path)
    spec = stored_spec(run)
    _refuse_type(path, spec.attention)
    codec = Codec.of(spec, run)
    found = find_checkpoint(run, asked.step)
    assert spec.model.vocab_size is not None, "a run folder holds a resolved spec"
    tokens = int(found.state["tokens"])
    exported = hf.ExportedConfig(
        source=f"run {spec.name}, step {found.step}, {tokens} tokens",
        model=spec.model,
        attention=spec.attention,
        vocab_size=spec.model.vocab_size,
        seq_len=spec.data.seq_len,
        tokens=tokens,
        bos_token_id=None,
        eos_token_id=codec.eos_id,
        files={},
    )
    note = ""
    if found.step < spec.steps:
        note = f"{path}: step {found.step} of {spec.steps} is converted, at which its training had not ended"
    data = spec.data if asked.data is None else _dataset(asked.data, codec.file, exported)
    return Source(decoder=load_decoder(spec, found), exported=exported, tokenizer=codec.file, data=data, note=note)


def _refuse_type(path: Path, attention: AttentionSection) -> None:
    if attention.type not in SOURCES or not isinstance(attention, DenseConfig):
        folds = "; an export with --to hf folds wgqa to gqa" if attention.type == "wgqa" else ""
        raise SpecError(
            f"{path}: has attention of type {attention.type}, and only {', '.join(SOURCES)} can be converted; name a "
            f"model with one of these{folds}"
        )


def _dataset(folder: Path, tokenizer: Path | None, exported: hf.ExportedConfig) -> DataConfig:
    """The dataset that `--data` names. Raises DataError if there is none, or if it has another tokenizer."""
    if not (folder / MANIFEST_NAME).is_file():
        raise DataError(f"--data: {folder} is no dataset; build one with `headway data build`, and name its folder")
    manifest = read_manifest(folder)
    if tokenizer is not None and tokenizers.sha256_of(tokenizer) != manifest.tokenizer_sha256:
        raise DataError(
            f"--data: {folder} was built with another tokenizer than {tokenizer}, so its ids mean other text; build it "
            f"with `tokenizer: {{type: file, path: {tokenizer}, eos_token: ...}}`"
        )
    if manifest.vocab_size > exported.vocab_size:
        raise DataError(
            f"--data: {folder} has a vocabulary of {manifest.vocab_size}, the model one of {exported.vocab_size}; "
            "build the dataset with the tokenizer of the model"
        )
    seq_len = min(exported.seq_len, LONGEST)
    return DataConfig(seq_len=seq_len, source=MdsSource(type="mds", path=str(folder)))


# ---------------------------------------------------------------- the target


def _target(source: AttentionSection, asked: Asked) -> AttentionConfig:
    """The attention to convert to. Raises SpecError for options that it does not have, or that do not fit."""
    assert isinstance(source, DenseConfig)
    kv_heads = asked.kv_heads
    if asked.to == "mqa" and kv_heads not in (None, 1):
        raise SpecError(f"--kv-heads: {kv_heads} with --to mqa, which has one KV head; leave it out, or use --to gqa")
    if kv_heads is not None and kv_heads > source.groups and asked.to != "switchhead":
        raise SpecError(
            f"--kv-heads: {kv_heads}, and the source has {source.groups}; use {source.groups} or a divisor of it"
        )
    fields = {**target_fields(source, asked.to, kv_heads, asked.how), **_overrides(asked.overrides)}
    if asked.unequal and asked.by_layer:
        raise SpecError("--by-layer: chooses equal groups in each layer, and --unequal sizes for all; use one of them")
    chooses = (asked.unequal or asked.by_layer) and asked.to == "gqa" and "group_sizes" not in fields
    if chooses and 1 <= fields["kv_heads"] <= source.heads:  # any sizes, which `convert` chooses
        fields["group_sizes"] = [1] * (fields["kv_heads"] - 1) + [source.heads - fields["kv_heads"] + 1]
    try:
        found = MECHANISMS[asked.to].model_validate(fields)
        return found.model_copy(update={"group_sizes": []}) if chooses else found
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            legal = ", ".join(name for name in MECHANISMS[asked.to].model_fields if name != "type")
            raise SpecError(f"attention.{key}: {asked.to} has no such key; use one of {legal}") from None
        if first["type"] == "missing" and key in MECHANISMS[asked.to].model_fields:
            meaning = MECHANISMS[asked.to].model_fields[key].description
            raise SpecError(
                f"attention.{key}: --to {asked.to} needs it ({meaning}); add attention.{key}=VALUE"
            ) from None
        text = first["msg"].removeprefix("Value error, ")
        raise SpecError(f"--to {asked.to}: {f'attention.{key}: ' if key else ''}{text}") from None


def _overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Fields of the arguments attention.KEY=value. Raises SpecError for other keys."""
    for argument in arguments:
        key = argument.partition("=")[0].strip()
        if not key.startswith("attention.") or "=" not in argument:
            raise SpecError(f"argument '{printable(argument)}': only attention.KEY=value can be set here")
        if key == "attention.type":
            raise SpecError("attention.type: --to names the mechanism; leave it out here")
    from headway.launcher.spec.spec import Spec

    tree = override_layer(list(arguments), root_shape(Spec))
    return tree.plain().get("attention", {})
