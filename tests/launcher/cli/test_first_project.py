"""`headway init`: a first project whose files do what its README says."""

import json
import re
from pathlib import Path

import pytest

from headway.launcher.cli.main import main
from headway.launcher.cli.parser import all_verbs

TINY = [
    "train.tokens=128",
    "train.micro_batch=4",
    "train.validation_tokens=32",
    "data.seq_len=16",
    "schedule.warmup_tokens=0",
    "model.width=16",
    "model.layers=1",
    "launch.threads=1",
]
TEXT = ["corpus={type: text, paths: [texts]}", "tokenizer.vocab_size=257", "min_document_bytes=1"]


def test_the_files_of_a_new_project_build_train_and_are_a_study(headway, monkeypatch, capsys):
    """Through the real command, with overrides that make it small."""
    headway.folder /= "project"
    monkeypatch.chdir(headway.folder.parent)
    assert main(["init", "project"]) == 0
    assert "headway train model.yaml" in capsys.readouterr().out
    monkeypatch.chdir("project")
    Path("texts").mkdir()
    for number in range(20):
        Path(f"texts/{number}.txt").write_text(f"text {number} " * 30)
    assert main(["data", "build", "corpus.yaml", *TEXT, "validation_fraction=0.3"]) == 0
    done = headway.run("train", "model.yaml", *TINY)
    assert done.returncode == 0, done.stderr
    capsys.readouterr()
    assert main(["ls", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert (run["name"], run["state"], run["tokens"]) == ("runs/model", "done", 128)
    assert main(["study", "run", "study.yaml", *TINY[:4], TINY[4], "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "3 variants x 2 seeds = 6 cells" in said and said.count(" train model.yaml ") == 6


def test_nothing_is_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("mine")
    Path("model.yaml").write_text("mine")
    assert main(["init"]) == 64
    said = capsys.readouterr().err
    assert "model.yaml is there already" in said and "headway init DIR" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.yaml", "notes.txt"]
    Path("model.yaml").unlink()
    Path("study.yaml").symlink_to("nowhere")
    assert main(["init"]) == 64
    Path("study.yaml").unlink()
    assert main(["init"]) == 0 and Path("notes.txt").read_text() == "mine"
    assert main(["init", "notes.txt"]) == 64
    assert "is a file" in capsys.readouterr().err


def test_every_command_of_its_readme_is_a_verb(tmp_path):
    assert main(["init", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    used = set(re.findall(r"headway ([a-z]+)", text))
    assert {"data", "train", "generate", "study", "ls", "rm"} <= used <= {verb.name for verb in all_verbs()}
    for file in re.findall(r"\b[a-z]+\.yaml", text):
        assert (tmp_path / file).is_file()


@pytest.mark.parametrize("name", ["corpus.yaml", "model.yaml", "study.yaml", "README.md"])
def test_lines_are_short_enough_to_read(tmp_path, name):
    main(["init", str(tmp_path)])
    assert max(map(len, (tmp_path / name).read_text().splitlines())) <= 120
