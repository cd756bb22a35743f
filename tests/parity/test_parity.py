"""Every parallel layout has the losses, gradient norms, figures and checkpoints of a single process.

What `make test` runs of the parity table; `make parity` runs all of it, through the same code. And that faults show.
"""

import json
import sys
from dataclasses import replace

import parity_run
import pytest
from parity_cases import (
    COLUMNS,
    LAYOUTS,
    MECHANISMS,
    MOVED,
    TABLE,
    XL,
    Case,
    every_case,
    legal_zero,
    move_cases,
    other_cases,
    saved_name,
    table_cases,
    with_references,
)
from parity_compare import compare
from parity_faults import FAULTS
from parity_run import run
from parity_table import write

from headway.model.attention.registry import MECHANISMS as TYPES

FAST = [
    *(Case(mechanism="rgqa", layout=x) for x in ("tp2", "cp2", "tp2·pp2")),
    Case(mechanism="rgqa", layout="pp2", precision="bf16"),
    Case(mechanism="switchhead", layout="cp2"),
    Case(mechanism="gated", layout="sp2", zero=3),
    Case(mechanism="gated-mixed", layout="pp2"),
    Case(mechanism="namoh", layout="tp2"),
    Case(mechanism="blocks", layout="tp2"),
    Case(mechanism="mla", layout="sp2"),
    Case(mechanism="mixed", layout="sp2"),
    Case(mechanism="value-residual", layout="tp2"),
    Case(mechanism="value-residual", layout="dp2", zero=3, recompute=True),
    Case(mechanism="shared-kv", layout="pp2"),
    Case(mechanism="rgqa", layout="dp2", zero=3, overlap=True),
    Case(mechanism="gpt2-block", layout="pp2"),
    Case(mechanism="xl-switchhead", layout="tp2", tied=False),
    Case(mechanism="dropout", layout="tp2"),
    Case(mechanism="dropout", micro_batch=4, recompute=True),
    Case(mechanism="t5-dropout", layout="sp2", zero=3, recompute=True),
]
"""Every kind of layout, and a mechanism of every kind that layouts treat differently: with a router, a state, noise,
parameters that all ranks hold, values of other layers, two stacks. More cases are in `FAST_SAVED`.
"""

