"""From multi-head to grouped-query attention: re-ordering, alignment and pooling of the heads of one layer.

Functions of the weights of `headway.model.attention.grouped.GroupedQueryAttention`, as `state_dict` gives them; they
compute in float64 and return new tensors in the dtypes they were given. Mean pooling is that of Ainslie et al. (2023,
arXiv 2305.13245, section 2.1); alignment and grouping by similarity that of arXiv 2412.20677, without its pruning:

    order   = group_heads(similarity(weights, x, ...), groups, seed=0)
    weights = permute_heads(weights, order, ...)         the same function
    weights = align(weights, x, groups=groups, ...)      the same function
    weights = mean_pool(weights, groups, ...)            exact where a group's heads are turned copies of each other

`fold_decoder` turns a whole decoder of weighted GQA into one of plain GQA.

Legend: N calibration tokens, d width, H query heads, K KV heads of the given layer (K=H for MHA), M=H/K, G groups to
pool into, P=K/G KV heads per group, D head size, R rotated channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from headway.model.attention.wgqa import WeightedGroupedQueryAttention, WgqaConfig
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder

Criterion = Literal["cosine", "distance"]
"""What makes two heads alike: the angles between their vectors, or the distances, which feel the lengths too."""

GAINS = ("q_rope.norm.gain", "k_rope.norm.gain")
"""Those of QK-norm, which all heads share."""

MAX_ROUNDS = 100
MIN_GAIN = 1e-5


class Heads(NamedTuple):
    """The four matrices, cut into heads, float64."""

    q: Tensor  # [K, M, D, d]
    k: Tensor  # [K, D, d]
    v: Tensor  # [K, D, d]
    o: Tensor  # [K, M, D, d]: w_o transposed

    def joined(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Back to the names, shapes and dtypes of a layer; what is not a matrix of heads is kept."""
        matrices = {
            "w_q": self.q.flatten(0, 2),
            "w_k": self.k.flatten(0, 1),
            "w_v": self.v.flatten(0, 1),
            "w_o": self.o.flatten(0, 2).T.contiguous(),
        }
        return {name: matrices[name].to(old.dtype) if name in matrices else old.clone() for name, old in like.items()}


def permute_heads(weights: Mapping[str, Tensor], order: Sequence[int], *, head_dim: int) -> dict[str, Tensor]:
    """The layer with query head `order[i]` in place i: the same function.

    A query head takes its columns of w_o along. Where heads share keys and values (K < H) the heads of one KV head must
    stay together, within them any order will do; KV heads move with their query heads. Raises ValueError otherwise.
    """
    heads = _cut(weights, head_dim)
    kv_heads, members = heads.q.shape[:2]
    if sorted(order) != list(range(kv_heads * members)):
        raise ValueError(
            f"order: not every one of the {kv_heads * members} query heads stands in it once; "
            f"use what `group_heads` returns, or a permutation of 0 to {kv_heads * members - 1}"
        )
    new = torch.tensor(order).unflatten(0, (kv_heads, members))
    owner = new // members
    if (owner != owner[:, :1]).any():
        raise ValueError(
            f"order: separates query heads that share a KV head (there are {members} to each); "
            f"use an order of whole groups, or the weights of a layer with as many KV heads as query heads"
        )
    kv_order = owner[:, 0]
    q, o = (part.flatten(0, 1)[new] for part in (heads.q, heads.o))
    return Heads(q, heads.k[kv_order], heads.v[kv_order], o).joined(weights)


def mean_pool(
    weights: Mapping[str, Tensor], groups: int, *, head_dim: int, how: Literal["mean", "first"] = "mean"
) -> dict[str, Tensor]:
    """The layer with `groups` KV heads: each the mean, or the first, of K/G consecutive ones; w_q and w_o are kept.

    Legal under RoPE because all heads turn alike. Raises ValueError unless K divides into `groups`.
    """
    heads = _cut(weights, head_dim)
    check_equal_groups(len(heads.k), groups)
    k, v = (part.unflatten(0, (groups, -1)) for part in (heads.k, heads.v))  # [G, P, D, d]
    pooled = (k.mean(1), v.mean(1)) if how == "mean" else (k[:, 0], v[:, 0])
    return Heads(heads.q, *pooled, heads.o).joined(weights)


