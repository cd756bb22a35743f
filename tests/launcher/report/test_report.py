"""A report says what the run folders hold: every number from them, every gap and confound in the open."""

from __future__ import annotations

import csv
import json
import math
import re

import numpy as np
import pytest
from study_folders import (
    FLOPS,
    GAIN,
    GROUPS,
    LAYERS,
    STEPS,
    StudyFolder,
    change_summary,
    first_table,
    lead,
    loss_at,
    table,
    text,
)

from headway.launcher.base.errors import SpecError
from headway.launcher.compare.analyse import analyse
from headway.launcher.report.study import report

# ---------------------------------------------------------------- numbers


def test_the_loss_table_is_mean_spread_and_simultaneous_interval(full):
    result = analyse(full)
    row = next(v for v in result.variants if v.name == "rgqa-k2")
    finals = {v: [loss_at(v, s, 1.0) for s in (1, 2, 3)] for v in ("gqa", "rgqa-k2")}
    differences = np.subtract(finals["rgqa-k2"], finals["gqa"])
    every = np.array([[loss_at(v, s, 1.0) for s in (1, 2, 3)] for v in GAIN])
    residual = every - every.mean(0) - every.mean(1, keepdims=True) + every.mean()
    spread = math.sqrt((residual**2).sum() / 6)  # 4 variants, 3 seeds: (4 - 1) (3 - 1) degrees of freedom
    half = 3.10 * spread * math.sqrt(2 / 3)  # Dunnett (1964), table II: 3 comparisons, 6 degrees of freedom
    assert row.loss is not None and row.difference is not None
    assert row.loss.mean == pytest.approx(np.mean(finals["rgqa-k2"]))
    assert row.loss.sd == pytest.approx(np.std(finals["rgqa-k2"], ddof=1))
    assert row.difference.n == 3
    assert (row.difference.low, row.difference.high) == pytest.approx(
        (differences.mean() - half, differences.mean() + half),
        abs=0.005 * spread,  # the table has two decimals
    )
    shown = table((full / "report.md").read_text(), "Loss at equal tokens")["rgqa-k2"]
    assert shown[:3] == ["3", f"{np.mean(finals['rgqa-k2']):.4f}", f"{np.std(finals['rgqa-k2'], ddof=1):.4f}"]
    assert f"{differences.mean():+.4f}" in shown[3]
    # 3 bytes per token
    assert shown[6] == f"{np.mean(finals['rgqa-k2']) / math.log(2) / 3:.4f}"


def test_the_development_of_a_difference_is_a_sentence_with_its_change(full):
    page = (full / "report.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| rgqa-k2 | -0.0") and "tokens" in line]
    assert "at 4,000 tokens, -0.024 at 40,000; no change shown since 20,000 tokens" in row


def test_what_was_matched_is_shown_with_residuals(full):
    rows = table((full / "report.md").read_text(), "What was compared")
    assert rows["gqa"] == ["256", "100,000", "baseline", "2,000,000", "2,200,000", "512"]
    assert rows["rgqa-k1"] == ["240", "100,250", "+0.250%", "1,500,000", "1,650,000", "512"]


def test_speed_is_compared_to_the_baseline_and_to_the_flops(full):
    rows = table((full / "report.md").read_text(), "Training speed")
    ratio, theory, realised = rows["rgqa-k1"][2], rows["rgqa-k1"][3], rows["rgqa-k1"][4]
    assert ratio.startswith("1.250")  # 0.10 s over 0.08 s a step
    assert theory == "1.333"  # 2.0 over 1.5 MFLOPs
    assert realised == "94%"


def test_routers_are_averaged_over_the_last_tenth(full):
    page = (full / "report.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| switchhead | v ")]
    assert len(rows) == 1 and "| 2 of 16 | 0.900 | 0.45 | 25.0% | 60.0% | 1.00 | 0.250 | 50.0% |" in rows[0]
    loads = next(v for v in analyse(full).variants if v.name == "rgqa-k1").routers[0].load
    assert loads.shape == (GROUPS, 4)
    assert loads.sum(1) == pytest.approx([1.0, 1.0])


