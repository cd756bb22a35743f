"""Tasks with choices in JSON lines, scored by log-likelihood without training (zero-shot).

A line is `{"query": "The capital of France is", "choices": [" Paris", " Rome"], "gold": 0}`. A choice continues the
query as it stands, so it begins with its space. `gold` is the number of the right choice, or a list of such numbers.
The rules are those of EleutherAI's lm-evaluation-harness (multiple_choice): the choice with the largest log-likelihood
is the answer (`acc`), or the one with the largest log-likelihood per character (`acc_norm`).
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.evaluate.measure import Measure, ratio, share
from headway.launcher.evaluate.scorer import Row, Scorer
from headway.launcher.evaluate.texts import NO_BYTES
from headway.launcher.exchange.opened import Opened
from headway.launcher.run.codec import Codec

_MAX_LINE = 16 << 20
_LINE = '{"query": "2 + 2 =", "choices": [" 4", " 5"], "gold": 0}'


@dataclass(frozen=True, slots=True)
class Question:
    """`gold`: numbers of the right choices."""

    query: str
    choices: tuple[str, ...]
    gold: tuple[int, ...]


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The first `limit` questions of a file. Raises NoInputError without the file, SpecError for a wrong line."""
    try:
        with path.open("rb") as stream:
            lines = [(number, line) for number, line in enumerate(_lines(stream, path), 1) if line.strip()]
    except FileNotFoundError:
        raise NoInputError(f"{path}: no such file; name a file of lines such as {_LINE}") from None
    except OSError as error:
        raise NoInputError(f"{path}: cannot be read ({error.strerror}); name a file of lines such as {_LINE}") from None
    if not lines:
        raise SpecError(f"{path}: has no question; write lines such as {_LINE}")
    return [_question(line, f"{path}:{number}") for number, line in lines[:limit]]


def _lines(stream: Any, path: Path) -> list[bytes]:
    lines = []
    while line := stream.readline(_MAX_LINE + 1):
        if len(line) > _MAX_LINE:
            raise SpecError(f"{path}:{len(lines) + 1}: a line of more than {_MAX_LINE >> 20} MiB; shorten the query")
        lines.append(line if lines else line.removeprefix(codecs.BOM_UTF8))
    return lines


def _question(line: bytes, where: str) -> Question:
    try:
        found = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{where}: is no JSON ({error}); write {_LINE}") from None
    if not isinstance(found, dict) or not {"query", "choices", "gold"} <= found.keys():
        raise SpecError(f"{where}: needs the keys query, choices and gold, such as {_LINE}")
    query, choices, gold = found["query"], found["choices"], found["gold"]
    if (
        not isinstance(query, str)
        or not isinstance(choices, list)
        or not all(isinstance(c, str) and c for c in choices)
    ):
        raise SpecError(f"{where}: query must be a text and choices a list of texts, none of them empty")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise SpecError(f"{where}: {len(choices)} choices; give at least 2, all different")
    numbers = gold if isinstance(gold, list) else [gold]
    if not numbers or not all(type(n) is int and 0 <= n < len(choices) for n in numbers):
        raise SpecError(f"{where}: gold is {gold!r}; give the number of the right choice, from 0 to {len(choices) - 1}")
    return Question(query, tuple(choices), tuple(sorted(set(numbers))))


def encode_pair(codec: Codec, context: str, continuation: str) -> Row:
    """The tokens of both texts together; those that the context alone does not have are predicted.

    Spaces at the end of the context belong to the continuation. Without a context, the end-of-document token stands
    before the continuation.
    """
    begin = codec.eos_id if codec.bos_id is None else codec.bos_id
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    assert codec.tokenizer is not None and begin is not None
    if not context:
        return Row([begin, *codec.tokenizer.encode([continuation])[0]], 1)
    whole, before = (list(ids) for ids in codec.tokenizer.encode([context + continuation, context]))
    if codec.bos_id is not None:
        whole, before = [codec.bos_id, *whole], [codec.bos_id, *before]
    # The last token of the context can grow into the continuation; at least one token is predicted, and one is given.
    first = max(1, min(len(before), len(whole) - 1))
    return Row(whole, first) if len(whole) > 1 else Row([begin, *whole], 1)


def evaluate_choices(
    model: Opened, name: str, questions: Sequence[Question], *, done: Callable[[int], None]
) -> list[Measure]:
    """acc, acc_norm, and bits per byte of the right choice (the most likely one where several are right), unless the
    tokenizer loses text of it.
    """
    codec = model.codec
    if codec.tokenizer is None:
        raise SpecError(f"--tasks {name}: this model knows token ids, not text; train it on text, or use --recall")
    rows = [encode_pair(codec, q.query, choice) for q in questions for choice in q.choices]
    scorer = Scorer(model)
    log_p = iter([predicted.total for predicted in scorer.score(rows, done)])
    right: list[bool] = []
    right_norm: list[bool] = []
    loss: list[float] = []
    size: list[float] = []
    for question in questions:
        of_choices = [next(log_p) for _ in question.choices]
        per_character = [p / len(choice) for p, choice in zip(of_choices, question.choices, strict=True)]
        right.append(_first_largest(of_choices) in question.gold)
        right_norm.append(_first_largest(per_character) in question.gold)
        best = max(question.gold, key=lambda i: of_choices[i])
        loss.append(-of_choices[best])
        size.append(len(question.choices[best].encode()))
    chance = math.fsum(len(q.gold) / len(q.choices) for q in questions) / len(questions)
    measures = [share(f"{name}/acc", right, chance=chance), share(f"{name}/acc_norm", right_norm, chance=chance)]
    texts = [question.query + question.choices[i] for question in questions for i in question.gold]
    if any(codec.loses(text, ids) for text, ids in zip(texts, codec.tokenizer.encode(texts), strict=True)):
        console.note(f"note: {name}: {NO_BYTES}")
    else:
        gold = ratio(f"{name}/gold_bits_per_byte", loss, size, unit="nats per byte")
        measures.append(gold.scaled(gold.name, 1 / math.log(2), "bits per byte"))
    return [replace(measure, digest=scorer.digest) for measure in measures]


def _first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])
