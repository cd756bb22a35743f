"""Specs whose layers differ (`attention.type: mixed`): what is accepted, dropped and refused, and where it points."""

from __future__ import annotations

from pathlib import Path

import pytest

from headway.launcher.base.errors import SpecError
from headway.launcher.run.identity import mechanism_identity
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec

TINY = Path(__file__).parents[3] / "yaml" / "base" / "tiny.yaml"
LOCAL = "{type: gqa, heads: 8, kv_heads: 2, head_dim: 8, windows: 16}"
MIXED = f"""attention:
  type: mixed
  kinds:
    local: {LOCAL}
    routed: {{type: rgqa, heads: 8, kv_heads: 2, head_dim: 8, top_k: 1}}
  pattern: [local, routed]
"""


def spec_of(folder: Path, text: str, *overrides: str) -> Spec:
    file = folder / "spec.yaml"
    file.write_text(f"base: {TINY}\n{text}")
    return load_spec(file, overrides).spec


def refused(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        spec_of(folder, text, *overrides)
    return str(caught.value)


def test_kinds_are_reached_by_name_and_keys_of_the_base_are_shared_or_dropped(tmp_path):
    spec = spec_of(tmp_path, MIXED, "attention.kinds.routed.top_k=2", "attention.kinds.local.windows=9")
    assert [spec.attention.layer(i, 2).model_dump().get("top_k") for i in range(2)] == [None, 2]
    assert spec.attention.layer(0, 2).model_dump()["windows"] == 9
    assert set(spec.model_dump()["attention"]) == {"type", "heads", "kv_heads", "head_dim", "kinds", "pattern"}
    short = "attention: {type: mixed, kinds: {a: {type: gqa}, b: {type: rgqa, top_k: 1}}, pattern: [a, b]}\n"
    spec = spec_of(tmp_path, short, "attention.head_dim=10")
    assert [spec.attention.layer(i, 2).head_dim for i in range(2)] == [10, 10]


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        ("attention.kinds.local.windws=9", "argument", "attention.kinds.local.windws: unknown key. Did you mean"),
        ("attention.kinds.local.window=9", "argument", "only of: namoh. Did you mean attention.kinds.local.windows?"),
        ("attention.kinds.routed.top_k=9", "argument", "attention.kinds.routed.top_k: 9 heads selected of 4"),
        ("attention.kinds.local.windows=99", "", "attention.kinds.local.windows: a window of 99 tokens"),
        ("attention.kinds.local.type=gqaa", "argument", "attention.kinds.local.type: 'gqaa' is not a known type"),
        ("attention.pattern=[local, routed, local]", "argument", "attention.pattern: 3 entries for 2 layers"),
        ("parallel.tensor=8", "", "attention.w_q in layer 0 has 2 whole pieces for 8 ranks"),
        ("model.type=encoder_decoder", "", "attention.type: mixed has no encoder-decoder form"),
        ("model.positions=relative_xl", "", "relative_xl has no form for attention.type"),
    ],
)
def test_an_error_names_the_key_of_the_kind(tmp_path, change, where, message):
    text = refused(tmp_path, MIXED, change, "launch.processes=8" if "tensor" in change else "launch.processes=1")
    assert message in text and text.startswith(where)


def test_a_list_is_answered_with_the_form_for_it(tmp_path):
    text = refused(tmp_path, f"attention: [{LOCAL}, {LOCAL}]\n")
    assert "attention: expected a mapping" in text and "Use mixed, with the mechanisms in attention.kinds" in text
    assert "Use mixed" in refused(tmp_path, "attention.type: layerwise\n")


def test_a_kind_can_come_from_another_package_and_is_part_of_the_identity(tmp_path, install, mechanism_source):
    install("our_mechanism", mechanism_source("our_mechanism"))
    spec = spec_of(
        tmp_path,
        MIXED.replace(LOCAL, "{type: our_mechanism, heads: 8, kv_heads: 2, head_dim: 8}"),
    )
    assert mechanism_identity(spec)["mechanism package"] == "outside 1.0"
    assert mechanism_identity(spec_of(tmp_path, MIXED)) == {}


def test_positions_of_kinds_are_checked_one_by_one(tmp_path):
    text = refused(
        tmp_path,
        MIXED.replace("windows: 16", "rope_base: 500.0"),
        "model.positions=learned",
        "model.max_positions=64",
    )
    assert "attention.kinds.local.rope_base: has no effect with model.positions learned" in text
