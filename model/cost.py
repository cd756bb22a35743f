"""Parameters, FLOPs and KV bytes of a model, computed from its configs.

Legend: d width, L layers, F FFN width, V vocabulary, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from headway.model.base import AttentionConfig, AttentionSection, Flops, RelativeForm, visible_keys
from headway.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs are forward FLOPs per token, 2 per multiply-accumulate; training costs three times as much."""

    num_params: int
    params_by_part: dict[str, int]  # embedding, attention, (cross attention,) mlp, norm, head; the sum is num_params
    flops_per_token: Flops  # all layers and the head
    attention_core_flops: Flops  # all layers: Q K^T and P V, causal; included in flops_per_token
    kv_bytes_per_token: float  # all layers: cache size after seq_len tokens, divided by seq_len
    stages: tuple[tuple[int, Flops], ...] = ()  # (training tokens, flops_per_token from there on); () if they are equal

    def trained(self, tokens: int) -> Flops:
        """Forward FLOPs of `tokens` training tokens from the start on; schedules of the mechanism count."""
        stages = self.stages or ((0, self.flops_per_token),)
        ends = [*(begin for begin, _ in stages[1:]), tokens]
        parts = [(max(0, min(end, tokens) - begin), f) for (begin, f), end in zip(stages, ends, strict=True)]
        return Flops(useful=sum(n * f.useful for n, f in parts), executed=sum(n * f.executed for n, f in parts))


def relative_form(model: ModelConfig, attention: AttentionConfig) -> RelativeForm | None:
    """Relative positions of a layer with this config; None unless `model.positions` is relative_xl.

    Raises ValueError, which names the key, if the mechanism has no such form.
    """
    if not model.relative:
        return None
    if (form := attention.relative_form) is None:
        raise ValueError(
            f"model.positions: relative_xl has no form for attention.type {attention.type} with this spec's options: "
            "position keys belong to KV heads of equal groups that attend in one call and are not routed; use "
            "model.positions rope, type mha, mqa, gqa or sqa without windows and group_sizes, or type switchhead"
        )
    return form


def relative_params(model: ModelConfig, attention: AttentionConfig) -> int:
    """Parameters of one layer's relative positions: d G D, plus 2 H D for u and v."""
    form = relative_form(model, attention)
    return 0 if form is None else (form.groups * model.width + 2 * form.biased_heads) * attention.head_dim


def relative_core_flops(model: ModelConfig, attention: AttentionConfig, *, seq_len: int) -> float:
    """Products of queries and position keys in one layer per token: 2 D per visible key and score map."""
    return 2 * attention.head_dim * attention.score_maps * visible_keys(seq_len) if model.relative else 0.0


def block_flops(model: ModelConfig, attention: AttentionConfig, *, seq_len: int) -> Flops:
    """One block. Position keys (2 d G D) are counted for each sequence, but are computed once for a micro-batch."""
    flops = attention.flops_per_token(width=model.width, seq_len=seq_len)
    extra = model.mlp_flops + relative_core_flops(model, attention, seq_len=seq_len)
    if (form := relative_form(model, attention)) is not None:
        extra += 2 * model.width * form.groups * attention.head_dim
    return flops + Flops(useful=extra, executed=extra)


def heaviest(attention: AttentionConfig) -> AttentionConfig:
    """The config of the most expensive stage of training of one layer, whose activations need the most memory."""
    return max((config for _, config in attention.stages()), key=lambda c: c.flops_per_token(width=1, seq_len=1).useful)


def layer_configs(model: ModelConfig, attention: AttentionSection, *, vocab_size: int) -> list[AttentionConfig]:
    """The attention config of each layer, with rules that depend on the layer or on the model's size resolved.

    Raises ValueError if a per-layer field does not have one entry per layer.
    """
    width, layers = model.width, model.layers
    others = vocab_size * width + model.head_params(vocab_size)
    others += model.learned_positions * width + model.norm_params
    each = [attention.layer(i, layers) for i in range(layers)]
    total = sum(a.num_params(width=width) + relative_params(model, a) for a in each)
    sized = attention.at_size(others + total + layers * (model.mlp_params + 2 * model.norm_params))
    return [sized.layer(i, layers) for i in range(layers)]


