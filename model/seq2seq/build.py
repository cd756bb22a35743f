"""The model of a spec: a decoder, or an encoder-decoder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from headway.model.base import AttentionSection
from headway.model.config import ModelConfig
from headway.model.decoder import BranchScale, Decoder, Placement
from headway.model.seq2seq.model import EncoderDecoder

Model = Decoder | EncoderDecoder


def build_model(
    model: ModelConfig,
    attention: AttentionSection,
    *,
    vocab_size: int,
    seed: int,
    placement: Placement | None = None,
    scales: Sequence[BranchScale] | None = None,
) -> Model:
    """This rank's part of the model, with its initial parameters. `scales`: of a decoder, as in `Decoder`."""
    common = {"vocab_size": vocab_size, "seed": seed, "placement": placement}
    if not model.is_encoder_decoder:
        return Decoder(model, attention, **common, scales=scales)
    assert scales is None, "`ModelConfig` refuses branch_start of an encoder-decoder"
    return EncoderDecoder(model, attention.layer(0, model.layers), **common)


def probe_logits(model: Model, tokens: Tensor) -> Tensor:
    """Logits [B, S, V] of tokens [B, S], to compare two models; an encoder-decoder has them as source and target."""
    return model.logits(tokens, tokens) if isinstance(model, EncoderDecoder) else model.logits(tokens)
