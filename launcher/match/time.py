"""Find the size of a variant that takes the baseline's time.

The forward and backward pass of one micro-batch is timed, in turns with the baseline, in one process.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headway.launcher.match.search import Candidates
from headway.launcher.spec.encoder_decoder import decoders_only

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec

WARM_UP = 2
LOOK_ROUNDS = 7
CHECK_ROUNDS = 21
LOOKS = 6
"""At most `LOOKS` sizes are measured with `LOOK_ROUNDS` rounds, then at most `CHECKS` sizes with `CHECK_ROUNDS`."""
CHECKS = 3

CLEAR = 4.0
"""The time depends on the size if two sizes differ by this many standard errors; quartiles of 7 rounds are rough."""

REACH = 4.0
"""The fitted line is extrapolated to at most this many times the largest, or this fraction of the smallest, size."""

Pass = Callable[[], float]
"""Runs one forward and backward pass and returns its seconds."""

Build = Callable[["Spec", int], Pass]
"""(spec with its vocabulary, seq_len) -> its pass."""


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Quartiles of candidate time / baseline time over pairs of passes, and the median seconds of both."""

    low: float
    median: float
    high: float
    rounds: int
    candidate_s: float
    baseline_s: float

    @property
    def noise(self) -> float:
        """Half the interquartile range."""
        return (self.high - self.low) / 2

    @property
    def standard_error(self) -> float:
        return median_error(self.noise, self.rounds)


def median_error(noise: float, rounds: int) -> float:
    """Standard error of a median of normal values: sqrt(pi / 2) sigma / sqrt(n), with sigma = `noise` / 0.6745."""
    return math.sqrt(math.pi / 2) * noise / 0.6745 / math.sqrt(rounds)


def compare(contender: Pass, baseline: Pass, *, rounds: int) -> Ratios:
    """Time both in turns, after a warm-up. The order changes every round, because the second pass has warmer caches."""
    for _ in range(WARM_UP):
        baseline()
        contender()
    pairs: list[tuple[float, float]] = []
    for i in range(rounds):
        if i % 2:
            ours = contender()
            pairs.append((ours, baseline()))
        else:
            theirs = baseline()
            pairs.append((contender(), theirs))
    low, median, high = statistics.quantiles((ours / theirs for ours, theirs in pairs), n=4, method="inclusive")
    return Ratios(
        low=low,
        median=median,
        high=high,
        rounds=rounds,
        candidate_s=statistics.median(ours for ours, _ in pairs),
        baseline_s=statistics.median(theirs for _, theirs in pairs),
    )


