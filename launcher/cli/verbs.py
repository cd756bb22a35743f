"""Verbs that belong to no other room: the machine, datasets, schemas, and the hidden fork server."""

from __future__ import annotations

import argparse
from pathlib import Path

from headway.launcher.base.verbs import Verb, output_arguments, spec_arguments


def _doctor(args: argparse.Namespace) -> int:
    from headway.launcher.cli.doctor import doctor

    return doctor(as_json=args.json)


def _corpus_arguments(parser: argparse.ArgumentParser) -> None:
    spec_arguments(parser)
    output_arguments(parser)


def _build(args: argparse.Namespace) -> int:
    from headway.launcher.cli.corpus import build_corpus

    return build_corpus(args.spec, args.overrides)


def _verify(args: argparse.Namespace) -> int:
    from headway.launcher.cli.corpus import verify_corpus

    return verify_corpus(args.spec, args.overrides)


def _schema_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "out",
        type=Path,
        nargs="?",
        default=None,
        help="file, or a folder for the schemas of all kinds; default: standard output",
    )


def _schema(args: argparse.Namespace) -> int:
    from headway.launcher.cli.schema import write_schema

    return write_schema(args.out)


def _server_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("socket", type=Path)
    parser.add_argument("owner", type=int)
    parser.add_argument("padding")


def _server(args: argparse.Namespace) -> int:
    from headway.launcher.cli.fork_server import serve

    return serve(args.socket, args.owner, args.command)


VERBS = (
    Verb(
        name="doctor",
        help="what this machine has and what will be used",
        examples=("headway doctor", "headway doctor --json"),
        arguments=output_arguments,
        run=_doctor,
        order=1,
    ),
    Verb(
        name="data",
        help="build a dataset from text, or verify one",
        order=10,
        actions=(
            Verb(
                name="build",
                help="text to tokenizer, shards and manifest",
                examples=("headway data build yaml/data/stdlib.yaml",),
                arguments=_corpus_arguments,
                run=_build,
            ),
            Verb(
                name="verify",
                help="check every file's hash",
                examples=("headway data verify yaml/data/stdlib.yaml",),
                arguments=_corpus_arguments,
                run=_verify,
            ),
        ),
    ),
    Verb(
        name="schema",
        help="write the JSON schema of specs, for completion in editors",
        examples=("headway schema spec.schema.json",),
        arguments=_schema_arguments,
        run=_schema,
        order=95,
    ),
    Verb(name="fork-server", help="fork ranks", arguments=_server_arguments, run=_server, hidden=True),
)
