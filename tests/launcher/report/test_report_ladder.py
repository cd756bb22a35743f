"""The report of a ladder: its answer, its numbers, and what it says where a number is missing."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from ladder_folders import GAIN, PARAMS, LadderFolder, law, noise, tuning
from study_folders import StudyFolder, change_summary, lead, table, with_start

from headway.launcher.base.errors import SpecError
from headway.launcher.compare.ladder.curve import Law
from headway.launcher.compare.ladder.read import read_ladder
from headway.launcher.report.ladder import ladder_report


@pytest.fixture
def without_figures(monkeypatch):
    monkeypatch.setattr("headway.launcher.report.ladder.draw_ladder", lambda study: {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A ladder of four sizes with a named size and tuning, and its report with figures."""
    folder = LadderFolder(tmp_path_factory.mktemp("ladder") / "out", (4, 3, 2, 2), budgets=(0.25, 0.5, 1.0))
    folder.write(extrapolate=10e6)
    for size, factor in zip(folder.names, (1.0, 0.8, 0.6, 0.5), strict=True):
        found = tuning({"gqa": 0.002 * factor, "rgqa-k1": 0.003 * factor})
        (folder.folder(size) / "tuning.json").write_text(json.dumps(found))
    ladder_report(folder.out)
    return folder.out


def page_of(out: Path) -> str:
    assert ladder_report(out) == out / "report.html"
    return (out / "report.md").read_text().replace("\\", "")


def verdicts(page: str) -> dict[str, list[str]]:
    rows = page.split("| variant | advantage with size |")[1].split("\n\n")[0].splitlines()[2:]
    return {cells[0]: cells[1:] for cells in ([c.strip() for c in row.strip("|").split("|")] for row in rows)}


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open() as opened:
        return list(csv.DictReader(opened))


# ---------------------------------------------------------------- the answer


def test_the_smallest_and_the_largest_size_are_those_by_parameters(tmp_path, without_figures):
    folder = LadderFolder(tmp_path / "out", (3, 2, 2))
    before = verdicts(page_of(folder.write()))
    record = json.loads((folder.out / "ladder.json").read_text())
    (folder.out / "ladder.json").write_text(json.dumps(record | {"sizes": record["sizes"][::-1]}))
    after = verdicts(page_of(folder.out))
    assert {v: row[3:5] for v, row in after.items()} == {v: row[3:5] for v, row in before.items()}
    for size in ("small", "medium"):
        shutil.rmtree(folder.folder(size))
    for v, row in verdicts(page_of(folder.out)).items():
        assert row[3] == before[v][3] and row[4] == "not measured"


def falling(variant: str, params: float) -> float:
    """rgqa-k1 loses 0.02 nats with every tripling, from -0.03; rgqa-k2 gains as much, from +0.05."""
    steps = math.log(params / PARAMS[0], 3)
    return law("gqa", params) + {"gqa": 0.0, "rgqa-k1": -0.03 + 0.02 * steps, "rgqa-k2": 0.05 - 0.02 * steps}[variant]


def test_the_first_screen_answers_whether_the_advantage_falls_off(tmp_path, without_figures):
    page = page_of(LadderFolder(tmp_path / "out", (4, 3, 3, 2), loss=falling).write())
    per_doubling = 0.02 * math.log(2) / math.log(3)
    answer = lead(page)
    assert "Does the advantage over gqa fall off with size? Over 4 sizes from 100k to 2.7M parameters" in answer
    assert re.search(r"(Loses ground|loses ground|dvantage shrinks): rgqa-k1 \(-0\.01", answer)
    assert re.search(r"(gains ground|Gains ground|isadvantage shrinks): rgqa-k2 \(\+0\.01", answer)
    rows = verdicts(page)
    for name, sign in (("rgqa-k1", -1), ("rgqa-k2", 1)):
        value, low, high = map(float, re.findall(r"[+-]\d\.\d+", rows[name][1])[:3])
        assert value == pytest.approx(sign * per_doubling, abs=0.004) and low < value < high and low * high > 0
        assert float(rows[name][2].lstrip("< ")) < 0.05
    first = -0.03 + sum(noise("rgqa-k1", 0, s) - noise("gqa", 0, s) for s in range(1, 5)) / 4
    assert rows["rgqa-k1"][3].startswith(f"{first:+.4f} [")


