"""The estimate of the end of a study, from console lines of cells that a fake clock times."""

from __future__ import annotations

import pytest

from headway.launcher.study.eta import Eta, step_share


class Played:
    """An eta of cells of 100 steps, with a clock that is set by hand."""

    def __init__(self, cells: dict[str, float], *, jobs: int = 1) -> None:
        self.now = 0.0
        self.eta = Eta(cells, jobs=jobs, clock=lambda: self.now)

    def begin(self, cell: str, done: float = 0, *, total: float = 100, start_s: float = 60.0) -> None:
        self.eta.begin(cell, done, total)
        self.now += start_s

    def steps(self, cell: str, begin: int, end: int, *, first_s: float = 1.0) -> None:
        """Steps of a second each, behind a first one of `first_s`."""
        for step in range(begin + 1, end + 1):
            self.now += first_s if step == begin + 1 else 1.0
            self.eta.step(cell, step)


def four() -> Played:
    """Four cells; the process of the first has started."""
    played = Played(dict.fromkeys("abcd", 100.0))
    played.begin("a")
    return played


def test_eta_says_nothing_until_steady_steps_were_timed():
    played = four()
    assert str(played.eta) == "estimating"
    played.steps("a", 0, 1, first_s=30)  # 90 s for one step of a hundred: two hours and a half, were that the pace
    assert played.eta.seconds_left() is None and str(played.eta) == "estimating"
    played.steps("a", 1, 5)
    assert played.eta.seconds_left() is None
    played.steps("a", 5, 10)
    assert str(played.eta) != "estimating"


def test_eta_is_the_pace_of_steady_steps_and_the_start_up_of_every_cell_that_is_left():
    played = four()
    played.steps("a", 0, 50, first_s=30)
    # 60 to start, 30 and 1 of its first two steps
    assert played.eta.seconds_left() == pytest.approx(50 + 3 * (100 + 91))
    played.steps("a", 50, 100)
    played.eta.end("a")
    assert played.eta.seconds_left() == pytest.approx(3 * (100 + 60 + 31), rel=0.02)


def test_eta_of_a_cell_that_was_resumed_counts_what_is_left_of_it():
    played = Played({"a": 100, "b": 25})
    played.begin("a")
    played.steps("a", 0, 100)
    played.eta.end("a")
    played.begin("b", 75)
    played.steps("b", 75, 80)
    assert played.eta.seconds_left() == pytest.approx(20)


def test_a_cell_that_fails_at_its_start_is_no_measure_of_the_others():
    played = Played(dict.fromkeys("abc", 100.0))
    played.begin("a", start_s=5)
    played.eta.end("a")
    assert played.eta.seconds_left() is None


def test_eta_counts_what_each_cell_has_to_train():
    """A full run of 100 steps, and a branch that continues it at step 40 of its 50."""
    played = Played({"full": 100, "branch": 10})
    played.begin("full", start_s=0)
    played.steps("full", 0, 50)
    assert played.eta.seconds_left() == pytest.approx(50 + 10 + 2)  # the first two steps of the branch as start-up
    played.steps("full", 50, 100)
    played.eta.end("full")
    played.begin("branch", 40, total=50, start_s=0)
    assert played.eta.seconds_left() == pytest.approx(10)
    played.steps("branch", 40, 45)
    assert played.eta.seconds_left() == pytest.approx(5)


def test_a_cell_that_is_not_run_leaves_the_estimate_of_the_others_alone():
    played = four()
    played.steps("a", 0, 100, first_s=30)
    played.eta.end("a")
    assert played.eta.seconds_left() == pytest.approx(3 * (100 + 91))
    played.eta.end("c")
    assert played.eta.seconds_left() == pytest.approx(2 * (100 + 91))


def test_cells_with_few_lines_are_timed_as_a_whole():
    played = Played({"a": 100, "b": 100})
    played.begin("a", start_s=40)
    played.eta.step("a", 100)
    played.eta.end("a")
    assert played.eta.seconds_left() == pytest.approx(40)


def test_eta_of_two_workers_is_the_end_of_the_later_one():
    """Both run at one step a second; the third cell starts where the first ends, and the fourth after the second."""
    played = Played({"a": 100, "b": 100, "c": 100, "d": 40}, jobs=2)
    played.begin("a", start_s=0)
    played.begin("b", start_s=0)
    for step in range(1, 51):
        played.now += 1.0
        played.eta.step("a", step)
        if step % 2 == 0:  # b is half as far, because it began later, say
            played.eta.step("b", step / 2)
    start_s = 1.5 * 2  # two console lines: of a after 2 s, of b after 4 s
    pace = (48 + 46) / (48 + 23)  # seconds per step over both
    first, second = 50 * pace, 75 * pace
    assert played.eta.seconds_left() == pytest.approx(
        max(first + start_s + 100 * pace, second + start_s + 40 * pace), rel=1e-6
    )


def test_eta_with_more_workers_than_cells_is_the_longest_cell():
    played = Played({"a": 100, "b": 100}, jobs=8)
    played.begin("a", start_s=0)
    played.begin("b", start_s=0)
    played.steps("a", 0, 20)
    assert played.eta.seconds_left() == pytest.approx(100)


def test_step_share_reads_the_console_line():
    assert step_share("step  1200/19073 6.3% loss 3.1421") == pytest.approx(1200 / 19073)
    assert step_share("validation after step 40: loss 3.1") is None
