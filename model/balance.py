"""Load balancing of routers: auxiliary losses in their published forms, and the loss-free bias.

Legend: B batch, S sequence, G groups, N experts per group, k selected experts per group and token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from headway.model.base import StrictConfig, alone

Over = int | tuple[int, int]
Mean = Callable[[Tensor], Tensor]


class BalanceConfig(StrictConfig):
    """Coefficients of the load-balancing losses; 0 turns a loss off. Each is a mean over groups, summed over layers.

    Per group, with p [N] the router probabilities of a token, f_n the fraction of slots assigned to expert n, and P_n
    the mean of p_n:

    f_p      N sum_n f_n P_n           1 at uniform load, N at collapse with k = 1 (Fedus et al., 2022, arXiv
                                       2101.03961, eq. 4-6); convention `count` omits the factor 1/k in f, as GQE and
                                       MoH do: k at uniform load
    cv2      Var(load) / Mean(load)^2  with load_n = sum over tokens of p_n; 0 at uniform load (Shazeer et al., 2017,
                                       arXiv 1701.06538)
    z        mean of logsumexp(r)^2    keeps the logits small (Zoph et al., 2022, arXiv 2202.08906)
    entropy  -H(mean over tokens of softmax(r))
                                       -log N at uniform load (the regularizer of SwitchHead and MoEUT)

    loss_free_rate: Not a loss. A bias per expert is added to sigmoid(r) for the selection only, and moves by this
        amount towards even load after each step (Wang et al., 2024, arXiv 2408.15664). The load is that of the global
        batch.
    scope: sequence: means over tokens are taken within each sequence, and the losses are averaged over sequences. The
        loss of a batch then does not depend on its split into micro-batches and ranks. micro_batch: means are over all
        tokens of the forward pass, the published form. It constrains a single sequence less, but depends on the split.
        With context parallelism, both cover the tokens of all ranks that share a sequence.
    """

    f_p: float = Field(default=0.0, ge=0, description="coefficient of the f.P loss")
    f_p_convention: Literal["share", "count"] = Field(
        default="share", description="share: f divided by k, 1 at uniform load; count: not divided, k at uniform load"
    )
    cv2: float = Field(default=0.0, ge=0, description="coefficient of the squared coefficient of variation")
    z: float = Field(default=0.0, ge=0, description="coefficient of the z-loss")
    entropy: float = Field(default=0.0, ge=0, description="coefficient of the negative entropy of the mean softmax")
    loss_free_rate: float = Field(default=0.0, ge=0, description="change of an expert's bias per step; 0: no bias")
    scope: Literal["sequence", "micro_batch"] = Field(
        default="sequence", description="tokens over which means are taken; sequence: independent of the micro-batch"
    )

    @property
    def has_loss(self) -> bool:
        return any((self.f_p, self.cv2, self.z, self.entropy))

    @property
    def needs_sums_alone(self) -> bool:
        """Whether the loss depends only on the sums of `loss_of_sums`, or there is none."""
        return not any((self.cv2, self.z, self.entropy))

    def loss_of_sums(self, counts: Tensor, shares: Tensor, seq_len: int, *, slots: int, mean: Mean = alone) -> Tensor:
        """`loss` for `needs_sums_alone`. counts, shares [B, G, N]: sums of `chosen` and of p over the S tokens."""
        divisor = slots if self.f_p_convention == "share" else 1
        f_and_p = torch.stack([counts, shares]) / seq_len
        if self.scope == "micro_batch":
            f_and_p = f_and_p.mean(1)
        return self.f_p * _f_p(f_and_p, divisor, mean)

    def loss(self, logits: Tensor, p: Tensor, chosen: Tensor, *, slots: int, mean: Mean = alone) -> Tensor:
        """Weighted sum of the losses, a scalar. logits, p (sums to 1 over N), chosen (0/1): [B, S, G, N]; `slots` = k.

        `mean` averages over the ranks that share each sequence, so that their losses are equal. It is not applied to
        the z-loss, which is already a mean over tokens: training averages the losses of the ranks.
        """
        over = 1 if self.scope == "sequence" else (0, 1)
        total, divisor = logits.new_zeros(()), slots if self.f_p_convention == "share" else 1
        if self.f_p:
            total = total + self.f_p * f_p_loss(p, chosen, over, slots=divisor, mean=mean)
        if self.cv2:
            total = total + self.cv2 * cv2_loss(p, over, mean)
        if self.z:
            total = total + self.z * torch.logsumexp(logits, -1).square().mean()
        if self.entropy:
            total = total + self.entropy * entropy_loss(logits, over, mean)
        return total


def f_p_loss(p: Tensor, chosen: Tensor, over: Over, *, slots: int, mean: Mean = alone) -> Tensor:
    """N sum_n f_n P_n, mean over groups (and sequences). `over`: token dimensions; f is divided by `slots`."""
    return _f_p(torch.stack([chosen.mean(over), p.mean(over)]), slots, mean)


def _f_p(f_and_p: Tensor, slots: int, mean: Mean) -> Tensor:
    """The loss from the stacked means over tokens of `chosen` and p, [2, ..., G, N]."""
    f, share = mean(f_and_p).unbind()  # stacked, so that one all-reduce suffices
    return share.shape[-1] * (f / slots * share).sum(-1).mean()


def cv2_loss(p: Tensor, over: Over, mean: Mean = alone) -> Tensor:
    """Var / Mean^2 of the load over the N experts, mean over groups (and sequences). The scale of p cancels out."""
    load = mean(p.mean(over))
    return (load.var(-1, correction=0) / load.mean(-1).square()).mean()


def entropy_loss(logits: Tensor, over: Over, mean: Mean = alone) -> Tensor:
    """-H(mean softmax(r)), mean over groups (and sequences)."""
    share = mean(torch.softmax(logits, -1).mean(over))
    return torch.special.xlogy(share, share).sum(-1).mean()