def test_csv_has_every_cell_and_every_point(full):
    with (full / "report.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == 12
    row = next(r for r in cells if (r["variant"], r["seed"]) == ("switchhead", "2"))
    assert float(row["validation_loss_nats"]) == pytest.approx(loss_at("switchhead", 2, 1.0))
    assert (row["state"], row["num_params"], float(row["data_wait_share"])) == ("done", "100250", pytest.approx(0.001))
    with (full / "curves.csv").open() as file:
        points = list(csv.DictReader(file))
    assert len(points) == 12 * (STEPS + STEPS // 4)
    last = [p for p in points if (p["variant"], p["seed"], p["kind"]) == ("rgqa-k1", "1", "validation")][-1]
    assert float(last["train_flops_useful"]) == pytest.approx(3 * FLOPS["rgqa-k1"] * 40_000)


def test_likeness_of_heads_is_shown_from_the_first_record_to_the_last(full):
    page = (full / "report.md").read_text()
    lines = page.split("## Routers and heads\n")[1].splitlines()
    (row,) = [line for line in lines if line.startswith("| gqa | 4 query heads per group ")]
    # records of steps 4 and 40; mean of two layers that are 0.1 apart
    assert row.endswith("| 0.010 → 0.010 | 0.100 → 0.100 | 0.290 → 0.650 | 3.90 → 3.90 | 0.300 → 0.300 |")
    with (full / "heads.csv").open() as file:
        measures = list(csv.DictReader(file))
    assert len(measures) == 12 * 10 * LAYERS
    last = [m for m in measures if (m["variant"], m["seed"], m["layer"]) == ("rgqa-k1", "2", "01")][-1]
    assert (last["tokens"], float(last["c_o"])) == ("40000", pytest.approx(0.7))
    with (full / "routers.csv").open() as file:
        routers = list(csv.DictReader(file))
    assert len(routers) == 3 * LAYERS * (1 + 1 + 2)
    assert {(r["dead"], r["switch_rate"], r["information_bias"]) for r in routers} == {("1", "0.6", "")}


def test_provenance_names_command_commit_machine_and_data(full):
    page = (full / "report.md").read_text().split("## Provenance")[1]
    for part in (
        "`headway study run demo.yaml`",
        "`abc123`",
        "Test CPU",
        "torch 2",
        "`" + "f" * 64 + "`",
        "2025-01-02",
    ):
        assert part in page


# ---------------------------------------------------------------- files


def test_the_page_needs_nothing_but_itself(full):
    page = (full / "report.html").read_text()
    addresses = re.findall(r"https?://[^\s\"'<>]+", page)
    assert {a for a in addresses if not a.startswith("http://www.w3.org/")} == set()
    names = re.findall(r"(\S+)=\"http://www\.w3\.org/", page)
    assert set(names) <= {"xmlns", "xmlns:xlink"}
    assert "<link" not in page and "@import" not in page
    assert not re.search(r"src=|url\((?!#)", page)
    assert page.count("<svg") == 6


def test_figures_lie_beside_the_page_and_markdown_shows_them(full):
    page = (full / "report.md").read_text()
    for name in ("loss", "effects", "trend", "pareto", "routers", "heads"):
        assert (full / f"{name}.svg").stat().st_size > 5000
        assert (full / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"]({name}.png)" in page


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"no readable study\.json"):
        report(tmp_path)


# ---------------------------------------------------------------- gaps


def test_failed_missing_and_partial_cells_stand_at_the_top_and_in_no_mean(small):
    small.seeds = [1, 2, 3]
    small.write_study()
    small.write_run("gqa", 1)
    small.write_run("gqa", 2)
    small.write_run("rgqa-k2", 2)
    small.write_run("gqa", 3, steps=12)
    small.run_dir("rgqa-k2", 1).mkdir(parents=True)
    outcome = {"exit_code": 70, "last_lines": ["step 3/40", "error: step 4: loss nan"]}
    (small.out / "outcomes.json").write_text(json.dumps({"rgqa-k2/seed-1": outcome}))
    page = text(small.out)
    top = page[: page.index("**After")]
    assert "3 of 6 cells are not in the numbers below" in top
    assert "| rgqa-k2/seed-1 | failed | 0 | exit code 70: error: step 4: loss nan |" in top
    assert "| gqa/seed-3 | partial | 12,000 | - |" in top
    assert "| rgqa-k2/seed-3 | missing | 0 | - |" in top
    rows = table(page, "Loss at equal tokens")
    assert (rows["gqa"][0], rows["rgqa-k2"][0]) == ("2", "1")
    # only seed 2 is in both variants, so the difference has one pair and no interval
    expected = loss_at("rgqa-k2", 2, 1.0) - loss_at("gqa", 2, 1.0)
    assert rows["rgqa-k2"][3] == f"{expected:+.4f} (no interval)"
    with (small.out / "report.csv").open() as file:
        assert [r["state"] for r in csv.DictReader(file)].count("done") == 3


def test_nothing_finished_is_reported_as_no_finding(small):
    small.write_study()
    assert "No finding" in lead(text(small.out))


def test_a_finished_baseline_alone_is_no_finding(small):
    small.write_study()
    small.write_run("gqa", 1)
    assert "No finding: no finished run of another variant" in lead(text(small.out))


def test_a_run_that_ended_with_nan_is_a_failure_not_a_number(small):
    small.write()
    metrics = small.run_dir("rgqa-k2", 2) / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[-1]["loss"] = math.nan
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    change_summary(small.run_dir("rgqa-k2", 2), final_validation_loss=math.nan)
    page = text(small.out)
    assert "| rgqa-k2/seed-2 | failed |" in page
    assert table(page, "Loss at equal tokens")["rgqa-k2"][0] == "1"


def test_a_torn_last_line_and_repeated_steps_do_not_disturb(small):
    small.write()
    before = table(text(small.out), "Loss at equal tokens")
    metrics = small.run_dir("gqa", 1) / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:10] + lines[6:]) + '{"kind": "train", "step": 4')
    assert table(text(small.out), "Loss at equal tokens") == before


