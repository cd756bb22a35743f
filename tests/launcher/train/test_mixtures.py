"""A mixture of three datasets through the command line: equal batches on every layout, and a loss for each dataset."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from run_folders import records

from headway.launcher.base.intervals import t_critical

WORDS = {
    "wiki": "the of and in is born city river",
    "books": "she he said was had eyes door",
    "code": "def self ( ) : = [",
}
LAYOUTS = {
    "one": ["launch.processes=1"],
    "two": ["launch.processes=2", "train.micro_batch=1"],
    "four": ["launch.processes=4", "parallel.tensor=2", "train.micro_batch=4"],
}
MIX = (
    "data.source={type: mix, sources: [{path: datasets/wiki, weight: 2}, {path: datasets/books, weight: 1},"
    " {path: datasets/code, weight: 1}], stages: [{from_tokens: 2560, weights: [0, 1, 1]}]}"
)
TRAIN = [MIX, "train.tokens=5120", "train.validate_every_tokens=2560", "train.validation_tokens=1280"]
NAMES = ["wiki", "books", "code"]


@pytest.fixture(scope="module")
def folder(headway_once) -> Path:
    tokenizer = "tokenizer={type: train_bpe, vocab_size: 280}"
    for seed, (name, words) in enumerate(WORDS.items()):
        rng = Random(seed)
        text = "".join(" ".join(rng.choices(words.split(), k=rng.randint(5, 60))) + "\n" for _ in range(400))
        (headway_once.folder / f"{name}.txt").write_text(text)
        (headway_once.folder / f"{name}.yaml").write_text(
            f"name: {name}\ncorpus: {{type: text, paths: [{name}.txt], document: line}}\n"
            "tokenizer: {type: train_bpe, vocab_size: 280}\nvalidation: last 20%\n"
        )
        done = headway_once.run("data", "build", f"{name}.yaml", tokenizer)
        assert done.returncode == 0, done.stderr
        tokenizer = "tokenizer={type: file, path: datasets/wiki/tokenizer.json}"
    for name, layout in LAYOUTS.items():
        done = headway_once.train(*TRAIN, *layout, f"run_dir={name}")
        assert done.returncode == 0, done.stderr
    return headway_once.folder


def test_every_layout_reads_the_same_batches_and_gives_the_same_losses(folder: Path) -> None:
    hashes = {name: [r["batch_hash"] for r in records(folder / name)] for name in LAYOUTS}
    assert hashes["one"] == hashes["two"] == hashes["four"] and len(set(hashes["one"])) == 20
    for name in ("two", "four"):
        for ours, theirs in zip(
            records(folder / name, "validation"), records(folder / "one", "validation"), strict=True
        ):
            assert ours["mix"] == theirs["mix"]
            for dataset in NAMES:
                assert ours["sets"][dataset]["loss"] == pytest.approx(theirs["sets"][dataset]["loss"], rel=1e-5)
                assert ours["sets"][dataset]["targets"] == theirs["sets"][dataset]["targets"]


def test_each_dataset_has_its_loss_and_the_validation_is_their_mean(folder: Path) -> None:
    for record in records(folder / "one", "validation"):
        assert list(record["sets"]) == NAMES
        total = sum(found["targets"] for found in record["sets"].values())
        mean = sum(found["loss"] * found["targets"] for found in record["sets"].values()) / total
        assert record["loss"] == pytest.approx(mean, rel=1e-12) and record["targets"] == total
        assert record["documents"] == sum(found["documents"] for found in record["sets"].values()) > 6
        for one in (record, *record["sets"].values()):
            half = t_critical(one["documents"] - 1) * one["standard_error"]
            assert one["loss_high"] - one["loss"] == pytest.approx(half) == pytest.approx(one["loss"] - one["loss_low"])
    losses = [found["loss"] for found in records(folder / "one", "validation")[-1]["sets"].values()]
    assert max(losses) - min(losses) > 0.01  # the texts differ


def test_the_records_say_what_was_read_of_each_dataset(folder: Path) -> None:
    middle, end = (record["mix"] for record in records(folder / "one", "validation"))
    assert middle["wiki"]["tokens"] == pytest.approx(1280, abs=400) and end["wiki"] == middle["wiki"]
    assert sum(found["tokens"] for found in end.values()) == 5120
    assert end["books"]["tokens"] - middle["books"]["tokens"] == pytest.approx(1280, abs=400)
    assert json.loads((folder / "one" / "summary.json").read_text())["mix"] == end
    card = json.loads((folder / "one" / "run.json").read_text())
    assert list(card["validation_sets"]) == NAMES
    assert all(found["bytes_per_token"] > 0.5 for found in card["validation_sets"].values())


def test_a_mixture_continues_and_generates_like_any_run(folder: Path, headway_once) -> None:
    done = headway_once.run("generate", "one", "the", "--tokens", "3")
    assert done.returncode == 0, done.stderr
    again = headway_once.train(*TRAIN, *LAYOUTS["one"], "run_dir=one", "data.validation={more: datasets/books}")
    assert again.returncode == 0 and "already complete" in again.stdout, again.stderr


def test_a_named_set_is_evaluated_beside_the_validation(folder: Path, headway_once) -> None:
    words = ["data.source={type: mds, path: datasets/wiki}", *TRAIN[1:]]
    done = headway_once.train(*words, "run_dir=named", "data.validation={books: datasets/books}")
    assert done.returncode == 0, done.stderr
    for record in records(folder / "named", "validation"):
        assert list(record["sets"]) == ["books"] and record["loss"] < record["sets"]["books"]["loss"]
        assert "mix" not in record
    bad = headway_once.train(*words, "run_dir=bad", "data.validation={books: datasets/none}")
    assert bad.returncode == 65 and "datasets/none: no dataset here" in bad.stderr
    twice = headway_once.train(*TRAIN, "run_dir=bad", "data.validation={wiki: datasets/wiki}")
    assert (
        twice.returncode == 64 and "data.validation.wiki: is the name of a dataset of the mixture too" in twice.stderr
    )
