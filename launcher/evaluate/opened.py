"""Open a model for evaluation: a checkpoint of a run, or a folder of exported weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.launcher.base.errors import NoInputError
from headway.launcher.run.codec import Codec
from headway.launcher.run.folders import not_a_run
from headway.launcher.run.run_dir import RunDir

if TYPE_CHECKING:
    from headway.data.config import DataConfig
    from headway.model.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A decoder in evaluation mode with its tokenizer.

    `seq_len`: tokens of a training sequence. `positions`: the most that the model has learned positions for; None if
    there is no such limit. `data`: what a run was trained on; None for weights. `identity`: what a result says about
    the model.
    """

    decoder: Decoder
    codec: Codec
    seq_len: int
    vocab_size: int
    positions: int | None
    data: DataConfig | None
    identity: dict[str, Any]


def open_model(path: Path, step: int | None = None) -> Opened:
    """Open `path`. `step`: that of a checkpoint of a run; the newest complete one by default.

    Raises NoInputError if `path` is neither run nor weights, CheckpointError, DataError and WeightsError if files of it
    are missing or differ.
    """
    run = RunDir(path)
    if run.spec.is_file():
        return _of_run(run, step)
    if step is not None:
        raise NoInputError(f"--step: {path} is not the folder of a run; leave --step out")
    if (path / "config.json").is_file():
        return _of_weights(path)
    raise NoInputError(not_a_run(path))


def _of_run(run: RunDir, step: int | None) -> Opened:
    from headway.launcher.exchange.generate import load_model
    from headway.launcher.run.stored_spec import stored_spec

    spec = stored_spec(run)
    codec = Codec.of(spec, run)
    decoder, found = load_model(run, spec, step)
    assert spec.model.vocab_size is not None, "a run folder holds a resolved spec"
    return Opened(
        decoder=decoder,
        codec=codec,
        seq_len=spec.data.seq_len,
        vocab_size=spec.model.vocab_size,
        positions=_positions(decoder),
        data=spec.data,
        identity={"run": run.run_id(), "step": found, "mechanism": spec.attention.type},
    )


def _of_weights(folder: Path) -> Opened:
    from headway.launcher.exchange.generate import open_weights

    decoder, codec, seq_len, title = open_weights(folder)
    return Opened(
        decoder=decoder,
        codec=codec,
        seq_len=seq_len,
        vocab_size=int(decoder.embedding.shape[0]),
        positions=_positions(decoder),
        data=None,
        identity={"weights": title, "mechanism": decoder.attention.type},
    )


def _positions(decoder: Decoder) -> int | None:
    return None if decoder.positions is None else int(decoder.positions.weight.shape[0])