def test_cells_that_left_the_study_are_named(small):
    small.write()
    (small.out / "cells" / "old" / "seed-9").mkdir(parents=True)
    assert "not in this report: old/seed-9" in text(small.out)


# ---------------------------------------------------------------- what the numbers can carry


def test_one_seed_gives_no_interval_and_the_text_says_what_that_means(small):
    small.seeds = [1]
    page = text(small.write())
    assert "with one seed there is no interval" in lead(page)
    assert "chance cannot be told from effect" in page
    rows = table(page, "Loss at equal tokens")
    assert rows["gqa"][2] == "-"  # no spread over one seed
    assert "no interval" in rows["rgqa-k2"][3]


def test_an_interval_that_contains_zero_is_undecided_and_names_the_seeds_that_decide(small, monkeypatch):
    # GAIN says 0.03 better; a seed on which it is 0.05 worse makes that undecidable
    real = loss_at

    def noisy(variant: str, seed: int, share: float) -> float:
        return real(variant, seed, share) + (0.08 if (variant, seed) == ("rgqa-k2", 2) else 0.0)

    monkeypatch.setitem(StudyFolder.write_run.__globals__, "loss_at", noisy)
    page = text(small.write())
    assert "Undecided against gqa: rgqa-k2" in lead(page)
    assert "better" not in first_table(page)["rgqa-k2"][0]
    assert "1 degrees of freedom; the true one can be up to 31.9 times as large" in page
    assert re.search(r"\| a difference of 0.01 \| \d+ seeds show one with 80 % power", page)
    assert re.search(
        r"\| seeds that would decide \| rgqa-k2: (\d+ \(a difference\)|more than 1,000); if the means", page
    )