def test_equal_variants_are_undecided(tmp_path, without_figures):
    page = page_of(LadderFolder(tmp_path / "out", (3, 3, 3), loss=lambda v, n: law("gqa", n)).write())
    assert "undecided: rgqa-k1 (" in lead(page) and "dvantage" not in lead(page).split("all at once")[-1].split("?")[-1]
    assert [row[0] for row in verdicts(page).values()] == ["undecided", "undecided"]


# ---------------------------------------------------------------- the numbers


def test_tables_have_the_losses_and_differences_of_each_size(whole):
    page = (whole / "report.md").read_text().replace("\\", "")
    losses = table(page, "Loss at each size")
    assert losses["parameters"] == ["100k", "300k", "900k", "2.7M"]
    seeds = (4, 3, 2, 2)
    for name in ("gqa", "rgqa-k2"):
        means = [
            law(name, PARAMS[i]) + sum(noise(name, i, s) for s in range(1, n + 1)) / n for i, n in enumerate(seeds)
        ]
        assert losses[name] == [f"{mean:.4f} ({n})" for mean, n in zip(means, seeds, strict=True)]
    study = read_ladder(whole)
    shown = table(page, "Difference to gqa at each size")["rgqa-k1"]
    for size, text in zip(study.sizes, shown, strict=True):
        assert size.study is not None
        found = size.study.comparison.differences["rgqa-k1"]
        assert text == f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def test_the_law_and_its_speed_ups_are_those_of_the_losses(whole):
    law_found = read_ladder(whole).result.by_params
    assert isinstance(law_found, Law)
    assert not law_found.a.excludes(0.3) and not law_found.e.excludes(2.0)
    page = (whole / "report.md").read_text().replace("\\", "")
    assert table(page, "The joint law")["exponent a"][0].startswith(f"{law_found.exponent:.3f} [")
    rows = [
        row
        for row in page.split("## Effective speed-up\n")[1].split("\n## ")[0].splitlines()
        if row.startswith("| rgqa-k1 ")
    ]
    assert [row.split("|")[2].strip() for row in rows] == ["tokens (measured)", "parameters", "training FLOPs"]
    value = float(rows[1].split("|")[7].split("x")[0])
    assert value == pytest.approx((1 + GAIN["rgqa-k1"]) ** (-1 / 0.3), rel=0.03)


def test_the_named_size_is_predicted_with_intervals(whole):
    page = (whole / "report.md").read_text().replace("\\", "")
    rows = table(page, "Prediction at a larger size")
    value, low, high = map(float, re.findall(r"\d\.\d+", rows["gqa"][0]))
    assert low < law("gqa", 10e6) < high and low < value < high
    one = list(map(float, re.findall(r"\d\.\d+", rows["gqa"][1])))
    assert one[1] <= low and one[2] >= high  # with the noise of a seed
    assert rows["gqa"][2:] == ["baseline"] * 3 and rows["rgqa-k1"][4].count(",") == 1


def test_csv_files_have_all_numbers(whole):
    cells = rows_of(whole / "cells.csv")
    assert len(cells) == 3 * (4 + 3 + 2 + 2)
    (cell,) = [c for c in cells if (c["size"], c["variant"], c["seed"]) == ("small", "rgqa-k1", "2")]
    assert float(cell["validation_loss_nats"]) == pytest.approx(law("rgqa-k1", PARAMS[1]) + noise("rgqa-k1", 1, 2))
    sizes = rows_of(whole / "report.csv")
    assert len(sizes) == 12 and {row["num_params"] for row in sizes} == {str(n) for n in PARAMS}
    fit = rows_of(whole / "fit.csv")
    quantities = {row["quantity"] for row in fit}
    assert {"exponent", "irreducible loss, nats", "loss at 1e+07", "difference_one_seed at 1e+07"} <= quantities
    assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in fit)


def test_the_page_links_to_the_report_of_each_size_and_has_its_figures(whole):
    page = (whole / "report.html").read_text()
    assert '<a href="sizes/medium/report.html">size medium</a>' in page
    assert "[size medium](sizes/medium/report.md)" in (whole / "report.md").read_text()
    for name in ("loss", "difference", "tuning-optimizer.lr"):
        assert (whole / f"{name}.png").stat().st_size > 10_000
    assert page.count("<figure") == 3 and page.count('class="chart-data"') == 3


