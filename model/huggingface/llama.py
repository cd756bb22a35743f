"""Conversion between the decoder and a Llama of Hugging Face transformers: config.json and tensor names.

Both rotate channel i with channel i + D/2 and store query heads group-major. Tensors are therefore equal and differ in
name only. Features without a counterpart are refused, in both directions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headway.model.attention.gqa import DenseConfig, GqaConfig, MhaConfig, MqaConfig
from headway.model.attention.wgqa import WgqaConfig
from headway.model.base import AttentionSection
from headway.model.config import ModelConfig
from headway.model.huggingface.values import number, truth, whole

ARCHITECTURE = "LlamaForCausalLM"

TOP = {"embedding": "model.embed_tokens.weight", "norm.gain": "model.norm.weight", "head": "lm_head.weight"}
BLOCK = {
    "attn_norm.gain": "input_layernorm.weight",
    "attn.w_q": "self_attn.q_proj.weight",
    "attn.w_k": "self_attn.k_proj.weight",
    "attn.w_v": "self_attn.v_proj.weight",
    "attn.w_o": "self_attn.o_proj.weight",
    "mlp_norm.gain": "post_attention_layernorm.weight",
    "mlp.w_gate": "mlp.gate_proj.weight",
    "mlp.w_up": "mlp.up_proj.weight",
    "mlp.w_down": "mlp.down_proj.weight",
}
"""Our tensor name -> Llama's. The prefix of block i is `blocks.i.` here and `model.layers.i.` in Llama."""

DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""RoPE frequencies, which older releases saved although they follow from the config."""

INVERSE_FREQUENCY_ERROR = 1e-2
"""Relative tolerance; some checkpoints saved the frequencies in bf16."""

# Keys of config.json that do not affect what the model computes in inference.
_WITHOUT_EFFECT = {
    "_attn_implementation_autoset",
    "_name_or_path",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "pad_token_id",
    "pretraining_tp",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_READ = {
    "architectures",
    "attention_bias",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
}


_ROPE_TABLES = ("rope_parameters", "rope_scaling")
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def llama_name(name: str) -> str:
    """Llama's name of the decoder's tensor `name`."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    return TOP[name] if match is None else f"model.layers.{match[1]}.{BLOCK[match[2]]}"


def folded(attention: AttentionSection) -> AttentionSection:
    """Plain GQA for weighted GQA; other configs unchanged."""
    return attention.folded if isinstance(attention, WgqaConfig) else attention


def llama_config(
    model: ModelConfig, attention: AttentionSection, *, vocab_size: int, seq_len: int, eos_token_id: int | None
) -> dict[str, Any]:
    """config.json of the equivalent Llama. `attention` may be weighted GQA, for its folded form.

    `seq_len`: tokens per training sequence. Raises ValueError, with the key, the reason and what to use, if a Llama has
    no counterpart.
    """
    _check_model(model)
    dense = _checked(folded(attention), model.layers)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": dense.query_heads,
        "num_key_value_heads": dense.groups,
        "head_dim": dense.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": seq_len,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": dense.rope_base,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": model.tied_embeddings,
        "torch_dtype": "float32",
        "use_cache": True,
        "bos_token_id": None,  # training puts no token before a text
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
    }


def _check_model(model: ModelConfig) -> None:
    """Raise ValueError for forms of the block that a Llama does not have."""
    forms = {
        "mlp": ("swiglu", "the MLP of a Llama is SwiGLU"),
        "mlp_biases": (False, "biases of a Llama's MLP are not supported here"),
        "norm": ("rmsnorm", "a Llama has RMSNorm"),
        "head_bias": (False, "the head of a Llama has no bias"),
        "positions": ("rope", "a Llama rotates queries and keys by their position"),
    }
    for name, (legal, why) in forms.items():
        if (value := getattr(model, name)) != legal:
            raise ValueError(
                f"model.{name}: {value}, but {why}; use the format safetensors, which supports it, or a run with "
                f"{name} {str(legal).lower()}"
            )


_DENSE = ("mha", "mqa", "gqa", "sqa")
"""Mechanisms whose layers may be those of a Llama. A subclass of their configs may compute something else."""


