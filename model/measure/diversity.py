"""Diversity of the interchangeable heads of a layer: measures of a `HeadPool`, in float64.

Members of a group are compared pairwise, and every measure is a mean over pairs and groups. Random matrices with d D
elements have a cosine of about 1/sqrt(d D), so heads are nearly orthogonal at initialization. Compare a measure with
its value at initialization and with another mechanism.

Legend: B batch, S sequence, T=B*S tokens, d width, G groups, M members per group, D head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.model.base import Attention, Context, HeadPool


@dataclass(frozen=True, kw_only=True)
class HeadDiversity:
    """Diversity measures of one layer.

    c_w: |cos| of the flattened weights of two members.
    c_q: Cosine of two members' projections of the same token before RoPE, mean over tokens.
    c_o: The same for attention outputs before gates. The first token of a sequence or document attends only to itself,
        so its outputs are equal (cosine 1).
    effective_rank: Of the members' weights, 1 to M.
    cka: Linear CKA of the outputs of two members, 0 to 1.
    """

    member: str
    members: int
    c_w: float
    c_q: float
    c_o: float
    effective_rank: float
    cka: float


@torch.no_grad()
def head_diversity(pool: HeadPool) -> HeadDiversity:
    """Compute all measures. Synchronizes with the device."""
    return HeadDiversity(
        member=pool.member,
        members=pool.weights.shape[1],
        c_w=float(weight_cosine(pool.weights)),
        c_q=float(token_cosine(pool.projections)),
        c_o=float(token_cosine(pool.outputs)),
        effective_rank=float(effective_rank(pool.weights)),
        cka=float(linear_cka(pool.outputs)),
    )


def weight_cosine(weights: Tensor) -> Tensor:
    """[G, M, d D] -> mean |cos| of two members' weights, a scalar."""
    unit = F.normalize(weights.double(), dim=-1)
    return _mean_over_pairs((unit @ unit.transpose(1, 2)).abs())


def token_cosine(vectors: Tensor) -> Tensor:
    """[B, S, G, M, D] -> mean over tokens of the cosine of two members' vectors, a scalar."""
    unit = F.normalize(vectors.double().flatten(0, 1), dim=-1)
    return _mean_over_pairs(torch.einsum("tgmc,tgnc->gmn", unit, unit) / len(unit))


def effective_rank(weights: Tensor) -> Tensor:
    """[G, M, d D] -> effective rank (Roy and Vetterli, 2007) of the stacked weights of a group, a scalar in 1 .. M.

    It is exp of the entropy of the singular values, normalized to sum 1. The weights themselves are not normalized.
    """
    share = torch.linalg.svdvals(weights.double())
    share = share / share.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp().mean()


def linear_cka(outputs: Tensor) -> Tensor:
    """[B, S, G, M, D] -> mean linear CKA of two members' outputs over tokens, a scalar in 0 .. 1.

    CKA = |X^T Y|^2 / (|X^T X| |Y^T Y|) of the centred [T, D] matrices X and Y (Kornblith et al., 2019, arXiv
    1905.00414). It is invariant to rotation and scaling of a member's outputs, which W_O could undo. Independent
    outputs have a CKA of about D/(T + D), not 0.
    """
    x = outputs.double().flatten(0, 1)
    x = (x - x.mean(0)).permute(1, 2, 3, 0)  # [G, M, D, T]
    members = range(x.shape[1])
    cross = torch.stack([(x[:, [m]] @ x.transpose(2, 3)).square().sum((2, 3)) for m in members], 1)  # [G, M, M]
    own = cross.diagonal(dim1=1, dim2=2).sqrt()
    return _mean_over_pairs(cross / (own[:, :, None] * own[:, None, :]).clamp_min(1e-300))


def _mean_over_pairs(matrix: Tensor) -> Tensor:
    """[G, M, M], symmetric -> mean of the off-diagonal elements of all groups, a scalar."""
    members = matrix.shape[-1]
    off_diagonal = matrix.sum((1, 2)) - matrix.diagonal(dim1=1, dim2=2).sum(-1)
    return off_diagonal.mean() / (members * (members - 1))


@contextlib.contextmanager
def measured(layers: Mapping[int, Attention]) -> Iterator[dict[int, HeadDiversity]]:
    """Context manager that measures diversity in every forward pass of `layers`. Yields layer index -> latest measures.

    Layers without a pool are omitted. Measurement runs inside the forward pass because engines that shard parameters
    (ZeRO-3) gather them there.
    """
    found: dict[int, HeadDiversity] = {}

    def measure(index: int, layer: Attention, inputs: tuple[Tensor, Context]) -> None:
        with torch.no_grad():
            pool = layer.pool(*inputs)
        if pool is not None:
            whole = inputs[1].sequence.gather
            pool = pool._replace(projections=whole(pool.projections), outputs=whole(pool.outputs))
            found[index] = head_diversity(pool)

    with contextlib.ExitStack() as stack:
        for index, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(measure, index)).remove)
        yield found
