"""Command lines as people write them who know other tools: understood where they mean one thing, else one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from headway.launcher.cli.main import main
from headway.launcher.cli.parser import make_parser, value_options
from headway.launcher.cli.words import FILE_OPTIONS, plain, split_dotted, verb_elsewhere
from headway.launcher.spec.aliases import fold
from headway.launcher.spec.fields import paths, root_shape
from headway.launcher.spec.spec import Spec

SPEC = """
model: {width: 32, layers: 1, ffn_width: 64}
attention: {type: gqa, heads: 4, kv_heads: 2, head_dim: 8}
data:
  seq_len: 32
  source: {type: synthetic, task: mqar, vocab_size: 32, pairs: 4, queries: 4}
optimizer: {lr: 3.0e-3}
train: {tokens: 2560, global_batch: 8, micro_batch: 8}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`config(words)`: what `headway train --print-config` says of a command line: status, values, errors."""
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(SPEC)

    def run(*words: str) -> tuple[int, dict[str, str], str]:
        code = main(["train", "--print-config", *words])
        out, err = capsys.readouterr()
        rows = [line.split(" = ") for line in out.splitlines() if " = " in line]
        return code, {key.strip(): rest.partition("#")[0].strip() for key, rest in rows}, err

    return run


@pytest.mark.parametrize(
    "words",
    [
        ["x.yaml", "optimizer.lr=0.01", "train.tokens=512"],
        ["x.yaml", "--optimizer.lr=0.01", "--train.tokens=512"],
        ["x.yaml", "--optimizer.lr", "0.01", "train.tokens=512"],
        ["--optimizer.lr", "0.01", "x.yaml", "--train.tokens", "512"],
        ["--optimizer.lr=0.01", "x.yaml", "--train.tokens=512", "--print-config"],
        ["x.yaml", "+optimizer.lr=0.01", "++train.tokens=512"],
    ],
)
def test_one_meaning_is_understood_however_it_is_written(config, words: list[str]) -> None:
    code, values, err = config(*words)
    assert code == 0, err
    assert (values["optimizer.lr"], values["train.tokens"]) == ("0.01", "512")
    assert values["optimizer.weight_decay"] == "0.1"


def test_both_ways_at_once_are_a_value_given_twice(config) -> None:
    code, _, err = config("x.yaml", "optimizer.lr=0.01", "--optimizer.lr=0.02")
    assert code == 64 and "optimizer.lr: is given twice" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["x.yaml", "optimizer.lr", "0.01"], "Write optimizer.lr=0.01"),
        (["x.yaml", "--tracking.tensorboard"], "argument '--tracking.tensorboard': is not KEY=VALUE"),
        (["x.yaml", "--optimizer.lr", "--dry-run"], "argument '--optimizer.lr': is not KEY=VALUE"),
        (["x.yaml", "--optimizer.learning_rate=1"], "Did you mean optimizer.lr?"),
        (["x.yaml", "--lr", "1e-3"], "write optimizer.lr=1e-3 behind the file, without dashes"),
        (["x.yaml", "--learning-rate=1e-3"], "write optimizer.lr=1e-3 behind the file, without dashes"),
        (["x.yaml", "--max_steps", "3"], "steps x train.global_batch x data.seq_len. Values are written KEY=VALUE"),
        (["x.yaml", "--seed=3"], "if it is a value of the spec, write seed=3 behind the file, without dashes"),
        (["x.yaml", "--dryrun"], "Did you mean --dry-run?"),
        (["--config", "x.yaml"], "the file is given without an option, headway train FILE"),
        (["--job.config_file", "x.yaml"], "the file is given without an option, headway train FILE"),
        (["optimizer.lr=1e-3", "x.yaml"], "write x.yaml optimizer.lr=... in this order"),
        (["seed=1"], "write FILE seed=... in this order"),
        (["x.yaml", "y.yaml"], "argument 'y.yaml': is not KEY=VALUE"),
    ],
)
def test_what_could_mean_two_things_is_one_message_with_the_right_form(config, words: list[str], says: str) -> None:
    code, values, err = config(*words)
    assert code == 64 and values == {}
    assert says in err and err.count("usage:") <= 1 and err.count("error:") == 1


def test_a_file_with_a_sign_in_its_name_is_a_file(config) -> None:
    Path("lr=1.yaml").write_text(SPEC)
    assert config("lr=1.yaml")[0] == 0


def test_an_option_takes_its_own_value_even_one_with_dashes_and_dots(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--against" in value_options(make_parser()) and "--dry-run" not in value_options(make_parser())
    code = main(["bench", "step", "--against", "--attention.type=gqa", "optimizer.lr=1", "x.yaml"])
    assert code == 64 and "argument --against: expected one argument" in capsys.readouterr().err


def test_what_stands_behind_two_dashes_is_left_alone() -> None:
    assert split_dotted(["generate", "run", "--", "--a.b=c"]) == (["generate", "run", "--", "--a.b=c"], [])


def test_verbs_without_values_refuse_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--optimizer.lr=1"]) == 64
    err = capsys.readouterr().err
    assert err.startswith("usage: headway doctor") and "unrecognized arguments: optimizer.lr=1" in err


def test_no_key_of_a_spec_is_taken_for_an_option_that_names_the_file() -> None:
    legal = {fold(key.rpartition(".")[2]) for key in paths(root_shape(Spec), {})}
    assert legal & FILE_OPTIONS == set()


def test_only_the_plus_of_hydra_is_taken_away() -> None:
    assert [plain(word) for word in ("+a.b=1", "++a=+2", "a=+2", "+a", "~a.b", "+++a=1")] == [
        "a.b=1", "a=+2", "a=+2", "+a", "~a.b", "+++a=1"]  # fmt: skip


@pytest.mark.parametrize(("word", "verb"), [("fit", "train"), ("tensorboard", "board"), ("preprocess", "data build")])
def test_verbs_of_other_tools_are_led_to_ours(word: str, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word, "x.yaml"]) == 64
    assert f"Did you mean {verb}?" in capsys.readouterr().err


def test_every_verb_of_other_tools_leads_to_one_that_exists() -> None:
    from headway.launcher.cli.parser import all_verbs
    from headway.launcher.cli.words import VERBS

    known = {verb.name: {action.name for action in verb.actions} for verb in all_verbs()}
    for target, names in VERBS.items():
        verb, _, action = target.partition(" ")
        assert target in ("--help", "--version") or (verb in known and (not action or action in known[verb]))
        assert not known.keys() & {name for name in names.split() if name != "complete"}
        assert all(verb_elsewhere(name) == target for name in names.split())