def account(
    model: ModelConfig,
    attention: AttentionSection,
    *,
    vocab_size: int,
    seq_len: int,
    bytes_per_element: int = 2,
    encoder_tokens: int | None = None,
) -> Cost:
    """Costs at sequence length `seq_len`. `bytes_per_element`: element size of the KV cache (2: bf16).

    encoder_tokens: Of an encoder-decoder, the first tokens of a sequence, which its encoder reads. "Per token" refers
        to all `seq_len` tokens, of source and target. The cache has the target's keys and values of self-attention, and
        the source's of cross attention.
    """
    if model.is_encoder_decoder:
        assert encoder_tokens is not None, "the spec check demands data.encoder_tokens"
        lengths = (encoder_tokens, seq_len - encoder_tokens)
        one = attention.layer(0, model.layers)
        return _account_two(model, one, lengths, vocab_size=vocab_size, bytes_per_element=bytes_per_element)
    width, layers = model.width, model.layers
    each = layer_configs(model, attention, vocab_size=vocab_size)
    params = {
        "embedding": (vocab_size + model.learned_positions) * width,
        "attention": sum(a.num_params(width=width) + relative_params(model, a) for a in each),
        "mlp": layers * model.mlp_params,
        "norm": (2 * layers + 1) * model.norm_params,
        "head": model.head_params(vocab_size),
    }
    head = 2 * vocab_size * width
    rest = Flops(useful=head, executed=head)
    flops = sum((block_flops(model, a, seq_len=seq_len) for a in each), rest)
    distances = sum(relative_core_flops(model, a, seq_len=seq_len) for a in each)
    return Cost(
        num_params=sum(params.values()),
        params_by_part=params,
        flops_per_token=flops,
        attention_core_flops=Flops(
            useful=distances + sum(a.useful_core_flops_per_token(seq_len=seq_len) for a in each),
            executed=distances + sum(a.core_flops_per_token(seq_len=seq_len) for a in each),
        ),
        kv_bytes_per_token=sum(
            a.kv_bytes_per_token(seq_len=seq_len, bytes_per_element=bytes_per_element) for a in each
        ),
        stages=_stages(model, each, rest, seq_len=seq_len),
    )


def _stages(
    model: ModelConfig, each: list[AttentionConfig], rest: Flops, *, seq_len: int
) -> tuple[tuple[int, Flops], ...]:
    """FLOPs per token of each stage of training: those of `rest` and of all blocks."""
    staged = [config.stages() for config in each]
    begins = sorted({begin for stages in staged for begin, _ in stages})
    if len(begins) == 1:
        return ()
    found = []
    for begin in begins:
        now = [[config for first, config in stages if first <= begin][-1] for stages in staged]
        found.append((begin, sum((block_flops(model, config, seq_len=seq_len) for config in now), rest)))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class TwoStacks:
    """FLOPs of one sequence of an encoder-decoder by part: the sums over its tokens, forward."""

    projections: float
    core: Flops
    mlp: float
    head: float


def two_stacks(
    model: ModelConfig, attention: AttentionConfig, lengths: tuple[int, int], *, vocab_size: int
) -> TwoStacks:
    """lengths: tokens of source and target. Needs the config of a mechanism with `no_encoder_decoder` None.

    Encoder and cross attention see all s keys of the source. With the biases of T5, the decoder's causal scores are
    computed as a full square, half of which is masked.
    """
    source, target = lengths
    width, encoder, decoder = model.width, model.encoder_blocks, model.layers
    projections = attention.flops_per_token(width=width, seq_len=1).executed - attention.core_flops_per_token(seq_len=1)
    keys_and_values = 2 * width * attention.kv_bytes_per_token(seq_len=1, bytes_per_element=1)
    per_score = 4 * attention.head_dim * attention.score_maps
    seen = visible_keys(target)
    fixed = encoder * source * source + decoder * target * source
    causal = decoder * target * (target if model.positions == "relative_t5" else seen)
    return TwoStacks(
        projections=encoder * source * projections
        + decoder * (target * (2 * projections - keys_and_values) + source * keys_and_values),
        core=Flops(useful=per_score * (fixed + decoder * target * seen), executed=per_score * (fixed + causal)),
        mlp=(encoder * source + decoder * target) * model.mlp_flops,
        head=2.0 * vocab_size * width * target,
    )


def _account_two(
    model: ModelConfig,
    attention: AttentionConfig,
    lengths: tuple[int, int],
    *,
    vocab_size: int,
    bytes_per_element: int,
) -> Cost:
    encoder, decoder, width, total = model.encoder_blocks, model.layers, model.width, sum(lengths)
    per_layer = attention.num_params(width=width)
    biases = 2 * attention.score_maps * model.relative_buckets if model.positions == "relative_t5" else 0
    params = {
        "embedding": vocab_size * width,
        "attention": (encoder + decoder) * per_layer + biases,
        "cross attention": decoder * per_layer,
        "mlp": (encoder + decoder) * model.mlp_params,
        "norm": (2 * encoder + 3 * decoder + 2) * model.norm_params,
        "head": model.head_params(vocab_size),
    }
    flops = two_stacks(model, attention, lengths, vocab_size=vocab_size)
    others = flops.projections + flops.mlp + flops.head
    per_kv_token = attention.kv_bytes_per_token(seq_len=1, bytes_per_element=bytes_per_element)
    return Cost(
        num_params=sum(params.values()),
        params_by_part=params,
        flops_per_token=Flops(
            useful=(others + flops.core.useful) / total, executed=(others + flops.core.executed) / total
        ),
        attention_core_flops=Flops(useful=flops.core.useful / total, executed=flops.core.executed / total),
        kv_bytes_per_token=decoder * per_kv_token,  # of each target token in self, of each source token in cross
    )
