"""Cells as child processes: they end when the study does; their state is read from what they leave."""

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
from headway.launcher.run.run_dir import RunDir
from headway.launcher.study.pool import Child, Pool


def run(pool: Pool, *command: str, log: Path, show=print) -> Child:
    child = pool.start(None, list(command), log=log, show=show)
    while not pool.wait():
        pass
    return child


def test_status_shows_a_cell_that_a_live_process_holds_as_running(tmp_path):
    with RunDir(tmp_path).locked():
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
    with Pool() as pool:
        outcome = run(pool, sys.executable, "-c", script, log=tmp_path / "log").outcome
    assert outcome["exit_code"] == -signal.SIGKILL
    assert pool.stopping
    assert failure(outcome) == "signal 9"


def test_the_running_cell_dies_with_the_study(tmp_path):
    """kill -9 of the study must not leave an orphan that holds the run folder."""
    pid_file = tmp_path / "pid"
    child = f"import os, time, pathlib; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    script = textwrap.dedent(f"""
        import pathlib, sys
        from headway.launcher.study.pool import Pool
        with Pool() as pool:
            pool.start(None, [sys.executable, "-c", {child!r}], log=pathlib.Path({str(tmp_path / "log")!r}), show=print)
            pool.wait()
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


def test_forced_colour_does_not_reach_the_log_of_a_cell(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    code = "from headway.launcher.base import console; console.error(ValueError('no'))"
    lines: list[str] = []
    with Pool() as pool:
        run(pool, sys.executable, "-P", "-c", code, log=tmp_path / "log", show=lines.append)
    assert lines == ["error: no"] and (tmp_path / "log").read_text() == "error: no\n"
