"""`train.micro_batch: auto` in specs, plans, runs and commands."""

import contextlib
import json
import signal
from pathlib import Path

import pytest

from headway.launcher.base.errors import SpecError
from headway.launcher.cli.main import main
from headway.launcher.cli.schema import schema_of
from headway.launcher.plan.micro_batch import settle as micro_batch
from headway.launcher.plan.micro_batch.plan import by_plan, memory_of, with_number
from headway.launcher.plan.micro_batch.rank import Rank
from headway.launcher.spec.load import format_config, load_spec
from headway.launcher.study.config import load_study
from headway.launcher.study.plan import plan_study


def spec_of(path, *overrides):
    return load_spec(path, overrides, no_auto=None).spec


# ---------------------------------------------------------------- by the plan


def test_the_plan_takes_the_largest_that_fits_where_passes_are_small(auto_spec):
    spec = spec_of(auto_spec)
    peaks = {size: memory_of(spec, size).peak for size in (1, 2, 4, 8)}
    assert by_plan(spec, 1e12).micro_batch == 8
    assert by_plan(spec, peaks[4]).micro_batch == 4
    assert [t.fits for t in by_plan(spec, peaks[4]).trials] == [True, True, True, False]
    assert by_plan(spec, peaks[1] - 1).micro_batch is None


def test_the_plan_takes_the_smallest_sufficient_size_and_feeds_each_stage(auto_spec):
    assert by_plan(spec_of(auto_spec, "data.seq_len=8192"), 1e15).micro_batch == 2
    staged = by_plan(spec_of(auto_spec, "parallel.pipeline=2", "launch.processes=2"), 1e12)
    assert staged.micro_batch == 4 and "each of 2 stages" in staged.why


def test_ranks_that_share_a_model_are_not_timed(auto_spec, monkeypatch):
    spec = spec_of(auto_spec, "parallel.tensor=2", "launch.processes=2")
    monkeypatch.setattr(Rank, "run", lambda self, size: pytest.fail("it was timed"))
    found = micro_batch.find(spec)
    assert not found.measured and found.choice.micro_batch == 8
    assert "one process cannot time ranks" in micro_batch.table(found)


