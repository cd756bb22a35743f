"""What differs between two runs is classed, and runs that read other data are never called paired."""

from __future__ import annotations

import pytest

from headway.launcher.compare.fairness import changed_sections, check_pairing, spec_differences, weights_differences
from headway.launcher.run.run_dir import flatten

BASE = {
    "name": "a",
    "run_dir": "runs/a",
    "model": {"ffn_width": 256},
    "attention": {"type": "gqa", "heads": 8, "head_dim": 16},
    "optimizer": {"lr": 0.003, "betas": [0.9, 0.95]},
}


def classed(
    variant: dict, *, declared: set[str], free: str | None = None, written: set[str] | None = None
) -> dict[str, str]:
    """Every key of both counts as written, where `written` is not given."""
    written = flatten(BASE).keys() | flatten(variant).keys() if written is None else written
    return {d.key: d.kind for d in spec_differences("v", variant, BASE, declared=declared, written=written, free=free)}


def with_(**sections: dict) -> dict:
    return {**BASE, **{name: {**BASE[name], **values} for name, values in sections.items()}}


def test_equal_specs_do_not_differ_and_names_do_not_count():
    assert classed({**BASE, "name": "b", "run_dir": "runs/b"}, declared=set()) == {}
    kept = {"checkpoint": {"keep": 2}, "tracking": {"tensorboard": False}}
    assert classed({**BASE, **kept}, declared=set()) == {}
    assert classed({**BASE, "checkpoints": {"keep": 2}}, declared=set()) == {"checkpoints.keep": "CONFOUND"}


def test_what_the_study_names_is_the_intervention():
    assert classed(with_(attention={"heads": 4}), declared={"attention.heads"}) == {"attention.heads": "intervention"}
    # a whole section may be named
    assert classed(with_(attention={"heads": 4}), declared={"attention"}) == {"attention.heads": "intervention"}


def test_what_nobody_named_is_a_confound():
    variant = with_(attention={"heads": 4}, optimizer={"betas": [0.9, 0.99]})
    found = classed(variant, declared={"attention.heads"})
    assert found == {"attention.heads": "intervention", "optimizer.betas": "CONFOUND"}


def test_a_name_that_only_begins_alike_is_not_named():
    assert classed(with_(attention={"heads": 4}), declared={"attention.head"}) == {"attention.heads": "CONFOUND"}


def test_a_named_type_brings_its_own_keys_and_takes_away_those_of_the_other():
    variant = {**BASE, "attention": {"type": "switchhead", "head_dim": 16, "experts": 4}}
    assert classed(variant, declared={"attention.type"}) == {
        "attention.type": "intervention",
        "attention.experts": "intervention",
        "attention.heads": "intervention",
    }


def test_a_named_type_does_not_excuse_another_value_of_a_key_both_have():
    variant = {**BASE, "attention": {"type": "switchhead", "head_dim": 32, "heads": 8}}
    assert classed(variant, declared={"attention.type"})["attention.head_dim"] == "CONFOUND"


def test_defaults_of_two_types_for_one_key_come_with_the_type():
    """Both gqa and rgqa have a gate, for different things; nobody chose either."""
    base = {**BASE, "attention": {**BASE["attention"], "gate": "none"}}
    variant = {**BASE, "attention": {**BASE["attention"], "type": "rgqa", "gate": "sigmoid2"}}

    def kind(declared, written):
        found = spec_differences("v", variant, base, declared=declared, written=written, free=None)
        return next(d.kind for d in found if d.key == "attention.gate")

    assert kind({"attention.type"}, {"attention.type"}) == "intervention"
    assert kind({"attention.type"}, {"attention.type", "attention.gate"}) == "CONFOUND"
    assert kind(set(), {"attention.type"}) == "CONFOUND"


def test_a_type_that_is_not_named_excuses_nothing():
    variant = {**BASE, "attention": {"type": "switchhead", "head_dim": 16, "experts": 4}}
    assert set(classed(variant, declared=set()).values()) == {"CONFOUND"}


def test_the_solved_dimension_is_a_consequence_of_matching():
    variant = with_(model={"ffn_width": 240})
    assert classed(variant, declared=set(), free="model.ffn_width") == {"model.ffn_width": "matching"}
    assert classed(variant, declared=set()) == {"model.ffn_width": "CONFOUND"}


def test_more_than_one_changed_section_is_found():
    variant = with_(attention={"heads": 4}, optimizer={"lr": 0.001}, model={"ffn_width": 240})
    differences = spec_differences(
        "v", variant, BASE, declared={"attention.heads", "optimizer.lr"}, written=set(), free="model.ffn_width"
    )
    assert changed_sections(differences) == ["attention", "optimizer"]
    assert changed_sections(differences, tuned={"optimizer.lr"}) == ["attention"]


def hashes(**runs: dict[int, list[str]]) -> dict[str, dict[int, dict[int, str]]]:
    return {v: {s: dict(enumerate(h, 1)) for s, h in by_seed.items()} for v, by_seed in runs.items()}


def test_equal_hashes_at_every_common_step_are_paired():
    pairing = check_pairing(hashes(a={1: ["x", "y", "z"]}, b={1: ["x", "y"]}), "a")
    assert pairing.status == "PAIRED"
    assert pairing.lines == ("seed 1: b and a: 2 common steps, all hashes equal",)


def test_one_differing_step_of_one_seed_is_unpaired():
    pairing = check_pairing(hashes(a={1: ["x", "y"], 2: ["p", "q"]}, b={1: ["x", "y"], 2: ["p", "r"]}), "a")
    assert pairing.status == "UNPAIRED"
    assert "seed 2: b and a read different batches, first at step 2 (hash r against q)" in pairing.lines


def test_variants_are_compared_with_each_other_where_the_baseline_is_missing():
    assert check_pairing(hashes(a={}, b={1: ["x"]}, c={1: ["y"]}), "a").status == "UNPAIRED"


@pytest.mark.parametrize(
    "runs", [{}, {"a": {1: []}, "b": {1: []}}, {"a": {1: ["x"]}}, {"a": {1: ["x"]}, "b": {2: ["x"]}}]
)
def test_without_common_steps_nothing_is_known(runs):
    assert check_pairing(hashes(**runs), "a").status == "UNKNOWN"


def test_one_data_order_for_all_seeds_is_pointed_out():
    pairing = check_pairing(hashes(a={1: ["x"], 2: ["x"]}, b={1: ["x"], 2: ["x"]}), "a")
    assert pairing.status == "PAIRED"
    assert "every seed read the same first batch" in pairing.lines[-1]


def test_one_place_of_weights_that_held_two_models_is_pointed_out():
    begins = [
        ("a/seed-1", "runs/t", "1" * 64),
        ("b/seed-1", "runs/t", "1" * 64),
        ("b/seed-2", "cells/mha/seed-2", "3" * 64),
    ]
    assert weights_differences(begins) == []
    (line,) = weights_differences([*begins, ("a/seed-2", "runs/t", "2" * 64)])
    assert line.startswith("init.weights runs/t held other weights when some runs began: sha256 1111")
    assert "in a/seed-1, b/seed-1; sha256 2222" in line and line.endswith("in a/seed-2")
