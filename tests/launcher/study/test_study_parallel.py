"""Several cells at once: which start when, that they do not disturb each other, and that all end with the study.

Training is played by a script, except in the tests at the end.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time

import pytest
from played_study import BASE, Folder, play
from run_folders import records, trajectory

from headway.launcher.compare.cells import cell_state
from headway.launcher.hosts.forked import VARIABLE, ForkServer
from headway.launcher.match.measured import Measurements
from headway.launcher.run.run_dir import read_mapping
from headway.launcher.study import run as study_module
from headway.launcher.study.config import load_study
from headway.launcher.study.plan import plan_study
from headway.launcher.study.queue import Queue, unfinished
from headway.launcher.study.run import run_study, status_study, train_plans

MEET = {
    "gqa/seed-1": "after cells/routed/seed-1/spec.json",
    "routed/seed-1": "after cells/gqa/seed-1/spec.json",
}
"""Each of the first two cells waits for the other one to start."""

ALL = ["gqa/seed-1", "routed/seed-1", "gqa/seed-2", "routed/seed-2"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A study on a host of two cores. Its variants are not timed."""
    monkeypatch.chdir(tmp_path)
    made = Folder(tmp_path)
    play(monkeypatch, cores=2)
    monkeypatch.setattr(study_module, "_report", lambda out: out / "report.html")
    return made


def run(folder: Folder, **options) -> int:
    return run_study(folder.study, timing=False, **options)


def outcomes(folder: Folder) -> dict[str, dict]:
    return read_mapping(folder.out / "outcomes.json")


def when(condition, then) -> threading.Thread:
    """Does `then` in a thread as soon as `condition` holds."""

    def wait() -> None:
        end = time.monotonic() + 60
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)
        then()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def steps(folder: Folder, key: str) -> int:
    path = folder.out / "cells" / key / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


# ---------------------------------------------------------------- at once


def test_as_many_cells_as_cores_train_at_once(folder):
    """Each of the first two waits for the other one to start."""
    folder.behave(
        {"gqa/seed-1": "after cells/routed/seed-1/spec.json", "routed/seed-1": "after cells/gqa/seed-1/spec.json"}
    )
    assert run(folder) == 0
    found = folder.trained()
    assert sorted(found[:2]) == sorted(ALL[:2]) and sorted(found[2:]) == sorted(ALL[2:])
    assert {outcomes(folder)[key]["beside"] for key in ALL[:2]} == {1}


def test_one_job_trains_one_cell_after_another(folder):
    assert run(folder, jobs=1) == 0
    assert folder.trained() == ALL
    assert {outcomes(folder)[key]["beside"] for key in ALL} == {0}


def test_a_failed_cell_does_not_stop_the_one_beside_it(folder):
    folder.behave({"gqa/seed-1": "fail", "routed/seed-1": "after outcomes.json"})
    assert run(folder) == 1
    assert {key: outcomes(folder)[key]["exit_code"] for key in ALL} == dict(zip(ALL, [74, 0, 0, 0], strict=True))


def test_lines_name_their_cell(folder, capsys):
    folder.behave(
        {"gqa/seed-1": "after cells/routed/seed-1/spec.json", "routed/seed-1": "after cells/gqa/seed-1/spec.json"}
    )
    run(folder)
    lines = [line for line in capsys.readouterr().out.splitlines() if " step " in line]
    pattern = re.compile(r"\[(\d)/4 (\w+/seed-\d) \| study eta [^]]+\] step \d+/10 loss")
    numbers = {found[2]: found[1] for line in lines if (found := pattern.fullmatch(line))}
    assert len(lines) == 40 and numbers == dict(zip(ALL, "1234", strict=True))


