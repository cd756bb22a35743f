"""Effective cost in a report, and cells of smaller budgets, which give no other number."""

from __future__ import annotations

import csv
import json
import math

import pytest
from study_folders import (
    FLOPS,
    STEP_S,
    STEPS,
    StudyFolder,
    change_record,
    change_summary,
    end_loss,
    first_table,
    lead,
    loss_at,
    table,
    text,
)

from headway.launcher.compare.analyse import StudyResult, analyse
from headway.launcher.compare.simultaneous import compare_paired

BUDGETS = (0.25, 0.5, 1.0)


@pytest.fixture
def budgets(tmp_path, small) -> StudyFolder:
    """Three variants, three seeds and three budgets, written, without figures."""
    folder = StudyFolder(tmp_path / "budgets", ["gqa", "rgqa-k1", "rgqa-k2"], [1, 2, 3], BUDGETS)
    folder.write()
    return folder


def numbers(result: StudyResult) -> object:
    """What does not depend on smaller budgets."""
    return (
        [(c.key, c.loss, c.speed) for c in result.cells],
        [(v.losses, v.loss, v.difference, v.speed_ratio) for v in result.variants],
        (result.tokens, result.tokens_are_final, result.comparison, result.trend, result.pairing, result.differences),
        (result.circumstances, result.deviations, result.leftovers),
    )


def test_cells_of_smaller_budgets_change_no_other_number(tmp_path, budgets):
    plain = StudyFolder(tmp_path / "plain", budgets.variants, budgets.seeds)
    assert numbers(analyse(budgets.out)) == numbers(analyse(plain.write()))


def test_a_smaller_budget_has_its_own_key_and_folder(budgets):
    result = analyse(budgets.out)
    assert [c.key for c in result.cells][:2] == ["gqa/seed-1", "rgqa-k1/seed-1"]
    assert [c.key for c in result.short_cells][:3] == [
        "gqa/seed-1.budget-0.25",
        "gqa/seed-1.budget-0.5",
        "rgqa-k1/seed-1.budget-0.25",
    ]
    assert result.short_cells[0].loss == pytest.approx(end_loss("gqa", 1, 0.25))
    assert result.leftovers == ()


def test_a_missing_budget_cell_is_listed_and_leaves_the_full_comparison_alone(budgets):
    before = first_table(text(budgets.out))
    for seed in (1, 2, 3):
        (budgets.run_dir("rgqa-k2", seed, 0.5) / "summary.json").unlink()
    outcome = {"exit_code": 70, "last_lines": ["error: step 4: loss nan"]}
    (budgets.out / "outcomes.json").write_text(json.dumps({"rgqa-k2/seed-2.budget-0.5": outcome}))
    page = text(budgets.out)
    assert "3 of 27 cells are not in the numbers below" in page
    assert "| rgqa-k2/seed-1.budget-0.5 | partial | 20,000 | - |" in page
    assert "| rgqa-k2/seed-2.budget-0.5 | failed | 20,000 | exit code 70: error: step 4: loss nan |" in page
    rows = first_table(page)
    assert rows["rgqa-k2"][:2] == before["rgqa-k2"][:2] and rows["rgqa-k2"][2] == "not measured"
    assert rows["rgqa-k1"][2] != "not measured"
    assert "- rgqa-k2: no seed has finished all budgets of both" in page


def test_cells_of_a_budget_that_left_the_study_are_named(budgets):
    (budgets.out / "cells" / "gqa" / "seed-1.budget-0.1").mkdir()
    assert "not in this report: gqa/seed-1.budget-0.1" in text(budgets.out)


