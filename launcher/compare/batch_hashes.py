"""Hashes of the global batches of a run, and the comparison of two runs by them.

A run folder has the hash of every step. A cell record has `Marks` instead: at a few steps, the hash of the step and a
digest of all hashes up to it. Two runs that read the same batches have equal digests at every common mark.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MOST_MARKS = 64
"""Marks of a run are multiples of the smallest power of two that gives at most this many, and the first and last step.

The marks of a longer run are then among those of a shorter one, so that runs of different lengths have common marks.
"""


@dataclass(frozen=True, kw_only=True)
class Marks:
    """`first`: first step with a hash. `at`: step -> (digest of the hashes from `first` to this step, its own hash)."""

    first: int
    at: Mapping[int, tuple[str, str]]


Hashes = Mapping[int, str] | Marks
"""Step -> hash of every step, or the marks of a run."""


@dataclass(frozen=True, kw_only=True)
class FirstDifference:
    """The first difference of two runs: in a step after `after`, at `step` at the latest.

    `one`, `other`: their hashes of `step`, which are equal if the difference is before it.
    """

    after: int
    step: int
    one: str
    other: str

    def __str__(self) -> str:
        if self.step == self.after + 1:
            return f"first at step {self.step} (hash {self.one} against {self.other})"
        return f"first between steps {self.after + 1} and {self.step} (their records hold digests, not every step)"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """`common`: number of steps whose hashes were compared. `difference`: None if all of them are equal."""

    common: int
    difference: FirstDifference | None


def marks_of(hashes: Mapping[int, str]) -> Marks | None:
    """Reduce the hashes of all steps; None if there are none, or if a step between the first and the last lacks one."""
    first, last = min(hashes, default=0), max(hashes, default=-1)
    if not hashes or len(hashes) != last - first + 1:
        return None
    stride = 1
    while last - first + 1 > MOST_MARKS * stride:
        stride *= 2
    steps = {first, last, *range(-(-first // stride) * stride, last + 1, stride)}
    return Marks(first=first, at={step: (digest, hashes[step]) for step, digest in _digests(hashes, first, steps)})


def first_hash(hashes: Hashes) -> str:
    """The hash of the first step. `hashes` must not be empty."""
    return hashes.at[hashes.first][1] if isinstance(hashes, Marks) else hashes[min(hashes)]


def compare_hashes(one: Hashes, other: Hashes) -> Compared:
    """Compare two runs at every step that both have, or at their common marks if either has marks only."""
    if not isinstance(one, Marks) and not isinstance(other, Marks):
        common = sorted(one.keys() & other.keys())
        wrong = next((step for step in common if one[step] != other[step]), None)
        if wrong is None:
            return Compared(common=len(common), difference=None)
        # No step between is unknown: `after` is the step before, whether it was compared or not.
        found = FirstDifference(after=wrong - 1, step=wrong, one=one[wrong], other=other[wrong])
        return Compared(common=len(common), difference=found)
    return _compare_marks(_at_marks(one, other), _at_marks(other, one))


_Points = Mapping[int, tuple[str | None, str]]


def _compare_marks(one: tuple[int, _Points], other: tuple[int, _Points]) -> Compared:
    """Compare (first step, step -> digest and hash). A digest that is None, or of another first step, says nothing."""
    (first, ours), (first_of_other, theirs) = one, other
    comparable = first == first_of_other
    covered, count = first - 1, 0
    for step in sorted(ours.keys() & theirs.keys()):
        (digest, mine), (other_digest, its) = ours[step], theirs[step]
        by_digest = comparable and digest is not None and other_digest is not None
        if mine != its or (by_digest and digest != other_digest):
            difference = FirstDifference(after=covered, step=step, one=mine, other=its)
            return Compared(common=count + 1, difference=difference)
        count = step - first + 1 if by_digest else count + 1
        covered = step if by_digest else covered
    return Compared(common=count, difference=None)


def _at_marks(hashes: Hashes, other: Hashes) -> tuple[int, _Points]:
    """(first step, step -> digest and hash) of a run at the marks of `other`; a run that has marks keeps its own.

    The digest of a step is None where the run lacks a hash before it.
    """
    if isinstance(hashes, Marks):
        return hashes.first, hashes.at
    assert isinstance(other, Marks)
    first = min(hashes, default=other.first)
    digests = dict(_digests(hashes, first, other.at))
    return first, {step: (digests.get(step), hashes[step]) for step in other.at if step in hashes}


def _digests(hashes: Mapping[int, str], first: int, steps: Iterable[int]) -> Iterable[tuple[int, str]]:
    """(step, digest of the hashes from `first` to this step) for `steps`, up to the first step without a hash."""
    digest, wanted, step = hashlib.sha256(), set(steps), first
    while step in hashes:
        digest.update(f"{hashes[step]}\n".encode())
        if step in wanted:
            yield step, digest.hexdigest()[:16]
        step += 1
