"""Conversion from multi-head to grouped-query attention: reorder, align and pool the heads of one layer.

The functions take the `state_dict` of a `headway.model.attention.grouped.GroupedQueryAttention`. They compute in
float64 and return new tensors in the dtypes of the inputs. Mean pooling follows Ainslie et al. (2023, arXiv 2305.13245,
section 2.1). Alignment and grouping by similarity of activations follow arXiv 2412.20677, without its pruning. Without
activations (x None), the matrices of the heads are compared themselves:

    order   = group_heads(similarity(weights, x, ...), groups, seed=0)     headway.model.convert.grouping
    weights = permute_heads(weights, order, ...)         computes the same function
    weights = align(weights, x, groups=groups, ...)      computes the same function
    weights = mean_pool(weights, groups, ...)            exact if a group's heads are rotated copies of each other

`fold_decoder` converts a whole decoder from weighted GQA to plain GQA.

Legend: N calibration tokens, d width, H query heads, K KV heads of the given layer (K=H for MHA), M=H/K, G groups to
pool into, P=K/G KV heads per group, D head size, R rotated channels. Where `groups` may be a list, it gives the number
of consecutive KV heads of each group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from headway.model.attention.wgqa import WeightedGroupedQueryAttention, WgqaConfig
from headway.model.config import ModelConfig
from headway.model.convert.grouping import sizes_of
from headway.model.decoder import Decoder

Criterion = Literal["cosine", "distance"]
"""Similarity of two heads: by the cosine of their vectors, or by the distance, which also depends on their norms."""

GAINS = ("q_rope.norm.gain", "k_rope.norm.gain")
"""Gains of QK-norm, which all heads share."""

MAX_ROUNDS = 100
MIN_GAIN = 1e-5


class Heads(NamedTuple):
    """The four projection matrices in float64, split into heads."""

    q: Tensor  # [K, M, D, d]
    k: Tensor  # [K, D, d]
    v: Tensor  # [K, D, d]
    o: Tensor  # [K, M, D, d]: w_o transposed

    def joined(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert back to a `state_dict` with the names, shapes and dtypes of `like`. Other tensors are copied."""
        matrices = {
            "w_q": self.q.flatten(0, 2),
            "w_k": self.k.flatten(0, 1),
            "w_v": self.v.flatten(0, 1),
            "w_o": self.o.flatten(0, 2).T.contiguous(),
        }
        return {name: matrices[name].to(old.dtype) if name in matrices else old.clone() for name, old in like.items()}


def permute_heads(weights: Mapping[str, Tensor], order: Sequence[int], *, head_dim: int) -> dict[str, Tensor]:
    """Move query head `order[i]` to position i. The layer computes the same function.

    The columns of w_o move with their query head, and KV heads move with their query heads. If query heads share KV
    heads (K < H), `order` must keep those of each KV head adjacent, in any order. Raises ValueError otherwise.
    """
    heads = _cut(weights, head_dim)
    kv_heads, members = heads.q.shape[:2]
    if sorted(order) != list(range(kv_heads * members)):
        raise ValueError(
            f"order: must contain each of the {kv_heads * members} query heads exactly once; "
            f"use what `group_heads` returns, or a permutation of 0 to {kv_heads * members - 1}"
        )
    new = torch.tensor(order).unflatten(0, (kv_heads, members))
    owner = new // members
    if (owner != owner[:, :1]).any():
        raise ValueError(
            f"order: separates query heads that share a KV head ({members} query heads per KV head); "
            f"use an order of whole groups, or the weights of a layer with as many KV heads as query heads"
        )
    kv_order = owner[:, 0]
    q, o = (part.flatten(0, 1)[new] for part in (heads.q, heads.o))
    return Heads(q, heads.k[kv_order], heads.v[kv_order], o).joined(weights)


