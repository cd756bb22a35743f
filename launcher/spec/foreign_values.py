"""Values of other tools that Headway does not have, mainly attention mechanisms, with the closest alternative.

Like `headway.launcher.spec.aliases`, the table is used only for messages.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from headway.launcher.spec.aliases import fold

_SPARSE = (
    "Headway has no such choice of keys. Closest: block_sparse, where queries choose earlier blocks by the means of "
    "their keys, or gqa with attention.windows, where a query sees the last keys alone."
)
_RECURRENT = (
    "Of linear attention, state-space and recurrent layers, Headway has the gated delta rule alone. Closest: "
    "gated_delta, in all layers, or in some by mixed."
)
_LATENT = "Headway has no such factors of keys and values. Closest: mla, which computes them from a cached latent."
_KERNEL = (
    "This is a kernel, not a mechanism: the choice is speed.attention ({values}); attention.type names the "
    "mechanism, such as mha or gqa."
)
_WINDOWS = "Use gqa with attention.windows: 128, or attention.window_pattern: [128, 128, null] for layers that differ."
_MIXED = "Use mixed, with the mechanisms in attention.kinds and the kind of each layer in attention.pattern."
_POSITIONS = (
    "Positions are no mechanism: use model.positions (rope, learned, relative_xl, relative_t5 or none), and "
    "attention.rope_base and attention.rope_fraction for RoPE."
)
_CONTEXT = "This cuts sequences over ranks and is no mechanism: use parallel.context (Ulysses)."

_MECHANISMS = {
    "Use block_sparse.": "moba mixture_of_block mixture_of_block_attention sparse block_sparse_attention",
    _SPARSE: "nsa native_sparse dsa deepseek_sparse infllm seer bigbird longformer_global routing reformer quest h2o "
    "top_k_attention csa hca",
    "Use gated_delta.": "gdn gated_deltanet gated_delta_net gated_delta_rule",
    "Use mixed, with gated_delta in most layers and gqa in the others.": "qwen3_next",
    _RECURRENT: "mamba mamba2 mamba3 ssm s4 s6 jamba rwkv rwkv7 retnet deltanet delta_rule "
    "delta_net kda kimi_delta kimi_linear linear linear_attention gla gated_linear lightning based "
    "performer hyena xlstm ttt titans griffin rglru",
    "Use mla.": "latent multi_head_latent latent_attention multi_head_latent_attention deepseek deepseek_v2 "
    "deepseek_v3",
    "Use mla with attention.latents.": "gla_latent grouped_latent grouped_latent_attention",
    _LATENT: "mfa tpa tensor_product mtla gta linformer",
    _WINDOWS: "sliding sliding_window swa local local_global window windowed longformer interleaved alternating "
    "chunked",
    _MIXED: "layers layerwise layer_wise per_layer layer_pattern mixture_of_layers several heterogeneous nope_global",
    _KERNEL.format(values="flash"): "flash flash_attn flash_attention fa2 flash2 flash_attn_2 flash_attention_2",
    _KERNEL.format(values="fa3"): "fa3 flash3 flash_attn_3 flash_attention_3",
    _KERNEL.format(values="auto, cudnn, flash, fa3 or math"): "sdpa eager math cudnn xformers memory_efficient flex "
    "flex_attention paged sage sageattention te",
    "Headway has no difference of two softmax maps. Closest: gqa with attention.gate headwise or elementwise.": "diff "
    "differential "
    "diff_attn "
    "diff_attention "
    "diff_transformer",
    "Use gqa with attention.gate headwise or elementwise.": "gated gated_attention gated_gqa gated_softmax",
    "Use gqa with attention.share_kv.": "cla cross_layer cross_layer_attention shared_kv kv_sharing",
    "Use gqa with attention.value_residual.": "resformer value_residual value_residual_learning",
    "Use gqa with attention.group_sizes, such as [1, 5].": "asymgqa asym_gqa unequal uneven_gqa",
    "Use mha.": "full softmax vanilla standard dense multihead multi_head self self_attention causal default "
    "multi_head_attention",
    "Use mqa.": "multi_query multiquery multi_query_attention",
    "Use gqa with attention.kv_heads.": "grouped grouped_query grouped_query_attention group_query",
    "Use moh or moa, or switchhead for experts of values and outputs.": "moe mixture mixture_of_heads "
    "mixture_of_attention "
    "mixture_of_attention_heads",
    _POSITIONS: "rope alibi nope rotary yarn transformer_xl xl relative relative_xl",
    _CONTEXT: "ring ring_attention ulysses tree_attention",
    "Headway has no such mixing of heads or tokens. Closest: gqa with attention.gate, or wgqa.": "mta multi_token "
    "talking_heads tha "
    "forgetting fox",
}

_BUILD_FIRST = (
    "Text becomes shards first: `headway data build CORPUS.yaml`; then write {type: mds, path: datasets/NAME}."
)

_VALUES = {
    "model.positions": {
        "Write rope.": "rotary rope_neox default",
        "Write learned, with model.max_positions.": "absolute learned_absolute embedding gpt2 trained",
        "Write relative_xl.": "relative transformer_xl xl txl",
        "Write relative_t5, with model.type encoder_decoder; a decoder has relative_xl.": "t5 relative_bias",
        "Write none.": "nope false off",
        "Headway has no such positions. Closest: relative_xl, or rope.": "alibi kerple sinusoidal sandwich fire yarn",
    },
    "parallel.precision": {
        "Write bf16.": "bfloat16 bf16_mixed bf16_true mixed amp torch.bfloat16",
        "Write fp32.": "float32 32 32_true float full torch.float32",
        "Write bf16, and speed.matmul: fp8 for products in 8 bits.": "fp8 float8",
        "Headway has no precision but fp32 and bf16.": "fp16 float16 half 16 16_mixed 16_true torch.float16 fp64",
    },
    "parallel.recompute": {"Write block.": "full true all layer op", "Write none.": "false off"},
    "parallel.zero": {"Write 1, the least there is.": "ddp none false off"},
    "speed.compile": {
        "Write elementwise, or block on a CPU; the whole model is never compiled.": "true all full default "
        "max_autotune reduce_overhead inductor",
        "Write none.": "false off",
    },
    "speed.attention": {
        "Write auto.": "sdpa default true",
        "Write flash.": "flash_attention_2 flash_attn fa2 flash2",
        "Write fa3.": "flash_attention_3 flash3",
        "Write math.": "eager naive",
    },
    "schedule.type": {
        "Write linear.": "linear_with_warmup linear_warmup polynomial",
        "Write inverse_sqrt.": "rsqrt inv_sqrt inverse_square_root noam",
        "Write wsd, with schedule.decay_fraction: 0.": "constant constant_with_warmup none",
        "Write cosine.": "cosine_with_min_lr cosine_with_warmup cosine_annealing cosine_lr",
        "Write wsd.": "warmup_stable_decay trapezoidal trapezoid",
    },
    "data.source.type": {
        _BUILD_FIRST: "huggingface hf text txt jsonl json parquet csv memmap bin bin_idx megatron streaming webdataset "
        "arrow stdlib fineweb c4 openwebtext tinystories",
    },
}


KEYS_OF_VALUES = {"attention.type": _MECHANISMS, **_VALUES}
"""Dotted key -> advice on what to write -> the values it applies to, separated by spaces."""


@cache
def _table() -> dict[str, dict[str, str]]:
    return {
        key: {fold(name): hint for hint, names in by_hint.items() for name in names.split()}
        for key, by_hint in KEYS_OF_VALUES.items()
    }


def value_hint(key: str, value: Any) -> str:
    """Advice on what to write at a dotted key instead of `value`; empty if the table has no entry for it."""
    if key == "attention" and isinstance(value, list):
        return _MIXED
    names = _table().get(key, {})
    text = fold(str(value))
    return names.get(text) or names.get(text.removesuffix("attention"), "")
