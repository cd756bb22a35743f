"""Run by test_collector.py: what steps leave to the garbage collector while it is off. Not a test module."""

import gc
import json
import os
import sys
from pathlib import Path

import torch

from headway.launcher.hosts.commands import worker_environment
from headway.launcher.run.resolve import resolve
from headway.launcher.run.run_dir import RunDir, write_json
from headway.launcher.spec.load import load_spec
from headway.launcher.train.collector import FIRST_STEPS
from headway.launcher.train.load import open_session
from headway.launcher.train.loop import train_step

STEPS = 20


def main() -> None:
    """Arguments: a spec, an empty folder, and overrides of the spec."""
    torch.set_num_threads(1)
    words = ["train.micro_batch=4", "train.tokens=1e6", "tracking.tensorboard=false", *sys.argv[3:]]
    spec = resolve(load_spec(Path(sys.argv[1]), words).spec)[0]
    os.environ.update(worker_environment(spec))
    run = RunDir(Path(sys.argv[2]))
    write_json(run.spec, spec.model_dump(mode="json"))
    with open_session(run) as s:
        for _ in range(FIRST_STEPS + 2):
            train_step(s)
        off = not gc.isenabled()
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)
        for _ in range(STEPS):
            train_step(s)
        unreachable = gc.collect()
        gc.set_debug(0)
        tensors = sum(isinstance(o, torch.Tensor) for o in gc.garbage)
        gc.garbage.clear()
    on = gc.isenabled()
    print(
        "CASE", json.dumps({"off": off, "on": on, "unreachable": unreachable / STEPS, "tensors": tensors}), flush=True
    )


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
