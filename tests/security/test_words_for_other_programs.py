"""Arguments that Headway passes to shells and programs arrive unchanged, or are refused before. Vectors 8-12."""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.hosts.commands import (
    INHERITED,
    check_caches,
    command,
    dry_run_text,
    full_environment,
    worker_environment,
)
from headway.launcher.hosts.place import check_ssh, read_hostfile, remote_command, start_others
from headway.launcher.hosts.slurm import job_script, submit
from headway.launcher.launch.start import train
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.yamlio import MAX_BYTES

LETTERS = "a /;$(){}`'\"\\|&<>*?[]!#~=%^é\t-\u202e"
EVIL = (
    "$(touch canary)",
    "`touch canary`",
    "; touch canary;",
    "| touch canary",
    "a b",
    "it's",
    '"',
    "-rf",
    "${IFS}",
    "é🙂",
    "&&",
)
TWO = ("launch.hosts=2", "launch.address=10.0.0.1", "launch.processes=2")


@pytest.fixture
def here(headway, monkeypatch):
    monkeypatch.chdir(headway.folder)
    yield headway.folder
    assert not list(headway.folder.rglob("canary"))


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Fake ssh, sbatch, srun and scontrol first on PATH; returns the argument lists they were called with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "calls"
    for name in ("ssh", "pdsh", "sbatch", "srun", "scontrol"):
        file = folder / name
        file.write_text(
            f"#!{sys.executable} -S\nimport json, sys\n"
            f"with open({str(log)!r}, 'a') as f:\n    f.write(json.dumps([{name!r}, *sys.argv[1:]]) + chr(10))\n"
            + ("print('first')\n" if name == "scontrol" else "print(7)\n")
        )
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def calls() -> list[list[str]]:
        import json

        return [json.loads(line) for line in log.read_text().splitlines()]

    return calls


def random_words(rng: random.Random) -> list[str]:
    return ["".join(rng.choices(LETTERS, k=rng.randrange(1, 12))) for _ in range(4)] + [rng.choice(EVIL)]


def test_a_shell_parses_a_remote_command_back_to_the_exact_words(tmp_path):  # vectors 11, 12
    rng = random.Random(3)
    for _ in range(60):
        words = random_words(rng)
        folder = tmp_path / words[0].replace("/", "_")
        *ssh, text = remote_command("b", 1, words, folder)
        assert ssh == ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "--", "b"]
        change, _, start = text.partition(" && exec ")
        assert shlex.split(change) == ["cd", str(folder)]
        assert shlex.split(start)[-2 - len(words) : -2] == words


def test_ssh_and_its_remote_shell_get_the_exact_arguments(here, programs, tmp_path):  # vector 12
    folder = tmp_path / "a b;$(touch canary)"
    (folder / "logs").mkdir(parents=True)
    check_ssh(["b"])
    arguments = ["spec.yaml", *(f"name={evil}" for evil in EVIL)]
    for process in start_others(["a", "b", "c"], arguments, folder, folder / "logs"):
        assert process.wait(20) == 0
    probe, *started = programs()
    assert probe == ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "--", "b", "true"]
    assert sorted(started) == [remote_command(name, host, arguments, folder) for host, name in ((1, "b"), (2, "c"))]
    # the words that the remote shell parses
    text = started[0][-1].replace("exec ", "printf '%s\\0' ")
    shown = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=True).stdout.split("\0")
    assert shown[-len(arguments) - 3 : -3] == arguments


