"""Cross entropy of a language-model head, without keeping the logits.

Legend: T tokens, d width, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100

# Logits of one chunk. On CPU 8 MiB of fp32 stays near the cores; an accelerator wants large products.
CHUNK_ELEMENTS_CPU = 1 << 21
CHUNK_ELEMENTS_ACCELERATOR = 1 << 26


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int | None = None
) -> Tensor:
    """Sum over tokens of -log softmax(hidden weight^T)[label]; fp32, or float64 where hidden is.

    hidden [T, d], weight [V, d], labels [T] int64, of which -100 adds nothing. Where the logits exceed one chunk they
    are formed chunk by chunk, and the gradients with them (the loss is a sum, so the incoming gradient is one scalar):
    the same three products as the plain form, C V numbers instead of three times T V. Measured on 2 CPU cores, forward
    and backward: T=V=4096, d=256: 205 ms against 255 to 279 plain; T=2048, V=4096, d=128: 72 against 85.
    """
    tokens, vocab = len(hidden), len(weight)
    chunk_tokens = chunk_tokens or _chunk_tokens(hidden, vocab)
    if tokens <= chunk_tokens:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return F.cross_entropy(F.linear(hidden, weight).to(wide), labels, ignore_index=IGNORED, reduction="sum")
    # Asked here: inside a Function gradients are off, and `needs_input_grad` does not know of no_grad.
    want_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return cast(Tensor, _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk_tokens, want_grad))


@torch.no_grad()
def linear_cross_entropy_and_hits(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """For evaluation: (sum of `linear_cross_entropy_sum`, number of labels whose logit is its token's largest, int64).

    Of equal largest logits the first counts as the guess. Shapes as there; the logits are formed once, chunk by chunk,
    and no gradient is. Finding the largest of logits at hand costs less than the scatter of the timing: 1 ms of 11 at
    most at T=1024, V=4096, d=128 on 2 CPU cores.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_zeros((), dtype=wide)
    hits = torch.zeros((), dtype=torch.int64, device=hidden.device)
    chunk_tokens = chunk_tokens or _chunk_tokens(hidden, len(weight))
    for start in range(0, len(hidden), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        logits = F.linear(hidden[chunk], weight).to(wide)  # [C, V]
        loss += F.cross_entropy(logits, labels[chunk], ignore_index=IGNORED, reduction="sum")
        hits += (logits.argmax(-1) == labels[chunk]).sum()  # an ignored label is no token's number
    return loss, hits


def _chunk_tokens(hidden: Tensor, vocab: int) -> int:
    elements = CHUNK_ELEMENTS_CPU if hidden.device.type == "cpu" else CHUNK_ELEMENTS_ACCELERATOR
    return max(1, elements // vocab)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forms the gradients in the forward pass, where a chunk's logits exist anyway."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int, want_grad: bool) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        keep = labels != IGNORED
        kept = hidden * keep[:, None]  # an ignored row then adds nothing to the weight's gradient
        target = labels.clamp_min(0)[:, None]
        loss = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden) if want_grad else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if want_grad else None
        for start in range(0, len(hidden), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            log_p = F.log_softmax(F.linear(kept[chunk], weight).to(wide), -1)  # [C, V]
            loss -= (log_p.gather(1, target[chunk])[:, 0] * keep[chunk]).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            minus_one = log_p.new_full((1, 1), -1.0).expand_as(target[chunk])
            grad_logits = log_p.exp_().scatter_add_(1, target[chunk], minus_one).to(hidden.dtype)
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
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # In bf16 the scale itself would be off by up to 2^-9, the same for every token: a wrong weight of this loss
        # against the auxiliary one. So multiply in fp32 and round the product.
        scale = grad_outputs[0]
        scaled = [(g.to(scale.dtype) * scale).to(g.dtype) for g in (grad_hidden, grad_weight)]
        return scaled[0], scaled[1], None, None, None