def test_tuning_shows_what_was_tried_and_chosen(whole):
    page = (whole / "report.md").read_text()
    rows = [row for row in page.split("## Tuning\n")[1].splitlines() if row.startswith("| rgqa-k1 | small")]
    assert [cell.strip() for cell in rows[0].strip("|").split("|")][2:8] == [
        "`optimizer.lr`",
        "0.0024",
        "1.50x",
        "6",
        "1",
        "parabola through the best three",
    ]
    assert "6 (1 without a loss)" in page  # the diverged trial of gqa


@pytest.mark.parametrize("holds", [True, False])
def test_the_check_of_a_carried_value_is_told(tmp_path, without_figures, holds):
    folder = LadderFolder(tmp_path / "out")
    folder.write()
    (folder.folder("tiny") / "tuning.json").write_text(json.dumps(tuning({"gqa": 0.002})))
    carried = {"gqa": {"chosen": 0.002, "how": "that of tiny", "edge": False, "trials": []}}
    check = {"variant": "gqa", "holds": holds, "best": 0.004, "trials": []}
    found = {"format": 1, "keys": {"optimizer.lr": {"grid": [], "extended": 0, "variants": carried, "check": check}}}
    (folder.folder("medium") / "tuning.json").write_text(json.dumps(found))
    page = page_of(folder.out)
    limit = table(page, "What these numbers cannot say")["tuning"][0]
    assert f"checked: that of gqa at medium{'' if holds else ' (no: 0.004 is better)'}." in limit
    assert "At medium, the carried `optimizer.lr` of gqa was tried with both neighbours" in page
    assert ("0.004 is better" in page) is not holds


# ---------------------------------------------------------------- what is missing


def test_two_sizes_have_tables_and_no_trend(tmp_path, without_figures):
    page = page_of(LadderFolder(tmp_path / "out", (2, 2)).write(extrapolate=10e6))
    assert "No answer yet: gqa has finished runs at 2 sizes; a trend with lack of fit needs 3" in lead(page)
    assert verdicts(page)["rgqa-k1"][:2] == ["not measured", "not measured"]
    assert "Over parameters: not fitted." in page and "Not predicted." in page
    assert table(page, "Loss at each size")["gqa"][0].endswith(" (2)")


def test_a_size_that_was_not_begun_and_unfinished_cells_are_named(tmp_path, without_figures):
    folder = LadderFolder(tmp_path / "out", (3, 2, 2, 2))
    folder.write()
    for file in sorted(folder.folder("large").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    (folder.run_dir("medium", "rgqa-k1", 2) / "summary.json").unlink()
    page = page_of(folder.out)
    assert "| large | - | not begun |" in page and "| medium | 5 of 6 | 1 partial |" in page
    assert "Not begun: large." in page and "size large](" not in page
    assert table(page, "Loss at each size")["rgqa-k1"][2:] == [
        f"{law('rgqa-k1', PARAMS[2]) + noise('rgqa-k1', 2, 1):.4f} (1)",
        "not measured",
    ]
    assert "Over 3 sizes" in lead(page)


def test_a_variant_that_is_not_at_every_size_has_no_line(tmp_path, without_figures):
    folder = LadderFolder(tmp_path / "out", (2, 2, 2), variants_at={"medium": ["gqa", "rgqa-k2"]})
    page = page_of(folder.write())
    assert "No trend is measured for rgqa-k1, with finished runs at fewer than 3 sizes." in lead(page)
    assert "- rgqa-k1: it has finished runs at 2 of the sizes of gqa; a trend needs 3" in page
    assert verdicts(page)["rgqa-k1"][0] == "not measured" and verdicts(page)["rgqa-k1"][4] == "not planned"


def test_a_variant_of_one_size_has_no_numbers_by_the_law_but_those_of_its_size(tmp_path, without_figures):
    others = {size: ["gqa", "rgqa-k2"] for size in ("small", "medium")}
    folder = LadderFolder(tmp_path / "out", (2, 2, 2), variants_at=others)
    page = page_of(folder.write(extrapolate=3e6))
    assert "gqa: reducible loss in the middle" in page and "rgqa-k1: reducible loss in the middle" not in page
    assert "No numbers by the law for rgqa-k1: with finished runs at fewer than 3 sizes" in page
    rows = [row.split("|")[3:7] for row in page.splitlines() if row.startswith("| rgqa-k1 | parameters |")]
    ((at_tiny, *missing, over_all),) = [[cell.strip() for cell in row] for row in rows]
    assert re.fullmatch(r"\d\.\d+x \[.*\]", at_tiny) and missing == ["not planned"] * 2 and over_all == "not measured"
    assert table(page, "Prediction at a larger size")["rgqa-k1"] == ["not measured"] * 5
    found = {row["quantity"] for row in rows_of(folder.out / "fit.csv") if row["variant"] == "rgqa-k1" and row["value"]}
    assert found == {"effective speed-up at tiny"}


def test_a_size_of_one_seed_has_no_interval_in_any_table(tmp_path, without_figures):
    page = page_of(LadderFolder(tmp_path / "out", (3, 2, 1)).write())
    for heading, cell in (("Difference to gqa at each size", 2), ("Effective speed-up", 4)):
        rows = [r.split("|")[1:-1] for r in page.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()]
        shown = [r[-1 if cell == 2 else cell].strip() for r in rows if r and r[0].strip() in ("rgqa-k1", "rgqa-k2")]
        assert [text for text in shown if text != "not measured"], heading
        assert all(text == "not measured" or text.endswith("(no interval)") for text in shown), heading
    limit = table(page, "What these numbers cannot say")["noise of a run"][0]
    assert limit.endswith("; medium has no second seed to estimate it from, and has that of the others")
    study = read_ladder(tmp_path / "out").sizes[0].study
    assert study is not None and f"tiny {study.comparison.spread:.4f} (4), small " in limit


def test_a_size_whose_variants_read_other_data_is_left_out(tmp_path, without_figures):
    folder = LadderFolder(tmp_path / "out", (2, 2, 2, 2))
    folder.write()
    file = folder.run_dir("small", "rgqa-k1", 1) / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    changed = [line | ({"batch_hash": "f" * 16} if line["kind"] == "train" else {}) for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in changed))
    page = page_of(folder.out)
    assert "Size small is not in the statistics of the ladder: its variants did not read the same data" in page
    assert "Over 3 sizes" in lead(page)


