"""Which decoders have an equivalent Llama, and that its config.json describes the same decoder."""

import pytest
from pydantic import TypeAdapter

from headway.model.attention.grouped import GroupedConfig
from headway.model.attention.registry import AnyMechanism
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder
from headway.model.huggingface.llama import llama_config, llama_name, read_llama_config

MODEL = ModelConfig(width=32, layers=2, ffn_width=48, tied_embeddings=False, norm_eps=1e-6, init_std=0.1)


def attention(**values):
    return TypeAdapter(AnyMechanism).validate_python({"heads": 4, "head_dim": 8, **values})


def config_of(**values):
    return llama_config(MODEL, attention(**values), vocab_size=50, seq_len=16, eos_token_id=3)


@pytest.mark.parametrize(
    "values",
    [
        {"type": "mha"},
        {"type": "mqa", "rope_base": 500.0},
        {"type": "gqa", "kv_heads": 2, "windows": [None, None], "window_pattern": []},
        {"type": "gqa", "kv_heads": 2, "group_sizes": [2, 2], "orthogonality": 0.1},
        {"type": "gqa", "kv_heads": 2, "head_dim": 6},
        {"type": "sqa", "heads": 8, "kv_heads": 2, "kept": 2},
        {"type": "wgqa", "kv_heads": 2, "weights": "row"},
    ],
)
def test_a_config_reads_back_as_the_same_decoder(values):
    shape = read_llama_config(config_of(**values))
    assert shape.model == MODEL.model_copy(update={"vocab_size": 50})
    given = attention(**values)
    assert isinstance(given, GroupedConfig)
    assert (shape.attention.heads, shape.attention.groups) == (4, given.groups)
    assert (shape.attention.head_dim, shape.attention.rope_base) == (given.head_dim, given.rope_base)
    assert (shape.seq_len, shape.eos_token_id) == (16, 3)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("type", {"type": "rgqa", "kv_heads": 2, "top_k": 1}),
        ("type", {"type": "dynamic_gqa", "kv_heads": 2, "freeze_after_tokens": 0}),  # equal groups before training
        ("qk_norm", {"type": "mha", "qk_norm": True}),
        ("qk_norm", {"type": "wgqa", "kv_heads": 2, "qk_norm": True}),
        ("gate", {"type": "mha", "gate": "headwise"}),
        ("windows", {"type": "mqa", "windows": 16}),
        ("windows", {"type": "gqa", "kv_heads": 2, "windows": [None, 4]}),
        ("window_pattern", {"type": "mqa", "window_pattern": [None, 4]}),
        ("group_sizes", {"type": "gqa", "kv_heads": 2, "group_sizes": [1, 3]}),
        ("rope_fraction", {"type": "mha", "rope_fraction": 0.5}),
        ("rope_fraction", {"type": "mha", "rope_fraction": 0.0}),
    ],
)
def test_features_without_a_llama_counterpart_are_refused_with_two_ways_out(key, values):
    with pytest.raises(ValueError, match=rf"^attention\.{key}: .*use the format safetensors.*, or a run (of|with) "):
        config_of(**values)


def test_every_tensor_of_a_decoder_has_a_name_of_its_own():
    decoder = Decoder(MODEL, attention(type="gqa", kv_heads=2), vocab_size=50, seed=0)
    names = [llama_name(name) for name in decoder.state_dict()]
    assert len(set(names)) == len(names) == 3 + 2 * 9
    assert llama_name("blocks.11.attn.w_o") == "model.layers.11.self_attn.o_proj.weight"
