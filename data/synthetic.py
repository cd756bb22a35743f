"""Seeded synthetic sequences with an exactly known minimum loss. Legend: S sequence length, V vocabulary.

A sequence contains as many independent problems of L = `SyntheticSource.problem_length` tokens as fit into its S + 1
tokens. Each problem is a document. The rest is a last document of padding tokens 0. Only answers have a loss:

    mqar       k1 v1 .. kP vP  q1 a1 .. qQ aQ     keys are distinct; queries are Q keys in random order; a = value of q
               keys are tokens 1 .. K with K = (V - 1) // 2, values are uniform over K + 1 .. V - 1
    copy       x1 .. xn  0  x1 .. xn              x uniform over 1 .. V - 1; the n tokens after the 0 are the answers
    induction  x1 .. xn  q1 a1 .. qQ aQ           x distinct tokens of 1 .. V - 1; queries are distinct tokens of
                                                  x1 .. x(n-1); the answer is the token that followed the query

Multi-query associative recall: Arora et al. 2023, "Zoology"; copy: Graves et al. 2014; induction heads: Olsson et al.
2022. Sequence i depends only on (data seed, split, task, i).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from headway.data.config import DataError, SyntheticSource
from headway.data.manifest import Split
from headway.data.order import random_bits
from headway.data.source import Sample


class SyntheticTask:
    """An infinite source. Sequences are read in the order of their index."""

    num_sequences = fingerprint = None

    def __init__(self, cfg: SyntheticSource, *, split: Split, seq_len: int, seed: int) -> None:
        self.cfg, self.seq_len, self.vocab_size = cfg, seq_len, cfg.vocab_size
        self._key = ("synthetic", cfg.task, seed, split)
        self.problems = (seq_len + 1) // cfg.problem_length
        if self.problems == 0:
            raise DataError(
                f"data.seq_len: {seq_len} is too short for a {cfg.task} problem of {cfg.problem_length} tokens; "
                f"use seq_len >= {cfg.problem_length - 1} or a smaller problem"
            )
        answers = np.zeros(cfg.problem_length, dtype=bool)
        if cfg.task == "copy":
            answers[cfg.span + 1 :] = True
        else:
            answers[cfg.problem_length - 2 * cfg.queries + 1 :: 2] = True
        used = self.problems * cfg.problem_length
        self._targets = np.zeros(seq_len + 1, dtype=bool)
        self._targets[:used] = np.tile(answers, self.problems)
        self._segments = np.minimum(np.arange(seq_len + 1) // cfg.problem_length, self.problems).astype(np.int32)

    def index(self, position: int) -> int:
        return position

    def sample(self, index: int) -> Sample:
        tokens = np.zeros(self.seq_len + 1, dtype=np.int32)
        problems = self._draw(index)
        tokens[: problems.size] = problems.ravel()
        return Sample(tokens, self._segments, self._targets[1:])

    def documents(self, index: int) -> range:
        """Each problem is a document, and so is what is left of the sequence."""
        count = int(self._segments[-1]) + 1
        return range(index * count, (index + 1) * count)

    def reading(self) -> list[Path]:
        return []

    def close(self) -> None:
        pass

    def loss_floor(self) -> float:
        """Minimum mean loss in nats per target: 0, because every answer is determined by earlier tokens."""
        return 0.0

    def chance_loss(self) -> float:
        """Mean loss, in nats per target, of the best predictor that sees only the position and the current token. This
        is the best that a model without attention can reach.
        """
        match self.cfg.task:
            case "mqar":
                return math.log(self.vocab_size - 1 - self._keys)
            case "copy":
                return math.log(self.vocab_size - 1)
            case "induction":  # the answer differs from the current token
                return math.log(self.vocab_size - 2)

    def chance_accuracy(self) -> float:
        """Accuracy of the same predictor, for which all tokens that it cannot rule out are equally likely."""
        return math.exp(-self.chance_loss())

    @property
    def _keys(self) -> int:
        return (self.vocab_size - 1) // 2

    def _draw(self, index: int) -> np.ndarray:
        """The problems of a sequence, [problems, problem_length]."""
        cfg, symbols = self.cfg, self.vocab_size - 1
        match cfg.task:
            case "mqar":
                key_bits, value_bits, query_bits = self._bits(index, self._keys, cfg.pairs, cfg.pairs)
                keys = _distinct(key_bits, cfg.pairs) + 1
                values = _uniform(value_bits, symbols - self._keys) + 1 + self._keys
                asked = _distinct(query_bits, cfg.queries)
                shown = _alternate(keys, values)
                answers = _alternate(np.take_along_axis(keys, asked, 1), np.take_along_axis(values, asked, 1))
                return np.concatenate([shown, answers], axis=1)
            case "copy":
                (bits,) = self._bits(index, cfg.span)
                text = _uniform(bits, symbols) + 1
                return np.concatenate([text, np.zeros((self.problems, 1), dtype=np.int64), text], axis=1)
            case "induction":
                text_bits, query_bits = self._bits(index, symbols, cfg.span - 1)
                text = _distinct(text_bits, cfg.span) + 1
                asked = _distinct(query_bits, cfg.queries)
                answers = _alternate(np.take_along_axis(text, asked, 1), np.take_along_axis(text, asked + 1, 1))
                return np.concatenate([text, answers], axis=1)

    def _bits(self, index: int, *widths: int) -> list[np.ndarray]:
        """Random uint64 values for each problem of a sequence, in blocks [problems, width]."""
        bits = random_bits(self.problems * sum(widths), *self._key, index).reshape(self.problems, -1)
        return np.split(bits, np.cumsum(widths)[:-1], axis=1)


def _uniform(bits: np.ndarray, count: int) -> np.ndarray:
    """Independent uniform draws from 0 .. count - 1. The bias of the modulo is below 2**-47."""
    return (bits % np.uint64(count)).astype(np.int64)


def _distinct(bits: np.ndarray, width: int) -> np.ndarray:
    """Draws without replacement from 0 .. (columns of bits) - 1, [problems, width]."""
    return np.argsort(bits, axis=1, kind="stable")[:, :width]


def _alternate(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Interleave the columns of two [problems, n] arrays to [problems, 2n]."""
    return np.stack([first, second], axis=2).reshape(len(first), -1)
