"""The top of a report: the finding, the table of verdicts and the answers to questions."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from ladder_folders import LadderFolder
from study_folders import GAIN, StudyFolder, change_record, first_table, lead, table, text, with_start

from headway.launcher.compare import findings
from headway.launcher.compare.analyse import analyse
from headway.launcher.report.study import report


def test_the_headline_says_which_variant_is_better_and_by_how_much(full):
    finding = lead((full / "report.md").read_text())
    assert "After 40,000 training tokens, at parameters matched within 0.25%, over 3 seeds" in finding
    assert "1 variant has a lower validation loss than gqa: rgqa-k2 -0.0240 \u00b1 " in finding
    assert "2 variants have a higher validation loss than gqa: " in finding and "rgqa-k1 +0.0260 \u00b1 " in finding


def test_the_first_table_has_a_verdict_for_each_variant(full):
    page = (full / "report.md").read_text()
    rows = first_table(page)
    assert {name: row[0] for name, row in rows.items()} == {
        "gqa": "baseline",
        "rgqa-k1": "worse",
        "rgqa-k2": "better",
        "switchhead": "worse",
    }
    assert rows["rgqa-k2"][1].startswith("-0.0240 \\[-0.0")
    assert rows["rgqa-k1"][2:] == ["not measured", "not measured", "1.25x", "512", "not recorded", "not recorded"]
    assert page.index("| variant | verdict |") < page.index("What these numbers cannot say")


def test_missing_cells_show_in_the_number_of_seeds(small):
    small.write()
    for name in ("gqa", "rgqa-k2"):
        small.write_run(name, 3)
    small.seeds.append(3)
    small.write_study()
    assert "over 3 seeds, with" in lead(text(small.out))
    shutil.rmtree(small.run_dir("gqa", 3))
    page = text(small.out)
    assert "over 2 seeds, with" in lead(page)  # those that variant and baseline share
    n, *_, difference, _, _, _ = table(page, "Loss at equal tokens")["rgqa-k2"]
    assert n == "3" and difference.endswith("(2 common seeds)")
    assert "common" not in table(page, "Loss at equal tokens")["gqa"][3]


@pytest.mark.parametrize(("ratio", "marked"), [(0.30, False), (0.328, False), (0.335, True), (0.27, True), (0.0, True)])
def test_a_branch_that_starts_more_than_ten_percent_differently_is_a_confound(small, ratio, marked):
    small.write()
    with_start(small, "gqa", 0.3)
    with_start(small, "rgqa-k2", ratio)
    page = text(small.out)
    row = first_table(page)["rgqa-k2"]
    assert row[6:] == [f"{ratio:.3f}", "0.300"]
    assert row[0].endswith(" CONFOUNDED") == marked
    assert ("CONFOUNDED by how strongly attention starts: rgqa-k2 (attention of layer" in lead(page)) == marked


def test_a_margin_makes_small_differences_equivalent(full, tmp_path):
    folder = StudyFolder(tmp_path / "demo", list(GAIN), [1, 2, 3])
    folder.write()
    change_record(folder, margin_nats=0.05)
    result = analyse(folder.out)
    assert {v.name: result.verdict(v) for v in result.others} == dict.fromkeys(list(GAIN)[1:], "equivalent")
    assert "within 0.05 nats per token" in findings.headline(result)[1]


def test_questions_of_the_study_are_answered(small):
    small.write()
    asks = ["rgqa-k2 is better than gqa", "rgqa-k2 is not worse than gqa by more than 0.01"]
    change_record(small, asks=asks)
    page = text(small.out)
    rows = [line for line in page.splitlines() if line.startswith("| rgqa-k2 is")]
    assert [row.split("|")[2].strip() for row in rows] == ["yes", "yes"]


def test_losses_of_pairs_are_per_target_token_in_text_and_figures(tmp_path):
    folder = StudyFolder(tmp_path / "pairs", ["gqa", "rgqa-k2"], [1, 2], (0.5, 1.0))
    folder.write()
    change_record(folder, margin_nats=0.05)
    for file in (folder.out / "study.json", *folder.out.glob("cells/*/*/spec.json")):
        written = file.read_text().replace('"data": {', '"data": {"source": {"type": "pairs", "path": "a"}, ')
        assert json.loads(written) != json.loads(file.read_text())
        file.write_text(written)
    page = report(folder.out).read_text().replace("The unigram entropy of the validation text, 5.20 nats per token", "")
    assert "(nats per token)" not in page and "nats per token" not in page.replace("nats per token<br>", "")
    for words in ("loss (nats per target token)", "in nats per target token after", "0.05 nats per target token"):
        assert words in page, words


def limit(page: str, name: str) -> str:
    return table(page, "What these numbers cannot say")[name][0]


@pytest.mark.parametrize(
    ("noise", "narrow"),
    [
        ({"gqa": (0, 0, 0), "rgqa-k1": (0.01, -0.01, 0), "rgqa-k2": (-0.01, 0.01, 0)}, False),
        ({"gqa": (0.01, -0.01, 0), "rgqa-k1": (0.001, 0, -0.001), "rgqa-k2": (-0.001, 0, 0.001)}, True),
    ],
)
def test_own_errors_of_differences_stand_beside_the_pooled_one(tmp_path, small, noise, narrow):
    folder = StudyFolder(tmp_path / "three", list(noise), [1, 2, 3])
    folder.write()
    for variant, found in noise.items():
        for seed, value in zip(folder.seeds, found, strict=True):
            LadderFolder.change_loss(folder.run_dir(variant, seed), 3.5 + value)
    shown, result = limit(text(folder.out), "errors of differences"), analyse(folder.out)
    pooled = result.others[0].difference
    assert pooled is not None and pooled.standard_error is not None
    base = np.array(noise["gqa"])
    own = [float(np.std(np.array(noise[v.name]) - base, ddof=1)) / math.sqrt(3) for v in result.others]
    span = f"{min(own):.4f}" + (f" to {max(own):.4f}" if max(own) > min(own) + 5e-5 else "")
    assert shown.startswith(f"{span} by the seeds of each difference alone, {pooled.standard_error:.4f} by the pooled")
    assert ("may be too narrow" in shown) == (min(own) > pooled.standard_error) == narrow


def test_two_seeds_show_no_own_errors(small):
    assert "errors of differences" not in text(small.write())


def test_limits_name_the_validation_text_and_the_shape(small):
    small.write()
    card = {"cost": {"flops_per_token_attention_core": 25.0, "flops_per_token_useful": 100.0}}
    for file in small.out.glob("cells/*/*/run.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | card))
    page = text(small.out)
    assert limit(page, "validation text").startswith("5,000 predicted tokens (8 documents), the same in all runs")
    assert "sequences of 100 tokens, where the attention core has 25% of gqa's FLOPs; a vocabulary of 512" in limit(
        page, "scale"
    )
