"""`train.micro_batch: auto`: the process that measures, and what commands make of what is found."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from headway.launcher import free_memory, micro_batch, micro_batch_child
from headway.launcher.cli import main
from headway.launcher.commands import full_environment
from headway.launcher.errors import HeadwayError, SpecError
from headway.launcher.load import format_config, load_spec
from headway.launcher.micro_batch_plan import by_plan, memory_of, with_number
from headway.launcher.micro_batch_rank import Rank
from headway.launcher.micro_batch_search import search
from headway.launcher.schema import schema_of
from headway.launcher.study_config import load_study
from headway.launcher.study_plan import plan_study
from headway.model.decoder import Block

TINY = """
name: tiny
model: {width: 32, layers: 2, ffn_width: 48, vocab_size: 32}
attention: {type: rgqa, heads: 4, kv_heads: 2, head_dim: 8, top_k: 1}
data: {seq_len: 32, source: {type: synthetic, task: mqar, vocab_size: 32, pairs: 4, queries: 4}}
optimizer: {lr: 3.0e-3}
train:
  tokens: 10240
  global_batch: 8
  micro_batch: auto
  validation_tokens: 512
launch: {processes: 1, threads: 1, restarts: 0, device: cpu}
"""


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path / "tiny.yaml"


def spec_of(path, *overrides):
    return load_spec(path, overrides, no_auto=None).spec


# ---------------------------------------------------------------- the process that measures

DEAD_AT_FOUR = """
import json, os, signal, sys
sys.stdin.readline()
print(json.dumps({"device": "cpu", "free_bytes": None, "total_bytes": None}), flush=True)
for line in sys.stdin:
    size = json.loads(line)["micro_batch"]
    if size == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    print(json.dumps({"seconds": [0.1] * 5, "passes_bytes": None}), flush=True)
"""


def test_a_process_killed_mid_way_means_that_the_size_does_not_fit(tiny):
    with Rank(spec_of(tiny), os.environ, command=[sys.executable, "-S", "-c", DEAD_AT_FOUR]) as rank:
        found = search(
            [1, 2, 4, 8],
            rank,
            tokens_per_sequence=32,
            limit_bytes=rank.limit_bytes,
            seconds_left=lambda: 60.0,
            say=lambda trial: None,
        )
    assert found.micro_batch == 2 and [t.micro_batch for t in found.trials] == [1, 2, 4]
    assert "SIGKILL" in str(found.trials[-1].why_not)


@pytest.mark.parametrize("program", ["raise SystemExit('no such model')", "import sys; sys.exit('no such model')"])
def test_a_process_that_fails_otherwise_is_an_error_with_its_last_words(tiny, program):
    with pytest.raises(HeadwayError, match=r"(?s)status 1.*write a number.*no such model"):
        Rank(spec_of(tiny), os.environ, command=[sys.executable, "-S", "-c", program])


GPU = """
import json, sys
sys.stdin.readline()
print(json.dumps({"device": "a GPU", "free_bytes": 30 * 2**30, "total_bytes": 80 * 2**30}), flush=True)
for line in sys.stdin:
    fits = json.loads(line)["micro_batch"] <= 8
    done = {"seconds": [0.1] * 5, "passes_bytes": 2**30}
    print(json.dumps(done if fits else {"out_of_memory": "CUDA out of memory"}), flush=True)
