"""Measures beside the loss are compared only between cells that were asked the same, and as the study is paired."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from study_folders import StudyFolder

from headway.launcher.compare.analyse import analyse
from headway.launcher.compare.evaluations import compared_sets
from headway.launcher.compare.simultaneous import compare_paired, compare_unpaired

VARIANTS, SEEDS = ["gqa", "rgqa-k2"], [1, 2, 3]
LOSSES = {"gqa": {1: 3.0, 2: 3.2, 3: 3.1}, "rgqa-k2": {1: 2.9, 2: 3.11, 3: 2.98}}


@pytest.fixture
def cells(tmp_path):
    """Cells with the loss of a set `wiki`. `fingerprints`: key -> that of its dataset; default: one for all."""
    folder = StudyFolder(tmp_path / "demo", VARIANTS, SEEDS)
    result = analyse(folder.write())
    assert result.tokens is not None

    def make(fingerprints: dict[str, str] | None = None):
        def with_set(cell):
            losses = np.full(len(cell.record.validation), LOSSES[cell.variant][cell.seed])
            facts = {"wiki": {"fingerprint": (fingerprints or {}).get(cell.key, "f" * 64), "bytes_per_token": 3.0}}
            card = cell.record.run | {"validation_sets": facts}
            return replace(cell, record=replace(cell.record, sets={"wiki": losses}, run=card))

        return [with_set(cell) for cell in result.cells], result.tokens

    return make


def test_sets_are_compared_as_losses_are(cells):
    found, tokens = cells()
    (wiki,) = compared_sets(found, "gqa", tokens)
    assert wiki.differences == compare_paired(LOSSES, "gqa").differences and wiki.left_out == ()


def test_a_cell_whose_set_is_another_dataset_is_left_out_and_named(cells):
    found, tokens = cells({"rgqa-k2/seed-2": "e" * 64})
    (wiki,) = compared_sets(found, "gqa", tokens)
    assert wiki.left_out == ("rgqa-k2/seed-2: has another dataset",)
    assert wiki.differences["rgqa-k2"].n == 2 and wiki.by_variant["rgqa-k2"].n == 2


def test_runs_on_other_data_are_compared_without_pairs(cells):
    found, tokens = cells()
    (wiki,) = compared_sets(found, "gqa", tokens, paired=False)
    expected = compare_unpaired({v: list(by_seed.values()) for v, by_seed in LOSSES.items()}, "gqa").differences
    assert wiki.differences == expected
    assert (wiki.differences["rgqa-k2"].half_width or 0) > 0.2  # the spread of seeds, which pairs would take out
