"""Tests of studies with `sizes` and `tune` (headway.launcher.study.ladder)."""

from __future__ import annotations

import json
import shutil

import pytest
from played_study import BASE, STUDY, Folder, play

from headway.launcher.base.errors import SpecError
from headway.launcher.base.text import short_number
from headway.launcher.cli.main import main
from headway.launcher.study.config import load_study
from headway.launcher.study.ladder.plan import plan_ladder
from headway.launcher.study.ladder.run import report_file, run_file, status_file
from headway.launcher.study.ladder.trials import without_diverged
from headway.launcher.study.plan import plan_study
from headway.launcher.study.run import refuse_changed


@pytest.fixture
def folder(tmp_path, monkeypatch):
    made = Folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    made.become_ladder()
    (tmp_path / "base.yaml").write_text(BASE + "schedule: {type: wsd, warmup_tokens: 512}\n")
    play(monkeypatch)
    monkeypatch.setattr("headway.launcher.report.study.draw_all", lambda *_: [])  # drawn in test_ladder_trains.py
    return made


def tuning(folder: Folder, size: str = "") -> dict:
    """What was found at a size, or in a study without sizes."""
    place = folder.out / "sizes" / size if size else folder.out
    return json.loads((place / "tuning.json").read_text())["keys"]["optimizer.lr"]


def test_a_tuned_batch_is_one_for_all_variants_and_keeps_their_pairs(folder):
    text = folder.study.read_text()
    line = next(line for line in text.splitlines() if "optimizer.lr:" in line)
    search = "{grid: [8, 16, 32], seeds: [101], sizes: [s], check: false}"
    folder.study.write_text(text.replace(line, f"  train.global_batch: {search}"))
    assert run_file(folder.study) == 0
    for size in "sml":
        found = json.loads((folder.out / "sizes" / size / "tuning.json").read_text())["keys"]["train.global_batch"]
        # the parabolas of gqa and routed have their minima at 11 and 30, that of their mean is at 18
        assert {v["chosen"] for v in found["variants"].values()} == {16}
        study = json.loads((folder.out / "sizes" / size / "study.json").read_text())
        assert {c["spec"]["train"]["global_batch"] for c in study["cells"]} == {16}


def test_a_size_sets_keys_tokens_and_scaled_values_of_all_variants(folder):
    ladder = plan_ladder(load_study(folder.study))
    small, middle, large = ladder.sizes
    assert [s.spec.model.width for s in ladder.sizes] == [32, 48, 64]
    for size in ladder.sizes:
        step = size.spec.tokens_per_step
        assert size.spec.train.tokens % step == 0
        assert 0 <= size.spec.train.tokens - 0.2 * size.params < step
        assert size.spec.train.validate_every_tokens == round(1024 * size.params / small.params)
        plan = plan_study(ladder.main(size, {}))
        assert {c.spec.train.tokens for c in plan.cells} == {size.tokens}
        assert {c.spec.model.layers for c in plan.cells} == {size.spec.model.layers}
        assert f"train.tokens={size.tokens}" in plan.cells[-1].overrides
    assert [c.key for c in plan_study(ladder.main(large, {})).cells] == ["gqa/seed-1"]
    assert middle.out.resolve() == folder.out / "sizes" / "m"


def test_names_that_no_run_may_have_are_refused_before_training(folder):
    text = folder.study.read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("study: "))
    end = len(".s.optimizer.lr-1.23457e-05.routed.seed-101")
    folder.study.write_text(text.replace(line, f"study: {'x' * (128 - end)}"))
    plan_ladder(load_study(folder.study))
    folder.study.write_text(text.replace(line, f"study: {'x' * (129 - end)}"))
    with pytest.raises(SpecError, match=r"variants: routed: a run would have the name x+\.s\.optimizer.* of 129 char"):
        load_study(folder.study)
    folder.study.write_text(STUDY.replace("routed:", f"{'y' * 120}:"))
    with pytest.raises(SpecError, match=r"variants: y+: a run would have the name small\.y+\.seed-\.\.\., of 133"):
        load_study(folder.study)


