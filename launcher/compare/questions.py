"""Questions that a study states before its first run (`asks`), and their answers from the intervals.

    VARIANT is better than BASELINE
    VARIANT is not worse than BASELINE by more than X
    VARIANT equals BASELINE within X

X is in nats per token. The answer is yes if a test at 5 % (simultaneous for all variants) shows the statement, no if a
test shows the opposite, and undecided otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from headway.launcher.compare.simultaneous import Simultaneous
from headway.launcher.compare.verdicts import not_worse_by, verdict

Answer = Literal["yes", "no", "undecided"]
Kind = Literal["better", "not_worse", "equal"]

FORMS = ("A is better than B", "A is not worse than B by more than X", "A equals B within X")

_NAME = r"(?P<{}>[A-Za-z0-9][A-Za-z0-9._-]*)"
_NUMBER = r"(?P<margin>[0-9.]+(?:e-?[0-9]+)?)"
_A, _B = _NAME.format("variant"), _NAME.format("other")
_PATTERNS: dict[Kind, str] = {
    "better": rf"{_A} is better than {_B}",
    "not_worse": rf"{_A} is not worse than {_B} by more than {_NUMBER}",
    "equal": rf"{_A} equals {_B} within {_NUMBER}",
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A parsed question. `margin`: in nats per token; 0 for "better"."""

    text: str
    kind: Kind
    variant: str
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
        if other != baseline or variant == baseline:
            raise ValueError(
                f"asks: {text!r}: every variant is compared with the baseline {baseline}; ask about a variant and "
                f"{baseline}, in this order, or name another `baseline`"
            )
        margin = float(found["margin"]) if kind != "better" else 0.0
        if kind != "better" and not 0 < margin < float("inf"):
            raise ValueError(f"asks: {text!r}: the margin must be above 0 nats per token")
        return Question(text=text, kind=kind, variant=variant, margin=margin)
    raise ValueError(f"asks: {text!r} is not a question that can be answered; use one of: {'; '.join(FORMS)}")


def answer(question: Question, difference: Simultaneous | None) -> Answer:
    """Answer a question. `difference`: the variant of the question - baseline; None without a finished run."""
    if difference is None or difference.equivalence is None:
        return "undecided"
    if question.kind == "equal":
        if verdict(difference, question.margin) == "equivalent":
            return "yes"
        low, high = difference.low, difference.high
        outside = low is not None and high is not None and (low > question.margin or high < -question.margin)
        return "no" if outside else "undecided"
    found = not_worse_by(difference, question.margin)
    return "undecided" if found is None else ("yes" if found else "no")