def mean_pool(
    weights: Mapping[str, Tensor],
    groups: int | Sequence[int],
    *,
    head_dim: int,
    how: Literal["mean", "first"] = "mean",
) -> dict[str, Tensor]:
    """Reduce the layer to `groups` KV heads: each is the mean (or the first) of consecutive ones.

    w_q and w_o are unchanged. Pooling is compatible with RoPE because RoPE is the same in all heads. Raises ValueError
    unless `groups` divides K, or adds up to K.
    """
    heads = _cut(weights, head_dim)
    sizes = sizes_of(len(heads.k), groups)
    parts = [[each.mean(0) if how == "mean" else each[0] for each in p.split(sizes)] for p in (heads.k, heads.v)]
    k, v = (torch.stack(part) for part in parts)  # [G, D, d]
    return Heads(heads.q, k, v, heads.o).joined(weights)


def align(
    weights: Mapping[str, Tensor],
    x: Tensor | None,
    *,
    groups: int | Sequence[int],
    head_dim: int,
    rotated: int,
    criterion: Criterion = "cosine",
) -> dict[str, Tensor]:
    """Rotate keys and values so that the KV heads of each group are as close to each other as possible.

    The layer computes the same function for any x. x [..., d]: normed inputs of the layer for N calibration tokens; the
    result is unique for N >= D. None: the matrices themselves are aligned. Groups are consecutive KV heads. Values are
    multiplied by an orthogonal matrix, and its inverse is applied to w_o. Keys are multiplied by an orthogonal matrix
    that commutes with RoPE, and its inverse is applied to w_q: a rotation in each plane (channels i and i + R/2 of the
    first R = `rotated`), and any orthogonal matrix on the remaining channels.

    Raises ValueError if the layer has QK-norm, whose gains do not commute with rotations.
    """
    _refuse_qk_norm(weights, "use pooling without alignment, or a model trained with qk_norm false")
    heads = _cut(weights, head_dim)
    sizes = sizes_of(len(heads.k), groups)
    turn_k = _generalised_procrustes(_products(heads.k, x, criterion), sizes, _check_rotated(rotated, head_dim))
    turn_v = _generalised_procrustes(_products(heads.v, x, criterion), sizes, 0)
    return Heads(
        torch.einsum("kcd,kmcx->kmdx", turn_k, heads.q),
        torch.einsum("kcd,kcx->kdx", turn_k, heads.k),
        torch.einsum("kcd,kcx->kdx", turn_v, heads.v),
        torch.einsum("kcd,kmcx->kmdx", turn_v, heads.o),
    ).joined(weights)


def similarity(
    weights: Mapping[str, Tensor],
    x: Tensor | None,
    *,
    head_dim: int,
    rotated: int,
    of: Literal["value", "key"] = "value",
    criterion: Criterion = "cosine",
    aligned: bool = True,
) -> Tensor:
    """Similarity of the values (or keys) of every two KV heads: [K, K], float64, symmetric.

    x [..., d]: normed inputs of the layer. The similarity is the mean over tokens of the cosine of the two heads'
    vectors, or of minus their squared distance. None: of the matrices [D, d] of the two heads, as vectors of D d
    numbers:

        s_ij = max over Q of <Q W_i, W_j> / (|W_i| |W_j|)       <A, B> = tr(A^T B), |A| = Frobenius norm

    `aligned`: after the best alignment of the two; else of the vectors as they are (Q = 1). Raises ValueError for
    aligned keys of a layer with QK-norm, which `align` does not support.
    """
    if of == "key" and aligned:
        _refuse_qk_norm(weights, "use the similarity of values, or a model trained with qk_norm false")
    heads = _cut(weights, head_dim)
    planes = _check_rotated(rotated, head_dim) if of == "key" else 0
    products = _products(heads.k if of == "key" else heads.v, x, criterion)
    if aligned:
        inner = (_best_turn(products, planes) * products).sum((-2, -1))
    else:
        inner = products.diagonal(dim1=-2, dim2=-1).sum(-1)
    inner = (inner + inner.T) / 2  # equal but for rounding
    if criterion == "cosine":
        return inner
    squares = products.diagonal(dim1=0, dim2=1).diagonal().sum(-1)  # [K]: mean squared length
    return 2 * inner - squares[:, None] - squares[None, :]