def test_trials_choose_a_value_for_each_variant_and_the_study_uses_it(folder, capsys):
    assert run_file(folder.study) == 0
    started = folder.trained()
    found = tuning(folder, "s")
    # the optimum of routed lies on the lower edge, so every variant has one more trial there
    assert found["grid"] == [5e-4, 1e-3, 2e-3, 4e-3]
    assert {len(v["trials"]) for v in found["variants"].values()} == {4}
    assert found["variants"]["gqa"]["chosen"] == pytest.approx(2.5e-3, rel=0.01)
    assert found["variants"]["routed"]["chosen"] == pytest.approx(1e-3, rel=0.01)
    # no trial at l: an exponent through s and m
    carried = tuning(folder, "l")
    assert carried["variants"]["gqa"]["trials"] == []
    assert 1.1e-3 < carried["variants"]["gqa"]["chosen"] < 1.4e-3
    assert carried["check"]["best"] == carried["variants"]["gqa"]["chosen"]
    assert [t["value"] for t in carried["check"]["trials"]] == sorted(t["value"] for t in carried["check"]["trials"])
    study = json.loads((folder.out / "sizes" / "s" / "study.json").read_text())
    rates = {c["variant"]: c["spec"]["optimizer"]["lr"] for c in study["cells"]}
    assert rates == {v: found["variants"][v]["chosen"] for v in rates}
    # trials of s and m (4 and 5 values, 2 variants), cells of s and m (2 variants, 2 seeds) and l (1), 3 checks at l
    assert tuning(folder, "m")["grid"] == [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    keys = [key.rpartition("seed-")[2] for key in started]
    assert keys == ["101"] * (4 * 2 + 5 * 2) + ["1", "1", "2", "2"] * 2 + ["1"] + ["101"] * 3
    assert (folder.out / "report.html").exists()
    assert (folder.out / "sizes" / "m" / "report.html").exists()
    capsys.readouterr()
    assert run_file(folder.study) == 0
    assert folder.trained() == [], "everything is done already"


def test_a_stopped_ladder_goes_on_and_a_failed_trial_is_tried_again(folder, capsys):
    folder.behave({"routed/seed-101": "fail"})
    with pytest.raises(Exception, match="tries it again"):
        run_file(folder.study)
    assert not (folder.out / "sizes" / "s" / "cells").exists(), "no cell may train before all trials are known"
    folder.behave({})
    folder.trained()
    assert run_file(folder.study) == 0
    assert "gqa/seed-101" in folder.trained(), "the new value of the extended grid"


def test_a_diverged_trial_counts_as_a_loss_that_is_never_chosen(folder):
    without_sizes(folder)
    folder.rewrite("[1e-3, 2e-3, 4e-3]", "[5e-4, 1e-3, 2e-3, 6e-3, 4e-2]")
    assert run_file(folder.study) == 0
    found = tuning(folder)["variants"]["gqa"]
    lost = [t for t in found["trials"] if t["value"] == 4e-2]
    assert [(t["loss"], t["done"]) for t in lost] == [(None, False)]
    assert found["chosen"] == pytest.approx(2.5e-3, rel=0.01)
    folder.trained()
    assert run_file(folder.study) == 0
    assert folder.trained() == [], "a trial that diverged is not trained again"


def test_a_trial_that_diverged_with_another_spec_stays_in_the_plan_and_is_refused(folder):
    ladder = plan_ladder(load_study(folder.study))
    plan = plan_study(ladder.trial(ladder.sizes[0], "optimizer.lr", 4e-3, {}))
    gqa, routed = plan.cells
    end = {"exit_code": 70, "last_lines": ["error: step 5: 20 steps in a row had no finite loss (guard.max_skipped)"]}
    gqa.run_dir.mkdir(parents=True)
    (plan.study.out / "outcomes.json").write_text(json.dumps({gqa.key: end}))
    spec = gqa.resolved()
    (gqa.run_dir / "spec.json").write_text(json.dumps(spec))
    assert without_diverged(plan).cells == (routed,)
    spec["optimizer"]["clip_norm"] = 0.123
    (gqa.run_dir / "spec.json").write_text(json.dumps(spec))
    assert without_diverged(plan).cells == (gqa, routed)
    with pytest.raises(SpecError, match=r"gqa/seed-101: optimizer.clip_norm: 0.123 in the folder"):
        refuse_changed(without_diverged(plan))
    shutil.rmtree(gqa.run_dir)
    assert without_diverged(plan).cells == (gqa, routed), "it is gone, so it is trained"


def test_a_question_about_two_variants_is_asked_at_the_sizes_that_have_both(folder):
    folder.rewrite("variants:\n  gqa:\n", "asks: [gqa varies more over seeds than routed]\nvariants:\n  gqa:\n")
    ladder = plan_ladder(load_study(folder.study))
    assert [len(ladder.main(size, {}).config.asks) for size in ladder.sizes] == [1, 1, 0]  # l has gqa alone


def without_sizes(folder: Folder) -> None:
    """Leave a tuned study of one size."""
    text = folder.study.read_text()
    head, _, rest = text.partition("tokens_per_param")
    tail = rest[rest.index("tune:") :].replace("sizes: [s, m], carry: fit, ", "")
    folder.study.write_text(head + tail)


def test_a_study_without_sizes_can_be_tuned(folder):
    without_sizes(folder)
    assert run_file(folder.study) == 0
    study = json.loads((folder.out / "study.json").read_text())
    assert {c["variant"]: c["spec"]["optimizer"]["lr"] for c in study["cells"]}["gqa"] == pytest.approx(
        2.5e-3, rel=0.01
    )
    assert study["tuned"] == ["optimizer.lr"]
    report = (folder.out / "report.md").read_text()
    assert "## Tuning" in report and "parabola through the best three" in report
    assert "| optimizer | optimizer.lr was tuned for each variant" in report and "at once: a diff" not in report
    assert status_file(folder.study) == 0


def test_a_changed_grid_after_training_is_refused_as_another_definition(folder):
    without_sizes(folder)
    assert run_file(folder.study) == 0
    folder.rewrite("[1e-3, 2e-3, 4e-3]", "[1.5e-3, 2.5e-3, 6e-3], extend: 0")
    with pytest.raises(SpecError, match=r"begun with another definition[\s\S]*optimizer\.lr"):
        run_file(folder.study)


def test_dry_run_trains_nothing_and_names_the_trials(folder, capsys):
    assert run_file(folder.study, dry_run=True) == 0
    out = capsys.readouterr().out
    assert "tune optimizer.lr at s: 6 trials (0.001, 0.002, 0.004)" in out
    assert "size l:" in out
    assert folder.trained() == []
    assert not folder.out.exists()


def test_a_size_beyond_the_reach_of_the_ladder_is_named_before_training(folder, capsys):
    sizes = [size.params for size in plan_ladder(load_study(folder.study)).sizes]
    most, text = sizes[-1] * (sizes[-1] / sizes[0]) ** 2, folder.study.read_text()
    for named, said in ((1.1 * most, True), (0.9 * most, False)):
        folder.study.write_text(f"{text}extrapolate: {named:.6g}\n")
        assert run_file(folder.study, dry_run=True) == 0
        out = capsys.readouterr().out
        assert ("farther away than the report predicts" in out) == said
        assert (f"(up to {short_number(most)})" in out) == said


def test_seeds_are_planned_for_each_size(folder, capsys):
    folder.rewrite("seeds: [1], variants: [gqa]", "variants: [gqa, routed]")
    text = folder.study.read_text()
    folder.study.write_text(text[: text.index("tune:")] + text[text.index("variants:\n") :])
    assert run_file(folder.study) == 0
    capsys.readouterr()
    assert main(["study", "plan", str(folder.study)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("size ")] == ["size s", "size m", "size l"]
    assert sum("spread of a run" in line for line in lines) == 3


def test_reports_and_status_need_cells(folder, capsys):
    with pytest.raises(SpecError, match="no cell was trained"):
        report_file(folder.study)
    assert status_file(folder.study) == 0
    assert "missing" in capsys.readouterr().out


BAD = [
    ("  m: {keys: {model.width: 48, model.layers: 3}}\n", "", "at least 3"),
    ("variants: [gqa]", "variants: [routed]", "baseline gqa is missing"),
    ("variants: [gqa]", "variants: [gqa, router]", "'router' is not a variant"),
    ("model.width: 48,", "model.width: 48, train.tokens: 512,", "sets train.tokens"),
    ("seeds: [101]", "seeds: [1]", "seed 1 is a seed of the study too"),
    ("seeds: [1], variants: [gqa]", "seeds: [1, 1], variants: [gqa]", "sizes.l.seeds: a seed is given twice"),
    ("grid: [1e-3, 2e-3, 4e-3]", "grid: [1e-3]", "at least 3"),
    ("sizes: [s, m]", "sizes: [s, xl]", "'xl' is not a size"),
    ("sizes: [s, m], carry: fit", "sizes: [l]", "size s has all variants, and the sizes with trials have gqa alone"),
    ("carry: fit, budget: 0.5", "carry: fit, budget: 0.001", "schedule.warmup_tokens"),
    ("sizes: [s, m]", "sizes: [s]", "fit needs trials at two sizes"),
    ("optimizer.lr: {grid", "model.ffn_width: {grid", "`match` sets model.ffn_width"),
    ("optimizer.lr: {grid", "attention.top_k: {grid", "variant routed sets attention.top_k"),
    ("{train.validate_every_tokens: 1}", "{train.validate_each: 1}", "train.validate_each is not a key"),
    ("{train.validate_every_tokens: 1}", "{attention.top_k: 1}", "`scale` sets attention.top_k"),
    ("model.width: 48, model.layers: 3", "model.width: 50, attention.heads: 5", r"sizes: m: .*kv_heads"),
]


@pytest.mark.parametrize(("old", "new", "words"), BAD)
def test_a_ladder_that_cannot_be_right_is_refused_before_anything_starts(folder, old, new, words):
    folder.rewrite(old, new)
    with pytest.raises(SpecError, match=words):
        run_file(folder.study)
    assert folder.trained() == []
    assert not folder.out.exists()


def test_an_argument_that_a_size_overrides_is_refused(folder):
    for argument, words in (("model.width=40", "size s sets"), ("train.tokens=512", "`tokens_per_param` sets")):
        with pytest.raises(SpecError, match=words):
            run_file(folder.study, [argument])


def test_the_base_of_a_size_may_be_another_file(folder, tmp_path):
    (tmp_path / "deep.yaml").write_text(BASE.replace("layers: 2", "layers: 6"))
    folder.rewrite("m: {keys: {model.width: 48, model.layers: 3}}", "m: {base: deep.yaml}")
    assert plan_ladder(load_study(folder.study)).sizes[1].spec.model.layers == 6
