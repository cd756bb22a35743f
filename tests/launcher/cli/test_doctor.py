"""`headway doctor` says what is there, what is used instead of what is not, and whether anything needed is missing."""

from __future__ import annotations

import json
import tomllib
from importlib import metadata, util
from pathlib import Path

import pytest
import torch

from headway.launcher.cli import doctor as module
from headway.launcher.cli.doctor import Fact, doctor, inspect_machine
from headway.launcher.plan import precision
from headway.launcher.plan.planner import plan


def fact(name: str, facts: list[Fact] | None = None) -> Fact:
    return next(each for each in facts or inspect_machine() if each.name == name)


def pretend_modules(monkeypatch: pytest.MonkeyPatch, *present: str) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: object() if name in present else None)


def pretend_versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    """Every package is there, at a version that fits, but for `changed`; None: not installed."""
    fitting = {
        "torch": "2.13.0",
        "deepspeed": "0.19.8",
        "megatron-core": "0.16.1",
        "mosaicml-streaming": "0.13.0",
        "pydantic": "2.14.3",
        "filelock": "3.20.0",
        "zstd": "1.5.7.3",
        "urllib3": "2.8.0",
    }

    def version(name: str) -> str:
        found = changed.get(name.replace("-", "_"), fitting.get(name, "99.0"))
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)


