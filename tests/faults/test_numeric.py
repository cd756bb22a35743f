"""A NaN or Inf loss changes nothing on any rank and is counted. A loss spike is detected."""

import errno
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from run_folders import records
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from headway.launcher.base.errors import HeadwayError
from headway.launcher.train.guard import Guard, dump
from headway.parallel.config import GuardConfig
from headway.parallel.engine import StepStats
from headway.parallel.manifest import Checkpoint, file_hash, own_hash, read_manifest
from headway.parallel.tensors.reader import Tensors

# A validation after every step shows whether the parameters have changed.
COMMON = ("train.tokens=1536", "train.validate_every_tokens=256", "tracking.tensorboard=false")
COMMON += ("schedule.warmup_tokens=1280", "schedule.decay_fraction=0.1")  # five steps
ALONE, TWO, FOUR = "launch.processes=1", "launch.processes=2", "launch.processes=4"
# Covered by `make test-all`: other cases with the same layout or the same precision are in `make test`.
more = partial(pytest.param, marks=pytest.mark.slow)
TP, PP, CP, BF16 = "parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2", "parallel.precision=bf16"


def saved(run):
    return sorted((run / "checkpoints").glob("step-*"))


def state(run, step):
    path = saved(run)[step - 1]
    tensors = Tensors(Checkpoint(path=path, step=step, manifest=read_manifest(path)))
    return {name: (t.shape, t.numpy().tobytes()) for name, t in tensors.items()}


def poisoned(headway, fault, *overrides):
    return headway.train(*COMMON, *overrides, env={**headway.environment(), "HEADWAY_FAULT": fault})


@pytest.fixture(scope="module")
def alone(headway_once):
    """Losses of one process that skipped step 3. With 4 passes per step, pass 10 is the second of step 3."""
    done = poisoned(headway_once, "step:loss#10:nan", ALONE, "run_dir=alone")
    assert done.returncode == 0, done.stderr
    return [r["loss"] for r in records(headway_once.folder / "alone")]


@pytest.mark.parametrize(
    ("fault", "overrides"),
    [
        # 8 sequences a step: passes of a rank are 2 where 2 ranks share them by data, 4 elsewhere
        ("step:loss@1#6:nan", [TWO]),
        more("step:loss@0#6:inf", [TWO, "parallel.zero=2"]),
        ("step:loss@1#6:nan", [TWO, "parallel.zero=3"]),
        more("step:loss@1#6:nan", [TWO, BF16]),
        more("step:loss@0#5:inf", [TWO, BF16, "parallel.zero=3"]),
        more("step:loss@1#6:inf", [TWO, BF16, "parallel.zero=2"]),
        more("step:loss@1#10:nan", [TWO, TP]),
        ("step:loss@0#10:nan", [TWO, TP, BF16]),
        more("step:loss@1#10:inf", [TWO, CP, BF16]),
        more("step:loss@0#10:nan", [TWO, CP]),
        more("step:loss@1#10:nan", [TWO, PP]),
        ("step:loss@1#10:inf", [TWO, PP, BF16]),
        more("step:loss@3#10:nan", [FOUR, TP, PP]),
        more("step:loss@2#6:nan", [FOUR, PP, BF16]),
        # one parameter's gradient on one rank, with finite losses
        more("step:gradient@1#6:inf", [TWO]),
        more("step:gradient@0#5:nan", [TWO, BF16]),
        ("step:gradient@1#5:inf", [TWO, "parallel.zero=2"]),
        more("step:gradient@0#6:nan", [TWO, "parallel.zero=2", BF16]),
        more("step:gradient@0#6:inf", [TWO, "parallel.zero=3"]),
        ("step:gradient@0#6:nan", [TWO, "parallel.zero=3", BF16]),
        more("step:gradient@0#10:inf", [TWO, CP, BF16]),
        ("step:gradient@1#10:inf", [TWO, TP]),
        more("step:gradient@0#10:nan", [TWO, TP, BF16]),
        more("step:gradient@0#10:inf", [TWO, PP]),
        ("step:gradient@1#10:nan", [TWO, PP, BF16]),
        ("step:gradient@1#10:nan", [TWO, CP]),
        ("step:gradient@2#10:inf", [FOUR, TP, PP]),
        more("step:gradient@1#6:inf", [FOUR, PP, BF16]),
    ],
    ids=str,
)
def test_a_nan_or_inf_step_on_one_rank_changes_nothing_on_any_rank(headway, alone, fault, overrides):
    # F17
    done = poisoned(headway, fault, *overrides, "run_dir=run", "checkpoint.every_tokens=256", "checkpoint.keep=6")
    assert done.returncode == 0, done.stderr
    run = headway.folder / "run"
    steps, validations = records(run), records(run, "validation")
    assert [r["skipped"] for r in steps] == [False, False, True, False, False, False]
    assert "step 3 SKIPPED on all ranks" in done.stdout and records(run, "skipped")[0]["in_a_row"] == 1
    assert [r["step"] for r in validations] == [1, 2, 3, 4, 5, 6]
    losses = [r["loss"] for r in validations]
    assert losses[2] == losses[1] != losses[3] and all(map(math.isfinite, losses))
    tolerance = 2e-2 if BF16 in overrides else 1e-5  # bf16 rounding changes near ties of the routers
    for found, expected in zip([r["loss"] for r in steps], alone, strict=True):
        assert math.isnan(expected) or math.isclose(found, expected, rel_tol=tolerance)
    dump = json.loads((run / "skipped" / "step-0000000003.json").read_text())
    assert dump["batch_hash"] == steps[2]["batch_hash"] and len(dump["ranks"]) == int(overrides[0][-1])
    sums = [x for rank in dump["ranks"] for x in rank["micro_batch_loss_sums"]]
    assert any(not isinstance(x, float) for x in sums) == ("step:loss" in fault)
    readers = {rank["data_rank"]: rank["sequences"] for rank in dump["ranks"]}
    assert sum(map(len, readers.values())) == 8
    assert all(rank["parameters_not_finite"] == [] for rank in dump["ranks"])
    # The schedule depends on tokens, including skipped steps.
    assert [r["lr"] for r in steps[:5]] == pytest.approx([6e-4, 12e-4, 18e-4, 24e-4, 30e-4])
    # masters, moments and router biases, bit for bit, and Adam's counter
    before, after, then = (state(run, step) for step in (2, 3, 4))
    assert before == after and before.keys() == then.keys() and before != then
    assert {name.partition("/")[0] for name in before} >= {"param", "exp_avg", "exp_avg_sq"}
    manifests = [json.loads((s / "MANIFEST.json").read_text())["manifest"] for s in saved(run)]
    assert [m["state"]["applied_steps"] for m in manifests] == [1, 2, 2, 3, 4, 5]


