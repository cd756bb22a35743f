"""Conversion from a T5 of Hugging Face transformers: config.json and tensor names. Also T5 v1.1 and FLAN-T5.

T5 leaves scores undivided by sqrt(D), shares one table of biases in each stack, and multiplies the input of a tied head
by width ** -0.5; Headway's encoder-decoder with `positions: relative_t5` does so too. Tensors are equal and differ in
name, and the tables of biases are transposed. Dropout of attention weights has no counterpart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headway.model.attention.gqa import MhaConfig
from headway.model.config import MlpType, ModelConfig
from headway.model.huggingface.values import number, truth, whole

ARCHITECTURE = "T5ForConditionalGeneration"

TOP = {
    "embedding": "shared.weight",
    "head": "lm_head.weight",
    "norm.gain": "decoder.final_layer_norm.weight",
    "encoder_norm.gain": "encoder.final_layer_norm.weight",
    "encoder_buckets.weight": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "decoder_buckets.weight": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
}
_ATTENTION = {"w_q": "q.weight", "w_k": "k.weight", "w_v": "v.weight", "w_o": "o.weight"}
_GATED = {"mlp.w_gate": "wi_0.weight", "mlp.w_up": "wi_1.weight", "mlp.w_down": "wo.weight"}
_PLAIN = {"mlp.w_up": "wi.weight", "mlp.w_down": "wo.weight"}

_COPIES = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
"""Further names of the embedding, which some checkpoints have."""
_UNUSED = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}
"""In old checkpoints; transformers skips it too."""

_MLPS: dict[str, tuple[MlpType, str]] = {
    "relu": ("relu", "relu"),
    "gelu": ("gelu", "gelu"),
    "gelu_new": ("gelu_tanh", "gelu_new"),
    "gated-gelu": ("geglu", "gelu_new"),
    "gated-gelu_new": ("geglu", "gelu_new"),
    "gated-silu": ("swiglu", "silu"),
}
"""feed_forward_proj -> our MLP, and the name of its function in transformers."""

# Keys of config.json that do not affect what the model computes in inference.
_WITHOUT_EFFECT = {
    "_attn_implementation_autoset",
    "_name_or_path",
    "bos_token_id",
    "classifier_dropout",
    "decoder_start_token_id",
    "dtype",
    "eos_token_id",
    "gradient_checkpointing",
    "initializer_factor",
    "n_positions",
    "output_past",
    "pad_token_id",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_READ = {
    "architectures",
    "d_ff",
    "d_kv",
    "d_model",
    "dense_act_fn",
    "dropout_rate",
    "feed_forward_proj",
    "is_encoder_decoder",
    "is_gated_act",
    "layer_norm_epsilon",
    "model_type",
    "num_decoder_layers",
    "num_heads",
    "num_layers",
    "relative_attention_max_distance",
    "relative_attention_num_buckets",
    "tie_word_embeddings",
    "vocab_size",
}


@dataclass(frozen=True, kw_only=True)
class T5Shape:
    """The contents of a config.json as our configs. `seq_len`: length of training, 512 if not given."""

    model: ModelConfig
    attention: MhaConfig
    vocab_size: int
    seq_len: int
    eos_token_id: int | None


def is_t5(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that it is of a T5."""
    return config.get("model_type") == "t5" or config.get("architectures") == [ARCHITECTURE]


def t5_name(name: str, model: ModelConfig) -> str:
    """T5's name of our tensor `name`."""
    match = re.fullmatch(r"(encoder|blocks)\.(\d+)\.(.+)", name)
    if match is None:
        return TOP[name]
    stack, block, own = match.groups()
    crossed = stack == "blocks"
    last = 2 if crossed else 1
    prefix = f"{'decoder' if crossed else 'encoder'}.block.{block}.layer"
    norms = {"attn_norm.gain": 0, "cross_norm.gain": 1, "mlp_norm.gain": last}
    if own in norms:
        return f"{prefix}.{norms[own]}.layer_norm.weight"
    part, _, matrix = own.partition(".")
    if part == "mlp":
        gated = model.mlp_matrices == 3
        return f"{prefix}.{last}.DenseReluDense.{(_GATED if gated else _PLAIN)[own]}"
    kind = "1.EncDecAttention" if part == "cross" else "0.SelfAttention"
    return f"{prefix}.{kind}.{_ATTENTION[matrix]}"


