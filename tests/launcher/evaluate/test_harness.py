"""Tasks of lm-evaluation-harness on our models, with the real package where it is installed (extra `eval`)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from eval_texts import eval_questions, eval_texts

from headway.launcher.evaluate.choices import evaluate_choices, read_questions
from headway.launcher.evaluate.harness import evaluate_harness, is_installed
from headway.launcher.evaluate.texts import TextSource, evaluate_text
from headway.launcher.exchange.opened import Opened
from headway.launcher.run.codec import Codec

needs_package = pytest.mark.skipif(not is_installed(), reason="lm-eval is not installed (extra `eval`)")
CHOICE = """
task: animals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """
task: held
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: bits_per_byte}}
"""
GENERATE = """
task: told
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{query}}}}"
doc_to_target: "x"
generation_kwargs: {{until: ["."], max_gen_toks: 6}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """An untrained decoder with a real tokenizer: its answers are arbitrary, and the same in both ways."""
    from headway.data.build import build
    from headway.data.corpus.config import CorpusConfig
    from headway.model.attention.rgqa import RgqaConfig
    from headway.model.config import ModelConfig
    from headway.model.decoder import Decoder

    folder = tmp_path_factory.mktemp("model")
    texts = folder / "train.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in eval_texts(500, seed=1)))
    corpus = {"name": "t", "corpus": {"type": "jsonl", "paths": [str(texts)]}}
    corpus |= {"tokenizer": {"type": "train_bpe", "vocab_size": 320}, "validation_fraction": 0.2}
    build(CorpusConfig.model_validate(corpus), out=folder / "data", progress=False)
    file = folder / "data/tokenizer.json"
    from tokenizers import Tokenizer

    vocab = Tokenizer.from_file(str(file)).get_vocab_size()
    eos = Tokenizer.from_file(str(file)).token_to_id("<|endoftext|>")
    codec = Codec.of_weights(file, vocab, eos_id=eos, bos_id=None)
    shape = ModelConfig(width=32, layers=2, ffn_width=48, init_std=0.3)
    attention = RgqaConfig(heads=4, kv_heads=2, head_dim=8, top_k=1)
    decoder = Decoder(shape, attention, vocab_size=vocab, seed=3).eval()
    return Opened(model=decoder, codec=codec, seq_len=24, title="made", data=None, identity={})


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """YAML files of three tasks on local files; no network."""
    for key in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setitem(os.environ, key, "1")
    monkeypatch.setitem(os.environ, "HF_HOME", str(tmp_path / "home"))
    write(tmp_path / "questions.jsonl", eval_questions(60, seed=3))
    write(tmp_path / "texts.jsonl", [{"text": text} for text in eval_texts(30, seed=4)])
    for name, form, file in (
        ("a", CHOICE, "questions.jsonl"),
        ("b", ROLLING, "texts.jsonl"),
        ("c", GENERATE, "questions.jsonl"),
    ):
        (tmp_path / f"{name}.yaml").write_text(form.format(path=tmp_path / file))
    return tmp_path


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def values(model: Opened, task: str, folder: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"include": folder, "shots": None, "limit": None, "done": lambda tokens: None}
    return {m.name: m for m in evaluate_harness(model, task, **(settings | changes))}


@needs_package
def test_choices_have_the_accuracy_of_the_harness(model: Opened, tasks: Path) -> None:
    theirs = values(model, "animals", tasks)
    questions = read_questions(tasks / "questions.jsonl")
    ours = {m.name: m for m in evaluate_choices(model, "animals", questions, done=lambda tokens: None)}
    for name in ("animals/acc", "animals/acc_norm"):
        assert theirs[name].value == ours[name].value and theirs[name].n == 60
        assert theirs[name].better == "higher" and theirs[name].low is not None
    assert theirs["animals/acc"].digest == ours["animals/acc"].digest
    assert values(model, "animals", tasks, limit=7)["animals/acc"].n == 7


@needs_package
def test_a_text_has_the_bits_per_byte_of_the_harness(model: Opened, tasks: Path) -> None:
    theirs = values(model, "held", tasks)["held/bits_per_byte"]
    source = TextSource(name="held", path=tasks / "texts.jsonl")
    ours = {m.name: m for m in evaluate_text(model, source, limit=None, done=lambda tokens: None)}
    assert theirs.value == pytest.approx(ours["held/bits_per_byte"].value, rel=1e-6) and theirs.better == "lower"


@needs_package
def test_generation_ends_at_what_the_task_says(model: Opened, tasks: Path) -> None:
    assert values(model, "told", tasks, limit=3)["told/exact_match"].value == 0


@needs_package
def test_a_mistyped_task_is_told_the_right_one(model: Opened, tasks: Path) -> None:
    from headway.launcher.base.errors import NoInputError, SpecError

    with pytest.raises(SpecError, match="did you mean animals"):
        values(model, "animal", tasks)
    with pytest.raises(NoInputError, match="no such folder"):
        values(model, "animals", tasks / "none")
    (tasks / "d.yaml").write_text(CHOICE.format(path=tasks / "gone.jsonl").replace("animals", "gone"))
    with pytest.raises(NoInputError, match="the harness failed"):
        values(model, "gone", tasks)


def test_a_question_is_continued_whole_or_refused(model: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for it, a model would continue the last token of the question alone."""
    from headway.launcher.base.errors import SpecError
    from headway.launcher.evaluate.harness import _language_model
    from headway.launcher.evaluate.scorer import Scorer

    base = ModuleType("lm_eval.api.model")
    base.__dict__["LM"] = object
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", base)
    asked: list[list[int]] = []

    def continued(decoder: Any, ids: list[int], sampling: Any, **_: Any) -> list[int]:
        asked.append(ids)
        return []

    monkeypatch.setattr("headway.launcher.exchange.generate.continuation", continued)
    question, ids = "The cat says " * 9, model.codec.encode("The cat says " * 9)
    assert len(ids) > 24
    theirs = _language_model(model, Scorer(model), lambda tokens: None)
    for count, kept in ((6, 18), (23, 1)):
        assert theirs.generate_until([SimpleNamespace(args=(question, {"max_gen_toks": count}))]) == [""]
        assert asked[-1] == ids[-kept:]
    for settings in ({"max_gen_toks": 24}, {}):
        with pytest.raises(SpecError, match="no room for its question in the 24 positions"):
            theirs.generate_until([SimpleNamespace(args=(question, settings))])


def test_without_the_package_the_error_says_how_to_install_it(model: Opened, monkeypatch: Any) -> None:
    from headway.launcher.base.errors import SpecError
    from headway.launcher.evaluate import harness

    monkeypatch.setattr(harness, "is_installed", lambda: False)
    with pytest.raises(SpecError, match=r"headway\[eval\]"):
        evaluate_harness(model, "arc_easy", include=None, shots=None, limit=None, done=lambda tokens: None)
