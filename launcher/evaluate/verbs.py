"""`headway eval`."""

from __future__ import annotations

import argparse
from pathlib import Path

from headway.launcher.base.numbers import real, whole, whole_list
from headway.launcher.base.verbs import Verb, out_argument, output_arguments


def _words(text: str) -> list[str]:
    """a,b -> [a, b]."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _fields(text: str) -> tuple[str, str]:
    """a,b -> (a, b)."""
    words = _words(text)
    if len(words) != 2:
        raise argparse.ArgumentTypeError(f"{text!r}: give two fields, such as article,highlights")
    return words[0], words[1]


def _separator(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a text, such as $'\\n\\nSummary:\\n' in bash")
    return text


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
        "--summaries",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="ROUGE of generated targets, and the loss of given ones: a dataset of pairs, or a .jsonl or .parquet file",
    )
    parser.add_argument(
        "--fields",
        type=_fields,
        default=("prompt", "target"),
        metavar="PROMPT,TARGET",
        help="fields of a file of --summaries (default: prompt,target)",
    )
    parser.add_argument(
        "--separator",
        type=_separator,
        default=None,
        metavar="TEXT",
        help="text between prompt and target of a file of --summaries (default: that of the pairs of the run)",
    )
    parser.add_argument(
        "--new-tokens",
        type=whole(1, 100_000),
        default=64,
        help="tokens that --summaries generates at most (default: 64)",
    )
    parser.add_argument(
        "--beams", type=whole(1, 1000), default=1, help="hypotheses of beam search (default: 1, greedy search)"
    )
    parser.add_argument(
        "--length-penalty",
        type=real(least=0, most=10),
        default=1.0,
        help="p: beam search ranks by log-probability / tokens^p (default: 1)",
    )
    parser.add_argument(
        "--texts-out",
        type=Path,
        default=None,
        metavar="FILE",
        help="append what --summaries generates to this file, one line of JSON for each pair",
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
    from headway.launcher.evaluate.summaries import Summaries
    from headway.launcher.evaluate.texts import TextSource
    from headway.launcher.exchange.search import Search

    asked = Asked(
        texts=None if args.text is None else tuple(map(TextSource.parse, args.text)),
        tasks=tuple(args.tasks),
        include=args.include,
        shots=args.shots,
        lengths=tuple(args.lengths),
        recall=tuple(args.recall),
        summaries=Summaries(
            sources=tuple(TextSource.parse(text, "--summaries") for text in args.summaries),
            how=Search(tokens=args.new_tokens, beams=args.beams, length_penalty=args.length_penalty),
            fields=args.fields,
            texts=args.texts_out,
            separator=args.separator,
        ),
        limit=args.limit,
    )
    return evaluate(args.path, asked, step=args.step, out=args.out)


VERBS = (
    Verb(
        name="eval",
        help="measure a model: losses of texts, tasks with choices, long contexts, summaries",
        examples=(
            "headway eval runs/first --text books=texts/books.jsonl",
            "headway eval runs/first --tasks questions.jsonl,arc_easy",
            "headway eval studies/mine --text heldout=texts",
            "headway eval runs/tuned --summaries datasets/functions --beams 4",
        ),
        arguments=_arguments,
        run=_eval,
        order=62,
    ),
)