def test_a_named_size_that_is_too_far_is_not_predicted(tmp_path, without_figures):
    page = page_of(LadderFolder(tmp_path / "out", (2, 2, 2)).write(extrapolate=1e9))
    assert "Not predicted: 1B is 1111 times the largest size" in page


def test_a_ladder_without_a_named_size_says_how_to_name_one(tmp_path, without_figures):
    page = page_of(LadderFolder(tmp_path / "out", (2, 2, 2)).write())
    assert "No size is named: `extrapolate: 25e6` in the study" in page and "## Tuning" not in page
    assert "nothing was tuned" in page


@pytest.mark.parametrize("record", [None, {"format": 2}])
def test_a_folder_without_a_ladder_is_refused(tmp_path, record: Any):
    if record is not None:
        (tmp_path / "ladder.json").write_text(json.dumps(record))
    with pytest.raises(SpecError, match=r"has no readable ladder\.json; run the study"):
        ladder_report(tmp_path)


def test_a_ladder_without_a_begun_size_is_refused(tmp_path):
    sizes = [{"name": "tiny", "folder": "sizes/tiny"}]
    record = {"format": 1, "sizes": sizes, "variants": ["gqa"], "baseline": "gqa"}
    (tmp_path / "ladder.json").write_text(json.dumps(record))
    with pytest.raises(SpecError, match="no size was begun"):
        ladder_report(tmp_path)


def test_a_figure_of_a_ladder_without_a_law_has_losses_only(tmp_path):
    out = LadderFolder(tmp_path / "out", (2, 2)).write()
    ladder_report(out)
    page = (out / "report.html").read_text()
    assert "Lines: the joint law" not in page and page.count("<figure") == 2


# ---------------------------------------------------------------- limits


