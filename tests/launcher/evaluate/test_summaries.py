"""ROUGE of generated targets: scores that are computed by hand, prompts that are cut, and files of pairs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from untrained_runs import untrained_run

from headway.data.build import build
from headway.data.config import DataError
from headway.data.corpus.config import CorpusConfig
from headway.launcher.base.errors import SpecError
from headway.launcher.evaluate import summaries
from headway.launcher.evaluate.summaries import Summaries, evaluate_summaries, read_pairs, rouge_scores
from headway.launcher.evaluate.texts import TextSource
from headway.launcher.exchange.generate import Sampling, continuation
from headway.launcher.exchange.opened import Opened, open_model
from headway.launcher.exchange.search import Search

FIELDS = ("prompt", "target")


def test_scores_are_those_of_the_definition() -> None:
    # 3 of 4 and of 5 words; pairs of words: "the cat" of 3 and 4; longest common subsequence: the cat sleeps.
    scores = rouge_scores(["The cat sleeps today."], ["the cat never sleeps long"])
    assert scores["rouge1"][0] == pytest.approx(2 * 3 / (4 + 5))
    assert scores["rouge2"][0] == pytest.approx(2 * 1 / (3 + 4))
    assert scores["rougeL"][0] == pytest.approx(2 * 3 / (4 + 5))
    assert set(scores) == {"rouge1", "rouge2", "rougeL"}
    stemmed = rouge_scores(["dogs running", "a b\nc d"], ["dog runs", "c d\na b"])
    assert stemmed["rouge1"].tolist() == [1.0, 1.0] and stemmed["rougeL"].tolist() == [1.0, 0.5]
    assert stemmed["rougeLsum"].tolist() == [1.0, 1.0]
    assert rouge_scores(["something"], [""])["rouge1"][0] == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of pairs, a file of pairs, and an untrained run on the dataset."""
    folder = tmp_path_factory.mktemp("summaries")
    rows = [{"prompt": f"{n} " + "words and " * (n % 9), "target": f"Sum {n}.\nEnd."} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "name": "pairs",
        "corpus": {"type": "pairs", "paths": [str(folder / "rows.jsonl")], "prompt": "prompt", "target": "target"},
        "tokenizer": {"type": "train_bpe", "vocab_size": 280},
        "validation_fraction": 0.3,
    }
    corpus = {**settings, "corpus": {**settings["corpus"], "separator": " ->"}}
    build(CorpusConfig.model_validate(corpus), out=folder / "pairs")
    source = {"type": "pairs", "path": str(folder / "pairs")}
    attention = {"type": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 6}
    untrained_run(folder / "run", attention=attention, data={"source": source, "seq_len": 64})
    return folder


@pytest.fixture(scope="module")
def model(place: Path) -> Opened:
    return open_model(place / "run")


def asked(place: Path, **changes: Any) -> Summaries:
    how = Search(**{"tokens": 8, **changes})
    return Summaries(sources=(TextSource(name="pairs", path=place / "pairs"),), how=how, fields=FIELDS)


def test_a_file_gives_the_pairs_of_the_dataset(place: Path, model: Opened) -> None:
    of_dataset, separator = read_pairs(model, TextSource(name="a", path=place / "pairs"), FIELDS, None)
    of_file, again = read_pairs(model, TextSource(name="b", path=place / "rows.jsonl"), FIELDS, None)
    known = {tuple(pair.prompt): (pair.target, pair.text) for pair in of_file}
    assert separator == again > 0 and len(of_file) == 40 > len(of_dataset) > 3
    assert all(known[tuple(pair.prompt)] == (pair.target, pair.text) for pair in of_dataset)
    assert of_dataset[0].text.startswith("Sum ") and of_dataset[0].target[-1] == model.codec.eos_id
    assert model.codec.decode(of_dataset[0].prompt).endswith(" ->")


