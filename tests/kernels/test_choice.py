"""The choice of dense or routed matmuls follows the cost model unless there is a measurement."""

import json
from dataclasses import replace

import pytest

from headway.kernels import choice
from headway.kernels.choice import Constants, Form, Shape, choose, measured, seconds

LARGE = Shape(tokens=32768, width=2048, head_dim=128, groups=4, experts=4, k=1)


@pytest.mark.parametrize("product", ["gather", "weight_grad"])
def test_a_large_sparse_product_with_one_row_per_slot_is_routed(product):
    assert choose(product, LARGE, "sm_90", table={}) == "routed"


@pytest.mark.parametrize("shape", [replace(LARGE, k=4), replace(LARGE, tokens=256)])
def test_choosing_all_experts_or_few_tokens_is_dense(shape):
    assert choose("gather", shape, "sm_90", table={}) == "dense"


def test_a_gather_is_never_faster_than_its_reads_from_l2():
    slow = Constants(l2_bytes_per_s=1e9)
    reads_s = 2 * LARGE.width * LARGE.tokens * LARGE.groups * LARGE.k / slow.l2_bytes_per_s
    assert seconds("routed", LARGE, slow) == pytest.approx(slow.lists_s + reads_s)


def test_a_measurement_wins_for_its_bucket_of_tokens_and_for_its_product_alone():
    table: dict[str, Form] = {LARGE.key("sm_90", "gather"): "dense"}
    assert choose("gather", LARGE, "sm_90", table=table) == "dense"
    assert choose("gather", replace(LARGE, tokens=40000), "sm_90", table=table) == "dense"
    assert choose("gather", replace(LARGE, tokens=65536), "sm_90", table=table) == "routed"
    assert choose("weight_grad", LARGE, "sm_90", table=table) == "routed"


def test_the_cpu_is_always_dense():
    assert choose("gather", LARGE, "cpu", table={LARGE.key("cpu", "gather"): "routed"}) == "dense"


def test_nothing_measured_is_shipped_and_a_wrong_entry_is_named(tmp_path, monkeypatch):
    assert measured() == {}
    path = tmp_path / "choice.json"
    path.write_text('{"entries": {"sm_90/gather/x": "fast"}}')
    monkeypatch.setattr(choice, "TABLE", path)
    with pytest.raises(ValueError, match=r"sm_90/gather/x is 'fast'"):
        measured()


def test_measured_entries_join_the_table_and_win(tmp_path, monkeypatch):
    path = tmp_path / "choice.json"
    path.write_text('{"note": "kept", "entries": {"sm_80/gather/x": "dense"}}')
    monkeypatch.setattr(choice, "TABLE", path)
    assert choose("gather", LARGE, "sm_90") == "routed"
    choice.override({LARGE.key("sm_90", "gather"): "dense"})
    assert choose("gather", LARGE, "sm_90") == "dense"
    assert json.loads(path.read_text())["note"] == "kept" and measured()["sm_80/gather/x"] == "dense"