def test_status_shows_all_running_cells(folder, capsys):
    folder.behave({"gqa/seed-1": "hang", "routed/seed-1": "hang"})
    seen: list[str] = []

    def look() -> None:
        seen.extend(cell_state(folder.out / "cells" / key, outcomes(folder).get(key)).state for key in ALL)
        os.kill(os.getpid(), signal.SIGTERM)

    locks = [folder.out / "cells" / key / "run.lock" for key in ALL[:2]]
    when(lambda: all(lock.exists() and lock.read_text() for lock in locks), look)
    assert run(folder) == 75
    assert seen == ["running", "running", "missing", "missing"]
    capsys.readouterr()
    status_study(folder.study)
    states = [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert states == ["partial", "partial", "missing", "missing"]


# ---------------------------------------------------------------- order


def budgets(folder: Folder) -> None:
    wsd = BASE.replace("optimizer:", "schedule: {decay_fraction: 0.4}\noptimizer:").replace("2560", "5120")
    (folder.path / "base.yaml").write_text(wsd)
    folder.rewrite("seeds: [1, 2]", "seeds: [1]\nbudgets: [0.5, 1]")


def test_a_branch_waits_for_its_full_run_and_leaves_the_worker_to_another_cell(folder):
    budgets(folder)
    queue = Queue(waiting=unfinished([folder.plan()]), planned=[{c.key: c for c in folder.plan().cells}])
    first, second = queue.take(), queue.take()
    assert first and second and (first[0].label, second[0].label) == ("gqa/seed-1", "routed/seed-1")
    assert queue.take() is None
    queue.end(second[0])
    (folder.out / "cells/routed/seed-1/checkpoints/step-0000000007").mkdir(parents=True)
    third = queue.take()
    assert third and third[0].label == "routed/seed-1.budget-0.5" and not third[1].waits
    assert queue.take() is None
    queue.end(first[0])
    fourth = queue.take()
    assert fourth and fourth[0].label == "gqa/seed-1.budget-0.5" and fourth[1].waits  # its full run left no checkpoint


def test_a_branch_trains_beside_another_full_run(folder):
    budgets(folder)
    folder.behave({"routed/seed-1": "after cells/gqa/seed-1.budget-0.5/summary.json"})
    assert run(folder) == 0
    assert folder.trained()[2:] == ["gqa/seed-1.budget-0.5", "routed/seed-1.budget-0.5"]


def test_full_runs_of_all_seeds_come_before_smaller_budgets(folder):
    budgets(folder)
    folder.rewrite("seeds: [1]", "seeds: [1, 2]")
    full = [f"{variant}/seed-{seed}" for seed in (1, 2) for variant in ("gqa", "routed")]
    labels = [task.label for task in unfinished([folder.plan()])]
    assert labels == [*full, *(f"{label}.budget-0.5" for label in full)]


def test_cells_of_several_plans_are_seed_major_and_the_largest_plan_comes_first(folder):
    plans = [plan_study(load_study(folder.study), [f"train.tokens={tokens}"]) for tokens in (2560, 5120)]
    labels = [(task.number, task.cell.key) for task in unfinished(plans)]
    assert labels == [(plan, f"{v}/seed-{s}") for s in (1, 2) for plan in (1, 0) for v in ("gqa", "routed")]


def test_several_plans_share_the_workers_and_are_recorded_in_their_own_folders(folder, capsys):
    text = folder.study.read_text()
    studies = []
    for name in ("one", "two"):
        path = folder.path / f"{name}.yaml"
        path.write_text(text.replace("small", name).replace("seeds: [1, 2]", f"seeds: [1]\nout: {name}"))
        studies.append(load_study(path))
    folder.behave({"gqa/seed-1": "after ../two/cells/gqa/seed-1/spec.json"})  # both at the same time, of seed 1
    plans = [plan_study(study) for study in studies]
    kept = [Measurements(), Measurements()]
    assert train_plans(plans, kept, command="headway study run", jobs=2, timing=False) == 0
    for name in ("one", "two"):
        out = folder.path / name
        assert sorted(read_mapping(out / "outcomes.json")) == ["gqa/seed-1", "routed/seed-1"]
        assert {p.name for p in (out / "logs").iterdir()} == {"gqa.seed-1.log", "routed.seed-1.log"}
        assert read_mapping(out / "study.json")["command"] == "headway study run"
    assert "4 two/routed/seed-1 | study eta" in capsys.readouterr().out


# ---------------------------------------------------------------- the end of all


def test_one_signal_stops_all_cells_in_order(folder, capfd):
    folder.behave({"gqa/seed-1": "hang", "routed/seed-1": "hang"})
    when(lambda: steps(folder, ALL[0]) == steps(folder, ALL[1]) == 3, lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert run(folder) == 75
    shown = capfd.readouterr()
    assert shown.out.count("saved a checkpoint") == 2 and "SIGHUP: the running 2 cells stop" in shown.err
    assert {key: outcomes(folder)[key]["exit_code"] for key in ALL[:2]} == dict.fromkeys(ALL[:2], 75)
    folder.trained()
    folder.behave({})
    assert run(folder) == 0
    assert sorted(folder.trained()) == sorted(ALL)


def test_a_second_ctrl_c_kills_all_cells(folder):
    folder.behave({"gqa/seed-1": "deaf", "routed/seed-1": "deaf"})

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    when(lambda: steps(folder, ALL[0]) == steps(folder, ALL[1]) == 3, twice)
    begun = time.monotonic()
    assert run(folder) == 75
    assert time.monotonic() - begun < 50, "they would have slept for a minute"
    for key in ALL[:2]:
        pid = int((folder.out / "cells" / key / "run.lock").read_text())
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_two_cells_that_are_killed_at_once_fail_and_the_same_command_goes_on(folder):
    folder.behave({"gqa/seed-1": "hang", "routed/seed-1": "hang"})
    locks = [folder.out / "cells" / key / "run.lock" for key in ALL[:2]]

    def kill() -> None:
        for lock in locks:
            os.kill(int(lock.read_text()), signal.SIGKILL)

    when(lambda: all(lock.exists() and lock.read_text() for lock in locks), kill)
    assert run(folder) == 1
    assert {key: outcomes(folder)[key]["exit_code"] for key in ALL} == dict(zip(ALL, [-9, -9, 0, 0], strict=True))
    folder.trained()
    folder.behave({})
    assert run(folder) == 0
    assert folder.trained() == ALL[:2]


def test_a_cell_waits_for_the_process_that_its_killed_study_left_behind(folder):
    """After kill -9 of a study, a cell saves for a moment and holds its folder. Another cell starts meanwhile."""
    lock = folder.out / "cells/gqa/seed-1/run.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held:
        print(os.getpid(), end="", file=held, flush=True)
        when(lambda: outcomes(folder).get("routed/seed-1", {}).get("exit_code") == 0, held.close)
        assert run(folder, jobs=1) == 0
    found = folder.trained()
    assert found[0] == "routed/seed-1" and sorted(found) == sorted(ALL)


def test_how_many_cells_ran_beside_is_known_after_kill_9_and_kept_over_a_resume(folder):
    folder.behave({"gqa/seed-1": "hang", "routed/seed-1": "hang"})
    when(lambda: steps(folder, ALL[0]) == steps(folder, ALL[1]) == 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(folder) == 75
    folder.behave({})
    assert run(folder, jobs=1) == 0
    assert {key: outcomes(folder)[key]["beside"] for key in ALL} == dict(zip(ALL, [1, 1, 0, 0], strict=True))


# ---------------------------------------------------------------- for real


@pytest.fixture
def real(tmp_path, headway, monkeypatch):
    """A study of two variants and one seed, trained by `headway train` from the fork server."""
    monkeypatch.chdir(tmp_path)
    made = Folder(tmp_path)
    made.rewrite("seeds: [1, 2]", "seeds: [5]")
    return made


LONG = ["train.tokens=1e9", "checkpoint.every_tokens=1e9", "train.validate_every_tokens=1e9"]


def test_two_jobs_train_what_one_trains_in_every_bit_and_time_the_variants_alone(real, headway):
    """One study by cold processes one after another, the other one by two warm ones."""
    cold = {**headway.environment(), VARIABLE: "there-is-none"}
    command = [*headway.command("study", "run", "small.yaml"), "--jobs"]
    two = subprocess.run([*command, "2"], env=headway.environment(), capture_output=True, text=True, timeout=240)
    assert two.returncode == 0, two.stdout + two.stderr
    (real.path / "one.yaml").write_text(real.study.read_text() + "out: one\n")
    words = [word if word != "small.yaml" else "one.yaml" for word in command]
    one = subprocess.run([*words, "1", "--quiet"], env=cold, capture_output=True, text=True, timeout=240)
    assert one.returncode == 0, one.stdout + one.stderr
    for key in ("gqa/seed-5", "routed/seed-5"):
        runs = [real.path / "one/cells" / key, real.out / "cells" / key]
        assert trajectory(runs[0]) == trajectory(runs[1])
    assert {o["beside"] for o in outcomes(real).values()} == {1}
    timing = read_mapping(real.out / "timing.json")["variants"]
    assert list(timing) == ["gqa", "routed"] and {len(v["step_s"]) for v in timing.values()} == {41}
    assert not (real.path / "one/timing.json").exists()
    page = (real.out / "report.md").read_text()
    assert "Data: PAIRED." in page and "seed 5: routed and gqa: 10 common steps, all hashes equal" in page
    assert "CONFOUND:" not in page and "CONFOUNDED by" not in page
    assert "Speed: Cells trained beside up to 1 other, so their own speeds are not compared." in page
    assert "over 41 rounds" in page
    assert "Speeds were taken from the steps of the cells" in (real.path / "one/report.md").read_text()


def test_cells_go_on_cold_if_the_fork_server_is_killed(real, monkeypatch, capsys):
    """A cell that was forked saves and ends with the server, and starts again from its checkpoint."""
    run = real.out / "cells/gqa/seed-5"

    def kill() -> None:
        os.kill(server._process.pid, signal.SIGKILL)
        when(
            lambda: '"kind": "resume"' in (run / "metrics.jsonl").read_text(),
            lambda: os.kill(os.getpid(), signal.SIGTERM),
        )

    with ForkServer() as server:
        monkeypatch.setenv(VARIABLE, str(server.path))
        when(lambda: steps(real, "gqa/seed-5") > 2, kill)
        assert run_study(real.study, LONG, jobs=1) == 75
    assert "the process that it was forked from ended; the cell starts again" in capsys.readouterr().out
    assert [r["kind"] for r in records(run, "resume")] == ["resume"]
