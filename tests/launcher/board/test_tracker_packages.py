"""W&B and MLflow themselves, offline: what they hold of a run that was killed and resumed. Skips without the extras."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from headway.launcher.board.scalars import scalars_of
from headway.launcher.board.trackers.background import Background
from headway.launcher.cli.main import main
from headway.launcher.run.run_dir import RunDir, read_mapping, write_json
from headway.launcher.spec.tracking import MlflowConfig, WandbConfig

KEY = "4f1c9a07e3b85d26fa0913c7be48d56201a9e37c"
PASSWORD = "correct-horse-battery"
BLOCK = 1 << 15


def killed_and_resumed(headway: Any, *arguments: str, **env: str) -> RunDir:
    """A run of 40 steps that was killed after at least 8 of them, and started again."""
    run = RunDir(headway.folder / "runs" / "tiny")
    environment = {**headway.environment(), **env}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        process = headway.start("tracking.tensorboard=false", *arguments)
        headway.wait_for(lambda: run.metrics.exists() and sum(1 for _ in run.read_metrics()) >= 12, process)
        os.kill(int((run.logs / "rank-0.pid").read_text()), signal.SIGKILL)
        process.communicate(timeout=120)
    done = headway.train("tracking.tensorboard=false", *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    for word in ("FAILS", "IS NOT", "DOES NOT"):
        assert word not in done.stdout, done.stdout
    return run


def losses(run: RunDir) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in run.read_metrics() if r["kind"] == "train"}


def files_with(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def wandb_records(file: Path) -> list[Any]:
    """The records of an offline file of W&B: a log as LevelDB writes it, in blocks, behind a header of 7 bytes."""
    record_class: Any = import_module("wandb.proto.wandb_internal_pb2").Record
    data, at, part, found = file.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:  # too short for the header of a record
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(record_class.FromString(part))
            part = b""
    return found


def ended_records(file: Path) -> list[Any]:
    """The same of a run that ended. Another process writes the file, some milliseconds after the run's own end."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = wandb_records(file) if file.stat().st_size else []
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.01)
    pytest.fail(f"{file} has no end")


def history_of(records: list[Any]) -> dict[int, dict[str, str]]:
    """Step -> scalars, as JSON."""
    rows = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    items = [{"/".join(i.nested_key) or i.key: i.value_json for i in row.item} for row in rows]
    return {int(row["_step"]): row for row in items}


def test_wandb_continues_one_run_offline_and_has_every_step(headway_alone):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    run = killed_and_resumed(headway_alone, "tracking.wandb={mode: offline, project: p, group: g}", WANDB_API_KEY=KEY)
    files = sorted(run.path.glob("wandb/offline-run-*/run-*.wandb"))
    last = history_of(ended_records(files[-1]))
    assert len(files) in (1, 2)  # one for each start that lived long enough
    shown: dict[int, float] = {}
    for file in files:
        records = wandb_records(file) if file.stat().st_size else []
        started = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        assert {(r.run_id, r.project, r.run_group) for r in started} <= {(run.run_id(), "p", "g")}
        history = history_of(records)
        shown |= {step: float(row["train/loss"]) for step, row in history.items() if "train/loss" in row}
    assert shown == pytest.approx(losses(run))  # also the steps that the first start could not send
    validations = {r["step"]: r["loss"] for r in run.read_metrics() if r["kind"] == "validation"}
    assert float(last[40]["val/loss"]) == pytest.approx(validations[40])
    assert read_mapping(run.path / "wandb.json")["id"] == run.run_id()
    assert files_with(run.path, KEY) == []
    assert main(["rm", str(run.path), "--yes"]) == 0 and not run.path.exists()


def test_mlflow_continues_one_run_and_has_every_step_once(headway_alone):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    uri = f"sqlite:///{headway_alone.folder}/mlflow.db"
    mlflow.MlflowClient(tracking_uri=uri).search_experiments()  # makes the tables, which a kill would leave half made
    run = killed_and_resumed(
        headway_alone, f"tracking.mlflow={{uri: '{uri}', experiment: e, group: g}}", MLFLOW_TRACKING_PASSWORD=PASSWORD
    )
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("e")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == read_mapping(run.path / "mlflow.json")["run_id"]
    assert (found.info.status, found.info.run_name) == ("FINISHED", "tiny")
    assert found.data.tags["headway.group"] == "g" and found.data.tags["headway.run_id"] == run.run_id()
    assert found.data.params["attention.type"] == "rgqa" and found.data.params["optimizer.lr"] == "0.003"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, 41))
    assert {point.step: point.value for point in history} == pytest.approx(losses(run))
    assert {point.step for point in client.get_metric_history(found.info.run_id, "val/loss")} == {10, 20, 30, 40}
    assert files_with(headway_alone.folder, PASSWORD) == []


