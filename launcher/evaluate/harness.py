"""Tasks of EleutherAI's lm-evaluation-harness on a decoder of Headway (extra `eval`).

https://github.com/EleutherAI/lm-evaluation-harness, version in constraints.txt. Tokenization of pairs and windows of
long texts are those of the harness's own models.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from headway.launcher.base.errors import HeadwayError, NoInputError, SpecError
from headway.launcher.evaluate.choices import encode_pair
from headway.launcher.evaluate.measure import Measure
from headway.launcher.evaluate.scorer import Row, Scorer
from headway.launcher.exchange.opened import Opened
from headway.model.hidden import hidden

INSTALL = "install it with `pip install -c constraints.txt 'headway[eval]'`"
_BOOTSTRAP = 1000
_NEW_TOKENS = 256
"""New tokens of a generation whose task does not say how many."""


def is_installed() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


def evaluate_harness(
    model: Opened,
    task: str,
    *,
    include: Path | None,
    shots: int | None,
    limit: int | None,
    done: Callable[[int], None],
) -> list[Measure]:
    """Every metric of a task or a group of tasks. Intervals: 1.96 times the standard error that the harness gives.

    `include`: folder with YAML files of further tasks. Raises SpecError if the package or a task is missing or the
    model has no tokenizer, NoInputError if the data of a task cannot be loaded.
    """
    if not is_installed():
        raise SpecError(
            f"--tasks {task}: tasks other than .jsonl files need the package lm-eval; {INSTALL}, or name a "
            "file of questions (.jsonl)"
        )
    if model.codec.tokenizer is None:
        raise SpecError(f"--tasks {task}: this model knows token ids, not text; train it on text")
    if include is not None and not include.is_dir():
        raise NoInputError(f"--include {include}: no such folder; name the folder with the YAML files of your tasks")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would start a pool for each metric
    with hidden("torchvision"), _quiet():
        lm_eval = importlib.import_module("lm_eval")
        manager = importlib.import_module("lm_eval.tasks").TaskManager(
            include_path=None if include is None else str(include)
        )
        known = set(manager.all_tasks)
        if task not in known:
            raise SpecError(_unknown(task, known))
        scorer = Scorer(model)
        try:
            found = lm_eval.simple_evaluate(
                model=_language_model(model, scorer, done),
                tasks=[task],
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=_BOOTSTRAP,
                task_manager=manager,
                log_samples=False,
            )
        except HeadwayError:
            raise
        except (OSError, ConnectionError, ValueError, ImportError) as error:
            raise NoInputError(
                f"--tasks {task}: the harness failed ({type(error).__name__}: {str(error)[:300]}); its data "
                "comes from the Hugging Face hub unless the task names local files (`dataset_path: json`, "
                "`dataset_kwargs: {data_files: ...}` in a YAML file of --include)"
            ) from error
    assert found is not None, "there is one rank"
    return [replace(measure, digest=scorer.digest) for measure in _measures(found)]


def _unknown(task: str, known: set[str]) -> str:
    import difflib

    near = difflib.get_close_matches(task, known, 3)
    return (
        f"--tasks {task}: no such task"
        + (f"; did you mean {' or '.join(near)}?" if near else "")
        + " Names are those of lm-evaluation-harness, or files of questions that end in .jsonl"
    )


def _measures(found: Any) -> Iterator[Measure]:
    for task, metrics in found["results"].items():
        counts = found["n-samples"].get(task, {})
        better = found["higher_is_better"].get(task, {})
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            half = 1.96 * error if isinstance(error, int | float) else None
            yield Measure(
                name=f"{task}/{metric}" + ("" if chosen == "none" else f"[{chosen}]"),
                value=float(value),
                unit="share" if metric.startswith(("acc", "exact_match")) else metric,
                better="lower" if better.get(metric) is False else "higher",
                n=int(counts.get("effective", 0)),
                low=None if half is None else value - half,
                high=None if half is None else value + half,
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness logs what Headway says itself."""
    import logging

    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _language_model(model: Opened, scorer: Scorer, done: Callable[[int], None]) -> Any:
    from headway.launcher.exchange.generate import Sampling, continuation

    codec = model.codec
    begin = codec.eos_id if codec.bos_id is None else codec.bos_id
    assert codec.tokenizer is not None and begin is not None

    base: Any = importlib.import_module("lm_eval.api.model").LM

    class Headway(base):
        """The three questions that the harness asks. Requests have their texts in `args`."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            rows = [encode_pair(codec, *request.args) for request in requests]
            return [(p.total, bool(p.best.all())) for p in scorer.score(rows, done)]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            texts = [request.args[0] for request in requests]
            rows = [Row([begin, *ids], 1) for ids in codec.tokenizer.encode(texts)]  # pyright: ignore[reportOptionalMemberAccess]
            return [p.total for p in scorer.score(rows, done)]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [self._generate(*request.args) for request in requests]

        def _generate(self, context: str, settings: dict[str, Any]) -> str:
            stops = settings.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            if settings.get("do_sample") and settings.get("temperature", 0) > 0:
                raise SpecError("--tasks: a task samples its answers (do_sample); only greedy generation is supported")
            count = int(settings.get("max_gen_toks", _NEW_TOKENS))
            if count >= scorer.limit:
                raise SpecError(
                    f"--tasks: a task generates up to {count} new tokens, which leave no room for its question in the "
                    f"{scorer.limit} positions of a training sequence; set generation_kwargs.max_gen_toks of the task "
                    f"to a number well below (--include), or train with a larger data.seq_len"
                )
            ids = codec.encode(context)[-(scorer.limit - count) :]
            sampling = Sampling(tokens=count, temperature=0.0, top_p=1.0, seed=1)
            new: list[int] = []
            text = ""
            for token in continuation(model.decoder, ids, sampling, eos_id=codec.eos_id, stats={}):
                new.append(token)
                text = codec.decode(new)
                if any(stop and stop in text for stop in stops):
                    break
            done(len(new))
            for stop in stops:
                text = text.split(stop)[0] if stop else text
            return text

    return Headway()
