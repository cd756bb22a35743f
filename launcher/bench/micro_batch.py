"""`headway bench micro-batch`: find the micro-batch of `train.micro_batch: auto` on this host, without training."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from headway.launcher.base import console
from headway.launcher.plan.micro_batch.settle import find, required, table
from headway.launcher.plan.planner import with_vocabulary
from headway.launcher.run.run_dir import write_json
from headway.launcher.spec.load import load_spec


def bench_micro_batch(path: Path, overrides: Sequence[str], *, out: Path | None) -> int:
    """Print the micro-batch that `auto` finds for the spec on this host. Ignores the spec's own `train.micro_batch`.

    Raises SpecError if no size fits.
    """
    found = find(with_vocabulary(load_spec(path, overrides, no_auto=None).spec))
    console.result(table(found))
    if out is not None:
        command = shlex.join(["headway", "bench", "micro-batch", str(path), *overrides])
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {"kind": "micro-batch", "command": command, **found.record()})
        console.say(f"written to {out}")
    required(found)
    return 0
