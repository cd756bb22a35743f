"""Long contexts: the loss late in long documents, and recall over a whole sequence of a synthetic task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice

from headway.data.config import DataConfig, DataError, SyntheticSource
from headway.launcher.base.errors import SpecError
from headway.launcher.evaluate.measure import Measure, ratio
from headway.launcher.evaluate.scorer import Row, Scorer
from headway.launcher.evaluate.texts import TextSource, documents_of
from headway.launcher.exchange.opened import Opened

SEQUENCES = 64
"""Sequences of a recall test, unless the user gives another number."""


def check_length(model: Opened, length: int) -> None:
    """Raises SpecError if the model has no positions for `length` tokens."""
    if model.positions is not None and length > model.positions:
        raise SpecError(
            f"--lengths {length}: this model has learned positions for {model.positions} tokens; give at most that"
        )


def evaluate_lengths(
    model: Opened, source: TextSource, lengths: list[int], *, limit: int | None, done: Callable[[int], None]
) -> list[Measure]:
    """The loss of the later half of the first L tokens of every document that has L, for each L of `lengths`.

    The context is the document from its beginning on. An L beyond the training sequence asks how the model
    extrapolates. All lengths are asked of the same documents, those with the largest L, so that their losses can be
    compared. Raises DataError if no document is that long.
    """
    largest = max(lengths)
    long = (row.ids[: largest + 1] for row, _ in documents_of(model, source) if len(row.ids) > largest)
    documents = list(islice(long, limit))
    if not documents:
        raise DataError(f"{source.path}: has no document of {largest:,} tokens; give shorter --lengths or longer texts")
    measures = []
    for length in sorted(lengths):
        check_length(model, length)
        rows = [Row(ids[: length + 1], length // 2 + 1) for ids in documents]
        scorer = Scorer(model, limit=length)
        predicted = scorer.score(rows, done)
        name, losses = f"{source.name}/loss@{length}", [-p.total for p in predicted]
        found = ratio(name, losses, [len(p.log_p) for p in predicted], unit="nats per token")
        measures.append(replace(found, digest=scorer.digest))
    return measures


def evaluate_recall(
    model: Opened, data: DataConfig | None, lengths: list[int], *, limit: int | None, done: Callable[[int], None]
) -> list[Measure]:
    """Share of right answers where one problem of the synthetic task of the run fills a sequence of L tokens.

    Raises SpecError if the run was not trained on a synthetic task, or its vocabulary is too small for L.
    """
    if data is None or not isinstance(data.source, SyntheticSource):
        raise SpecError(
            "--recall: the model was not trained on a synthetic task; use --text with --lengths, or a run of "
            "yaml/probes"
        )
    return [_recall(model, data, data.source, length, limit or SEQUENCES, done) for length in sorted(lengths)]


def _recall(
    model: Opened, data: DataConfig, source: SyntheticSource, length: int, count: int, done: Callable[[int], None]
) -> Measure:
    from headway.data.loader import open_source

    check_length(model, length)
    stretched = stretch(source, length)
    cfg = data.model_copy(update={"source": stretched, "seq_len": stretched.problem_length - 1, "validation": {}})
    task = open_source(cfg, split="validation")
    scorer = Scorer(model, limit=length)
    wrong: list[float] = []
    answers: list[float] = []
    for number in range(count):
        sample = task.sample(task.index(number))
        ids, targets = sample.tokens.tolist(), sample.targets
        assert targets is not None, "synthetic tasks have targets"
        predicted = scorer.score([Row(ids, 1)])[0]
        wrong.append(float((~predicted.best[targets]).sum()))
        answers.append(float(targets.sum()))
        done(len(ids))
    missed = ratio(f"{source.task}/recall@{length}", wrong, answers, unit="share")
    return Measure(
        name=missed.name,
        value=1 - missed.value,
        unit="share",
        better="higher",
        n=count,
        low=None if missed.high is None else max(0.0, 1 - missed.high),
        high=None if missed.low is None else min(1.0, 1 - missed.low),
        chance=1 / _answers(stretched),
        digest=scorer.digest,
    )


def stretch(source: SyntheticSource, length: int) -> SyntheticSource:
    """The task with one problem of at most `length` + 1 tokens, as long as its vocabulary allows.

    mqar: as many pairs as fit, with as many queries as before. induction: a longer string. copy: a longer string.
    Raises SpecError if the vocabulary allows no problem of at least 90 % of `length`.
    """
    keys = (source.vocab_size - 1) // 2
    if source.task == "mqar":
        change = {"pairs": min(keys, (length + 1 - 2 * source.queries) // 2)}
    elif source.task == "copy":
        change = {"span": length // 2}
    else:
        change = {"span": min(source.vocab_size - 1, length + 1 - 2 * source.queries)}
    if min(change.values()) >= 1:
        longer = source.model_copy(update=change)
        if longer.problem_length >= 0.9 * (length + 1):
            return SyntheticSource.model_validate(longer.model_dump())
    most = {"mqar": 2 * keys + 2 * source.queries, "copy": length}.get(source.task, keys * 2 + 2 * source.queries)
    raise SpecError(
        f"--recall {length}: a {source.task} problem with a vocabulary of {source.vocab_size} and {source.queries} "
        f"queries has at most {most:,} tokens; give a length near that or below, or train with a larger "
        "data.source.vocab_size"
    )


def _answers(source: SyntheticSource) -> int:
    """Tokens that an answer can be, to one that knows the task only."""
    return source.vocab_size - 1 - (source.vocab_size - 1) // 2 if source.task == "mqar" else source.vocab_size - 1
