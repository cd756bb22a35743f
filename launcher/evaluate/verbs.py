"""`headway eval`."""

from __future__ import annotations

import argparse
from pathlib import Path

from headway.launcher.base.numbers import whole, whole_list
from headway.launcher.base.verbs import Verb, out_argument, output_arguments


def _words(text: str) -> list[str]:
    """a,b -> [a, b]."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", type=Path, metavar="RUN|EXPORT|STUDY", help="folder of a run, of weights, or of a study"
    )
    parser.add_argument(
        "--text",
        action="append",
        default=None,
        metavar="[NAME=]PATH",
        help="loss of a text file, a folder of them, a .jsonl or .parquet file, or the validation of a dataset",
    )
    parser.add_argument(
        "--tasks",
        type=_words,
        default=[],
        metavar="TASK,...",
        help="files of questions (.jsonl), or tasks of lm-evaluation-harness",
    )
    parser.add_argument(
        "--include", type=Path, default=None, metavar="DIR", help="folder with YAML files of further harness tasks"
    )
    parser.add_argument("--shots", type=whole(0, 1000), default=None, help="examples before a question (harness tasks)")
    parser.add_argument(
        "--lengths",
        type=whole_list(2, 10_000_000),
        default=[],
        help="loss of the later half of the first L tokens of long documents of --text, for each L",
    )
    parser.add_argument(
        "--recall",
        type=whole_list(8, 10_000_000),
        default=[],
        help="recall of the run's synthetic task over sequences of L tokens, for each L",
    )
    parser.add_argument(
        "--limit", type=whole(1, 1_000_000_000), default=None, help="first documents, questions or sequences only"
    )
    parser.add_argument(
        "--step", type=whole(0), default=None, metavar="N", help="step of the checkpoint (default: the newest)"
    )
    out_argument(parser)
    output_arguments(parser)


def _eval(args: argparse.Namespace) -> int:
    from headway.launcher.evaluate.evaluate import Asked, evaluate
    from headway.launcher.evaluate.texts import TextSource

    asked = Asked(
        texts=None if args.text is None else tuple(map(TextSource.parse, args.text)),
        tasks=tuple(args.tasks),
        include=args.include,
        shots=args.shots,
        lengths=tuple(args.lengths),
        recall=tuple(args.recall),
        limit=args.limit,
    )
    return evaluate(args.path, asked, step=args.step, out=args.out)


VERBS = (
    Verb(
        name="eval",
        help="measure a model: losses of texts, tasks with choices, long contexts",
        examples=(
            "headway eval runs/first --text books=texts/books.jsonl",
            "headway eval runs/first --tasks questions.jsonl,arc_easy",
            "headway eval studies/mine --text heldout=texts",
        ),
        arguments=_arguments,
        run=_eval,
        order=62,
    ),
)