def test_a_complete_machine_is_ready(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretend_versions(monkeypatch)
    assert doctor() == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "ready to train" and "deepspeed" in out and "GiB" in out


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_versions(monkeypatch, deepspeed=None)
    assert doctor() == 1
    out = capsys.readouterr().out
    assert "!!  deepspeed" in out and "pip install -c constraints.txt -e ." in out
    assert out.splitlines()[-1] == "not ready: see deepspeed"


def test_a_version_out_of_range_is_named_with_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("packaging")
    pretend_versions(monkeypatch, deepspeed="0.17.6")
    found = fact("deepspeed")
    assert found.state == "wrong" and "0.17.6, but deepspeed<0.20,>=0.19 is needed" in found.found


def test_json_holds_every_fact(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretend_versions(monkeypatch)
    assert doctor(as_json=True) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ready"] is True
    names = [each["name"] for each in answer["facts"]]
    assert {"python", "cores", "memory", "disk", "gcc", "torch", "apex", "triton", "flash-attn"} <= set(names)
    assert len(names) == len(set(names))


def test_extras_are_listed_with_what_is_missing_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_modules(monkeypatch, "wandb")
    found = {fact.name: fact for fact in module._extras()}
    assert list(found) == ["wandb", "mlflow-skinny", "transformers", "lm-eval"]
    assert found["wandb"].state == "ok" and found["lm-eval"].state == "absent"
    assert found["mlflow-skinny"].use.startswith("tracking.mlflow is refused; pip install")
    listed = tomllib.loads((Path(__file__).resolve().parents[3] / "pyproject.toml").read_text())["project"]
    for extra, (_, distribution, _) in module._EXTRAS.items():
        assert any(line.startswith(distribution) for line in listed["optional-dependencies"][extra])


def test_apex_is_nvidias_only_with_its_fused_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_modules(monkeypatch, "apex")
    other = module._apex()
    assert other.state == "absent" and "another project" in other.found and "PyTorch are used" in other.use
    pretend_modules(monkeypatch, "apex", "amp_C", "fused_layer_norm_cuda")
    assert module._apex().state == "ok"
    pretend_modules(monkeypatch)
    assert module._apex() == Fact("apex", "absent", "no NVIDIA apex", "the fused operations of PyTorch are used")


def test_optional_accelerators_say_what_is_used_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_modules(monkeypatch)
    assert (
        "PyTorch are used" in module._triton().use and "scaled_dot_product_attention" in module._flash_attention().use
    )
    assert module._linear_attention().use == "Headway's own form of the gated delta rule is used"
    pretend_modules(monkeypatch, "flash_attn", "flash_attn_interface", "fla")
    assert module._flash_attention().found == "FlashAttention-3, for speed.attention: fa3"
    assert module._linear_attention().state == "ok" and "for speed.delta" in module._linear_attention().found


def test_no_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert module._compiler().state == "absent"


@pytest.mark.parametrize(("text", "cores"), [("150000 100000\n", 1.5), ("max 100000\n", None), ("", None)])
def test_a_containers_core_limit_is_read(tmp_path: Path, text: str, cores: float | None) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(text)
    assert module._cpu_quota(file) == cores
    assert module._cpu_quota(tmp_path / "absent") is None


def test_devices_are_listed_or_what_is_used_without_any() -> None:
    names = [each.name for each in inspect_machine()]
    if torch.cuda.is_available():
        assert "cuda:0" in names
    else:
        assert "gloo" in fact("cuda").use
        assert "of the time of fp32, measured now" in fact("bf16").use


def test_levers_of_speed_say_what_is_used_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_modules(monkeypatch, "flash_attn")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delattr("torch.nn.functional.linear_cross_entropy", raising=False)
    compiled, loss = module._levers()
    assert compiled.state == loss.state == "absent"
    assert "use none, which auto is on the CPU" in compiled.use and loss.use == "chunked, Headway's own, is used"
    assert module._liger().state == "absent" and "chunked loss" in module._liger().use
    assert module._flash_attention().state == "absent"  # FlashAttention-2 is not used
    pretend_modules(monkeypatch, "liger_kernel")
    monkeypatch.setenv("CXX", "sh")  # any program that is there
    monkeypatch.setattr("torch.nn.functional.linear_cross_entropy", None, raising=False)
    assert [each.state for each in (*module._levers(), module._liger())] == ["ok", "ok", "ok"]


def test_the_default_of_speed_compile_is_shown_and_needs_a_compiler_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CXX", "sh")
    assert module._levers()[0].found.startswith("auto is none on the CPU; elementwise and block can compile with ")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("CC", "sh")
    pretend_modules(monkeypatch, "triton")
    assert module._levers()[0].state == "ok" and "auto is elementwise on a GPU" in module._levers()[0].found
    pretend_modules(monkeypatch)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    compiled = module._levers()[0]
    assert compiled.state == "wrong" and "needs Triton and gcc" in compiled.found
    assert "set speed.compile: none" in compiled.use


def test_fp8_is_shown_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert [(f.state, f.found) for f in module._fp8()] == [
        ("absent", "fp8 runs on NVIDIA GPUs, and this run is on cpu")
    ]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for capability, state in (((8, 0), "absent"), ((8, 9), "ok"), ((9, 0), "ok")):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda found=capability: found)
        assert [f.state for f in module._fp8()] == [state]


# ---------------------------------------------------------------- bf16 on the CPU


def pretend_cpu(monkeypatch: pytest.MonkeyPatch, *, amx: bool, avx512_bf16: bool, bf16_s: float) -> None:
    """A CPU with these instructions, whose fp32 products take 1 ms."""
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(precision, "_seconds", lambda pair: bf16_s if pair[0].dtype == torch.bfloat16 else 1e-3)


def test_bf16_is_called_fast_where_it_is_measured_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cpu(monkeypatch, amx=True, avx512_bf16=True, bf16_s=0.25e-3)
    found, use = precision.bf16_on_cpu()
    assert found == "the CPU has AMX and AVX512-BF16"
    assert use.startswith("precision bf16 is faster here: matrix products in bf16 take 0.25 of the time of fp32")
    pretend_cpu(monkeypatch, amx=False, avx512_bf16=False, bf16_s=3e-3)
    found, use = precision.bf16_on_cpu()
    assert found == "the CPU has no instructions for bf16 (AVX512-BF16 or AMX)"
    assert use.startswith("precision bf16 works but is not faster here: matrix products in bf16 take 3.00 of the time")


def test_instructions_alone_do_not_make_bf16_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cpu(monkeypatch, amx=False, avx512_bf16=True, bf16_s=0.95e-3)
    found, use = precision.bf16_on_cpu()
    assert found == "the CPU has AVX512-BF16" and "works but is not faster here" in use and "0.95" in use
    monkeypatch.delattr("torch.cpu._is_avx512_bf16_supported")
    monkeypatch.delattr("torch.cpu._is_amx_tile_supported")
    assert precision.bf16_instructions() == []


@pytest.mark.parametrize(
    ("overrides", "bf16_s", "noted"),
    [
        (["launch.device=cpu"], 0.25e-3, True),
        (["launch.device=cpu"], 0.95e-3, False),
        (["launch.device=cpu", "parallel.precision=bf16"], 0.25e-3, False),
        (["launch.device=cuda"], 0.25e-3, False),
    ],
)
def test_a_plan_for_the_cpu_tells_of_a_fast_bf16(
    overrides: list[str],
    bf16_s: float,
    noted: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend_cpu(monkeypatch, amx=False, avx512_bf16=True, bf16_s=bf16_s)
    assert plan(Path(__file__).parents[3] / "yaml/base/tiny.yaml", overrides) == 0
    text = capsys.readouterr().out
    assert ("parallel.precision=bf16 may be faster on this CPU, which has AVX512-BF16" in text) is noted
    assert ("take 0.25 of the time of fp32" in text) is noted


def test_precisions_take_turns_and_one_slow_round_changes_nothing() -> None:
    order = list[torch.dtype]()

    def clock(pair: tuple[torch.Tensor, torch.Tensor]) -> float:
        order.append(pair[0].dtype)
        busy = 50.0 if len(order) in (5, 9) else 1.0  # another process takes the cores
        return busy * (2e-3 if pair[0].dtype == torch.float32 else 1e-3)

    assert precision.bf16_ratio(clock) == pytest.approx(2.0)
    assert order == [torch.float32, torch.bfloat16] * (1 + precision.ROUNDS)


def test_the_measurement_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(precision.time, "perf_counter", lambda: now[0])

    def slow(pair: tuple[torch.Tensor, torch.Tensor]) -> float:
        now[0] += 0.2
        return 0.2

    assert precision.bf16_ratio(slow) == pytest.approx(1.0)
    assert now[0] <= 0.4 + 1.0 + 0.4 + 1e-6  # the first products, the limit, the last round
