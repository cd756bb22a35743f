"""Open a model without training: a checkpoint of a run, or a folder of weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.run.codec import Codec
from headway.launcher.run.folders import not_a_run
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.encoder_decoder import decoders_only, no_form
from headway.launcher.spec.spec import Spec

if TYPE_CHECKING:
    from headway.data.config import DataConfig
    from headway.model.config import ModelConfig
    from headway.model.decoder import Decoder
    from headway.model.huggingface.folder import ExportedConfig
    from headway.model.seq2seq.build import Model


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model in evaluation mode with its tokenizer.

    `seq_len`: tokens of a training sequence; `encoder_tokens`: those of them that an encoder read, if that is known.
    `data`: what a run was trained on; None for weights. `identity`: what a result says about the model.
    """

    model: Model
    codec: Codec
    seq_len: int
    title: str
    data: DataConfig | None
    identity: dict[str, Any]
    encoder_tokens: int | None = None

    @property
    def is_encoder_decoder(self) -> bool:
        from headway.model.decoder import Decoder

        return not isinstance(self.model, Decoder)

    @property
    def decoder(self) -> Decoder:
        """The model. Raises SpecError for an encoder-decoder."""
        return self.decoder_for("what was asked for")

    def decoder_for(self, what: str) -> Decoder:
        """The model. Raises SpecError for an encoder-decoder, of which `what` has no form."""
        from headway.model.decoder import Decoder

        if not isinstance(self.model, Decoder):
            raise no_form(what)
        return self.model

    @property
    def positions(self) -> int | None:
        """The most tokens that the model has learned positions for; None if there is no such limit."""
        table = None if self.is_encoder_decoder else self.decoder.positions
        return None if table is None else int(table.weight.shape[0])

    @property
    def start_ids(self) -> tuple[int, ...] | None:
        """The ids that an encoder-decoder starts a target with; None for a run that was not trained on pairs.

        Raises SpecError for weights that do not say which.
        """
        if self.codec.start_ids is None and self.data is None:
            raise SpecError(
                f"{self.title}: these weights do not say which tokens start a target, so the decoder cannot begin; "
                "train from them on pairs (data.source.type: pairs), and name that run or its export"
            )
        return self.codec.start_ids

    @property
    def source_limit(self) -> int:
        """The most tokens that the encoder of an encoder-decoder read in training."""
        return self.encoder_tokens or self.seq_len

    @property
    def target_limit(self) -> int:
        """The most tokens that the decoder read in training."""
        return self.seq_len - (self.encoder_tokens or 0)


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
    """(decoder in evaluation mode, with the run's newest complete checkpoint or that of `step`; its step).

    Does not need DeepSpeed. Raises SpecError for an encoder-decoder.
    """
    from headway.model.decoder import Decoder

    decoders_only(spec, "what reads the weights of a run as those of a decoder")
    model, found = _loaded(run, spec, step)
    assert isinstance(model, Decoder)
    return model, found


def _loaded(run: RunDir, spec: Spec, step: int | None) -> tuple[Model, int]:
    """As `load_model`, also an encoder-decoder."""
    from headway.launcher.run.weights import find_checkpoint, load_model

    found = find_checkpoint(run, step)
    return _ready(load_model(spec, found), spec.model, cpu=spec.launch.device == "cpu"), found.step


def _of_run(run: RunDir, step: int | None) -> Opened:
    from headway.launcher.run.stored_spec import stored_spec

    spec = stored_spec(run)
    codec = Codec.of(spec, run)
    model, found = _loaded(run, spec, step)
    return Opened(
        model=model,
        codec=codec,
        seq_len=spec.data.seq_len,
        title=f"{spec.attention.type}, checkpoint of step {found}",
        data=spec.data,
        identity={"run": run.run_id(), "step": found, "mechanism": spec.attention.type},
        encoder_tokens=spec.data.encoder_tokens,
    )


def _of_weights(folder: Path) -> Opened:
    from headway.model.huggingface import folder as hf

    raw = hf.read_mapping(folder / hf.CONFIG)
    if hf.is_huggingface(raw):
        return _of_huggingface(folder, raw)
    config = hf.read_exported(folder)
    model = _ready(hf.load_model(folder), config.model)
    return _weights(model, Codec.of_exported(folder, config), config, f"weights of {config.source}")


def _of_huggingface(folder: Path, raw: dict[str, Any]) -> Opened:
    """A Llama, or Headway's own form. Raises WeightsError for other models."""
    from headway.launcher.exchange.import_hf import read_foreign
    from headway.model.huggingface.folder import TOKENIZER

    foreign = read_foreign(folder, raw)
    config, file = foreign.exported, folder / TOKENIZER
    codec = Codec.of_weights(
        file if file.exists() else None, config.vocab_size, eos_id=config.eos_token_id, bos_id=config.bos_token_id
    )
    return _weights(_ready(foreign.decoder, config.model), codec, config, config.source)


def _weights(model: Model, codec: Codec, config: ExportedConfig, title: str) -> Opened:
    return Opened(
        model=model,
        codec=codec,
        seq_len=config.seq_len,
        title=title,
        data=None,
        identity={"weights": title, "mechanism": model.attention.type},
        encoder_tokens=config.encoder_tokens,
    )


def _ready(model: Model, shape: ModelConfig, *, cpu: bool = False) -> Model:
    """Fold the weighted GQA of a decoder, and move the model to the GPU if there is one and `cpu` is false."""
    import torch

    from headway.model.attention.wgqa import WgqaConfig
    from headway.model.convert.heads import fold_decoder
    from headway.model.decoder import Decoder

    # So that the heads' keys and values are not merged again per token.
    if isinstance(model, Decoder) and isinstance(model.attention, WgqaConfig):
        model = fold_decoder(model, shape)
    return model.eval().requires_grad_(False).to("cuda" if not cpu and torch.cuda.is_available() else "cpu")
