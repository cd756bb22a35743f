"""Encoder-decoders on pairs: losses of given targets, generated targets, `headway generate`, of runs and of exports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_folders import SHAPE, pair_run
from untrained_runs import untrained_run

from headway.data.loader import IGNORED
from headway.data.validation import validation_data
from headway.launcher.base.errors import SpecError
from headway.launcher.evaluate.evaluate import Asked, evaluate
from headway.launcher.evaluate.scorer import Row, Scorer
from headway.launcher.evaluate.summaries import Pair, Summaries, evaluate_summaries, read_pairs, rouge_scores
from headway.launcher.evaluate.texts import TextSource, evaluate_text, own_sources
from headway.launcher.exchange.export import export
from headway.launcher.exchange.generate import Sampling, generate
from headway.launcher.exchange.opened import Opened, open_model
from headway.launcher.exchange.search import Search
from headway.model.seq2seq.model import EncoderDecoder

FIELDS = ("prompt", "target")
SOURCE, SEQ_LEN = 10, 42


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of pairs, a file of pairs, and an untrained encoder-decoder on the dataset."""
    return pair_run(tmp_path_factory.mktemp("encoder-decoder-pairs"), seq_len=SEQ_LEN, encoder_tokens=SOURCE)


@pytest.fixture(scope="module")
def model(place: Path) -> Opened:
    """In float64."""
    opened = open_model(place / "run")
    return replace(opened, model=opened.model.double())


