"""What verbs print with `--quiet` and `--json`, which progress they show, and that docs/cli.md says so."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from headway.launcher.base import console
from headway.launcher.cli.main import main
from headway.launcher.cli.parser import all_verbs
from headway.launcher.run.run_dir import RunDir
from headway.launcher.study.eta import step_share

DOCS = (Path(__file__).resolve().parents[3] / "docs" / "cli.md").read_text()
SHORT = ("train.tokens=2560",)


class Shown:
    """Bars that were shown: [what, total, done]."""

    def __init__(self) -> None:
        self.bars: list[list] = []

    @contextlib.contextmanager
    def __call__(self, what, total=None, unit="", **_) -> Iterator[Shown]:
        self.bars.append([what, total, 0])
        yield self

    def update(self, n: int = 1) -> None:
        self.bars[-1][2] += n

    def name(self, what: str) -> None:
        pass


@pytest.fixture
def shown(monkeypatch):
    bars = Shown()
    monkeypatch.setattr(console, "progress", bars)
    return bars


@pytest.fixture(scope="module")
def trained(headway_once):
    """A run that was trained with --json, and what that printed."""
    done = headway_once.train("run_dir=run", *SHORT, "--json")
    assert done.returncode == 0, done.stderr
    return headway_once.folder / "run", done


# ---------------------------------------------------------------- train


def test_train_as_json_prints_the_summary_alone_and_its_steps_on_stderr(trained):
    run, done = trained
    record = json.loads(done.stdout)
    assert record == {"run_dir": "run", **json.loads((run / "summary.json").read_text())}
    assert record["complete"] is True and record["tokens"] == 2560
    shares = [share for line in done.stderr.splitlines() if (share := step_share(line)) is not None]
    assert shares and shares == sorted(shares) and shares[-1] == 1


def test_train_quiet_prints_one_line_also_where_nothing_was_left_to_do(headway):
    for _ in range(2):
        done = headway.train("run_dir=run", *SHORT, "--quiet")
        loss = json.loads((headway.folder / "run" / "summary.json").read_text())["final_validation_loss"]
        assert done.returncode == 0 and done.stderr == ""
        assert done.stdout == f"run: complete, 2,560 tokens, validation loss {loss:.4f}\n"


def test_a_mistake_leaves_stdout_empty_for_scripts(headway, tmp_path):
    for option in ("--json", "--quiet"):
        done = headway.train("model.widht=3", option)
        assert done.returncode == 64 and done.stdout == "" and "model.width" in done.stderr
    done = headway.train("--dry-run", "--json")
    assert done.returncode == 64 and "leave out --json" in done.stderr


def test_the_spec_as_json_is_the_spec(headway, capfd):
    assert main(["train", str(headway.spec), "optimizer.lr=1e-2", "--print-config", "--json"]) == 0
    spec = json.loads(capfd.readouterr().out)
    assert spec["optimizer"]["lr"] == 1e-2 and spec["model"]["width"] == 32


# ---------------------------------------------------------------- other verbs


def test_a_dataset_is_built_and_checked_for_a_script(tmp_path, capfd, monkeypatch, shown):
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    for i in range(20):
        Path(f"text/{i}.txt").write_text(f"text number {i} of a small corpus. " * 20)
    Path("corpus.yaml").write_text(
        "name: set\ncorpus: {type: text, paths: [text]}\nout: set\n"
        "tokenizer: {type: train_bpe, vocab_size: 300}\nvalidation_fraction: 0.2\n"
    )
    assert main(["data", "build", "corpus.yaml", "--json"]) == 0
    built = json.loads(capfd.readouterr().out)
    assert main(["data", "verify", "corpus.yaml", "--json"]) == 0
    checked = json.loads(capfd.readouterr().out)
    assert built.keys() == checked.keys() and built["train_tokens"] == checked["train_tokens"] > 0
    assert built["fingerprint"] == checked["fingerprint"] and len(built["fingerprint"]) == 64
    assert [bar[0] for bar in shown.bars[:4]] == [
        "read documents",
        "train tokenizer",
        "encode train",
        "encode validation",
    ]
    assert all(total in (None, done) for _, total, done in shown.bars)
    assert main(["data", "build", "corpus.yaml", "--quiet"]) == 0
    said = capfd.readouterr()
    assert said.err == "" and said.out.count("\n") == 1 and built["fingerprint"][:16] in said.out


def test_a_layout_search_counts_every_layout(headway, capfd, shown):
    assert main(["plan", str(headway.spec), "--gpus", "2", "--json"]) == 0
    assert "search" in json.loads(capfd.readouterr().out)
    (bar,) = [bar for bar in shown.bars if bar[0].startswith("search layouts")]
    assert bar[1] == bar[2] > 1


def test_a_check_of_checkpoints_counts_their_bytes(trained, capfd, shown):
    run, _ = trained
    assert main(["checkpoint", "verify", str(run)]) == 0
    sizes = [sum(f.stat().st_size for f in p.iterdir()) for p in RunDir(run).checkpoints.glob("step-*")]
    assert len(shown.bars) == len(sizes)
    for _, total, done in shown.bars:
        assert total == done > 0.5 * min(sizes)
    assert capfd.readouterr().err == ""


def test_an_export_counts_tensors_and_is_named_for_a_script(trained, tmp_path, capfd, shown):
    out = tmp_path / "out"
    assert main(["export", str(trained[0]), str(out), "--to", "safetensors", "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record["out"] == str(out) and record["to"] == "safetensors" and record["step"] == 10
    assert set(record["files"]) == {p.name for p in out.iterdir()} and "bit for bit" in record["check"]
    (bar,) = [bar for bar in shown.bars if bar[0] == "write tensors"]
    assert bar[1] == bar[2] > 5


def test_a_quiet_doctor_still_says_what_it_was_asked(capfd):
    code = main(["doctor", "--quiet"])
    assert capfd.readouterr().out.splitlines()[-1].startswith("ready" if code == 0 else "not ready")


# ---------------------------------------------------------------- documentation


def options_of(verb) -> set[str]:
    parser = argparse.ArgumentParser()
    verb.arguments(parser)
    flags = {s: a for a in parser._actions for s in a.option_strings}
    return {name for name in ("--quiet", "--json") if name in flags and flags[name].nargs == 0}


def rows_of_docs() -> dict[str, tuple[str, str]]:
    """`VERB` or `VERB ACTION` -> the cells under --quiet and --json."""
    rows: dict[str, tuple[str, str]] = {}
    for line in DOCS.partition("## Verbs")[2].partition("##")[0].splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) != 4 or not cells[0].startswith("`headway"):
            continue
        first, *more = re.findall(r"`([^`]*)`", cells[0])
        verb = first.split()[1:]
        for words in [verb, *([verb[0], action] for action in more)]:
            rows[" ".join(words)] = (cells[2], cells[3])
    return rows


def test_the_documentation_lists_every_verb_with_its_options():
    rows = rows_of_docs()
    expected = {}
    for verb in all_verbs():
        for action in verb.actions or (() if verb.hidden else (verb,)):
            name = verb.name if action is verb else f"{verb.name} {action.name}"
            expected[name] = options_of(action)
    assert rows.keys() == expected.keys()
    for name, (quiet, as_json) in rows.items():
        assert (quiet == "yes") == ("--quiet" in expected[name]), name
        assert (not as_json.startswith("no")) == ("--json" in expected[name]), name
