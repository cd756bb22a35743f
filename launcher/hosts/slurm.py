"""Run as a Slurm job: write the job script and submit it.

The script starts this launcher once per host with srun, and each launcher starts torchrun on its host. Before the time
limit of the job, Slurm sends a signal to the script. The ranks save and end with status 75, and the job is requeued.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headway.launcher.base import console
from headway.launcher.base.command import COMMAND
from headway.launcher.base.errors import PREEMPTED, HeadwayError, SpecError
from headway.launcher.run.run_dir import RunDir, read_mapping, write_json

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec

FIRST, PORT = "FIRST_HOST", "PORT"
"""Placeholders in the text of a dry run for values that are known only when the job runs."""

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


def job_script(spec: Spec, run: RunDir, arguments: Sequence[str], folder: Path) -> str:
    """The text of the job script. `arguments`: those of `headway train`; `folder`: its working directory.

    Raises SpecError for a path that sbatch would misread.
    """
    slurm, launch = spec.launch.slurm, spec.launch
    log = str(run.path.resolve() / "slurm" / "%j.log")
    for path in (log.removesuffix("%j.log"), str(folder)):
        if not _PLAIN.fullmatch(path):
            raise SpecError(
                f"launch.method: {path!r} would be part of an #SBATCH line, where sbatch has its own rules for spaces, "
                "quotes and %; use a path of letters, digits and _./+=,@-, or launch.method=torchrun in your own job"
            )
    options = {
        "job-name": spec.name,
        "nodes": launch.hosts,
        "ntasks-per-node": 1,
        "chdir": folder,
        "output": log,
        "open-mode": "append",
        "signal": f"B:TERM@{slurm.warn_s}",
        "partition": slurm.partition,
        "account": slurm.account,
        "time": slurm.time,
        "gpus-per-node": slurm.gpus_per_node,
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value is not None]
    lines += ["--requeue" if slurm.requeue else "--no-requeue", *slurm.options]
    return "\n".join(["#!/bin/bash", *(f"#SBATCH {line}" for line in lines), "", _body(spec, arguments)])


def _body(spec: Spec, arguments: Sequence[str]) -> str:
    launch = spec.launch
    start = [*COMMAND, "train", *arguments]
    # Set only what the spec does not set, because a value that is given twice is refused.
    found = [] if launch.address else ['"launch.address=$first"']
    found += [] if launch.port else ['"launch.port=$((20000 + SLURM_JOB_ID % 10000 * 2))"']
    inner = f'exec {shlex.join(start)} "$@" --node-rank "$SLURM_NODEID"'
    again = '    scontrol requeue "$SLURM_JOB_ID"\n' if launch.slurm.requeue else ""
    return f"""set -u
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --ntasks-per-node=1 --kill-on-bad-exit=0 bash -c {shlex.quote(inner)} headway \\
    {" ".join(found)} &
step=$!
# srun forwards the signal. `wait` returns when the signal arrives, and again when the ranks have saved.
trap 'kill -TERM "$step"' TERM
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
    status=$?
done
if [ "$status" -eq {PREEMPTED} ]; then
    echo "saved before the time limit of the job"
{again}fi
exit "$status"
"""


def refuse_second(run: RunDir) -> None:
    """Raise HeadwayError if the last submitted job of the run is queued or running, or if squeue cannot tell."""
    job = str(read_mapping(_record(run)).get("job", ""))
    if not job:
        return
    words = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    unknown = f"if it has ended, delete {_record(run)} and start the same command again"
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    except (FileNotFoundError, subprocess.TimeoutExpired) as e:
        raise HeadwayError(f"{run.path}: squeue cannot tell the state of its job {job} ({e}); {unknown}") from e
    # Slurm forgets a job some minutes after its end.
    if done.returncode and "invalid job id" not in done.stderr.lower():
        said = done.stderr.strip() or f"status {done.returncode}"
        raise HeadwayError(f"{run.path}: squeue cannot tell the state of its job {job} ({said}); {unknown}")
    states = {line.strip() for line in done.stdout.splitlines()} - ENDED - {""}
    if states:
        raise HeadwayError(
            f"{run.path}: job {job} of this run is {', '.join(sorted(states))} already; wait for it, end it with "
            f"`scancel {job}`, or give another run_dir=..."
        )


def _record(run: RunDir) -> Path:
    return run.path / "slurm" / "job.json"


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
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, timeout=120)
    except FileNotFoundError as e:
        raise HeadwayError(
            "launch.method: there is no sbatch on this machine; start the same command on a login node of the cluster, "
            f"or submit {path} there"
        ) from e
    except subprocess.TimeoutExpired as e:
        raise HeadwayError(f"sbatch did not respond within 120 s; try again, or submit {path} yourself") from e
    if done.returncode:
        said = done.stderr.strip() or f"status {done.returncode}"
        raise HeadwayError(f"sbatch rejected {path}: {said}; fix launch.slurm (`sinfo` lists the partitions)")
    job = done.stdout.strip().partition(";")[0]
    write_json(_record(run), {"job": job})
    if console.wants_json():
        console.emit({"run_dir": str(run.path), "job": job, "log": str(path.parent / f"{job}.log")})
        return 0
    console.result(f"submitted job {job}; its log is {path.parent / job}.log; `squeue -j {job}` shows its state")
    return 0
