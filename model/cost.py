"""Parameters, FLOPs and KV bytes of a model, from its configs alone.

Legend: d width, L layers, F FFN width, V vocabulary, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from headway.model.base import AttentionConfig, Flops
from headway.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs are forward and per token, 2 per multiply-accumulate; training costs three times as much."""

    num_params: int
    params_by_part: dict[str, int]  # embedding, attention, mlp, norm, head; they add up to num_params
    flops_per_token: Flops  # all layers and the head
    attention_core_flops: float  # all layers: Q K^T and P V, causal; contained in both numbers of flops_per_token
    kv_bytes_per_token: int  # all layers


def account(
    model: ModelConfig,
    attention: AttentionConfig,
    *,
    vocab_size: int,
    seq_len: int,
    bytes_per_element: int = 2,
) -> Cost:
    """Costs at `seq_len`; `bytes_per_element` is that of the KV cache (2: bf16)."""
    width, layers = model.width, model.layers
    params = {
        "embedding": vocab_size * width,
        "attention": layers * attention.num_params(width=width),
        "mlp": layers * 3 * width * model.ffn_width,
        "norm": (2 * layers + 1) * width,
        "head": 0 if model.tied_embeddings else vocab_size * width,
    }
    per_layer = attention.flops_per_token(width=width, seq_len=seq_len)
    dense = layers * 6 * width * model.ffn_width + 2 * vocab_size * width
    return Cost(
        num_params=sum(params.values()),
        params_by_part=params,
        flops_per_token=Flops(useful=layers * per_layer.useful + dense, executed=layers * per_layer.executed + dense),
        attention_core_flops=layers * attention.core_flops_per_token(seq_len=seq_len),
        kv_bytes_per_token=layers * attention.kv_bytes_per_token(bytes_per_element=bytes_per_element),
    )