def test_a_server_that_is_not_there_does_not_fail_the_run(headway_alone):
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    done = headway_alone.train(
        "train.tokens=2560",
        "tracking.tensorboard=false",
        "tracking.mlflow.uri=http://127.0.0.1:9",  # where nothing listens
        "launch.env={MLFLOW_HTTP_REQUEST_MAX_RETRIES: '0', MLFLOW_HTTP_REQUEST_TIMEOUT: '2'}",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("MLFLOW FAILS: ") == 1 and "MLFLOW IS NOT COMPLETE: " in done.stdout
    assert len(losses(RunDir(headway_alone.folder / "runs" / "tiny"))) == 10


def made_run(folder: Path) -> RunDir:
    run = RunDir(folder / "run")
    run.path.mkdir()
    spec = {"name": "x", "train": {"global_batch": 2}, "data": {"seq_len": 4}, "launch": {"env": {"NCCL_DEBUG": None}}}
    write_json(run.spec, spec)
    write_json(run.id, "0123456789abcdef")
    return run


def every_kind() -> list[dict[str, Any]]:
    """A record of every kind that is shown, with losses that are no numbers."""
    values = {"aux_loss": 0.0, "grad_norm": 1.0, "lr": 0.1, "step_s": 0.1, "data_s": 0.0, "tokens_per_s": 80.0}
    loss = [1.5, float("nan"), float("inf")]
    trained = [{"kind": "train", "step": n, "tokens": 8 * n, "loss": loss[n - 1], **values} for n in (1, 2, 3)]
    return [
        *trained,
        {"kind": "validation", "step": 2, "loss": 2.0, "accuracy": 0.5, "sets": {"a.b c-1": {"loss": 1.0}}},
        {"kind": "checkpoint", "step": 1, "stall_s": 0.1, "write_s": 0.2},  # ends after later steps
        {"kind": "checkpoint_failed", "step": 3},
        {"kind": "skipped", "step": 3, "total": 1},
        {"kind": "resume", "step": 3},
    ]


def test_mlflow_takes_every_scalar_of_every_record(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    from headway.launcher.board.trackers.mlflow import Mlflow

    run, uri, said = made_run(tmp_path), f"sqlite:///{tmp_path}/mlflow.db", []
    config = MlflowConfig(uri=uri)
    board = Background("MLflow", lambda: Mlflow(run, config, per_layer=False), say=said.append, close_s=120)
    board.write(every_kind())
    board.close()
    assert said == []
    found = mlflow.MlflowClient(tracking_uri=uri).get_run(read_mapping(run.path / "mlflow.json")["run_id"])
    wanted = {key for record in every_kind() for key in scalars_of(record, per_layer=False)}
    assert found.data.metrics.keys() == wanted and found.info.status == "KILLED"  # it did not finish
    again = Background("MLflow", lambda: Mlflow(run, config, per_layer=False), say=said.append, close_s=120)
    again.write([{**every_kind()[0], "step": step, "tokens": 8 * step} for step in (2, 3, 4, 5)])
    again.finish({"complete": True})
    again.close()
    client = mlflow.MlflowClient(tracking_uri=uri)
    assert said == [] and client.get_run(found.info.run_id).info.status == "FINISHED"
    assert [p.step for p in client.get_metric_history(found.info.run_id, "train/loss")] == [1, 2, 3, 4, 5]
    assert "launch.env.NCCL_DEBUG" not in found.data.params and found.data.params["train.global_batch"] == "2"


def test_mlflow_continues_a_run_whose_process_ended_before_it_kept_the_id(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    from headway.launcher.board.trackers import mlflow as tracker

    run, config = made_run(tmp_path), MlflowConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    client = mlflow.MlflowClient(tracking_uri=config.uri)
    client.create_run(client.create_experiment(config.experiment))  # of another run folder

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("_log_params", "write_json"):  # the two steps after the run was made
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(tracker.Mlflow if name == "_log_params" else tracker, name, end)
            tracker.Mlflow(run, config, per_layer=False)
        assert not (run.path / "mlflow.json").exists()
    tracker.Mlflow(run, config, per_layer=False).close()
    found = client.search_runs([client.get_experiment_by_name(config.experiment).experiment_id])
    (own,) = [one for one in found if one.data.tags.get("headway.run_id") == run.run_id()]
    assert len(found) == 2 and own.info.run_id == read_mapping(run.path / "mlflow.json")["run_id"]
    assert own.data.params["train.global_batch"] == "2"


def test_wandb_takes_every_scalar_of_every_record(tmp_path):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    from headway.launcher.board.trackers.wandb import Wandb

    run, said = made_run(tmp_path), []
    config = WandbConfig(mode="offline")
    board = Background("W&B", lambda: Wandb(run, config, per_layer=False), say=said.append, close_s=120)
    board.write(every_kind())
    board.finish({"final_validation_loss": 1.25, "complete": True})
    board.close()
    assert said == []
    (file,) = run.path.glob("wandb/offline-run-*/run-*.wandb")
    records = ended_records(file)
    keys = {key for row in history_of(records).values() for key in row if not key.startswith("_")}
    assert keys == {key for record in every_kind() for key in scalars_of(record, per_layer=False)}
    summaries = [r.summary for r in records if r.WhichOneof("record_type") == "summary"]
    updates = {u.key or "/".join(u.nested_key): u.value_json for s in summaries for u in s.update}
    assert updates["final_validation_loss"] == "1.25"
    (ended,) = [r.exit for r in records if r.WhichOneof("record_type") == "exit"]
    assert ended.exit_code == 0


def test_runs_that_start_at_once_share_a_new_file_of_mlflow(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    uri, code = (
        f"sqlite:///{tmp_path}/mlflow.db",
        (
            "import sys; from pathlib import Path; from headway.launcher.board.trackers.mlflow import Mlflow; "
            "from headway.launcher.run.run_dir import RunDir; from headway.launcher.spec.tracking import MlflowConfig; "
            "Mlflow(RunDir(Path(sys.argv[1])), MlflowConfig(uri=sys.argv[2]), per_layer=False).close()"
        ),
    )
    runs = []
    for name in "ab":
        (tmp_path / name).mkdir()
        runs.append(made_run(tmp_path / name))
        write_json(runs[-1].id, f"0123456789abcde{name}")
    started = [subprocess.Popen([sys.executable, "-P", "-c", code, str(run.path), uri]) for run in runs]
    assert [process.wait(timeout=200) for process in started] == [0, 0]
    client = mlflow.MlflowClient(tracking_uri=uri)
    (experiment,) = [found for found in client.search_experiments() if found.name == "headway"]
    assert len(client.search_runs([experiment.experiment_id])) == 2