def align(
    weights: Mapping[str, Tensor],
    x: Tensor,
    *,
    groups: int,
    head_dim: int,
    rotated: int,
    criterion: Criterion = "cosine",
) -> dict[str, Tensor]:
    """The same function, with the keys and the values of each group's KV heads turned as near to each other as can be.

    x [..., d]: normed inputs of the layer, over some tokens of calibration; D or more for a unique answer, whatever
    they are the function stays. Groups are K/G consecutive KV heads. Values turn by any orthogonal matrix, undone in
    w_o. Keys turn, undone in w_q, by what commutes with RoPE: a rotation of each plane (channels i and i + R/2 of the
    first R = `rotated`), any orthogonal matrix of the channels from R on.

    Raises ValueError where the layer has QK-norm: its gains and the turning of channels do not commute.
    """
    _refuse_qk_norm(weights, "use pooling without alignment, or a model trained with qk_norm false")
    heads = _cut(weights, head_dim)
    check_equal_groups(len(heads.k), groups)
    turn_k = _generalised_procrustes(_products(heads.k, x, criterion), groups, _check_rotated(rotated, head_dim))
    turn_v = _generalised_procrustes(_products(heads.v, x, criterion), groups, 0)
    return Heads(
        torch.einsum("kcd,kmcx->kmdx", turn_k, heads.q),
        torch.einsum("kcd,kcx->kdx", turn_k, heads.k),
        torch.einsum("kcd,kcx->kdx", turn_v, heads.v),
        torch.einsum("kcd,kmcx->kmdx", turn_v, heads.o),
    ).joined(weights)


def similarity(
    weights: Mapping[str, Tensor],
    x: Tensor,
    *,
    head_dim: int,
    rotated: int,
    of: Literal["value", "key"] = "value",
    criterion: Criterion = "cosine",
) -> Tensor:
    """[K, K], float64, symmetric: how alike the values (or keys) of two KV heads are once aligned as `align` can.

    x [..., d]: normed inputs of the layer. The mean over tokens of the cosine of the two heads' vectors, or of minus
    their squared distance. Raises ValueError for keys of a layer with QK-norm, which cannot be aligned.
    """
    if of == "key":
        _refuse_qk_norm(weights, "use the similarity of values, or a model trained with qk_norm false")
    heads = _cut(weights, head_dim)
    planes = _check_rotated(rotated, head_dim) if of == "key" else 0
    products = _products(heads.k if of == "key" else heads.v, x, criterion)
    turns = _best_turn(products, planes)
    aligned = (turns * products).sum((-2, -1))
    aligned = (aligned + aligned.T) / 2  # equal but for rounding
    if criterion == "cosine":
        return aligned
    squares = products.diagonal(dim1=0, dim2=1).diagonal().sum(-1)  # [K]: mean squared length
    return 2 * aligned - squares[:, None] - squares[None, :]


