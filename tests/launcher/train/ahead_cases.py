"""Run by test_ahead.py: the same run twice in one process, as on a CPU and with the copies that a GPU gets.

Streams are stand-ins that work at once, so what is compared is which batch a step gets. Not a test module.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from headway.launcher.hosts.commands import worker_environment
from headway.launcher.run.resolve import resolve
from headway.launcher.run.run_dir import RunDir, write_json
from headway.launcher.spec.load import load_spec
from headway.launcher.train.load import load_session, open_session
from headway.launcher.train.loop import train_step, validate
from headway.launcher.train.session import Session
from headway.parallel.transfer import SideStream


class Queue:
    def record(self, _: Any) -> None:
        pass

    def wait_event(self, _: Any) -> None:
        pass


class Cuda:
    """Stand-in for `torch.cuda`."""

    Stream = Event = current_stream = staticmethod(lambda *_: Queue())

    def stream(self, _: Queue) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()


def figures(s: Session, taken_early: list[bool]) -> list[Any]:
    found = []
    for _ in range(6):
        step = train_step(s)
        taken_early.append(s.batches._next is not None)
        found.append((step.stats.loss, step.stats.grad_norm, step.agreed.digest))
    validate(s)
    return [*found, s.validation_loss]


def main() -> None:
    """Arguments: a spec, and an empty folder."""
    torch.set_num_threads(1)
    spec_file, folder = map(Path, sys.argv[1:])
    words = ["train.micro_batch=4", "data.workers=1", "tracking.tensorboard=false", "checkpoint.every_minutes=null"]
    spec = resolve(load_spec(spec_file, words).spec)[0]
    os.environ.update(worker_environment(spec))
    runs = [RunDir(folder / name) for name in ("plain", "ahead")]
    for run in runs:
        run.path.mkdir()
        write_json(run.spec, spec.model_dump(mode="json"))
    early: list[list[bool]] = [[], []]
    with open_session(runs[0]) as s:
        plain = figures(s, early[0])
        other = load_session(runs[1], spec, s.layout)
        transfer = SideStream(s.layout.device, Cuda())
        other.engine._transfer = transfer
        with (
            patch.object(torch.Tensor, "pin_memory", lambda self, *_: self.clone()),
            patch.object(torch.Tensor, "record_stream", lambda *_: None),
        ):
            ahead = figures(other, early[1])
        left = len(transfer._copies)
        other.close()
    print("CASE", json.dumps({"plain": plain, "ahead": ahead, "early": early, "left": left}), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
