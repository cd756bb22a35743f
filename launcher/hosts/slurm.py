"""Slurm: the scripts of jobs, their submission, and the state of jobs in the queue.

A script starts this launcher once per host with srun, and each launcher starts torchrun on its host. Before the time
limit of the job, Slurm sends a signal to the script. The ranks save and end with status 75, and the job is requeued.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.launcher.base import console
from headway.launcher.base.command import COMMAND
from headway.launcher.base.errors import PREEMPTED, HeadwayError, SpecError
from headway.launcher.run.run_dir import RunDir, read_mapping, write_json

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec
    from headway.parallel.config import LaunchConfig

FIRST, PORT = "FIRST_HOST", "PORT"
"""Placeholders in the text of a dry run for values that are known only when the job runs."""

ANSWER_S = 120.0
"""Seconds that a program of Slurm may take to answer."""

ENDED = frozenset(
    [
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    ]
)
"""States of jobs that do not run again. Source: "JOB STATE CODES" in the manual of squeue."""

_PLAIN = re.compile(r"[A-Za-z0-9_./+=,@-]+")


class QueueUnknownError(HeadwayError):
    """squeue did not tell the state of jobs."""


# ---------------------------------------------------------------- scripts


def job_script(spec: Spec, run: RunDir, arguments: Sequence[str], folder: Path) -> str:
    """The text of the job script. `arguments`: those of `headway train`; `folder`: its working directory.

    Raises SpecError for a path that sbatch would misread.
    """
    start = [*python_command(spec.launch), "train", *arguments]
    inner = f'exec {shlex.join(start)} "$@" --node-rank "$SLURM_NODEID"'
    again = requeue('"$SLURM_JOB_ID"') if spec.launch.slurm.requeue else ""
    body = f"""{_START}
{step(spec.launch, inner)} &
{_WAIT}
if [ "$status" -eq {PREEMPTED} ]; then
    echo "saved before the time limit of the job"
{again}fi
exit "$status"
"""
    head = header(spec.launch, name=spec.name, log=run.path.resolve() / "slurm" / "%j.log", folder=folder)
    return script(head, spec.launch.slurm.setup, body)


def array_script(
    launch: LaunchConfig,
    words: Sequence[str],
    *,
    parts: int,
    name: str,
    log: Path,
    folder: Path,
    array: str,
) -> str:
    """The text of the script of an array job whose element I executes `words` I P for P = 0 to `parts` - 1.

    Each is executed on all hosts of the job; its last arguments are the values that only the job knows. A part that
    fails does not stop the next one. `array`: value of sbatch --array. `log`: may contain %A (job) and %a (element).
    """
    start = shlex.join([*python_command(launch), *words])
    inner = f'exec {start} "$SLURM_ARRAY_TASK_ID" "$@" --node-rank "$SLURM_NODEID"'
    element = '"${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"'
    again = requeue(element, indent=8) if launch.slurm.requeue else ""
    body = f"""{_START}
code=0
for part in {" ".join(map(str, range(parts)))}; do
    if [ -z "$stopped" ]; then
{step(launch, inner, '"$part"', indent=8)} &
{_indented(_WAIT, 8)}
    else
        status={PREEMPTED}
    fi
    if [ "$status" -eq {PREEMPTED} ]; then
        echo "saved before the time limit of the job"
{again}        exit "$status"
    fi
    [ "$status" -eq 0 ] || code=$status
