"""The context of the numbers: epochs, noise, and how steadily the variants trained."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from study_folders import CLIPPED, STEPS, StudyFolder, loss_at, table, text

from headway.launcher.compare.analyse import analyse
from headway.launcher.compare.context import context_of
from headway.launcher.compare.simultaneous import compare_paired


def change(folder: StudyFolder, variant: str, seed: int, how: Callable[[dict[str, Any]], Any]) -> None:
    """Change every record of a run with `how`."""
    file = folder.run_dir(variant, seed) / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        how(record)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def add(folder: StudyFolder, variant: str, seed: int, *records: dict[str, Any]) -> None:
    file = folder.run_dir(variant, seed) / "metrics.jsonl"
    file.write_text(file.read_text() + "".join(json.dumps(record) + "\n" for record in records))


def without(*keys: str) -> Callable[[dict[str, Any]], Any]:
    return lambda record: [record.pop(key, None) for key in keys]


def second_table(page: str) -> dict[str, list[str]]:
    return table("## Steps\n" + page.split("## Context\n")[1].split("Steps of all seeds")[1], "Steps")


def test_epochs_are_tokens_of_a_run_over_tokens_of_the_dataset(small):
    assert (
        "40,000 tokens of a dataset of 16,000: 2.5 epochs" in table(text(small.write()), "Context")["training data"][0]
    )


def test_noise_of_the_repeated_baseline_is_its_spread_and_that_of_a_pair(small):
    page = text(small.write())
    sd = float(np.std([loss_at("gqa", s, 1.0) for s in (1, 2)], ddof=1))
    (row,) = table(page, "Context")["noise of gqa repeated"]
    assert f"standard deviation {sd:.4f} nats per token over 2 seeds" in row
    assert f"differ by a standard deviation of {math.sqrt(2) * sd:.4f}" in row
    losses = {v: {s: loss_at(v, s, 1.0) for s in (1, 2)} for v in small.variants}
    pooled = compare_paired(losses, "gqa").spread
    assert pooled is not None
    assert f"paired difference of one seed, pooled over variants: {math.sqrt(2) * pooled:.4f}" in row
    small.seeds = [1]
    small.write_study()
    assert "not measured: one seed" in text(small.out)


def test_clipped_steps_spikes_and_skipped_steps_are_counted_over_seeds(small):
    small.write()
    add(small, "rgqa-k2", 2, {"kind": "spike", "step": 7, "loss": 9.0}, {"kind": "spike", "step": 9, "loss": 9.0})
    change(small, "rgqa-k2", 1, lambda r: r.update(skipped=True) if r["kind"] == "train" and r["step"] == 3 else None)
    rows = second_table(text(small.out))
    share = f"{CLIPPED / STEPS:.1%}"
    assert rows["gqa"] == [f"{2 * STEPS}", f"{2 * CLIPPED}", share, "1", "0", "0"]
    assert rows["rgqa-k2"] == [f"{2 * STEPS}", f"{2 * CLIPPED}", share, "1", "2", "1"]


def test_a_spike_whose_step_was_repeated_counts_once(small):
    small.write()
    add(small, "gqa", 1, {"kind": "spike", "step": 7, "loss": 9.0}, {"kind": "spike", "step": 7, "loss": 9.1})
    assert context_of(analyse(small.out)).steadiness["gqa"].spikes == 1


def test_validation_noise_and_the_tokens_that_make_it_small(small):
    small.seeds = [1, 2, 3]
    page, result = text(small.write()), analyse(small.out)
    losses = {v: {s: loss_at(v, s, 1.0) for s in (1, 2, 3)} for v in small.variants}
    spread = compare_paired(losses, "gqa").spread
    assert spread is not None
    needed = math.ceil(5000 * (0.02 / (0.1 * spread)) ** 2)
    noise = context_of(result).validation
    assert noise is not None and noise.needed_tokens == pytest.approx(needed, abs=1)
    (row,) = table(page, "Context")["noise of validation"]
    assert "standard error 0.0200 nats per token from 5,000 validation tokens (8 documents)" in row
    assert f"{noise.needed_tokens:,} validation tokens would make it 10% of the spread of a run ({spread:.4f})" in row
    assert row.endswith("; a difference needs fewer")


def test_older_records_are_shown_as_not_recorded(small):
    small.write()
    for variant in small.variants:
        for seed in small.seeds:
            change(small, variant, seed, without("grad_norm", "standard_error", "documents", "skipped"))
            file = small.run_dir(variant, seed) / "run.json"
            run = json.loads(file.read_text())
            del run["train_tokens_of_data"]
            file.write_text(json.dumps(run))
    record = json.loads((small.out / "study.json").read_text())
    for cell in record["cells"]:
        del cell["spec"]["guard"]
    (small.out / "study.json").write_text(json.dumps(record))
    page = text(small.out)
    rows = table(page, "Context")
    assert rows["training data"] == ["40,000 tokens; size not recorded"]
    assert rows["noise of validation"] == ["not recorded"]
    assert second_table(page)["gqa"] == ["80", "not recorded", "-", "1", "not watched", "0"]


def test_a_study_without_a_finished_run_has_no_context(small):
    small.write_study()
    assert "## Context" not in text(small.out)
