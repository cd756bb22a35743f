"""Cross-entropy of a language-model head without storing all logits.

Legend: T tokens, d width, V vocabulary, C tokens of one chunk, V' vocabulary rows of one tensor-parallel rank.
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

# Logits per chunk. On CPU, 8 MiB of fp32 stays in the cache; accelerators need large matmuls.
CHUNK_ELEMENTS_CPU = 1 << 21
CHUNK_ELEMENTS_ACCELERATOR = 1 << 26


@dataclass(frozen=True, kw_only=True)
class VocabularyPart:
    """This rank's part of the vocabulary: consecutive rows from `start`, as many as its weight has.

    `sum` and `largest` all-reduce a tensor (sum, maximum) over the ranks that share the vocabulary, into a new tensor,
    without gradient. All ranks must call them equally often, with equal shapes.
    """

    start: int
    sum: Callable[[Tensor], Tensor]
    largest: Callable[[Tensor], Tensor]

    def find(self, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """labels [C] -> (whether the label is one of this rank's `rows`, bool [C]; its row, or 0 if not, [C, 1])."""
        row = labels - self.start
        here = (row >= 0) & (row < rows)  # an ignored label is below every start
        return here, torch.where(here, row, 0)[:, None]


def linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_tokens: int | None = None,
    part: VocabularyPart | None = None,
) -> Tensor:
    """Sum over tokens of -log softmax(hidden weight^T + bias)[label]; fp32, or float64 if hidden is.

    hidden [T, d], weight [V, d], bias [V] or None, labels [T] int64; label -100 is ignored, whatever its row of hidden
    holds. If the logits exceed one chunk, logits and gradients are computed chunk by chunk in the forward pass. (The
    loss is a sum, so the incoming gradient is one scalar.) This takes the same three matmuls as the plain form, but
    memory for C V elements instead of three times T V. Measured on 2 CPU cores, forward and backward: T=V=4096, d=256:
    205 ms against 255 to 279 plain; T=2048, V=4096, d=128: 72 against 85.

    With `part`, weight [V', d] and bias [V'] hold the rows of that part. hidden and labels (of the whole vocabulary)
    are equal on all ranks, and so is the result, the loss over the whole vocabulary. The gradients of weight and bias
    are those of their rows. The gradient of hidden is partial and must be summed over ranks. Memory is C V' elements,
    and each chunk takes two all-reduces: the maximum of C elements and the sum of 2 C (as in Megatron-LM's
    vocabulary-parallel loss, Shoeybi et al., 2019, arXiv 1909.08053). If parts have unequal length, pass
    `chunk_tokens`, so that all ranks use equal chunks. A label outside of all parts is not detected.
    """
    tokens, vocab = len(hidden), len(weight)
    chunk_tokens = chunk_tokens or _chunk_tokens(hidden, vocab)
    if part is None and tokens <= chunk_tokens:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        kept = torch.where((labels != IGNORED)[:, None], hidden, 0)  # NaN times a gradient of 0 would be NaN
        return F.cross_entropy(F.linear(kept, weight, bias).to(wide), labels, ignore_index=IGNORED, reduction="sum")
    # Check this outside of the Function: inside, gradients are off, and `needs_input_grad` ignores no_grad.
    want_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    return cast(Tensor, _ChunkedCrossEntropy.apply(hidden, weight, bias, labels, chunk_tokens, want_grad, part))


