"""Router statistics: sums accumulated on the device without synchronization, and the figures computed from them.

Legend: B batch, S sequence, T=B*S tokens, G groups, N experts per group, k selected experts per group and token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.model.router_stats import RouterDetail, RouterStats

TOKEN_BUCKETS = 1024
"""Token ids are counted modulo this. Vocabularies are sorted by frequency, so the most frequent ids do not collide."""

CLOSE_MARGIN = 0.1
"""Top-1 margin below which a token counts as close."""

DEAD_SHARE = 1e-3
"""An expert with less than this fraction of its group's load counts as dead."""


class RouterMeter:
    """Accumulates `RouterStats`; only the load while `closely` is off."""

    def __init__(self) -> None:
        self.closely = True
        self._load: Tensor | None = None
        self._detail: RouterDetail | None = None

    @torch.no_grad()
    def update(self, logits: Tensor, chosen: Tensor, gate: Tensor, tokens: Tensor | None) -> None:
        """logits, chosen (1 or 0) [B, S, G, N]; gate [B, S, G, k]; tokens [B, S]: ids, or None for no token counts."""
        chosen = chosen.float()
        load = chosen.sum((0, 1))
        self.count(load)
        if self.closely:
            detail = _detail(logits.float(), chosen, gate, tokens, load)
            self._detail = detail if self._detail is None else self._detail + detail

    def count(self, load: Tensor) -> None:
        """Add only a load [G, N], which has no gradient."""
        load = load.float()
        self._load = load if self._load is None else self._load + load

    def stats(self) -> RouterStats | None:
        """The sums, or None before the first update."""
        return None if self._load is None else RouterStats(self._load, self._detail)

    def reset(self) -> None:
        self._load = self._detail = None


def _detail(logits: Tensor, chosen: Tensor, gate: Tensor, tokens: Tensor | None, load: Tensor) -> RouterDetail:
    groups, experts = load.shape
    by_token = load.new_zeros(TOKEN_BUCKETS, groups * experts)
    if tokens is not None:
        by_token.index_add_(0, tokens.flatten() % TOKEN_BUCKETS, chosen.view(-1, groups * experts))
    best = logits.topk(min(2, experts), -1).values
    top1_margin = best[..., 0] - best[..., -1]  # [B, S, G]
    # Move experts to dimension 0: reductions over a last dimension of size 4 are several times slower.
    logits, chosen = logits.movedim(-1, 0).contiguous(), chosen.movedim(-1, 0).contiguous()  # [N, B, S, G]
    before, after = chosen[:, :, :-1], chosen[:, :, 1:]
    followers = after.sum((0, 1, 2))
    return RouterDetail(
        tokens=load.new_full((), top1_margin[..., 0].numel()),
        entropy=_entropy(logits).sum((0, 1)),
        choices=load.sum(-1),
        gate=gate.float().sum((0, 1, 3)),
        top1_margin=top1_margin.sum((0, 1)),
        close=(top1_margin < CLOSE_MARGIN).sum((0, 1)).float(),
        switches=followers - (before * after).sum((0, 1, 2)),
        followers=followers,
        token_load=by_token.view(TOKEN_BUCKETS, groups, experts),
    )


def _entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the softmax over dimension 0."""
    shifted = logits - logits.amax(0)
    weight = shifted.exp()
    total = weight.sum(0)
    return total.log() - (weight * shifted).sum(0) / total


@dataclass(frozen=True, kw_only=True)
class RouterFigures:
    """Router figures, one number per group; NaN where the denominator is 0.

    Over all tokens:

    load: [G, N], fraction of the group's load per expert; rows sum to 1.
    effective: Effective number of experts: exp of the entropy of those fractions, 1 to N.
    dead: Number of experts with a fraction below `DEAD_SHARE`.

    Over the `tokens` tokens measured in detail:

    entropy: Entropy of the router's softmax, in nats.
    gate: Mean gate.
    top1_margin: See `RouterDetail`.
    close: Fraction of tokens with a top-1 margin below `CLOSE_MARGIN`.
    switch_rate: Fraction of selected experts that the previous token did not select.
    mutual_information: Of token id and expert, in nats, after `information_bias` was subtracted.
    information_share: `mutual_information` divided by its maximum (see `token_information`).
    """

    load: list[list[float]]
    effective: list[float]
    dead: list[int]
    tokens: int
    entropy: list[float]
    gate: list[float]
    top1_margin: list[float]
    close: list[float]
    switch_rate: list[float]
    mutual_information: list[float]
    information_bias: list[float]
    information_share: list[float]


def figures(load: Tensor, detail: RouterDetail) -> RouterFigures:
    """Compute the figures from the sums over ranks and steps; load [G, N]."""
    share = load.double() / load.double().sum(-1, keepdim=True).clamp_min(1)
    d = detail.like([t.double() for t in detail.tensors()])
    information, bias, most = token_information(d)
    return RouterFigures(
        load=share.tolist(),
        effective=_plogp(share).sum(-1).neg().exp().tolist(),
        dead=(share < DEAD_SHARE).sum(-1).tolist(),
        tokens=int(d.tokens),
        entropy=(d.entropy / d.tokens).tolist(),
        gate=(d.gate / d.choices).tolist(),
        top1_margin=(d.top1_margin / d.tokens).tolist(),
        close=(d.close / d.tokens).tolist(),
        switch_rate=(d.switches / d.followers).tolist(),
        mutual_information=information.tolist(),
        information_bias=bias.tolist(),
        information_share=torch.where(most > 1e-9, information / most, math.nan).tolist(),
    )


def token_information(detail: RouterDetail) -> tuple[Tensor, Tensor, Tensor]:
    """Mutual information of token id and selected expert, its bias and its maximum: three tensors [G], in nats.

    I = H(expert) - H(expert | bucket) over all (token, selected expert) pairs. Bucketing the ids can only lose
    information (data processing inequality), so apart from the sampling bias, this is a lower bound of the true value.

    Bias: the Miller-Madow correction is (cells - 1) / 2n per entropy from n samples. With k distinct experts per token,
    the variance of a count is that of inclusion, and k replaces the 1: (C - k R - E + k) / 2n from n selections, for C
    nonempty cells in R nonempty buckets and E experts in use. The bias is subtracted, and the result is clamped at 0.
    The correction is too small where most ids were seen only once or twice.

    Maximum: H(expert) - ln k, with H corrected likewise. It is reached if the id alone determines the k experts: which
    one of the k a pair holds is still undetermined, hence the ln k.
    """
    joint = detail.token_load.permute(1, 0, 2)  # [G, buckets, N]
    n = joint.sum((1, 2))
    by_bucket, by_expert = joint.sum(2), joint.sum(1)

    def entropy(counts: Tensor) -> Tensor:
        return -_plogp(counts.flatten(1) / n[:, None]).sum(-1)

    k = detail.choices / detail.tokens
    h_expert = entropy(by_expert)
    raw = h_expert + entropy(by_bucket) - entropy(joint)
    cells, buckets, experts = ((t > 0).flatten(1).sum(-1) for t in (joint, by_bucket, by_expert))
    bias = (cells - k * buckets - experts + k) / (2 * n)
    return (raw - bias).clamp_min(0.0), bias, h_expert + (experts - k) / (2 * n) - k.log()


def _plogp(p: Tensor) -> Tensor:
    """p ln p, and 0 for p = 0."""
    return torch.special.xlogy(p, p)