MORE = [
    *(Case(mechanism="rgqa", layout=x, zero=z) for x, z in (("sp2", 3), ("cp2", 2))),
    Case(mechanism="mixed", layout="pp2"),
    Case(mechanism="value-residual", layout="cp2"),
    Case(mechanism="dropout", layout="dp2"),
    Case(mechanism="dropout-xl", layout="sp2"),
    *(Case(mechanism=x, layout="tp2") for x in ("t5-wgqa", "two-rope")),
    Case(mechanism="rgqa", layout="pp2", recompute=True, tied=False),
    Case(mechanism="rgqa", layout="dp2", zero=2, precision="bf16", overlap=True),
    Case(mechanism="gqe", layout="tp2·dp2"),
    Case(mechanism="moh", layout="tp2"),
    Case(mechanism="namoh", layout="sp2", zero=3),
    Case(mechanism="blocks", layout="sp2", zero=3),
    Case(mechanism="mla", layout="tp2"),
    Case(mechanism="gla", layout="tp2"),
    Case(mechanism="mixed", layout="cp2"),
    *(Case(mechanism=x, layout="sp2") for x in ("gpt2-block", "xl-block")),
    Case(mechanism="xl-switchhead", layout="pp2"),
    *(Case(mechanism="dropout", layout=x) for x in ("cp2", "pp2")),
    Case(mechanism="mla", layout="cp2"),
    Case(mechanism="mla", layout="pp2", precision="bf16"),
    Case(mechanism="gla", layout="tp2·pp2"),
    Case(mechanism="value-residual", layout="tp2", zero=2, recompute=True),
    Case(mechanism="value-residual", layout="sp2"),
    *(Case(mechanism="shared-kv", layout=x) for x in ("tp2", "cp2")),
    Case(mechanism="shared-kv", layout="dp2", zero=3, recompute=True),
    Case(mechanism="shared-kv", layout="tp2·pp2", recompute=True),
    Case(mechanism="shared-kv", layout="sp2", precision="bf16"),
    Case(mechanism="gated", layout="tp2"),
    Case(mechanism="gated-mixed", layout="tp2", recompute=True),
    Case(mechanism="mixed", layout="tp2·pp2", recompute=True),
    Case(mechanism="mixed", layout="dp2", zero=3),
    Case(mechanism="rgqa", layout="pp2"),
    Case(mechanism="gqe", layout="sp2", zero=2),
    Case(mechanism="switchhead", layout="tp2", precision="bf16"),
    *(Case(mechanism="namoh", layout=x, recompute=True) for x in ("pp2", "tp2")),
    *(Case(mechanism="rgqa", layout="dp2", zero=z, overlap=True) for z in (1, 2)),
    Case(mechanism="rgqa", layout="tp2·dp2", zero=2, overlap=True),
    *(Case(mechanism="gpt2-block", layout=x) for x in ("tp2", "cp2")),
    Case(mechanism="gpt2-block", layout="pp2", tied=False, recompute=True),
    Case(mechanism="relu-block", layout="tp2"),
    *(Case(mechanism="xl-block", layout=x) for x in ("pp2", "tp2", "dp2")),
    Case(mechanism="xl-switchhead", layout="dp2"),
    *(Case(mechanism=x, layout="pp2", precision="bf16") for x in XL),
    Case(mechanism="dropout", layout="sp2"),
    Case(mechanism="dropout", micro_batch=1),
    Case(mechanism="dropout", layout="dp2", zero=3, recompute=True),
    Case(mechanism="dropout-xl", layout="pp2"),
    Case(mechanism="t5-wgqa", layout="dp2"),
    Case(mechanism="t5-dropout", layout="tp2", tied=False, precision="bf16"),
    Case(mechanism="t5-dropout", layout="dp2", zero=3),
    Case(mechanism="two-rope", layout="sp2"),
    Case(mechanism="two-rope", layout="dp2", packed=False, recompute=True),
]
"""Of `make test-all`."""

SABOTAGED = [
    Case(mechanism="rgqa", layout="tp2", sabotage="partial_gradients"),
    Case(mechanism="value-residual", layout="tp2", sabotage="partial_gradients"),
    Case(mechanism="gqa", layout="tp2", sabotage="unmarked_parameters"),
    Case(mechanism="gqa", layout="pp2", sabotage="stages_apart"),
    Case(mechanism="rgqa", layout="pp2", precision="bf16", sabotage="stages_apart"),
    Case(mechanism="rgqa", layout="cp2", sabotage="own_mean"),
    Case(mechanism="gqa", layout="dp2", sabotage="rank_average"),
    Case(mechanism="rgqa", layout="dp2", sabotage="own_load"),
    Case(mechanism="dropout", layout="dp2", sabotage="own_masks"),
]

LOADED = [case for case in move_cases() if case.load]
SAVER_SIZES = {case.save: case.world_size for case in move_cases() if case.save}
# Moves to fewer processes would need a second group of these; test_layout_changes.py has some.
FAST_LOADED = [
    case
    for case in LOADED
    if SAVER_SIZES[case.load] <= case.world_size and case.mechanism not in set(MOVED) - {"t5-dropout", "namoh"}
]
FAST_SAVED = [case for case in with_references(FAST_LOADED) if case.save]
FAST_SAVED += [case for case in move_cases() if case.save and case.precision == "bf16" and case.layout == "single"]
FAST_SAVED += [case for case in move_cases() if case.save and case.mechanism in ("dropout", "value-residual")]


def healthy(case: Case) -> Case:
    return replace(case, sabotage="")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, fork_server):
    cases = [*FAST, *FAST_SAVED, *FAST_LOADED, *SABOTAGED, *(healthy(case) for case in SABOTAGED)]
    return run(cases, tmp_path_factory.mktemp("parity"), server=fork_server)