def _checked(attention: AttentionSection, layers: int) -> DenseConfig:
    """Raise ValueError for features that a Llama does not have."""
    ways = "use the format safetensors, which supports it, or a run"
    if not isinstance(attention, DenseConfig) or attention.type not in _DENSE:
        raise ValueError(
            f"attention.type: a Llama has no counterpart of {attention.type}; all of its query heads are used for "
            f"every token and share keys and values in equal groups; {ways} of type mha, mqa, gqa, sqa or wgqa"
        )
    of_layers = [attention.layer(i, layers) for i in range(layers)]
    windows = next((w for config in of_layers for w in config.group_windows if w is not None), None)
    refused = {
        "qk_norm": (attention.qk_norm, "a Llama does not norm queries and keys", "qk_norm false"),
        "gate": (attention.gate != "none", "a Llama does not gate its heads", "gate none"),
        "biases": (attention.biases, "biases of a Llama's attention are not supported here", "biases false"),
        "value_residual": (
            attention.value_residual != "none",
            "the values of a Llama's layer are its own, and no class of transformers mixes in those of the first layer",
            "value_residual none",
        ),
        "share_kv": (
            attention.share_kv > 1,
            "each layer of a Llama has its own keys and values, and no class of transformers shares them by layers",
            "share_kv 1",
        ),
        "window_pattern" if attention.window_pattern else "windows": (
            windows is not None,
            f"a Llama attends to all tokens, so the window of {windows} tokens would be lost",
            "no windows",
        ),
        "group_sizes": (
            len(set(attention.sizes)) > 1,
            f"KV heads serve {attention.sizes} query heads, but those of a Llama all serve the same number",
            "group_sizes []",
        ),
        "rope_fraction": (
            attention.rotated != attention.head_dim,
            f"RoPE rotates {attention.rotated} of {attention.head_dim} channels, but a Llama rotates all of them",
            "rope_fraction 1.0",
        ),
    }
    for name, (is_refused, why, legal) in refused.items():
        if is_refused:
            raise ValueError(f"attention.{name}: {why}; {ways} with {legal}")
    return attention


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """The contents of a config.json as our configs. `seq_len`: maximum sequence length."""

    model: ModelConfig
    attention: MhaConfig | MqaConfig | GqaConfig
    vocab_size: int
    seq_len: int
    eos_token_id: int | None