done
exit "$code"
"""
    more = {"array": array}
    return script(header(launch, name=name, log=log, folder=folder, more=more), launch.slurm.setup, body)


_FOLLOWS = ("qos", "reservation", "clusters", "constraint", "comment", "wckey", "mail-user", "mail-type", "export")
"""Options of `launch.slurm.options` that are no resources."""


def follow_up_script(
    launch: LaunchConfig, arguments: Sequence[str], *, after: Sequence[str], name: str, log: Path, folder: Path
) -> str:
    """The text of the script of a job that executes one command of Headway when the jobs `after` have ended.

    It has one host and no GPUs. srun does not start it. If srun would start a container, the Python that executes this
    command is used.
    """
    slurm = launch.slurm
    python = COMMAND if any(o.startswith("--container") for o in slurm.srun) else python_command(launch)
    options = {
        "job-name": name,
        "nodes": 1,
        "ntasks": 1,
        "dependency": f"afterany:{':'.join(after)}",
        "chdir": folder,
        "output": log,
        "open-mode": "append",
        "partition": slurm.partition,
        "account": slurm.account,
        "time": slurm.time,
    }
    kept = [o for o in slurm.options if o.removeprefix("--").partition("=")[0] in _FOLLOWS]
    lines = [*_lines(options), "--requeue" if slurm.requeue else "--no-requeue", *kept]
    _refuse_paths(log, folder)
    return script(lines, slurm.setup, f"set -u\nexec {shlex.join([*python, *arguments])}\n")


def header(
    launch: LaunchConfig, *, name: str, log: Path, folder: Path, more: Mapping[str, Any] | None = None
) -> list[str]:
    """Options of sbatch for a job on the hosts of a run.

    Raises SpecError for a path that sbatch would misread, and for a warning that is too late to stop.
    """
    _refuse_paths(log, folder)
    slurm = launch.slurm
    if slurm.warn_s <= launch.stop_s:
        raise SpecError(
            f"launch.slurm.warn_s: {slurm.warn_s} s before its time limit the job is told to stop, and its ranks have "
            f"{launch.stop_s} s to finish their step and save (launch.stop_s), so Slurm would kill it before it has "
            f"saved and is requeued; use a launch.slurm.warn_s above {launch.stop_s}, such as {launch.stop_s + 60}, or "
            f"a launch.stop_s below {slurm.warn_s}"
        )
    options = {
        "job-name": name,
        "nodes": launch.hosts,
        "ntasks-per-node": 1,
        "cpus-per-task": _cpus(launch),
        "chdir": folder,
        "output": log,
        "open-mode": "append",
        "signal": f"B:TERM@{slurm.warn_s}",
        "partition": slurm.partition,
        "account": slurm.account,
        "time": slurm.time,
        "mem": slurm.memory,
        "gpus-per-node": _gpus(launch),
        **(more or {}),
    }
    return [*_lines(options), "--requeue" if slurm.requeue else "--no-requeue", *slurm.options]


def script(options: Sequence[str], setup: Sequence[str], body: str) -> str:
    """A script for sbatch. `setup` precedes `set -u`, which many activation scripts do not survive."""
    return "\n".join(["#!/bin/bash", *(f"#SBATCH {line}" for line in options), "", *setup, body])


def step(launch: LaunchConfig, inner: str, *words: str, indent: int = 0) -> str:
    """The srun command that executes the bash command `inner` once on each host. `words`: its first arguments."""
    cpus = _cpus(launch)
    options = ["--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    # From Slurm 22.05 on, srun does not take the value of sbatch.
    options += [f"--cpus-per-task={cpus}"] if cpus is not None else []
    # Set only what the spec does not set, because a value that is given twice is refused. One host needs neither.
    found = list(words)
    if launch.hosts > 1:
        found += [] if launch.address else ['"launch.address=$first"']
        found += [] if launch.port else ['"launch.port=$((20000 + SLURM_JOB_ID % 10000 * 2))"']
    pad = " " * indent
    start = f"{pad}srun {shlex.join([*options, *launch.slurm.srun])} bash -c {shlex.quote(inner)} headway"
    return f"{start} \\\n{pad}    {' '.join(found)}" if found else start


def requeue(job: str, *, indent: int = 4) -> str:
    """The line of a script that puts its job back into the queue."""
    return f"{' ' * indent}scontrol requeue {job}\n"


def python_command(launch: LaunchConfig) -> list[str]:
    """`headway` as the hosts of a job execute it."""
    return [launch.slurm.python or COMMAND[0], *COMMAND[1:]]


_START = """set -u
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
stopped= step=
trap 'stopped=1; [ -z "$step" ] || kill -TERM "$step" 2>/dev/null' TERM"""

_WAIT = """step=$!
# The step forwards the signal. `wait` returns when the signal arrives, and again when the ranks have saved.
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
    status=$?
