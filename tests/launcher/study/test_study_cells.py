"""One cell as a child process: it ends when the study does; its state and progress are read from what it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from headway.launcher.compare.cells import cell_state, failure
from headway.launcher.study.cells import CellRunner, Eta, step_share


def test_status_shows_a_cell_that_a_live_process_holds_as_running(tmp_path):
    (tmp_path / "run.lock").write_text(str(os.getpid()))
    assert cell_state(tmp_path, None).state == "running"


def test_a_second_ctrl_c_kills_a_cell_that_does_not_stop(tmp_path, capfd):
    ready = tmp_path / "ready"
    script = f"import signal, time, pathlib; signal.signal(15, lambda *_: None); pathlib.Path({str(ready)!r}).touch()\n"
    script += "end = time.monotonic() + 60\nwhile time.monotonic() < end: time.sleep(0.1)"

    def twice() -> None:
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=twice, daemon=True).start()
    with CellRunner() as runner:
        outcome = runner.run([sys.executable, "-c", script], log=tmp_path / "log", show=lambda line: None)
    assert outcome["exit_code"] == -signal.SIGKILL
    assert runner.stopping
    assert failure(outcome) == "signal 9"


def test_the_running_cell_dies_with_the_study(tmp_path):
    """kill -9 of the study must not leave an orphan that holds the run folder."""
    pid_file = tmp_path / "pid"
    child = f"import os, time, pathlib; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    script = textwrap.dedent(f"""
        import pathlib, sys
        from headway.launcher.study.cells import CellRunner
        with CellRunner() as runner:
            runner.run([sys.executable, "-c", {child!r}], log=pathlib.Path({str(tmp_path / "log")!r}), show=print)
    """)
    study = subprocess.Popen([sys.executable, "-P", "-c", script])
    end = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    study.kill()
    study.wait()
    pid = int(pid_file.read_text())
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z":
            return  # dead, and whoever adopted it has not waited for it yet
        time.sleep(0.02)
    pytest.fail("the child outlived the study")


def running_eta(cells: int, *, start_s: float = 60.0, first_s: float = 30.0):
    """An eta of cells of 100 steps of 1 s, whose process and first step are slow; runs cells by hand."""
    now = [0.0]
    eta = Eta([100] * cells, clock=lambda: now[0])

    def run(begin: int, end: int, *, resumed: bool = False) -> None:
        if begin == 0 or resumed:
            eta.begin(begin, 100)
            now[0] += start_s
        for step in range(begin + 1, end + 1):
            now[0] += first_s if step == begin + 1 and (begin == 0 or resumed) else 1.0
            eta.step(step)

    return eta, run


def test_eta_says_nothing_until_steady_steps_were_timed():
    eta, run = running_eta(4)
    assert str(eta) == "estimating"
    run(0, 1)  # 90 s for one step of a hundred: two hours and a half, were it taken for a pace
    assert eta.seconds_left() is None and str(eta) == "estimating"
    run(1, 5)
    assert eta.seconds_left() is None
    run(5, 10)
    assert str(eta) != "estimating"


def test_eta_is_the_pace_of_steady_steps_and_the_start_up_of_every_cell_that_is_left():
    eta, run = running_eta(4)
    run(0, 50)
    assert eta.seconds_left() == pytest.approx(50 + 3 * (100 + 91))  # 60 to start, 30 and 1 of its first two steps
    run(50, 100)
    eta.end()
    assert eta.seconds_left() == pytest.approx(3 * (100 + 60 + 31), rel=0.02)


def test_eta_of_a_cell_that_was_resumed_counts_what_is_left_of_it():
    eta, run = running_eta(2)
    run(0, 100)
    eta.end()
    run(75, 80, resumed=True)
    assert eta.seconds_left() == pytest.approx(20)


def test_a_cell_that_fails_at_its_start_is_no_measure_of_the_others():
    now = [0.0]
    eta = Eta([1.0] * 3, clock=lambda: now[0])
    eta.begin(0.0, 1.0)
    now[0] = 5.0
    eta.end()
    assert eta.seconds_left() is None


def test_eta_counts_what_each_cell_has_to_train():
    """A full run of 100 steps, and a branch that continues it at step 40 of its 50."""
    now = [0.0]
    eta = Eta([100, 10], clock=lambda: now[0])
    eta.begin(0, 100)
    for step in range(1, 51):
        now[0] += 1.0
        eta.step(step)
    assert eta.seconds_left() == pytest.approx(50 + 10 + 2)  # and the first two steps of the branch as start-up
    for step in range(51, 101):
        now[0] += 1.0
        eta.step(step)
    eta.end()
    eta.begin(40, 50)
    assert eta.seconds_left() == pytest.approx(10)
    for step in range(41, 46):
        now[0] += 1.0
        eta.step(step)
    assert eta.seconds_left() == pytest.approx(5)


def test_a_cell_that_is_not_run_leaves_the_estimate_of_the_others_alone():
    eta, run = running_eta(3)
    run(0, 100)
    eta.end()
    assert eta.seconds_left() == pytest.approx(2 * (100 + 91))
    eta.end()
    assert eta.seconds_left() == pytest.approx(100 + 91)


def test_cells_with_few_lines_are_timed_as_a_whole():
    now = [0.0]
    eta = Eta([1.0] * 2, clock=lambda: now[0])
    eta.begin(0.0, 1.0)
    now[0] = 40.0
    eta.step(1.0)
    eta.end()
    assert eta.seconds_left() == pytest.approx(40)


def test_forced_colour_does_not_reach_the_log_of_a_cell(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    code = "from headway.launcher.base import console; console.error(ValueError('no'))"
    lines: list[str] = []
    with CellRunner() as runner:
        runner.run([sys.executable, "-P", "-c", code], log=tmp_path / "log", show=lines.append)
    assert lines == ["error: no"] and (tmp_path / "log").read_text() == "error: no\n"


def test_step_share_reads_the_console_line():
    assert step_share("step  1200/19073 6.3% loss 3.1421") == pytest.approx(1200 / 19073)
    assert step_share("validation after step 40: loss 3.1") is None
