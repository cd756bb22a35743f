"""Batches of an encoder-decoder (`data.encoder_tokens`): the same sequences, cut into source and target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from headway.data.config import DataConfig
from headway.data.loader import Loader, MicroBatch, validation_batches


def config(encoder_tokens: int | None, *, masked: bool = True) -> DataConfig:
    source = {"type": "synthetic", "task": "copy", "vocab_size": 16, "span": 4}
    values = {"seq_len": 20, "encoder_tokens": encoder_tokens, "document_mask": masked, "source": source}
    return DataConfig.model_validate(values)


def same(cut: MicroBatch, plain: MicroBatch, place: int) -> None:
    assert cut.source is not None and plain.source is None
    assert torch.cat([cut.source, cut.tokens], 1).equal(plain.tokens)
    assert cut.labels.equal(plain.labels[:, place:])
    if plain.segments is None:
        assert cut.segments is None and cut.source_segments is None
    else:
        assert cut.segments is not None and cut.source_segments is not None
        assert torch.cat([cut.source_segments, cut.segments], 1).equal(plain.segments)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("place", [1, 7, 19])
def test_source_and_target_are_the_sequence(place, masked):
    ranks: dict[str, Any] = {"global_batch": 4, "micro_batch": 2, "dp_rank": 0, "dp_size": 1}
    with (
        Loader(config(place, masked=masked), split="train", **ranks) as cut,
        Loader(config(None, masked=masked), split="train", **ranks) as plain,
    ):
        ours, theirs = cut.batch(3), plain.batch(3)
    assert ours.digest == theirs.digest  # the hash and the order are those of the sequences
    assert ours.targets == sum(int((batch.labels != -100).sum()) for batch in ours.micro) <= theirs.targets
    for a, b in zip(ours.micro, theirs.micro, strict=True):
        same(a, b, place)


def test_validation_is_cut_too():
    ranks: dict[str, Any] = {"tokens": 100, "micro_batch": 2, "dp_rank": 1, "dp_size": 2}
    for a, b in zip(validation_batches(config(5), **ranks), validation_batches(config(None), **ranks), strict=True):
        same(a, b, 5)


def test_prompts_of_pairs_are_not_predicted():
    pairs = {"type": "pairs", "path": "x", "loss": "all"}
    with pytest.raises(ValidationError, match=r"source.loss: all predicts prompts too, .* use targets, or a decoder"):
        DataConfig.model_validate({"seq_len": 20, "encoder_tokens": 5, "source": pairs})
