"""Trackers get the records of metrics.jsonl, and neither stop nor slow the training when they fail."""

import importlib.util
import threading
import time
from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from memory_sink import MemorySink

from headway.launcher.base.errors import HeadwayError, SpecError
from headway.launcher.board.trackers import background, mlflow, sending
from headway.launcher.board.trackers.background import Background
from headway.launcher.board.trackers.mlflow import Mlflow
from headway.launcher.board.trackers.opening import check_installed, earlier_records, without_secrets
from headway.launcher.run.run_dir import RunDir, write_json
from headway.launcher.spec.tracking import MlflowConfig, TrackingConfig, WandbConfig
from headway.launcher.train.tracking import Tracker


def record(step: int, loss: float = 2.5) -> dict:
    timing = {"step_s": 0.1, "data_s": 0.01, "tokens_per_s": 80.0}
    values = {"loss": loss, "aux_loss": 0.0, "grad_norm": 1.0, "lr": 0.1}
    return {"kind": "train", "step": step, "tokens": 8 * step, **values, **timing}


def tracker(run: RunDir, *sinks) -> Tracker:
    run.path.mkdir(exist_ok=True)
    return Tracker(run, main=True, tensorboard=False, log_every_steps=100, total_steps=100, start_step=0, sinks=sinks)


@pytest.fixture
def quick(monkeypatch):
    """Attempts follow each other without waiting."""
    monkeypatch.setattr(background, "PAUSE_S", 0.0)
    monkeypatch.setattr(background, "LONGEST_WAIT_S", 0.0)


class Said(list):
    def __call__(self, text: str) -> None:
        self.append(text)


def test_a_sink_gets_the_records_of_the_file_and_the_summary(tmp_path):
    run, sink, said = RunDir(tmp_path / "run"), MemorySink(), Said()
    track = tracker(run, Background("Memory", lambda: sink, say=said))
    for step in range(1, 30):
        track.train(record(step, loss=1 / step), seconds_left=None)
        if step % 10 == 0:
            track.validation({"kind": "validation", "step": step, "loss": 2.0, "accuracy": 0.5, "targets": 8})
            track.event({"kind": "resume", "step": step}, "resumed")
    track.finish({"complete": True, "steps": 29})
    track.close()
    assert sink.records == list(run.read_metrics()) and len(sink.records) == 33
    assert sink.points["train/loss"] == {step: 1 / step for step in range(1, 30)}
    assert set(sink.points["val/loss"]) == {10, 20}
    assert (sink.summary, sink.closed, said) == ({"complete": True, "steps": 29}, 1, [])


def test_a_sink_without_a_thread_that_fails_is_left_out(tmp_path, capsys):
    run, bad, good = RunDir(tmp_path / "run"), MemorySink(failures=[OSError("no room")]), MemorySink()
    track = tracker(run, bad, good)
    for step in (1, 2, 3):
        track.train(record(step), seconds_left=None)
    track.close()
    assert len(good.records) == len(list(run.read_metrics())) == 3 and bad.records == []
    assert capsys.readouterr().out.count("MEMORY IS NOT WRITTEN ANY MORE: no room") == 1


def test_training_never_waits_for_a_sink_that_hangs(tmp_path):
    run, sink, said = RunDir(tmp_path / "run"), MemorySink(), Said()
    sink.gate.clear()
    track = tracker(run, Background("Memory", lambda: sink, say=said, close_s=0.2))
    for step in range(1, 50):
        track.train(record(step), seconds_left=None)
        track.flush()
    assert sink.entered.wait(60)
    assert sink.calls == []  # every call above returned while the sink hung
    track.close()
    assert len(list(run.read_metrics())) == 49
    assert len(said) == 1 and said[0].startswith("MEMORY IS NOT COMPLETE: ")
    sink.gate.set()


def test_records_that_wait_are_bounded_and_the_oldest_are_dropped(quick):
    sink, said = MemorySink(), Said()
    sink.gate.clear()
    board = Background("Memory", lambda: sink, say=said, most=10)
    board.write([record(1)])
    assert sink.entered.wait(60)
    for step in range(2, 101):
        board.write([record(step)])
    sink.gate.set()
    board.close()
    assert [r["step"] for r in sink.records] == [1, *range(91, 101)]
    assert said == ["MEMORY IS NOT COMPLETE: 89 records were not written; metrics.jsonl has every record"]


def test_a_service_that_comes_back_gets_everything_in_order(quick):
    sink, said, attempts = MemorySink(failures=[OSError("down")] * 3), Said(), [RuntimeError("no address")] * 2

    def connect() -> MemorySink:
        if attempts:
            raise attempts.pop()
        return sink

    board = Background("Memory", connect, say=said)
    for step in range(1, 500):
        board.write([record(step)])
    deadline = time.monotonic() + 60
    while len(sink.records) < 499 and time.monotonic() < deadline:
        time.sleep(0.01)
    board.close()
    assert [r["step"] for r in sink.records] == list(range(1, 500)) and max(sink.calls) > 1
    assert said == [
        "MEMORY FAILS: no address; training goes on, and it is tried again. metrics.jsonl has every record",
        "Memory is written again",
    ]


