"""`headway chaos` judges both sides by one rule, and Headway keeps its guarantees."""

import json
import tempfile

import pytest

from headway.launcher.chaos.drill import chaos
from headway.launcher.chaos.options import damaged
from headway.launcher.chaos.report import table
from headway.launcher.chaos.verdict import Readings, Seen, Trial, Verdict, held, judge
from headway.launcher.cli.main import main

RIGHT = {"begun_from": (5,), "had": 6, "complete": True, "same_losses": True}


@pytest.mark.parametrize(
    ("seen", "kind", "why"),
    [
        ({}, "resumed", ""),
        ({"begun_from": (0,), "had": 0}, "resumed", ""),
        ({"begun_from": (5, 3)}, "resumed", ""),
        ({"begun_from": (0,)}, "wrong", "step 0"),
        ({"begun_from": (5, 0)}, "wrong", "step 0"),
        ({"begun_from": (6,), "damaged": frozenset({6})}, "wrong", "damaged"),
        ({"begun_from": (6, 5), "damaged": frozenset({6}), "complete": False}, "wrong", "damaged"),
        ({"same_losses": False}, "wrong", "losses"),
        ({"complete": False, "said": "OSError: no"}, "stopped", "OSError: no"),
        ({"complete": False, "same_losses": False, "begun_from": ()}, "stopped", "without an error message"),
        ({"orphans": 2, "orphan_steps": 9}, "wrong", "2 orphans trained 9"),
        ({"unnoticed_s": 15.0}, "wrong", "15 s"),
    ],
)
def test_each_observation_gets_its_verdict(seen, kind, why):
    verdict = judge(Seen(**{**RIGHT, **seen}))
    assert verdict.kind == kind and why in verdict.why


def trial(kind, side="Headway", fault="F1", **facts):
    verdict = Verdict(kind=kind, why="" if kind == "resumed" else "for a reason")
    return Trial(fault=fault, number=0, side=side, variant="", verdict=verdict, seconds=1.0, facts=facts)


def test_guarantees_are_kept_only_if_every_fault_was_tried_and_every_trial_resumed():
    good, lost = trial("resumed"), trial("stopped", side="stock")
    assert held([good, lost], [], "Headway", ["F1"])
    assert not held([good, lost], [], "stock", ["F1"])
    assert not held([good, trial("stopped")], [], "Headway", ["F1"])
    assert not held([good], [], "Headway", ["F1", "F2"])
    blind = Readings(fault="F8", side="Headway", refused=299, changed=1, equal=0)
    assert not held([good], [blind], "Headway", ["F1"])


def test_the_table_counts_only_trials_that_ran():
    trials = [trial("resumed", noticed_s=5.5), trial("wrong"), trial("resumed", noticed_s=6.0)]
    readings = [Readings(fault="F8", side="Headway", refused=3, changed=1, equal=2)]
    first, second = table(trials, readings, ["Headway"]).splitlines()[2:]
    assert "2 of 3 resumed; 1 **wrong** (for a reason); noticed after 5.5, 6.0 s" in first
    assert "1 of 6 read with another value" in second and "3 of 6 refused, 2 changed no value" in second


def test_damage_flips_one_bit_or_truncates():
    assert damaged(b"\x00\x01\x02", 3, 9) == b"\x00\x03\x02"
    assert damaged(b"\x00\x01\x02", 2, -1) == b"\x00\x01"


def test_an_unknown_fault_is_refused(capsys):
    assert main(["chaos", "--faults", "F1,F99"]) == 64
    assert "'F99' is not one of F1, F2" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "words"), [("table.md", "name of the table"), ("folder", "is a folder")])
def test_a_file_that_the_table_would_replace_is_refused_before_anything_starts(tmp_path, capsys, name, words):
    (tmp_path / "folder").mkdir()
    assert main(["chaos", "--json", str(tmp_path / name)]) == 64
    assert words in (said := capsys.readouterr().err) and f"such as {tmp_path}" in said
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_headway_resumes_and_nothing_is_left_behind(fork_server, tmp_path, monkeypatch, capsys):
    # F2, F7, F10
    temporary, out = tmp_path / "tmp", tmp_path / "chaos.json"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert chaos(faults=["F2", "F7", "F10"], seconds=0, seed=5, out=out, server=fork_server) == 0
    result = json.loads(out.read_text())
    assert result["headway_held"] and result["seed"] == 5 and result["trials_done"] == len(result["trials"]) == 6
    kinds = {(t["fault"], t["side"]): t["kind"] for t in result["trials"]}
    assert {side for _, side in kinds} == {"stock DeepSpeed", "Headway"}
    assert all(kinds[fault, "Headway"] == "resumed" for fault in ("F2", "F7", "F10"))
    assert kinds["F7", "stock DeepSpeed"] == "stopped"  # an empty file
    read = {r["side"]: r for r in result["readings"]}
    assert read["Headway"]["refused"] == read["stock DeepSpeed"]["refused"] == 300
    shown = out.with_suffix(".md").read_text()
    assert all(f"| {fault} |" in shown for fault in ("F2", "F7", "F10")) and "| F1 |" not in shown
    assert capsys.readouterr().out.count("Headway resumed") == 3
    assert list(temporary.iterdir()) == []