def test_limits_say_how_values_were_tuned_and_what_was_not_tried(tmp_path, without_figures):
    folder = LadderFolder(tmp_path / "out", (2, 2, 2))
    folder.write()
    found = tuning({"gqa": 0.002, "rgqa-k1": 0.003})
    found["keys"]["optimizer.lr"]["budget"] = 0.5
    (folder.folder("tiny") / "tuning.json").write_text(json.dumps(found))
    carried = {"chosen": 0.001, "how": "that of tiny x width 64/96", "edge": False, "trials": []}
    key: dict[str, Any] = {"grid": [], "extended": 0, "variants": {"gqa": carried, "rgqa-k1": carried}}
    (folder.folder("small") / "tuning.json").write_text(json.dumps({"format": 1, "keys": {"optimizer.lr": key}}))
    limits = table(page_of(folder.out), "What these numbers cannot say")
    assert limits["tuning"][0].startswith("`optimizer.lr`: chosen at tiny from trials of 2 seeds and 50% of the tokens")
    assert "Carried to small by a rule; checked: none yet." in limits["tuning"][0]
    key["check"] = {"variant": "gqa", "holds": True, "best": 0.001}
    (folder.folder("small") / "tuning.json").write_text(json.dumps({"format": 1, "keys": {"optimizer.lr": key}}))
    limits = table(page_of(folder.out), "What these numbers cannot say")
    assert "checked: that of gqa at small." in limits["tuning"][0]
    assert "not for all sizes, tables and questions at once" in limits["several statements"][0]
    assert limits["scale"][0].startswith("sequences of 100 tokens; a vocabulary of 512")


def test_an_unfinished_ladder_says_that_intervals_are_for_one_look(tmp_path, without_figures):
    folder = LadderFolder(tmp_path / "out", (2, 2, 2))
    assert "for one look" not in page_of(folder.write())
    shutil.rmtree(folder.run_dir("medium", "rgqa-k1", 2))
    assert "Intervals are right for one look at the data" in page_of(folder.out)


def test_losses_of_a_ladder_of_pairs_are_per_target_token(tmp_path, without_figures):
    folder = LadderFolder(tmp_path / "out", (2, 2, 2))
    assert "loss in nats per token" in page_of(folder.write())
    for name in folder.names:
        file = folder.folder(name) / "study.json"
        file.write_text(file.read_text().replace('"data": {', '"data": {"source": {"type": "pairs"}, '))
    page = page_of(folder.out)
    assert "loss in nats per target token" in page and "nats per token" not in page


def test_tokens_per_parameter_are_those_at_which_losses_are_compared(tmp_path, without_figures):
    folder = LadderFolder(tmp_path / "out", (2, 2, 2))
    assert "900k parameters at 0.044 to 0.4 tokens per parameter, in nats" in lead(page_of(folder.write()))
    for i, name in enumerate(folder.names):  # 40,000 tokens at every size
        file = folder.folder(name) / "study.json"
        file.write_text(file.read_text().replace(f'"num_params": {PARAMS[i]}', f'"num_params": {4000 + 50 * i}'))
    assert "4.1k parameters at 10 tokens per parameter, in nats" in lead(page_of(folder.out))


def test_a_size_whose_runs_do_not_all_end_where_losses_are_compared_says_so(tmp_path, without_figures):
    folder = LadderFolder(tmp_path / "out", (2, 2, 2))
    assert "end of training" not in page_of(folder.write())
    run = folder.run_dir("small", "rgqa-k1", 1)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= 36))
    change_summary(run, steps=36, tokens=36_000)
    folder.change_loss(run, 3.0)
    limits = table(page_of(folder.out), "What these numbers cannot say")
    assert limits["end of training"][0].startswith("small: not all runs end where losses are compared")


def test_limits_have_the_matching_and_the_validation_text(tmp_path, without_figures):
    limits = table(page_of(LadderFolder(tmp_path / "out", (2, 2, 2)).write()), "What these numbers cannot say")
    each = "; ".join(f"{name}: parameters matched within 0.25%" for name in ("tiny", "small", "medium"))
    assert limits["matching"][0] == f"{each}. What is left of a difference in parameters is in no interval"
    assert limits["validation text"][0].startswith(
        "5,000 predicted tokens at tiny (8 documents), the same in all its runs: the standard error of a loss is 0.0200"
    )


def test_confounds_of_the_sizes_are_on_the_first_screen(tmp_path, without_figures):
    folder = LadderFolder(tmp_path / "out", (2, 2, 2))
    assert "onfound" not in page_of(folder.write()).split("###")[0]
    card = folder.run_dir("small", "rgqa-k1", 1) / "run.json"
    card.write_text(card.read_text().replace("abc123", "def456"))
    tiny = StudyFolder(folder.folder("tiny"), folder.variants, [1, 2])
    for variant, ratio in (("gqa", 0.3), ("rgqa-k2", 0.5)):
        with_start(tiny, variant, ratio)
    first = page_of(folder.out).split("**Does the advantage")[0]
    assert "Confounds: 1 at small; the reports of these sizes list them" in first
    assert "Size tiny: CONFOUNDED by how strongly attention starts: rgqa-k2 (attention of layer" in first


