"""Two runs are compared by the hashes of all batches, or by marks, which find every difference too."""

from __future__ import annotations

import pytest

from headway.launcher.compare.batch_hashes import MOST_MARKS, Marks, compare_hashes, first_hash, marks_of


def hashes(steps: int, *, wrong: int | None = None) -> dict[int, str]:
    return {step: f"{step if step != wrong else 0:016x}" for step in range(1, steps + 1)}


def marks(steps: int, *, wrong: int | None = None) -> Marks:
    found = marks_of(hashes(steps, wrong=wrong))
    assert found is not None
    return found


@pytest.mark.parametrize("steps", [1, 63, 64, 65, 1000, 10_000])
def test_marks_are_few_and_have_both_ends(steps):
    found = marks(steps)
    assert {1, steps} <= found.at.keys() and len(found.at) <= MOST_MARKS + 2
    assert first_hash(found) == first_hash(hashes(steps))


def test_hashes_with_a_gap_have_no_marks():
    assert marks_of({1: "a", 3: "b"}) is None and marks_of({}) is None


@pytest.mark.parametrize("wrong", [1, 2, 700, 768, 769, 9_999, 10_000])
def test_a_single_difference_is_found_between_two_marks(wrong):
    one, other = hashes(10_000), hashes(10_000, wrong=wrong)
    for a, b in ((one, marks_of(other)), (marks_of(one), other), (marks_of(one), marks_of(other))):
        assert a is not None and b is not None
        found = compare_hashes(a, b).difference
        assert found is not None and found.after < wrong <= found.step and found.step - found.after <= 256
    exact = compare_hashes(one, other).difference
    assert exact is not None and (exact.after, exact.step) == (wrong - 1, wrong)


def test_equal_runs_have_all_their_steps_in_common():
    for one in (hashes(10_000), marks(10_000)):
        for other in (hashes(10_000), marks(10_000)):
            found = compare_hashes(one, other)
            assert (found.common, found.difference) == (10_000, None)


def test_runs_of_different_lengths_have_common_marks():
    assert compare_hashes(marks(10_000), hashes(5_000)).common == 4_864  # the last mark within 5,000 steps
    found = compare_hashes(marks(10_000), marks(5_000))
    assert found.common == 4_864 and found.difference is None
    assert compare_hashes(marks(10_000), marks(5_000, wrong=300)).difference is not None


def test_a_folder_with_lost_records_is_compared_at_the_marks_alone():
    lost = {step: h for step, h in hashes(1_000).items() if step != 10}
    found = compare_hashes(lost, marks(1_000))
    assert found.difference is None and 1 < found.common < 100
    lost[1_000] = "0" * 16
    assert compare_hashes(lost, marks(1_000)).difference is not None


def test_runs_that_begin_at_different_steps_are_compared_by_single_hashes():
    later = marks_of({step: h for step, h in hashes(1_000).items() if step > 10})
    assert later is not None
    found = compare_hashes(later, marks(1_000))
    assert found.difference is None and found.common > 1


def test_without_hashes_nothing_is_compared():
    assert compare_hashes({}, marks(10)).common == compare_hashes(marks(10), {}).common == 0
