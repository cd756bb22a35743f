"""Measure a size's time beside the baseline's, and find the size that takes as long.

What is timed is the forward and backward pass of one micro-batch, in turns with the baseline, in one process.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headway.launcher.match.search import Candidates

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec

WARM_UP = 2
LOOK_ROUNDS = 7
CHECK_ROUNDS = 21
LOOKS = 6
"""Sizes measured on the way to a match, `LOOK_ROUNDS` each; at most `CHECKS` of them again, `CHECK_ROUNDS` each."""
CHECKS = 3

CLEAR = 4.0
"""Standard errors by which the times of two sizes differ when the size counts; quartiles of 7 rounds are rough."""

REACH = 4.0
"""A line through measured times is not followed further than this many times beyond them."""

Pass = Callable[[], float]
"""Runs one forward and backward pass and returns its seconds."""

Build = Callable[["Spec", int], Pass]
"""(spec with its vocabulary, seq_len) -> its pass."""


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Time of a candidate over that of the baseline, pair by pair: quartiles; and the median seconds of either."""

    low: float
    median: float
    high: float
    rounds: int
    candidate_s: float
    baseline_s: float

    @property
    def noise(self) -> float:
        """Half the distance of the quartiles."""
        return (self.high - self.low) / 2

    @property
    def standard_error(self) -> float:
        return median_error(self.noise, self.rounds)


def median_error(noise: float, rounds: int) -> float:
    """Standard error of a median were the values normal: sqrt(pi / 2) sigma / sqrt(n), sigma = `noise` / 0.6745."""
    return math.sqrt(math.pi / 2) * noise / 0.6745 / math.sqrt(rounds)


def compare(contender: Pass, baseline: Pass, *, rounds: int) -> Ratios:
    """Time both in turns, after a warm-up. Who begins changes every round: who comes second finds warmer caches."""
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
    """The spec's model with its device, precision and threads, on one micro-batch of random tokens."""
    import torch

    from headway.launcher.hosts.commands import worker_environment
    from headway.model.decoder import Decoder

    vocab_size = spec.model.vocab_size
    assert vocab_size is not None
    threads = int(worker_environment(spec)["OMP_NUM_THREADS"])
    cuda = spec.launch.device == "cuda" or (spec.launch.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if spec.parallel.precision == "bf16" else torch.float32
    model = Decoder(spec.model, spec.attention, vocab_size=vocab_size, seed=spec.seed).to(device, dtype)
    model.before_step(spec.train.tokens)  # the state that a schedule ends in, which is what costs are counted for
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
    """Finds the legal value whose time is nearest to the baseline's, taking time for about affine in the value.

    `measure` takes (value, rounds). `points`: value -> its latest measurement.
    """

    def __init__(self, measure: Callable[[int, int], Ratios], candidates: Candidates) -> None:
        self._measure, self._candidates = measure, candidates
        self.points: dict[int, Ratios] = {}

    def look(self, start: int) -> bool:
        """Measure a few sizes, from the legal one nearest to `start`. False where nothing is legal."""
        value = self._candidates.nearest_legal(start)
        if value is None:
            return False
        for _ in range(LOOKS):
            if value is None:
                break
            self.points[value] = self._measure(value, LOOK_ROUNDS)
            value = self._next()
        if not self.is_affected():  # a refusal deserves a closer look
            for value in (min(self.points), max(self.points)):
                self.points[value] = self._measure(value, CHECK_ROUNDS)
        return True

    def check(self) -> tuple[int, Ratios]:
        """The chosen value with a longer measurement of its own, against the baseline in the same rounds.

        Where that is off by more than its own error, the value that the line then points to is measured as well.
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
        """False where the smallest and the largest of several measured values differ by no more than noise explains."""
        small, large = self.points[min(self.points)], self.points[max(self.points)]
        # Quartiles of few rounds are rough, so the noise of all points is taken together, relative to their times.
        noise = statistics.median(r.noise / r.median for r in self.points.values())
        error = math.hypot(median_error(noise, small.rounds), median_error(noise, large.rounds))
        return len(self.points) == 1 or abs(math.log(large.median / small.median)) > CLEAR * error

    def _next(self) -> int | None:
        """A value not measured so far whose time tells more; None where there is none."""
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
        """Where the line through the points meets the baseline's time; from one point, as if all time were the value's.

        One point is left by at least a quarter: the time of a close neighbour differs by less than noise.
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
        """(slope, offset) by least squares; the points weigh by their rounds and how near they are to the baseline."""
        weights = {v: r.rounds / (0.05 + abs(r.median - 1)) for v, r in self.points.items()}
        total = sum(weights.values())
        x = sum(w * v for v, w in weights.items()) / total
        y = sum(w * self.points[v].median for v, w in weights.items()) / total
        xx = sum(w * (v - x) ** 2 for v, w in weights.items())
        xy = sum(w * (v - x) * (self.points[v].median - y) for v, w in weights.items())
        slope = xy / xx if xx else 0.0
        return slope, y - slope * x
