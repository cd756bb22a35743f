"""Start the trackers of a spec, and check before a run whether their packages are installed."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import assert_never

from headway.launcher.base.errors import SpecError
from headway.launcher.board.trackers.background import CLOSE_S, Background, Shown
from headway.launcher.board.trackers.sink import Record
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.tracking import MlflowConfig, TrackingConfig, WandbConfig
from headway.parallel.secrecy import SECRET_NAME


def check_installed(tracking: TrackingConfig) -> None:
    """Raise SpecError if a package is missing that a tracker of the spec needs."""
    for service in tracking.services:
        if importlib.util.find_spec(service.module) is None:
            key = f"tracking.{service.extra}"
            raise SpecError(
                f"{key}: the package {service.module} is not installed; run `pip install 'headway[{service.extra}]'` "
                f"(with -c constraints.txt for the tested version), or leave {key} out"
            )


def open_trackers(
    run: RunDir, tracking: TrackingConfig, *, start_step: int, patience_s: float, say: Callable[[str], None]
) -> list[Background]:
    """The trackers of the spec, each in a thread that connects it.

    `start_step`: step after which the run continues. `patience_s`: how long all of them may hold up the end of the run.

    The packages are imported here, since imports in two threads at once may meet half-made modules.
    """
    opened, services = [], tracking.services
    close_s = min(CLOSE_S, patience_s / max(1, len(services)))
    for service in services:
        try:
            importlib.import_module(service.module)
        except Exception as e:
            say(f"{service.name.upper()} IS NOT WRITTEN: {e}; training goes on. {Background.mend}")
            continue
        opens = partial(connect, run, service, per_layer=tracking.per_layer)
        earlier = partial(earlier_records, run, start_step)
        opened.append(
            Background(
                service.name,
                opens,
                say=say,
                hide=without_secrets,
                earlier=earlier,
                close_s=close_s,
                later=f", and the next start sends it; of a complete run, `headway board {run.path} --send` does",
            )
        )
    return opened


def earlier_records(run: RunDir, start_step: int, shown: int) -> Iterator[Record]:
    """Records of the steps after `shown` up to `start_step`, from metrics.jsonl, which is read while it grows."""
    if shown >= start_step:
        return
    for record in run.read_metrics():
        step = record.get("step", 0)
        if record.get("kind") == "train" and step > start_step:
            return
        if shown < step <= start_step:
            yield record


def connect(run: RunDir, service: WandbConfig | MlflowConfig, *, per_layer: bool) -> Shown:
    """Open the run at a service. Raises exceptions of its package."""
    match service:
        case WandbConfig():
            from headway.launcher.board.trackers.wandb import Wandb

            return Wandb(run, service, per_layer=per_layer)
        case MlflowConfig():
            from headway.launcher.board.trackers.mlflow import Mlflow

            return Mlflow(run, service, per_layer=per_layer)
        case _:
            assert_never(service)


def without_secrets(text: str) -> str:
    """A message without the values of variables that have the name of a secret."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= 8:
            text = text.replace(value, "...")
    return text
