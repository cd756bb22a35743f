"""One layer of a conversion before heads are pooled: its KV heads in groups that are alike, and aligned.

Legend: H query heads, K KV heads of the source, G groups, D head size, N calibration tokens, d width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway.model.attention.gqa import DenseConfig
from headway.model.convert import grouping, heads
from headway.model.convert.methods import ALIGNED, CHOSEN, By, How


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """What was done to a layer. `groups`: the KV heads of the source that each KV head of the target is made of.

    `keys`, `values`: mean cosine of two heads of a group over the calibration tokens, in consecutive groups of the
    source, and in `groups` after alignment; None without calibration tokens, or if no group has two heads.
    `dispersion`: the criterion of the groups, in consecutive ones and in `groups`; None if they were not chosen.
    """

    layer: int
    groups: tuple[tuple[int, ...], ...]
    dispersion: tuple[float, float] | None = None
    keys: tuple[float, float] | None = None
    values: tuple[float, float] | None = None


class Form(NamedTuple):
    """What a conversion does in each layer. `sizes`: KV heads of each group. `rotated`: channels that RoPE rotates."""

    source: DenseConfig
    sizes: Sequence[int]
    how: How
    by: By
    rotated: int
    seed: int

    def compared(self, x: Tensor | None) -> Tensor | None:
        """What heads are compared at: the inputs, or none to compare the weights."""
        return x if self.by == "activations" else None


def regrouped(
    layer: int, state: Mapping[str, Tensor], form: Form, x: Tensor | None
) -> tuple[dict[str, Tensor], LayerChange]:
    """The weights of the source with heads of a group in consecutive places, and aligned. Not pooled yet."""
    source, sizes, how, _, rotated, seed = form
    own: dict[str, Any] = {"head_dim": source.head_dim}
    weights, gate = with_bias_column(state)
    x = _with_ones(x, weights, state)
    order = list(range(source.groups))
    pooled = max(sizes) > 1
    before = _likeness(weights, x, form) if pooled else None
    dispersion = None
    if how in CHOSEN and pooled:
        alike = _alike(weights, x, form)
        order = grouping.group_heads(alike, sizes, seed=seed)
        both = (grouping.split(each, sizes) for each in (range(source.groups), order))
        consecutive, chosen = (grouping.dispersion(alike, groups) for groups in both)
        dispersion = (consecutive, chosen)
        members = source.heads // source.groups
        query_order = [kv * members + m for kv in order for m in range(members)]
        weights = heads.permute_heads(weights, query_order, **own)
        if gate is not None:
            gate = gate.unflatten(0, (source.heads, -1))[query_order].flatten(0, 1)
    if how in ALIGNED and pooled:
        weights = heads.align(weights, form.compared(x), groups=sizes, rotated=rotated, **own)
    after = _likeness(weights, x, form) if pooled else None
    likeness = {}
    if before is not None and after is not None:
        likeness = {"keys": (before[0], after[0]), "values": (before[1], after[1])}
    groups = tuple(tuple(group) for group in grouping.split(order, sizes))
    weights = without_bias_column(weights, state)
    weights |= {} if gate is None else {"w_gate": gate}
    return weights, LayerChange(layer=layer, groups=groups, dispersion=dispersion, **likeness)


def alike_heads(state: Mapping[str, Tensor], x: Tensor | None, form: Form) -> Tensor:
    """Mean of the cosines of keys and of values of every two KV heads of a layer, [K, K]: what groups are chosen by.

    state: of the attention layer. x: its normed input [N, d] of the calibration tokens; None if `form.by` is weights.
    """
    weights, _ = with_bias_column(state)
    return _alike(weights, _with_ones(x, weights, state), form)


def _alike(weights: Mapping[str, Tensor], x: Tensor | None, form: Form) -> Tensor:
    own: dict[str, Any] = {"head_dim": form.source.head_dim, "rotated": form.rotated}
    aligned = form.how == "cluster_align"
    parts = (heads.similarity(weights, form.compared(x), of=of, aligned=aligned, **own) for of in ("key", "value"))
    key, value = (part.cpu() for part in parts)
    return (key + value) / 2


def _likeness(weights: Mapping[str, Tensor], x: Tensor | None, form: Form) -> tuple[float, float] | None:
    """Mean cosine of two heads of one group, of keys and of values, as the vectors are."""
    if x is None:
        return None
    sizes = torch.tensor(form.sizes)
    group_of = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    pair = (group_of[:, None] == group_of) & ~torch.eye(len(group_of), dtype=torch.bool)
    own: dict[str, Any] = {"head_dim": form.source.head_dim, "rotated": form.rotated, "aligned": False}
    key, value = (heads.similarity(weights, x, of=of, **own).cpu()[pair].mean() for of in ("key", "value"))
    return float(key), float(value)


_BIASES = {"w_q": "b_q", "w_k": "b_k", "w_v": "b_v"}


def with_bias_column(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """(weights in which a bias is one more input column of its matrix, w_gate or None), in float64.

    W x + b = [W b] [x; 1], so that biases are permuted, rotated and pooled with their matrices.
    """
    weights = {name: tensor.double() for name, tensor in state.items() if name not in ("w_gate", *_BIASES.values())}
    for name, bias in _BIASES.items():
        if bias in state:
            weights[name] = torch.cat([weights[name], state[bias].double()[:, None]], 1)
    gate = state.get("w_gate")
    return weights, None if gate is None else gate.double()


def _with_ones(x: Tensor | None, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Tensor | None:
    """x on the device of the weights, with a channel of 1 if they have a column of biases."""
    if x is None:
        return None
    x = x.to(weights["w_k"].device)
    return torch.cat([x, torch.ones_like(x[:, :1])], 1) if weights["w_k"].shape != state["w_k"].shape else x


def without_bias_column(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = dict(weights)
    for name, bias in _BIASES.items():
        if bias in state:
            found[name], found[bias] = weights[name][:, :-1].contiguous(), weights[name][:, -1].clone()
    return found
