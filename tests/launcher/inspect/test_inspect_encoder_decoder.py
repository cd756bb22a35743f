"""`headway inspect` of encoder-decoders: their three attentions, what heads are worth, where cross attention looks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_folders import SHAPE, pair_run
from torch import Tensor
from untrained_runs import untrained_run

from headway.launcher.base.errors import NoInputError
from headway.launcher.cli.main import main
from headway.launcher.evaluate.texts import evaluate_text, own_sources
from headway.launcher.exchange.export import export
from headway.launcher.exchange.opened import Opened, open_model
from headway.launcher.inspect.crossing import CrossHead, _place_in_document, _Sums, cross_heads
from headway.launcher.inspect.patterns import HeadScores, _scores, cross_places, encoder_places, pair_scores, places
from headway.launcher.inspect.places import Place, places_of
from headway.launcher.inspect.sample import Sample, own_sample
from headway.launcher.inspect.switched import worths
from headway.model.measure.observe import Layer, observed
from headway.model.seq2seq.model import EncoderDecoder

SOURCE, SEQ_LEN = 10, 42
HEADS = 4
STACKS = ["encoder", "encoder", "decoder", "cross", "decoder", "cross"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pair_run(tmp_path_factory.mktemp("inspect-pairs"), seq_len=SEQ_LEN, encoder_tokens=SOURCE)
    data = {"seq_len": 48, "encoder_tokens": 24, "source": {"type": "synthetic", "task": "mqar", "vocab_size": 40,
            "pairs": 4, "queries": 4}}  # fmt: skip
    attention = {"type": "mha", "heads": HEADS, "head_dim": 6}
    untrained_run(folder / "synthetic", model={**SHAPE, "positions": "rope"}, attention=attention, data=data)
    return folder


@pytest.fixture(scope="module")
def model(place: Path) -> Opened:
    """In float64."""
    opened = open_model(place / "run")
    return replace(opened, model=opened.model.double())


def inspected(path: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["inspect", str(path), *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_on_pairs_gets_a_page_with_its_three_attentions(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(place / "run"), "--documents", "6"]) == 0
    said = capsys.readouterr().out
    for name in ("the encoder's self-attention", "the decoder's self-attention", "cross attention"):
        assert f"Of 8 heads of {name}: " in said
    folder = place / "run" / "inspection"
    assert {path.name for path in folder.iterdir()} == {f"inspection.{e}" for e in ("html", "md", "json", "svg", "png")}
    page, found = (folder / "inspection.md").read_text(), json.loads((folder / "inspection.json").read_text())
    for heading in (
        "Heads of the encoder's self-attention",
        "Heads of cross attention",
        "Cross attention on the pairs",
    ):
        assert f"## {heading}" in page
    assert page.count("| encoder 0.") == page.count("| decoder 1.") == HEADS
    assert page.count("| cross 1.") == 2 * HEADS  # in the table of classes, and in that of places and tokens
    where = [(one["attention"], one["layer"], one["head"]) for one in found["heads"]]
    assert len(set(where)) == 6 * HEADS == len(found["worths"])
    assert set(where) == {(one["attention"], one["layer"], one["member"]) for one in found["worths"]}
    scores = {one["attention"]: set(one["scores"]) for one in found["heads"]}
    assert "induction" in scores["decoder"] and "induction" not in scores["encoder"]
    assert "last" in scores["cross"] and "next" in scores["encoder"]
    assert len(found["cross"]) == 2 * HEADS and set(found["likeness"]) == {
        f"{stack} {layer}" for stack in ("encoder", "decoder", "cross") for layer in (0, 1)
    }
    assert found["sequences"] == 6 and found["experts"] == []
    assert inspected(place / "run", "--documents", "6", capsys=capsys) == found


def test_the_loss_is_that_of_the_evaluation(place: Path, model: Opened, capsys: pytest.CaptureFixture[str]) -> None:
    assert model.data is not None
    (own,) = own_sources(model.data)
    expected = evaluate_text(model, own, limit=None, done=lambda tokens: None)[0]
    sample = own_sample(model, None, sequences=100, length=128)
    assert sample.unit == "pairs" and len(sample.tokens) > 4
    assert worths(model, sample)[0] == pytest.approx(expected.value, rel=1e-7)  # losses of tokens are fp32
    found = inspected(place / "run", capsys=capsys)
    assert found["loss"] == pytest.approx(expected.value, rel=1e-5)


def test_exported_weights_need_pairs_and_agree_with_their_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(place / "run", tmp_path / "weights", to="safetensors")
    capsys.readouterr()
    found = inspected(
        tmp_path / "weights", "--text", str(place / "pairs"), "--out", str(tmp_path / "page"), capsys=capsys
    )
    ours = inspected(place / "run", capsys=capsys)
    assert found["worths"] == ours["worths"] and found["heads"] == ours["heads"] and found["cross"] == ours["cross"]


def test_tokens_cut_targets_and_leave_sources_whole(model: Opened) -> None:
    whole = own_sample(model, None, sequences=5, length=128)
    cut = own_sample(model, None, sequences=5, length=4)
    assert whole.source is not None and cut.source is not None and torch.equal(cut.source, whole.source)
    assert cut.tokens.shape[1] == 4 < whole.tokens.shape[1] and torch.equal(cut.tokens, whole.tokens[:, :4])
    assert torch.equal(cut.labels, whole.labels[:, :4]) and cut.targets > 0
    with pytest.raises(NoInputError, match="no pair with a prompt and a target within 0 tokens; use more --tokens"):
        own_sample(model, None, sequences=5, length=0)


def test_synthetic_sequences_are_read_as_in_training(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(place / "synthetic", "--documents", "5", capsys=capsys)
    assert found["sequences"] == 5 and len(found["worths"]) == 6 * HEADS and found["likeness"] == {}
    opened = open_model(place / "synthetic")
    sample = own_sample(opened, None, sequences=5, length=8)
    assert sample.source is not None and sample.source.shape == (5, 24) and sample.tokens.shape == (5, 24)
    assert sample.unit == "sequences"
    problems = _place_in_document(sample)
    assert problems[0].tolist() == [*range(16), *range(8)]  # problems of 16 tokens; the second one is cut


@pytest.mark.parametrize(
    ("path", "words", "code", "says"),
    [
        (
            "run",
            ["--text", "rows.jsonl"],
            64,
            "rows.jsonl: an encoder_decoder reads a source and a target, and this is",
        ),
        ("synthetic", ["--text", "none"], 64, "none: an encoder_decoder reads a source and a target, and this is no"),
        ("weights", ["--out", "page"], 66, "--text: weights name no data; name a dataset of pairs"),
        ("weights", [], 64, "--out: weights is no run folder"),
    ],
)
def test_mistakes_have_one_message(
    place: Path, path: str, words: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(place)
    if path == "weights" and not Path("weights").exists():
        export(place / "run", Path("weights"), to="safetensors")
        capsys.readouterr()
    assert main(["inspect", path, *words]) == code
    assert says in " ".join(capsys.readouterr().err.split())


# ---------------------------------------------------------------- measures


def test_places_are_those_of_the_modules(model: Opened) -> None:
    assert isinstance(model.model, EncoderDecoder)
    layers = model.model.attention_layers()
    found = places_of(model.model)
    assert [one.stack for one in found] == STACKS and len(layers) == len(found)
    for one, module in zip(found, layers, strict=True):
        stack = model.model.encoder if one.stack == "encoder" else model.model.blocks
        block: Any = stack[one.layer]
        assert module is (block.cross if one.stack == "cross" else block.attn)


@pytest.mark.parametrize("of", [encoder_places, cross_places, places])
def test_a_head_that_attends_to_one_place_has_its_class_and_no_other_score(of: Any) -> None:
    length = 12
    for kind, (queries, keys) in of(length).items():
        attention = torch.zeros(2, 1, length, length, dtype=torch.float64)
        attention[:, 0, queries, keys] = 1
        layer = Layer(heads=1, maps=[attention], rows=[torch.zeros(2, length, 1, dtype=torch.int64)])
        found = _scores(layer, of(length))
        assert found is not None and found.scores[kind].item() == 1 and found.name(0) == kind
        assert all(values.item() < 0.2 for name, values in found.scores.items() if name != kind)


def test_scores_of_each_stack_are_of_its_own_random_tokens(model: Opened) -> None:
    assert isinstance(model.model, EncoderDecoder)
    source, tokens, copied = (torch.randint(280, (3, size)) for size in (10, 8, 6))
    found = dict(zip(places_of(model.model), pair_scores(model.model, source, tokens, copied), strict=True))
    maps = []
    for read in ((source, tokens), (copied, copied)):
        with torch.no_grad(), observed(model.model) as layers:
            model.model.hidden(*read)
        maps.append([layer.maps[0] for layer in layers])
    expected = {  # of the second layer of each stack
        ("encoder", "next"): maps[0][1].diagonal(1, 2, 3).mean((0, 2)),
        ("encoder", "first"): maps[0][1][:, :, 1:, 0].mean((0, 2)),
        ("decoder", "previous"): maps[0][4].diagonal(-1, 2, 3)[:, :, 3:].mean((0, 2)),
        ("decoder", "induction"): maps[0][4].diagonal(-3, 2, 3)[:, :, 1:-1].mean((0, 2)),
        ("cross", "next"): maps[1][5].diagonal(1, 2, 3)[:, :, :-1].mean((0, 2)),
        ("cross", "last"): maps[1][5][:, :, :-2, -1].mean((0, 2)),
    }
    for (stack, kind), values in expected.items():
        scores = found[Place(stack, 1)]
        assert scores is not None
        torch.testing.assert_close(torch.from_numpy(scores.scores[kind]), values)


def test_a_class_without_places_is_not_a_name() -> None:
    """Of sequences of two tokens none has a token after the first occurrence."""
    attention = torch.eye(2, dtype=torch.float64).expand(1, 1, 2, 2)
    layer = Layer(heads=1, maps=[attention], rows=[torch.zeros(1, 2, 1, dtype=torch.int64)])
    found = _scores(layer, places(2))
    assert isinstance(found, HeadScores) and math.isnan(found.scores["induction"].item()) and found.name(0) == "self"


def test_a_head_that_nothing_uses_is_worth_nothing(place: Path) -> None:
    opened = open_model(place / "run")
    sample = own_sample(opened, None, sequences=5, length=16)
    with torch.no_grad():
        for module in opened.model.attention_layers():
            module.get_parameter("w_o")[:, 6:12] = 0  # head 1 of each attention
    rises = {(one.off.layer, one.off.member): one.rise for one in worths(opened, sample)[1]}
    assert len(rises) == 6 * HEADS
    assert all((rise == 0) == (head == 1) for (_, head), rise in rises.items())


def known(model: Opened, attention: Tensor, part: Sample) -> list[CrossHead]:
    """The heads whose attention [B, H, S, K] is given."""
    sums, seen = _Sums(), torch.ones(len(part.tokens), *attention.shape[2:], dtype=torch.bool)
    sums.add(part, Layer(heads=attention.shape[1], maps=[attention]), seen, model.model.embedding.shape[0])
    return sums.heads(model, 3)


def test_known_attention_has_its_entropy_places_and_tokens(model: Opened) -> None:
    source = torch.tensor([[5, 7, 5, 9], [7, 5, 7, 9]])
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    attention = torch.zeros(2, 3, 3, 4, dtype=torch.float64)
    attention[:, 0] = 0.25  # equal
    attention[:, 1, :, 2] = 1  # one place
    attention[:, 2] = (source == 5).double()[:, None] / (source == 5).sum(1)[:, None, None]  # one token
    equal, one, token = known(model, attention, Sample(tokens=tokens, labels=tokens, source=source))
    assert (equal.layer, [each.head for each in (equal, one, token)]) == (3, [0, 1, 2])
    assert equal.entropy == pytest.approx(math.log(4)) and equal.of_uniform == pytest.approx(1) and equal.tokens == ()
    assert [each.what for each in equal.places] == [0, 1, 2]
    assert all((each.share, each.ratio) == pytest.approx((0.25, 1)) for each in equal.places)
    assert (one.entropy, one.of_uniform) == (0, 0)
    assert (one.places[0].what, one.places[0].share, one.places[0].ratio) == pytest.approx((2, 1, 4))
    assert token.entropy == pytest.approx(math.log(2) / 2)  # two places in the first source, one in the second
    (first,) = token.tokens
    assert first.what == model.codec.decode([5])
    assert (first.share, first.ratio) == pytest.approx((1, 1 / (3 / 8)))


def alone(model: Opened, source: Sequence[int], tokens: Sequence[int], labels: Tensor) -> Sample:
    return Sample(tokens=torch.tensor([tokens]), labels=labels[None], source=torch.tensor([source]))


def test_padding_and_batches_change_nothing(model: Opened) -> None:
    """Pairs of a batch with padding, and each pair alone: the same sums over target tokens."""
    sample = own_sample(model, None, sequences=7, length=20)
    assert sample.source is not None and sample.source_segments is not None
    found, weights, expected = cross_heads(model, sample), [], []
    for row in range(len(sample.tokens)):
        real = int(sample.real[row].sum())
        source = sample.source[row][sample.source_segments[row] == 0].tolist()
        one = alone(model, source, sample.tokens[row, :real].tolist(), sample.labels[row, :real])
        expected.append([head.entropy for head in cross_heads(model, one)])
        weights.append(real)
    assert len({*weights}) > 1 and (sample.source_segments < 0).any()
    mean = torch.tensor(weights, dtype=torch.float64) @ torch.tensor(expected, dtype=torch.float64) / sum(weights)
    torch.testing.assert_close(torch.tensor([head.entropy for head in found], dtype=torch.float64), mean)
    assert all(sum(place.share for place in head.places) <= 1 + 1e-12 for head in found)


def test_passes_of_any_size_add_up(model: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = own_sample(model, None, sequences=7, length=20)
    whole = cross_heads(model, sample)
    monkeypatch.setattr("headway.launcher.inspect.sample.PASS_TOKENS", 60)
    assert len(sample.passes()) > 2
    for ours, theirs in zip(cross_heads(model, sample), whole, strict=True):
        assert ours.entropy == pytest.approx(theirs.entropy, rel=1e-12)
        assert [each.what for each in (*ours.places, *ours.tokens)] == [
            e.what for e in (*theirs.places, *theirs.tokens)
        ]
