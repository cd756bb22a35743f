"""What a command imports before its first line of output: seconds that every start pays."""

import subprocess
import sys
from pathlib import Path

import pytest

from headway.launcher.run.resolve import resolve
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.load import load_spec

ROOT = Path(__file__).resolve().parents[3]
TINY = str(ROOT / "yaml/base/tiny.yaml")
STUDY = str(ROOT / "yaml/quickstart.yaml")
HEAVY = (
    "torch",
    "deepspeed",
    "pandas",
    "matplotlib",
    "streaming",
    "scipy",
    "tensorboard",
    "transformers",
    "boto3",
    "mlflow",
    "wandb",
)
COMPILER = ("torch._dynamo", "torch._inductor", "sympy")

MAIN = """
import sys
from headway.launcher.cli.main import main
code = main(sys.argv[1:])
print("IMPORTED", code, *sys.modules)
"""
RANK = """
import sys
from headway.launcher.train import worker
code = worker.main()
print("IMPORTED", code, *sys.modules)
"""


def imported(code: str, *arguments: str, cwd: Path, **env: str) -> set[str]:
    """Names of the modules that a process has imported when the command in it has ended well."""
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={"PATH": "/usr/bin:/bin", **env})
    words = done.stdout.splitlines()[-1].split()
    assert done.returncode == 0 and words[:2] == ["IMPORTED", "0"], done.stdout + done.stderr
    return set(words[2:])


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["ls", "."]], ids=" ".join)
def test_what_needs_no_spec_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    assert not imported(MAIN, *arguments, cwd=tmp_path) & {*HEAVY, "numpy", "pydantic"}


def test_completion_imports_torch_for_its_first_list_of_keys_only(tmp_path: Path) -> None:
    runs = [imported(MAIN, "completion", "bash", cwd=tmp_path, HOME=str(tmp_path)) for _ in range(2)]
    assert [run & {*HEAVY} for run in runs] == [{"torch"}, set()]


@pytest.mark.parametrize(
    "arguments",
    [["train", TINY, "--print-config"], ["train", TINY, "--dry-run"], ["study", "status", STUDY]],
    ids=["print-config", "dry-run", "study status"],
)
def test_what_reads_a_spec_imports_torch_and_no_more(arguments: list[str], tmp_path: Path) -> None:
    # Torch is for the mechanisms: the config and the module of each are in one file (docs/cli.md).
    assert imported(MAIN, *arguments, cwd=tmp_path) & {*HEAVY, *COMPILER} <= {"torch"}


@pytest.mark.parametrize("engine, more", [("auto", set()), ("deepspeed", {"deepspeed"})])
def test_a_rank_trains_writes_events_and_saves_without_a_compiler_and_without_boto3(
    engine: str, more: set[str], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    small = ["train.tokens=4096", "schedule.warmup_tokens=1024", "launch.device=cpu", f"run_dir={path}"]
    small.append(f"parallel.engine={engine}")
    spec, _ = resolve(load_spec(Path(TINY), small).spec)
    RunDir.of(spec).adopt(spec)
    names = ("RANK", "LOCAL_RANK", "MASTER_PORT")
    ranks = {**dict.fromkeys(names, "0"), "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    found = imported(RANK, str(path), cwd=tmp_path, OMP_NUM_THREADS="1", **ranks)
    # scipy: at the first validation, for its interval over documents.
    assert found & {*COMPILER, *HEAVY} == {"torch", "tensorboard", "scipy"} | more
    assert list((path / "tensorboard").iterdir()) and list((path / "checkpoints").iterdir())


def test_a_command_flushes_and_runs_exit_handlers_although_it_skips_the_teardown(tmp_path: Path) -> None:
    code = (
        "import atexit, sys; from headway.launcher.cli.main import run; sys.argv = ['headway', '--version']; "
        "atexit.register(lambda: print('handler')); run()"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "handler" and len(done.stdout.splitlines()) > 1


def test_a_command_with_another_thread_waits_for_it() -> None:
    code = (
        "import sys, threading, time; from headway.launcher.cli.main import run; sys.argv = ['headway', '--version']; "
        "threading.Thread(target=lambda: (time.sleep(0.5), print('thread'))).start(); run()"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "thread"


def test_tensor_parallel_ranks_do_not_import_wandb_with_megatron(tmp_path: Path) -> None:
    """megatron-core's timers import it where it is installed: seconds, and folders that a killed rank leaves behind."""
    (tmp_path / "wandb.py").write_text("raise SystemExit('wandb was imported')")
    code = """
import sys
from types import SimpleNamespace
from headway.parallel import collectives, logical
layout = SimpleNamespace(tp_size=2, tp_rank=0, tensor_group=None)
collectives.tensor_ranks(layout, sequence_parallel=False)
logical.prepare_tensor_parallel([], layout, sequence_parallel=False)
print("IMPORTED", 0, *sys.modules)
"""
    found = imported(code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "megatron.core.tensor_parallel.layers" in found and "wandb" not in found
