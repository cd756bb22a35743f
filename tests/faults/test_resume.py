"""A stopped run continues as if it had not been stopped: bit for bit in its layout, within rounding in others."""

import json
import os
import random
import signal
import time

import pytest
from run_folders import records, trajectory

# Four or two passes per step and rank, loader threads, a router with a bias that is state.
COMMON = ("train.micro_batch=1", "data.workers=2", "checkpoint.every_tokens=1280", "train.tokens=8960")
TP, PP, CP = "parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2"
BF16 = "parallel.precision=bf16"


def kill_a_rank(run, rank):
    os.kill(int((run / "logs" / f"rank-{rank}.pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        pytest.param(2, ["parallel.zero=2"], marks=pytest.mark.slow),  # ZeRO-3 and pipelines below cover more
        (2, ["parallel.zero=3", BF16]),
        pytest.param(2, [PP], marks=pytest.mark.slow),
        (2, [PP, "parallel.recompute=block"]),
        pytest.param(2, [PP, BF16], marks=pytest.mark.slow),
        pytest.param(2, [TP, "parallel.sequence_parallel=true", BF16], marks=pytest.mark.slow),
        pytest.param(2, [CP], marks=pytest.mark.slow),  # context ranks save as data ranks do
        pytest.param(4, [TP, PP, "parallel.recompute=block"], marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_run_killed_repeatedly_equals_the_uninterrupted_one_bit_for_bit(headway, processes, overrides):
    # F16: the second and third resume in one pass over the data; F1 in every engine.
    common = (*COMMON, *overrides, f"launch.processes={processes}")
    assert headway.train(*common, "run_dir=whole").returncode == 0
    run, chance = headway.folder / "killed", random.Random(processes)
    for _ in range(2):
        saved = len(records(run, "checkpoint")) + chance.randint(1, 3)
        process = headway.start(*common, "run_dir=killed")
        headway.wait_for(lambda saved=saved: len(records(run, "checkpoint")) >= saved, process)
        time.sleep(chance.uniform(0, 0.1))
        kill_a_rank(run, chance.randrange(processes))
        process.communicate(timeout=60)
        assert process.returncode not in (0, 64)
    done = headway.train(*common, "run_dir=killed")
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "summary.json").read_text())["resumes"] == 2
    assert trajectory(run) == trajectory(headway.folder / "whole")


LAYOUTS = {
    "one": (1, []),
    "dp2 zero 1": (2, []),
    "tp2": (2, [TP]),
    "dp2 zero 3": (2, ["parallel.zero=3"]),
    "pp2": (2, [PP]),
    "dp4 zero 2": (4, ["parallel.zero=2"]),
    "tp2 pp2": (4, [TP, PP]),
    "cp2": (2, [CP]),
    "tp2 dp2 zero 3": (4, [TP, "parallel.zero=3"]),
    "sp2": (2, [TP, "parallel.sequence_parallel=true"]),
    "pp2 dp2": (4, [PP]),
    "tp2 cp2": (4, [TP, CP]),
    "dp2 zero 2": (2, ["parallel.zero=2"]),
}
FEW = ("one", "dp2 zero 3", "pp2", "tp2 pp2", "cp2", "tp2")  # each kind of ranks, and both more and fewer ranks


@pytest.mark.parametrize("layouts", [FEW, pytest.param(tuple(LAYOUTS), marks=pytest.mark.slow)], ids=["few", "all"])
def test_a_run_that_changes_layouts_keeps_its_batches_and_losses(headway, layouts):
    # F13: five or twelve layout changes. Without a router, because rounding could change its choice at near ties.
    common = ("attention={type: gqa, heads: 4, kv_heads: 2, head_dim: 8}", "train.tokens=153600", "optimizer.lr=1e-4")
    common = (*common, "checkpoint.every_tokens=null")
    whole, run = headway.folder / "whole", headway.folder / "moved"
    assert headway.train(*common, "run_dir=whole").returncode == 0
    starts = []
    for processes, overrides in (LAYOUTS[name] for name in layouts):
        at = len(records(run))
        starts.append(at)
        process = headway.start(*common, *overrides, f"launch.processes={processes}", "run_dir=moved")
        headway.wait_for(lambda at=at: len(records(run)) >= at + 5, process)
        process.terminate()
        assert process.wait(timeout=60) == 75, process.communicate()
    pairs = list(zip(records(whole), records(run), strict=False))
    assert len(pairs) >= starts[-1] + 5 and len(records(run, "resume")) == len(layouts) - 1
    for one, moved in pairs:
        assert one["batch_hash"] == moved["batch_hash"] and one["step"] == moved["step"]
        assert moved["loss"] == pytest.approx(one["loss"], rel=1e-5), one["step"]
        assert moved["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4), one["step"]


def test_a_run_is_resumed_at_its_last_step_and_after_its_end(headway):
    # F16: with no step left, only the end of the run is completed; a finished run is not changed.
    assert headway.train("train.tokens=2560").returncode == 0
    run = headway.folder / "runs" / "tiny"
    before = trajectory(run)
    (run / "summary.json").unlink()
    again = headway.train("train.tokens=2560")
    assert again.returncode == 0 and "(step 10/10)" in again.stdout
    assert trajectory(run) == before and json.loads((run / "summary.json").read_text())["complete"]
    third = headway.train("train.tokens=2560")
    assert third.returncode == 0 and "already complete" in third.stdout
