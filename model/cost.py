"""Parameters, FLOPs and KV bytes of a model, computed from its configs.

Legend: d width, L layers, F FFN width, V vocabulary, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from headway.model.base import AttentionConfig, Flops
from headway.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs are forward FLOPs per token, 2 per multiply-accumulate; training costs three times as much."""

    num_params: int
    params_by_part: dict[str, int]  # embedding, attention, mlp, norm, head; the sum is num_params
    flops_per_token: Flops  # all layers and the head
    attention_core_flops: Flops  # all layers: Q K^T and P V, causal; included in flops_per_token
    kv_bytes_per_token: float  # all layers: cache size after seq_len tokens, divided by seq_len


def layer_configs(model: ModelConfig, attention: AttentionConfig, *, vocab_size: int) -> list[AttentionConfig]:
    """The attention config of each layer, with rules that depend on the layer or on the model's size resolved.

    Raises ValueError if a per-layer field does not have one entry per layer.
    """
    width, layers = model.width, model.layers
    others = vocab_size * width + model.head_params(vocab_size)
    others += model.learned_positions * width + model.norm_params
    per_layer = attention.num_params(width=width) + model.mlp_params + 2 * model.norm_params
    sized = attention.at_size(others + layers * per_layer)
    return [sized.layer(i, layers) for i in range(layers)]


def account(
    model: ModelConfig,
    attention: AttentionConfig,
    *,
    vocab_size: int,
    seq_len: int,
    bytes_per_element: int = 2,
) -> Cost:
    """Costs at sequence length `seq_len`. `bytes_per_element`: element size of the KV cache (2: bf16)."""
    width, layers = model.width, model.layers
    each = layer_configs(model, attention, vocab_size=vocab_size)
    params = {
        "embedding": (vocab_size + model.learned_positions) * width,
        "attention": sum(a.num_params(width=width) for a in each),
        "mlp": layers * model.mlp_params,
        "norm": (2 * layers + 1) * model.norm_params,
        "head": model.head_params(vocab_size),
    }
    dense = layers * model.mlp_flops + 2 * vocab_size * width
    flops = sum((a.flops_per_token(width=width, seq_len=seq_len) for a in each), Flops(useful=dense, executed=dense))
    return Cost(
        num_params=sum(params.values()),
        params_by_part=params,
        flops_per_token=flops,
        attention_core_flops=Flops(
            useful=sum(a.useful_core_flops_per_token(seq_len=seq_len) for a in each),
            executed=sum(a.core_flops_per_token(seq_len=seq_len) for a in each),
        ),
        kv_bytes_per_token=sum(
            a.kv_bytes_per_token(seq_len=seq_len, bytes_per_element=bytes_per_element) for a in each
        ),
    )