@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_a_layout_trains_as_one_process_does(outcomes, case):
    assert outcomes[case].verdict.faults == ()


@pytest.mark.parametrize("case", FAST_LOADED, ids=lambda case: case.name)
def test_a_checkpoint_goes_on_in_another_layout(outcomes, case):
    assert outcomes[case].verdict.faults == ()
    assert outcomes[case].result["moved_unchanged"] is True


@pytest.mark.parametrize("case", FAST_SAVED, ids=lambda case: case.name)
def test_a_checkpoint_goes_on_bit_for_bit_in_its_own_layout(outcomes, case):
    assert outcomes[case].verdict.faults == ()
    assert outcomes[case].result["resumed_exactly"] is True


@pytest.mark.parametrize("case", SABOTAGED, ids=lambda case: case.name)
def test_a_fault_is_detected(outcomes, case):
    assert outcomes[healthy(case)].verdict.faults == ()
    found = outcomes[case]
    assert found.result is not None, found.verdict.faults  # it trained, and to other numbers
    assert found.verdict.faults


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_rest_of_the_table_too(tmp_path, fork_server):
    """Without what `make parity` adds: the same in bf16, and stages 2 and 3 of ZeRO in fp32."""
    rest = [case for case in [*table_cases("fp32"), *other_cases(), *move_cases()] if case.zero == 1 or case.save]
    cases = [*MORE, *(case for case in rest if not case.load and case not in MORE), *LOADED]
    outcomes = run(cases, tmp_path, server=fork_server)
    assert {case.name: outcome.verdict.faults for case, outcome in outcomes.items() if not outcome.passed} == {}


def test_the_table_is_invalid_unless_the_reference_learns_and_clips(outcomes):
    references = {case.reference for case in FAST}
    assert all(outcomes[case].passed for case in references)


STUB = """
import json, pathlib, sys, time
place = pathlib.Path(sys.argv[1])
for case in json.loads((place / "cases.json").read_text()):
    if case["mechanism"] == "fails":
        (place / "error-1.txt").write_text("Traceback: ...\\nValueError: no such thing")
        sys.exit(1)
    if case["mechanism"] == "hangs":
        time.sleep(60)
    step = {"loss": 4.0, "aux_loss": 0.0, "grad_norm": 1.0, "routers": {}}
    validation = {"loss": 2.0, "accuracy": 0.5, "targets": 9}
    steps = [step] * 4 + [step | {"loss": 3.0}]
    result = {"case": case, "steps": steps, "validation": validation, "heads": {}, "seconds": 0.0}
    with (place / "results.jsonl").open("a") as f:
        f.write(json.dumps(result) + "\\n")
"""


@pytest.mark.parametrize(("how", "words"), [("fails", "no such thing"), ("hangs", "no result within its time")])
def test_a_case_that_fails_or_hangs_is_noted_and_those_after_it_run(tmp_path, monkeypatch, how, words):
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(parity_run, "WORKER", tmp_path / "stub.py")
    monkeypatch.setattr(parity_run, "CASE_S", 1)
    before, broken, after = (Case(mechanism=name) for name in ("gqa", how, "wgqa"))
    outcomes = run([before, broken, after], tmp_path)
    assert [outcomes[case].passed for case in (before, broken, after)] == [True, False, True]
    assert words in outcomes[broken].verdict.faults[0]


