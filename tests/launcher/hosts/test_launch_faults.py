"""A rank that dies or hangs ends the run within a time limit, and the message names the rank and the reason."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from run_folders import alive, steps_done

from headway.launcher.hosts import faults
from headway.launcher.hosts.faults import CAUSE, CONSEQUENCE, PREEMPTED, STOPPED, explain
from headway.launcher.hosts.place import Place
from headway.launcher.hosts.processes import live_pid
from headway.launcher.hosts.watch import Watch
from headway.launcher.run import heartbeat
from headway.launcher.run.heartbeat import Heartbeat, allowed_s, beat_file, read_beat
from headway.launcher.run.run_dir import RunDir

LOST = "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"
HERE = Place(host=0, hosts=1, processes=2, name="here")


@pytest.fixture
def headway(headway_alone):
    """Without the fork server: these tests are about the processes between the command and its ranks."""
    return headway_alone


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path)
    run.logs.mkdir()
    return run


def write_reports(run: RunDir, *reports: tuple[str, str]) -> None:
    """Write reports (type, message) of ranks 0, 1, ...; the report of rank 0 is the oldest."""
    for rank, (kind, message) in enumerate(reports):
        path = run.logs / f"rank-{rank}.error.json"
        path.write_text(json.dumps({"rank": rank, "exit_code": None, "type": kind, "message": message}))
        os.utime(path, (1000 + rank, 1000 + rank))


# ---------------------------------------------------------------- why a run ended


def test_only_processes_that_are_ranks_of_this_run_get_the_signal(run):
    worker = ["-c", "import time; time.sleep(60)", "headway.launcher.train.worker"]
    ours = subprocess.Popen([sys.executable, *worker, str(run.path.resolve())])
    other = subprocess.Popen([sys.executable, *worker, str(run.path / "another")])
    try:
        # an incomplete file, an id reused by another process, no such process, a rank of another run, a rank
        texts = ["", str(os.getpid()), "4194999", str(other.pid), str(ours.pid)]
        for rank, text in enumerate(texts):
            (run.logs / f"rank-{rank}.pid").write_text(text)
        end = time.monotonic() + 10
        while live_pid(run, 4) is None and time.monotonic() < end:  # until exec has set the new command line
            time.sleep(0.01)
        assert [live_pid(run, rank) for rank in range(5)] == [None, None, None, None, ours.pid]
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()
    assert live_pid(run, 4) is None


def test_a_truncated_report_does_not_hide_the_exit_status(run):
    (run.logs / "rank-0.error.json").write_text("")
    (run.logs / "rank-0.log").write_text("OSError: [Errno 28] No space left on device\n")
    fault = explain(run, Place(host=0, hosts=1, processes=1, name="here"), 74, signalled=False, died={})
    assert "No space left" in fault.text and fault.code == 74


@pytest.mark.parametrize("signalled", [False, True])
@pytest.mark.parametrize("lost", [LOST, "Timed out waiting 10000ms for recv operation to complete"])
def test_the_failed_rank_is_named_and_not_its_peers_nor_the_signal(run, signalled, lost):
    write_reports(run, ("DistNetworkError", lost), ("RuntimeError", "a defect"))
    fault = explain(run, HERE, 1, signalled=signalled, died={})
    assert re.search(r"rank 1 on here failed: RuntimeError: a defect", fault.text)
    assert fault.code == 70 and fault.weight == CAUSE


def test_ranks_that_lose_each_other_after_a_signal_count_as_stopped(run):
    write_reports(run, ("DistNetworkError", LOST), ("KeyboardInterrupt", ""))
    fault = explain(run, HERE, 1, signalled=True, died={})
    assert "stopped by a signal" in fault.text
    assert fault.code == PREEMPTED and fault.weight == STOPPED


def test_a_rank_that_lost_another_host_is_a_consequence(run):
    write_reports(run, ("DistNetworkError", LOST), ("DistNetworkError", LOST))
    assert explain(run, HERE, 1, signalled=False, died={}).weight == CONSEQUENCE


def test_reports_of_ranks_on_other_hosts_are_ignored(run):
    write_reports(run, ("RuntimeError", "a defect of rank 0"))
    second = Place(host=1, hosts=2, processes=2, name="there")
    assert "defect" not in explain(run, second, 1, signalled=False, died={}).text


def test_without_torchruns_table_the_first_rank_seen_to_end_is_named(run):
    (run.logs / "rank-1.pid").write_text("77")
    fault = explain(run, HERE, 256 - signal.SIGKILL, signalled=False, died={1: None, 0: None})
    assert "rank 1 (process 77) on here was killed by SIGKILL" in fault.text


def test_a_rank_that_lost_a_killed_peer_is_not_blamed_if_both_end_at_once(run):
    write_reports(run, ("DistNetworkError", LOST))
    fault = explain(run, HERE, 256 - signal.SIGKILL, signalled=False, died={0: 1, 1: -signal.SIGKILL})
    assert "rank 1 (process unknown) on here was killed by SIGKILL" in fault.text


def test_a_rank_that_ended_before_the_launcher_killed_the_others_is_named(run):
    fault = explain(run, HERE, None, signalled=False, died={1: None})
    assert "rank 1 (process unknown) on here ended without an error report" in fault.text and fault.weight == CAUSE
    assert explain(run, HERE, None, signalled=False, died={}).weight == CONSEQUENCE


# ---------------------------------------------------------------- signs of life


def test_a_beat_records_step_and_section_and_the_first_step_has_its_own_section(tmp_path):
    heart = Heartbeat(tmp_path / "beat", 3)
    seen = []
    for section, step in (("data", 1), ("step", 1), ("validate", 123_456), ("step", 2)):
        heart.beat(section, step)
        beat = read_beat(tmp_path / "beat")
        assert beat is not None and beat.rank == 3 and abs(time.monotonic() - beat.time_s) < 10
        seen.append((beat.section, beat.step))
    assert seen == [("data", 1), ("first step", 1), ("validate", 123_456), ("step", 2)]


def test_a_beat_takes_little_time(tmp_path):
    heart = Heartbeat(tmp_path / "beat", 0)
    start = time.process_time()
    for step in range(1000):
        heart.beat("step", step)
    assert time.process_time() - start < 0.2  # 200 us each would be 0.1 % of a step of 200 ms; measured 10 us


@pytest.mark.parametrize("text", [None, "", '{"rank": 0, "sec', "[]", '{"rank": 0}'])
def test_an_incomplete_beat_is_read_as_none(tmp_path, text):
    if text is not None:
        (tmp_path / "beat").write_text(text)
    assert read_beat(tmp_path / "beat") is None


def test_slow_sections_have_longer_limits():
    assert allowed_s("step", 10) == 10
    assert min(allowed_s(s, 10) for s in ("setup", "first step", "validate", "save", "finish")) > 10
    assert allowed_s("unheard of", 10) == 10


def test_a_rank_is_overdue_after_the_limit_of_its_section(run, monkeypatch):
    now = 1000.0
    for rank, (section, age) in enumerate([("save", 15), ("step", 15)]):
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda age=age: now - age)
        beat = Heartbeat(beat_file(run.logs, rank), rank)
        beat.beat("step", 7)
        beat.beat(section, 8)
    watch = Watch(run, HERE, hang_s=10)
    monkeypatch.setattr(watch, "live", lambda: {0: 1, 1: 2})
    late = watch.hung(now)
    assert late is not None and (late.rank, late.section, late.step) == (1, "step", 8)
    assert watch.hung(now - 6) is None  # before the limit
    monkeypatch.setattr(watch, "live", lambda: {0: 1})
    assert watch.hung(now) is None  # a rank that has ended does not hang


# ---------------------------------------------------------------- processes

CODE = """
import ctypes, os, sys, time
from pathlib import Path
from headway.launcher.run import heartbeat
rank, logs = int(sys.argv[3]), Path(sys.argv[2]) / "logs"
fd = os.open(logs / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(fd, 2)
heartbeat.start(logs, rank)
heartbeat.beat("step", 1); heartbeat.beat("step", 5)
(logs / f"rank-{rank}.pid").write_text(str(os.getpid()))
if sys.argv[4] == "collective":
    here = compile("import time\\ntime.sleep(60)", "/x/torch/distributed/distributed_c10d.py", "exec")
    exec(here)
elif sys.argv[4] == "busy":
    ctypes.PyDLL(None).sleep(60)  # in C, holding the interpreter lock
else:
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("kinds", "culprit", "words"),
    [
        (["collective", "stop"], 1, "is stopped"),
        (["stop", "busy"], 0, "is stopped"),
        (["collective", "busy"], 1, "busy while the other ranks wait"),
        (["collective", "collective"], 0, "waits for other ranks"),
    ],
)
def test_the_rank_that_blocks_the_others_is_identified(run, kinds, culprit, words):
    command = [sys.executable, "-P", "-c", CODE, "headway.launcher.train.worker", str(run.path.resolve())]
    processes = []
    watch = Watch(run, HERE, hang_s=10)
    try:
        for rank, kind in enumerate(kinds):
            processes.append(subprocess.Popen([*command, str(rank), kind], start_new_session=True))
            end = time.monotonic() + 30
            while rank not in watch.live() and time.monotonic() < end:
                time.sleep(0.02)
            time.sleep(0.3)  # until each rank is where it hangs
            if kind == "stop":
                processes[-1].send_signal(signal.SIGSTOP)
        overdue = read_beat(beat_file(run.logs, 0))
        fault = watch.find_culprit(overdue)
        assert fault.text.startswith(f"rank {culprit} (process {processes[culprit].pid}) on here hangs: it ")
        assert words in fault.text.splitlines()[0] and "of step 5" in fault.text.splitlines()[0]
        assert fault.weight == (CONSEQUENCE if words.startswith("waits") else CAUSE)
        assert watch.find_culprit(None).weight == (CAUSE if "stop" in kinds else CONSEQUENCE)
        assert ("sleep" in fault.text or "<string>" in fault.text) == ("stop" not in kinds)
        watch.end_all(processes[0])
        assert watch.live() == {}
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_rank_ends_with_its_launcher_through_intermediate_processes(run):
    middle = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-P', '-c', *sys.argv[1:]], "
        "start_new_session=True); p.wait()"
    )
    rank = [CODE, "headway.launcher.train.worker", str(run.path.resolve()), "0", "sleep"]
    launcher = subprocess.Popen(["sleep", "60"])
    env = {**os.environ, "HEADWAY_LAUNCHER_PID": str(launcher.pid)}
    between = subprocess.Popen([sys.executable, "-P", "-c", middle, *rank], env=env)
    try:
        end = time.monotonic() + 30
        while live_pid(run, 0) is None and time.monotonic() < end:
            time.sleep(0.02)
        assert live_pid(run, 0) is not None
        launcher.kill()
        launcher.wait()
        between.wait(timeout=5)
        assert live_pid(run, 0) is None
    finally:
        for process in (launcher, between):
            process.kill()
            process.wait()


