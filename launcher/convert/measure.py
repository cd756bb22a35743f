"""Tokens for a conversion: calibration from the training split, losses from the validation split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headway.data.config import DataConfig
from headway.data.loader import Loader, MicroBatch, validation_batches
from headway.launcher.base import console
from headway.model.decoder import Decoder

BATCH_TOKENS = 4096
"""Tokens of a forward pass, about."""


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Batches of a split, and the number of their tokens."""

    split: str
    micro: list[MicroBatch]

    @property
    def tokens(self) -> int:
        """Of sequences with a target: others fill the last batch."""
        return sum(int((b.labels >= 0).any(1).sum()) * b.tokens.shape[1] for b in self.micro)

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document; without boundaries, of a sequence."""
        found = [b.tokens.shape[1] if b.segments is None else _longest_run(b.segments) for b in self.micro]
        return max(found)


def _longest_run(segments: Tensor) -> int:
    """The most equal numbers in a row, of segments [B, S]."""
    return max(int(row.unique_consecutive(return_counts=True)[1].max()) for row in segments)


def calibration(data: DataConfig, tokens: int) -> Batches:
    """At least `tokens` tokens from the beginning of the training order. Raises DataError without the dataset."""
    sequences = -(-tokens // data.seq_len)
    with Loader(data, split="train", global_batch=1, micro_batch=1, dp_rank=0, dp_size=1) as loader:
        return Batches(split="train", micro=[loader.batch(step).micro[0] for step in range(sequences)])


def judgement(data: DataConfig, tokens: int) -> Batches:
    """About `tokens` tokens of sequences that are spread over the validation split. Raises DataError without it."""
    rows = max(1, BATCH_TOKENS // data.seq_len)
    wanted = max(tokens, data.seq_len)
    micro = validation_batches(data, tokens=wanted, micro_batch=rows, dp_rank=0, dp_size=1)
    return Batches(split="validation", micro=micro)


@torch.no_grad()
def mean_loss(decoder: Decoder, batches: Batches, what: str) -> float:
    """Cross entropy in nats per target, in evaluation mode."""
    total, targets = 0.0, 0
    device = decoder.embedding.device
    with console.progress(what, len(batches.micro), "batches", lines=False) as bar:
        for batch in batches.micro:
            segments = None if batch.segments is None else batch.segments.to(device)
            out = decoder(batch.tokens.to(device), batch.labels.to(device), segments)
            total, targets = total + float(out.loss_sum), targets + int((batch.labels >= 0).sum())
            bar.update()
    return total / max(1, targets)
