"""`headway bench documents` times both forms at the document lengths of the data."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from headway.kernels import attention
from headway.launcher.bench.documents import _measure
from headway.launcher.spec.load import load_spec

TINY = Path(__file__).parents[3] / "yaml/base/tiny.yaml"


def test_both_forms_are_timed_with_the_documents_of_the_data(headway):
    command = ["bench", "documents", str(headway.spec), "--lengths", "32,600", "--rounds", "2"]
    done = headway.run(*command, "--tokens", "1100", "--out", "documents.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((headway.folder / "documents.json").read_text())
    assert [(row["seq_len"], row["sequences"]) for row in result["rows"]] == [(32, 2), (600, 1)]
    for row in result["rows"]:
        assert [sum(lengths) for lengths in row["document_tokens"]] == [row["seq_len"]] * row["sequences"]
        assert len(row["document_tokens"][0]) > 1
        assert len(row["raw_dense_s"]) == len(row["raw_documents_s"]) == 2
        ratios = sorted(a / b for a, b in zip(row["raw_documents_s"], row["raw_dense_s"], strict=True))
        assert math.isclose(row["ratio"]["median"], sum(ratios) / 2)


def test_invalid_lengths_and_a_single_round_are_refused(headway):
    for words, message in ((["--lengths", "32,32"], "--lengths: "), (["--rounds", "1"], "--rounds: 1 is out of range")):
        done = headway.run("bench", "documents", str(headway.spec), *words)
        assert done.returncode == 64 and message in done.stderr


def test_heads_with_tokens_of_their_own_have_no_core_over_whole_sequences(headway):
    namoh = "attention={type: namoh, heads: 4, head_dim: 8, top_k: 2}"
    done = headway.run("bench", "documents", str(headway.spec), namoh, "--lengths", "32,64")
    assert done.returncode == 64 and "namoh has none; use type gqa" in done.stderr, done.stderr


def test_the_core_of_latent_attention_has_the_channels_of_positions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: set[tuple[int, ...]] = set()
    core = attention.core

    def spy(q: Tensor, k: Tensor, *others: Any) -> Tensor:
        sizes.add((*q.shape[2:], *k.shape[2:]))
        return core(q, k, *others)

    monkeypatch.setattr(attention, "core", spy)
    mla = "attention={type: mla, heads: 4, head_dim: 8, latent: 6, rope_dim: 4}"
    row = _measure(load_spec(TINY, [mla]).spec, 32, rounds=2, tokens=32)
    assert sizes == {(4, 12, 4, 12)} and row["head_dim"] == 12
