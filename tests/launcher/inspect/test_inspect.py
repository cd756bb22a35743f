"""`headway inspect` through the command line, and its measures on attention that is known."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from eval_texts import eval_texts
from pair_folders import pair_run

from headway.data.config import MixSource
from headway.launcher.api import load_run
from headway.launcher.base.errors import NoInputError
from headway.launcher.evaluate.scorer import Row
from headway.launcher.evaluate.texts import TextSource, evaluate_text, own_sources
from headway.launcher.exchange.opened import Opened, open_model
from headway.launcher.inspect.inspection import Inspection
from headway.launcher.inspect.page import _lead
from headway.launcher.inspect.patterns import CLASSES, HeadScores, _mean, head_scores, places
from headway.launcher.inspect.places import places_of
from headway.launcher.inspect.sample import Sample, own_sample, repeated
from headway.launcher.inspect.specialise import experts_of
from headway.launcher.inspect.switched import switches, worths
from headway.model.attention.gated_delta import GatedDeltaConfig
from headway.model.attention.gqa import GqaConfig
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder
from headway.model.mixed import MixedConfig

SPEC = """
name: animals
model: {width: 32, layers: 2, ffn_width: 48, init_std: 0.1}
attention: {type: rgqa, heads: 4, kv_heads: 2, head_dim: 8, top_k: 1}
data: {seq_len: 48, document_mask: true, source: {type: mds, path: dataset}}
optimizer: {lr: 1.0e-2}
schedule: {warmup_tokens: 512}
train: {tokens: 30720, global_batch: 16, micro_batch: 16, validation_tokens: 768}
launch: {processes: 1, threads: 1, restarts: 0, device: cpu}
"""
CORPUS = """
name: animals
corpus: {type: text, paths: [animals.txt], document: line}
tokenizer: {type: train_bpe, vocab_size: 320}
validation_fraction: 0.1
out: dataset
"""


@pytest.fixture(scope="module")
def workspace(headway_once: Any) -> Any:
    folder = headway_once.folder
    (folder / "animals.yaml").write_text(SPEC)
    (folder / "corpus.yaml").write_text(CORPUS)
    (folder / "animals.txt").write_text("\n".join(eval_texts(1000, seed=1)))
    for command in (
        ["data", "build", "corpus.yaml"],
        ["train", "animals.yaml", "run_dir=trained"],
        ["export", "trained", "weights", "--to", "safetensors"],
        ["train", "tiny.yaml", "train.tokens=1280", "run_dir=synthetic", "attention={type: switchhead, kv_heads: 2,"
         " head_dim: 8, experts: 3, top_k: 2}", "data.seq_len=48"],
    ):  # fmt: skip
        done = headway_once.run(*command)
        assert done.returncode == 0, done.stderr
    return headway_once


def inspected(workspace: Any, *words: str) -> dict[str, Any]:
    done = workspace.run("inspect", *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_run_gets_a_page_with_all_heads_and_experts(workspace: Any) -> None:
    done = workspace.run("inspect", "trained", "--documents", "12")
    assert done.returncode == 0, done.stderr
    assert "Of 8 heads: " in done.stdout and "page: trained/inspection/inspection.html" in done.stdout
    folder = workspace.folder / "trained" / "inspection"
    assert {path.name for path in folder.iterdir()} == {f"inspection.{e}" for e in ("html", "md", "json", "svg", "png")}
    page, found = (folder / "inspection.md").read_text(), json.loads((folder / "inspection.json").read_text())
    assert len(found["heads"]) == len(found["worths"]) == 8 and len(found["experts"]) == 8
    assert all(-0.1 < one["low"] <= one["rise"] <= one["high"] for one in found["worths"])
    for layer in (0, 1):
        for group in (0, 1):
            shares = [e["share"] for e in found["experts"] if (e["layer"], e["group"]) == (layer, group)]
            assert sum(shares) == pytest.approx(1)
    assert "## Experts" in page and "## Likeness" in page and found["sequences"] == 12
    assert page.startswith("# Heads and experts of rgqa, checkpoint of step 40")
    assert inspected(workspace, "trained", "--documents", "12") == found  # again, over the earlier page


def test_the_loss_is_that_of_the_documents_and_a_text_may_be_named(workspace: Any) -> None:
    (workspace.folder / "held.txt").write_text("In the yard the cat meows.\n")
    found = inspected(workspace, "weights", "--text", "held.txt", "--out", "page")
    model = load_run(workspace.folder / "trained").model()
    ids = [model.codec.eos_id, *model.encode("In the yard the cat meows.\n")]
    log_p = torch.log_softmax(model.logits(ids[:-1]), -1).gather(1, torch.tensor(ids[1:])[:, None])
    assert found["loss"] == pytest.approx(-float(log_p.mean()), rel=1e-5)
    assert (found["targets"], found["sequences"]) == (len(ids) - 1, 1)
    assert all(one["low"] is None for one in found["worths"])
    assert (workspace.folder / "page" / "inspection.html").is_file()


def test_value_and_output_experts_of_synthetic_data(workspace: Any) -> None:
    found = inspected(workspace, "synthetic", "--documents", "4")
    kinds = [(one["router"], one["group"]) for one in found["worths"]]
    # two layers, two heads, three experts of each side
    assert kinds.count(("", 0)) == 4 and kinds.count(("source", 1)) == kinds.count(("destination", 0)) == 6
    assert {len(one["tokens"]) > 0 for one in found["experts"] if one["share"] > 0.3} == {True}


def test_of_pairs_the_targets_are_predicted(tmp_path: Path) -> None:
    """As in the training of a decoder on pairs, and in its evaluation."""
    data = {"source": {"type": "pairs", "path": str(tmp_path / "pairs")}, "seq_len": 42}
    model = open_model(pair_run(tmp_path, seq_len=42, encoder_tokens=1, model={}, data=data) / "run")
    assert model.data is not None
    (own,) = own_sources(model.data)
    expected = evaluate_text(model, own, limit=None, done=lambda tokens: None)[0]
    sample = own_sample(model, None, sequences=100, length=128)
    assert sample.unit == "pairs" and len(sample.tokens) == expected.n > 4
    assert worths(model, sample)[0] == pytest.approx(expected.value, rel=1e-6)
    few = own_sample(model, None, sequences=100, length=12)  # prompts that are longer have no target here
    assert 0 < len(few.tokens) < expected.n and (few.labels >= 0).any(1).all()
    with pytest.raises(NoInputError, match="no pair with tokens of its target within 1; use more --tokens"):
        own_sample(model, None, sequences=5, length=1)


def test_a_mixture_is_read_by_the_weights_of_its_datasets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def documents(model: Opened, source: TextSource) -> Iterator[tuple[Row, int]]:
        yield from ((Row([ord(source.name), 1, 2, 3], 1), 4) for _ in range(50))

    monkeypatch.setattr("headway.launcher.inspect.sample.documents_of", documents)
    parts = [{"path": name, "weight": weight} for name, weight in (("a", 6), ("b", 3), ("c", 0.1))]
    source = MixSource.model_validate_json(json.dumps({"type": "mix", "sources": parts}))
    data = SimpleNamespace(source=source, validation={"d": "d"})
    model = cast(Opened, SimpleNamespace(is_encoder_decoder=False, data=data, seq_len=64))
    found = own_sample(model, None, sequences=9, length=16)
    assert Counter(map(chr, found.tokens[:, 0].tolist())) == {"a": 6, "b": 3, "c": 1}
    assert "the mixture: 6 of a, 3 of b, 1 of c" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["weights"], 64, "--out: weights is no run folder"),
        (["weights", "--out", "new"], 66, "--text: weights name no data; name a text"),
        (["trained", "--out", "animals.txt"], 64, "--out: animals.txt is a file; name a folder"),
        (["trained", "--text", "none.txt"], 66, "none.txt: no such file"),
        (["trained", "--step", "7"], 66, "7"),
        (["nothing"], 66, "nothing"),
    ],
)
def test_mistakes_have_one_message(workspace: Any, words: list[str], code: int, says: str) -> None:
    done = workspace.run("inspect", *words)
    assert done.returncode == code and says in done.stderr, done.stderr


# ---------------------------------------------------------------- measures


@pytest.mark.parametrize("kind", CLASSES)
def test_a_head_that_attends_to_one_place_has_its_class_and_no_other_score(kind: str) -> None:
    length = 12
    queries, keys = places(length)[kind]
    attention = torch.zeros(2, 1, length, length, dtype=torch.float64)
    attention[:, 0, queries, keys] = 1
    rows = torch.zeros(2, length, 1, dtype=torch.int64)
    scores = {name: _mean(attention, rows, at, 1) for name, at in places(length).items()}
    # At the first repeated token, the same token earlier is the first one.
    assert scores[kind] == 1 and all(value < 0.2 for name, value in scores.items() if name != kind)
    assert HeadScores(share=np.ones(1), scores=scores).name(0) == kind


def test_scores_of_routed_heads_are_over_the_tokens_that_use_them() -> None:
    attention = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    attention[0, 0, 2, 1], attention[0, 0, 3, 2] = 0.5, 1.0
    rows = torch.tensor([[[0], [0], [1], [2]]])
    found = _mean(attention, rows, places(4)["previous"], 4)
    assert found[1:3].tolist() == [0.5, 1.0] and np.isnan(found[[0, 3]]).all()
    heads = HeadScores(share=np.array([0.5, 0.25, 0.25, 0.0]), scores={"previous": found})
    assert [heads.name(head) for head in (1, 2, 3)] == ["previous", "previous", "unused"]


def test_a_router_that_looks_tokens_up_is_found_out(workspace: Any) -> None:
    """The lists of a hash router: a token chooses one expert, always."""
    model = open_model(workspace.folder / "trained")
    words = ["attention.router={type: token_hash}", "train.tokens=768", "schedule.warmup_tokens=0"]
    done = workspace.run("train", "animals.yaml", "run_dir=hashed", *words)
    assert done.returncode == 0, done.stderr
    hashed = open_model(workspace.folder / "hashed")
    tokens = torch.tensor(model.codec.encode(" ".join(eval_texts(40, seed=5)))[:384]).view(8, 48)
    sample = Sample(tokens=tokens[:, :-1], labels=tokens[:, 1:])
    for expert in experts_of(hashed, sample):
        for _, ratio, _ in expert.tokens:
            assert ratio == pytest.approx(1 / expert.share, rel=1e-6)  # all of its occurrences chose this expert
    learned = [e for e in experts_of(model, sample) if e.tokens]
    assert any(ratio < 0.99 / e.share for e in learned for _, ratio, _ in e.tokens)


def test_a_part_that_nothing_uses_is_worth_nothing(workspace: Any) -> None:
    model = open_model(workspace.folder / "trained")
    with torch.no_grad():
        model.decoder.get_parameter("blocks.1.attn.w_o")[:, 8:16] = 0  # head 1
    tokens = torch.tensor([model.codec.encode("In the yard the cat meows.")] * 3)
    sample = Sample(tokens=tokens[:, :-1], labels=tokens[:, 1:])
    loss, found = worths(model, sample)
    assert [one.off for one in found] == switches(model, sample) and loss > 0
    rises = {(one.off.layer, one.off.member): one for one in found}
    assert rises[1, 1].rise == 0 and any(one.rise != 0 for one in found)
    assert rises[1, 0].low == pytest.approx(rises[1, 0].rise, abs=1e-6)  # equal documents have no spread


def test_heads_that_keep_a_state_are_counted_apart() -> None:
    """What they attend to is not known, and the first sentence does not pass over them."""
    kinds = {"state": GatedDeltaConfig(heads=3, head_dim=4), "global": GqaConfig(heads=4, kv_heads=2, head_dim=4)}
    attention = MixedConfig(kinds=kinds, pattern=["state", "global"])
    decoder = Decoder(ModelConfig(width=16, layers=2, ffn_width=24), attention, vocab_size=40, seed=1).eval()
    model = cast(Opened, SimpleNamespace(model=decoder, decoder=decoder))
    tokens = repeated(model, sequences=2, half=8)
    sample = Sample(tokens=tokens[:, :-1], labels=tokens[:, 1:])
    loss, found = worths(model, sample)
    numbers: dict[str, Any] = {"title": "", "identity": {}, "loss": loss, "targets": sample.targets, "sequences": 2}
    rest: dict[str, Any] = {"unit": "documents", "experts": [], "cross": [], "likeness": {}}
    rest |= {"places": places_of(decoder), "heads": head_scores(model, tokens)}
    lead = _lead(Inspection(worths=found, **numbers, **rest))
    assert lead.startswith("Of 4 heads: ") and len(found) == 7
    assert " What 3 more attend to is not known, as they keep a state. Worth most: head " in lead