def test_small_scale_is_said_in_numbers(small):
    page = text(small.write())
    assert "100k parameters, 40k tokens, 0.4 tokens per parameter" in page


def test_different_ends_are_compared_at_the_last_common_validation(small):
    small.write()
    longer = small.run_dir("gqa", 1) / "metrics.jsonl"
    more = {"step": 44, "tokens": 44_000, "train_s": 4.4, "loss": 1.0}
    extra = [
        {"kind": kind, **more, "step_s": 0.1, "data_s": 0.0, "batch_hash": "0" * 16} for kind in ("train", "validation")
    ]
    longer.write_text(longer.read_text() + "".join(json.dumps(e) + "\n" for e in extra))
    change_summary(longer.parent, steps=44, final_validation_loss=1.0)
    page = text(small.out)
    assert "after 40,000 training tokens" in page
    assert "some are still in the middle of their learning-rate schedule" in page


# ---------------------------------------------------------------- fairness


def test_equal_batches_are_stated_paired(small):
    page = text(small.write())
    assert "Data: PAIRED." in page
    assert "seed 2: rgqa-k2 and gqa: 40 common steps, all hashes equal" in page
    assert "CONFOUND:" not in page and "CONFOUNDED by" not in page


def test_other_batches_are_loudly_unpaired_with_the_first_differing_step(small):
    small.write_study()
    for variant, seed in (("gqa", 1), ("gqa", 2), ("rgqa-k2", 1)):
        small.write_run(variant, seed)
    small.write_run("rgqa-k2", 2, hash_of=lambda seed, step: seed * 1000 + step + (step >= 17))
    page = text(small.out)
    top = page[: page.index("**After")]
    assert "UNPAIRED" in top and "seed 2: rgqa-k2 and gqa read different batches, first at step 17" in top
    assert "UNPAIRED data: " in lead(page)
    assert "UNPAIRED difference" in page
    # Welch's interval of losses whose spread over seeds dwarfs the difference
    assert "Undecided against gqa" in lead(page)


def test_every_difference_between_specs_is_classed(small):
    small.write()
    for seed in (1, 2):
        file = small.run_dir("rgqa-k2", seed) / "spec.json"
        spec = json.loads(file.read_text())
        spec["optimizer"]["lr"] = 0.001
        file.write_text(json.dumps(spec))
    result = analyse(small.out)
    assert {(d.key, d.kind) for d in result.differences} == {
        ("attention.type", "intervention"),
        ("attention.top_k", "intervention"),
        ("attention.balance_coef", "intervention"),
        ("model.ffn_width", "matching"),
        ("optimizer.lr", "CONFOUND"),
    }
    page = text(small.out)
    assert "| rgqa-k2 | `optimizer.lr` | 0.003 | 0.001 | CONFOUND |" in page
    assert "| rgqa-k2 | `attention.top_k`" in page
    # what the mechanism brings stands in one line, not in the table of what was asked for
    assert "- rgqa-k2: `attention.balance_coef: 0.01`" in page and "| `attention.balance_coef`" not in page
    assert "confounds: see" in page[: page.index("**After")]
    assert "rgqa-k2/seed-1: optimizer.lr: planned 0.003, trained 0.001" in page


def test_another_machine_commit_or_dataset_is_a_confound(small):
    small.write()
    file = small.run_dir("rgqa-k2", 2) / "run.json"
    run = json.loads(file.read_text())
    run["git_commit"], run["machine"]["cpu"] = "def456", "Other CPU"
    file.write_text(json.dumps(run))
    page = text(small.out)
    assert "git\\_commit: abc123 in gqa/seed-1, rgqa-k2/seed-1, gqa/seed-2; def456 in rgqa-k2/seed-2" in page
    assert "machine.cpu: Test CPU" in page
    assert "2 confounds: see" in page