done
step="""


def _indented(text: str, width: int) -> str:
    return "\n".join(" " * width + line for line in text.splitlines())


def _lines(options: Mapping[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


def _refuse_paths(log: Path, folder: Path) -> None:
    for path in (f"{log.parent}/", str(folder)):
        if not _PLAIN.fullmatch(path):
            raise SpecError(
                f"launch.method: {path!r} would be part of an #SBATCH line, where sbatch has its own rules for spaces, "
                "quotes and %; use a path of letters, digits and _./+=,@-, or launch.method=torchrun in your own job"
            )


def _gpus(launch: LaunchConfig) -> int | None:
    derived = launch.processes if launch.device == "cuda" and not launch.slurm.asks_gpus else None
    return launch.slurm.gpus_per_node or derived


def _cpus(launch: LaunchConfig) -> int | None:
    derived = None if launch.threads is None else launch.threads * launch.processes
    return launch.slurm.cpus_per_task or derived


# ---------------------------------------------------------------- the queue


def queue_states(jobs: Sequence[str], *, timeout_s: float = ANSWER_S) -> dict[str, str]:
    """Job or element of an array (`JOB_ELEMENT`) -> state, of those of `jobs` that are queued or running.

    Raises QueueUnknownError if squeue is missing, fails, or does not answer within `timeout_s` seconds.
    """
    if not jobs:
        return {}
    words = ["squeue", "--noheader", "--array", f"--jobs={','.join(jobs)}", "--format=%i %T"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s)
    except FileNotFoundError as e:
        raise QueueUnknownError("there is no squeue on this machine") from e
    except (OSError, subprocess.TimeoutExpired) as e:
        raise QueueUnknownError(str(e)) from e
    # Slurm forgets a job some minutes after its end.
    if done.returncode and "invalid job id" not in done.stderr.lower():
        raise QueueUnknownError(done.stderr.strip() or f"squeue ended with status {done.returncode}")
    rows = [line.split() for line in done.stdout.splitlines()]
    return {row[0]: row[-1] for row in rows if row and row[-1] not in ENDED}


def refuse_second(run: RunDir) -> None:
    """Raise HeadwayError if the last submitted job of the run is queued or running, or if squeue cannot tell."""
    job = str(read_mapping(_record(run)).get("job", ""))
    if not job:
        return
    try:
        states = set(queue_states([job]).values())
    except QueueUnknownError as e:
        raise HeadwayError(
            f"{run.path}: squeue cannot tell the state of its job {job} ({e}); if it has ended, delete {_record(run)} "
            "and start the same command again"
        ) from e
    if states:
        raise HeadwayError(
            f"{run.path}: job {job} of this run is {', '.join(sorted(states))} already; wait for it, end it with "
            f"`scancel {job}`, or give another run_dir=..."
        )


def _record(run: RunDir) -> Path:
    return run.path / "slurm" / "job.json"


def sbatch(path: Path, options: Sequence[str] = ()) -> str:
    """Submit the script in `path`. Returns the job number.

    Raises HeadwayError if sbatch is missing, does not answer, or rejects the script.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(path)], capture_output=True, text=True, timeout=ANSWER_S
        )
    except FileNotFoundError as e:
        raise no_sbatch(f"submit {path} there") from e
    except subprocess.TimeoutExpired as e:
        raise HeadwayError(
            f"sbatch did not respond within {ANSWER_S:.0f} s; look with `squeue --me` whether the job is there, and "
            f"else try again, or submit {path} yourself"
        ) from e
    if done.returncode:
        said = done.stderr.strip() or f"status {done.returncode}"
        raise HeadwayError(f"sbatch rejected {path}: {said}; fix launch.slurm (`sinfo` lists the partitions)")
    return done.stdout.strip().partition(";")[0]


def no_sbatch(otherwise: str) -> HeadwayError:
    """The error of a machine without sbatch. `otherwise`: what to do instead of the same command elsewhere."""
    return HeadwayError(
        f"launch.method: there is no sbatch on this machine; start the same command on a login node of the cluster, "
        f"or {otherwise}"
    )


def submit(script: str, run: RunDir) -> int:
    """Write RUN/slurm/job.sbatch, submit it with sbatch, and print the job number. Returns 0.

    Raises HeadwayError if sbatch is missing or rejects the script, or if the last job of the run is still queued or
    running.
    """
    path = run.path / "slurm" / "job.sbatch"
    path.parent.mkdir(parents=True, exist_ok=True)
    with run.locked("slurm/submit.lock"):
        return _submit(script, run, path)


def _submit(script: str, run: RunDir, path: Path) -> int:
    refuse_second(run)
    path.write_text(script, encoding="utf-8")
    job = sbatch(path)
    write_json(_record(run), {"job": job})
    if console.wants_json():
        console.emit({"run_dir": str(run.path), "job": job, "log": str(path.parent / f"{job}.log")})
        return 0
    console.result(f"submitted job {job}; its log is {path.parent / job}.log; `squeue -j {job}` shows its state")
    return 0