def decoder_pass(spec: Spec, seq_len: int) -> Pass:
    """A pass of the spec's model, with its device, precision and threads, on one micro-batch of random tokens."""
    import torch

    from headway.launcher.hosts.commands import worker_environment
    from headway.model.decoder import Decoder

    decoders_only(spec, "match.quantity wall_clock")
    vocab_size = spec.model.vocab_size
    assert vocab_size is not None
    threads = int(worker_environment(spec)["OMP_NUM_THREADS"])
    cuda = spec.launch.device == "cuda" or (spec.launch.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if spec.parallel.precision == "bf16" else torch.float32
    model = Decoder(spec.model, spec.attention, vocab_size=vocab_size, seed=spec.seed).to(device, dtype)
    model.before_step(spec.train.tokens)  # the final state of schedules, for which costs are counted
    generator = torch.Generator().manual_seed(spec.seed)
    shape = (spec.train.micro_batch, seq_len + 1)
    ids = torch.randint(vocab_size, shape, generator=generator).to(device)
    tokens, labels = ids[:, :-1], ids[:, 1:]
    segments = torch.zeros_like(tokens, dtype=torch.int32) if spec.data.document_mask else None

    def run() -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            model.zero_grad()
            start = _now_s(cuda)
            out = model(tokens, labels, segments)
            (out.loss_sum / out.targets + out.aux_loss).backward()
            return _now_s(cuda) - start
        finally:
            torch.set_num_threads(before)

    return run


def _now_s(cuda: bool) -> float:
    if cuda:
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


class TimeSolver:
    """Finds the legal value whose time is nearest to the baseline's. Assumes that time is roughly affine in the value.

    `measure` takes (value, rounds). `points`: value -> its latest measurement.
    """

    def __init__(self, measure: Callable[[int, int], Ratios], candidates: Candidates) -> None:
        self._measure, self._candidates = measure, candidates
        self.points: dict[int, Ratios] = {}

    def look(self, start: int) -> bool:
        """Measure a few sizes, beginning with the legal one nearest to `start`. False if nothing is legal."""
        value = self._candidates.nearest_legal(start)
        if value is None:
            return False
        for _ in range(LOOKS):
            if value is None:
                break
            self.points[value] = self._measure(value, LOOK_ROUNDS)
            value = self._next()
        if not self.is_affected():  # this leads to an error, so measure both ends with more rounds first
            for value in (min(self.points), max(self.points)):
                self.points[value] = self._measure(value, CHECK_ROUNDS)
        return True

    def check(self) -> tuple[int, Ratios]:
        """The chosen value with a measurement of more rounds.

        If it differs from the baseline by more than its standard error, the line is fitted again and the new value is
        measured, too.
        """
        checked: dict[int, Ratios] = {}
        value = self._candidates.nearest_legal(self._wanted())
        while value is not None and value not in checked:
            self.points[value] = checked[value] = self._measure(value, CHECK_ROUNDS)
            if abs(checked[value].median - 1) <= checked[value].standard_error or len(checked) == CHECKS:
                break
            value = self._candidates.nearest_legal(self._wanted())
        return min(checked.items(), key=lambda item: abs(item[1].median - 1))

    def is_affected(self) -> bool:
        """False if the times of the smallest and the largest measured value differ by no more than the noise."""
        small, large = self.points[min(self.points)], self.points[max(self.points)]
        # Quartiles of few rounds are rough, so use the median of the relative noise of all points.
        noise = statistics.median(r.noise / r.median for r in self.points.values())
        error = math.hypot(median_error(noise, small.rounds), median_error(noise, large.rounds))
        return len(self.points) == 1 or abs(math.log(large.median / small.median)) > CLEAR * error

    def _next(self) -> int | None:
        """The next value to measure; None if no new value would add information."""
        smallest, largest = min(self.points), max(self.points)
        if len(self.points) == 1:
            return self._candidates.nearest_legal(self._wanted(), but=self.points)
        if not self.is_affected():
            larger = self._candidates.nearest_legal(2 * largest, low=largest)
            smaller = self._candidates.nearest_legal(smallest / 2, high=smallest)
            return larger or smaller if self.points[largest].median < 1 else smaller or larger
        value = self._candidates.nearest_legal(self._wanted())
        return None if value in self.points else value

    def _wanted(self) -> float:
        """The value at which the fitted line reaches the baseline's time.

        With only one point, time is assumed to be proportional to the value, and the value changes by at least a
        quarter, because closer values differ by less than the noise.
        """
        smallest, largest = min(self.points), max(self.points)
        if len(self.points) == 1:
            ratio = self.points[smallest].median
            wanted = smallest * (min(1 / ratio, 0.75) if ratio > 1 else max(1 / ratio, 1.25))
        else:
            slope, offset = self._line()
            wanted = (1 - offset) / slope if slope else smallest
        return min(max(wanted, smallest / REACH), REACH * largest)

    def _line(self) -> tuple[float, float]:
        """(slope, offset) by least squares, weighted by the rounds of a point and its nearness to the baseline."""
        weights = {v: r.rounds / (0.05 + abs(r.median - 1)) for v, r in self.points.items()}
        total = sum(weights.values())
        x = sum(w * v for v, w in weights.items()) / total
        y = sum(w * self.points[v].median for v, w in weights.items()) / total
        xx = sum(w * (v - x) ** 2 for v, w in weights.items())
        xy = sum(w * (v - x) * (self.points[v].median - y) for v, w in weights.items())
        slope = xy / xx if xx else 0.0
        return slope, y - slope * x
