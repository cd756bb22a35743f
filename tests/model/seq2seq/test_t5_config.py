"""config.json of published T5 checkpoints: all keys are known, and the parameters are as many as they have."""

from __future__ import annotations

from typing import Any

import pytest

from headway.model.cost import account
from headway.model.huggingface.t5 import read_t5_config

COMMON: dict[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_kv": 64,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "task_specific_params": {"summarization": {"num_beams": 4, "prefix": "summarize: "}},
    "vocab_size": 32128,
}
SECOND = {
    "classifier_dropout": 0.0,
    "dense_act_fn": "gelu_new",
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "relative_attention_max_distance": 128,
    "tie_word_embeddings": False,
    "transformers_version": "4.23.1",
    "use_cache": True,
}
PUBLISHED = {
    "t5-small": ({"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8}, 60_506_624),
    "t5-base": ({"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}, 222_903_552),
    "flan-t5-small": ({**SECOND, "d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6}, 76_961_152),
    "flan-t5-base": ({**SECOND, "d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12}, 247_577_856),
    "flan-t5-xl": ({**SECOND, "d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32}, 2_849_757_184),
}
"""Shape of each, and the number of parameters that the Hugging Face hub states for its safetensors."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_parameters_are_those_published(name):
    shape, parameters = PUBLISHED[name]
    found = read_t5_config(COMMON | shape)
    cost = account(found.model, found.attention, vocab_size=found.vocab_size, seq_len=2, encoder_tokens=1)
    assert cost.num_params == parameters
    assert found.model.scaled_head == found.model.tied_embeddings == (not name.startswith("flan"))
    assert (found.model.mlp, found.eos_token_id, found.seq_len) == ("geglu" if "flan" in name else "relu", 1, 512)
