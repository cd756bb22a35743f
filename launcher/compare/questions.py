"""Questions that a study states before its first run (`asks`), and their answers from the intervals.

    VARIANT is better than BASELINE
    VARIANT is not worse than BASELINE by more than X
    VARIANT equals BASELINE within X
    VARIANT varies more over seeds than OTHER

X is in nats per token. The answer is yes if a test at 5 % (simultaneous for all variants) shows the statement, no if a
test shows the opposite, and undecided otherwise. "Better" is a question about a difference, and its test is that of the
verdicts: two-sided, by the interval that the report shows. A margin is tested on one side, as equivalence is. For the
spread over seeds, the test is the two-sided F test of the
ratio of variances, of one question alone; it assumes normal losses, and needs many seeds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from headway.launcher.compare.simultaneous import Simultaneous
from headway.launcher.compare.stats import CONFIDENCE, estimate
from headway.launcher.compare.verdicts import not_worse_by, verdict

Answer = Literal["yes", "no", "undecided"]
Kind = Literal["better", "not_worse", "equal", "varies"]

FORMS = (
    "A is better than B",
    "A is not worse than B by more than X",
    "A equals B within X",
    "A varies more over seeds than C",
)

_NAME = r"(?P<{}>[A-Za-z0-9][A-Za-z0-9._-]*)"
_NUMBER = r"(?P<margin>[0-9.]+(?:e-?[0-9]+)?)"
_A, _B = _NAME.format("variant"), _NAME.format("other")
_PATTERNS: dict[Kind, str] = {
    "better": rf"{_A} is better than {_B}",
    "not_worse": rf"{_A} is not worse than {_B} by more than {_NUMBER}",
    "equal": rf"{_A} equals {_B} within {_NUMBER}",
    "varies": rf"{_A} varies more over seeds than {_B}",
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A parsed question. `margin`: in nats per token; 0 for "better" and "varies"."""

    text: str
    kind: Kind
    variant: str
    other: str
    margin: float


def parse_question(text: str, *, baseline: str, variants: Collection[str]) -> Question:
    """Parse a question. Raises ValueError if the text has none of the forms, or names anything that is not compared."""
    words = " ".join(text.split()).removesuffix("?").removesuffix(".")
    for kind, pattern in _PATTERNS.items():
        found = re.fullmatch(pattern, words)
        if found is None:
            continue
        variant, other = found["variant"], found["other"]
        for name in (variant, other):
            if name not in variants:
                raise ValueError(f"asks: {text!r}: {name} is not a variant; variants: {', '.join(variants)}")
        if kind == "varies" and variant == other:
            raise ValueError(f"asks: {text!r}: compares {variant} with itself; name two variants")
        if kind != "varies" and (other != baseline or variant == baseline):
            raise ValueError(
                f"asks: {text!r}: every variant is compared with the baseline {baseline}; ask about a variant and "
                f"{baseline}, in this order, or name another `baseline`"
            )
        has_margin = kind in ("not_worse", "equal")
        margin = float(found["margin"]) if has_margin else 0.0
        if has_margin and not 0 < margin < float("inf"):
            raise ValueError(f"asks: {text!r}: the margin must be above 0 nats per token")
        return Question(text=text, kind=kind, variant=variant, other=other, margin=margin)
    raise ValueError(f"asks: {text!r} is not a question that can be answered; use one of: {'; '.join(FORMS)}")


def answer_spread(variant: Mapping[int, float], other: Mapping[int, float]) -> tuple[Answer, str]:
    """Answer "VARIANT varies more over seeds than OTHER" from the losses by seed: (answer, ratio of sds with interval).

    Two-sided F test of the ratio of variances at 5 %.
    """
    a, b = (estimate(list(losses.values())).sd if len(losses) > 1 else None for losses in (variant, other))
    if a is None or b is None or b == 0:
        return "undecided", "no ratio of sds: each needs two seeds"
    from scipy import special

    n, m = len(variant) - 1, len(other) - 1
    tail = (1 - CONFIDENCE) / 2
    low, high = (a / b / math.sqrt(float(special.fdtri(n, m, q))) for q in (1 - tail, tail))
    said: Answer = "yes" if low > 1 else "no" if high < 1 else "undecided"
    return said, f"sd {a / b:.2f}x [{low:.2f}, {high:.2f}]"


def answer(question: Question, difference: Simultaneous | None) -> Answer:
    """Answer a question about a difference: the variant of the question - baseline; None without a finished run."""
    if difference is None or difference.equivalence is None:
        return "undecided"
    if question.kind == "equal":
        if verdict(difference, question.margin) == "equivalent":
            return "yes"
        low, high = difference.low, difference.high
        outside = low is not None and high is not None and (low > question.margin or high < -question.margin)
        return "no" if outside else "undecided"
    if question.kind == "better":
        named: dict[str, Answer] = {"better": "yes", "worse": "no"}
        return named.get(verdict(difference), "undecided")
    found = not_worse_by(difference, question.margin)
    return "undecided" if found is None else ("yes" if found else "no")