def test_nan_weights_are_named_and_end_the_run(headway):
    # F17: NaN weights, which another program may have written
    common = (*COMMON, "run_dir=run", "checkpoint.every_tokens=512", "guard.max_skipped=2")
    assert headway.train(*common).returncode == 0
    run = headway.folder / "run"
    (run / "summary.json").unlink()
    newest, middle = saved(run)[-1], saved(run)[-2]
    shutil.rmtree(newest)
    (path,) = middle.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    name = next(key for key in tensors if key.startswith("param/blocks.0.") and tensors[key].dim() == 2)
    tensors[name][0, 0] = math.nan
    save_file(tensors, path, metadata=about)
    manifest = json.loads((middle / "MANIFEST.json").read_text())["manifest"]
    manifest["files"][path.name] |= {"bytes": path.stat().st_size, "xxh3_128": file_hash(path)}
    sealed = {"xxh3_128": own_hash(manifest), "manifest": manifest}
    (middle / "MANIFEST.json").write_text(json.dumps(sealed))
    done = headway.train(*common)
    assert done.returncode == 70 and "2 steps in a row" in done.stderr, done.stdout + done.stderr
    dumps = sorted((run / "skipped").iterdir())
    assert json.loads(dumps[0].read_text())["ranks"][0]["parameters_not_finite"] == [name.removeprefix("param/")]


def test_too_many_skipped_steps_in_a_row_end_the_run_and_a_resume_keeps_the_count(headway):
    faults = ";".join(f"step:loss#{n}:nan" for n in (9, 13))  # steps 3 and 4
    done = poisoned(headway, faults, "run_dir=run", "guard.max_skipped=2", "checkpoint.every_tokens=256")
    assert done.returncode == 70 and "step 4: 2 steps in a row" in done.stderr and "guard.max_skipped" in done.stderr
    run = headway.folder / "run"
    assert len(list((run / "skipped").iterdir())) == 2
    again = headway.train(*COMMON, "run_dir=run", "guard.max_skipped=2", "checkpoint.every_tokens=256")
    assert again.returncode == 0, again.stderr  # resumes after step 3 without the injected fault
    assert [r["skipped"] for r in records(run)] == [False, False, True, False, False, False]


@pytest.mark.parametrize("overrides", [[TWO], [TWO, PP, BF16], more([TWO, "parallel.zero=3"])], ids=str)
def test_a_spike_is_skipped_under_that_policy(headway, overrides):
    # F18. A window of 4 judges from the third step on; step 5 is 50 times itself on one rank.
    world = int(overrides[0][-1])
    last = world - 1
    nth = 4 * 4 + 1 if PP in overrides else 4 * 2 + 1
    policy = ("guard.spike=skip", "guard.window=4")
    done = poisoned(headway, f"step:loss@{last}#{nth}:times=50", *overrides, *policy, "run_dir=run")
    assert done.returncode == 0, done.stderr
    run = headway.folder / "run"
    assert [r["skipped"] for r in records(run)] == [False] * 4 + [True, False]
    assert "step 5 LOSS SPIKE" in done.stdout and "the step was not applied" in done.stdout
    losses = [r["loss"] for r in records(run, "validation")]
    assert losses[4] == losses[3] != losses[5]


