"""Completion: what may follow on a command line, and that a real bash offers it."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headway.launcher.cli import keys
from headway.launcher.cli.completion import SCRIPTS, complete
from headway.launcher.cli.main import main
from headway.launcher.cli.parser import all_verbs, make_parser
from headway.launcher.spec.fields import paths, root_shape
from headway.launcher.spec.spec import Spec
from headway.model.attention.registry import MECHANISMS, OTHER_TYPES

PARSER = make_parser()


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def words(line: str) -> list[str]:
    return [row.partition("\t")[0] for row in complete(line, PARSER)]


def test_verbs_and_actions_follow_their_names_without_the_hidden_ones() -> None:
    assert words("headway ") == [verb.name for verb in all_verbs() if not verb.hidden]
    assert words("headway tr") == ["train"]
    assert words("/opt/bin/headway study r") == ["run", "report"]
    assert words("FOO=1 headway checkpoint ") == ["list", "verify", "show"]
    assert words("headway fork") == [] and words("headway fly ") == []


def test_a_word_comes_with_its_description() -> None:
    assert "train\ttrain one spec; the same command again continues the run" in complete("headway t", PARSER)


def test_options_follow_a_dash_once_each_unless_they_repeat() -> None:
    assert words("headway train --") == [
        "--help",
        "--extend",
        "--dry-run",
        "--node-rank",
        "--print-config",
        "--quiet",
        "--json",
    ]
    assert words("headway train x.yaml --dry-run --") == [
        "--help",
        "--extend",
        "--node-rank",
        "--print-config",
        "--quiet",
        "--json",
    ]
    assert "--against" in words("headway bench step x.yaml --against a.b=1 --")


def test_an_option_is_followed_by_its_choices_or_files() -> None:
    assert words("headway export runs/x out --to ") == ["hf", "safetensors"]
    assert words("headway export runs/x out --to=s") == ["--to=safetensors"]
    assert words("headway bench gpu --out ") == [":file"]
    assert words("headway plan x.yaml --gpus ") == []


def test_files_are_left_to_the_shell_where_a_file_stands() -> None:
    assert words("headway train ") == words("headway study run yaml/q") == [":yaml"]
    assert words("headway generate ") == words("headway board runs/a ") == [":file"]
    assert words("headway completion ") == ["bash", "zsh", "fish"]


def test_dotted_keys_follow_the_file_and_values_follow_the_sign() -> None:
    assert words("headway train x.yaml optimizer.l") == ["optimizer.lr="]
    assert words("headway train x.yaml --dry-run schedule.w") == ["schedule.warmup_tokens="]
    assert "optimizer.lr=" not in words("headway plan x.yaml optimizer.lr=1e-3 optimizer.")
    assert words("headway train x.yaml attention.type=") == [
        f"attention.type={name}" for name in [*MECHANISMS, *OTHER_TYPES]
    ]
    assert words("headway train x.yaml parallel.precision=b") == ["parallel.precision=bf16"]
    assert words("headway train x.yaml tracking.tensorboard=") == [
        "tracking.tensorboard=true",
        "tracking.tensorboard=false",
    ]
    assert words("headway train x.yaml train.micro_batch=") == ["train.micro_batch=auto"]
    assert words("headway data build x.yaml shard") == ["shard_bytes="]


def test_every_key_that_takes_a_value_is_offered_and_no_other() -> None:
    legal = set(paths(root_shape(Spec), {}))
    offered = {word.removesuffix("=") for word in words("headway train x.yaml ")}
    sections = {key.rpartition(".")[0] for key in legal}
    assert offered <= legal and legal - offered <= sections | {"launch.env", "data.validation", "attention.kinds"}


def test_an_open_quote_does_no_harm() -> None:
    assert words("headway generate runs/x 'def ") == []


def test_keys_are_kept_until_a_source_changes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = keys.keys_of("spec")
    assert known and len(list((cache / "headway").glob("keys-spec-*.txt"))) == 1
    monkeypatch.setattr(keys, "_lines", lambda kind: iter(["a.b x y"]))
    assert keys.keys_of("spec") == known
    monkeypatch.setattr(keys, "_stamp", lambda: "changed")
    assert keys.keys_of("spec") == {"a.b": ["x", "y"]}
    assert [file.name for file in (cache / "headway").glob("keys-spec-*.txt")] == ["keys-spec-changed.txt"]


def test_no_folder_for_the_cache_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "optimizer.lr" in keys.keys_of("spec")


@pytest.mark.parametrize("shell", list(SCRIPTS))
def test_each_shell_gets_its_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert capsys.readouterr().out == SCRIPTS[shell] + "\n"
    if shutil.which(shell):
        flags = ["-n"] if shell != "fish" else ["--no-execute"]
        done = subprocess.run([shell, *flags], input=SCRIPTS[shell], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr


def test_completion_knows_no_torch_once_keys_are_kept(cache: Path) -> None:
    keys.keys_of("spec")
    code = (
        "import sys; from headway.launcher.cli.main import main; "
        "main(['complete', 'headway train x.yaml optimizer.l']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "optimizer.lr=\n")


class Bash:
    """An interactive bash on a terminal of its own, with the completion of headway and readline's defaults."""

    def __init__(self, folder: Path) -> None:
        (folder / "bin").mkdir()
        command = folder / "bin" / "headway"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m headway.launcher "$@"\n')
        command.chmod(0o755)
        (folder / "script").write_text(SCRIPTS["bash"])
        rc = folder / "rc"
        rc.write_text(f"PS1='ready> '\nsource {folder}/script\nbind 'set bell-style none'\n")
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            path = f"{folder}/bin:{os.environ['PATH']}"
            home = {"HOME": str(folder), "INPUTRC": "/dev/null", "TERM": "dumb", "PATH": path}
            os.execvpe("bash", ["bash", "--noprofile", "--rcfile", str(rc), "-i"], {**os.environ, **home})
        self.read_until("ready> ")

    def read_until(self, text: str, seconds: float = 60) -> str:
        shown, end = "", time.monotonic() + seconds
        while text not in shown:
            assert time.monotonic() < end, f"{text!r} did not come: {shown!r}"
            if select.select([self.terminal], [], [], 0.1)[0]:
                shown += os.read(self.terminal, 4096).decode()
        return shown

    def type(self, text: str, then: str) -> None:
        """Type on an empty line until `then` stands there, and delete the line."""
        os.write(self.terminal, text.encode())
        self.read_until(then)
        os.write(self.terminal, b"\x15\n")  # ctrl-u
        self.read_until("ready> ")

    def close(self) -> None:
        os.close(self.terminal)
        os.waitpid(self.pid, 0)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_real_bash_completes_verbs_files_keys_and_values(tmp_path: Path) -> None:
    keys.keys_of("spec")
    for name in ("small.yaml", "small.txt"):
        (tmp_path / name).write_text("")
    bash = Bash(tmp_path)
    try:
        bash.type("headway tra\t", "headway train ")
        bash.type("headway study st\t", "headway study status ")
        bash.type("headway train sm\t", "headway train small.yaml ")
        bash.type("headway train small.yaml --dr\t", "--dry-run ")
        bash.type("headway train small.yaml optimizer.l\t1", "small.yaml optimizer.lr=1")
        bash.type("headway train small.yaml attention.type=sw\tx", "small.yaml attention.type=switchhead x")
        bash.type("headway export a b --to h\t", "--to hf ")
    finally:
        bash.close()
