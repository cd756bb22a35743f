"""Specs with `attention.value_residual` and `attention.share_kv`: what is refused, legal stages, older records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headway.launcher.base.errors import SpecError
from headway.launcher.run.run_dir import identity
from headway.launcher.spec.layouts import legal_context, legal_pipeline, legal_tensor
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec
from headway.model.attention.gqa import GqaConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.config import ModelConfig
from headway.model.convert.decoder import check_conversion
from headway.model.huggingface.llama import llama_config

TINY = Path(__file__).parents[3] / "yaml" / "base" / "tiny.yaml"
GQA = "{type: gqa, heads: 8, kv_heads: 2, head_dim: 8}"
SHARED, MIXING = "attention.share_kv=2", "attention.value_residual=learned"


def spec(*overrides: str) -> Spec:
    return load_spec(TINY, [f"attention={GQA}", *overrides]).spec


def refused(*overrides: str, of: str = GQA) -> str:
    with pytest.raises(SpecError) as caught:
        load_spec(TINY, [f"attention={of}", *overrides])
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([SHARED, MIXING], ["attention.share_kv: 2 layers have one V", "use share_kv 1, or value_residual none"]),
        (
            ["attention.share_kv=3"],
            ["attention.share_kv: 3 layers cannot share", "there are 2; use share_kv 2 at most"],
        ),
        (["attention.share_kv=0"], ["attention.share_kv", ">= 1"]),
        (["attention.value_residual=half"], ["attention.value_residual", "none, fixed, learned"]),
        ([MIXING, "model.layers=1"], ["attention.value_residual: mixes values of later layers", "two or more layers"]),
        (
            [SHARED, "attention.window_pattern=[8, null]"],
            ["attention.share_kv: 2 layers have one KV cache", "use windows, or share_kv 1, or kinds of type mixed"],
        ),
        (
            [SHARED, "parallel.pipeline=2", "launch.processes=2"],
            [
                "parallel.pipeline: 2 stages for 1 pieces of the model",
                "(share_kv) lie in one stage with it; use parallel.pipeline 1, or attention without share_kv",
            ],
        ),
        (
            [MIXING, "parallel.pipeline=2", "launch.processes=2", "model.layers=8"],
            ["2 stages for 1 pieces", "use parallel.pipeline 1, or attention without value_residual"],
        ),
        (
            [SHARED, "model.type=encoder_decoder", "data.encoder_tokens=16"],
            ["attention.share_kv: has no encoder-decoder form", "leave attention.share_kv out, or use model.type"],
        ),
    ],
)
def test_what_has_no_form_is_refused_with_what_to_do(overrides: list[str], words: list[str]) -> None:
    text = refused(*overrides)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("mechanism", "words"),
    [
        ("{type: dynamic_gqa, heads: 8, kv_heads: 2, head_dim: 8, freeze_after_tokens: 0}", ["has no form of it"]),
        ("{type: rgqa, top_k: 1, heads: 8, kv_heads: 2, head_dim: 8}", ["gqa, mha, mqa, sqa"]),
        ("{type: wgqa, heads: 8, kv_heads: 2, head_dim: 8}", ["gqa, mha, mqa, sqa"]),
    ],
    ids=["dynamic_gqa", "rgqa", "wgqa"],
)
def test_other_mechanisms_refuse_both(mechanism: str, words: list[str]) -> None:
    for option, key in ((SHARED, "share_kv"), (MIXING, "value_residual")):
        text = refused(option, of=mechanism)
        assert f"attention.{key}: " in text and all(word in text for word in words), text


def test_stages_are_as_many_as_the_pieces_that_layers_form() -> None:
    assert legal_pipeline(spec(SHARED, "model.layers=8")) == [1, 2, 3, 4]
    assert legal_pipeline(spec("attention.share_kv=3", "model.layers=8")) == [1, 2, 3]
    assert legal_pipeline(spec(MIXING, "model.layers=8")) == [1]
    assert legal_pipeline(spec("model.layers=8")) == list(range(1, 9))
    assert spec(SHARED, "model.layers=8", "parallel.pipeline=4", "launch.processes=4").parallel.pipeline == 4


def test_tensor_and_context_ranks_are_those_of_plain_attention() -> None:
    for option in (SHARED, MIXING):
        ours, theirs = spec(option), spec()
        assert legal_tensor(ours) == legal_tensor(theirs) and legal_context(ours) == legal_context(theirs)


def test_errors_of_kinds_name_their_keys() -> None:
    kinds = f"kinds={{a: {GQA[:-1]}, share_kv: 2}}, b: {GQA}}}"
    with pytest.raises(SpecError, match=r"attention\.kinds\.a\.share_kv: 2 layers cannot share keys and values, as"):
        load_spec(TINY, ["attention.type=mixed", f"attention.{kinds}", "attention.pattern=[a, b]"])


def test_an_option_of_a_kind_with_too_few_layers_says_that_they_are_those_of_the_kind() -> None:
    for option, words in (
        ("share_kv: 2", "as there is 1 of kind a; use share_kv 1 at most, or 2 layers of kind a in the pattern"),
        (
            "value_residual: fixed",
            "there is one layer of kind a; use value_residual none, or two or more layers of kind",
        ),
    ):
        kinds = f"kinds={{a: {GQA[:-1]}, {option}}}, b: {GQA}}}"
        with pytest.raises(SpecError, match=words):
            load_spec(TINY, ["attention.type=mixed", f"attention.{kinds}", "attention.pattern=[a, b]"])


def test_older_records_are_the_same_runs(tmp_path: Path) -> None:
    """A record without the new keys is that of plain attention, also in kinds of mixed layers."""
    mixed = load_spec(
        TINY, ["attention.type=mixed", f"attention.kinds={{a: {GQA}, b: {GQA}}}", "attention.pattern=[a, b]"]
    ).spec
    for now in (spec(), mixed):
        today = now.model_dump(mode="json")
        older: dict[str, Any] = now.model_dump(mode="json")
        for section in (older["attention"], *older["attention"].get("kinds", {}).values()):
            section.pop("share_kv", None)
            section.pop("value_residual", None)
        assert older != today and identity(older) == identity(today)
    assert identity(spec(SHARED).model_dump(mode="json")) != identity(spec().model_dump(mode="json"))
    kinds = f"attention.kinds={{a: {GQA}, b: {GQA}}}"
    words = ["attention.type=mixed", kinds, "attention.pattern=[a, b]", "model.layers=4"]
    other = load_spec(TINY, [*words, "attention.kinds.a.share_kv=2"]).spec
    same = other.model_dump(mode="json")
    same["attention"]["kinds"]["a"]["share_kv"] = 1
    assert identity(other.model_dump(mode="json")) != identity(same)


@pytest.mark.parametrize("option", [{"share_kv": 2}, {"value_residual": "fixed"}])
def test_neither_a_llama_nor_another_mechanism_has_such_layers(option: dict[str, Any]) -> None:
    (name,) = option
    model = ModelConfig(width=16, layers=4, ffn_width=24)
    ours, plain = (GqaConfig(heads=4, kv_heads=2, head_dim=4, **fields) for fields in (option, {}))
    with pytest.raises(ValueError, match=rf"attention\.{name}: .*use the format safetensors, .* a run with {name} "):
        llama_config(model, ours, vocab_size=32, seq_len=16, eos_token_id=None)
    routed = RgqaConfig(heads=4, kv_heads=2, head_dim=4, top_k=2)
    for source, target in ((ours, plain), (plain, ours), (ours, routed)):
        with pytest.raises(ValueError, match=rf"attention\.{name}: .*; use a (source|target) without {name}"):
            check_conversion(model, source, target, "mean")
