"""Legal values of the `attention` section of a spec, and the messages for illegal ones."""

import ast
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from headway.model.attention.registry import MECHANISMS, AnyMechanism

ADAPTER = TypeAdapter(AnyMechanism)
GQA = {"type": "gqa", "heads": 8, "kv_heads": 2, "head_dim": 16}
RGQA = {**GQA, "type": "rgqa", "top_k": 1}
SWITCHHEAD = {"type": "switchhead", "kv_heads": 2, "head_dim": 16, "experts": 4, "top_k": 2}


@pytest.mark.parametrize("fields", [GQA, RGQA, SWITCHHEAD, {"type": "mha", "heads": 8, "head_dim": 16}])
def test_the_type_names_the_config(fields):
    config = ADAPTER.validate_python(fields)
    assert type(config) is MECHANISMS[fields["type"]]


def test_every_config_with_a_name_is_in_the_registry_under_it():
    """Read from the sources: each `type: Literal["name"] = "name"` of a class in model/attention."""
    written = {}
    for file in (Path(__file__).parents[3] / "model" / "attention").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
                kinds = [f.value for f in fields if isinstance(f.target, ast.Name) and f.target.id == "type"]
                written |= {k.value: (file.stem, node.name) for k in kinds if isinstance(k, ast.Constant)}
    assert {n: (c.__module__.rpartition(".")[2], c.__name__) for n, c in MECHANISMS.items()} == written
    assert {"gqa", "mha", "mqa", "rgqa"} <= written.keys() and len(written) >= 12
    choices = ADAPTER.json_schema()["discriminator"]["mapping"]
    assert set(choices) == set(MECHANISMS)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({**GQA, "kv_heads": 3}, ["kv_heads: ", "8 query heads", "kv_heads 2 or 4"]),
        ({**GQA, "kv_heads": 16}, ["kv_heads: ", "kv_heads 8", "heads 16"]),
        ({**GQA, "head_dim": 9}, ["rope_fraction: ", "9 channels", "head_dim 10", "8 channels"]),
        ({**GQA, "head_dim": 10, "rope_fraction": 0.25}, ["rope_fraction: ", "2.5 channels", "rope_fraction 0.2 "]),
        ({**RGQA, "top_k": 5}, ["top_k: ", "5 heads selected of 4", "top_k 1 to 4", "heads 10"]),
        ({**RGQA, "top_k": 4, "always_on": 1}, ["top_k: ", "of 3", "top_k 1 to 3", "heads 10"]),
        ({**RGQA, "always_on": 4}, ["always_on: ", "always_on 3", "heads 10"]),
        ({**RGQA, "gate": "renorm"}, ["gate: ", "no gradient", "sigmoid2", "detached_renorm", "top_k 2"]),
        ({**SWITCHHEAD, "top_k": 5}, ["top_k: ", "5 experts selected of 4", "top_k 1 to 4", "experts 5"]),
    ],
)
def test_an_impossible_shape_is_refused_with_the_field_the_reason_and_two_ways_out(fields, words):
    with pytest.raises(ValidationError) as refusal:
        ADAPTER.validate_python(fields)
    (error,) = refusal.value.errors()
    message = error["msg"].removeprefix("Value error, ")
    assert message.startswith(words[0])
    for word in words[1:]:
        assert word in message


@pytest.mark.parametrize(
    "fields",
    [{**GQA, "type": "gqqa"}, {**GQA, "topk": 1}, {**GQA, "heads": "8"}, {**GQA, "heads": 0}, {**RGQA, "gate": "relu"},
     {"type": "mha", "heads": 8, "kv_heads": 2, "head_dim": 16}],
)  # fmt: skip
def test_unknown_names_and_wrong_types_are_refused(fields):
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(fields)


@pytest.mark.parametrize("rope_fraction", [0.0, 0.5, 1.0])
def test_rotated_channels(rope_fraction):
    config = ADAPTER.validate_python({**GQA, "rope_fraction": rope_fraction})
    assert config.rotated == int(16 * rope_fraction)
