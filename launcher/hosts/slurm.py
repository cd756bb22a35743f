"""A run as a job of Slurm: the script, and handing it in.

The script starts this launcher once per host with srun, and each starts torchrun for its host. Before the job's time is
over Slurm signals the script, the ranks save and end with 75, and the job is queued again.
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
from headway.launcher.run.run_dir import RunDir

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec

FIRST, PORT = "FIRST_HOST", "PORT"
"""What a job knows only when it runs, in the text of a dry run."""

_PLAIN = re.compile(r"[A-Za-z0-9_./+=,@-]+")


def job_script(spec: Spec, run: RunDir, arguments: Sequence[str], folder: Path) -> str:
    """The text for sbatch. `arguments`: of `headway train`; `folder`: where it is started.

    Raises SpecError for a path that sbatch would read otherwise than it is written.
    """
    slurm, launch = spec.launch.slurm, spec.launch
    log = str(run.path.resolve() / "slurm" / "%j.log")
    for path in (log.removesuffix("%j.log"), str(folder)):
        if not _PLAIN.fullmatch(path):
            raise SpecError(
                f"launch.method: {path!r} would stand in a line of sbatch, which reads spaces, quotes and % in its own "
                "way; use a path of letters, digits and _./+=,@-, or launch.method=torchrun within a job of your own"
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
    # What the spec says stands; a value that is given twice is refused.
    found = [] if launch.address else ['"launch.address=$first"']
    found += [] if launch.port else ['"launch.port=$((20000 + SLURM_JOB_ID % 10000 * 2))"']
    inner = f'exec {shlex.join(start)} "$@" --node-rank "$SLURM_NODEID"'
    again = '    scontrol requeue "$SLURM_JOB_ID"\n' if launch.slurm.requeue else ""
    return f"""set -u
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --ntasks-per-node=1 --kill-on-bad-exit=0 bash -c {shlex.quote(inner)} headway \\
    {" ".join(found)} &
step=$!
# srun passes the signal on; `wait` returns when it comes, and once more when the ranks have saved.
trap 'kill -TERM "$step"' TERM
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
    status=$?
done
if [ "$status" -eq {PREEMPTED} ]; then
    echo "saved before the end of the job's time"
{again}fi
exit "$status"
"""


def submit(script: str, run: RunDir) -> int:
    """Write RUN/slurm/job.sbatch and hand it to sbatch; returns 0 and prints the number of the job.

    Raises HeadwayError where sbatch is missing or refuses.
    """
    path = run.path / "slurm" / "job.sbatch"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, timeout=120)
    except FileNotFoundError as e:
        raise HeadwayError(
            "launch.method: there is no sbatch on this machine; start the same command on a login node of the cluster, "
            f"or hand in {path} there"
        ) from e
    except subprocess.TimeoutExpired as e:
        raise HeadwayError(f"sbatch did not answer within 120 s; try again, or hand in {path} yourself") from e
    if done.returncode:
        said = done.stderr.strip() or f"status {done.returncode}"
        raise HeadwayError(f"sbatch refuses {path}: {said}; mend launch.slurm, or see `sinfo` for what there is")
    job = done.stdout.strip().partition(";")[0]
    if console.wants_json():
        console.emit({"run_dir": str(run.path), "job": job, "log": str(path.parent / f"{job}.log")})
        return 0
    console.result(f"job {job}; its log is {path.parent / job}.log, and `squeue -j {job}` says where it stands")
    return 0