@pytest.mark.parametrize(("policy", "status", "said"), [("warn", 0, "the step was applied"), ("stop", 70, "before it")])
def test_a_spike_is_reported_or_ends_the_run(headway, policy, status, said):
    done = poisoned(headway, "step:loss#17:times=50", f"guard.spike={policy}", "guard.window=4", "run_dir=run")
    assert done.returncode == status and said in done.stdout + done.stderr
    assert "step 5 LOSS SPIKE" in done.stdout


# ---------------------------------------------------------------- detection of spikes


class OneRank:
    """What a dump asks of layout, loader and engine."""

    rank, dp_rank, is_main = 0, 0, True

    def gather_json(self, value):
        return [value]

    def sequences(self, step):
        return [step]

    def last_losses(self):
        return [math.nan]

    def not_finite(self):
        return []


def test_a_dump_that_finds_no_space_is_reported_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def full(*_args, **_named):
        raise OSError(errno.ENOSPC, "No space left on device")

    one: Any = OneRank()
    folder, of_run = tmp_path / "skipped", (one, one, one)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", full)
        dump(folder, 3, "hash", *of_run)
    assert not folder.exists()
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        dump(folder, 4, "hash", *of_run)
    assert list(folder.glob("step-*")) == []  # no half of a file
    dump(folder, 5, "hash", *of_run)
    said = [line.partition(" in ")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["NO DUMP of the skipped step 3", "NO DUMP of the skipped step 4"]
    assert json.loads((folder / "step-0000000005.json").read_text())["ranks"][0]["sequences"] == [4]


class Silent:
    def __init__(self):
        self.said = []

    def event(self, record, text):
        self.said.append(record["kind"])


def stats(loss, *, skipped=False, norm=1.0):
    times = {"forward_s": None, "backward_s": None, "optimizer_s": None}
    return StepStats(loss=loss, aux_loss=0.0, grad_norm=norm, targets=1, skipped=skipped, **times)


def test_the_limit_depends_on_median_and_spread_and_noise_is_not_a_spike():
    guard, tracker = Guard(GuardConfig(window=8, deviations=5.0)), Silent()
    assert guard.limit() == math.inf
    for step, loss in enumerate((3.0, 3.2, 2.8, 3.1, 2.9, 3.0, 3.3, 2.7)):
        guard.after_step(step, stats(loss), tracker, saved_step=0)
    # median 3.0, absolute deviations 0 .2 .2 .1 .1 0 .3 .3, their median 0.15
    assert guard.limit() == pytest.approx(3.0 + 5 * 1.4826 * 0.15)
    assert guard.allows(4.1) and not guard.allows(4.2) and guard.allows(math.nan)  # NaN is not a spike
    assert tracker.said == []


def test_with_nearly_constant_losses_a_small_increase_is_not_a_spike():
    guard = Guard(GuardConfig(window=4))
    for step in range(4):
        guard.after_step(step, stats(2.0), Silent(), saved_step=0)
    assert guard.allows(2.09) and not guard.allows(2.11)


def test_the_state_of_the_guard_is_saved_in_a_checkpoint():
    one, other = Guard(GuardConfig(window=4)), Guard(GuardConfig(window=4))
    for step, loss in enumerate((1.0, 1.1, 0.1 + 0.2, math.nan, 1.2)):
        one.after_step(step, stats(loss, skipped=math.isnan(loss)), Silent(), saved_step=0)
    other.restore(json.loads(json.dumps(one.state())))
    assert other.limit() == one.limit() and other.state() == one.state() and other.skipped == 1
    fresh = Guard(GuardConfig())
    fresh.restore({})
    assert fresh.skipped == 0


def test_a_spike_that_is_not_applied_is_no_step_without_a_finite_number():
    guard, tracker = Guard(GuardConfig(window=4, spike="skip", max_skipped=2)), Silent()
    for step in range(4):
        guard.after_step(step, stats(2.0), tracker, saved_step=0)
    for step, loss in enumerate((math.nan, 4.0, math.nan), start=4):  # one in a row each
        guard.after_step(step, stats(loss, skipped=True), tracker, saved_step=0)
    assert tracker.said == ["skipped", "spike", "skipped"] and (guard.skipped, guard.in_a_row) == (3, 1)
    with pytest.raises(HeadwayError, match="2 steps in a row"):
        guard.after_step(7, stats(math.nan, skipped=True), tracker, saved_step=0)


def test_an_applied_nan_or_inf_step_ends_the_run():
    with pytest.raises(HeadwayError, match="was applied"):
        Guard(GuardConfig()).after_step(7, stats(math.nan), Silent(), saved_step=5)