def test_other_batches_in_a_budget_are_named_and_the_full_runs_stay_paired(budgets):
    for file in budgets.run_dir("rgqa-k2", 2, 0.25).iterdir():
        file.unlink()
    budgets.run_dir("rgqa-k2", 2, 0.25).rmdir()
    budgets.write_run("rgqa-k2", 2, budget=0.25, hash_of=lambda seed, step: seed * 1000 + step + (step >= 9))
    page = text(budgets.out)
    assert "Data: PAIRED." in page and "Data of budget 0.5: PAIRED." in page
    assert "Data of budget 0.25: UNPAIRED." in page
    assert "seed 2: rgqa-k2 and gqa read different batches, first at step 9" in page


def test_the_first_table_has_the_effective_speed_ups(budgets):
    page, result = text(budgets.out), analyse(budgets.out)
    rows = first_table(page)
    assert rows["gqa"][2:4] == ["1.00x", "1.00x"]
    by_name = {v.name: v.effective for v in result.others}
    for name in ("rgqa-k1", "rgqa-k2"):
        found = by_name[name]
        assert found is not None and found.tokens is not None and found.flops is not None and found.seconds is not None
        assert found.flops.value == pytest.approx(found.tokens.value * FLOPS["gqa"] / FLOPS[name])
        assert found.seconds.value == pytest.approx(found.tokens.value * STEP_S["gqa"] / STEP_S[name])
        shown = [str(x).replace("[", "\\[").replace("]", "\\]") for x in (found.flops, found.seconds)]
        assert rows[name][2:4] == shown
    # loss_end = c + 0.2 tokens^-1/2: a gain of 0.024 is worth this factor of tokens
    gain = -sum(loss_at("rgqa-k2", s, 1.0) - loss_at("gqa", s, 1.0) for s in (1, 2, 3)) / 3
    expected = (1 + gain / 0.2) ** 2
    assert by_name["rgqa-k2"] is not None and by_name["rgqa-k2"].tokens is not None
    assert by_name["rgqa-k2"].tokens.value == pytest.approx(expected, rel=0.02)
    assert "Loss at equal seconds" not in page
    curves = table(page, "Effective cost")
    means = [sum(end_loss("rgqa-k1", s, b) for s in (1, 2, 3)) / 3 for b in BUDGETS]
    assert curves["rgqa-k1"] == [f"{mean:.4f}" for mean in means]


def test_a_study_of_one_budget_says_how_to_measure(small):
    page = text(small.write())
    assert first_table(page)["rgqa-k2"][2:4] == ["not measured", "not measured"]
    why = "the study has one budget; `budgets: [0.25, 0.5, 1]` in the study would measure it"
    assert f"| effective speed-up | not measured: {why} |" in page and f"Not measured: {why}." in page


def test_what_a_measured_speed_holds_for_stands_below_the_first_table(small):
    small.write()
    for seed in (1, 2):
        for name in small.variants:
            file = small.run_dir(name, seed) / "run.json"
            run = json.loads(file.read_text())
            run["attempts"] = [{"layout": "2 process(es) by local, tensor 2", "from_step": 0}]
            file.write_text(json.dumps(run))
    page = text(small.out)
    assert (
        "Tokens per second and speed-up by seconds: measured on Test CPU with 2 cores, by this implementation (headway "
        "0.1.0, torch 2), at 100k parameters and sequences of 100 tokens, as 2 process(es) by local, tensor 2;"
    ) in page


@pytest.mark.parametrize("with_budgets", [None, BUDGETS])
def test_a_variant_compared_with_itself_on_a_slower_clock_gives_no_claim(small, monkeypatch, with_budgets):
    """Losses of both differ by noise only. The clock of the variant is 5 % slower."""

    def same(variant: str, seed: int, share: float) -> float:
        noise = 0.002 * math.sin(11 * seed + len(variant))
        return 3.5 + 0.05 * math.cos(seed) + noise + 2.5 * math.exp(-6 * share)

    monkeypatch.setattr("study_folders.loss_at", same)
    monkeypatch.setitem(STEP_S, "rgqa-k2", 1.05 * STEP_S["gqa"])
    monkeypatch.setitem(FLOPS, "rgqa-k2", FLOPS["gqa"])
    small.seeds, small.budgets = [1, 2, 3], with_budgets
    page = text(small.write())
    assert "Undecided against gqa: rgqa-k2" in lead(page) and "has a " not in lead(page)
    result = analyse(small.out)
    (found,) = [v.effective for v in result.others] if with_budgets else [None]
    if found is None:
        assert first_table(page)["rgqa-k2"][2:4] == ["not measured", "not measured"]
        return
    assert found.tokens is not None and found.flops is not None and found.seconds is not None
    assert not found.tokens.excludes(1) and not found.flops.excludes(1)
    # What is said about seconds is the clock, and no more.
    assert not found.seconds.excludes(1 / 1.05)
    assert found.seconds.value / found.tokens.value == pytest.approx(1 / 1.05)


