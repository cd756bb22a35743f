"""Whole runs in a hostile folder and environment execute nothing from it and change only their own folder."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SECRET = "sesame-91c4e7"
MODULES = (
    "yaml",
    "torch",
    "deepspeed",
    "numpy",
    "json",
    "headway",
    "launcher",
    "sitecustomize",
    "usercustomize",
    "conftest",
)
TINY = """
name: tiny
model: {width: 16, layers: 1, ffn_width: 16}
attention: {type: gqa, heads: 2, kv_heads: 1, head_dim: 8}
data: {seq_len: 16, source: {type: synthetic, task: mqar, vocab_size: 16, pairs: 3, queries: 3}}
optimizer: {lr: 3.0e-3}
train: {tokens: 128, global_batch: 2, micro_batch: 1, validation_tokens: 32}
checkpoint: {every_tokens: 64}
launch: {threads: 1}
"""


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def hostile_folder(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A working folder whose name has shell syntax, with files that programs load by default; and an environment."""
    here, home, temporary = tmp_path / "a b;$(touch canary)`touch canary`'\"", tmp_path / "home", tmp_path / "tmp"
    for folder in (here, home, temporary, tmp_path / "path"):
        folder.mkdir()
    (here / "tiny.yaml").write_text(TINY)
    canary = tmp_path / "canary"
    for name in MODULES:
        (here / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')")
    for folder in (here, home):
        (folder / ".deepspeed_env").write_text(f"FOO=x$(touch {canary})\nBAR; touch {canary}; export Z=1\n")
    # A Python with this PYTHONPATH runs sitecustomize first, which writes to a log.
    log = str(tmp_path / "started")
    (tmp_path / "path" / "sitecustomize.py").write_text(
        f"import sys\nwith open({log!r}, 'a') as f:\n    f.write(' '.join(sys.orig_argv) + chr(10))\n"
    )
    (tmp_path / "startup.py").write_text(f"open({str(canary)!r}, 'w')")
    env = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    env |= {"HOME": str(home), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "HF_TOKEN": SECRET}
    return here, env


@pytest.fixture(scope="module")
def audited(tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    tmp_path = tmp_path_factory.mktemp("audited")
    here, env = hostile_folder(tmp_path)
    checkpoints = here / "runs" / "tiny" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for name in ("evil.pt", ".metadata", "latest", "pytorch_model.bin"):
        (checkpoints / name).write_bytes(pickle.dumps(Evil(tmp_path / "canary")))
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            str(HERE / "audited.py"),
            str(tmp_path / "report"),
            "tiny.yaml",
            "launch.env={HF_TOKEN: null}",
        ],
        cwd=here,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        umask=0,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(tmp_path.rglob("canary")), "something in the working folder was executed"
    report = json.loads((tmp_path / "report").read_text())
    assert any(
        "summary.json" in path for path in report["written"]
    )  # the run was complete, and its writes were recorded
    return here, report


def test_a_run_connects_to_nothing_but_its_own_host(audited):  # vector 15
    assert audited[1].get("network", []) == []


def test_a_run_unpickles_nothing(audited):  # vectors 1-3
    assert audited[1].get("unpickled", []) == []


def test_a_run_writes_only_to_its_folder_caches_and_temporary_files(audited):  # P8
    here, report = audited
    allowed = [
        here / "runs" / "tiny",
        here.parent / "home" / ".cache",
        here.parent / "home" / ".triton",
        here.parent / "tmp",
    ]
    above = {here / "runs", Path("/dev/null"), here.parent / "home", *map(Path, ("/dev/shm",))}
    outside = [
        path
        for path in map(Path, report["written"])
        if path not in above and not any(path.is_relative_to(folder) for folder in allowed) and path.suffix != ".pyc"
        if "__pycache__" not in path.parts
    ]
    assert outside == []


def test_a_run_reads_only_its_own_files_of_the_working_folder(audited):  # vector 10, P8
    here, report = audited
    run = here / "runs" / "tiny"
    read = [path for path in map(Path, report["read"]) if path.is_relative_to(here) or path.name == ".deepspeed_env"]
    read = [path for path in read if not path.name.startswith("__editable__")]  # files of an editable install
    assert {path for path in read if not path.is_relative_to(run)} <= {here / "tiny.yaml"}
    assert not [path for path in read if path.name in ("evil.pt", ".metadata", "latest", "pytorch_model.bin")]


def test_a_run_starts_only_known_programs(audited):
    # git: the commit for the run card; gcc: DeepSpeed's check for libaio
    assert {program.split("'")[1] for program in audited[1].get("started", [])} <= {"git", "gcc"}


def test_files_of_a_run_are_writable_only_by_their_owner_under_any_umask(audited):  # vector 14
    here, _ = audited
    ours = {
        path: path.stat().st_mode for path in (here / "runs" / "tiny").rglob("*") if not path.name.startswith("evil")
    }
    made = {path: mode for path, mode in ours.items() if path.name not in (".metadata", "latest", "pytorch_model.bin")}
    made.pop(here / "runs" / "tiny" / "checkpoints")  # created by this test
    assert made and [str(path) for path, mode in made.items() if mode & 0o022] == []
    locks = [path for path in ours if path.suffix == ".lock"]
    assert locks and all(ours[path] & 0o077 == 0 for path in locks)


def test_a_run_leaves_no_files_writable_by_others_in_the_temporary_folder(audited):  # vector 14
    left = [path for path in (audited[0].parent / "tmp").rglob("*") if path.stat().st_mode & 0o022]
    assert left == []


def texts(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_started_by_the_command_ignores_its_surroundings_and_keeps_secrets(tmp_path):  # vectors 8, 10, 11
    here, env = hostile_folder(tmp_path)
    env |= {"PYTHONPATH": str(tmp_path / "path"), "PYTHONSTARTUP": str(tmp_path / "startup.py")}
    env |= {
        "DS_ENV_FILE": str(here / ".deepspeed_env"),
        "BASH_ENV": str(tmp_path / "startup.py"),
        "WANDB_API_KEY": SECRET,
    }
    options = [
        "launch.method=deepspeed",
        "launch.env={HF_TOKEN: null, MODE: '$(touch canary)'}",
        "run_dir='r;$(touch canary)'",
    ]
    run = here / "r;$(touch canary)"
    done: Any = subprocess.run(
        [sys.executable, "-P", "-m", "headway.launcher", "train", "tiny.yaml", *options],
        cwd=here,
        env=env,
        capture_output=True,
        timeout=240,
        umask=0o077,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert json.loads((run / "summary.json").read_text())["complete"] is True
    assert not list(tmp_path.rglob("canary"))
    # The command's Python was started with the user's PYTHONPATH, those of the ranks were not.
    started = (tmp_path / "started").read_text().splitlines()
    assert len(started) == 1 and "headway.launcher" in started[0]
    assert SECRET.encode() not in done.stdout + done.stderr
    assert texts(run) and [str(path) for path, text in texts(run).items() if SECRET.encode() in text] == []
    assert {path.stat().st_mode & 0o077 for path in run.rglob("*")} == {0}