def fold_decoder(decoder: Decoder, model: ModelConfig) -> Decoder:
    """Fold a decoder with weighted GQA into one with plain GQA, which has equal logits and the cost of GQA.

    `model`: the config that `decoder` was built with. The new decoder has its dtype and device, and shares no memory
    with it. Raises ValueError if the attention is not of type wgqa.
    """
    config = decoder.attention
    if not isinstance(config, WgqaConfig):
        raise ValueError(
            f"decoder: its attention is of type {config.type}, and only type wgqa can be folded; "
            f"use the decoder unchanged, or one with attention of type wgqa"
        )
    state = decoder.state_dict()
    for i, layer in enumerate(decoder.attention_layers()):
        assert isinstance(layer, WeightedGroupedQueryAttention), "all layers are of the decoder's mechanism"
        state |= {f"blocks.{i}.attn.{name}": tensor for name, tensor in layer.folded_weights().items()}
    folded = Decoder(model, config.folded, vocab_size=len(decoder.embedding), seed=0).to(decoder.embedding)
    folded.load_state_dict({name: state[name] for name in folded.state_dict()})
    return folded.train(decoder.training)


def _products(matrices: Tensor, x: Tensor | None, criterion: Criterion) -> Tensor:
    """matrices [K, D, d], x [..., d] -> mean over tokens of y_i y_j^T for all pairs of heads, [K, K, D, D]; y = W x.

    Without x, W_i W_j^T: with "distance" the mean over inputs whose second moments are the identity; with "cosine",
    matrices have norm 1.
    """
    if x is None:
        if criterion == "cosine":
            norms = torch.linalg.matrix_norm(matrices, keepdim=True)
            matrices = matrices / norms.clamp_min(torch.finfo(torch.float64).tiny)
        return torch.einsum("icx,jdx->ijcd", matrices, matrices)
    tokens = x.detach().double().flatten(0, -2)
    y = torch.einsum("kdx,nx->nkd", matrices, tokens)
    if criterion == "cosine":
        y = torch.nn.functional.normalize(y, dim=-1)
    return torch.einsum("nic,njd->ijcd", y, y) / len(tokens)


def _best_turn(product: Tensor, rotated: int) -> Tensor:
    """Orthogonal Procrustes: product [..., D, D] = Y_i^T Y_j -> the Q [..., D, D] for which Y_i Q is closest to Y_j.

    Q maximizes tr(Q^T product). The first `rotated` channels are rotated in planes (i, i + rotated/2); the optimal
    rotation [[cos, -sin], [sin, cos]] has the angle atan2(difference of the off-diagonal elements, trace). For the
    other channels, Q = U V^T from the singular value decomposition.
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


def _generalised_procrustes(products: Tensor, sizes: Sequence[int], rotated: int) -> Tensor:
    """Generalized Procrustes: products [K, K, D, D] of all pairs -> each head's rotation [K, D, D] to its group's mean.

    Heads are first aligned to the group's first head, then repeatedly to the mean of the rotated heads until the gain
    falls below `MIN_GAIN` (relative).
    """
    turns, begin = [], 0
    for size in sizes:
        span = slice(begin, begin + size)
        begin += size
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
    """Split weights into heads. Raises ValueError if they are not those of GQA with heads of size `head_dim`."""
    names = {"w_q", "w_k", "w_v", "w_o"}
    if not names <= set(weights) or set(weights) - names - set(GAINS):
        raise ValueError(
            f"weights: {', '.join(sorted(weights))}; only w_q, w_k, w_v, w_o and QK-norm gains can be converted; "
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
            f"rotated: {rotated} of {head_dim} channels, but RoPE rotates pairs; "
            f"use `rotated` of the layer's config, or an even number from 0 to {head_dim}"
        )
    return rotated


def _refuse_qk_norm(weights: Mapping[str, Tensor], alternatives: str) -> None:
    if any(name in weights for name in GAINS):
        raise ValueError(
            f"weights: the layer has QK-norm, whose gains do not commute with rotations of the channels; {alternatives}"
        )