def group_heads(similarity: Tensor, groups: int, *, seed: int = 0, restarts: int = 200, swaps: int = 3000) -> list[int]:
    """Order of the K heads, groups of K/G one after the other, that makes heads of one group alike.

    similarity [K, K] is symmetric. Maximises its sum over the pairs within groups by greedy hill climbing: from each of
    `restarts` random groupings, `swaps` random exchanges of two heads of different groups, kept where the sum grows.
    Heads ascend within their group and groups by their first head, so equal groupings are equal orders. Raises
    ValueError unless K divides into `groups`.
    """
    count = len(similarity)
    check_equal_groups(count, groups)
    if groups in (1, count):
        return list(range(count))
    size = count // groups
    pairs = similarity.double().clone().fill_diagonal_(0.0)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(count, generator=generator) for _ in range(restarts)])  # [restarts, K]
    rows = torch.arange(restarts)
    for _ in range(swaps):
        a = torch.randint(count, (restarts,), generator=generator)
        step = size - a % size + torch.randint(count - size, (restarts,), generator=generator)
        b = (a + step) % count  # any place of another group
        head_a, head_b = order[rows, a], order[rows, b]
        difference = (pairs[head_a] - pairs[head_b]).gather(1, order).unflatten(1, (groups, size)).sum(2)
        gain = difference[rows, b // size] - difference[rows, a // size] - 2 * pairs[head_a, head_b]
        better = gain > 0
        order[rows, a] = torch.where(better, head_b, head_a)
        order[rows, b] = torch.where(better, head_a, head_b)
    grouped = order.unflatten(1, (groups, size))
    totals = pairs[grouped[..., :, None], grouped[..., None, :]].sum((1, 2, 3))
    best = sorted(sorted(group) for group in grouped[int(totals.argmax())].tolist())
    return [head for group in best for head in group]


def fold_decoder(decoder: Decoder, model: ModelConfig) -> Decoder:
    """The decoder with its weighted GQA folded into plain GQA: the same logits, GQA's parameters and decoding cost.

    `model`: the shape `decoder` was built with. The parameters are new ones, of its dtype and on its device. Raises
    ValueError where the attention is not of type wgqa.
    """
    config = decoder.attention
    if not isinstance(config, WgqaConfig):
        raise ValueError(
            f"decoder: its attention is of type {config.type}, which has nothing to fold; "
            f"use the decoder as it is, or one with attention of type wgqa"
        )
    state = decoder.state_dict()
    for i, layer in enumerate(decoder.attention_layers()):
        assert isinstance(layer, WeightedGroupedQueryAttention), "all layers are of the decoder's mechanism"
        state |= {f"blocks.{i}.attn.{name}": tensor for name, tensor in layer.folded_weights().items()}
    folded = Decoder(model, config.folded, vocab_size=len(decoder.embedding), seed=0).to(decoder.embedding)
    folded.load_state_dict({name: state[name] for name in folded.state_dict()})
    return folded.train(decoder.training)


def check_equal_groups(kv_heads: int, groups: int) -> None:
    """Raises ValueError unless the KV heads divide into `groups` equal groups."""
    if groups < 1 or kv_heads % groups:
        legal = [g for g in range(1, kv_heads + 1) if kv_heads % g == 0]
        below = max((g for g in legal if g < groups), default=1)
        above = min((g for g in legal if g > groups), default=kv_heads)
        use = f"{below} or {above}" if below != above else f"{below}, or a layer with {groups} KV heads"
        raise ValueError(f"groups: {kv_heads} KV heads do not divide into {groups} equal groups; use {use}")


def _products(matrices: Tensor, x: Tensor, criterion: Criterion) -> Tensor:
    """matrices [K, D, d], x [..., d] -> mean over tokens of y_i y_j^T of every two heads, [K, K, D, D]; y = W x."""
    tokens = x.detach().double().flatten(0, -2)
    y = torch.einsum("kdx,nx->nkd", matrices, tokens)
    if criterion == "cosine":
        y = torch.nn.functional.normalize(y, dim=-1)
    return torch.einsum("nic,njd->ijcd", y, y) / len(tokens)


def _best_turn(product: Tensor, rotated: int) -> Tensor:
    """product [..., D, D] = Y_i^T Y_j -> the Q [..., D, D] for which Y_i Q is nearest to Y_j (orthogonal Procrustes).

    That Q maximises tr(Q^T product). The first `rotated` channels turn by planes (i, i + rotated/2), where the
    maximum over rotations [[cos, -sin], [sin, cos]] is at the angle of (trace, difference off the diagonal); the
    others by U V^T of the singular value decomposition.
    """
    half = rotated // 2
    turn = torch.zeros_like(product)
    i, j = torch.arange(half), torch.arange(half, rotated)
    angle = torch.atan2(product[..., j, i] - product[..., i, j], product[..., i, i] + product[..., j, j])
    turn[..., i, i] = turn[..., j, j] = angle.cos()
    turn[..., j, i] = angle.sin()
    turn[..., i, j] = -angle.sin()
    u, _, vh = torch.linalg.svd(product[..., rotated:, rotated:])
    turn[..., rotated:, rotated:] = u @ vh
    return turn


def _generalised_procrustes(products: Tensor, groups: int, rotated: int) -> Tensor:
    """products [K, K, D, D] of every two heads -> each head's turn [K, D, D] towards the mean of its group.

    All start at the group's first head, then at the mean of the turned heads, until that no longer helps.
    """
    size = len(products) // groups
    turns = []
    for group in range(groups):
        span = slice(group * size, (group + 1) * size)
        within = products[span, span]  # [P, P, D, D]
        turn = _best_turn(within[:, 0], rotated)
        # The sum of squared distances to the mean is constant minus the mean's squared length times P.
        towards = torch.einsum("ijcd,jde->ice", within, turn) / size
        length = (turn * towards).sum()
        for _ in range(MAX_ROUNDS):
            turn = _best_turn(towards, rotated)
            towards = torch.einsum("ijcd,jde->ice", within, turn) / size
            before, length = length, (turn * towards).sum()
            if length - before < MIN_GAIN * before:
                break
        turns.append(turn)
    return torch.cat(turns)


def _cut(weights: Mapping[str, Tensor], head_dim: int) -> Heads:
    """Raises ValueError where the weights are not those of grouped-query attention with heads of `head_dim`."""
    names = {"w_q", "w_k", "w_v", "w_o"}
    if not names <= set(weights) or set(weights) - names - set(GAINS):
        raise ValueError(
            f"weights: hold {', '.join(sorted(weights))}, and what is not a matrix of heads would not move with them; "
            f"use the state_dict of one layer of type mha or of type gqa"
        )
    kv_heads, rest = divmod(len(weights["w_k"]), head_dim)
    heads, rest_q = divmod(len(weights["w_q"]), head_dim)
    if rest or rest_q or heads % max(kv_heads, 1) or weights["w_v"].shape != weights["w_k"].shape:
        shapes = ", ".join(f"{name} {list(weights[name].shape)}" for name in sorted(names))
        raise ValueError(
            f"head_dim: rows of {shapes} are not whole heads of {head_dim} channels; "
            f"use the head_dim of the layer's config, or a state_dict of type mha or gqa"
        )
    w_q, w_k, w_v, w_o = (weights[name].detach().double() for name in ("w_q", "w_k", "w_v", "w_o"))
    by_query = (kv_heads, -1, head_dim)
    return Heads(
        w_q.unflatten(0, by_query),
        w_k.unflatten(0, (kv_heads, head_dim)),
        w_v.unflatten(0, (kv_heads, head_dim)),
        w_o.T.unflatten(0, by_query),
    )


def _check_rotated(rotated: int, head_dim: int) -> int:
    if rotated % 2 or not 0 <= rotated <= head_dim:
        raise ValueError(
            f"rotated: {rotated} of {head_dim} channels, and RoPE turns pairs; "
            f"use `rotated` of the layer's config, or an even number from 0 to {head_dim}"
        )
    return rotated


def _refuse_qk_norm(weights: Mapping[str, Tensor], alternatives: str) -> None:
    if any(name in weights for name in GAINS):
        raise ValueError(
            f"weights: queries and keys are normed (QK-norm), and the norm's gains do not commute with the turning of "
            f"channels; {alternatives}"
        )
