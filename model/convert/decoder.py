"""Convert a decoder with multi-head or grouped-query attention to another mechanism, layer by layer.

    check_conversion(model, source, target, how)                    ValueError with the reason, without weights
    found = convert_decoder(decoder, model, target, how="align", inputs=inputs)
    found.decoder, found.layers

First the KV heads are pooled (`headway.model.convert.methods.How`). The result is a GQA layer, which has the function
of the source if nothing is pooled. It then becomes a layer of the target with exactly the function of the GQA layer:

    gqa, mqa      the same layer
    block_sparse  the same parameters; the function is that of the GQA layer in sequences in which all blocks are chosen
    wgqa          all KV heads are kept; the weights of their sums are those of pooling, so that folding gives the GQA
                  layer (random: standard normal weights)
    rgqa, moh     all heads are selected (k_schedule may anneal it) and the router is 0; W_O is divided by the gates,
                  which are then constants
    switchhead    nothing may be pooled; each expert has a part of the channels of the values and outputs of its head,
                  divided by its gate, so that the experts add up to the head

Legend: d width, H query heads, K KV heads of the source, G of the target, D head size, N calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway.model.attention.block_sparse import BlockSparseConfig
from headway.model.attention.gqa import DenseConfig, GqaConfig
from headway.model.attention.grouped import GroupedConfig
from headway.model.attention.moh import MixtureOfHeads
from headway.model.attention.rgqa import RoutedGroupedQueryAttention
from headway.model.attention.switchhead import SwitchHeadAttention, SwitchHeadConfig
from headway.model.attention.wgqa import WgqaConfig
from headway.model.base import Attention, AttentionConfig, AttentionSection, Context
from headway.model.config import ModelConfig
from headway.model.contexts import rotated
from headway.model.convert import grouping, heads
from headway.model.convert.methods import ALIGNED, CHOSEN, SOURCES, TARGETS, By, How, is_calibrated
from headway.model.convert.regroup import (
    Form,
    LayerChange,
    alike_heads,
    regrouped,
    with_bias_column,
    without_bias_column,
)
from headway.model.decoder import Decoder
from headway.model.mixed import MixedConfig

_PROBES = 5
"""Random tokens whose gates are compared to see whether they are constants."""


class Converted(NamedTuple):
    """A converted decoder in evaluation mode.

    `same_function`: whether nothing was pooled. `complete_tokens`: tokens of the longest sequence in which all blocks
    are chosen in all layers, so that the function is that of the pooled GQA; None: in sequences of any length.
    """

    decoder: Decoder
    layers: tuple[LayerChange, ...]
    same_function: bool
    complete_tokens: int | None = None


# ---------------------------------------------------------------- what can be converted


def check_conversion(model: ModelConfig, source: AttentionSection, target: AttentionSection, how: How) -> None:
    """Raise ValueError, with what to do instead, if `source` cannot be converted to `target`."""
    if source.type not in SOURCES or not isinstance(source, DenseConfig):
        raise ValueError(
            f"the source has attention of type {source.type}, and only {', '.join(SOURCES)} can be converted; use a "
            "source of one of these types" + (" (an export to hf folds wgqa to gqa)" if source.type == "wgqa" else "")
        )
    if isinstance(target, MixedConfig):
        for prefix, kind in target.mechanisms():
            try:
                check_conversion(model, source, kind, how)
            except ValueError as error:
                raise ValueError(f"attention.{prefix.removesuffix('.')}: {error}") from None
        return
    if target.type not in _FILL or not isinstance(target, AttentionConfig):
        raise ValueError(f"{target.type} is no target of a conversion; use one of {', '.join(TARGETS)}")
    if model.relative:
        raise ValueError(
            "model.positions relative_xl has position keys for each KV head, which cannot be pooled; use a source with "
            "positions rope, learned or none"
        )
    if isinstance(target, WgqaConfig) and len(set(source.sizes)) > 1:
        raise ValueError("attention.group_sizes: wgqa merges equal groups; use a source without group_sizes")
    if isinstance(target, WgqaConfig) and (target.start == "random") != (how == "random"):
        raise ValueError(
            f"attention.start: {target.start} with {how}; use start random with random, and start mean otherwise"
        )
    for name, config in (("source", source), ("target", target)):
        if isinstance(config, DenseConfig) and config.across is not None:
            raise ValueError(
                f"attention.{config.across}: the {name} uses values, or keys and values, of earlier layers, and layers "
                f"are converted one by one; use a {name} without {config.across}"
            )
    _check_fields(source, target)
    sizes = _pooled_sizes(source, target)
    if isinstance(target, SwitchHeadConfig) and target.kv_heads != source.heads:
        raise ValueError(
            f"kv_heads: switchhead with {target.kv_heads} heads has {target.kv_heads} score maps, and the source has "
            f"{source.heads}, so no start computes the function of the source; use kv_heads {source.heads}, or rgqa, "
            "which keeps the score maps"
        )
    if source.qk_norm and how in ALIGNED and max(sizes) > 1:
        raise ValueError(
            f"{how}: the source has QK-norm (attention.qk_norm), whose gains do not commute with rotations of the "
            "channels; use mean or cluster"
        )
    if source.gate == "elementwise" and how in ALIGNED:
        raise ValueError(
            f"{how}: attention.gate elementwise acts on single channels of the values, which alignment rotates; use "
            "mean or cluster"
        )


def _check_fields(source: DenseConfig, target: AttentionConfig) -> None:
    """Raise ValueError unless the target has the heads and options of the source."""
    same = ["head_dim", "rope_base", "rope_fraction", "qk_norm"]
    if isinstance(target, GroupedConfig):
        same.append("heads")
    if isinstance(target, DenseConfig):
        same += ["gate", "biases", "windows", "window_pattern"]
    for name in same:
        ours, theirs = getattr(source, name), getattr(target, name)
        if ours != theirs:
            raise ValueError(
                f"attention.{name}: {theirs} in the target and {ours} in the source; use attention.{name} {ours}"
            )
    if isinstance(target, DenseConfig):
        per_group = [w for w in (source.windows, *source.window_pattern) if isinstance(w, list)]
        if per_group and source.groups != target.groups:
            raise ValueError(
                "attention.windows: the source has a window for each KV head, which pooled heads cannot keep; use a "
                "source with one window"
            )
        return
    for name in ("gate", "biases", "windows", "window_pattern"):
        if getattr(source, name) not in ("none", False, None, []):
            raise ValueError(
                f"attention.{name}: the source has {getattr(source, name)}, and {target.type} has no such option; "
                "convert to gqa or mqa, or use a source without it"
            )


def _pooled_sizes(source: DenseConfig, target: AttentionConfig) -> list[int]:
    """Number of KV heads of the source in each KV head of the target. Raises ValueError if they do not fit."""
    if isinstance(target, SwitchHeadConfig):
        return [1] * source.groups
    assert isinstance(target, GroupedConfig)
    if len(set(source.sizes)) > 1:
        if isinstance(target, DenseConfig) and target.sizes == source.sizes:
            return [1] * source.groups
        raise ValueError(
            f"attention.group_sizes: the source has groups of different sizes ({source.sizes}), which cannot be "
            "pooled; use the same sizes, or a source with equal groups"
        )
    if target.groups > source.groups:
        raise ValueError(
            f"kv_heads: the source has {source.groups} KV heads, fewer than {target.groups}; use {source.groups} or "
            "a divisor of it"
        )
    members = source.heads // source.groups
    query_heads = target.sizes if isinstance(target, DenseConfig) else [target.heads_per_group] * target.groups
    if any(size % members for size in query_heads):
        raise ValueError(
            f"kv_heads: groups of {query_heads} query heads separate heads that share one of the {source.groups} KV "
            f"heads of the source; use kv_heads that divides {source.groups}"
        )
    return grouping.sizes_of(source.groups, [size // members for size in query_heads])


# ---------------------------------------------------------------- the conversion


@torch.no_grad()
def convert_decoder(
    decoder: Decoder,
    model: ModelConfig,
    target: AttentionSection,
    *,
    how: How = "mean",
    by: By = "activations",
    inputs: Sequence[Tensor] | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
) -> Converted:
    """Convert `decoder`, which was built with `model`, to attention `target`.

    by: what heads are compared by. inputs: for each layer its normed input of the calibration tokens [N, d]
    (`attention_inputs`); None: similarities of keys and values are not computed, and no method that `is_calibrated` is
    possible. seed: of random values and of the search for groups.
    Computes in float64; the result has dtype and device of `decoder` and shares no memory with it. Raises ValueError as
    `check_conversion`, and for gates that are no constants.
    """
    source = decoder.attention
    check_conversion(model, source, target, how)
    assert isinstance(source, DenseConfig)
    if is_calibrated(how, by) and inputs is None:
        raise ValueError(_no_tokens(how))
    new = Decoder(model, target, vocab_size=vocab_size or len(decoder.embedding), seed=seed).to(decoder.embedding)
    new.eval()
    state, changes, same = decoder.state_dict(), [], True
    complete: list[int] = []
    fresh = new.state_dict()
    layers = zip(decoder.attention_layers(), new.attention_layers(), strict=True)
    for i, (old_layer, new_layer) in enumerate(layers):
        new_layer.before_step(0)
        own, x = target.layer(i, model.layers), None if inputs is None else inputs[i]
        sizes = _pooled_sizes(source, own)
        complete += [own.complete_tokens] if isinstance(own, BlockSparseConfig) else []
        same &= max(sizes) == 1 and (how != "random" or isinstance(own, SwitchHeadConfig))
        form = Form(source, sizes, how, by, rotated(model, source), seed)
        weights, change = regrouped(i, old_layer.state_dict(), form, x)
        filled = _FILL[own.type](new_layer, weights, source, sizes, how)
        prefix = f"blocks.{i}.attn."
        fresh |= {prefix + name: tensor for name, tensor in filled.items()}
        changes.append(change)
    attention = {name for name in fresh if name.startswith("blocks.") and name.split(".")[2] == "attn"}
    fresh |= {name: state[name] for name in fresh if name not in attention}
    new.load_state_dict(fresh)
    return Converted(new, tuple(changes), same, min(complete, default=None))


@torch.no_grad()
def with_unequal_groups(
    decoder: Decoder,
    model: ModelConfig,
    target: GqaConfig,
    *,
    how: How,
    by: By = "activations",
    inputs: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> GqaConfig:
    """`target` with the `group_sizes` of `headway.model.convert.grouping.best_sizes`, the same in all layers.

    The G groups may have any size. Arguments as of `convert_decoder`. Raises ValueError if `how` does not choose
    groups, and as `check_conversion`.
    """
    source = decoder.attention
    if how not in CHOSEN:
        raise ValueError(f"{how}: makes groups of consecutive heads, without a choice of their sizes; use cluster")
    assert isinstance(source, DenseConfig)
    members, groups = source.heads // source.groups, target.kv_heads
    if groups > source.groups:
        raise ValueError(f"kv_heads: the source has {source.groups} KV heads, fewer than {groups}; use fewer")
    least = [members] * (groups - 1) + [source.heads - members * (groups - 1)]
    check_conversion(model, source, target.model_copy(update={"group_sizes": least}), how)
    alike = _alike_of_layers(decoder, Form(source, [source.groups], how, by, rotated(model, source), seed), inputs)
    sizes = [members * size for size in grouping.best_sizes(alike, groups, seed=seed)]
    return target.model_copy(update={"group_sizes": [] if len(set(sizes)) == 1 else sizes})


@torch.no_grad()
def with_numbers_by_layer(
    decoder: Decoder,
    model: ModelConfig,
    target: GqaConfig,
    *,
    how: How,
    by: By = "activations",
    inputs: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> AttentionSection:
    """`target` with a number of KV heads for each layer: a divisor of the source's, kv_heads on average at most.

    The numbers are those of `headway.model.convert.grouping.best_numbers`. Arguments as of `convert_decoder`. Raises
    ValueError if `how` does not choose groups, and as `check_conversion`.
    """
    source = decoder.attention
    if how not in CHOSEN:
        raise ValueError(f"{how}: makes groups of consecutive heads, which are not chosen; use cluster")
    assert isinstance(source, DenseConfig)
    if target.kv_heads > source.groups:
        raise ValueError(f"kv_heads: the source has {source.groups} KV heads, fewer than {target.kv_heads}; use fewer")
    check_conversion(model, source, target.model_copy(update={"kv_heads": 1}), how)
    alike = _alike_of_layers(decoder, Form(source, [source.groups], how, by, rotated(model, source), seed), inputs)
    numbers = grouping.best_numbers(alike, target.kv_heads * model.layers, seed=seed)
    kinds = {g: target.model_copy(update={"kv_heads": g}) for g in sorted(set(numbers))}
    if len(kinds) == 1:
        return kinds[numbers[0]]
    named: dict[str, AttentionConfig] = {f"kv_{g}": kind for g, kind in kinds.items()}
    return MixedConfig(kinds=named, pattern=[f"kv_{g}" for g in numbers])


def _alike_of_layers(decoder: Decoder, form: Form, inputs: Sequence[Tensor] | None) -> list[Tensor]:
    """`alike_heads` of each layer, [K, K]. Raises ValueError if they need calibration tokens and there are none."""
    if is_calibrated(form.how, form.by) and inputs is None:
        raise ValueError(_no_tokens(form.how))
    states = [layer.state_dict() for layer in decoder.attention_layers()]
    given = [None] * len(states) if inputs is None else inputs
    return [alike_heads(state, x, form) for state, x in zip(states, given, strict=True)]


def _no_tokens(how: How) -> str:
    return f"{how}: needs calibration tokens; name data to draw them from, compare by weights, or use mean"


@torch.no_grad()
def attention_inputs(decoder: Decoder, batches: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """The normed input of attention of each layer for (tokens [B, S], segments or None): [N, d], on the CPU."""
    found: list[list[Tensor]] = [[] for _ in decoder.attention_layers()]

    def keep(i: int) -> Callable[..., None]:
        return lambda _, args: found[i].append(args[0].detach().flatten(0, -2).cpu())

    hooks = [layer.register_forward_pre_hook(keep(i)) for i, layer in enumerate(decoder.attention_layers())]
    try:
        for tokens, segments in batches:
            decoder.hidden(tokens, segments)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(parts) for parts in found]


# ---------------------------------------------------------------- layers of the targets


def _pool(
    layer: Attention, weights: Mapping[str, Tensor], source: DenseConfig, sizes: Sequence[int], how: How
) -> dict[str, Tensor]:
    """The GQA layer; the parameters of block-sparse attention are the same.

    With `random`, keys and values are those of the untrained `layer`.
    """
    if how == "random":
        new = {name: tensor for name, tensor in layer.state_dict().items() if name in ("w_k", "w_v", "b_k", "b_v")}
        return {**weights, **new}
    plain = {name: tensor for name, tensor in weights.items() if name != "w_gate"}
    joined, _ = with_bias_column(plain)
    pooled = heads.mean_pool(joined, sizes, head_dim=source.head_dim, how="first" if how == "first" else "mean")
    return {**weights, **without_bias_column(pooled, plain)}


def _weighted(
    layer: Attention, weights: Mapping[str, Tensor], source: DenseConfig, sizes: Sequence[int], how: How
) -> dict[str, Tensor]:
    """WGQA: a KV head for each query head, and weights of their sums."""
    members = source.heads // source.groups
    copied = {
        name: weights[name].unflatten(0, (-1, source.head_dim)).repeat_interleave(members, 0).flatten(0, 1)
        for name in ("w_k", "w_v")
    }
    vectors = {name: tensor for name, tensor in layer.state_dict().items() if name in ("k_weights", "v_weights")}
    if how != "random":
        merged = sizes[0] * members
        one = torch.zeros(source.heads, dtype=torch.float64)
        if how == "first":
            one[::merged] = 1.0
        else:
            one[:] = 1 / merged
        vectors = {name: one.repeat_interleave(len(v) // source.heads).to(v) for name, v in vectors.items()}
    return {**weights, **copied, **vectors}


def _routed(
    layer: Attention, weights: Mapping[str, Tensor], source: DenseConfig, sizes: Sequence[int], how: How
) -> dict[str, Tensor]:
    """R-GQA and MoH: a router of 0, and W_O divided by the gates."""
    pooled = _pool(layer, weights, source, sizes, how)
    state = _without_routing(layer)
    layer.load_state_dict({**layer.state_dict(), **state})
    factors = _constant(_head_gates(layer, width=pooled["w_q"].shape[1]), layer)  # [H]
    w_o = pooled["w_o"].double().unflatten(1, (len(factors), -1)) / factors.to(pooled["w_o"].device)[:, None]
    return {**state, **pooled, "w_o": w_o.flatten(1)}


def _split(
    layer: Attention, weights: Mapping[str, Tensor], source: DenseConfig, sizes: Sequence[int], how: How
) -> dict[str, Tensor]:
    """SwitchHead: expert e of a head has its e-th part of the channels; the other channels of the expert are 0."""
    assert isinstance(layer, SwitchHeadAttention)
    experts, head_dim, members = layer.config.experts, source.head_dim, source.heads // source.groups
    state = _without_routing(layer)
    layer.load_state_dict({**layer.state_dict(), **state})
    x, context = _probe(weights["w_q"].shape[1], layer)
    into, out = layer.route(x, context)
    gates = [torch.ones(source.heads, 1) if r is None else _constant(_spread(r, experts), layer) for r in (into, out)]
    into_gate, out_gate = (gate.double().to(weights["w_q"].device) for gate in gates)  # [n, E]
    part = torch.arange(head_dim) * experts // head_dim  # the expert of a channel
    mask = (part == torch.arange(experts)[:, None]).double().to(weights["w_q"].device)  # [E, D]
    expanded = {
        name: weights[name].unflatten(0, (-1, head_dim)).repeat_interleave(members, 0) for name in ("w_k", "w_v")
    }
    w_v = expanded["w_v"][:, None] * (mask / into_gate[..., None])[..., None]  # [n, E, D, d]
    if into is None:
        w_v = expanded["w_v"][:, None]
    w_o = weights["w_o"].double().unflatten(1, (source.heads, 1, head_dim)) * (mask / out_gate[..., None])
    kept = {name: tensor for name, tensor in weights.items() if name not in ("w_k", "w_v", "w_o")}
    new = {"w_k": expanded["w_k"].flatten(0, 1), "w_v": w_v.flatten(0, 2), "w_o": w_o.flatten(1)}
    return {**state, **kept, **new}


_FILL = {
    "gqa": _pool,
    "mqa": _pool,
    "block_sparse": _pool,
    "wgqa": _weighted,
    "rgqa": _routed,
    "moh": _routed,
    "switchhead": _split,
}


def _without_routing(layer: Attention) -> dict[str, Tensor]:
    """What the layer has besides the matrices of attention, with logits of 0 wherever they are trained."""
    ends = ("router.w", "source.w", "destination.w", "w_out", "w_always_on", "w_shared", "w_stage")
    trained = {name for name, _ in layer.named_parameters()}
    matrices = ("w_q", "w_k", "w_v", "w_o")
    return {
        name: torch.zeros_like(tensor) if name in trained and name.endswith(ends) else tensor
        for name, tensor in layer.state_dict().items()
        if name not in matrices and "_rope." not in name
    }


def _probe(width: int, layer: Attention) -> tuple[Tensor, Context]:
    """Random inputs [1, S, d] of a layer, and their context."""
    like = next(layer.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _PROBES, width, generator=generator).to(like)
    tokens = torch.randint(1 << 20, (1, _PROBES), generator=generator).to(like.device)
    return x, Context(rope=(x, x), tokens=tokens)  # routers do not read positions


def _head_gates(layer: Attention, *, width: int) -> Tensor:
    """Gates of all heads of R-GQA or MoH for random tokens: [tokens, H], 0 where a head is not selected."""
    assert isinstance(layer, RoutedGroupedQueryAttention | MixtureOfHeads)
    x, context = _probe(width, layer)
    queries = torch.randn(1, _PROBES, len(layer.w_q) // layer.head_dim, layer.head_dim).to(x)
    if isinstance(layer, MixtureOfHeads):
        return layer.factors(x, context, queries)[0].flatten(0, -2)
    idx, gate, _ = layer.route(x, context, queries.unflatten(2, (-1, layer.members)))
    return gate.new_zeros(*gate.shape[:-1], layer.members).scatter(-1, idx, gate)[0].flatten(1)


def _spread(routing: Any, experts: int) -> Tensor:
    """Gates of all experts of SwitchHead: [tokens, n, E]."""
    gate = routing.gate
    return gate.new_zeros(*gate.shape[:-1], experts).scatter(-1, routing.idx, gate)[0]


def _constant(gates: Tensor, layer: Attention) -> Tensor:
    """The gates of one token [...], of gates [tokens, ...] that are equal for all. Raises ValueError for others."""
    first, config = gates[0].double(), getattr(layer, "config", None)
    kind = getattr(config, "type", "")
    if bool((gates == 0).any()):
        every = {"rgqa": "heads/kv_heads - always_on", "moh": "heads - shared_heads", "switchhead": "experts"}[kind]
        raise ValueError(
            f"attention.top_k: {kind} that leaves experts out at its start cannot compute the function of the source; "
            f"use top_k = {every}, or a first stage of attention.k_schedule with it, which then anneals"
        )
    if not torch.allclose(gates.double(), first.expand_as(gates), rtol=1e-6, atol=0):
        raise ValueError(
            f"attention.router: logits of the router {getattr(getattr(config, 'router', None), 'type', '')} cannot be "
            "0, so its gates differ by token and no start computes the function of the source; use router.type linear, "
            "or a gate of 1 (gate hard or straight_through; form straight_through)"
        )
    return first


def target_fields(source: DenseConfig, to: str, kv_heads: int | None, how: How) -> dict[str, Any]:
    """Fields of the attention that `source` becomes, as in a spec; options that the user gives go above them.

    kv_heads: G; None: as many as the source has (1 for mqa). Routed mechanisms select everything at their start. The
    user states `block` and `blocks` of block_sparse.
    """
    shared = {name: getattr(source, name) for name in AttentionConfig.model_fields if name != "type"}
    groups = source.groups if kv_heads is None else kv_heads
    fields: dict[str, Any] = {"type": to, **shared}
    if to in ("gqa", "mqa"):
        dense = {name: getattr(source, name) for name in ("heads", "gate", "biases", "windows", "window_pattern")}
        return {**fields, **dense, **({"kv_heads": groups} if to == "gqa" else {})}
    if to == "switchhead":
        return {**fields, "kv_heads": source.heads if kv_heads is None else kv_heads, "experts": 2, "top_k": 2}
    fields |= {"heads": source.heads, "kv_heads": groups}
    if to == "wgqa":
        return {**fields, "start": "random" if how == "random" else "mean"}
    if to == "block_sparse":
        return fields
    if to == "rgqa":
        return {**fields, "top_k": max(1, source.heads // max(1, groups))}
    return {**fields, "shared_heads": 0, "top_k": source.heads, "form": "code"}