def test_a_slurm_job_passes_the_exact_arguments_to_srun(here, programs):  # vector 12
    spec = load_spec(here / "tiny.yaml", ["launch.method=slurm", "launch.hosts=2", "train.global_batch=8"]).spec
    arguments = ["tiny.yaml", *(f"x={evil}" for evil in EVIL)]
    run = RunDir.of(spec)
    assert submit(job_script(spec, run, arguments, Path.cwd()), run) == 0
    script = run.path / "slurm" / "job.sbatch"
    assert programs()[0] == ["sbatch", "--parsable", str(script)]
    job = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "12", "SLURM_NODEID": "1"}
    subprocess.run(["bash", str(script)], env={**os.environ, **job}, check=True, timeout=20)
    srun = next(call for call in programs() if call[0] == "srun")
    at = srun.index("-c")
    assert srun[at - 1] == "bash" and srun[at + 2] == "headway" and srun[at + 3] == "launch.address=first"
    inner = srun[at + 1].replace("exec ", "printf '%s\\0' ")
    shown = subprocess.run(
        ["bash", "-c", inner, *srun[at + 2 :]], env={**os.environ, **job}, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    begin = shown.index("train") + 1
    assert shown[begin : begin + len(arguments)] == arguments


@pytest.mark.parametrize("method", ["torchrun", "deepspeed"])
def test_a_dry_run_parses_back_to_the_commands_that_are_executed(method, here):  # vectors 8, 12
    rng = random.Random(4)
    for _ in range(25):
        name = "".join(random_words(rng)).replace("\t", "")
        value = "".join(rng.choices(LETTERS.replace("\t", "").replace("\u202e", ""), k=9))
        extra = [({"run_dir": name, "launch.env": {"MODE": value}}, "test")]
        spec = load_spec(here / "tiny.yaml", [*TWO, f"launch.method={method}", "launch.interface=lo"], extra=extra).spec
        run = RunDir.of(spec)
        words = command(spec, run)
        assert all(isinstance(word, str) for word in words) and str(run.path.resolve()) in words
        lines = [line for line in dry_run_text(spec, run).split("\n") if line.startswith("env -i")]
        assert len(lines) == 2
        assert shlex.split(lines[0])[-len(words) :] == words and f"MODE={value}" in shlex.split(lines[0])


@pytest.mark.parametrize("evil", [*EVIL, "../x", "a/b", "", ".", "x" * 300, "a\nb", "\0"])
def test_a_run_name_with_special_characters_is_refused(evil, here):  # vector 8
    with pytest.raises(SpecError):
        load_spec(here / "tiny.yaml", extra=[({"name": evil}, "test")])


def test_a_folder_with_special_characters_in_its_name_keeps_it(here):  # vector 8
    for evil in EVIL:
        spec = load_spec(here / "tiny.yaml", extra=[({"run_dir": f"runs/{evil}"}, "test")]).spec
        run = RunDir.of(spec)
        with run.locked():
            run.adopt(spec)
    assert sorted(path.name for path in (here / "runs").iterdir()) == sorted(EVIL)


def test_ranks_get_only_variables_of_the_list_and_the_spec(here):  # vector 10
    loud = {
        **dict.fromkeys(("PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "PYTHONINSPECT", "PYTHONUSERBASE"), "evil"),
        **dict.fromkeys(("LD_PRELOAD", "LD_AUDIT", "BASH_ENV", "ENV", "DS_ENV_FILE", "SSH_ASKPASS"), "evil"),
        **dict.fromkeys(("NCCL_DEBUG_FILE", "UCX_TLS", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY"), "evil"),
        **dict.fromkeys(("TORCH_LOGS", "TORCHINDUCTOR_CACHE_DIR", "DS_ACCELERATOR", "GIT_SSH_COMMAND"), "evil"),
    }
    spec = load_spec(here / "tiny.yaml", [*TWO]).spec
    with pytest.MonkeyPatch.context() as patch:
        for name, value in loud.items():
            patch.setenv(name, value)
        env = full_environment(spec, {"MINE": "1"})
        text = dry_run_text(spec, RunDir.of(spec))
    assert set(env) <= {*INHERITED, "MINE", *worker_environment(spec)}
    assert "evil" not in env.values() and "evil" not in text
    assert not any(name.startswith("PYTHON") for name in INHERITED)


@pytest.mark.parametrize("name", ["TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"])
def test_a_cache_folder_that_others_can_write_is_refused(name, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o700)
    check_caches({name: str(tmp_path / "cache")})
    check_caches({name: str(tmp_path / "absent")})
    check_caches({})
    for mode in (0o720, 0o702, 0o1777):
        (tmp_path / "cache").chmod(mode)
        with pytest.raises(SpecError, match=f"^{name}: .*other users can write.*chmod go-w.*unset {name}"):
            check_caches({name: str(tmp_path / "cache")})


def test_a_cache_folder_of_the_spec_is_checked_as_one_of_the_environment(here, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o1777)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with pytest.raises(SpecError, match=r"^TRITON_CACHE_DIR: .*or in launch\.env"):
        train(here / "tiny.yaml", [f"launch.env.TRITON_CACHE_DIR={tmp_path / 'cache'}"])


@pytest.mark.parametrize("kind", ["pipe", "folder", "endless", "large", "bytes"])
def test_a_hostfile_that_is_not_a_small_text_file_is_refused_soon(kind, here):  # vector 9
    file = here / "hosts"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "endless":
        file.symlink_to("/dev/zero")
    else:
        file.write_bytes(b"a slots=2\n" * (MAX_BYTES // 8) if kind == "large" else b"\xff\xfea slots=2\n")
    spec = load_spec(here / "tiny.yaml", [*TWO, "launch.method=deepspeed", f"launch.hostfile={file}"]).spec
    with pytest.raises((NoInputError, SpecError), match=r"^launch\.hostfile: "):
        read_hostfile(spec)