def test_plan_says_which_number_it_takes_and_that_train_measures(auto_spec, capsys):
    assert main(["plan", str(auto_spec)]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("train.micro_batch: auto is planned as 8 on h100:")
    assert "estimate of memory" in first and "`headway train` measures" in first
    assert any("1 x 8 sequences" in line for line in rest)
    assert main(["plan", str(auto_spec), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"]["micro_batch"] == 8
    assert main(["plan", str(auto_spec), "train.micro_batch=2"]) == 0
    assert "auto" not in capsys.readouterr().out


# ---------------------------------------------------------------- in a spec


def test_loaded_specs_never_contain_auto(auto_spec):
    loaded = load_spec(auto_spec, no_auto=None)
    assert loaded.spec.train.micro_batch == 1 and loaded.auto == {"train.micro_batch"}
    assert "train.micro_batch                = auto " in format_config(loaded)
    number = load_spec(auto_spec, ["train.micro_batch=4"])
    assert number.spec.train.micro_batch == 4 and number.auto == frozenset()


@pytest.mark.parametrize("written", ["atuo", "Auto", "automatic"])
def test_a_typo_names_what_is_legal(auto_spec, written):
    with pytest.raises(SpecError, match=r"expected a whole number \(>= 1\) or auto; got .*Did you mean auto\?"):
        load_spec(auto_spec, [f"train.micro_batch={written}"])


def test_no_other_key_accepts_auto(auto_spec):
    with pytest.raises(SpecError, match=r"train.global_batch: expected a whole number \(>= 1\); got 'auto'"):
        load_spec(auto_spec, ["train.global_batch=auto"])


def test_the_schema_contains_auto():
    legal = schema_of()["$defs"]["TrainConfig"]["properties"]["micro_batch"]["anyOf"]
    assert legal == [{"type": "integer", "minimum": 1}, {"type": "string", "const": "auto"}]


@pytest.mark.parametrize("verb", [["bench", "step"], ["bench", "data"], ["bench", "checkpoint"]])
def test_commands_that_need_a_number_say_how_to_find_one(auto_spec, verb, capsys):
    assert main([*verb, str(auto_spec)]) == 64
    said = capsys.readouterr().err
    assert "tiny.yaml:10:3: train.micro_batch: auto is for `headway train`" in said
    assert "write train.micro_batch 1, 2, 4 or 8, or find the number with `headway bench micro-batch " in said


def test_a_study_refuses_auto(auto_spec, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text("study: s\nbase: tiny.yaml\nseeds: [1]\nvariants:\n  a: {}\n  b: {attention.top_k: 2}\n")
    with pytest.raises(
        SpecError, match=r"train.micro_batch: auto would give each variant .* write .* 1, 2, 4 or 8, or"
    ):
        plan_study(load_study(study))
    planned = plan_study(load_study(study), ["train.micro_batch=4"])
    assert {cell.spec.train.micro_batch for cell in planned.cells} == {4}


def test_several_hosts_are_refused_before_anything_is_written(auto_spec, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(auto_spec), "launch.hosts=2", "launch.address=first"]) == 64
    said = capsys.readouterr().err
    assert "each of the 2 hosts could measure a different number" in said
    assert "write train.micro_batch 1, 2 or 4, or find the number with `headway bench micro-batch" in said
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- a run


def settled_run(folder, number):
    """A run folder as after a start with `auto`."""
    spec = with_number(spec_of(folder / "tiny.yaml"), number)
    run = micro_batch.RunDir(folder / "run")
    run.adopt(spec)
    return run


def test_a_run_that_was_started_keeps_its_number_on_any_host(auto_spec, tmp_path, monkeypatch):
    run = settled_run(tmp_path, 2)
    monkeypatch.setattr(micro_batch, "find", lambda spec: pytest.fail("it was searched again"))
    assert micro_batch.settle(run, spec_of(auto_spec)).train.micro_batch == 2
    several = spec_of(auto_spec, "launch.hosts=2", "launch.address=first")
    settled = micro_batch.number_of(run, several)
    assert settled is not None and settled.train.micro_batch == 2


def test_several_hosts_continue_a_run_that_has_its_number(auto_spec, tmp_path, capsys):
    settled_run(tmp_path, 2)
    several = ["launch.hosts=2", "launch.address=first", f"run_dir={tmp_path / 'run'}", "--dry-run"]
    assert main(["train", str(auto_spec), *several]) == 0
    said = capsys.readouterr().out
    assert "host 1 of 2" in said and "auto" not in said
    assert main(["train", str(auto_spec), "--dry-run"]) == 0
    assert "# train.micro_batch: auto is measured before this is started" in capsys.readouterr().out


def test_a_number_that_does_not_divide_the_batch_is_refused_with_legal_ranks(auto_spec, tmp_path):
    run = settled_run(tmp_path, 4)
    with pytest.raises(
        SpecError, match=r"auto is 4 for the run in .* into 4 x 8 .* with 1 or 2 data parallel ranks, or use"
    ):
        micro_batch.number_of(run, spec_of(auto_spec, "launch.processes=8"))


def test_if_nothing_fits_the_message_says_what_to_change(auto_spec, tmp_path, monkeypatch):
    spec = spec_of(auto_spec)
    nothing = micro_batch.Found(spec=spec, choice=by_plan(spec, 1.0), device="cpu", on_cpu=True, limit_bytes=1.0)
    monkeypatch.setattr(micro_batch, "find", lambda spec: nothing)
    run = micro_batch.RunDir(tmp_path / "run")
    with pytest.raises(
        SpecError,
        match=r"auto: even one sequence per pass does not fit .* parallel.recompute=block, .*"
        "write train.micro_batch: 1",
    ):
        micro_batch.settle(run, spec)
    assert not run.path.exists()


@pytest.fixture
def auto(headway):
    headway.spec.write_text(headway.spec.read_text().replace("micro_batch: 2", "micro_batch: auto"))
    return headway


def test_train_measures_once_and_records_a_plain_number(auto):
    first = auto.train("train.tokens=768")
    assert first.returncode == 0, first.stderr
    run = auto.folder / "runs" / "tiny"
    kept = json.loads((run / "micro_batch.json").read_text())
    number = kept["micro_batch"]
    assert number in (1, 2, 4, 8) and kept["measured"] is True
    assert [trial["micro_batch"] for trial in kept["trials"]][:2] == [1, 2]
    assert json.loads((run / "spec.json").read_text())["train"]["micro_batch"] == number
    assert "micro-batch  tokens/s" in first.stdout and f"train.micro_batch: auto -> {number}: " in first.stdout
    assert "trying 1, 2, 4, 8 sequences per pass on cpu" in first.stderr
    assert first.stdout.index("auto ->") < first.stdout.index("step 1/")
    again = auto.train("train.tokens=768")
    assert again.returncode == 0 and "already complete" in again.stdout and "auto" not in again.stdout + again.stderr


def processes_in(folder):
    """Command lines of all processes whose working directory is `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink() == folder:
                found.append((process / "cmdline").read_text())
    return found


def test_a_stop_while_measuring_leaves_no_process_and_no_run(auto):
    launcher = auto.start()
    assert launcher.stderr is not None
    assert "trying" in launcher.stderr.readline()
    assert any("micro_batch.child" in words for words in processes_in(auto.folder))
    launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 75 and "stopped by SIGTERM while no ranks ran" in said
    assert not processes_in(auto.folder)
    assert not (auto.folder / "runs" / "tiny" / "spec.json").exists()


def test_bench_prints_and_writes_what_auto_would_find(auto_spec, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out" / "found.json"
    numbers = ["train.global_batch=2", "train.micro_batch=1"]
    assert main(["bench", "micro-batch", str(auto_spec), *numbers, "--out", str(out)]) == 0
    said, kept = capsys.readouterr().out, json.loads(out.read_text())
    assert f"train.micro_batch: auto -> {kept['micro_batch']}: {kept['why']}" in said
    assert [trial["micro_batch"] for trial in kept["trials"]] == [1, 2]
    assert all(trial["rate"]["q1"] <= trial["rate"]["median"] <= trial["rate"]["q3"] for trial in kept["trials"])
    assert "headway bench micro-batch" in kept["command"]
