"""`headway doctor` says what is there, what is used instead of what is not, and whether anything needed is missing."""

from __future__ import annotations

import json
from importlib import metadata, util
from pathlib import Path

import pytest

from headway.launcher.cli import doctor as module
from headway.launcher.cli.doctor import Fact, doctor, inspect_machine


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
    pretend_modules(monkeypatch, "flash_attn", "flash_attn_interface")
    assert module._flash_attention().found == "FlashAttention-3, for speed.attention: fa3"


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
    import torch

    names = [each.name for each in inspect_machine()]
    if torch.cuda.is_available():
        assert "cuda:0" in names
    else:
        assert "gloo" in fact("cuda").use


def test_levers_of_speed_say_what_is_used_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_modules(monkeypatch, "flash_attn")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delattr("torch.nn.functional.linear_cross_entropy", raising=False)
    compiled, loss = module._levers()
    assert compiled.state == loss.state == "absent"
    assert "use none" in compiled.use and loss.use == "chunked, Headway's own, is used"
    assert module._liger().state == "absent" and "chunked loss" in module._liger().use
    assert module._flash_attention().state == "absent"  # FlashAttention-2 is not used
    pretend_modules(monkeypatch, "liger_kernel")
    monkeypatch.setenv("CXX", "sh")  # any program that is there
    monkeypatch.setattr("torch.nn.functional.linear_cross_entropy", None, raising=False)
    assert [each.state for each in (*module._levers(), module._liger())] == ["ok", "ok", "ok"]
