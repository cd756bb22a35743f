"""Packing: sequences are the stream of documents cut every S tokens, with the index of each document."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headway.data.config import DataError
from headway.data.manifest import Split
from headway.data.mds import MdsSplit
from headway.data.packed import PackedText


def packed(dataset: Path, seq_len: int, split: Split = "train", seed: int = 0) -> PackedText:
    return PackedText(str(dataset), split=split, seq_len=seq_len, seed=seed, shuffle_window=2)


def stream(dataset: Path, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """All tokens of a split, and the number of the document each belongs to."""
    documents = MdsSplit(dataset, split)
    pieces = [documents.tokens(n) for n in range(len(documents))]
    return np.concatenate(pieces), np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("seq_len", [2, 7, 64, 1000])
def test_sequences_are_the_stream_cut_every_s_tokens(seq_len: int, split: Split, dataset: Path) -> None:
    tokens, owner = stream(dataset, split)
    source = packed(dataset, seq_len, split)
    assert source.num_sequences == (len(tokens) - 1) // seq_len
    assert source.num_sequences * seq_len + 1 + source.dropped_tokens == len(tokens)
    for index in range(0, source.num_sequences, max(1, source.num_sequences // 97)):
        part = slice(index * seq_len, (index + 1) * seq_len + 1)
        sample = source.sample(index)
        np.testing.assert_array_equal(sample.tokens, tokens[part])
        np.testing.assert_array_equal(sample.segments, owner[part] - owner[part][0])
        assert sample.segments.dtype == np.int32


def test_a_sequence_belongs_to_the_shard_of_its_first_token(dataset: Path) -> None:
    documents = MdsSplit(dataset, "train")
    shard_of_token = np.repeat(
        np.arange(len(documents.shards)),
        [
            documents.lengths[a:b].sum()
            for a, b in zip(documents.first_document, documents.first_document[1:], strict=False)
        ],
    )
    for seq_len in (7, 500):
        source = packed(dataset, seq_len)
        first = shard_of_token[np.arange(source.num_sequences) * seq_len]
        expected = np.bincount(first, minlength=len(documents.shards))
        assert source.sequences_per_shard() == expected.tolist()


def test_validation_keeps_the_stored_order_and_training_does_not(dataset: Path) -> None:
    validation, train = packed(dataset, 16, "validation"), packed(dataset, 16)
    assert [validation.index(position) for position in range(5)] == [0, 1, 2, 3, 4]
    assert [train.index(position) for position in range(5)] != [0, 1, 2, 3, 4]


def test_no_sequence_is_an_error_that_names_both_numbers(dataset: Path) -> None:
    tokens = len(stream(dataset, "validation")[0])
    assert packed(dataset, tokens - 1, "validation").num_sequences == 1
    with pytest.raises(DataError, match=rf"seq_len: {tokens:,} .*has {tokens:,} tokens"):
        packed(dataset, tokens, "validation")


def test_an_index_out_of_range_is_refused(dataset: Path) -> None:
    source = packed(dataset, 64)
    for index in (-1, source.num_sequences):
        with pytest.raises(IndexError):
            source.sample(index)
