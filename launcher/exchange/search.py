"""Greedy and beam search for many prompts at once, with a KV cache, with decoders and encoder-decoders.

The rows of a batch are always at the same position, whatever the lengths of their prompts: all read the tokens of the
shortest prompt in one pass; then a row whose prompt is longer reads its next token where the others read the token that
they have generated. So no padding is read, no mask is needed, and a row computes what it computes alone, with every
mechanism that has a cache. Prompts of similar length share a batch. Of an encoder-decoder, the prompt is what starts a
target; the encoder reads the sources of a batch once, and padding of the shorter ones is seen by no token.

Beam search with K beams continues, in each step, every live hypothesis by every token, and ranks the continuations by
their log-probability. Those of the best K that end the document have ended; the best K others live on. A prompt is done
when K of its hypotheses have ended, or after the last token that is allowed; then live ones are candidates too. The
result is the candidate with the largest log-probability divided by n^p: n its tokens, the end included, p the length
penalty. With K = 1 this is greedy search.

Legend: B prompts of a batch, K beams of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import TYPE_CHECKING

from headway.launcher.exchange.steps import Steps

if TYPE_CHECKING:
    import torch

    from headway.model.seq2seq.build import Model

BATCH_ROWS = 32
"""Rows (prompts times beams) of a batch."""
_SPREAD = 64
"""Tokens that the longest prompt or source of a batch has more than the shortest, at most: those of prompts are read
one by one, and those of sources are padding."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a prompt is continued. `tokens`: new ones at most, the end included. `beams`: 1 for greedy search."""

    tokens: int
    beams: int = 1
    length_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class Found:
    """The continuation of a prompt, without the end token, its log-probability in nats (with the end if it `ended`)."""

    ids: tuple[int, ...]
    log_p: float
    ended: bool


