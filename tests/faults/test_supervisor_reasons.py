"""The reason why a rank ended or hangs is reported if the machine knows it. Full log disks do not end a run."""

import errno
import fcntl
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headway.launcher.base.errors import SpecError
from headway.launcher.hosts import oom
from headway.launcher.hosts.faults import CAUSE, Ended, explain
from headway.launcher.hosts.oom import MemoryWatch
from headway.launcher.hosts.place import Place
from headway.launcher.hosts.restarts import Restarts
from headway.launcher.hosts.supervise import Alone, supervise
from headway.launcher.hosts.watch import Watch
from headway.launcher.run import run_dir
from headway.launcher.run.heartbeat import Heartbeat, beat_file, can_beat
from headway.launcher.run.run_dir import RunDir
from headway.launcher.train.worker import _Log

HERE = Place(host=0, hosts=1, processes=2, name="here")
FULL = Path("/dev/full")


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.logs.mkdir(parents=True)
    return run


# ---------------------------------------------------------------- ranks that hang without being stopped

AGENT = """
import subprocess, sys
command, kinds = [sys.executable, "-P", "-c", *sys.argv[1:4]], sys.argv[4:]
ranks = [subprocess.Popen([*command, str(rank), kind]) for rank, kind in enumerate(kinds)]
sys.exit(max(rank.wait() for rank in ranks))
"""
RANK = """
import ctypes, os, sys, time
from pathlib import Path
from headway.launcher.run import heartbeat
rank, logs = int(sys.argv[3]), Path(sys.argv[2]) / "logs"
os.dup2(os.open(logs / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
heartbeat.start(logs, rank)
heartbeat.beat("step", 1)
(logs / f"rank-{rank}.pid").write_text(str(os.getpid()))
heartbeat.beat("step", 2)
(logs / f"since-{rank}").write_text(str(time.monotonic()))
if sys.argv[4] == "collective":
    exec(compile("import time\\ntime.sleep(60)", "/x/torch/distributed/distributed_c10d.py", "exec"))
elif sys.argv[4] == "lock":
    ctypes.PyDLL(None).sleep(60)  # in C, with the interpreter's lock held
while True:
    pass
"""


@pytest.mark.parametrize("kinds", [("collective", "loop"), ("lock", "collective")])
def test_a_rank_in_an_endless_loop_or_with_the_interpreters_lock_ends_the_run_in_time_and_is_named(run, kinds):
    # F4: at a limit of 2 s, within 5 s more
    worker = ["headway.launcher.train.worker", str(run.path.resolve())]
    command = [sys.executable, "-P", "-c", AGENT, RANK, *worker, *kinds]
    with pytest.raises(Ended) as ended:
        supervise(run, HERE, Alone(Restarts(run, 0)), command, dict(os.environ), hang_s=2, stop_s=5)
    culprit = kinds.index("loop") if "loop" in kinds else kinds.index("lock")
    assert time.monotonic() - float((run.logs / f"since-{culprit}").read_text()) < 2 + 5
    pid = (run.logs / f"rank-{culprit}.pid").read_text()
    assert f"rank {culprit} (process {pid}) on here hangs: it is busy while the other ranks wait for it" in str(
        ended.value
    )
    assert ended.value.fault.weight == CAUSE
    for rank in (0, 1):
        assert "most recent call first" in (run.logs / f"rank-{rank}.log").read_text()
        assert not Path(f"/proc/{(run.logs / f'rank-{rank}.pid').read_text()}").exists()


# ---------------------------------------------------------------- memory