def test_a_stopped_rank_ends_the_run_within_the_limit_and_is_named(headway):
    hang_s = 8  # the set-up may take six times as long, which is enough on a busy machine
    run = headway.folder / "stopped"
    process = headway.start("run_dir=stopped", "launch.processes=2", "train.tokens=25600000", f"launch.hang_s={hang_s}")
    headway.wait_for(lambda: steps_done(run) >= 4, process)
    pids = [int((run / "logs" / f"rank-{rank}.pid").read_text()) for rank in (0, 1)]
    os.kill(pids[1], signal.SIGSTOP)
    start = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    took = time.monotonic() - start
    assert process.returncode == 70
    assert f"rank 1 (process {pids[1]}) on " in stderr and "it is stopped" in stderr and "launch.hang_s" in stderr
    assert hang_s - 1 < took < hang_s + 10  # time for stacks and kills; torchrun alone would take half a minute more
    assert not any(alive(pid) for pid in pids)
    assert "Current thread" in (run / "logs" / "rank-0.log").read_text()  # the stack of the waiting rank


DEEPSPEED = ("launch.method=deepspeed", "launch.processes=2")


def test_a_killed_rank_is_named_under_the_launcher_of_deepspeed(headway):
    run = headway.folder / "killed"
    process = headway.start("run_dir=killed", *DEEPSPEED)
    headway.wait_for(lambda: steps_done(run) >= 6, process)
    os.kill(int((run / "logs" / "rank-1.pid").read_text()), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 70, stderr
    # DeepSpeed's launcher does not report how a rank ended, and may have waited for it before this launcher saw it.
    assert re.search(r"rank 1 \(process \d+\) on \S+ (was killed by SIGKILL|ended without an error report)", stderr), (
        stderr
    )


@pytest.mark.slow
def test_deepspeeds_launcher_and_torchrun_give_the_same_run(headway):
    for name, overrides in (("ds", DEEPSPEED), ("torchrun", ("launch.processes=2",))):
        done = headway.train(f"run_dir={name}", "train.tokens=2560", *overrides)
        assert done.returncode == 0, done.stderr
    losses = [
        re.findall(r'"loss": ([^,]*)', (headway.folder / n / "metrics.jsonl").read_text()) for n in ("ds", "torchrun")
    ]
    assert len(losses[0]) > 10 and losses[0] == losses[1]


def test_a_fault_keeps_its_exit_code_in_a_message_to_another_host():
    fault = faults.Fault(text="rank 3 ...\nmore", code=74, weight=STOPPED)
    assert faults.Fault.from_json(json.loads(json.dumps(fault.as_json()))) == fault


@pytest.mark.slow
def test_the_first_host_starts_the_others_by_ssh(headway, monkeypatch):
    folder = headway.folder / "bin"
    folder.mkdir()
    # As sshd does: a shell in the home folder parses the words after the host name.
    (folder / "ssh").write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift 2\ncd / && exec sh -c "$*"\n')
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    (headway.folder / "hosts").write_text("a slots=1\nb slots=1\n")
    hosts = ("launch.method=deepspeed", "launch.hosts=2", "launch.address=127.0.0.1", "launch.port=31900")
    done = headway.train(*hosts, "launch.ssh=true", "launch.hostfile=hosts", "train.tokens=2560")
    assert done.returncode == 0, done.stderr
    run = headway.folder / "runs" / "tiny"
    assert steps_done(run) == 10
    assert "all 2 hosts are here; ranks 1 to 1 run on this one" in (run / "logs" / "ssh-1.log").read_text()