def search(
    model: Model,
    prompts: Sequence[Sequence[int]],
    how: Search,
    *,
    eos_id: int | None,
    sources: Sequence[Sequence[int]] | None = None,
    batch_rows: int = BATCH_ROWS,
    done: Callable[[int], None] = lambda prompts: None,
) -> list[Found]:
    """Continue each prompt (at least one token). `done` is told how many prompts were finished.

    sources: Of an encoder-decoder, what its encoder reads with each prompt (at least one token).

    The result of a prompt does not depend on the other prompts, except for rounding.
    """
    found: list[Found | None] = [None] * len(prompts)
    for batch in _batches(prompts, sources, max(1, batch_rows // how.beams)):
        beams = [_Beams(prompts[number], how) for number in batch]
        own = None if sources is None else [sources[number] for number in batch]
        for number, result in zip(batch, _together(model, beams, own, how, eos_id), strict=True):
            found[number] = result
        done(len(batch))
    return [result for result in found if result is not None]


def _batches(
    prompts: Sequence[Sequence[int]], sources: Sequence[Sequence[int]] | None, most: int
) -> Iterator[list[int]]:
    sizes = [(0 if sources is None else len(sources[i]), len(prompts[i])) for i in range(len(prompts))]
    batch: list[int] = []
    for number in sorted(range(len(prompts)), key=lambda i: sizes[i]):
        if batch and (len(batch) == most or _spread([sizes[i] for i in (*batch, number)]) > _SPREAD):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _spread(sizes: Sequence[tuple[int, int]]) -> int:
    """The larger difference between the largest and the smallest: of sources, or of prompts."""
    return max(max(each) - min(each) for each in zip(*sizes, strict=True))


class _Beams:
    """The hypotheses of one prompt. `live`: (ids, log-probability), the best first, of which each has a cache row."""

    def __init__(self, prompt: Sequence[int], how: Search) -> None:
        self.prompt, self.beams, self._how = prompt, how.beams, how
        self.live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
        self._candidates: list[tuple[float, Found]] = []  # by score

    @property
    def is_done(self) -> bool:
        return len(self._candidates) >= self._how.beams or not self.live

    def advance(self, ranked: Sequence[tuple[float, int, int]], eos_id: int | None) -> list[int]:
        """Take the continuations (log-probability, number of the live hypothesis, token), the best first.

        Returns the number of the hypothesis that each new live one continues.
        """
        live: list[tuple[tuple[int, ...], float]] = []
        parents: list[int] = []
        for rank, (log_p, parent, token) in enumerate(ranked):
            ids = self.live[parent][0]
            if token == eos_id:
                if rank < self._how.beams:
                    self._add(Found(ids, log_p, True), len(ids) + 1)
            elif len(live) < self._how.beams:
                live.append(((*ids, token), log_p))
                parents.append(parent)
        self.live = live
        if not self.is_done and len(live[0][0]) == self._how.tokens:
            for ids, log_p in live:
                self._add(Found(ids, log_p, False), len(ids))
            self.live = []
        return [] if self.is_done else parents

    def _add(self, found: Found, length: int) -> None:
        self._candidates.append((found.log_p / length**self._how.length_penalty, found))

    def best(self) -> Found:
        return max(self._candidates, key=lambda candidate: candidate[0])[1]


def _together(
    model: Model, beams: list[_Beams], sources: list[Sequence[int]] | None, how: Search, eos_id: int | None
) -> list[Found]:
    """Search for the prompts of one batch."""
    import torch

    lengths = [len(each.prompt) for each in beams]
    with torch.inference_mode():
        steps = Steps(model, sources, tokens=max(lengths) + how.tokens - 1)
        logits = steps.read([each.prompt[: min(lengths)] for each in beams])
        active = [*beams]
        while True:
            rows, tokens = _next_rows(active, logits, steps.tokens, eos_id)
            active = [each for each in active if not each.is_done]
            if not active:
                return [each.best() for each in beams]
            if rows != list(range(len(logits))):
                steps.select(rows)
            logits = steps.read([[token] for token in tokens])


def _next_rows(
    active: list[_Beams], logits: torch.Tensor, position: int, eos_id: int | None
) -> tuple[list[int], list[int]]:
    """(row of the cache that each next row continues, token that it reads), after `position` tokens.

    logits [rows, V] of the live hypotheses of `active`, in order. Prompts that are done have no next row.
    """
    begins = [0, *accumulate(len(each.live) for each in active)]
    generating = [n for n, each in enumerate(active) if len(each.prompt) <= position]
    ranked = dict(zip(generating, _ranked([(active[n], begins[n]) for n in generating], logits), strict=True))
    rows: list[int] = []
    tokens: list[int] = []
    for number, each in enumerate(active):
        if number in ranked:
            rows += [begins[number] + parent for parent in each.advance(ranked[number], eos_id)]
            tokens += [ids[-1] for ids, _ in each.live if not each.is_done]
        else:  # it reads its prompt
            rows.append(begins[number])
            tokens.append(each.prompt[position])
    return rows, tokens


def _ranked(generating: list[tuple[_Beams, int]], logits: torch.Tensor) -> list[list[tuple[float, int, int]]]:
    """The best continuations of prompts, of which each is given with its first row of `logits` [rows, V].

    (log-probability, number of the hypothesis, token), the best first: twice as many as beams, as half may be ends.
    """
    import torch

    if not generating:
        return []
    beams, (vocabulary, dtype) = (
        generating[0][0].beams,
        (logits.shape[1], torch.promote_types(logits.dtype, torch.float32)),
    )
    rows = torch.zeros(len(generating), beams, dtype=torch.int64)
    scores = torch.full(rows.shape, -torch.inf, dtype=dtype)  # -inf: no such hypothesis
    for place, (each, begin) in enumerate(generating):
        rows[place, : len(each.live)] = torch.arange(begin, begin + len(each.live))
        scores[place, : len(each.live)] = torch.tensor([log_p for _, log_p in each.live], dtype=torch.float64)
    log_p = torch.log_softmax(logits.to(dtype), -1)[rows.to(logits.device)]  # [B, K, V]
    total = (log_p + scores.to(logits.device)[:, :, None]).flatten(1)
    best, places = total.topk(min(2 * beams, total.shape[1]))
    return [
        [(value, place // vocabulary, place % vocabulary) for value, place in zip(*pair, strict=True) if value > -inf]
        for pair in zip(best.tolist(), places.tolist(), strict=True)
    ]
