"""How many cells train at once: what the host has by default, and one message where it has too little."""

from __future__ import annotations

import os

import pytest
from played_study import Folder

from headway.launcher.base.errors import SpecError
from headway.launcher.study import jobs
from headway.launcher.study.jobs import Jobs, jobs_for
from headway.launcher.study.run import run_study


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Folder(tmp_path)


@pytest.fixture
def host(monkeypatch):
    """A host of 8 cores without a GPU; `host(cores=..., gpus=..., memory=...)` makes it another one."""

    def make(*, cores: int = 8, gpus: int = 0, memory: float = 1e12) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(jobs, "has_nvidia_gpu", lambda: gpus > 0)
        monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        monkeypatch.setattr("headway.launcher.plan.free_memory.available_bytes", lambda: memory)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    make()
    return make


def found(folder: Folder, *arguments: str, wanted: int | None = None) -> Jobs:
    return jobs_for(folder.plan("train.micro_batch=1", *arguments).cells, wanted)


def test_one_thread_cells_get_a_core_each(folder, host):
    host(cores=3)
    assert found(folder) == Jobs(count=3)
    host(cores=64)
    assert found(folder).count == 4, "as many as there are cells"
    host(cores=1)
    assert found(folder).count == 1


def test_threads_and_processes_of_a_cell_count(folder, host):
    assert found(folder, "launch.threads=4").count == 2
    assert found(folder, "launch.threads=2", "launch.processes=2").count == 2
    assert found(folder, "launch.threads=3").count == 2
    assert found(folder, "launch.threads=16").count == 1


def test_cells_that_use_all_cores_run_one_after_another(folder, host):
    assert found(folder, "launch.threads=null").count == 1
    assert found(folder, "launch.threads=null", wanted=1).count == 1
    with pytest.raises(SpecError, match=r"--jobs: launch\.threads is not set, .* all 8 cores; add launch\.threads=1 "):
        found(folder, "launch.threads=null", wanted=2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["launch.hosts=2", "launch.address=10.0.0.1"], "launch.hosts is 2, and each cell needs all hosts"),
        (["launch.port=29510"], "launch.port is 29510 for all cells"),
        (["launch.env={CUDA_VISIBLE_DEVICES: '2'}", "launch.device=cuda"], "launch.env sets CUDA_VISIBLE_DEVICES"),
    ],
)
def test_cells_that_would_share_what_only_one_can_have_run_one_after_another(folder, host, arguments, says):
    host(gpus=4)
    assert found(folder, *arguments) == Jobs(count=1)
    with pytest.raises(SpecError) as error:
        found(folder, *arguments, wanted=2)
    assert str(error.value).startswith("--jobs: 2 cells cannot train at once: ") and says in str(error.value)


def test_more_cells_than_cores_are_refused_before_anything_is_written(folder, host):
    with pytest.raises(SpecError) as error:
        run_study(folder.study, ["launch.threads=4"], jobs=3)
    assert str(error.value) == (
        "--jobs: 3 cells of 4 threads each need 12 cores, and this process may use 8; use --jobs 2 at most, or fewer "
        "launch.threads"
    )
    assert not folder.out.exists()


def test_memory_bounds_the_default_and_refuses_a_number(folder, host):
    each = jobs._bytes(folder.plan().cells)
    assert each > jobs.PROCESS_BYTES
    host(memory=2.5 * each)
    assert found(folder).count == 2
    with pytest.raises(SpecError, match=r"--jobs: 3 cells need about .* GB of memory, and .* GB are available; use "):
        found(folder, wanted=3)
    host(memory=0.5 * each)
    assert found(folder).count == 1, "one cell is tried in any case"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_is_not_moved_aside_for_jobs_that_cannot_be(folder, host, fresh):
    folder.out.mkdir(parents=True)
    (folder.out / "study.json").write_text("{}")
    with pytest.raises(SpecError, match="--jobs: 9 cells"):
        run_study(folder.study, jobs=9, fresh=fresh)
    assert [p.name for p in folder.out.parent.iterdir()] == ["small"]


def test_every_cell_has_gpus_of_its_own(folder, host):
    host(gpus=4)
    two = found(folder, "launch.device=cuda", wanted=2)
    assert two.devices == (("0",), ("1",))
    assert two.environment(1) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert found(folder, "launch.device=auto").count == 4
    pairs = found(folder, "launch.device=cuda", "launch.processes=2")
    assert pairs.devices == (("0", "1"), ("2", "3"))
    assert found(folder, "launch.device=cuda", "launch.processes=4") == Jobs(count=1)
    with pytest.raises(SpecError, match=r"--jobs: 3 cells of 2 GPUs each need 6 GPUs, .* shows 4; use --jobs 2"):
        found(folder, "launch.device=cuda", "launch.processes=2", wanted=3)


def test_cells_get_the_gpus_that_the_study_was_given(folder, host, monkeypatch):
    host(gpus=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7f")
    assert found(folder, "launch.device=cuda").devices == (("5",), ("GPU-7f",))


def test_without_cells_there_is_nothing_to_refuse(host):
    assert jobs_for([], 1000) == Jobs(count=1)
