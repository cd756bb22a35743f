"""`headway train`: check everything that can be checked, then start the processes and see them through."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from headway.launcher.errors import HeadwayError, SpecError
from headway.launcher.load import load_spec
from headway.launcher.machine import git_commit, machine, versions
from headway.launcher.run_dir import RunDir, flatten, read_json, spec_hash, write_json
from headway.launcher.spec import Spec

PREEMPTED = 75
ATTEMPT = "=== attempt of "

# Statuses a rank gives on purpose, should it be unable to write why.
_EXIT_CODES = (64, 65, 66, 70, 74, 75)

# What a rank says when another one went away: a consequence, not a cause.
_PEER_LOST = re.compile(
    r"onnection (was likely )?(reset|closed|refused)|Broken pipe|failed to recv, got 0 bytes|gloo/transport|"
    r"NCCL.*remote",
    re.IGNORECASE,
)


def train(path: Path, overrides: Sequence[str], *, dry_run: bool = False) -> int:
    """Run the spec to its end, resuming what its folder holds; returns the exit status.

    Raises SpecError, DataError or CheckpointError before any process is started when something is not right.
    """
    return launch(load_spec(path, overrides).spec, dry_run=dry_run)


def launch(spec: Spec, *, dry_run: bool = False) -> int:
    """As `train`, for a spec that is already loaded."""
    run = RunDir.of(spec)
    if dry_run:
        env = worker_environment(spec)
        print(" ".join(f"{k}={shlex.quote(v)}" for k, v in env.items()), shlex.join(command(spec, run)))
        return 0
    spec, info = resolve(spec)
    check_port(spec)
    run.refuse_foreign()
    with run.locked():
        check_same_data(run, info)
        run.adopt(spec)
        if run.is_complete():
            print(f"{run.path}: already complete; nothing to do (delete the folder to train anew)")
            return 0
        card = run_card(spec, info)
        write_json(run.card, card)
        print(banner(spec, run, card), flush=True)
        # A rank that outlives a killed launcher holds it; one the kernel is about to end needs a moment to be gone.
        with run.locked("worker.lock", wait_s=10):
            pass
        return _supervise(spec, run)


# ---------------------------------------------------------------- before anything is started


def resolve(spec: Spec) -> tuple[Spec, dict[str, Any]]:
    """The spec with its vocabulary filled in, and what is known of the data. Verifies every shard.

    Raises DataError for damaged data and SpecError for a vocabulary that cannot hold it.
    """
    source = spec.data.source
    if source.type == "synthetic":
        info: dict[str, Any] = {"fingerprint": None, "vocab_size": source.vocab_size}
    else:
        from headway.data.verify import verify

        found = verify(source, seq_len=spec.data.seq_len)
        info = {
            "fingerprint": found.fingerprint,
            "vocab_size": found.vocab_size,
            "unigram_entropy_nats": found.unigram_entropy_nats,
            "validation_bytes_per_token": found.validation_bytes_per_token,
        }
    size = spec.model.vocab_size
    if size is not None and size < info["vocab_size"]:
        raise SpecError(
            f"model.vocab_size: {size} is smaller than the {info['vocab_size']} tokens of the data; use "
            f"{info['vocab_size']}, or leave it out to take it from the data"
        )
    vocab_size = size or info["vocab_size"]
    return spec.model_copy(update={"model": spec.model.model_copy(update={"vocab_size": vocab_size})}), info


def check_port(spec: Spec) -> None:
    """Raises SpecError when the rendezvous port of the spec is taken."""
    port = spec.launch.port
    if port is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as e:
            raise SpecError(
                f"launch.port: {port} is taken ({e.strerror}); leave launch.port out to take any free port, "
                f"or name another"
            ) from e


def check_same_data(run: RunDir, info: dict[str, Any]) -> None:
    """Raises SpecError when the folder was trained on data with another fingerprint."""
    before = read_json(run.card, {}).get("data_fingerprint")
    if before is not None and before != info["fingerprint"]:
        raise SpecError(
            f"{run.path}: this run was started on other data (fingerprint {before[:16]}, now "
            f"{str(info['fingerprint'])[:16]}); restore that dataset, or give another run_dir=..."
        )


def run_card(spec: Spec, info: dict[str, Any]) -> dict[str, Any]:
    """What the report needs to know about a run besides its metrics."""
    from headway.model.cost import account

    assert spec.model.vocab_size is not None
    cost = account(
        spec.model,
        spec.attention,
        vocab_size=spec.model.vocab_size,
        seq_len=spec.data.seq_len,
        bytes_per_element=2 if spec.parallel.precision == "bf16" else 4,
    )
    return {
        "format": 1,
        "name": spec.name,
        "spec_hash": spec_hash(spec.model_dump(mode="json")),
        "git_commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
        "data_fingerprint": info["fingerprint"],
        "vocab_size": spec.model.vocab_size,
        "unigram_entropy_nats": info.get("unigram_entropy_nats"),
        "validation_bytes_per_token": info.get("validation_bytes_per_token"),
        "cost": {
            "num_params": cost.num_params,
            "params_by_part": cost.params_by_part,
            "flops_per_token_useful": cost.flops_per_token.useful,
            "flops_per_token_executed": cost.flops_per_token.executed,
            "flops_per_token_attention_core": cost.attention_core_flops.useful,
            "kv_bytes_per_token": cost.kv_bytes_per_token,
        },
        "steps": spec.steps,
        "tokens_per_step": spec.tokens_per_step,
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def banner(spec: Spec, run: RunDir, card: dict[str, Any]) -> str:
    """What is about to be trained, in the words of the spec."""
    cost, launch = card["cost"], spec.launch
    fingerprint = (card["data_fingerprint"] or f"synthetic {getattr(spec.data.source, 'task', '')}")[:24]
    attention = flatten(spec.attention.model_dump(mode="json", exclude_defaults=True))
    return "\n".join(
        [
            f"run        {run.path}  ({spec.name}, spec {card['spec_hash']})",
            f"attention  {spec.attention.type}  " + " ".join(f"{k}={v}" for k, v in attention.items() if k != "type"),
            f"parameters {cost['num_params']:,}  "
            + " ".join(f"{part} {n:,}" for part, n in cost["params_by_part"].items()),
            f"cost       {cost['flops_per_token_useful'] / 1e6:.2f} MFLOP/token forward (executed "
            f"{cost['flops_per_token_executed'] / 1e6:.2f}), KV {cost['kv_bytes_per_token']:,.0f} bytes/token",
            f"tokens     {spec.steps:,} steps x {spec.tokens_per_step:,} = {spec.steps * spec.tokens_per_step:,} "
            f"(sequences of {spec.data.seq_len}, {spec.train.global_batch} a step, {spec.train.micro_batch} a pass)",
            f"layout     {launch.processes} process(es), ZeRO-{spec.parallel.zero}, {spec.parallel.precision}",
            f"data       {fingerprint}, order seed {spec.data.seed}, initial seed {spec.seed}",
        ]
    )


# ---------------------------------------------------------------- processes


def command(spec: Spec, run: RunDir) -> list[str]:
    """What is executed: torchrun around the worker, or the worker itself when there is one process."""
    worker = ["-m", "headway.launcher.worker", str(run.path.resolve())]
    if spec.launch.processes == 1:
        return [sys.executable, "-P", *worker]
    where = ["--standalone"]
    if spec.launch.port is not None:
        where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{spec.launch.port}", "--rdzv-id", "headway"]
    return [
        *[sys.executable, "-P", "-m", "torch.distributed.run"],
        *where,
        *["--nnodes", "1", "--nproc-per-node", str(spec.launch.processes), "--max-restarts", "0"],
        *worker,
    ]


def worker_environment(spec: Spec) -> dict[str, str]:
    """What workers need in their environment beyond the user's own."""
    cores = len(os.sched_getaffinity(0))
    threads = spec.launch.threads or max(1, cores // spec.launch.processes)
    env = {"OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    if spec.launch.processes == 1:
        env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        env["MASTER_PORT"] = str(spec.launch.port or _free_port())
    return env


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _supervise(spec: Spec, run: RunDir) -> int:
    run.logs.mkdir(parents=True, exist_ok=True)
    for old in [*run.logs.glob("rank-*.error.json"), *run.logs.glob("rank-*.pid")]:
        old.unlink()
    env = {**os.environ, **worker_environment(spec)}
    if spec.launch.processes == 1:
        env["HEADWAY_PARENT_PID"] = str(os.getpid())
    with (run.logs / "launcher.log").open("wb") as log:
        child = subprocess.Popen(
            command(spec, run),
            env=env,
            stdin=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on in order
            preexec_fn=_die_with_parent,
        )
    with _forwarding(child, run) as signalled:
        status = child.wait()
    if status == 0:
        return 0
    _explain(run, spec.launch.processes, status, signalled=bool(signalled))


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def _forwarding(child: subprocess.Popen[bytes], run: RunDir) -> Iterator[list[int]]:
    """Pass SIGTERM, SIGINT and SIGHUP on to the ranks: they save and stop. A second SIGINT ends them at once."""
    received: list[int] = []

    def forward(signum: int, frame: Any) -> None:
        received.append(signum)
        if len(received) > 1 and signum == signal.SIGINT:
            child.kill()
            return
        pids = _live_ranks(run)
        with contextlib.suppress(OSError):
            print("stopping: the ranks finish their step and save ...", file=sys.stderr, flush=True)
        for pid in pids or [child.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    # SIGHUP: the terminal or connection has gone; under nohup it is ignored, and stays so.
    signals = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    old = {s: signal.signal(s, forward) for s in signals}
    try:
        yield received
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def _live_ranks(run: RunDir) -> list[int]:
    """Process ids of the ranks that run now: a file may be half-written, and the id of a dead rank anybody's."""
    pids = []
    for path in run.logs.glob("rank-*.pid"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(path.read_text())
            if b"headway.launcher.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                pids.append(pid)
    return pids


def _explain(run: RunDir, processes: int, status: int, *, signalled: bool) -> NoReturn:
    """Raise what says why the processes ended, with the exit status to pass on."""
    files = sorted(run.logs.glob("rank-*.error.json"), key=lambda p: p.stat().st_mtime)
    # On a full disk a report can be cut off, or empty.
    reports = [r for r in (read_json(p, None) for p in files) if isinstance(r, dict)]
    known = [r for r in reports if isinstance(r.get("exit_code"), int)]
    if known:
        first = known[0]
        raise _Ended(f"rank {first['rank']}: {first['message']}", first["exit_code"])
    causes = [r for r in reports if not _PEER_LOST.search(r.get("message", "")) and r["type"] != "KeyboardInterrupt"]
    if signalled and not causes:
        raise _Ended(
            "stopped by a signal before the state was saved; the same command continues from the last checkpoint",
            PREEMPTED,
        )
    killed = [] if causes else _killed_ranks(run, processes, status, reports)
    lines = []
    for rank, pid, code in killed:
        lines.append(f"rank {rank} (process {pid}) on {socket.gethostname()} {_how(code)}")
        lines += [f"  | {line}" for line in _tail(run.logs / f"rank-{rank}.log")]
    for r in [] if killed else (causes or reports)[:1]:
        lines.append(f"rank {r['rank']} on {socket.gethostname()} failed: {r['type']}: {r['message']}")
        lines += [f"  | {line}" for line in _tail(run.logs / f"rank-{r['rank']}.log")]
    if not lines:
        lines = [f"the processes ended with status {status}", *_tail(run.logs / "launcher.log")]
    lines.append(f"full logs are in {run.logs}; the same command continues from the last checkpoint")
    raise _Ended("\n".join(lines), next((code for *_, code in killed if code in _EXIT_CODES), HeadwayError.exit_code))


class _Ended(HeadwayError):
    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


def _killed_ranks(run: RunDir, processes: int, status: int, reports: list[Any]) -> list[tuple[int, str, int]]:
    """(rank, process, status) of ranks that ended without a report of their own."""
    told = {r.get("rank") for r in reports}
    if processes == 1:
        pid = _read_pid(run, 0)
        return [] if 0 in told else [(0, pid, status)]
    text = (run.logs / "launcher.log").read_text(errors="replace")
    pattern = r"rank\s+: (\d+) \(local_rank: \d+\)\s+exitcode\s+: (-?\d+) \(pid: (\d+)\)"
    found = [(int(rank), pid, int(code)) for rank, code, pid in re.findall(pattern, text) if int(rank) not in told]
    # torchrun ends the survivors with SIGTERM: they did not cause anything.
    first = [f for f in found if f[2] != -signal.SIGTERM] or found
    return first


def _how(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"ended with status {code}"


def _read_pid(run: RunDir, rank: int) -> str:
    try:
        return (run.logs / f"rank-{rank}.pid").read_text().strip()
    except OSError:
        return "unknown"


def _tail(path: Path, lines: int = 12) -> list[str]:
    try:
        # Logs of earlier attempts stay in the file; each begins with this line.
        return path.read_text(errors="replace").split(ATTEMPT)[-1].splitlines()[-lines:]
    except OSError:
        return []
