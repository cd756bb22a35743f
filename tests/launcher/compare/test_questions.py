"""Questions stated before the first run: only those that the intervals can answer are accepted."""

import pytest

from headway.launcher.compare.questions import answer, parse_question
from headway.launcher.compare.simultaneous import Simultaneous

VARIANTS = ["gqa", "rgqa-k1"]


def ask(text):
    return parse_question(text, baseline="gqa", variants=VARIANTS)


def found(low, high, narrow=0.8):
    middle, half = (low + high) / 2, (high - low) / 2
    inside = (middle - narrow * half, middle + narrow * half)
    return Simultaneous(n=3, mean=middle, low=low, high=high, equivalence=inside)


@pytest.mark.parametrize(
    ("text", "low", "high", "expected"),
    [
        ("rgqa-k1 is better than gqa", -0.03, -0.01, "yes"),
        ("rgqa-k1 is better than gqa", 0.01, 0.03, "no"),
        ("rgqa-k1 is better than gqa", -0.03, 0.01, "undecided"),
        # the one-sided test would show it, the interval of the report contains 0
        ("rgqa-k1 is better than gqa", -0.03, 0.001, "undecided"),
        ("rgqa-k1 is better than gqa", -0.001, 0.03, "undecided"),
        ("rgqa-k1 is not worse than gqa by more than 0.01", -0.02, 0.005, "yes"),
        ("rgqa-k1 is not worse than gqa by more than 1e-2?", 0.02, 0.05, "no"),
        ("rgqa-k1 is not worse than gqa by more than 0.01.", 0.0, 0.02, "undecided"),
        ("rgqa-k1 equals gqa within 0.01", -0.005, 0.008, "yes"),
        ("rgqa-k1 equals gqa within 0.01", 0.02, 0.04, "no"),
        ("rgqa-k1 equals gqa within 0.01", 0.005, 0.04, "undecided"),
    ],
)
def test_a_question_is_answered_by_its_interval(text, low, high, expected):
    assert answer(ask(text), found(low, high)) == expected


def test_without_runs_or_with_one_seed_it_stays_open():
    question = ask("rgqa-k1 is better than gqa")
    assert answer(question, None) == answer(question, Simultaneous(n=1, mean=-1.0)) == "undecided"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("is rgqa-k1 good?", "use one of: A is better than B; A is not worse"),
        ("moa is better than gqa", "moa is not a variant"),
        ("gqa is better than rgqa-k1", "every variant is compared with the baseline gqa"),
        ("rgqa-k1 equals gqa within 0", "the margin must be above 0"),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused_with_the_forms(text, message):
    with pytest.raises(ValueError, match="asks: ") as caught:
        ask(text)
    assert message in str(caught.value)