def read_llama_config(config: Mapping[str, Any]) -> LlamaShape:
    """The decoder config equivalent to a Llama's config.json.

    Raises ValueError, with the key, the reason and what to use, for other architectures and for features that our
    decoder does not have.
    """
    _refuse_other_functions(config)
    width, heads = (whole(config, key) for key in ("hidden_size", "num_attention_heads"))
    if config.get("head_dim") is None and width % heads:
        raise ValueError(
            f"head_dim: not given, and {width} channels do not divide into {heads} heads; "
            f"give head_dim, or another num_attention_heads"
        )
    kv_heads = whole(config, "num_key_value_heads", heads)
    shape: dict[str, Any] = {
        "heads": heads,
        "head_dim": whole(config, "head_dim", width // heads),
        "rope_base": _rope_base(config),
    }
    if heads % kv_heads:
        raise ValueError(
            f"num_key_value_heads: {heads} query heads do not divide into {kv_heads} equal groups; "
            f"use the checkpoint's original config.json, or correct num_key_value_heads"
        )
    if kv_heads == heads:
        attention: MhaConfig | MqaConfig | GqaConfig = MhaConfig(**shape)
    elif kv_heads == 1:
        attention = MqaConfig(**shape)
    else:
        attention = GqaConfig(**shape, kv_heads=kv_heads)
    vocab_size = whole(config, "vocab_size")
    model = ModelConfig(
        width=width,
        layers=whole(config, "num_hidden_layers"),
        ffn_width=whole(config, "intermediate_size"),
        vocab_size=vocab_size,
        tied_embeddings=truth(config, "tie_word_embeddings"),
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        init_std=number(config, "initializer_range", 0.02),
    )
    eos = config.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    return LlamaShape(
        model=model,
        attention=attention,
        vocab_size=vocab_size,
        seq_len=whole(config, "max_position_embeddings", 2048),
        eos_token_id=eos if type(eos) is int and 0 <= eos < vocab_size else None,
    )


def _refuse_other_functions(config: Mapping[str, Any]) -> None:
    """Raise ValueError if config.json describes another architecture, or a Llama with additional features."""
    architectures, kind = config.get("architectures"), config.get("model_type")
    if architectures not in ([ARCHITECTURE], None) or kind != "llama":
        raise ValueError(
            f"architectures: {architectures} of model_type {kind!r} is not {ARCHITECTURE}; "
            f"use a checkpoint of a Llama, or one that was converted to that architecture"
        )
    if "auto_map" in config:
        raise ValueError(
            "auto_map: the checkpoint contains code, which is not executed; use a checkpoint without it, or "
            "remove auto_map if the model is a plain Llama"
        )
    for name in ("attention_bias", "mlp_bias"):
        if truth(config, name):
            raise ValueError(
                f"{name}: our projections have no biases; use a checkpoint with {name} false, or one without biases"
            )
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ValueError(
            f"hidden_act: {act!r} is not the activation of SwiGLU; use a checkpoint with hidden_act silu or swish"
        )
    unknown = [k for k, v in config.items() if k not in _READ | _WITHOUT_EFFECT and v not in (None, False, [], {})]
    if unknown:
        raise ValueError(
            f"{unknown[0]}: {config[unknown[0]]!r} is not supported and may change what the model computes; use a "
            f"checkpoint without it, or remove the key if it has no effect"
        )


def _rope_base(config: Mapping[str, Any]) -> float:
    """Base from `rope_theta`, or from `rope_parameters` in newer releases.

    Raises ValueError for any RoPE scaling, and for bases that differ: releases do not agree on which of them counts.
    """
    bases = [] if config.get("rope_theta") is None else [number(config, "rope_theta", 0.0)]
    for name in _ROPE_TABLES:
        table = config.get(name) or {}
        if not isinstance(table, dict):
            raise ValueError(f"{name}: {table!r} is not an object; use null, or the rope_type default")
        kind = table.get("rope_type", table.get("type", "default"))
        whole = table.get("partial_rotary_factor") in (None, 1)
        if kind != "default" or not whole or set(table) - _ROPE_KEYS:
            raise ValueError(
                f"{name}: RoPE scaling ({kind}: {', '.join(sorted(table))}) is not supported; "
                f"use a checkpoint with {name} null, or one with rope_type default"
            )
        if table.get("rope_theta") is not None:
            bases.append(number(table, "rope_theta", 0.0))
    if len(set(bases)) > 1:
        raise ValueError(
            f"rope_theta: config.json has several values ({', '.join(f'{base:g}' for base in bases)}) in rope_theta, "
            "rope_parameters and rope_scaling; keep the one that the checkpoint was trained with"
        )
    return bases[0] if bases else 10_000.0


def older_form(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that `read_llama_config` accepts, in the form of releases that do not know `rope_parameters`."""
    plain = {key: value for key, value in config.items() if key not in _ROPE_TABLES}
    return plain | {"rope_theta": _rope_base(config)}


def is_derived(name: str, tensor: Tensor, shape: LlamaShape) -> bool:
    """Whether a tensor of a Llama follows from its config and weights, and can be skipped: a tied `lm_head`, or RoPE
    frequencies that agree with the config within `INVERSE_FREQUENCY_ERROR`.
    """
    if name == TOP["head"]:
        return shape.model.tied_embeddings
    if DERIVED.fullmatch(name) is None or tuple(tensor.shape) != (shape.attention.head_dim // 2,):
        return False
    base, size = shape.attention.rope_base, shape.attention.head_dim
    expected = [base ** (-2 * i / size) for i in range(size // 2)]
    return all(
        math.isclose(a, b, rel_tol=INVERSE_FREQUENCY_ERROR)
        for a, b in zip(tensor.double().tolist(), expected, strict=True)
    )
