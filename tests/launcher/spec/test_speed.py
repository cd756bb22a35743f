"""Levers of speed in a spec: their defaults, what rules them out, and that a run may go on with others."""

from typing import Any

import pytest

from headway.launcher.run.run_dir import identity
from headway.launcher.spec.spec import Spec
from headway.launcher.spec.speed import why_not_speed

SPEC: dict[str, Any] = {
    "model": {"width": 32, "layers": 2, "ffn_width": 48, "vocab_size": 64},
    "attention": {"type": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8},
    "data": {
        "seq_len": 32,
        "source": {"type": "synthetic", "task": "mqar", "vocab_size": 64, "pairs": 4, "queries": 4},
    },
    "optimizer": {"lr": 1e-3},
    "train": {"tokens": 4096, "global_batch": 4, "micro_batch": 2},
}


def spec(speed: dict[str, str] | None = None, **sections: dict[str, Any]) -> Spec:
    merged = {key: {**SPEC.get(key, {}), **sections.get(key, {})} for key in {*SPEC, *sections}}
    return Spec.model_validate({**merged, "speed": speed or {}})


def test_without_the_section_nothing_is_changed():
    defaults = {"compile": "auto", "attention": "auto", "norm": "torch", "loss": "chunked", "matmul": "none"}
    assert spec().speed.model_dump() == defaults | {"delta": "auto"}


def test_fp8_products_need_bf16_and_whole_matrices():
    assert spec({"matmul": "fp8"}, parallel={"precision": "bf16"}).speed.matmul == "fp8"
    with pytest.raises(ValueError, match=r"speed\.matmul: fp8 replaces products in bf16.* parallel\.precision bf16"):
        spec({"matmul": "fp8"}, parallel={"precision": "fp32"})
    with pytest.raises(ValueError, match=r"parallel\.zero 3.*or parallel\.zero 1 or 2"):
        spec({"matmul": "fp8"}, parallel={"precision": "bf16", "zero": 3})


def test_an_unknown_lever_is_an_error():
    with pytest.raises(ValueError, match=r"speed\.optimizer"):
        spec({"optimizer": "fused"})


@pytest.mark.parametrize("loss", ["torch", "liger"])
def test_a_cut_vocabulary_needs_the_chunked_loss(loss):
    with pytest.raises(
        ValueError, match=rf"speed.loss: {loss} knows no parts.*speed.loss chunked, or parallel.tensor 1"
    ):
        spec({"loss": loss}, parallel={"tensor": 2}, launch={"processes": 2})
    assert why_not_speed(spec({"loss": loss})) is None


def test_pytorchs_loss_is_for_fp32():
    with pytest.raises(ValueError, match=r"speed\.loss: torch returns .* bf16.* chunked or liger"):
        spec({"loss": "torch"}, parallel={"precision": "bf16"})
    assert spec({"loss": "liger"}, parallel={"precision": "bf16"}).speed.loss == "liger"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("attention", ["flash", "fa3"])
def test_flash_attention_needs_no_mask_for_documents(attention, packed):
    assert spec({"attention": attention}, data={"document_mask": packed}).speed.attention == attention


def test_windows_without_documents_are_masks_to_flash_but_not_to_flash_attention_3():
    windowed: dict[str, Any] = {"data": {"document_mask": False}, "attention": {"window_pattern": [None, 8]}}
    with pytest.raises(ValueError, match=r"speed\.attention: flash is given no windows.* data\.document_mask true"):
        spec({"attention": "flash"}, **windowed)
    assert spec({"attention": "fa3"}, **windowed).speed.attention == "fa3"
    packed = windowed | {"data": {"document_mask": True}}
    assert spec({"attention": "flash"}, **packed).speed.attention == "flash"


def test_a_run_may_go_on_with_other_levers():
    usual = spec().model_dump(mode="json")
    for chosen in ("elementwise", "block"):
        faster = spec({"compile": chosen}).model_dump(mode="json")
        assert identity(usual) == identity(faster) and usual != faster


ROUTED = {"type": "rgqa", "heads": 4, "kv_heads": 2, "head_dim": 8, "top_k": 1}
SPARSE = {"type": "block_sparse", "heads": 4, "kv_heads": 2, "head_dim": 8, "block": 4, "blocks": 1}


@pytest.mark.parametrize(
    ("sections", "use"),
    [
        ({"launch": {"device": "cuda"}}, "launch.device cpu"),
        ({"parallel": {"recompute": "block"}}, "parallel.recompute none"),
        ({"parallel": {"recompute": "selective"}}, "parallel.recompute none"),
        ({"parallel": {"tensor": 2}, "launch": {"processes": 2}}, "parallel.tensor 1"),
        ({"parallel": {"context": 2}, "launch": {"processes": 2}}, "parallel.context 1"),
        ({"parallel": {"pipeline": 2}, "launch": {"processes": 2}}, "parallel.pipeline 1"),
        ({"parallel": {"zero": 3}}, "parallel.zero 1 or 2"),
        ({"model": {"positions": "relative_xl"}}, "model.positions rope"),
        ({"attention": {**ROUTED, "projections": "grouped"}}, "attention.projections dense"),
        ({"attention": SPARSE}, "another attention.type"),
    ],
)
def test_compiled_blocks_are_refused_where_a_block_is_no_graph_of_its_own(sections, use):
    assert spec(**sections).speed.compile == "auto"
    with pytest.raises(ValueError, match=rf"speed\.compile: block .*use speed\.compile none or auto, or {use}"):
        spec({"compile": "block"}, **sections)


STATE = {"type": "gated_delta", "heads": 4, "head_dim": 8}
HYBRID = {"type": "mixed", "kinds": {"linear": STATE, "full": SPEC["attention"]}, "pattern": ["linear", "full"]}


@pytest.mark.parametrize("attention", [STATE, HYBRID])
def test_a_layer_with_a_state_is_neither_compiled_nor_shared_by_context_ranks(attention):
    legal = {**SPEC, "attention": attention}
    assert Spec.model_validate(legal | {"speed": {"delta": "torch"}}).speed.delta == "torch"
    with pytest.raises(ValueError, match=r"speed\.compile: block has no form of attention\.type gated_delta.*another"):
        Spec.model_validate(legal | {"speed": {"compile": "block"}})
    with pytest.raises(ValueError, match=r"parallel\.context: attention\.type gated_delta passes a state .*context 1"):
        Spec.model_validate(legal | {"parallel": {"context": 2}, "launch": {"processes": 2}})


def test_compiled_blocks_take_routed_layers_and_data_parallel_ranks():
    found = spec({"compile": "block"}, attention=ROUTED, launch={"processes": 2}, parallel={"zero": 2})
    assert found.speed.compile == "block"


@pytest.mark.parametrize("chosen", ["math", "flash", "cudnn", "fa3"])
def test_a_core_of_its_own_is_not_replaced(chosen):
    assert spec({"attention": "auto"}, attention=SPARSE).speed.attention == "auto"
    with pytest.raises(ValueError, match=r"does not reach attention\.type block_sparse.*use speed\.attention auto"):
        spec({"attention": chosen}, attention=SPARSE)