def test_weights_that_do_not_say_their_separator_get_the_given_one_or_a_note(
    place: Path, model: Opened, capsys: pytest.CaptureFixture[str]
) -> None:
    export, rows = replace(model, data=None), TextSource(name="b", path=place / "rows.jsonl")
    of_run, _ = read_pairs(model, rows, FIELDS, 3)
    assert "note" not in capsys.readouterr().err
    assert read_pairs(export, rows, FIELDS, 3, text=" ->")[0] == of_run
    assert "note" not in capsys.readouterr().err
    by_default, _ = read_pairs(export, rows, FIELDS, 3)
    assert model.codec.decode(by_default[0].prompt).endswith("\n\nSummary:\n")
    assert "give it with --separator" in capsys.readouterr().err
    with pytest.raises(SpecError, match="--separator: is for files"):
        replace(asked(place), separator=" ->").check()


def test_the_measures_are_those_of_prompts_continued_one_by_one(
    place: Path, model: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = asked(place, tokens=54)
    wanted = Summaries(sources=wanted.sources, how=wanted.how, fields=FIELDS, texts=tmp_path / "texts.jsonl")
    measures = {m.name: m for m in evaluate_summaries(model, wanted.sources[0], wanted, limit=9, done=lambda _: None)}
    pairs, separator = read_pairs(model, wanted.sources[0], FIELDS, 9)
    greedy = Sampling(tokens=54, temperature=0.0, top_p=1.0, seed=1)
    texts, cut = [], 0
    for pair in pairs:
        prompt, tail = pair.prompt[:-separator], pair.prompt[-separator:]
        cut += len(pair.prompt) > 11
        ids = [*prompt[: 64 + 1 - 54 - separator], *tail]
        texts.append(
            model.codec.decode([*continuation(model.decoder, ids, greedy, eos_id=model.codec.eos_id, stats={})])
        )
    scores = rouge_scores([pair.text for pair in pairs], texts)
    assert 0 < cut < 9 and f"{cut} of 9 prompts are cut at their end" in capsys.readouterr().err
    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        assert (
            measures[f"pairs/{name}"].value == pytest.approx(scores[name].mean()) and measures[f"pairs/{name}"].n == 9
        )
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [line["generated"] for line in lines] == texts and lines[0]["target"] == pairs[0].text
    assert measures["pairs/loss"].digest != measures["pairs/rouge1"].digest


def test_the_hash_tells_other_questions_apart(place: Path, model: Opened) -> None:
    def digests(**changes: Any) -> tuple[str, str]:
        wanted = asked(place, **changes)
        found = evaluate_summaries(model, wanted.sources[0], wanted, limit=2, done=lambda _: None)
        return found[0].digest, found[-1].digest

    assert digests() == digests() and digests()[0] != digests(beams=2)[0] != digests(tokens=9)[0]
    assert digests()[1] == digests(beams=2)[1]


def test_new_tokens_must_leave_room_for_a_prompt(place: Path, model: Opened) -> None:
    wanted, separator = asked(place, tokens=64), len(model.codec.encode(" ->"))
    with pytest.raises(SpecError, match=rf"--new-tokens 64: leaves no room .* at most {64 - separator}"):
        evaluate_summaries(model, wanted.sources[0], wanted, limit=2, done=lambda _: None)


def test_a_pair_without_a_target_names_its_line(place: Path, model: Opened, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "target": "b"}\n{"prompt": "a", "target": " "}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:2: is no pair \(empty_target\)"):
        read_pairs(model, TextSource(name="bad", path=tmp_path / "bad.jsonl"), FIELDS, None)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no pair"):
        read_pairs(model, TextSource(name="empty", path=tmp_path / "empty.jsonl"), FIELDS, None)


def test_files_beside_the_pairs_of_a_folder_are_named(
    model: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "target": "b"}\n')
    (tmp_path / "rows.json").write_text('{"prompt": "c", "target": "d"}\n')
    assert len(read_pairs(model, TextSource(name="two", path=tmp_path), FIELDS, None)[0]) == 1
    assert f"1 files of the type pairs are read, 1 others left out: {tmp_path / 'rows.json'}" in capsys.readouterr().err


def test_a_missing_package_and_texts_without_pairs_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="there is nothing to generate"):
        Summaries(sources=(), how=Search(tokens=1), fields=FIELDS, texts=Path("x")).check()
    monkeypatch.setattr(summaries.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match="needs the package rouge-score; install it with `pip install"):
        asked(place).check()
    Summaries(sources=(), how=Search(tokens=1), fields=FIELDS).check()
