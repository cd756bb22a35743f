"""README.md of an export has the numbers of the run and of its study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from study_folders import STEPS, TOKENS_PER_STEP, StudyFolder, change_summary
from untrained_runs import untrained_run

from headway.launcher.cli.main import main
from headway.launcher.compare.analyse import analyse
from headway.launcher.compare.findings import bits_per_byte, signed_interval

RGQA = {"type": "rgqa", "heads": 8, "kv_heads": 2, "head_dim": 6, "top_k": 1}


def rows(page: str) -> dict[str, list[str]]:
    """First cell -> others, of all rows of tables."""
    lines = [line.strip("|").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def card(run: Path, out: Path, to: str = "hf") -> str:
    assert main(["export", str(run), str(out), "--to", to]) == 0
    return (out / "README.md").read_text()


def put_weights(run: Path) -> None:
    """Put a spec and a checkpoint into the folder of a run whose records are made up."""
    untrained_run(run, step=STEPS, tokens=STEPS * TOKENS_PER_STEP, attention=RGQA)


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    """Two variants and three seeds; `rgqa-k1/seed-2` can be exported."""
    folder = StudyFolder(tmp_path / "study", ["gqa", "rgqa-k1"], [1, 2, 3])
    folder.write()
    put_weights(folder.run_dir("rgqa-k1", 2))
    return folder


def test_a_cell_shows_its_variant_beside_the_baseline(study: StudyFolder, tmp_path: Path) -> None:
    page = card(study.run_dir("rgqa-k1", 2), tmp_path / "out")
    result = analyse(study.out)
    variant = next(v for v in result.variants if v.name == "rgqa-k1")
    assert variant.difference is not None and variant.difference.low is not None and variant.loss is not None
    assert "## In the study demo" in page and "Variant rgqa-k1, seed 2." in page and "pairing PAIRED" in page
    loss = f"{variant.loss.mean:.4f} [{variant.loss.low:.4f}, {variant.loss.high:.4f}]"
    found = rows(page)
    expected = [result.verdict(variant), "3", loss, signed_interval(variant.difference)]
    assert found["rgqa-k1 (these weights)"] == expected
    assert found["gqa"][0] == found["gqa"][3] == "baseline" and found["gqa"][1] == "3"


def test_the_card_has_the_facts_of_the_run(study: StudyFolder, tmp_path: Path) -> None:
    run = study.run_dir("rgqa-k1", 2)
    page = card(run, tmp_path / "out")
    found = {name: cells[0] for name, cells in rows(page).items()}
    validations = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = [record for record in validations if record["kind"] == "validation"][-1]["loss"]
    per_byte = bits_per_byte(loss, 3.0)
    # a synthetic task predicts its answers alone
    assert found["validation loss"] == f"{loss:.4f} nats per target token, {per_byte:.4f} bits per byte"
    assert found["attention"] == "rgqa (head_dim 6, heads 8, kv_heads 2, top_k 1)"
    assert found["training tokens"].startswith("40,000 of ") and found["data"] == "synthetic, mqar"
    assert found["fingerprint of the data"] == "f" * 64 and found["trained with"] == "headway 0.1.0, torch 2"
    assert found["licence"].startswith("not stated: name one here")
    assert page.startswith("---\nlibrary_name: transformers\n") and "- rgqa\n" in page
    assert "import headway.hf" in page and "AutoModelForCausalLM.from_pretrained" in page
    assert str(tmp_path) not in page  # nothing of this machine


def test_an_older_validation_is_marked_and_sets_have_their_own(tmp_path: Path) -> None:
    run = untrained_run(tmp_path / "run", step=40, attention=RGQA)
    sets = {"books": {"loss": 2.0, "loss_low": 1.75, "loss_high": 2.25, "documents": 1200}, "code": {"loss": 1.0}}
    lines = [
        {"kind": "validation", "step": 30, "loss": 1.5, "sets": sets},
        {"kind": "train", "step": 35, "loss": 9.0},
        {"kind": "validation", "step": 50, "loss": 0.5},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {"books": {"bytes_per_token": 4.0}, "code": {"bytes_per_token": None}}
    (run / "run.json").write_text(json.dumps({"validation_sets": facts}))
    page = card(run, tmp_path / "out", "safetensors")
    found = {name: cells[0] for name, cells in rows(page).items()}
    assert found["validation loss"] == "1.5000 nats per target token, at step 30"
    books = f"2.0000 nats, {bits_per_byte(2.0, 4.0):.4f} bits per byte"
    interval = "(95 % interval over 1,200 documents: 1.7500 to 2.2500 nats)"
    assert found["validation loss, books"] == f"{books} {interval}, at step 30"
    assert found["validation loss, code"] == "1.0000 nats, at step 30"
    assert "## In the study" not in page and "load_exported" in page


def test_a_study_that_cannot_be_read_is_named_and_left_out(
    study: StudyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = study.out / "study.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    page = card(study.run_dir("rgqa-k1", 2), tmp_path / "out")
    assert "## In the study" not in page and "validation loss" in page
    assert "README.md lacks the numbers of the study" in capsys.readouterr().err


def test_losses_of_a_damaged_run_are_left_out(
    study: StudyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = study.run_dir("rgqa-k1", 2)
    change_summary(run, final_validation_loss=1.0)
    assert "validation loss" not in rows(card(run, tmp_path / "out"))
    assert "README.md lacks the losses of the run: the last validation loss is" in capsys.readouterr().err