def test_a_record_that_a_service_does_not_take_stops_no_other(quick):
    sink, said = MemorySink(), Said()
    board = Background("Memory", lambda: sink, say=said)
    for step in (1, 2, 3):
        board.write([record(step) if step != 2 else {"kind": "train", "step": 2}])
        deadline = time.monotonic() + 60
        while len(sink.calls) < step - (step > 2) and step != 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        while step == 2 and not said and time.monotonic() < deadline:
            time.sleep(0.01)
    board.close()
    assert list(sink.points["train/loss"]) == [1, 3] and sink.closed == 1
    assert [text.partition(":")[0] for text in said] == ["MEMORY DOES NOT TAKE 1 RECORDS", "MEMORY IS NOT COMPLETE"]


def test_a_service_that_is_never_reached_ends_with_the_process(quick):
    said = Said()

    def connect() -> MemorySink:
        raise ConnectionError("refused")

    board = Background("Memory", connect, say=said)
    board.write([record(1), record(2)])
    deadline = time.monotonic() + 60
    while board._failures < 1100 and time.monotonic() < deadline:  # more than a power of two has room for
        time.sleep(0.01)
    board.close()
    assert not board._thread.is_alive()
    assert said[-1] == "MEMORY IS NOT COMPLETE: 2 records were not written; metrics.jsonl has every record"