def test_the_page_has_a_cell_for_every_case_of_the_table_and_says_what_failed(tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(parity_run, "WORKER", tmp_path / "stub.py")
    monkeypatch.setattr(parity_run, "_launcher", lambda size: [sys.executable])
    broken = Case(mechanism="fails")
    outcomes = run([Case(mechanism="gqa", layout="tp2", zero=3), broken], tmp_path)
    write(outcomes, tmp_path, seconds=1.0, commit="abc")
    page, raw = (tmp_path / "parity.md").read_text(), json.loads((tmp_path / "parity.json").read_text())
    assert "| gqa, 3 | 0e+00 | not run |  |  | not run |" in page
    assert "- fails single zero 1 fp32: Traceback: ... | ValueError: no such thing" in page
    assert [row["passed"] for row in raw["cases"]] == [True, False, True]
    assert raw["commit"].startswith("abc to ")
    assert raw["spec"]["optimizer"]["clip_norm"] == 0.5 and raw["command"] == "make parity"


def result_of(losses, norm=1.0, routers=None):
    steps = [{"loss": loss, "aux_loss": 0.1, "grad_norm": norm, "routers": routers or {}} for loss in losses]
    return {"steps": steps, "validation": {"loss": 2.0, "accuracy": 0.5, "targets": 9}, "heads": {}}


@pytest.mark.parametrize(
    ("mine", "kind"),
    [
        (result_of([4.0, 3.0 * (1 + 2e-5)]), "loss of step 2"),
        (result_of([4.0, 3.0], norm=1 + 2e-4), "grad_norm of step 1"),
        (result_of([4.0, float("nan")]), "loss of step 2"),
        (result_of([4.0, 3.0], routers={"layer_00": {"load": [0.5, 0.499]}}), "routers of load in step 1"),
        (result_of([4.0, 3.0], routers={"layer_01": {"load": [0.5, 0.5]}}), "routers of names in step 1"),
        (result_of([4.0, 3.0]) | {"validation": {"loss": 2.0, "accuracy": 0.5, "targets": 8}}, "validation_targets"),
        (result_of([4.0, 3.0]) | {"resumed_exactly": False}, "not resumed exactly"),
    ],
)
def test_what_is_beyond_tolerance_is_a_fault_that_names_its_place(mine, kind):
    case = Case(mechanism="rgqa", layout="tp2")
    expected = result_of([4.0, 3.0], routers=mine["steps"][0]["routers"] and {"layer_00": {"load": [0.5, 0.5]}})
    assert compare(case, expected, expected).equal
    faults = compare(case, mine, expected).faults
    assert faults and any(fault.startswith(kind.split(" of ")[0]) for fault in faults)
    assert any(kind.split(" of ")[-1].split(" in ")[-1] in fault for fault in faults)


def test_the_table_is_every_mechanism_on_every_layout_under_every_legal_zero_stage():
    assert set(TABLE) == {"gqa", "rgqa", "gqe", "switchhead", "wgqa", "hybrid"}
    assert set(COLUMNS) < set(LAYOUTS)
    for precision in ("fp32", "bf16"):
        found = {(case.mechanism, case.layout, case.zero) for case in table_cases(precision)}
        assert found == {(m, x, z) for m in TABLE for x in COLUMNS for z in legal_zero(x)}
    assert [x for x in COLUMNS if legal_zero(x) == (1,)] == [x for x in COLUMNS if "pp" in x]


def test_make_parity_runs_every_mechanism_and_all_built_in_types_that_differ_in_a_layout():
    assert {case.mechanism for case in every_case()} == set(MECHANISMS)
    kinds = {kind.type for section in MECHANISMS.values() for _, kind in section.mechanisms()}
    # Their layers are those of gqa and rgqa. Sums of dynamic_gqa over ranks: tests/launcher/train/test_step_sums.py.
    assert TYPES.keys() - kinds == {"mha", "mqa", "sqa", "moa", "dynamic_gqa"}


def test_every_case_has_its_reference_and_every_loaded_checkpoint_its_saver():
    cases = every_case()
    assert len(cases) == len(set(cases)) == len({case.name for case in cases})
    assert {case.reference for case in cases} <= set(cases)
    assert {case.load for case in cases if case.load} <= {case.save for case in cases if case.save}
    assert saved_name("tp2·pp2", 1) in {case.save for case in cases}
    assert {case.sabotage for case in SABOTAGED} == set(FAULTS)
