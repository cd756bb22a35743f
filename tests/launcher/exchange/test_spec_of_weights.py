"""The spec beside imported and converted weights (`model.yaml`) has their attention with all its options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headway.launcher.exchange.import_hf import spec_text
from headway.launcher.run.run_dir import brief, flatten
from headway.launcher.spec.load import load_spec
from headway.model.huggingface import folder as hf

TINY = Path(__file__).parents[3] / "yaml" / "base" / "tiny.yaml"
NAMOH: dict[str, Any] = {"type": "namoh", "heads": 4, "head_dim": 6, "top_k": 2}
RGQA: dict[str, Any] = {"type": "rgqa", "heads": 6, "kv_heads": 2, "head_dim": 6, "top_k": 1}
OFF: dict[str, Any] = {"f_p": 0.0}
FORMS: dict[str, dict[str, Any]] = {
    "a router without parameters": NAMOH | {"router": {"type": "random"}},
    "a router with an option": RGQA | {"router": {"type": "two_layer", "hidden": 8}},
    "no balancing where it is the default": NAMOH | {"balance": OFF},
    "stages of k": RGQA | {"k_schedule": [{"until_tokens": 640, "top_k": 3}], "balance": {"loss_free_rate": 0.01}},
    "layers that share": {"type": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 6, "share_kv": 2, "windows": [None, 5]},
    "kinds": {
        "type": "mixed",
        "head_dim": 6,
        "kinds": {
            "state": {"type": "gated_delta", "heads": 2, "conv": 3},
            "routed": {"type": "namoh", "heads": 4, "top_k": 2, "balance": OFF, "router": {"type": "token_hash"}},
        },
        "pattern": ["state", "routed"],
    },
}


def config(attention: dict[str, Any]) -> hf.ExportedConfig:
    model = {"width": 24, "layers": 2, "ffn_width": 40, "vocab_size": 70}
    rest = {"source": "a test", "vocab_size": 70, "seq_len": 64, "tokens": 0, "bos_token_id": None, "files": {}}
    return hf.ExportedConfig.model_validate_json(
        json.dumps({"model": model, "attention": attention, "eos_token_id": None, **rest})
    )


@pytest.mark.parametrize("name", FORMS)
def test_the_spec_has_the_attention_of_the_weights(name: str, tmp_path: Path) -> None:
    given, folder = config(FORMS[name]), tmp_path / "weights"
    folder.mkdir()
    (folder / hf.CONFIG).write_text("{}")
    (folder / "model.yaml").write_text(spec_text(given, folder, folder))
    rest = load_spec(TINY).spec.model_dump(mode="json", exclude={"model", "attention", "init"})
    (tmp_path / "spec.json").write_text(json.dumps({"base": "weights/model.yaml", **rest}))
    assert load_spec(tmp_path / "spec.json").spec.attention == given.attention


def test_a_section_is_told_by_what_is_not_its_default() -> None:
    """Cards of models and the first lines of a run have no more than that."""
    found = flatten(brief(config(NAMOH | {"router": {"type": "random"}, "gate": "sigmoid"}).attention))
    router = {"type": "random", "noise": "none", "noise_scale": 1.0, "dropout": 0.0, "init_std": 0.02}
    assert found == NAMOH | {"gate": "sigmoid"} | {f"router.{key}": value for key, value in router.items()}