def test_no_message_has_a_value_of_a_secret_variable(quick, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2-and-more")
    said, failed = Said(), threading.Event()

    def connect() -> MemorySink:
        failed.set()
        raise ConnectionError("https://me:hunter2-and-more@host refused")

    board = Background("MLflow", connect, say=said, hide=without_secrets)
    board.write([record(1)])
    assert failed.wait(60)
    board.close()
    assert said[0].startswith("MLFLOW FAILS: https://me:...@host refused")


@pytest.mark.parametrize("service", [WandbConfig(), MlflowConfig(uri="sqlite:///x.db")], ids=["wandb", "mlflow"])
def test_a_missing_package_is_named_before_the_start(service, monkeypatch):
    tracking = TrackingConfig(**{service.extra: service})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_installed(tracking)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_installed(TrackingConfig())
    with pytest.raises(SpecError, match=rf"tracking\.{service.extra}: the package \w+ is not installed; run `pip inst"):
        check_installed(tracking)


@pytest.mark.parametrize(
    ("shown", "sent"), [(-1, range(1, 11)), (3, range(4, 11)), (6, range(7, 11)), (8, range(7, 11))]
)
def test_a_resume_first_sends_what_earlier_starts_did_not(tmp_path, quick, shown, sent):
    run, said = RunDir(tmp_path / "run"), Said()
    first = tracker(run)
    for step in range(1, 10):
        first.train(record(step, loss=9.0), seconds_left=None)
    first.close()
    run.cut_metrics(last_step=6)
    sink = MemorySink(shown=shown, failures=[OSError("down")])
    board = Background("Memory", lambda: sink, say=said, earlier=partial(earlier_records, run, 6))
    second = tracker(run, board)
    for step in range(7, 11):
        second.train(record(step), seconds_left=None)
    deadline = time.monotonic() + 60
    while len(sink.records) < len(sent) and time.monotonic() < deadline:
        time.sleep(0.01)
    second.close()
    assert list(sink.points["train/loss"]) == list(sent)
    assert {step: loss for step, loss in sink.points["train/loss"].items() if step <= 6} == dict.fromkeys(
        [step for step in sent if step <= 6], 9.0
    )
    assert not any("NOT COMPLETE" in text for text in said)


class MlflowServer:
    """A server of MLflow in memory, with one run, and the client for it."""

    def __init__(self) -> None:
        self.points: dict[str, dict[int, float]] = defaultdict(dict)
        self.runs = 0

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="0")

    def search_runs(self, *_: Any, **__: Any) -> list[Any]:
        return [self.get_run("1")] if self.runs else []

    def create_run(self, *_: Any, **__: Any) -> Any:
        self.runs += 1
        return self.get_run("1")

    def get_run(self, run_id: str) -> Any:
        latest = {key: points[max(points)] for key, points in self.points.items()}
        info = SimpleNamespace(run_id=run_id, lifecycle_stage="active")
        return SimpleNamespace(info=info, data=SimpleNamespace(metrics=latest, params={}))

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [SimpleNamespace(step=step) for step in self.points[key]]

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        for metric in metrics:
            self.points[metric.key].setdefault(metric.step, metric.value)

    def update_run(self, *_: Any, **__: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Opens the tracker of one run on a server, as each start of the run does."""
    run, found = RunDir(tmp_path / "run"), MlflowServer()
    run.path.mkdir()
    write_json(run.spec, {"train": {"global_batch": 2}, "data": {"seq_len": 4}})
    write_json(run.id, "0123456789abcdef")
    parts = {
        "mlflow": SimpleNamespace(MlflowClient=lambda tracking_uri: found),
        "mlflow.entities": SimpleNamespace(
            Metric=lambda key, value, time_ms, step: SimpleNamespace(key=key, value=value, step=step),
            Param=lambda key, value: (key, value),
        ),
        "mlflow.utils.time": SimpleNamespace(get_current_time_millis=lambda: 0),
    }
    monkeypatch.setattr(mlflow, "import_module", parts.__getitem__)
    return SimpleNamespace(
        points=found.points, open=lambda: Mlflow(run, MlflowConfig(uri="https://mlflow.example"), per_layer=False)
    )


def test_mlflow_gets_a_validation_whose_step_it_has_after_a_kill_in_between(server):
    validation = {"kind": "validation", "step": 3, "loss": 2.0, "accuracy": 0.5}
    server.open().write([record(step) for step in (1, 2, 3)])  # and is killed while it validates
    again = server.open()
    again.write([record(3, loss=9.0), validation, record(4)])
    assert list(server.points["train/loss"].items()) == [(1, 2.5), (2, 2.5), (3, 2.5), (4, 2.5)]
    assert dict(server.points["val/loss"]) == {3: 2.0}
    once_more = server.open()
    once_more.write([{**validation, "loss": 9.0}, {**validation, "step": 4}])
    assert dict(server.points["val/loss"]) == {3: 2.0, 4: 2.0} and once_more.shown == -1  # it has no checkpoints


def test_mlflow_gets_step_0_if_its_run_was_made_by_a_start_that_sent_nothing(server):
    server.open()
    again = server.open()
    assert again.shown == -1
    again.write([{"kind": "validation", "step": 0, "loss": 4.0, "accuracy": 0.0}])
    assert dict(server.points["val/loss"]) == {0: 4.0}


def test_what_a_complete_run_did_not_send_is_sent_later(tmp_path, monkeypatch, capsys):
    run, other, sink = RunDir(tmp_path / "run"), RunDir(tmp_path / "other"), MemorySink(shown=3)
    for one in (run, other):
        written = tracker(one)
        for step in range(1, 401):
            written.train(record(step), seconds_left=None)
        written.close()
    write_json(run.summary, {"complete": True, "steps": 400})
    tracking = TrackingConfig(mlflow=MlflowConfig(uri="https://mlflow.example"))
    monkeypatch.setattr(sending, "stored_spec", lambda run: SimpleNamespace(tracking=tracking))
    monkeypatch.setattr(sending, "check_installed", lambda tracking: None)
    monkeypatch.setattr(sending, "connect", lambda run, service, per_layer: sink)
    sending.send_all([run, other])
    assert list(sink.points["train/loss"]) == list(range(4, 401))
    assert sink.summary["steps"] == 400 and sink.closed == 1
    said = capsys.readouterr().out
    assert "MLflow had the records up to step 3, and now has all" in said
    assert f"1 of 2 runs are not complete, for example {other.path}" in said
    with pytest.raises(SpecError, match="--send: none of these runs is complete"):
        sending.send_all([other])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2-and-more")
    sink.failures.append(OSError("https://me:hunter2-and-more@host refused"))
    with pytest.raises(HeadwayError, match=r"MLflow fails: https://me:\.\.\.@host refused; the records stay"):
        sending.send_all([run])


@pytest.mark.parametrize(
    ("uri", "error", "says"),
    [
        ("sqlite:///a/m.db", "table `metrics` already exists", "a/m.db: its tables are half made .*Delete a/m.db if"),
        ("sqlite:////m.db?x=1", "no such column: runs.name", "^/m.db: its tables are half made"),
        ("sqlite:///m.db", "database is locked", "^.sqlite3.OperationalError. database is locked"),
        ("https://host", "no such table: runs", "^.sqlite3.OperationalError. no such table"),
    ],
)
def test_a_database_of_mlflow_that_is_half_made_says_what_to_do(tmp_path, monkeypatch, uri, error, says):
    def fails(*_: Any) -> None:
        raise ValueError(f"(sqlite3.OperationalError) {error}\n[SQL: ...]")

    monkeypatch.setattr(Mlflow, "_open", fails)
    monkeypatch.setattr(mlflow, "FileLock", lambda path, timeout: nullcontext())
    with pytest.raises((RuntimeError, ValueError), match=says):
        Mlflow(RunDir(tmp_path), MlflowConfig(uri=uri), per_layer=False)