def test_questions_are_answered_at_every_size_that_asks_them(tmp_path, without_figures):
    def better(variant: str, params: float) -> float:
        return law("gqa", params) - (0.1 if variant == "rgqa-k2" else 0.0)

    folder = LadderFolder(tmp_path / "out", (3, 2, 1, 2), loss=better)
    assert "stated before the first run" not in page_of(folder.write())
    for name in ("tiny", "small", "medium", "large"):
        file = folder.folder(name) / "study.json"
        asks = ["rgqa-k2 is better than gqa", *(["rgqa-k1 is better than gqa"] if name in ("tiny", "small") else [])]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"asks": asks}))
    for seed in (1, 2):
        (folder.run_dir("small", "rgqa-k1", seed) / "summary.json").unlink()
    shutil.rmtree(folder.folder("large"))
    page = page_of(folder.out)
    rows = page.split("| question, stated before the first run |")[1].split("\n\n")[0].splitlines()[2:]
    cells = {row[0]: row[1:] for row in ([c.strip() for c in r.strip("|").split("|")] for r in rows)}
    shown = table(page, "Difference to gqa at each size")["rgqa-k2"]
    assert cells["rgqa-k2 is better than gqa"] == [
        f"yes: {shown[0]}",
        f"yes: {shown[1]}",
        f"undecided: {shown[2]}",
        "not begun",
    ]
    assert shown[2].endswith("(no interval)")
    assert cells["rgqa-k1 is better than gqa"][1:] == ["no finished runs", "not asked", "not begun"]
    assert "if nothing differs at any of 4 sizes, the chance that one of them claims a difference is up to 19%" in page
    for name, finished in (("tiny", 5), ("small", 1)):
        file = folder.folder(name) / "study.json"
        late = {"asked_later": {"rgqa-k1 is better than gqa": finished}}
        file.write_text(json.dumps(json.loads(file.read_text()) | late))
    page = page_of(folder.out)
    assert "question, stated before" not in page
    assert "| rgqa-k1 is better than gqa (stated late: 6 runs had finished) |" in page
    assert "| rgqa-k2 is better than gqa (stated before the first run) |" in page


def test_values_on_an_edge_are_named_also_where_they_were_carried(tmp_path, without_figures):
    folder = LadderFolder(tmp_path / "out", (2, 2, 2))
    folder.write()
    found = tuning({"gqa": 0.002, "rgqa-k1": 0.004})
    (folder.folder("tiny") / "tuning.json").write_text(json.dumps(found))
    assert "an edge" not in page_of(folder.out)
    at = found["keys"]["optimizer.lr"]["variants"]["rgqa-k1"]
    at |= {"edge": True, "how": "the highest value tried; the optimum may lie beyond it"}
    (folder.folder("tiny") / "tuning.json").write_text(json.dumps(found))
    carried = {
        v: {"chosen": 0.001, "how": "that of tiny", "edge": v != "gqa", "trials": []} for v in ("gqa", "rgqa-k1")
    }
    key = {"grid": [], "extended": 0, "variants": carried}
    (folder.folder("small") / "tuning.json").write_text(json.dumps({"format": 1, "keys": {"optimizer.lr": key}}))
    page = page_of(folder.out)
    assert "**The best `optimizer.lr` lies on an edge of the values tried: rgqa-k1 at tiny." in page
    limit = table(page, "What these numbers cannot say")["tuning"][0]
    assert (
        "On an edge of the values tried, beyond which a better one may lie: rgqa-k1 at tiny. Carried to small" in limit
    )
    costs = {r.split("|")[1].strip(): r.split("|")[9].strip() for r in page.splitlines() if "| tiny | `opt" in r}
    cost = 0.05 * math.log(2) ** 2
    assert costs == {"gqa": "a neighbour diverged", "rgqa-k1": f"{cost:+.4f} (one side)"}


def test_a_size_without_a_finished_run_is_called_that(tmp_path, without_figures):
    folder = LadderFolder(tmp_path / "out", (2, 2, 2))
    folder.write()
    for file in folder.folder("medium").glob("cells/*/*/summary.json"):
        file.unlink()
    page = page_of(folder.out)
    assert "Size medium is not in the statistics of the ladder: no run has finished there." in page
    assert "| difference at tiny | at small |" in page