@torch.no_grad()
def linear_cross_entropy_by_token(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_tokens: int | None = None,
    part: VocabularyPart | None = None,
) -> tuple[Tensor, Tensor]:
    """For evaluation: each token's -log softmax [T], fp32 or float64, and whether its label is the argmax, bool [T].

    An ignored label has a loss of 0 and is no hit. If several logits are largest, the first one is the prediction; a
    row with NaN or +inf has none. Arguments and `part` are as in `linear_cross_entropy_sum`; both results are equal on
    all ranks. Logits are computed once, chunk by chunk,
    without gradients. The argmax takes at most 1 ms of 11 at T=1024, V=4096, d=128 on 2 CPU cores, which is below the
    noise of the measurement. With `part`, hits add C elements to the sum, and no further all-reduce.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(len(hidden), dtype=wide)
    hits = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    chunk_tokens = chunk_tokens or _chunk_tokens(hidden, len(weight))
    for start in range(0, len(hidden), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        logits = F.linear(hidden[chunk], weight, bias).to(wide)  # [C, V]
        if part is not None:
            losses[chunk], hits[chunk] = _loss_and_hits_over_parts(logits, labels[chunk], part)
            continue
        losses[chunk] = F.cross_entropy(logits, labels[chunk], ignore_index=IGNORED, reduction="none")
        best, first = logits.max(-1)
        # An ignored label (-100) never equals an index. Without a finite maximum there is no prediction.
        hits[chunk] = (first == labels[chunk]) & best.isfinite()
    return losses, hits


def _chunk_tokens(hidden: Tensor, vocab: int) -> int:
    elements = CHUNK_ELEMENTS_CPU if hidden.device.type == "cpu" else CHUNK_ELEMENTS_ACCELERATOR
    return max(1, elements // vocab)


def _loss_and_hits_over_parts(logits: Tensor, labels: Tensor, part: VocabularyPart) -> tuple[Tensor, Tensor]:
    """logits [C, V'], overwritten -> loss and hit of each token over the whole vocabulary."""
    best, first = logits.max(-1)
    largest = part.largest(best)
    beaten = (best == largest) & (first + part.start < labels)  # an equal logit with a lower index than the label
    total, target, beaten = _reduce_over_parts(logits, labels, largest, part, beaten.to(logits.dtype))
    keep = labels != IGNORED
    hits = (target == 0) & (beaten == 0) & keep
    return torch.where(keep, total.log() - target, 0), hits


def _reduce_over_parts(
    logits: Tensor, labels: Tensor, largest: Tensor, part: VocabularyPart, *counts: Tensor
) -> tuple[Tensor, ...]:
    """Replace logits [C, V'] by exp(logits - largest) in place. largest [C] is the maximum over the whole vocabulary.

    Returns sums over the whole vocabulary (all-reduced), each [C]: the exponentials, the label's logit - largest (0 for
    an ignored label), and each of `counts`.
    """
    here, row = part.find(labels, logits.shape[1])
    logits -= largest[:, None]
    target = torch.where(here, logits.gather(1, row)[:, 0], 0)
    return part.sum(torch.stack([logits.exp_().sum(-1), target, *counts])).unbind()


def _log_p_and_gradient(logits: Tensor, labels: Tensor, want_grad: bool) -> tuple[Tensor, Tensor | None]:
    """logits [C, V] -> (log p of each label [C], gradient of -log p with respect to logits [C, V] or None).

    An ignored label is treated as label 0. On a CPU, logits are overwritten: a second chunk would not stay in the
    cache. The whole loss takes 1 to 3 % less CPU time so, with equal bits.
    """
    label = labels.clamp_min(0)[:, None]
    own = logits if logits.device.type == "cpu" else None
    log_p = torch.log_softmax(logits, -1, out=own)
    log_p_of_label = log_p.gather(1, label)[:, 0]
    if not want_grad:
        return log_p_of_label, None
    minus_one = log_p.new_full((1, 1), -1.0).expand_as(label)
    return log_p_of_label, log_p.exp_().scatter_add_(1, label, minus_one)


def _log_p_and_gradient_over_parts(
    logits: Tensor, labels: Tensor, want_grad: bool, part: VocabularyPart
) -> tuple[Tensor, Tensor | None]:
    """The same for the logits [C, V'] of one part, which are overwritten. An ignored label is in no part."""
    total, target = _reduce_over_parts(logits, labels, part.largest(logits.amax(-1)), part)
    log_p_of_label = target - total.log()
    if not want_grad:
        return log_p_of_label, None
    here, row = part.find(labels, logits.shape[1])
    return log_p_of_label, logits.div_(total[:, None]).scatter_add_(1, row, -here.to(logits.dtype)[:, None])


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Chunked cross-entropy. Computes the gradients in the forward pass, where the logits of each chunk exist."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk_tokens: int,
        want_grad: bool,
        part: VocabularyPart | None,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        keep = labels != IGNORED
        # Ignored rows must not contribute to the gradient of the weight. A product with 0 would keep their NaN.
        kept = torch.where(keep[:, None], hidden, 0)
        softmax = _log_p_and_gradient if part is None else partial(_log_p_and_gradient_over_parts, part=part)
        loss = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden) if want_grad else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if want_grad else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if want_grad and bias is not None else None
        for start in range(0, len(hidden), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            # Do not assign the logits to a name: they must be freed before the matmuls of their gradient.
            log_p, grad_logits = softmax(F.linear(kept[chunk], weight, bias).to(wide), labels[chunk], want_grad)
            loss -= torch.where(keep[chunk], log_p, 0).sum()
            if grad_logits is None or grad_hidden is None or grad_weight is None:
                continue
            if grad_bias is not None:
                grad_bias += grad_logits.masked_fill_(~keep[chunk, None], 0).sum(0)
            grad_logits = grad_logits.to(hidden.dtype)
            torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if wide == hidden.dtype:
                grad_weight.addmm_(grad_logits.t(), kept[chunk])
            else:
                grad_weight += grad_logits.t() @ kept[chunk]
        if grad_hidden is not None and grad_weight is not None:
            grad_hidden.masked_fill_(~keep[:, None], 0)
            grads = [grad_hidden, grad_weight.to(weight.dtype)]
            if bias is not None and grad_bias is not None:
                grads.append(grad_bias.to(bias.dtype))
            ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # Multiply in fp32 and round the product. In bf16, the scale would have an error of up to 2^-9 that is equal for
        # all tokens, and would change the weight of this loss relative to the auxiliary loss.
        scale = grad_outputs[0]
        hidden, weight, *bias = [(g.to(scale.dtype) * scale).to(g.dtype) for g in ctx.saved_tensors]
        return hidden, weight, bias[0] if bias else None, None, None, None, None