@pytest.fixture
def groups(tmp_path, monkeypatch) -> Path:
    """cgroup version 2, with this process in one group. The kernel log is not readable."""
    monkeypatch.setattr(oom, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(oom, "KERNEL_LOG", tmp_path / "nothing")
    line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    folder = tmp_path / "cgroup" / line.removeprefix("0::/")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{3 << 29}\n")
    (folder / "memory.events").write_text("low 0\nhigh 2\nmax 7\noom 1\noom_kill 1\n")
    return folder


def killed(run: RunDir, memory: MemoryWatch, pid: int) -> str:
    (run.logs / "rank-1.pid").write_text(str(pid))
    return explain(run, HERE, None, signalled=False, died={1: -9}, memory=memory).text


@pytest.mark.skipif("0::" not in Path("/proc/self/cgroup").read_text(), reason="no control groups of version 2")
def test_a_rank_killed_for_lack_of_memory_is_named_with_counter_and_limit(run, groups):
    # F28
    memory, pid = MemoryWatch(), os.getpid()
    memory.note(pid)
    assert "memory" not in killed(run, memory, pid).splitlines()[0]  # killed by another process
    (groups / "memory.events").write_text("low 0\nhigh 2\nmax 9\noom 2\noom_kill 2\n")
    first = killed(run, memory, pid).splitlines()[0]
    assert "was killed by SIGKILL: the kernel killed processes because memory ran out" in first
    assert f"{groups / 'memory.events'}: 1 before, 2 now, limit 1.50 GiB" in first and "train.micro_batch" in first
    (groups / "memory.max").write_text("max\n")
    assert "2 now)" in killed(run, memory, pid)
    assert "memory" not in killed(run, memory, 4194999).splitlines()[0]  # never seen alive


def test_the_kernel_log_is_searched_for_the_process_if_it_is_readable(tmp_path, monkeypatch):
    log = tmp_path / "kmsg"
    log.write_text("6,1,1,-;Out of memory: Killed process 77 (python3) total-vm:1kB\n")  # before this run
    monkeypatch.setattr(oom, "KERNEL_LOG", log)
    memory = MemoryWatch()
    with log.open("a") as f:
        f.write("3,2,2,-;Memory cgroup out of memory: Killed process 78 (python3) total-vm:1kB, anon-rss:1kB\n")
    assert memory.reason(77) is None and "killed it because memory ran out" in (memory.reason(78) or "")
    assert "memory ran out" in (memory.reason(78) or "") and memory.reason(7) is None
    memory.close()


def test_without_kernel_information_there_is_no_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(oom, "GROUPS", tmp_path)
    monkeypatch.setattr(oom, "KERNEL_LOG", tmp_path / "nothing")
    memory = MemoryWatch()
    memory.note(os.getpid())
    memory.note(4194999)
    assert memory.reason(os.getpid()) is None and memory.reason(4194999) is None


HOG = "import sys\nsys.stdin.readline()\nx = []\nwhile True:\n    x.append(bytearray(1 << 20))"


def test_the_kernels_own_kill_is_recognised():
    # F28: a real out-of-memory kill, if this user may limit a control group
    with small_group() as folder:
        memory = MemoryWatch()
        hog = subprocess.Popen([sys.executable, "-S", "-c", HOG], stdin=subprocess.PIPE)
        try:
            (folder / "cgroup.procs").write_text(str(hog.pid))
            memory.note(hog.pid)
            hog.communicate(b"\n", timeout=60)
        finally:
            hog.kill()
            hog.wait()
        assert hog.returncode == -9
        assert "because memory ran out" in (memory.reason(hog.pid) or "")
        memory.close()


class small_group:
    """A control group of 48 MiB; the test is skipped if none can be created."""

    def __enter__(self) -> Path:
        for root, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
            self.folder = oom.GROUPS / root / f"headway-test-{os.getpid()}"
            try:
                self.folder.mkdir()
                (self.folder / limit).write_text(str(48 << 20))
                return self.folder
            except OSError:
                if self.folder.is_dir():
                    self.folder.rmdir()
        pytest.skip("this user cannot make a control group with a limit of memory")

    def __exit__(self, *_: object) -> None:
        self.folder.rmdir()


# ---------------------------------------------------------------- a full disk for logs


def test_a_rank_does_not_hang_because_its_beats_cannot_be_written(run, monkeypatch):
    watch = Watch(run, HERE, hang_s=10)
    monkeypatch.setattr(watch, "live", lambda: {0: 1})
    heart = Heartbeat(beat_file(run.logs, 0), 0)
    heart.beat("step", 1)
    late = time.monotonic() + 100
    assert watch.hung(late) is not None

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    heart.beat("step", 2)  # nothing is raised
    Heartbeat(beat_file(run.logs, 1), 1).beat("step", 1)
    assert watch.hung(late) is None
    assert not can_beat(run.logs / "host-0.beat")


def test_log_text_is_lost_without_an_error_on_a_full_disk():
    with FULL.open("wb", buffering=0) as raw:
        with pytest.raises(OSError):
            raw.write(b"x")
        log = _Log(raw)
        print("a line", file=log, flush=True)
        assert log.write("more\n") == 5
    text = io.BytesIO()
    log = _Log(text)
    print("a line", file=log, flush=True)
    assert text.getvalue() == b"a line\n"


def test_training_continues_while_the_disk_of_its_logs_is_full(headway):
    run = headway.folder / "run"
    logs = run / "logs"
    logs.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "headway-test", str(logs)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user cannot mount a small file system")
    try:
        endless = ("train.tokens=25600000", "train.validate_every_tokens=null", "checkpoint.every_tokens=null")
        process = headway.start("run_dir=run", "launch.processes=2", "launch.hang_s=2", *endless)
        headway.wait_for((run / "metrics.jsonl").exists, process)
        with (logs / "ballast").open("wb", buffering=0) as f, pytest.raises(OSError, match="No space left"):
            while True:
                f.write(bytes(4096))
        time.sleep(4)  # twice the limit
        before = (run / "metrics.jsonl").stat().st_size
        headway.wait_for(lambda: (run / "metrics.jsonl").stat().st_size > before, process, 10)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 75, stderr
    finally:
        subprocess.run(["umount", "--lazy", str(logs)], check=True)


# ---------------------------------------------------------------- locks


def test_the_holder_of_a_lock_is_named_with_process_and_host(run):
    # F3
    with run.locked():
        holder = rf"process {os.getpid()} on {re.escape(socket.gethostname())}\)"
        with pytest.raises(SpecError, match=holder), run.locked():
            pass
    assert (run.path / "run.lock").read_text() == ""


def test_a_file_system_without_locks_is_refused(run, monkeypatch):
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_dir.fcntl, "flock", none)
    with pytest.raises(SpecError, match=r"without locks.*mount it with flock, or use another run_dir"), run.locked():
        pass
    assert fcntl.flock is none
