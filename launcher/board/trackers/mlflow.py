"""MLflow (https://mlflow.org/docs), through the client of its package `mlflow-skinny` or `mlflow`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from filelock import FileLock

from headway.launcher.board.pages import public_values
from headway.launcher.board.scalars import KINDS, scalars_of
from headway.launcher.board.trackers.sink import Record
from headway.launcher.run.run_dir import RunDir, read_mapping, write_json
from headway.launcher.spec.merge import format_value
from headway.launcher.spec.tracking import MlflowConfig

_MOST_METRICS, _MOST_PARAMS, _LONGEST = 1000, 100, 6000  # of one request; characters of a parameter
_LOCK_S = 120
_LAST = "train/tokens"
_RARE = {
    "validation": "val/loss",
    "heads": "heads/mean/c_w",
    "checkpoint": "checkpoint/write_s",
    "skipped": "guard/skipped_steps",
}
"""Kind of a record that follows that of its step, perhaps much later -> a scalar that each of them has."""
_RUN_ID = "headway.run_id"
_HALF_MADE = re.compile(r"table \S+ already exists|no such (table|column): \S+|duplicate column name: \S+")
"""What SQLite says if MLflow finds some of its tables, or its note of the version of their layout is behind them."""
_ILLEGAL = re.compile(r"[^\w\-. /:]")


class Mlflow:
    """A run of MLflow. Its id is in `mlflow.json` of the run folder, so that a resume continues it.

    Raises exceptions of `mlflow`, and RuntimeError for a local file whose tables are half made.
    """

    name = MlflowConfig.name
    mend = "metrics.jsonl has every record"

    def __init__(self, run: RunDir, config: MlflowConfig, *, per_layer: bool) -> None:
        with _alone(config.uri):
            try:
                self._open(run, config, per_layer)
            except Exception as e:
                file, found = _sqlite_file(config.uri), _HALF_MADE.search(str(e))
                if file is None or found is None:
                    raise
                raise RuntimeError(
                    f"{file}: its tables are half made ({found[0]}), as after the kill of a process that was making "
                    f"them. Delete {file} if no run is in it yet, and it is made anew; else restore a copy of it"
                ) from e

    def _open(self, run: RunDir, config: MlflowConfig, per_layer: bool) -> None:
        self._entities: Any = import_module("mlflow.entities")  # of an extra, so type checkers may not find it
        self._client: Any = import_module("mlflow").MlflowClient(tracking_uri=config.uri)
        self._per_layer, self._complete = per_layer, False
        self._last = dict.fromkeys(("train", *_RARE), -1)  # kind -> last step that the run has
        spec, file = read_mapping(run.spec), run.path / "mlflow.json"
        self._tokens_per_step = spec["train"]["global_batch"] * spec["data"]["seq_len"]
        stored = read_mapping(file)
        found = stored.get("run_id") if stored.get("uri") == config.uri else None
        if isinstance(found, str) and self._continued(found):
            self._id: str = found
            return
        self._id = self._begun(run, config) or self._create(run, config, spec)
        self._log_params(spec)
        write_json(file, {"run_id": self._id, "uri": config.uri, "experiment": config.experiment})

    def _begun(self, run: RunDir, config: MlflowConfig) -> str | None:
        """A run of this run folder that is not in `mlflow.json`: its process ended before it wrote the file."""
        own, experiment = run.run_id(), self._client.get_experiment_by_name(config.experiment)
        if own is None or experiment is None:
            return None
        found = self._client.search_runs([experiment.experiment_id], f"tags.`{_RUN_ID}` = '{own}'", max_results=1)
        return found[0].info.run_id if found and self._continued(found[0].info.run_id) else None

    def _continued(self, run_id: str) -> bool:
        """Whether there is such a run, which then goes on. A step that is repeated keeps its first points."""
        try:
            found = self._client.get_run(run_id)
        except Exception as e:
            if getattr(e, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        if found.info.lifecycle_stage != "active":
            return False
        there = found.data.metrics
        if _LAST in there:
            self._last["train"] = round(there[_LAST] / self._tokens_per_step)
        for kind in (kind for kind, key in _RARE.items() if key in there):
            self._last[kind] = max(point.step for point in self._client.get_metric_history(run_id, _RARE[kind]))
        self._client.update_run(run_id, status="RUNNING")
        return True

    def _create(self, run: RunDir, config: MlflowConfig, spec: dict[str, Any]) -> str:
        experiment_id = self._experiment(config.experiment)
        tags = {_RUN_ID: run.run_id() or "", "headway.group": config.group or ""}
        made = self._client.create_run(
            experiment_id, run_name=str(spec.get("name", run.path.name)), tags={k: v for k, v in tags.items() if v}
        )
        return made.info.run_id

    def _log_params(self, spec: dict[str, Any]) -> None:
        """Log the values of the spec that the run does not have yet. MLflow refuses to change a parameter."""
        known = self._client.get_run(self._id).data.params
        values = {_legal(key): format_value(value)[:_LONGEST] for key, value in public_values(spec).items()}
        params = [self._entities.Param(key, value) for key, value in values.items() if key not in known]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._id, params=params[first : first + _MOST_PARAMS])

    def _experiment(self, name: str) -> str:
        """The id of an experiment, which is made if it is missing; another run may do so at the same time."""
        if (found := self._client.get_experiment_by_name(name)) is not None:
            return found.experiment_id
        try:
            return self._client.create_experiment(name)
        except Exception as e:
            if getattr(e, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                raise
            return self._client.get_experiment_by_name(name).experiment_id

    @property
    def shown(self) -> int:
        """The step up to which it has every record."""
        return min(self._last.values())

    def write(self, records: Iterable[Record]) -> None:
        now, metrics = import_module("mlflow.utils.time").get_current_time_millis(), []
        for record in records:
            if record["kind"] not in KINDS or record["step"] <= self._last.get(record["kind"], self._last["train"]):
                continue
            metrics += [
                self._entities.Metric(_legal(key), float(value), now, record["step"])
                for key, value in scalars_of(record, per_layer=self._per_layer).items()
            ]
        for first in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[first : first + _MOST_METRICS])

    def finish(self, summary: Record) -> None:
        self._complete = True

    def flush(self) -> None:
        return

    def close(self) -> None:
        self._client.set_terminated(self._id, status="FINISHED" if self._complete else "KILLED")


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Only one process at a time opens a local file: MLflow makes its tables without a lock."""
    file = _sqlite_file(uri)
    if file is None:
        yield
        return
    with FileLock(f"{file}.lock", timeout=_LOCK_S):
        yield


def _sqlite_file(uri: str) -> str | None:
    """The path of a local database; None for a server."""
    path = re.match(r"sqlite(?:\+\w+)?:///([^?]+)", uri)
    return None if path is None else path[1]


def _legal(name: str) -> str:
    """A name with the characters that MLflow takes."""
    return _ILLEGAL.sub("_", name)