def test_csv_files_have_the_cells_of_all_budgets(budgets):
    text(budgets.out)
    with (budgets.out / "report.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == 27 and [c["budget"] for c in cells].count("1.0") == 9
    (row,) = [c for c in cells if (c["variant"], c["seed"], c["budget"]) == ("rgqa-k1", "2", "0.5")]
    assert float(row["validation_loss_nats"]) == pytest.approx(end_loss("rgqa-k1", 2, 0.5))
    assert row["compared_tokens"] == str(STEPS // 2 * 1000)
    with (budgets.out / "curves.csv").open() as file:
        points = [p for p in csv.DictReader(file) if (p["variant"], p["seed"], p["kind"]) == ("gqa", "1", "validation")]
    assert float([p for p in points if p["budget"] == "0.25"][-1]["loss_nats"]) == pytest.approx(
        end_loss("gqa", 1, 0.25)
    )


def test_cells_that_did_not_end_at_one_token_count_are_not_compared_over_budgets(budgets):
    run_dir = budgets.run_dir("gqa", 1, 0.5)
    file = run_dir / "metrics.jsonl"
    last = [line for line in map(json.loads, file.read_text().splitlines()) if line["kind"] == "train"][-1]
    more = [last | {"step": 24, "tokens": 24_000, "train_s": 2.4}]
    more.append({"kind": "validation", "step": 24, "tokens": 24_000, "train_s": 2.4, "loss": 3.0})
    file.write_text(file.read_text() + "".join(json.dumps(record) + "\n" for record in more))
    change_summary(run_dir, steps=24, tokens=24_000, final_validation_loss=3.0)
    page = text(budgets.out)
    assert "the cells of budget 0.5 did not all end at one token count" in page
    assert first_table(page)["rgqa-k2"][2] == "not measured"


def test_a_budget_cell_that_is_not_what_was_planned_is_named(budgets):
    change_record(budgets, budgets=list(BUDGETS))
    file = budgets.run_dir("rgqa-k1", 1, 0.25) / "spec.json"
    spec = json.loads(file.read_text())
    spec["optimizer"]["lr"] = 0.001
    file.write_text(json.dumps(spec))
    page = text(budgets.out)
    assert "rgqa-k1/seed-1.budget-0.25: optimizer.lr: planned 0.003, trained 0.001" in page


def test_differences_at_the_end_of_each_budget_are_paired_there(budgets):
    page, result = text(budgets.out).replace("\\", ""), analyse(budgets.out)
    rows = [line.strip("|").split("|") for line in page.split("| difference after |")[1].splitlines()[2:4]]
    for name, *shown in ([cell.strip() for cell in row] for row in rows):
        for budget, cell in zip(BUDGETS, shown, strict=True):
            losses = {v: {s: end_loss(v, s, budget) for s in (1, 2, 3)} for v in budgets.variants}
            found = compare_paired(losses, "gqa").differences[name]
            assert cell == f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
    full = {v.name: v.difference for v in result.others}
    for name, found in result.differences_at(1.0).items():
        expected = full[name]
        assert expected is not None and (found.mean, found.low) == (expected.mean, expected.low)