def is_transposed(name: str) -> bool:
    """Whether our tensor `name` is the transpose of T5's."""
    return name.endswith("_buckets.weight")


def is_surplus(name: str, tied: bool) -> bool:
    """Whether a tensor of a T5 is a copy of the embedding, which must equal it, or is not used."""
    return name in _COPIES or name in _UNUSED or (tied and name == TOP["head"])


def is_copy(name: str, tied: bool) -> bool:
    """Whether a tensor of a T5 must equal the embedding."""
    return is_surplus(name, tied) and name not in _UNUSED


def read_t5_config(config: Mapping[str, Any]) -> T5Shape:
    """The encoder-decoder equivalent to a T5's config.json.

    Raises ValueError, with the key, the reason and what to use, for other architectures and for features that ours does
    not have.
    """
    mlp = _checked(config)
    vocab_size = whole(config, "vocab_size", 32_128)
    layers = whole(config, "num_layers", 6)
    dropout = config.get("dropout_rate", 0.1)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout_rate: {dropout!r} is not a number from 0 to 1; correct it, or set 0")
    tied = truth(config, "tie_word_embeddings", True)
    model = ModelConfig(
        type="encoder_decoder",
        width=whole(config, "d_model", 512),
        layers=whole(config, "num_decoder_layers", layers),
        encoder_layers=layers,
        ffn_width=whole(config, "d_ff", 2048),
        mlp=mlp,
        vocab_size=vocab_size,
        tied_embeddings=tied,
        scaled_head=tied,
        positions="relative_t5",
        relative_buckets=whole(config, "relative_attention_num_buckets", 32),
        relative_max_distance=whole(config, "relative_attention_max_distance", 128),
        norm_eps=number(config, "layer_norm_epsilon", 1e-6),
        dropout=float(dropout),
        dropout_places=("embedding", "branches", "hidden", "head"),
    )
    eos = config.get("eos_token_id", 1)
    return T5Shape(
        model=model,
        attention=MhaConfig(heads=whole(config, "num_heads", 8), head_dim=whole(config, "d_kv", 64), rope_fraction=0.0),
        vocab_size=vocab_size,
        seq_len=whole(config, "n_positions", 512),
        eos_token_id=eos if type(eos) is int and 0 <= eos < vocab_size else None,
    )


def _checked(config: Mapping[str, Any]) -> MlpType:
    """The MLP. Raises ValueError if config.json describes another architecture, or a T5 with additional features."""
    architectures, kind = config.get("architectures"), config.get("model_type")
    if architectures not in ([ARCHITECTURE], None) or kind != "t5":
        raise ValueError(
            f"architectures: {architectures} of model_type {kind!r} is not {ARCHITECTURE}; use a checkpoint of a whole "
            "T5, with its head"
        )
    if "auto_map" in config:
        raise ValueError(
            "auto_map: the checkpoint contains code, which is not executed; use a checkpoint without it, or remove "
            "auto_map if the model is a plain T5"
        )
    if not truth(config, "is_encoder_decoder", True):
        raise ValueError("is_encoder_decoder: false; use a checkpoint of a whole T5, with encoder and decoder")
    written = config.get("feed_forward_proj", "relu")
    if not isinstance(written, str) or written not in _MLPS:
        raise ValueError(
            f"feed_forward_proj: {written!r} is not supported; use a checkpoint with {', '.join(sorted(_MLPS))}"
        )
    mlp, function = _MLPS[written]
    for key, expected in (("dense_act_fn", function), ("is_gated_act", written.startswith("gated-"))):
        if config.get(key) not in (None, expected):
            raise ValueError(
                f"{key}: {config[key]!r} contradicts feed_forward_proj {written!r}; remove {key}, or correct it"
            )
    unknown = [k for k, v in config.items() if k not in _READ | _WITHOUT_EFFECT and v not in (None, False, [], {})]
    if unknown:
        raise ValueError(
            f"{unknown[0]}: {config[unknown[0]]!r} is not supported and may change what the model computes; use a "
            f"checkpoint without it, or remove the key if it has no effect"
        )
    return mlp


def ours(name: str, tensor: Tensor) -> Tensor:
    """Our tensor `name`, of T5's."""
    return tensor.T if is_transposed(name) else tensor
