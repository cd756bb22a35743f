"""What keeps a router's experts in use: losses, each named by its published form, and the loss-free bias.

Legend: B batch, S sequence, G groups, N experts per group, k selected ones.
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
    """Coefficients of the balancing losses; 0 leaves a loss out. Each is a mean over groups, summed over layers.

    Per group, with p [N] the router's distribution, f_n the share of tokens' slots that expert n got and P_n mean p_n:

    f_p      N sum_n f_n P_n           1 at uniform use, N at collapse with k = 1 (Fedus et al., 2022, arXiv
                                       2101.03961, eq. 4-6); convention `count` leaves out the 1/k in f, as GQE and MoH
                                       do: k at uniform use
    cv2      Var(load) / Mean(load)^2  of load_n = sum over tokens of p_n; 0 at uniform use (Shazeer et al., 2017,
                                       arXiv 1701.06538)
    z        mean of logsumexp(r)^2    keeps logits small (Zoph et al., 2022, arXiv 2202.08906)
    entropy  -H(mean over tokens of softmax(r)); -log N at uniform use (SwitchHead's and MoEUT's regulariser)

    loss_free_rate: not a loss but a bias per expert, moved by this much towards even load after each step and added to
    sigmoid(r) for the selection only (Wang et al., 2024, arXiv 2408.15664); the load is that of the global batch.

    scope sequence: means over tokens are taken within each sequence and the losses averaged over sequences; the value
    for a batch is then the same however it is cut into micro-batches and ranks. micro_batch: over all tokens of the
    forward pass, the published form; it asks less of each sequence, but depends on how the batch is cut. Where ranks
    share each sequence, both take the tokens of all of them together.
    """

    f_p: float = Field(default=0.0, ge=0, description="coefficient of the f.P loss")
    f_p_convention: Literal["share", "count"] = Field(
        default="share", description="share: f divided by k, 1 at uniform use; count: not divided, k at uniform use"
    )
    cv2: float = Field(default=0.0, ge=0, description="coefficient of the squared coefficient of variation")
    z: float = Field(default=0.0, ge=0, description="coefficient of the z-loss")
    entropy: float = Field(default=0.0, ge=0, description="coefficient of the negative entropy of mean use")
    loss_free_rate: float = Field(default=0.0, ge=0, description="change of an expert's bias per step; 0: no bias")
    scope: Literal["sequence", "micro_batch"] = Field(
        default="sequence", description="tokens over which means are taken; sequence: independent of micro-batches"
    )

    @property
    def has_loss(self) -> bool:
        return any((self.f_p, self.cv2, self.z, self.entropy))

    @property
    def needs_sums_alone(self) -> bool:
        """Whether the loss is one of counts and summed shares over sequences (`loss_of_sums`), or there is none."""
        return not any((self.cv2, self.z, self.entropy))

    def loss_of_sums(self, counts: Tensor, shares: Tensor, seq_len: int, *, slots: int, mean: Mean = alone) -> Tensor:
        """`loss` where `needs_sums_alone`: counts of choices and sums of shares over S tokens, each [B, G, N]."""
        divisor = slots if self.f_p_convention == "share" else 1
        f_and_p = torch.stack([counts, shares]) / seq_len
        if self.scope == "micro_batch":
            f_and_p = f_and_p.mean(1)
        return self.f_p * _f_p(f_and_p, divisor, mean)

    def loss(self, logits: Tensor, p: Tensor, chosen: Tensor, *, slots: int, mean: Mean = alone) -> Tensor:
        """Scalar: the weighted sum. logits, p (sums to 1 over N), chosen (0/1): [B, S, G, N]; `slots` = k.

        `mean` is over the ranks that share each sequence, which then have equal losses. But z, a mean over tokens
        already, stays the rank's own: training follows the mean of the ranks' losses.
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
    """N sum_n f_n P_n, mean over groups (and sequences); `over` are the token dimensions, f is divided by `slots`."""
    return _f_p(torch.stack([chosen.mean(over), p.mean(over)]), slots, mean)


def _f_p(f_and_p: Tensor, slots: int, mean: Mean) -> Tensor:
    """Of means over tokens [2, ..., G, N]."""
    f, share = mean(f_and_p).unbind()  # together: one exchange
    return share.shape[-1] * (f / slots * share).sum(-1).mean()


def cv2_loss(p: Tensor, over: Over, mean: Mean = alone) -> Tensor:
    """Var / Mean^2 over the N experts, alike for mean and summed probabilities; mean over groups (and sequences)."""
    load = mean(p.mean(over))
    return (load.var(-1, correction=0) / load.mean(-1).square()).mean()


def entropy_loss(logits: Tensor, over: Over, mean: Mean = alone) -> Tensor:
    """-H(mean softmax(r)), mean over groups (and sequences)."""
    share = mean(torch.softmax(logits, -1).mean(over))
    return torch.special.xlogy(share, share).sum(-1).mean()
