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


def test_a_second_signal_kills_a_cell_that_does_not_stop(tmp_path, capfd):
    ready = tmp_path / "ready"
    script = f"import signal, time, pathlib; signal.signal(15, lambda *_: None); pathlib.Path({str(ready)!r}).touch()\n"
    script += "end = time.monotonic() + 60\nwhile time.monotonic() < end: time.sleep(0.1)"

    def twice() -> None:
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

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


def test_eta_is_the_pace_so_far_over_what_is_left():
    now = [0.0]
    eta = Eta(4, clock=lambda: now[0])
    assert eta.seconds_left() is None
    eta.begin(0.0)
    now[0] = 30.0
    eta.step(0.5)
    assert eta.seconds_left() == pytest.approx(30 / 0.5 * 3.5)
    now[0] = 60.0
    eta.end()
    eta.begin(0.75)  # a resumed cell: only a quarter is left of it
    assert eta.seconds_left() == pytest.approx(60 * 2.25)


def test_step_share_reads_the_console_line():
    assert step_share("step  1200/19073 6.3% loss 3.1421") == pytest.approx(1200 / 19073)
    assert step_share("validation after step 40: loss 3.1") is None
