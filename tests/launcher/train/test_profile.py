"""Traces of chosen steps: one file per rank with names of phases, and no speed from these steps."""

import gzip
import json
import os
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from headway.launcher.run.records import read_run, step_seconds
from headway.launcher.run.run_dir import RunDir, read_mapping
from headway.launcher.spec.tracking import TrackingConfig
from headway.launcher.train.profile import Profile, trace_file
from headway.parallel.engine import StepStats
from headway.parallel.phases import BACKWARD, FORWARD, OPTIMIZER, HostClock, NamedClock

STATS = StepStats(
    loss=2.0, aux_loss=0.0, grad_norm=1.0, targets=8, forward_s=0.1, backward_s=0.1, optimizer_s=0.1, skipped=False
)


def ranges(file: Path) -> Counter[str]:
    """Names of the ranges that were opened by name, and how often."""
    trace = json.loads(gzip.decompress(file.read_bytes()))
    return Counter(event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation")


def traces(run: RunDir) -> list[str]:
    return sorted(file.name for file in run.traces.iterdir())


def trained(run: RunDir) -> dict[int, dict[str, Any]]:
    return {record["step"]: record for record in run.read_metrics() if record["kind"] == "train"}


def test_traces_have_the_phases_and_their_steps_have_no_speed_also_after_a_kill(headway):
    run = RunDir(headway.folder / "runs" / "tiny")
    process = headway.start("tracking.profile_steps=[2, 38-39]")
    headway.wait_for(lambda: run.metrics.exists() and len(trained(run)) >= 8, process)
    os.kill(int((run.logs / "rank-0.pid").read_text()), signal.SIGKILL)
    process.communicate(timeout=60)
    assert traces(run) == ["step-2.rank-0.json.gz"]
    done = headway.train("tracking.profile_steps=[2, 38-39]")
    assert done.returncode == 0, done.stderr
    assert traces(run) == [f"step-{step}.rank-0.json.gz" for step in (2, 38, 39)]
    for step in (2, 38, 39):
        found = ranges(trace_file(run, step, 0))
        for name, count in {
            f"step {step}": 1,
            "data": 1,
            "forward": 4,
            "backward": 4,
            "optimizer": 4,
            "losses": 1,
        }.items():
            assert found[name] == count, name
    records = trained(run)
    assert [step for step, record in records.items() if "profiled" in record] == [2, 38, 39]
    others = [record["step_s"] for step, record in records.items() if step not in (2, 38, 39)]
    assert read_run(run.path).step_s.tolist() == others
    assert len(read_run(run.path).train) == 40
    assert sorted(step_seconds(run, after=2)) == sorted(others[1:])
    assert read_mapping(run.summary)["tokens_per_s_median"] == pytest.approx(
        256 / sorted(others[1:])[len(others[1:]) // 2]
    )
    assert " profiled eta " in done.stdout


def test_every_rank_writes_a_trace_and_the_losses_do_not_change(headway):
    common = ("train.tokens=1280", "launch.processes=2", "tracking.tensorboard=false")
    assert headway.train("run_dir=plain", *common).returncode == 0
    assert headway.train("run_dir=traced", *common, "tracking.profile_steps=[3]").returncode == 0
    plain, traced = (RunDir(headway.folder / name) for name in ("plain", "traced"))
    assert not plain.traces.exists()
    assert traces(traced) == ["step-3.rank-0.json.gz", "step-3.rank-1.json.gz"]
    for rank in (0, 1):
        assert {"step 3", "data", "forward", "backward", "optimizer"} <= ranges(trace_file(traced, 3, rank)).keys()
    assert [r["loss"] for r in trained(plain).values()] == [r["loss"] for r in trained(traced).values()]


def session(tmp_path: Path) -> Any:
    engine = SimpleNamespace(name_phases=lambda named: None)
    layout = SimpleNamespace(device=torch.device("cpu"), rank=0)
    spec = SimpleNamespace(tracking=TrackingConfig(profile_steps=(1,)))
    return SimpleNamespace(run=RunDir(tmp_path), spec=spec, step=0, engine=engine, layout=layout, step_times=[0.1])


def test_a_trace_that_cannot_be_written_does_not_end_the_training(tmp_path, capsys):
    s, hook, record = session(tmp_path), Profile(), {}
    s.run.traces.write_text("no folder")
    hook.on_start(s)
    hook.before_data(s)
    hook.before_step(s)
    s.step = 1
    hook.after_step(cast(Any, s), STATS, record)
    assert record == {"profiled": True} and s.step_times == []
    assert "NO TRACE of step 1: " in capsys.readouterr().out


def test_a_step_that_fails_leaves_no_profiler_behind(tmp_path):
    s, hook = session(tmp_path), Profile()
    hook.on_start(s)
    hook.before_data(s)
    hook.on_close(s)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):  # raises while another one runs
        pass
    assert not s.run.traces.exists()


def test_named_phases_have_the_times_of_the_clock_within():
    clock = NamedClock(HostClock(), passes=2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        clock.start()
        for _ in range(2):
            for phase in (FORWARD, BACKWARD, OPTIMIZER):
                torch.ones(3).sum()
                clock.end(phase)
        seconds = clock.read()
    assert all(value > 0 for value in seconds)
    names = Counter(event.name for event in found.events() or [])
    wanted = {"forward": 2, "backward": 2, "optimizer": 2, "losses": 1}
    assert {name: names[name] for name in wanted} == wanted
