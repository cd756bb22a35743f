"""Answers to the questions of a study (`asks`), for its report and for that of a ladder of sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from headway.launcher.base.intervals import CONFIDENCE
from headway.launcher.compare.analyse import StudyResult
from headway.launcher.compare.findings import signed_interval
from headway.launcher.compare.ladder.read import LadderStudy
from headway.launcher.compare.questions import answer, answer_spread, parse_question
from headway.launcher.report.page import Block, Table, Text

NO_RUNS = "no finished runs"


def question_heading(later: Mapping[str, int]) -> str:
    """Of the column of questions. `later`: as `headway.launcher.study.keeping.asked_later`."""
    return "question" if later else "question, stated before the first run"


def question_words(text: str, later: Mapping[str, int]) -> str:
    """The question, with when it was stated if it was stated late."""
    if text not in later:
        return f"{text} (stated before the first run)" if later else text
    return f"{text} (stated late: {later[text]} {'run' if later[text] == 1 else 'runs'} had finished)"


def answer_of(result: StudyResult, text: str) -> tuple[str, str]:
    """(answer, the interval that gives it) of a question of the study."""
    question = parse_question(text, baseline=result.baseline.name, variants=[v.name for v in result.variants])
    if question.kind == "varies":
        losses = {v.name: v.losses for v in result.variants}
        return answer_spread(losses[question.variant], losses[question.other])
    difference = result.comparison.differences.get(question.variant)
    if difference is None:
        return NO_RUNS, "-"
    return answer(question, difference), signed_interval(difference)


def ladder_answers(study: LadderStudy) -> Iterator[Block]:
    """A table of the questions by size. No blocks without questions."""
    asked = {s.name: s.study.record.get("asks") or [] for s in study.sizes if s.study is not None}
    texts = dict.fromkeys(text for asks in asked.values() for text in asks)
    if not texts:
        return
    later: dict[str, int] = {}
    for s in study.sizes:
        for text, finished in (s.study.record.get("asked_later") or {}).items() if s.study is not None else ():
            later[text] = later.get(text, 0) + finished
    rows = [(question_heading(later), *(s.name for s in study.sizes))]
    for text in texts:
        answers = []
        for s in study.sizes:
            if s.study is None or text not in asked[s.name]:
                answers.append("not begun" if s.study is None else "not asked")
                continue
            said, shown = answer_of(s.study, text)
            answers.append(said if shown == "-" else f"{said}: {shown}")
        rows.append((question_words(text, later), *answers))
    yield Table(rows, frozenset(range(len(rows[0]))))
    yield Text(
        "Each size answers by its own intervals, which hold for all its variants at once, but not for all sizes at "
        f"once: if nothing differs at any of {len(study.sizes)} sizes, the chance that one of them claims a difference "
        f"is up to {1 - CONFIDENCE ** len(study.sizes):.0%}. Not asked: a variant of the question is not trained there."
    )
