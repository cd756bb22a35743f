"""A cluster of substitutes for Slurm's programs: they check what they are given, and keep a queue in a folder.

sbatch reads the #SBATCH lines as Slurm does and refuses options that it does not know. `Cluster.run` executes queued
jobs one after the other, elements of an array in order, as soon as their dependencies have ended. srun executes its
command once for each host. Jobs that requeue themselves with scontrol go back into the queue.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

KNOWN = {
    *("job-name", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "chdir", "output", "open-mode", "signal"),
    *("partition", "account", "time", "mem", "gpus-per-node", "array", "dependency", "requeue", "no-requeue"),
    *("exclusive", "qos", "gres", "mail-user"),
}

SBATCH = """
import json, re, sys
from pathlib import Path
queue = Path({queue!r})
if (queue / "reject").exists():
    sys.exit("sbatch: error: " + (queue / "reject").read_text())
assert sys.argv[1] == "--parsable" and len(sys.argv) == 3, sys.argv
lines = Path(sys.argv[2]).read_text().splitlines()
assert lines[0] == "#!/bin/bash"
options = {{}}
for line in lines[1:]:  # Slurm reads up to the first command
    if line.strip() and not line.startswith("#"):
        break
    if line.startswith("#SBATCH "):
        found = re.fullmatch(r"--([a-z-]+)(?:=(\\S+))?", line.removeprefix("#SBATCH "))
        if found is None or found[1] not in {known!r}:
            sys.exit(f"sbatch: error: invalid option {{line}}")
        if found[1] in options:
            sys.exit(f"sbatch: error: given twice {{line}}")
        options[found[1]] = found[2] or ""
job = 100 + len(list(queue.glob("*.json")))
elements = [None]
if "array" in options:
    found = re.fullmatch(r"0-(\\d+)(?:%(\\d+))?", options["array"])
    if int(found[1]) >= int((queue / "max").read_text()):
        sys.exit("sbatch: error: Invalid job array specification")
    elements = list(range(int(found[1]) + 1))
after = re.fullmatch(r"afterany:([0-9:]+)", options.get("dependency", "afterany:0"))[1].split(":")
record = dict(job=job, script="\\n".join(lines) + "\\n", options=options, after=[int(a) for a in after if a != "0"])
record["states"] = {{str(job) if e is None else f"{{job}}_{{e}}": "PENDING" for e in elements}}
(queue / f"{{job}}.json").write_text(json.dumps(record))
print(f"{{job}};cluster")
"""

SQUEUE = """
import json, re, sys
from pathlib import Path
queue = Path({queue!r})
if (queue / "broken").exists():
    sys.exit("squeue: error: Unable to contact slurm controller")
named = next(a for a in sys.argv if a.startswith("--jobs=")).removeprefix("--jobs=").split(",")
assert all(re.fullmatch("[0-9]+", n) for n in named), named
assert "--array" in sys.argv and "--format=%i %T" in sys.argv, sys.argv
for name in named:
    states = json.loads((queue / f"{{name}}.json").read_text())["states"]
    for element, state in states.items():
        if state in ("PENDING", "RUNNING"):
            print(element, state)
"""

SCONTROL = """
import sys
from pathlib import Path
queue = Path({queue!r})
if sys.argv[1:] == ["show", "config"]:
    print(f"Configuration data\\nMaxArraySize            = {{(queue / 'max').read_text()}}\\nMaxJobCount = 10000")
elif sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1\\n127.0.0.1")
else:
    assert sys.argv[1] == "requeue", sys.argv
    (queue / f"requeue-{{sys.argv[2]}}").touch()
"""

SRUN = """
import json, os, subprocess, sys
from pathlib import Path
words = sys.argv[1:]
options = []
while words[0].startswith("--"):
    options.append(words.pop(0))
with open(Path({queue!r}) / "srun.jsonl", "a") as f:
    f.write(json.dumps(options) + "\\n")
hosts = int(os.environ["SLURM_JOB_NUM_NODES"])
envs = [{{**os.environ, "SLURM_STEP_ID": "0", "SLURM_NODEID": str(n)}} for n in range(hosts)]
started = [subprocess.Popen(words, env=env) for env in envs]
sys.exit(max(process.wait() for process in started))
"""


class Cluster:
    """Substitutes for Slurm's programs in `folder`/bin. `largest`: MaxArraySize."""

    def __init__(self, folder: Path, *, largest: int = 1001) -> None:
        self.queue, self.bin = folder / "queue", folder / "bin"
        self.queue.mkdir()
        self.bin.mkdir()
        (self.queue / "max").write_text(str(largest))
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scontrol", SCONTROL), ("srun", SRUN)):
            code = text.format(queue=str(self.queue), known=KNOWN)
            (self.bin / name).write_text(f"#!{sys.executable} -S{code}")
            (self.bin / name).chmod(0o755)

    def jobs(self) -> list[dict]:
        """All jobs that were submitted, in order."""
        return [json.loads(path.read_text()) for path in sorted(self.queue.glob("[0-9]*.json"))]

    def srun_options(self) -> list[list[str]]:
        """Options of every step that was started."""
        return [json.loads(line) for line in (self.queue / "srun.jsonl").read_text().splitlines()]

    def set_state(self, element: str, state: str) -> None:
        path = self.queue / f"{element.partition('_')[0]}.json"
        job = json.loads(path.read_text())
        job["states"][element] = state
        path.write_text(json.dumps(job))

    def run(self, most: int = 1000) -> list[tuple[str, int]]:
        """Execute up to `most` jobs or elements that are queued. Returns (job or element, exit status) of each."""
        ended = []
        while len(ended) < most and (job := self._next()) is not None:
            element = next(e for e, state in job["states"].items() if state == "PENDING")
            ended.append((element, self._execute(job, element)))
        return ended

    def _next(self) -> dict | None:
        jobs = self.jobs()
        waiting = {job["job"] for job in jobs if "PENDING" in job["states"].values()}
        return next((j for j in jobs if j["job"] in waiting and not waiting.intersection(j["after"])), None)

    def _execute(self, job: dict, element: str) -> int:
        number, _, index = element.partition("_")
        env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        # Slurm gives every element of an array a job number of its own
        env |= {"SLURM_JOB_ID": str(int(number) * 1000 + int(index)) if index else number}
        env |= {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": job["options"]["nodes"]}
        env |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": index} if index else {}
        self.set_state(element, "RUNNING")
        log = Path(re.sub("%[Aj]", number, job["options"]["output"]).replace("%a", index))
        with log.open("a") as f:
            done = subprocess.run(
                ["bash", "-c", job["script"]],
                cwd=job["options"]["chdir"],
                env=env,
                stdout=f,
                stderr=subprocess.STDOUT,
                timeout=300,
            )
        again = self.queue / f"requeue-{element}"
        self.set_state(element, "PENDING" if again.exists() else "COMPLETED" if done.returncode == 0 else "FAILED")
        again.unlink(missing_ok=True)
        return done.returncode
