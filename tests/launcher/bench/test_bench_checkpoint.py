"""`headway bench checkpoint`: time that training waits, and steps during the write compared with those of the round."""

import json
import statistics

import pytest
import torch

from headway.launcher.base.errors import SpecError
from headway.launcher.bench import checkpoint
from headway.launcher.bench.checkpoint import QUIET_STEPS, bench_checkpoint, summary


@pytest.fixture(scope="module")
def measured(headway_once):
    done = headway_once.run(
        *("bench", "checkpoint", str(headway_once.spec), "--rounds", "3", "--out", "c.json", "launch.device=cpu")
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((headway_once.folder / "c.json").read_text()), headway_once.folder


def test_every_save_is_paired_with_the_steps_of_its_round(measured):
    _, result, _ = measured
    rounds = result["raw_rounds"]
    assert len(rounds) == 3 and result["parameters"] > 0 and result["bytes"] > 3 * 4 * result["parameters"]
    ratios = []
    for r in rounds:
        quiet = statistics.median(r["quiet_s"])
        assert len(r["quiet_s"]) == 2 * QUIET_STEPS and r["beside_s"] and r["stall_s"] > 0 and r["write_s"] > 0
        assert r["cost_s"] == pytest.approx(r["stall_s"] + sum(s - quiet for s in r["beside_s"]))
        ratios += [s / quiet for s in r["beside_s"]]
    assert result["step_beside_over_step"]["median"] == pytest.approx(statistics.median(ratios))
    assert result["step_s"]["n"] == 3 * 2 * QUIET_STEPS
    # A quarter of an hour, the default of checkpoint.every_minutes.
    stall = statistics.median(r["stall_s"] for r in rounds)
    assert result["stall_share_at_default_interval"] == pytest.approx(stall / 900)
    # Beside a plain copy of as many bytes.
    copies, gb = [r["copy_s"] for r in rounds], result["bytes"] / 1e9
    assert min(copies) > 0
    assert result["stall_s_per_gb"]["median"] == pytest.approx(stall / gb)
    assert result["copy_s_per_gb"]["median"] == pytest.approx(statistics.median(copies) / gb)
    times = [r["stall_s"] / c for r, c in zip(rounds, copies, strict=True)]
    assert result["stall_over_copy"]["median"] == pytest.approx(statistics.median(times))
    # Other safety measures: shares of the interval, of a step, of a hundred steps.
    hashing, beats, replicas = (
        statistics.median(r[name] for r in rounds) for name in ("hash_s", "beats_s", "replicas_s")
    )
    step = result["step_s"]["median"]
    assert min(hashing, beats, replicas) > 0
    assert result["hash_share_at_default_interval"] == pytest.approx(hashing / 900)
    assert result["beats_share"] == pytest.approx(beats / step)
    assert result["replicas_share_at_default_interval"] == pytest.approx(replicas / (100 * step))


def test_the_summary_is_printed_and_no_file_is_left(measured):
    said, result, folder = measured
    assert summary(result) in said and "written to c.json" in said
    assert sorted(p.name for p in folder.iterdir()) == ["c.json", "tiny.yaml"]


def test_a_plain_copy_takes_turns_where_a_checkpoint_is_larger_than_its_memory(monkeypatch):
    monkeypatch.setattr(checkpoint, "COPY_BLOCK", 1000)
    plain, copied = checkpoint._PlainCopy(), []
    assert plain.seconds(400) > 0 and [m.numel() for m in plain._memory] == [400, 400]
    monkeypatch.setattr(torch.Tensor, "copy_", lambda target, source: copied.append(len(source)))
    assert plain.seconds(2500) > 0 and [m.numel() for m in plain._memory] == [1000, 1000]
    assert copied == [1000, 1000, 500]


def test_invalid_settings_are_refused(headway_once):
    with pytest.raises(SpecError, match="use at least 2"):
        bench_checkpoint(headway_once.spec, [], rounds=1, out=None)
    with pytest.raises(SpecError, match="one process"):
        bench_checkpoint(headway_once.spec, ["launch.processes=2"], rounds=2, out=None)
