"""Open a model without training: a checkpoint of a run, or a folder of weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.launcher.base.errors import NoInputError
from headway.launcher.run.codec import Codec
from headway.launcher.run.folders import not_a_run
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.spec import Spec

if TYPE_CHECKING:
    from headway.data.config import DataConfig
    from headway.model.config import ModelConfig
    from headway.model.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A decoder in evaluation mode with its tokenizer.

    `seq_len`: tokens of a training sequence. `data`: what a run was trained on; None for weights. `identity`: what a
    result says about the model.
    """

    decoder: Decoder
    codec: Codec
    seq_len: int
    title: str
    data: DataConfig | None
    identity: dict[str, Any]

    @property
    def positions(self) -> int | None:
        """The most tokens that the model has learned positions for; None if there is no such limit."""
        table = self.decoder.positions
        return None if table is None else int(table.weight.shape[0])


def open_model(path: Path, step: int | None = None) -> Opened:
    """Open a run, exported or imported weights, or a model in Hugging Face's format.

    `step`: that of a checkpoint of a run; the newest complete one by default. Raises NoInputError if `path` is none of
    these or the checkpoint does not exist, CheckpointError if the run has no complete checkpoint of its own,
    WeightsError if the folder is incomplete, DataError if the tokenizer is missing or differs.
    """
    run = RunDir(path)
    if run.spec.is_file():
        return _of_run(run, step)
    if step is not None:
        raise NoInputError(f"--step: {path} is not the folder of a run; leave --step out")
    if (path / "config.json").is_file():
        return _of_weights(path)
    raise NoInputError(not_a_run(path))


def load_model(run: RunDir, spec: Spec, step: int | None = None) -> tuple[Decoder, int]:
    """(model in evaluation mode, with the run's newest complete checkpoint or that of `step`; its step).

    Does not need DeepSpeed.
    """
    from headway.launcher.run.weights import find_checkpoint, load_decoder

    found = find_checkpoint(run, step)
    return _ready(load_decoder(spec, found), spec.model, cpu=spec.launch.device == "cpu"), found.step


def _of_run(run: RunDir, step: int | None) -> Opened:
    from headway.launcher.run.stored_spec import stored_spec

    spec = stored_spec(run)
    codec = Codec.of(spec, run)
    decoder, found = load_model(run, spec, step)
    return Opened(
        decoder=decoder,
        codec=codec,
        seq_len=spec.data.seq_len,
        title=f"{spec.attention.type}, checkpoint of step {found}",
        data=spec.data,
        identity={"run": run.run_id(), "step": found, "mechanism": spec.attention.type},
    )


def _of_weights(folder: Path) -> Opened:
    from headway.model.huggingface import folder as hf

    raw = hf.read_mapping(folder / hf.CONFIG)
    if hf.is_huggingface(raw):
        return _of_huggingface(folder, raw)
    config = hf.read_exported(folder)
    decoder = _ready(hf.load_exported(folder), config.model)
    return _weights(decoder, Codec.of_exported(folder, config), config.seq_len, f"weights of {config.source}")


def _of_huggingface(folder: Path, raw: dict[str, Any]) -> Opened:
    """A Llama, or Headway's own form. Raises WeightsError for other models."""
    from headway.launcher.exchange.import_hf import read_foreign
    from headway.model.huggingface.folder import TOKENIZER

    foreign = read_foreign(folder, raw)
    config, file = foreign.exported, folder / TOKENIZER
    codec = Codec.of_weights(
        file if file.exists() else None, config.vocab_size, eos_id=config.eos_token_id, bos_id=config.bos_token_id
    )
    return _weights(_ready(foreign.decoder, config.model), codec, config.seq_len, config.source)


def _weights(decoder: Decoder, codec: Codec, seq_len: int, title: str) -> Opened:
    identity = {"weights": title, "mechanism": decoder.attention.type}
    return Opened(decoder=decoder, codec=codec, seq_len=seq_len, title=title, data=None, identity=identity)


def _ready(model: Decoder, shape: ModelConfig, *, cpu: bool = False) -> Decoder:
    """Fold weighted GQA, and move the model to the GPU if there is one and `cpu` is false."""
    import torch

    from headway.model.attention.wgqa import WgqaConfig
    from headway.model.convert.heads import fold_decoder

    if isinstance(model.attention, WgqaConfig):  # so that the heads' keys and values are not merged again per token
        model = fold_decoder(model, shape)
    return model.eval().requires_grad_(False).to("cuda" if not cpu and torch.cuda.is_available() else "cpu")
