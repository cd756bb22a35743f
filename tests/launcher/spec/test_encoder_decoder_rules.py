"""Rules between `model.type: encoder_decoder` and the other sections."""

from __future__ import annotations

from pathlib import Path

import pytest

from headway.launcher.base.errors import SpecError
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec

FILE = Path(__file__).parents[3] / "yaml" / "base" / "encoder-decoder.yaml"


def loaded(*overrides: str) -> Spec:
    return load_spec(FILE, overrides).spec


def test_the_shipped_spec_is_legal_and_its_defaults_are():
    spec = loaded()
    assert spec.model.encoder_blocks == 2 and spec.data.encoder_tokens == 16
    assert loaded("model.encoder_layers=null", "model.layers=3").model.encoder_blocks == 3
    tensor = loaded("parallel.tensor=2", "launch.processes=2")
    assert tensor.parallel.tensor == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.encoder_tokens=null"], r"data\.encoder_tokens: missing.*use for example data\.encoder_tokens 15"),
        (["data.encoder_tokens=31"], r"data\.encoder_tokens: 31 leave the decoder none of the 31 tokens"),
        (
            ["model.type=decoder", "model.encoder_layers=null", "model.positions=rope"],
            r"data\.encoder_tokens: 16 has no",
        ),
        (
            ["attention={type: rgqa, heads: 8, kv_heads: 2, head_dim: 8, top_k: 1}"],
            r"attention\.type: rgqa has no encoder",
        ),
        (
            ["attention={type: moh, heads: 8, kv_heads: 8, head_dim: 8, shared_heads: 1, top_k: 4}"],
            r"attention\.type: moh has no encoder-",
        ),
        (["attention.windows=4"], r"attention\.windows: windows count keys before a query"),
        (["attention.qk_norm=true"], r"attention\.qk_norm: true, but scores of model\.positions relative_t5"),
        (["attention.rope_base=500"], r"attention\.rope_base: has no effect with model\.positions relative_t5"),
        (
            ["parallel.pipeline=2", "launch.processes=2"],
            r"parallel\.pipeline: 2 has no form for model\.type encoder_dec",
        ),
        (["parallel.context=2", "launch.processes=2"], r"parallel\.context: 2 has no form for model\.type encoder_dec"),
        (
            ["parallel.tensor=2", "parallel.sequence_parallel=true", "launch.processes=2"],
            r"parallel\.sequence_parallel: 16 tokens of the source and 15 of the target",
        ),
        (["speed.compile=block"], r"speed\.compile: block has no form.*use speed\.compile auto or none or elementwise"),
        (["speed.attention=math"], r"speed\.attention: math has no form"),
        (["speed.matmul=fp8", "parallel.precision=bf16"], r"speed\.matmul: fp8 has no form"),
        (["model.branch_start=zero"], r"branch_start: zero is measured for decoders only"),
        (["train.micro_batch=auto"], r"train\.micro_batch: auto is planned and measured for decoders only"),
    ],
    ids=lambda value: value[0].split("=")[0] if isinstance(value, list) else "",
)
def test_what_has_no_form_is_refused(overrides, message):
    with pytest.raises(SpecError, match=message):
        loaded(*overrides)


def test_qk_norm_is_legal_with_rotary_positions():
    spec = loaded("model.positions=rope", "attention.qk_norm=true")
    assert spec.attention.layer(0, spec.model.layers).qk_norm
