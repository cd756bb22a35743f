"""`headway bench gpu` and `bench report`: every row runs in its reduced form, and reports of made-up rows of a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headway.launcher.base.errors import SpecError
from headway.launcher.bench.gpu import run as gpu_run
from headway.launcher.bench.gpu import steps
from headway.launcher.bench.gpu.correctness import compare
from headway.launcher.bench.gpu.report import load, report_gpu
from headway.launcher.bench.gpu.rows import GPU, Absent, Failed, Machine, Row
from headway.launcher.bench.gpu.shapes import GPU_SIZES, decoder, model_config, variants
from headway.launcher.bench.gpu.tables import bound, mfu
from headway.launcher.plan.hardware import ASSUMPTIONS, GPUS
from headway.launcher.spec.load import load_spec
from headway.model.attention.gqa import GqaConfig
from headway.model.cost import account

MODELS = Path(__file__).parents[3] / "yaml" / "models"
ABSENT = ("deepspeed", "megatron", "streaming", "pandas", "tokenizers", "safetensors", "tensorboard")
BARE = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))  # importing one of these fails, as if it were not installed
from headway.launcher.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def rows_of(folder):
    return {row["key"]: row for row in gpu_run.read_rows(folder)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A whole reduced run in a process without the packages that a bare GPU machine lacks."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-P", "-c", BARE, "bench", "gpu", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done


def test_every_row_runs_on_a_bare_machine(measured):
    out, _ = measured
    rows = rows_of(out)
    parts = {key.split("/")[0] for key in rows}
    assert parts == set(gpu_run.PARTS)
    for key, row in rows.items():
        wanted = "absent" if key.startswith("correctness/") and "/core " not in key else "measured"
        assert row["status"] == wanted, row
        assert row["reduced"] is True


def test_a_gpu_is_measured_at_every_size_length_and_number_of_chosen_heads():
    keys = {row.key for row in gpu_run.all_rows(Machine(device=torch.device("cpu"), scale=GPU))}
    for size in ("940M", "940M, head size 64", "250M", "162M"):
        for seq_len in (2048, 8192, 32_768):
            assert {f"{part}/{size} {seq_len}" for part in ("steps", "layers", "prefill")} <= keys
        assert f"prefill/{size} 131072" in keys
        for k in (1, 2):
            assert {
                f"{part}/{size} k={k} {tokens}" for part in ("products", "forms") for tokens in (4096, 32_768)
            } <= keys


def test_the_same_command_measures_no_row_again(measured):
    out, _ = measured
    before = (out / "rows.jsonl").read_text()
    assert gpu_run.bench_gpu(minutes=8, out=out, device="cpu") == 0
    assert (out / "rows.jsonl").read_text() == before


def test_a_reduced_run_reports_no_gpu_results(measured, tmp_path):
    out, _ = measured
    assert report_gpu(out, out=tmp_path) == 0
    text = (tmp_path / "report.md").read_text()
    assert "no number here applies to a GPU" in text
    goals = text.split("## Goals")[1].split("##")[0]
    assert goals.count("| not measured |") == 7
    steps_of = text.split("## tiny, 16 tokens, gqa and rgqa alone")[1].split("##")[0]
    assert "| rgqa k=1/4, within documents (over gqa, within documents) |" in steps_of
    assert "Both sides of every ratio: `speed.compile: none`." in steps_of.replace("\\", "")
    assert "selects and rotates its slots" in text and "query rotation" in text
    assert not (tmp_path / "speed.png").exists()
    assert "<table>" in (tmp_path / "report.html").read_text()
    assert "Levers" in text and "by torch.compile" in text and "select and rotate" in text


def test_progress_and_the_next_command_are_printed(measured):
    _, done = measured
    assert "1/" in done.stderr and "ceilings/copy" in done.stderr and "s left" in done.stderr
    assert "headway bench report" in done.stdout


# ---------------------------------------------------------------- faults


def fake_rows(monkeypatch, *rows):
    monkeypatch.setattr(gpu_run, "all_rows", lambda here: list(rows))


def row(key, run, seconds=0.0):
    return Row(key=key, what=key, seconds=seconds, run=run)


def raises(error):
    def run(_):
        raise error

    return run


def test_a_failed_row_does_not_prevent_other_rows(monkeypatch, tmp_path):
    fake_rows(
        monkeypatch,
        row("steps/a", raises(RuntimeError("no kernel image"))),
        row("steps/b", raises(torch.OutOfMemoryError("tried to allocate 3 GiB"))),
        row("steps/c", raises(Absent("flash attention 3 is not installed"))),
        row("steps/d", lambda _: {"value": 1}),
    )
    assert gpu_run.bench_gpu(minutes=1, out=tmp_path, device="cpu") == 0
    rows = rows_of(tmp_path)
    assert [r["status"] for r in rows.values()] == ["failed", "failed", "absent", "measured"]
    assert "no kernel image" in rows["steps/a"]["why"] and "out of memory" in rows["steps/b"]["why"]
    fake_rows(monkeypatch, row("steps/a", lambda _: {"value": 2}), row("steps/d", raises(AssertionError)))
    assert gpu_run.bench_gpu(minutes=1, out=tmp_path, device="cpu") == 0
    rows = rows_of(tmp_path)
    assert rows["steps/a"]["status"] == "measured"  # a failed row is tried again
    assert rows["steps/d"]["data"] == {"value": 1}  # a measured row is not


def test_a_wrong_kernel_is_reported_and_sets_the_exit_status(monkeypatch, tmp_path, capsys):
    comparisons = {"comparisons": [{"what": "d pool", "error": 0.3, "tolerance": 4e-3}]}
    fake_rows(monkeypatch, row("correctness/expand bf16", raises(Failed("1 of 1 comparisons: d pool", comparisons))))
    assert gpu_run.bench_gpu(minutes=1, out=tmp_path, device="cpu") == 70
    assert "WRONG RESULTS: correctness/expand bf16" in capsys.readouterr().err
    assert gpu_run.bench_gpu(minutes=1, out=tmp_path, device="cpu") == 70  # not measured again, and not forgotten
    assert "WRONG RESULTS: correctness/expand bf16" in capsys.readouterr().err
    report_gpu(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "WRONG RESULTS: correctness/expand bf16" in text.replace("\\", "")
    assert "| expand bf16 | WRONG |" in text


def test_a_kernel_that_breaks_the_device_ends_the_run_and_is_not_repeated(monkeypatch, tmp_path, capsys):
    rows = row("correctness/a", raises(RuntimeError("illegal memory access"))), row("steps/b", lambda _: {})
    fake_rows(monkeypatch, *rows)
    monkeypatch.setattr(Machine, "lost", lambda self: True)
    assert gpu_run.bench_gpu(minutes=1, out=tmp_path, device="cpu") == 70
    assert rows_of(tmp_path)["correctness/a"]["status"] == "crashed"
    assert "THE DEVICE IS LOST after correctness/a" in capsys.readouterr().err
    assert gpu_run.bench_gpu(minutes=1, out=tmp_path, device="cpu") == 70  # the crash is not forgotten
    assert rows_of(tmp_path)["steps/b"]["status"] == "measured"
    report_gpu(tmp_path)
    assert "WRONG RESULTS: correctness/a" in (tmp_path / "report.md").read_text()


def test_all_passes_recompute_if_one_does_not_fit(monkeypatch):
    here, size = Machine(device=torch.device("cpu"), scale=gpu_run.REDUCED), gpu_run.REDUCED.sizes[0]
    calls = []

    def run(size, seq_len, machine, recompute, only_headline):
        calls.append(recompute)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("tried to allocate 3 GiB")
        return {"recompute": recompute}

    monkeypatch.setattr(steps, "_compare", run)
    assert steps.compare(size, 16, False, here) == {"recompute": "block"}
    assert calls == ["none", "block"]


def test_rows_beyond_the_time_limit_are_skipped_and_named(monkeypatch, tmp_path, capsys):
    fake_rows(monkeypatch, row("steps/long", lambda _: {}, seconds=1000), row("steps/short", lambda _: {}))
    monkeypatch.setattr(Machine, "is_gpu", property(lambda self: True))
    monkeypatch.setattr(Machine, "free", lambda self: None)
    monkeypatch.setattr(gpu_run, "_card", lambda here: {"id": "x"})
    assert gpu_run.bench_gpu(minutes=1, out=tmp_path, device="cpu") == 0
    assert list(rows_of(tmp_path)) == ["steps/short"]
    assert "not measured, no time: steps/long" in capsys.readouterr().err


def test_truncated_lines_and_rows_of_other_code_are_not_shown(measured, tmp_path):
    out, _ = measured
    lines = (out / "rows.jsonl").read_text().splitlines()
    (tmp_path / "machine.json").write_text((out / "machine.json").read_text())
    other = json.loads(lines[0]) | {"id": "other code", "key": "ceilings/other"}
    (tmp_path / "rows.jsonl").write_text("\n".join([lines[1], json.dumps(other), lines[2][:40]]) + "\n")
    _, rows = load(tmp_path)
    assert [r["key"] for r in rows] == [json.loads(lines[1])["key"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"minutes": 0.0}, "--minutes"),
        ({"minutes": 1.0, "parts": ["speed"]}, "ceilings, correctness, steps"),
        ({"minutes": 1.0, "device": "cuda"}, "--device cpu"),
    ],
)
def test_errors_name_legal_values(arguments, words, tmp_path):
    with pytest.raises(SpecError, match=words):
        gpu_run.bench_gpu(**{"out": tmp_path, "device": "cpu"} | arguments)


def test_a_folder_without_rows_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"no machine\.json"):
        report_gpu(tmp_path)


def test_an_error_beyond_its_tolerance_is_a_wrong_result(monkeypatch):
    here = Machine(device=torch.device("cpu"), scale=gpu_run.REDUCED)
    with pytest.raises(Absent, match="TRITON_INTERPRET=1"):
        compare(lambda device, dtype: {}, torch.float32, here)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(Absent, match="bf16"):
        compare(lambda device, dtype: {}, torch.bfloat16, here)
    found = compare(lambda device, dtype: {"slots": (1e-7, 2e-6), "exact": (0.0, 0.0)}, torch.float32, here)
    assert found["worst"] == pytest.approx(0.05) and len(found["comparisons"]) == 2
    for error in (3e-6, float("nan")):
        with pytest.raises(Failed, match="d pool"):
            compare(lambda device, dtype, e=error: {"slots": (0.0, 2e-6), "d pool": (e, 2e-6)}, torch.float32, here)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("size", GPU_SIZES, ids=lambda size: size.name)
def test_models_equal_those_of_the_yaml_files(size):
    spec = load_spec(MODELS / f"{size.name.split(',')[0].lower()}.yaml").spec
    made = model_config(size, variants(size)[0].attention)
    assert made.model_dump(exclude={"norm_eps", "init_std"}) == spec.model.model_dump(exclude={"norm_eps", "init_std"})
    assert isinstance(spec.attention, GqaConfig)
    assert size.heads * size.head_dim == spec.attention.heads * spec.attention.head_dim


@pytest.mark.parametrize("size", GPU_SIZES, ids=lambda size: size.name)
def test_every_mechanism_has_the_parameters_of_gqa(size):
    counts = [
        account(model_config(size, v.attention), v.attention, vocab_size=size.vocab_size, seq_len=2048).num_params
        for v in variants(size)
    ]
    assert max(counts) / min(counts) < 1.01


def test_a_model_made_on_the_device_has_the_usual_initial_values():
    size = gpu_run.REDUCED.sizes[0]
    for v in variants(size):
        model = decoder(size, v.attention, torch.device("cpu"), torch.float32)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert all(torch.isfinite(t).all() for t in tensors.values())
        drawn = model.embedding.detach().std().item()
        assert drawn == pytest.approx(0.02, rel=0.1)
        assert torch.equal(model.norm.gain, torch.ones_like(model.norm.gain))


# ---------------------------------------------------------------- reports of made-up rows of a GPU


RATE, HALF, BANDWIDTH = 700e12, 300.0, 3e12


def gpu_card():
    return {
        "id": "code device",
        "code": "code",
        "git_commit": None,
        "device": "NVIDIA H100 80GB HBM3",
        "scale": "gpu",
        "versions": {"torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0"},
        "measured_at": "2026-01-01T00:00:00Z",
    }


def times(median):
    return {"median": median, "q1": 0.99 * median, "q3": 1.01 * median, "min": median, "max": median, "n": 3}


def gpu_rows():
    products = [
        {"rows": 32768, "inner": k, "flops_per_s": RATE * k / (k + HALF), "seconds": times(1e-3)}
        for k in (768, 1024, 2048, 3072, 5760)
    ]
    shapes = [
        {
            "head_dim": d,
            "seq_len": s,
            "heads": 16,
            "kv_heads": 4,
            "forward_flops_per_s": 500e12,
            "both_flops_per_s": rate,
        }
        for d in (64, 128)
        for s, rate in ((2048, 350e12), (8192, 400e12), (32768, 450e12))
    ]
    rows = {
        "ceilings/copy": {"bytes_per_s": BANDWIDTH},
        "ceilings/matmul": {"products": products, "best_flops_per_s": 720e12},
        "ceilings/core cudnn": {"shapes": shapes},
        "ceilings/core flash": {"shapes": [{**shapes[0], "both_flops_per_s": 200e12}, {**shapes[1], "refused": "no"}]},
    }
    for seq_len, ratio in ((2048, 1.10), (8192, 1.31), (32768, 1.85)):
        parts = {"queries": 2e-3, "core": 3e-3, "output": 2e-3, "keys and values": 1e-3, "loss": 1e-3, "mlp": 8e-3}
        rows[f"steps/profile 940M {seq_len}"] = {
            "parts_s": parts,
            "rest_s": 3e-3,
            "within_mlp_s": 7e-3,
            "kept_bytes": 3e9,
            "whole_s": times(20e-3),
            "routed_share": 0.35,
        }
        common = {
            "params": 941443072,
            "useful_flops_per_token": 5e9,
            "executed_flops_per_token": 5e9,
            "core_flops_per_token": 1e9,
            "useful_flop_ratio": 1.1,
            "peak_bytes": 30 << 30,
        }
        gqa = {"name": "gqa", "baseline": "gqa", "active": None, "ratio": times(1.0), "seconds": times(0.2), **common}
        rgqa = {"name": "rgqa k=1/4", "baseline": "gqa", "active": [1, 4], "ratio": times(ratio), **common}
        rows[f"steps/940M {seq_len}"] = {
            "size": "940M",
            "seq_len": seq_len,
            "tokens": 16384,
            "optimizer_s": times(8e-3),
            "recompute": "none",
            "contestants": [gqa, rgqa | {"seconds": times(0.2 / ratio)}],
        }
    return [{"key": k, "status": "measured", "data": d, "id": "code device"} for k, d in rows.items()]


def write_gpu(folder, rows):
    (folder / "machine.json").write_text(json.dumps(gpu_card()))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_goals_are_shown_with_measurement_and_bound(tmp_path):
    write_gpu(tmp_path, gpu_rows())
    report_gpu(tmp_path)
    goals = (tmp_path / "report.md").read_text().split("## Goals")[1].split("##")[0]
    assert "1.310 (1.297 to 1.323)" in goals
    assert "| 1.36 |" in goals  # 1 / (1 - 3/4 * 0.35)
    seconds_per_token = 0.2 / 16384 + 8e-3 / 524288
    assert f"{5e9 / seconds_per_token / 989e12:.1%}" in goals
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_bound_and_mfu_are_absent_without_their_inputs():
    data = {row["key"]: row["data"] for row in gpu_rows()}
    row = data["steps/940M 2048"]
    gqa, rgqa = row["contestants"]
    assert bound(data, "940M", 2048, rgqa) == pytest.approx(1 / (1 - 0.75 * 0.35))
    assert bound(data, "940M", 2048, gqa) is None
    assert bound({}, "940M", 2048, rgqa) is None
    assert mfu(row, gqa, None) is None


def test_the_planner_uses_the_constants_of_a_refit(tmp_path, monkeypatch, capsys):
    from headway.launcher.plan import measured as plan_measured
    from headway.launcher.plan.planner import plan

    file = tmp_path / "plan_measured.json"
    file.write_text('{"gpus": {}}')
    monkeypatch.setattr(plan_measured, "FILE", file)
    spec = MODELS / "940m.yaml"
    plan(spec, [])
    assert "from datasheets, not measured" in capsys.readouterr().out
    results = tmp_path / "results"
    results.mkdir()
    write_gpu(results, gpu_rows())
    report_gpu(results, refit=True)
    entry = plan_measured.measured()["h100"]
    assert entry.matmul_flops_per_s == pytest.approx(RATE) and entry.half_inner == pytest.approx(HALF)
    assert entry.core(128, 30_000) == 450e12 and entry.core(96, 2048) == 350e12
    elementwise = 20e-3 - (2 + 3 + 2 + 1 + 1) * 1e-3 - 7e-3
    assert entry.passes_over_kept == pytest.approx([elementwise * BANDWIDTH / 3e9] * 2)
    capsys.readouterr()
    plan(spec, [])
    text = capsys.readouterr().out
    assert str(results) in text and f"{entry.matmul(2048) / 989e12:.0%}" in text
    low, high = plan_measured.assumptions(GPUS["h100"], width=2048, head_dim=64, seq_len=2048)
    assert low.matmul < high.matmul == pytest.approx(RATE * 2048 / (2048 + HALF) / 989e12)
    assert plan_measured.assumptions(GPUS["h200"], width=2048, head_dim=64, seq_len=2048) == ASSUMPTIONS


def test_a_refit_fills_the_table_of_dense_and_routed_products(tmp_path, monkeypatch):
    from headway.kernels import choice
    from headway.launcher.plan import measured as plan_measured

    for module, name in ((plan_measured, "FILE"), (choice, "TABLE")):
        file = tmp_path / name
        file.write_text('{"gpus": {}, "entries": {}}')
        monkeypatch.setattr(module, name, file)
    products = [
        {
            "product": p,
            "kind": kind,
            "key": f"sm_90/{p}/x",
            "dense": times(1.0),
            "routed": times(1.0),
            "ratio": times(r),
        }
        for p, kind, r in (("gather", "even", 1.3), ("gather", "one head", 0.5), ("weight_grad", "even", 0.9))
    ]
    row = {"shape": "x", "products": products}
    write_gpu(tmp_path, [*gpu_rows(), {"key": "forms/x", "status": "measured", "data": row, "id": "code device"}])
    report_gpu(tmp_path, refit=True)
    assert choice.measured() == {"sm_90/gather/x": "routed", "sm_90/weight_grad/x": "dense"}


@pytest.mark.parametrize("gone", ["ceilings/copy", "ceilings/matmul", "ceilings/core", "steps/profile"])
def test_a_refit_names_missing_rows(gone, tmp_path):
    write_gpu(tmp_path, [row for row in gpu_rows() if not row["key"].startswith(gone)])
    with pytest.raises(SpecError, match=gone):
        report_gpu(tmp_path, refit=True)


def test_constants_of_an_unknown_device_are_refused(measured):
    out, _ = measured
    with pytest.raises(SpecError, match="does not know 'cpu'"):
        report_gpu(out, refit=True)