def whole_pass(model: Opened, source: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """Logits [S, V] of one source and one target, without a cache, a batch and padding."""
    assert isinstance(model.model, EncoderDecoder)
    with torch.no_grad():
        return model.model.logits(torch.tensor([[*source]]), torch.tensor([[*ids]]))[0]


def separator(model: Opened) -> list[int]:
    assert model.codec.tokenizer is not None
    return [*model.codec.tokenizer.encode([" ->"])[0]]


def continued(model: Opened, pair: Pair, tokens: int) -> list[int]:
    """The most likely tokens, one whole pass for each."""
    start = separator(model)
    source, ids = pair.prompt[: -len(start)][:SOURCE], [*start]
    for _ in range(tokens):
        best = int(whole_pass(model, source, ids)[-1].argmax())
        if best == model.codec.eos_id:
            break
        ids.append(best)
    return ids[len(start) :]


def summaries(place: Path, tokens: int, **changes: Any) -> Summaries:
    source = TextSource(name="pairs", path=place / "pairs")
    return Summaries(sources=(source,), how=Search(tokens=tokens, **changes), fields=FIELDS)


# ------------------------------------------------------------ losses


def test_the_loss_of_given_targets_is_that_of_the_validation(model: Opened) -> None:
    """Of all pairs, packed as in training."""
    assert model.data is not None and isinstance(model.model, EncoderDecoder)
    loss, targets = 0.0, 0
    for batch in validation_data(model.data, tokens=10**6, micro_batch=4, dp_rank=0, dp_size=1).batches:
        assert batch.source is not None
        with torch.no_grad():
            out = model.model(batch.source, batch.tokens, batch.labels, batch.source_segments, batch.segments)
        loss, targets = loss + float(out.loss_sum), targets + int((batch.labels != IGNORED).sum())
    (source,) = own_sources(model.data)
    found = {m.name: m for m in evaluate_text(model, source, limit=None, done=lambda _: None)}
    # `Scorer` takes the logarithm of probabilities in fp32.
    assert found["validation/loss"].value == pytest.approx(loss / targets, rel=1e-6)
    assert found["validation/bits_per_byte"].value > 0


def test_rows_of_a_batch_have_the_scores_of_their_own_pass(model: Opened) -> None:
    rows = [Row([7, 8, *range(20, 20 + n % 6)], 2, range(30, 31 + n % 5)) for n in range(1, 12) if n % 6]
    rows += [Row([7, 8, 9, 10], 1, [5, 6]), Row([7, 8, 9, 11], 1, [5, 6])]  # of one pass
    for batch_tokens in (20, 4096):
        for row, found in zip(rows, Scorer(model, batch_tokens=batch_tokens).score(rows), strict=True):
            logits = whole_pass(model, row.source, row.ids[:-1])[row.first - 1 :]
            labels = torch.tensor(row.ids[row.first :])
            expected = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
            torch.testing.assert_close(torch.from_numpy(found.log_p), expected, rtol=0, atol=2e-6)
            assert found.best.tolist() == (logits.argmax(-1) == labels).tolist()
    digests = {Scorer(model).digest for _ in range(2)}
    for source in ([1], [2]):
        scorer = Scorer(model)
        scorer.score([Row([7, 8], 1, source)])
        digests.add(scorer.digest)
    assert len(digests) == 3


# ------------------------------------------------------------ generated targets


def test_the_measures_are_those_of_targets_generated_one_by_one(
    place: Path, model: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = replace(summaries(place, 12), texts=tmp_path / "texts.jsonl")
    (source,) = wanted.sources
    measures = {m.name: m for m in evaluate_summaries(model, source, wanted, limit=9, done=lambda _: None)}
    pairs, count = read_pairs(model, source, FIELDS, 9)
    cut = sum(len(pair.prompt) - count > SOURCE for pair in pairs)
    said = f"{cut} of 9 prompts are cut at their end, so that the encoder reads at most {SOURCE} tokens"
    assert 0 < cut < 9 and said in capsys.readouterr().err
    texts = [model.codec.decode(continued(model, pair, 12)) for pair in pairs]
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [line["generated"] for line in lines] == texts
    scores = rouge_scores([pair.text for pair in pairs], texts)
    assert measures["pairs/rougeL"].value == pytest.approx(scores["rougeL"].mean())


def test_a_file_of_pairs_is_measured_as_the_dataset(place: Path, model: Opened, tmp_path: Path) -> None:
    of_dataset, _ = read_pairs(model, TextSource(name="a", path=place / "pairs"), FIELDS, None)
    rows = [{"prompt": model.codec.decode(p.prompt[: -len(separator(model))]), "target": p.text} for p in of_dataset]
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for path in (place / "pairs", tmp_path / "same.jsonl"):
        source = TextSource(name="pairs", path=path)
        found.append(evaluate_summaries(model, source, summaries(place, 5), limit=None, done=lambda _: None))
    assert found[0] == found[1] and found[0][0].n == len(of_dataset) > 3


def test_new_tokens_must_fit_the_decoder(place: Path, model: Opened) -> None:
    most = SEQ_LEN - SOURCE + 1 - len(separator(model))
    (source,) = summaries(place, most).sources
    evaluate_summaries(model, source, summaries(place, most), limit=1, done=lambda _: None)
    with pytest.raises(SpecError, match=rf"--new-tokens {most + 1}: are more than the 32 .* use at most {most}"):
        evaluate_summaries(model, source, summaries(place, most + 1), limit=1, done=lambda _: None)


def test_generate_prints_the_target_of_a_prompt(place: Path, model: Opened, capsys: pytest.CaptureFixture[str]) -> None:
    (pair,), _ = read_pairs(model, TextSource(name="a", path=place / "pairs"), FIELDS, 1)
    prompt = model.codec.decode(pair.prompt[: -len(separator(model))])
    assert generate(place / "run", prompt, Sampling(tokens=9, temperature=0.0, top_p=1.0, seed=1)) == 0
    printed = capsys.readouterr()
    assert printed.out.rstrip("\n") == model.codec.decode(continued(model, pair, 9)).rstrip("\n")
    assert "tokens for the encoder" in printed.err and "new tokens" in printed.err
    generate(place / "run", "words and " * 40, Sampling(tokens=1, temperature=0.0, top_p=1.0, seed=1))
    assert f"are more than the {SOURCE} of a training sequence" in capsys.readouterr().err


def test_an_export_is_measured_and_continued_as_the_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(place / "run", tmp_path / "out", to="safetensors") == 0
    wanted, found, printed = summaries(place, 6, beams=3), [], []
    greedy = Sampling(tokens=9, temperature=0.0, top_p=1.0, seed=1)
    for path in (place / "run", tmp_path / "out"):
        found.append(evaluate_summaries(open_model(path), wanted.sources[0], wanted, limit=5, done=lambda _: None))
        capsys.readouterr()
        generate(path, "3 words and", greedy)
        printed.append(capsys.readouterr().out)
    assert found[0] == found[1] and printed[0] == printed[1]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["encoder_tokens"] == SOURCE and config["target_start_ids"] == separator(open_model(place / "run"))


# ------------------------------------------------------------ other data, and what is refused


def test_a_model_of_other_data_continues_a_sequence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"seq_len": 15, "encoder_tokens": 8, "source": {"type": "synthetic", "task": "copy", "span": 4}}
    attention = {"type": "mha", "heads": 2, "head_dim": 8}
    untrained_run(tmp_path / "run", model={**SHAPE, "init_std": 0.3}, attention=attention, data=data)
    model, greedy = open_model(tmp_path / "run"), Sampling(tokens=1, temperature=0.0, top_p=1.0, seed=1)
    for ids, cut in (([*range(12)], 8), ([3, 1, 2], 2)):
        generate(tmp_path / "run", " ".join(map(str, ids)), greedy)
        best = int(whole_pass(model, ids[:cut], ids[cut:])[-1].argmax())
        assert [int(word) for word in capsys.readouterr().out.split()] == [*ids, best]
    with pytest.raises(SpecError, match="needs at least 2 tokens"):
        generate(tmp_path / "run", "3", greedy)
    export(tmp_path / "run", tmp_path / "out", to="safetensors")
    with pytest.raises(SpecError, match="do not say which tokens start a target"):
        generate(tmp_path / "out", "3 1 2", greedy)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": ("arc_easy",)}, "headway eval --tasks works on decoders only"),
        ({"lengths": (8,)}, "headway eval --lengths works on decoders only"),
        ({"recall": (8,)}, "headway eval --recall works on decoders only"),
        ({"texts": "rows.jsonl"}, "the loss of a text, .* works on decoders only"),
    ],
)
def test_what_has_no_form_is_refused(place: Path, changes: dict[str, Any], said: str) -> None:
    if "texts" in changes:
        changes = {"texts": (TextSource(name="a", path=place / changes["texts"]),)}
    none = Summaries(sources=(), how=Search(tokens=1), fields=FIELDS)
    common: dict[str, Any] = {"texts": None, "tasks": (), "include": None, "shots": None, "lengths": (), "recall": ()}
    with pytest.raises(SpecError, match=said):
        evaluate(place / "run", Asked(**{**common, **changes}, summaries=none, limit=None), step=None, out=None)