"""


def test_on_a_gpu_measured_passes_replace_those_of_the_plan_and_all_else_is_added(tiny):
    with Rank(spec_of(tiny), os.environ, command=[sys.executable, "-S", "-c", GPU]) as rank:
        assert rank.planned_bytes(8) is None  # it is tried, whatever the plan says
        timed = rank.run(8)
        assert rank.run(16) == "CUDA out of memory"
        assert 0.9 * 30 * 2**30 < rank.limit_bytes < 30 * 2**30  # what others hold of it is not there
        memory = memory_of(rank.spec, 8)
    assert not isinstance(timed, str)
    states = memory.parameters + memory.master + memory.moments + memory.gradients - memory.late_gradients
    assert timed.memory_bytes == states + 2**30 != memory.peak


def test_the_real_process_measures_passes_of_every_size(tiny):
    spec = spec_of(tiny, "parallel.recompute=block", "data.document_mask=true")
    with Rank(spec, full_environment(spec, {})) as rank:
        assert rank.on_cpu and rank.device == "cpu" and rank.spec.launch.device == "cpu"
        for size in (1, 2):
            timed = rank.run(size)
            assert not isinstance(timed, str)
            assert len(timed.seconds) >= 3 and min(timed.seconds) > 0
            assert timed.memory_bytes == rank.planned_bytes(size) == memory_of(rank.spec, size).peak
        process = rank._process
    assert process.poll() == -signal.SIGKILL  # it does not outlive the search


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_what_is_measured_is_the_model_as_the_spec_says(tiny, recompute, precision, dtype):
    spec = spec_of(tiny, f"parallel.recompute={recompute}", f"parallel.precision={precision}")
    model = micro_batch_child.model_of(spec, torch.device("cpu"))
    blocks = [block for block in model.modules() if isinstance(block, Block)]
    assert {block.placement.recompute for block in blocks} == {recompute == "block"} and len(blocks) == 2
    assert all(p.dtype == dtype and p.grad is not None for p in model.parameters())


def test_memory_that_ran_out_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as short:
        torch.empty(1 << 56, dtype=torch.uint8)
    assert micro_batch_child.is_out_of_memory(short.value)
    with pytest.raises(RuntimeError) as other:
        torch.zeros(2).add_(torch.zeros(3))
    assert not micro_batch_child.is_out_of_memory(other.value)


@pytest.mark.parametrize(("pass_s", "warm_up", "timed"), [(0.001, 2, 25), (0.3, 2, 5), (6.0, 2, 2), (30.0, 1, 2)])
def test_long_passes_are_repeated_less_often(pass_s, warm_up, timed):
    calls = []

    def run():
        calls.append(pass_s)
        return pass_s

    micro_batch_child.warm_up(run)
    assert len(calls) == warm_up
    assert micro_batch_child.times(run) == [pass_s] * timed


def test_memory_of_a_host_is_the_least_that_any_control_group_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(free_memory, "GROUPS", tmp_path)
    monkeypatch.setattr(free_memory, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 4000 kB\n")
    assert free_memory.available_bytes() <= 4000 * 1024
    listing = tmp_path / "listing"
    listing.write_text("0::/user/run\n")
    inner = tmp_path / "user" / "run"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("100\n")
    (inner.parent / "memory.max").write_text("1000\n")
    (inner.parent / "memory.current").write_text("300\n")
    assert free_memory._groups(listing) == [700.0]
    listing.write_text("4:cpu,memory:/job\n2:cpuset:/other\n")
    old = tmp_path / "memory" / "job"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("5000\n")
    (old / "memory.usage_in_bytes").write_text("6000\n")
    assert free_memory._groups(listing) == [0.0]


# ---------------------------------------------------------------- by the plan


def test_the_plan_takes_the_largest_that_fits_where_passes_are_small(tiny):
    spec = spec_of(tiny)
    peaks = {size: memory_of(spec, size).peak for size in (1, 2, 4, 8)}
    assert by_plan(spec, 1e12).micro_batch == 8
    assert by_plan(spec, peaks[4]).micro_batch == 4
    assert [t.fits for t in by_plan(spec, peaks[4]).trials] == [True, True, True, False]
    assert by_plan(spec, peaks[1] - 1).micro_batch is None


def test_the_plan_takes_no_more_than_passes_need_and_leaves_each_stage_work(tiny):
    assert by_plan(spec_of(tiny, "data.seq_len=8192"), 1e15).micro_batch == 2
    staged = by_plan(spec_of(tiny, "parallel.pipeline=2", "launch.processes=2"), 1e12)
    assert staged.micro_batch == 4 and "each of 2 stages" in staged.why


def test_ranks_that_share_a_model_are_not_timed(tiny, monkeypatch):
    spec = spec_of(tiny, "parallel.tensor=2", "launch.processes=2")
    monkeypatch.setattr(Rank, "run", lambda self, size: pytest.fail("it was timed"))
    found = micro_batch.find(spec)
    assert not found.measured and found.choice.micro_batch == 8
    assert "one process cannot time the ranks" in micro_batch.table(found)


def test_plan_says_which_number_it_takes_and_that_train_measures(tiny, capsys):
    assert main(["plan", str(tiny)]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("train.micro_batch: auto is planned as 8 on h100:")
    assert "estimate of memory" in first and "`headway train` measures" in first
    assert any("1 x 8 sequences" in line for line in rest)
    assert main(["plan", str(tiny), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"]["micro_batch"] == 8
    assert main(["plan", str(tiny), "train.micro_batch=2"]) == 0
    assert "auto" not in capsys.readouterr().out


# ---------------------------------------------------------------- in a spec


def test_readers_of_a_spec_never_see_the_word(tiny):
    loaded = load_spec(tiny, no_auto=None)
    assert loaded.spec.train.micro_batch == 1 and loaded.auto == {"train.micro_batch"}
    assert "train.micro_batch                = auto " in format_config(loaded)
    number = load_spec(tiny, ["train.micro_batch=4"])
    assert number.spec.train.micro_batch == 4 and number.auto == frozenset()


@pytest.mark.parametrize("written", ["atuo", "Auto", "automatic"])
def test_a_typo_names_what_is_legal(tiny, written):
    with pytest.raises(SpecError, match=r"expected a whole number \(>= 1\) or auto; got .*Did you mean auto\?"):
        load_spec(tiny, [f"train.micro_batch={written}"])


def test_no_other_key_takes_the_word(tiny):
    with pytest.raises(SpecError, match=r"train.global_batch: expected a whole number \(>= 1\); got 'auto'"):
        load_spec(tiny, ["train.global_batch=auto"])


def test_the_schema_shows_the_word():
    legal = schema_of()["$defs"]["TrainConfig"]["properties"]["micro_batch"]["anyOf"]
    assert legal == [{"type": "integer", "minimum": 1}, {"type": "string", "const": "auto"}]


@pytest.mark.parametrize("verb", [["bench", "step"], ["bench", "data"], ["bench", "checkpoint"]])
def test_commands_that_need_a_number_say_where_to_get_one(tiny, verb, capsys):
    assert main([*verb, str(tiny)]) == 64
    said = capsys.readouterr().err
    assert "tiny.yaml:10:3: train.micro_batch: auto is for `headway train`" in said
    assert "write train.micro_batch 1, 2, 4 or 8, or find the number with `headway bench micro-batch " in said


def test_a_study_refuses_because_its_variants_must_be_comparable(tiny, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text("study: s\nbase: tiny.yaml\nseeds: [1]\nvariants:\n  a: {}\n  b: {attention.top_k: 2}\n")
    with pytest.raises(
        SpecError, match=r"train.micro_batch: auto would give each variant .* write .* 1, 2, 4 or 8, or"
    ):
        plan_study(load_study(study))
    planned = plan_study(load_study(study), ["train.micro_batch=4"])
    assert {cell.spec.train.micro_batch for cell in planned.cells} == {4}


def test_several_hosts_are_refused_before_anything_is_written(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(tiny), "launch.hosts=2", "launch.address=first"]) == 64
    said = capsys.readouterr().err
    assert "each of the 2 hosts would measure by itself" in said
    assert "write train.micro_batch 1, 2 or 4, or find the number with `headway bench micro-batch" in said
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- a run


def settled_run(folder, number):
    """A run folder as a start with `auto` leaves it."""
    spec = with_number(spec_of(folder / "tiny.yaml"), number)
    run = micro_batch.RunDir(folder / "run")
    run.adopt(spec)
    return run


def test_a_run_that_was_started_keeps_its_number_on_any_host(tiny, tmp_path, monkeypatch):
    run = settled_run(tmp_path, 2)
    monkeypatch.setattr(micro_batch, "find", lambda spec: pytest.fail("it was searched again"))
    assert micro_batch.settle(run, spec_of(tiny)).train.micro_batch == 2
    several = spec_of(tiny, "launch.hosts=2", "launch.address=first")
    settled = micro_batch.number_of(run, several)
    assert settled is not None and settled.train.micro_batch == 2


def test_several_hosts_continue_a_run_that_has_its_number(tiny, tmp_path, capsys):
    settled_run(tmp_path, 2)
    several = ["launch.hosts=2", "launch.address=first", f"run_dir={tmp_path / 'run'}", "--dry-run"]
    assert main(["train", str(tiny), *several]) == 0
    said = capsys.readouterr().out
    assert "host 1 of 2" in said and "auto" not in said
    assert main(["train", str(tiny), "--dry-run"]) == 0
    assert "# train.micro_batch: auto is measured before this is started" in capsys.readouterr().out


def test_a_number_that_does_not_go_with_more_processes_names_those_it_goes_with(tiny, tmp_path):
    run = settled_run(tmp_path, 4)
    with pytest.raises(SpecError, match=r"auto is 4 for the run in .* into 4 x 8 .* with 1 or 2 of them, or give"):
        micro_batch.number_of(run, spec_of(tiny, "launch.processes=8"))


def test_where_nothing_fits_the_message_says_what_to_change(tiny, tmp_path, monkeypatch):
    spec = spec_of(tiny)
    nothing = micro_batch.Found(spec=spec, choice=by_plan(spec, 1.0), device="cpu", on_cpu=True, limit_bytes=1.0)
    monkeypatch.setattr(micro_batch, "find", lambda spec: nothing)
    run = micro_batch.RunDir(tmp_path / "run")
    with pytest.raises(
        SpecError, match=r"auto: not even one sequence .* parallel.recompute=block, .*write train.micro_batch: 1"
    ):
        micro_batch.settle(run, spec)
    assert not run.path.exists()


@pytest.fixture
def auto(headway):
    headway.spec.write_text(headway.spec.read_text().replace("micro_batch: 2", "micro_batch: auto"))
    return headway


def test_train_measures_once_and_records_a_plain_number(auto):
    first = auto.train("train.tokens=512")
    assert first.returncode == 0, first.stderr
    run = auto.folder / "runs" / "tiny"
    kept = json.loads((run / "micro_batch.json").read_text())
    number = kept["micro_batch"]
    assert number in (1, 2, 4, 8) and kept["measured"] is True
    assert [trial["micro_batch"] for trial in kept["trials"]][:2] == [1, 2]
    assert json.loads((run / "spec.json").read_text())["train"]["micro_batch"] == number
    assert "micro-batch  tokens/s" in first.stdout and f"train.micro_batch: auto -> {number}: " in first.stdout
    assert "trying 1, 2, 4, 8 sequences a pass on cpu" in first.stderr
    assert first.stdout.index("auto ->") < first.stdout.index("step 1/")
    again = auto.train("train.tokens=512")
    assert again.returncode == 0 and "already complete" in again.stdout and "auto" not in again.stdout + again.stderr


def processes_in(folder):
    """Command lines of all processes that stand in a folder."""
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
    assert any("micro_batch_child" in words for words in processes_in(auto.folder))
    launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 75 and "stopped by SIGTERM while no ranks ran" in said
    assert not processes_in(auto.folder)
    assert not (auto.folder / "runs" / "tiny" / "spec.json").exists()


def test_bench_prints_and_writes_what_auto_would_find(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out" / "found.json"
    assert (
        main(["bench", "micro-batch", str(tiny), "train.global_batch=2", "train.micro_batch=1", "--out", str(out)]) == 0
    )
    said, kept = capsys.readouterr().out, json.loads(out.read_text())
    assert f"train.micro_batch: auto -> {kept['micro_batch']}: {kept['why']}" in said
    assert [trial["micro_batch"] for trial in kept["trials"]] == [1, 2]
    assert all(trial["rate"]["q1"] <= trial["rate"]["median"] <= trial["rate"]["q3"] for trial in kept["trials"])
    assert "headway bench micro-batch" in kept["command"]
