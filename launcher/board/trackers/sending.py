"""Send trackers the records of a complete run that they lack: `headway board RUN --send`."""

from __future__ import annotations

from collections.abc import Sequence

from headway.launcher.base import console
from headway.launcher.base.errors import HeadwayError, SpecError
from headway.launcher.board.trackers.background import in_batches
from headway.launcher.board.trackers.opening import check_installed, connect, earlier_records, without_secrets
from headway.launcher.run.run_dir import RunDir, read_mapping
from headway.launcher.run.stored_spec import stored_spec


def send_all(runs: Sequence[RunDir]) -> None:
    """Send the trackers in the spec of each run what they lack of it. A run that is not complete is left out.

    Raises SpecError if no run is complete and has a tracker, or a package is missing; HeadwayError if a service fails.
    """
    sent, left_out = 0, []
    for run in runs:
        if not run.is_complete():
            left_out.append(run)
            continue
        for name, last in send_rest(run).items():
            had = "nothing" if last < 0 else f"the records up to step {last}"
            console.result(f"{run.path}: {name} had {had}, and now has all")
            sent += 1
    if left_out:
        console.result(
            f"{len(left_out)} of {len(runs)} runs are not complete, for example {left_out[0].path}; the next start of "
            "`headway train` or `headway study run` sends what is missing of them"
        )
    if not sent:
        raise SpecError(
            "--send: none of these runs is complete and has a tracker in its spec.json; start `headway train` of a "
            "complete run again with tracking.wandb=... or tracking.mlflow=..., which only adds the tracker"
        )


def send_rest(run: RunDir) -> dict[str, int]:
    """Send each tracker of a complete run what it lacks. Returns the name of each, and the last step that it had.

    -1 stands for a tracker that had none. Raises SpecError if a package is missing or another process uses the folder,
    HeadwayError if a service fails.
    """
    tracking, summary, had = stored_spec(run).tracking, read_mapping(run.summary), {}
    check_installed(tracking)
    with run.locked():
        for service in tracking.services:
            try:
                sink = connect(run, service, per_layer=tracking.per_layer)
                had[service.name] = sink.shown
                for batch in in_batches(earlier_records(run, summary["steps"], sink.shown)):
                    sink.write(batch)
                sink.finish(summary)
                sink.close()
            except Exception as e:
                told = without_secrets(" ".join(str(e).split()))
                raise HeadwayError(
                    f"{run.path}: {service.name} fails: {told}; the records stay in metrics.jsonl, and the same "
                    "command sends what is then missing"
                ) from None
    return had
