"""`headway train` in other layouts: the same records as one process, and a run that goes on in another layout."""

import json
import math

import pytest

PP_TP = ("launch.processes=4", "parallel.tensor=2", "parallel.pipeline=2")


@pytest.fixture(scope="module")
def runs(headway_once):
    """Records of the same training in one process, and cut in two ways."""
    layouts = {"one": (), "stages": PP_TP, "sequence": ("launch.processes=2", "parallel.context=2")}
    found = {}
    for name, overrides in layouts.items():
        done = headway_once.train(*overrides, f"run_dir={name}")
        assert done.returncode == 0, done.stderr
        path = headway_once.folder / name / "metrics.jsonl"
        found[name] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


def of_kind(records, kind):
    return [r for r in records if r["kind"] == kind]


@pytest.mark.parametrize("layout", ["stages", "sequence"])
def test_every_step_reads_the_same_batch_and_has_the_same_loss(runs, layout):
    # Rounding differs; 40 steps of training carry it on, and a router turns near ties the other way.
    for one, other in zip(of_kind(runs["one"], "train"), of_kind(runs[layout], "train"), strict=True):
        assert one["batch_hash"] == other["batch_hash"] and one["targets"] == other["targets"]
        tolerance = 1e-5 if one["step"] <= 5 else 1e-2
        for key in ("loss", "aux_loss"):
            assert math.isclose(one[key], other[key], rel_tol=tolerance), (one["step"], key)
        assert math.isclose(one["grad_norm"], other["grad_norm"], rel_tol=10 * tolerance), one["step"]
    for one, other in zip(of_kind(runs["one"], "validation"), of_kind(runs[layout], "validation"), strict=True):
        assert one["targets"] == other["targets"]
        assert math.isclose(one["loss"], other["loss"], rel_tol=1e-2)
        # Documents are the same in all layouts. Their spread carries the differences of training.
        assert one["documents"] == other["documents"] > 8
        assert math.isclose(one["standard_error"], other["standard_error"], rel_tol=0.1)
        assert 0 < one["standard_error"] < 0.1 * one["loss"]


@pytest.mark.parametrize("layout", ["stages", "sequence"])
def test_router_records_and_head_records_are_of_all_layers_and_groups(runs, layout):
    def routers(name):
        return [r["router"] for r in of_kind(runs[name], "train") if "router" in r]

    first_one, first_other = routers("one")[0], routers(layout)[0]
    assert len(routers("one")) == len(routers(layout)) > 1
    assert first_one.keys() == first_other.keys() == {"layer_00", "layer_01"}
    for layer, figures in first_one.items():
        other = first_other[layer]["router"]
        assert figures["router"]["load"] == other["load"]
        assert figures["router"]["tokens"] == other["tokens"]
        for key in ("entropy", "gate", "top1_margin", "effective"):
            assert other[key] == pytest.approx(figures["router"][key], abs=2e-5), key  # rounded to five decimals
    heads_one, heads_other = of_kind(runs["one"], "heads")[0]["layers"], of_kind(runs[layout], "heads")[0]["layers"]
    assert heads_one.keys() == heads_other.keys() == {"layer_00", "layer_01"}
    for layer, measures in heads_one.items():
        other = heads_other[layer]
        assert other.keys() == measures.keys() and other["member"] == measures["member"] == "query head"
        for key in measures.keys() - {"member"}:
            assert other[key] == pytest.approx(measures[key], rel=1e-5), key


@pytest.mark.slow  # without a router: tests/faults/test_resume.py; with one, from step to step: tests/parity
def test_a_stopped_run_goes_on_in_another_layout(headway):
    whole = headway.train("run_dir=whole")
    assert whole.returncode == 0, whole.stderr
    run = headway.folder / "moved"
    process = headway.start(*PP_TP, "run_dir=moved")
    headway.wait_for(lambda: len(list((run / "checkpoints").glob("step-*"))) > 0, process)
    process.terminate()
    assert process.wait(timeout=60) == 75
    again = headway.train("launch.processes=2", "parallel.zero=3", "run_dir=moved")
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stdout
    one, moved = (
        of_kind([json.loads(x) for x in (headway.folder / name / "metrics.jsonl").read_text().splitlines()], "train")
        for name in ("whole", "moved")
    )
    assert [r["batch_hash"] for r in one] == [r["batch_hash"] for r in moved]
    # As above: what differs is rounding, and what follows from it.
    assert all(math.isclose(a["loss"], b["loss"], rel_tol=1e-2) for a, b in zip(one, moved, strict=True))
