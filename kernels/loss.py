"""Cross entropy of a language-model head, without keeping the logits.

Legend: T tokens, d width, V vocabulary, C tokens of one chunk. V' rows of it where ranks share it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100

# Logits of one chunk. On CPU 8 MiB of fp32 stays near the cores; an accelerator wants large products.
CHUNK_ELEMENTS_CPU = 1 << 21
CHUNK_ELEMENTS_ACCELERATOR = 1 << 26


@dataclass(frozen=True, kw_only=True)
class VocabularyPart:
    """The rows of the vocabulary that this rank holds: `start` and those after it, as many as its weight has.

    `sum` and `largest` reduce a tensor elementwise over the ranks that hold the other rows, into a new tensor, without
    gradient. Every rank calls them equally often, with equal shapes.
    """

    start: int
    sum: Callable[[Tensor], Tensor]
    largest: Callable[[Tensor], Tensor]

    def find(self, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """labels [C] -> (whether it is one of the `rows` here, bool [C]; which one, 0 where it is not, [C, 1])."""
        row = labels - self.start
        here = (row >= 0) & (row < rows)  # an ignored label is below every start
        return here, torch.where(here, row, 0)[:, None]


def linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_tokens: int | None = None,
    part: VocabularyPart | None = None,
) -> Tensor:
    """Sum over tokens of -log softmax(hidden weight^T)[label]; fp32, or float64 where hidden is.

    hidden [T, d], weight [V, d], labels [T] int64, of which -100 adds nothing. Where the logits exceed one chunk they
    are formed chunk by chunk, and the gradients with them (the loss is a sum, so the incoming gradient is one scalar):
    the same three products as the plain form, C V numbers instead of three times T V. Measured on 2 CPU cores, forward
    and backward: T=V=4096, d=256: 205 ms against 255 to 279 plain; T=2048, V=4096, d=128: 72 against 85.

    With `part`, weight [V', d] holds that part's rows; hidden and labels (numbers of the whole vocabulary) are the same
    on every rank, and so is the result: the loss over the whole vocabulary. The gradient of weight is that of its rows;
    the gradient of hidden is this rank's share, to be summed over ranks. C V' numbers, and per chunk two exchanges
    between ranks, one maximum of C numbers and one sum of 2 C (the plan of Megatron-LM's vocabulary-parallel loss,
    Shoeybi et al., 2019, arXiv 1909.08053). Parts of unequal length need `chunk_tokens`, lest their chunks differ; a
    label that no part holds is not noticed.
    """
    tokens, vocab = len(hidden), len(weight)
    chunk_tokens = chunk_tokens or _chunk_tokens(hidden, vocab)
    if part is None and tokens <= chunk_tokens:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return F.cross_entropy(F.linear(hidden, weight).to(wide), labels, ignore_index=IGNORED, reduction="sum")
    # Asked here: inside a Function gradients are off, and `needs_input_grad` does not know of no_grad.
    want_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return cast(Tensor, _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk_tokens, want_grad, part))


@torch.no_grad()
def linear_cross_entropy_and_hits(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_tokens: int | None = None,
    part: VocabularyPart | None = None,
) -> tuple[Tensor, Tensor]:
    """For evaluation: (sum of `linear_cross_entropy_sum`, number of labels whose logit is its token's largest, int64).

    Of equal largest logits the first counts as the guess. Shapes as there; the logits are formed once, chunk by chunk,
    and no gradient is. Finding the largest of logits at hand costs less than the scatter of the timing: 1 ms of 11 at
    most at T=1024, V=4096, d=128 on 2 CPU cores. `part` as there, and both results are the same on every rank; hits
    add C numbers to the sum, and no exchange.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_zeros((), dtype=wide)
    hits = torch.zeros((), dtype=torch.int64, device=hidden.device)
    chunk_tokens = chunk_tokens or _chunk_tokens(hidden, len(weight))
    for start in range(0, len(hidden), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        logits = F.linear(hidden[chunk], weight).to(wide)  # [C, V]
        if part is not None:
            chunk_loss, chunk_hits = _loss_and_hits_over_parts(logits, labels[chunk], part)
            loss += chunk_loss
            hits += chunk_hits
            continue
        loss += F.cross_entropy(logits, labels[chunk], ignore_index=IGNORED, reduction="sum")
        hits += (logits.argmax(-1) == labels[chunk]).sum()  # an ignored label is no token's number
    return loss, hits


def _chunk_tokens(hidden: Tensor, vocab: int) -> int:
    elements = CHUNK_ELEMENTS_CPU if hidden.device.type == "cpu" else CHUNK_ELEMENTS_ACCELERATOR
    return max(1, elements // vocab)


def _loss_and_hits_over_parts(logits: Tensor, labels: Tensor, part: VocabularyPart) -> tuple[Tensor, Tensor]:
    """logits [C, V'], overwritten -> what these tokens add to the loss and to the hits of the whole vocabulary."""
    best, first = logits.max(-1)
    largest = part.largest(best)
    beaten = (best == largest) & (first + part.start < labels)  # here is a guess that comes before the label
    total, target, beaten = _reduce_over_parts(logits, labels, largest, part, beaten.to(logits.dtype))
    keep = labels != IGNORED
    hits = (target == 0) & (beaten == 0) & keep
    return torch.where(keep, total.log() - target, 0).sum(), hits.sum()


def _reduce_over_parts(
    logits: Tensor, labels: Tensor, largest: Tensor, part: VocabularyPart, *counts: Tensor
) -> tuple[Tensor, ...]:
    """Makes of logits [C, V'], in place, exp(logits - largest); largest [C] is that over the whole vocabulary.

    Returns, summed over ranks and thus over the whole vocabulary: that exponential, the label's logit - largest (0 for
    an ignored label), and each of `counts`; all [C].
    """
    here, row = part.find(labels, logits.shape[1])
    logits -= largest[:, None]
    target = torch.where(here, logits.gather(1, row)[:, 0], 0)
    return part.sum(torch.stack([logits.exp_().sum(-1), target, *counts])).unbind()


def _log_p_and_gradient(logits: Tensor, labels: Tensor, want_grad: bool) -> tuple[Tensor, Tensor | None]:
    """logits [C, V] -> (log p of each label [C], gradient of -log p by the logits [C, V]); an ignored label is as 0."""
    label = labels.clamp_min(0)[:, None]
    log_p = F.log_softmax(logits, -1)
    log_p_of_label = log_p.gather(1, label)[:, 0]
    if not want_grad:
        return log_p_of_label, None
    minus_one = log_p.new_full((1, 1), -1.0).expand_as(label)
    return log_p_of_label, log_p.exp_().scatter_add_(1, label, minus_one)


def _log_p_and_gradient_over_parts(
    logits: Tensor, labels: Tensor, want_grad: bool, part: VocabularyPart
) -> tuple[Tensor, Tensor | None]:
    """The same for logits [C, V'], overwritten, of one part. An ignored label is none of its tokens."""
    total, target = _reduce_over_parts(logits, labels, part.largest(logits.amax(-1)), part)
    log_p_of_label = target - total.log()
    if not want_grad:
        return log_p_of_label, None
    here, row = part.find(labels, logits.shape[1])
    return log_p_of_label, logits.div_(total[:, None]).scatter_add_(1, row, -here.to(logits.dtype)[:, None])


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forms the gradients in the forward pass, where a chunk's logits exist anyway."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_tokens: int,
        want_grad: bool,
        part: VocabularyPart | None,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        keep = labels != IGNORED
        kept = hidden * keep[:, None]  # an ignored row then adds nothing to the weight's gradient
        softmax = _log_p_and_gradient if part is None else partial(_log_p_and_gradient_over_parts, part=part)
        loss = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden) if want_grad else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if want_grad else None
        for start in range(0, len(hidden), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            # Not named: the logits are to be gone before the products of their gradient.
            log_p, grad_logits = softmax(F.linear(kept[chunk], weight).to(wide), labels[chunk], want_grad)
            loss -= (log_p * keep[chunk]).sum()
            if grad_logits is None or grad_hidden is None or grad_weight is None:
                continue
            grad_logits = grad_logits.to(hidden.dtype)
            torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if wide == hidden.dtype:
                grad_weight.addmm_(grad_logits.t(), kept[chunk])
            else:
                grad_weight += grad_logits.t() @ kept[chunk]
        if grad_hidden is not None and grad_weight is not None:
            grad_hidden *= keep[:, None]
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # In bf16 the scale itself would be off by up to 2^-9, the same for every token: a wrong weight of this loss
        # against the auxiliary one. So multiply in fp32 and round the product.
        scale = grad_outputs[0]
        scaled = [(g.to(scale.dtype) * scale).to(g.dtype) for g in (grad_hidden, grad_weight)]
        return scaled[0], scaled[1], None, None, None, None
