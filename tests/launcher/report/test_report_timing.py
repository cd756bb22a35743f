"""Speeds of a report: those of cells that trained alone, else those of the timing part, else none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from study_folders import STEP_S, TOKENS_PER_STEP, StudyFolder, spec_of, table, text

from headway.launcher.compare.analyse import analyse
from headway.launcher.compare.findings import measured_speed_holds_for
from headway.launcher.compare.timing import speed_key
from headway.launcher.report.plots.effective import points_of

VARIANTS, SEEDS = ["gqa", "rgqa-k1"], [1, 2]
ALONE = {"gqa": [0.20, 0.21, 0.19], "rgqa-k1": [0.10, 0.105, 0.095]}
"""Seconds of a step alone: rgqa-k1 is twice as fast. In the cells, it takes 0.08 s instead of 0.10 s."""


@pytest.fixture
def folder(tmp_path) -> StudyFolder:
    made = StudyFolder(tmp_path / "demo", VARIANTS, SEEDS, (0.25, 1.0))
    made.write()
    return made


def beside(folder: StudyFolder, *numbers: int) -> None:
    """Record how many cells ran beside the four full runs."""
    keys = [f"{v}/seed-{s}" for s in SEEDS for v in VARIANTS]
    outcomes = {key: {"exit_code": 0, "beside": n} for key, n in zip(keys, numbers, strict=True)}
    (folder.out / "outcomes.json").write_text(json.dumps(outcomes))


def time(folder: StudyFolder, variants: list[str], **changed) -> None:
    found = {
        name: {
            "spec": speed_key(spec_of(name, SEEDS[0]) | changed),
            "tokens_per_step": TOKENS_PER_STEP,
            "step_s": ALONE[name],
        }
        for name in variants
    }
    (folder.out / "timing.json").write_text(json.dumps({"format": 1, "variants": found}))


def section(page: str, heading: str) -> str:
    return page.split(f"## {heading}\n")[1].split("\n## ")[0]


def test_cells_that_trained_alone_give_the_speeds_themselves(folder):
    time(folder, VARIANTS)  # left from an earlier state of the study
    beside(folder, 0, 0, 0, 0)
    result = analyse(folder.out)
    assert result.speeds.source == "cells"
    ratio = result.others[0].speed_ratio
    assert ratio and ratio.mean == pytest.approx(STEP_S["gqa"] / STEP_S["rgqa-k1"])


def test_beside_other_cells_the_speeds_are_those_of_the_timing_part(folder):
    time(folder, VARIANTS)
    beside(folder, 1, 1, 1, 0)
    result = analyse(folder.out)
    (variant,) = result.others
    assert result.speeds.source == "timing" and result.speeds.rounds == 3
    assert variant.speed_ratio and variant.speed_ratio.mean == pytest.approx(2) and variant.speed_ratio.n == 3
    assert variant.effective and variant.effective.tokens and variant.effective.seconds
    assert variant.effective.seconds.value == pytest.approx(2 * variant.effective.tokens.value)
    assert points_of(result)["gqa"][-1].seconds == pytest.approx(40 * 0.20)
    page = text(folder.out)
    said = "Cells trained beside up to 1 other, so their own speeds are not compared. Speeds were taken afterwards from"
    assert said in section(page, "Is the comparison fair?") and said in section(page, "Training speed")
    row = table(page, "Training speed")["rgqa-k1"]
    assert row[0] == "10,000" and row[2].startswith("2.000")
    assert "Variants took turns step by step" in page and "Runs ran one after another" not in page


def test_the_machine_of_the_timing_part_is_named_and_not_that_of_the_cells(folder):
    time(folder, VARIANTS)
    beside(folder, 1, 1, 1, 1)
    path = folder.out / "timing.json"
    timed = json.loads(path.read_text())
    timed |= {"machine": {"cpu": "Another CPU", "cores": 96}, "versions": {"headway": "0.2.0", "torch": "9.1"}}
    path.write_text(json.dumps(timed))
    for run in folder.out.glob("cells/*/*/run.json"):
        card = json.loads(run.read_text())
        run.write_text(json.dumps(card | {"machine": {"cpu": "The CPU of the cells", "cores": 2}}))
    said = measured_speed_holds_for(analyse(folder.out))
    assert said.startswith("measured on Another CPU with 96 cores, by this implementation (headway 0.2.0, torch 9.1)")
    beside(folder, 0, 0, 0, 0)  # then the steps of the cells count
    assert measured_speed_holds_for(analyse(folder.out)).startswith("measured on The CPU of the cells with 2 cores")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda folder: None, "the variants were not timed alone"),
        (lambda folder: time(folder, ["gqa"]), "rgqa-k1 not timed alone"),
        (lambda folder: time(folder, VARIANTS, train={"tokens": 1}), "gqa, rgqa-k1 not timed alone"),  # another spec
        (lambda folder: Path(folder.out / "timing.json").write_text("{"), "the variants were not timed alone"),
    ],
)
def test_without_timing_no_speed_is_quoted(folder, make, why):
    beside(folder, 3, 0, 0, 0)
    make(folder)
    result = analyse(folder.out)
    (variant,) = result.others
    assert result.speeds.source == "missing" and result.speeds.why == why
    assert variant.speed_ratio is None and variant.effective and variant.effective.tokens
    assert variant.effective.seconds is None


def test_a_report_without_timing_says_that_speeds_were_taken_beside_other_cells(folder):
    beside(folder, 3, 0, 0, 0)
    page = text(folder.out)
    said = "Speeds were taken beside other cells, which share caches and memory bandwidth, and are not compared"
    assert f"Speed: {said}" in section(page, "Is the comparison fair?")
    assert section(page, "Training speed").strip().startswith(f"Not measured. {said}")
    assert "cells trained beside up to 3 others, and the variants were not timed alone." in page
    verdicts = next(line for line in page.splitlines() if line.startswith("| rgqa-k1 |"))
    assert verdicts.count("not measured") == 2  # tokens/s, and effective speed-up by seconds
    assert "training seconds" not in (folder.out / "loss.svg").read_text()
