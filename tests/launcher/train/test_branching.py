"""`init.run`: a run that continues another run's checkpoint under another end of the schedule."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from run_folders import records, steps_done, trajectory

from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.run.branching import hash_of, inherited_attempts
from headway.launcher.run.resolve import resolve
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.load import load_spec
from headway.launcher.train.initial import load_parent
from headway.parallel.config import CheckpointError
from headway.parallel.manifest import Checkpoint, read_manifest
from headway.parallel.tensors.reader import Tensors

# The parent of 40 steps never decays. A branch of 20 steps decays over its last 4, from step 17 on.
STABLE = ("schedule.decay_fraction=0", "checkpoint.keep=1", "checkpoint.keep_at_tokens=[2560,3900]")
SHORT = ("train.tokens=5120", "schedule.decay_fraction=0.2")


def checkpoints(run: Path) -> dict[int, Path]:
    return {int(path.name.removeprefix("step-")): path for path in sorted((run / "checkpoints").glob("step-*"))}


def tensors(run: Path, step: int) -> dict[str, str]:
    """Hash of each tensor file of a checkpoint: equal if all weights, moments and buffers are."""
    return {name: entry.xxh3_128 for name, entry in read_manifest(checkpoints(run)[step]).files.items()}


def resolved_card(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def state(run: Path, step: int) -> dict:
    """What a checkpoint holds besides tensors, without times: guard, counters, last validation."""
    left_out = ("train_s", "records")  # seconds, and the end of this run's own records
    return {key: value for key, value in read_manifest(checkpoints(run)[step]).state.items() if key not in left_out}


@pytest.fixture(scope="module")
def folder(headway_once):
    """`stable`, the parent, and `whole`, trained from its start under the schedule of the branches."""
    for overrides in ((*STABLE, "run_dir=stable"), (*SHORT, "run_dir=whole")):
        done = headway_once.train(*overrides)
        assert done.returncode == 0, done.stderr
    return headway_once.folder


@pytest.mark.parametrize("step", [10, 16])
def test_a_branch_before_the_decay_equals_a_run_trained_from_its_start(folder, headway_once, step):
    name = f"branch-{step}"
    done = headway_once.train(*SHORT, f"init.run=stable@{step}", f"run_dir={name}")
    assert done.returncode == 0, done.stderr
    run, whole = folder / name, folder / "whole"
    assert f"branched from stable/checkpoints/step-{step:010d} (step {step}/20)" in done.stdout
    assert f"branch     of stable after step {step}" in done.stdout and "note" not in done.stdout
    assert trajectory(run)[:20] == trajectory(whole)[:20] and len(records(run)) == 20
    assert records(run, "validation")[-1]["loss"] == records(whole, "validation")[-1]["loss"]
    assert tensors(run, 20) == tensors(whole, 20) and state(run, 20) == state(whole, 20)
    assert len(state(run, 20)["guard"]["losses"]) == 20
    assert records(run, "start") == records(whole, "start") and len(records(run, "heads")) == len(
        records(whole, "heads")
    )
    (event,) = records(run, "branch")
    assert event["step"] == step and event["path"] == "stable" and event["note"] is None
    assert event["run"] == json.loads((folder / "stable" / "run_id.json").read_text())
    stored = json.loads((run / "spec.json").read_text())
    assert stored["init"]["sha256"] == event["sha256"] == hash_of(checkpoints(folder / "stable")[step])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["resumes"] == 0
    assert resolved_card(run)["branch"]["sha256"] == event["sha256"]
    parent_s = records(folder / "stable")[step - 1]["train_s"]
    assert summary["train_s"] > parent_s == records(run)[step - 1]["train_s"]


def test_a_branch_drops_by_the_masks_of_a_run_trained_from_its_start(headway):
    dropped = "model.dropout=0.3"
    branch = (*SHORT, "init.run=parent@10", "run_dir=branch")
    for overrides in ((*STABLE, "run_dir=parent"), (*SHORT, "run_dir=whole"), branch):
        done = headway.train(dropped, *overrides)
        assert done.returncode == 0, done.stderr
    assert trajectory(headway.folder / "branch")[:20] == trajectory(headway.folder / "whole")[:20]
    assert tensors(headway.folder / "branch", 20) == tensors(headway.folder / "whole", 20)


def test_keep_at_tokens_keeps_the_checkpoints_of_the_steps_that_reach_them(folder):
    # 3900 tokens lie within step 16. `every_tokens` saves every 5 steps, of which `keep: 1` leaves the last.
    assert list(checkpoints(folder / "stable")) == [10, 16, 40]


def test_a_branch_that_was_interrupted_goes_on_without_its_parent(folder, headway):
    shutil.copytree(folder / "stable", headway.folder / "stable")
    command = (*SHORT, "init.run=stable@10", "run_dir=cut")
    process = headway.start(*command, "checkpoint.every_tokens=null")
    run = headway.folder / "cut"
    headway.wait_for(lambda: steps_done(run) >= 12, process)
    os.kill(int((run / "logs" / "rank-0.pid").read_text()), signal.SIGKILL)  # before a checkpoint of its own
    process.communicate(timeout=60)
    assert checkpoints(run) == {}
    done = headway.train(*command)  # starts from the parent again
    assert done.returncode == 0 and "branched from" in done.stdout, done.stderr
    assert list(checkpoints(run)) == [15, 20]
    shutil.rmtree(checkpoints(run)[20])
    (run / "summary.json").unlink()
    shutil.rmtree(headway.folder / "stable")
    again = headway.train(*command)
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stdout and "(step 15/20)" in again.stdout
    assert "branch     of stable after step 10" in again.stdout
    assert trajectory(run)[:20] == trajectory(folder / "whole")[:20] and len(records(run)) == 20
    assert tensors(run, 20) == tensors(folder / "whole", 20) and len(records(run, "branch")) == 1
    assert json.loads((run / "summary.json").read_text())["resumes"] == 1


def test_buffers_of_routers_are_carried(folder, headway_once):
    """The parent balances its router without a loss; its biases are buffers and continue from their values."""
    path = checkpoints(folder / "stable")[10]
    held = Tensors(Checkpoint(path=path, step=10, manifest=read_manifest(path)))
    biases = [key for key in held if key.startswith("buffer/") and "bias" in key]
    assert biases and any(held[key].abs().max() > 0 for key in biases)


@pytest.mark.parametrize(
    "layout",
    [
        ("launch.processes=2", "parallel.zero=3"),
        ("launch.processes=2", "parallel.tensor=2"),
        ("launch.processes=2", "parallel.pipeline=2"),
    ],
    ids=lambda words: words[-1],
)
def test_a_branch_may_have_another_layout(folder, headway_once, layout):
    name = layout[-1]
    done = headway_once.train(*SHORT, *layout, "init.run=stable@10", f"run_dir={name}")
    assert done.returncode == 0, done.stderr
    ours, whole = records(folder / name), records(folder / "whole")
    assert [(r["step"], r["batch_hash"], r["lr"]) for r in ours] == [
        (r["step"], r["batch_hash"], r["lr"]) for r in whole
    ]
    assert ours[:10] == records(folder / "stable")[:10]
    for one, other in zip(whole[10:], ours[10:], strict=True):
        # As in test_train_layouts: rounding differs, later steps carry it on, and a router turns near ties.
        tolerance = 1e-5 if one["step"] <= 15 else 1e-2
        assert other["loss"] == pytest.approx(one["loss"], rel=tolerance), one["step"]


def test_a_branch_of_a_branch(folder, headway_once):
    done = headway_once.train(*SHORT, "init.run=stable@10", "run_dir=middle", "checkpoint.keep=9")
    assert done.returncode == 0, done.stderr
    done = headway_once.train(*SHORT, "init.run=middle@15", "run_dir=last")
    assert done.returncode == 0, done.stderr
    assert trajectory(folder / "last")[:20] == trajectory(folder / "whole")[:20]
    assert tensors(folder / "last", 20) == tensors(folder / "whole", 20)
    assert [record["step"] for record in records(folder / "last", "branch")] == [10, 15]


def test_other_learning_rates_before_the_branch_are_said(folder, headway_once):
    done = headway_once.train("train.tokens=4352", "init.run=stable@16", "run_dir=late")
    assert done.returncode == 0, done.stderr
    note = "the learning rates of the parent differ from this schedule's from step 15 on"
    assert done.stdout.count(note) == 2, done.stdout  # before the start, and with the event
    assert note in records(folder / "late", "branch")[0]["note"]
    assert [r["lr"] for r in records(folder / "late")][13:] == pytest.approx([3e-3] * 3 + [3e-3 / 3.4])


def test_a_branch_in_another_schedule_leaves_the_parent_as_it_is(folder, headway_once):
    before = {path: path.stat().st_mtime_ns for path in (folder / "stable").rglob("*") if "lock" not in path.name}
    done = headway_once.train("schedule.type=cosine", "init.run=stable@10", "run_dir=cosine")
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_records_that_the_parent_lost_are_said(folder, headway):
    parent = shutil.copytree(folder / "stable", headway.folder / "stable")
    lines = (parent / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    damaged = next(i for i, line in enumerate(lines) if b'"kind": "train", "step": 4,' in line)
    later = next(i for i, line in enumerate(lines) if b'"kind": "train", "step": 30,' in line)
    lines[damaged], lines[later] = b"damaged\n", b"also damaged, and of no concern\n"
    (parent / "metrics.jsonl").write_bytes(b"".join(lines))
    done = headway.train(*SHORT, "init.run=stable@10", "run_dir=branch")
    assert done.returncode == 0, done.stderr
    assert "RECORDS WERE LOST" in done.stdout and "1 line is damaged and no record of step 4" in done.stdout
    (event,) = records(headway.folder / "branch", "records_lost")
    assert event["lines"] == 1 and event["gaps"] == [[4, 4]]


def test_a_branch_whose_own_checkpoints_are_gone_does_not_begin_anew(folder, headway):
    shutil.copytree(folder / "stable", headway.folder / "stable")
    command = (*SHORT, "init.run=stable@10", "run_dir=branch")
    assert headway.train(*command).returncode == 0
    run = headway.folder / "branch"
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints")
    done = headway.train(*command)
    assert done.returncode == 74 and "records tell of one of step 20" in done.stderr
    assert "to begin anew at step 10" in done.stderr


def test_kept_checkpoints_survive_a_resume(headway):
    command = ("checkpoint.keep=1", "checkpoint.keep_at_tokens=[1000,2816]", "checkpoint.every_tokens=1280")
    process = headway.start(*command)
    run = headway.folder / "runs" / "tiny"
    headway.wait_for(lambda: 11 in checkpoints(run), process)
    os.kill(int((run / "logs" / "rank-0.pid").read_text()), signal.SIGKILL)
    process.communicate(timeout=60)
    done = headway.train(*command)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    assert list(checkpoints(run)) == [4, 11, 40]


# ---------------------------------------------------------------- refusals, without processes


@pytest.fixture
def refused(folder, headway, monkeypatch):
    """`refused(error, message, *overrides)`: what a start of a branch of a copy of `stable` says."""
    shutil.copytree(folder / "stable", headway.folder / "stable")
    monkeypatch.chdir(headway.folder)

    def check(error: type[Exception], message: str, *overrides: str) -> None:
        usual = {"init.run": "stable@10", "run_dir": "branch"}
        words = [f"{k}={v}" for k, v in usual.items() if not any(word.startswith(f"{k}=") for word in overrides)]
        with pytest.raises(error, match=message):
            resolve(load_spec(headway.spec, [*SHORT, *words, *overrides]).spec)

    return check


@pytest.mark.parametrize("written", ["stable", "stable@", "stable@x", "@10", "stable@0", "stable@-1", "stable@1.5"])
def test_a_branch_names_a_folder_and_a_step(refused, written):
    refused(SpecError, r"init\.run: '.*' is not PATH@STEP .*such as runs/stable@4000", f"init.run={written}")


def test_a_branch_does_not_start_from_weights_too(refused):
    refused(
        SpecError, r"init\.run: .*use init\.run or init\.weights, and leave the other out", "init.weights=somewhere"
    )
    with pytest.raises(SpecError, match=r"init\.sha256: .*use init\.weights or init\.run too"):
        load_spec("tiny.yaml", [f"init.sha256={'0' * 64}"])


def test_a_parent_that_is_not_there_is_said(refused):
    refused(NoInputError, r"init\.run: gone: no such folder \(looked for /.*gone\)", "init.run=gone@10")
    Path("empty").mkdir()
    refused(NoInputError, r"init\.run: empty has no spec\.json", "init.run=empty@10")
    refused(SpecError, r"init\.run: stable is the folder of this run itself", "run_dir=./stable")


def test_a_checkpoint_that_is_not_there_is_said_with_those_that_are(refused):
    refused(
        NoInputError,
        r"no checkpoint of step 12 \(there: 10, 16, 40\); name one of these; checkpoint\.keep_at_tokens",
        "init.run=stable@12",
    )


def test_a_branch_must_have_a_step_of_its_own(refused):
    refused(
        SpecError,
        r"(?s)init\.run: nothing is left to train after step 40.*has\s+20 steps.*train\.tokens of at least 10241",
        "init.run=stable@40",
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lr=0.004", r"optimizer\.lr: 0\.003 there, 0\.004 in the spec"),
        ("seed=2", "seed: 1 there, 2 in the spec"),
        ("data.seed=2", r"data\.seed: 0 there, 2 in the spec"),
        ("train.micro_batch=4", r"train\.micro_batch: 2 there, 4 in the spec"),
        ("attention.top_k=2", r"attention\.top_k: 1 there, 2 in the spec"),
        ("parallel.precision=bf16", r"parallel\.precision: 'fp32' there, 'bf16' in the spec"),
        ("model.branch_start=0.3", r"model\.branch_start: None there, 0\.3 in the spec"),
    ],
)
def test_a_parent_of_another_training_is_refused_with_the_keys_that_differ(refused, override, said):
    refused(SpecError, rf"(?s)stable is no beginning of this run.*{said}\nonly train\.tokens, .* may;", override)


@pytest.mark.parametrize(
    "override",
    [
        "guard.spike=skip",
        "train.validate_every_tokens=1024",
        "schedule.min_lr_ratio=0.1",
        "checkpoint.keep=7",
        "name=b",
    ],
)
def test_what_may_differ_is_accepted(folder, headway, monkeypatch, override):
    monkeypatch.chdir(folder)
    spec, info = resolve(load_spec(headway.spec, [*SHORT, "run_dir=new", "init.run=stable@10", override]).spec)
    assert spec.init.sha256 == info["branch"]["sha256"]


def test_a_parent_of_other_data_is_refused(refused):
    card = json.loads(Path("stable/run.json").read_text())
    Path("stable/run.json").write_text(json.dumps(card | {"data_fingerprint": "5" * 64}))
    refused(SpecError, r"stable was trained on other data \(fingerprint 5{16}, now None\)")


def test_a_damaged_checkpoint_is_refused(refused):
    (file,) = checkpoints(Path("stable"))[10].glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(CheckpointError, "its contents changed after it was written")
    file.write_bytes(whole[:-1])
    refused(CheckpointError, r"init\.run: .*the manifest says .*; restore it from a copy, or name another step")


@pytest.mark.parametrize("damage", ["file", "spec"])
def test_ranks_refuse_what_changed_after_the_launcher_checked_it(refused, headway, damage):
    spec, _ = resolve(load_spec(headway.spec, [*SHORT, "run_dir=branch", "init.run=stable@10"]).spec)
    (file,) = checkpoints(Path("stable"))[10].glob("*.safetensors")
    if damage == "file":
        file.write_bytes(bytes(file.stat().st_size))
    else:
        (file.parent / "MANIFEST.json").write_text((file.parent / "MANIFEST.json").read_text() + " ")
    # Rank 1 of 2 verifies no file here; it hears of the problem that rank 0 has found.
    heard: list = []
    alone = SimpleNamespace(rank=0, world_size=2, gather_json=lambda value: heard.append(value) or [value, None])
    other = SimpleNamespace(rank=1, world_size=2, gather_json=lambda value: [heard[0], value])
    error, message = {
        "file": (CheckpointError, "rank 0: .*its contents changed.*; restore the checkpoint from a copy"),
        "spec": (SpecError, r"rank 0: init\.sha256: the checkpoint of step 10 in stable is another one"),
    }[damage]
    for layout in (alone, other):
        with pytest.raises(error, match=message):
            load_parent(spec, None, cast("Any", None), cast("Any", layout))


def test_a_checkpoint_of_another_run_or_with_another_hash_is_refused(refused):
    found = hash_of(checkpoints(Path("stable"))[10])
    refused(
        SpecError, rf"init\.sha256: the checkpoint of step 10 .*give init\.sha256={found}", f"init.sha256={'0' * 64}"
    )
    Path("stable/run_id.json").write_text('"another"')
    refused(CheckpointError, r"init\.run: .*it was written by another run")


def test_a_resumed_branch_may_have_its_parent_moved_but_not_replaced(folder, headway, monkeypatch):
    shutil.copytree(folder / "stable", headway.folder / "stable")
    monkeypatch.chdir(headway.folder)

    def spec(parent: str):
        return resolve(load_spec(headway.spec, [*SHORT, "run_dir=branch", f"init.run={parent}"]).spec)[0]

    run = RunDir(Path("branch"))
    run.adopt(spec("stable@10"))
    (run.checkpoints / "step-0000000015").mkdir(parents=True)
    Path("stable").rename("moved")
    for parent in ("moved@10", "stable@10"):  # the second is nowhere, and is not needed any more
        run.adopt(spec(parent))
    with pytest.raises(SpecError, match=r"(?s)a run of another spec:.*init\.sha256"):
        run.adopt(spec("moved@16"))
    with pytest.raises(NoInputError, match="no such folder"):
        spec("stable@16")


def test_a_path_keeps_its_step_beside_the_file_of_the_spec(folder, headway, monkeypatch):
    place = headway.folder / "project"
    shutil.copytree(folder / "stable", place / "with@sign")
    (place / "spec.yaml").write_text(headway.spec.read_text() + "init: {run: with@sign@10}\n")
    monkeypatch.chdir(headway.folder)
    spec = load_spec("project/spec.yaml", SHORT).spec
    assert spec.init.run == f"{place.resolve() / 'with@sign'}@10" and spec.init.start_step == 10
    assert resolve(spec)[1]["branch"]["step"] == 10


def test_an_automatic_micro_batch_is_that_of_the_parent(folder, headway, monkeypatch):
    shutil.copytree(folder / "stable", headway.folder / "stable")
    done = headway.train(*SHORT, "init.run=stable@16", "run_dir=auto", "train.micro_batch=auto")
    assert done.returncode == 0, done.stderr
    assert json.loads((headway.folder / "auto/spec.json").read_text())["train"]["micro_batch"] == 2
    assert trajectory(headway.folder / "auto")[:20] == trajectory(folder / "whole")[:20]


def test_the_starts_of_the_parent_that_trained_the_first_steps_are_listed(folder, headway):
    card = resolved_card(folder / "branch-10")
    assert [(a.get("run"), a["from_step"]) for a in card["attempts"]] == [(card["branch"]["run"], 0), (None, 10)]
    parent = shutil.copytree(folder / "stable", headway.folder / "stable")
    starts = [{"from_step": step, "started_at": "x"} for step in (0, 5, 10, 25)]
    (parent / "run.json").write_text(json.dumps({"attempts": starts}))
    found = inherited_attempts({"path": str(parent), "run": "id", "step": 10})
    assert [a["from_step"] for a in found] == [0, 5]


@pytest.mark.parametrize(("written", "said"), [("[10,5]", "use \\[5, 10\\]"), ("[5,5]", "must ascend"), ("[0]", "> 0")])
def test_marks_ascend(headway, written, said):
    with pytest.raises(SpecError, match=f"checkpoint.keep_at_tokens.*{said}"):
        load_spec(headway.spec, [f"checkpoint.keep_at_tokens={written}"])
    assert load_spec(headway.spec, ["checkpoint.keep_at_tokens=[1e3,2e3]"]).spec.checkpoint.keep_at_tokens == (
        1000,
        2000,
    )


def test_a_dry_run_and_a_plan_name_the_branch(folder, headway, monkeypatch):
    done = headway.train("--dry-run", *SHORT, "init.run=stable@10")
    assert done.returncode == 0 and "# a branch of stable@10" in done.stdout
    done = headway.run("plan", str(headway.spec), *SHORT, "init.run=stable@10")
    assert done.returncode == 0 and "2,560 in 10 steps, after stable@10" in done.stdout, done.stderr
    assert "training of the branch" in done.stdout
