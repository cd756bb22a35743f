"""How far a run is: told from its folder, of metrics.jsonl the end alone."""

import json
import os
import socket

from headway.launcher.run.run_dir import RunDir
from headway.launcher.run.state import run_state


def test_a_run_that_is_done(tmp_path, make_run):
    found = run_state(RunDir(make_run(tmp_path / "run", validations={5: 3.0, 10: 2.5})))
    assert (found.state, found.step, found.steps, found.tokens) == ("done", 10, 10, 320)
    assert (found.validation_loss, found.validation_step) == (2.5, 10)


def test_the_loss_is_that_of_the_newest_validation_and_never_of_a_batch(tmp_path, make_run):
    found = run_state(RunDir(make_run(tmp_path / "a", step=7, validations={3: 4.0, 5: 3.0}, complete=False)))
    assert (found.state, found.step, found.validation_loss, found.validation_step) == ("partial", 7, 3.0, 5)
    found = run_state(RunDir(make_run(tmp_path / "b", step=7, complete=False)))
    assert (found.validation_loss, found.validation_step) == (None, None)


def test_a_run_is_running_while_the_process_in_its_lock_lives(tmp_path, make_run):
    run = RunDir(make_run(tmp_path / "run", step=7, complete=False))
    with run.locked():
        assert run_state(run).state == "running"
    assert run_state(run).state == "partial"
    (run.path / "run.lock").write_text(f"{2**22 + 1} on {socket.gethostname()[:64]}")  # beyond pid_max: nobody
    assert run_state(run).state == "partial"
    (run.path / "run.lock").write_text(f"{os.getpid()} on {socket.gethostname()[:64]}")  # killed; its number is ours
    assert run_state(run).state == "partial"
    (run.path / "run.lock").write_text(f"{os.getpid()} on another-host")
    assert run_state(run).state == "partial"


def test_a_run_has_failed_when_its_newest_start_ended_by_a_fault(tmp_path, make_run):
    run = RunDir(make_run(tmp_path / "run", step=7, complete=False))
    run.card.write_text(json.dumps({"attempts": [{"started_at": "2026-01-01T00:00:00Z"}]}))

    def state_after(**changes):
        fault = {"time": "2026-01-01T00:10:00Z", "cause": "rank 0 died", "exit": 70, "started_again": False}
        (run.logs / "attempts.jsonl").write_text(json.dumps(fault | changes) + "\n")
        return run_state(run).state

    assert state_after() == "failed"
    assert state_after(started_again=True) == "partial"
    assert state_after(exit=75) == "partial"  # stopped by a signal
    assert state_after(time="2025-12-31T00:00:00Z") == "partial"  # an earlier start, and there was another since
    assert state_after(time="yesterday") == "partial"


def test_only_the_end_of_the_records_is_read(tmp_path, make_run):
    run = RunDir(make_run(tmp_path / "run", validations={9: 3.0}, complete=False))
    records = run.metrics.read_bytes()
    with run.metrics.open("wb") as file:
        file.seek(1 << 40)  # a hole of 1 TiB, which no memory holds
        file.write(b"\n" + records)
    found = run_state(run)
    assert (found.step, found.validation_loss) == (10, 3.0)


def test_torn_and_damaged_lines_are_passed_over(tmp_path, make_run):
    run = RunDir(make_run(tmp_path / "run", validations={9: 3.0}, complete=False))
    whole = run.metrics.read_text().splitlines()
    run.metrics.write_text("\n".join([*whole[:-1], whole[-1].replace('"step": 10', '"step": 11'), whole[0][:20]]))
    assert run_state(run).step == 9


def test_an_empty_folder_has_nothing_done(tmp_path):
    found = run_state(RunDir(tmp_path))
    assert (found.state, found.step, found.steps, found.validation_loss) == ("partial", 0, None, None)
