"""Verbs that belong to no other room: the machine, datasets, schemas, shells, and the hidden fork server."""

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
        help="file, or folder for the schemas of all kinds (default: standard output)",
    )


def _schema(args: argparse.Namespace) -> int:
    from headway.launcher.cli.schema import write_schema

    return write_schema(args.out)


def _corpus_arguments(parser: argparse.ArgumentParser) -> None:
    spec_arguments(parser, what="corpus", keys_of="corpus")


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def _completion(args: argparse.Namespace) -> int:
    from headway.launcher.cli.completion import SCRIPTS
    from headway.launcher.cli.keys import keys_of

    print(SCRIPTS[args.shell], flush=True)
    for kind in ("spec", "corpus"):  # so that no key press has to wait for PyTorch
        keys_of(kind)
    return 0


def _complete_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("line", help="the command line up to the cursor")


def _complete(args: argparse.Namespace) -> int:
    from headway.launcher.cli.completion import complete
    from headway.launcher.cli.parser import make_parser

    print("\n".join(complete(args.line, make_parser())))
    return 0


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
        help="show hardware, packages, and what Headway will use",
        examples=("headway doctor", "headway doctor --json"),
        arguments=output_arguments,
        run=_doctor,
        order=1,
    ),
    Verb(
        name="data",
        help="build or verify a dataset",
        order=10,
        actions=(
            Verb(
                name="build",
                help="build tokenizer, shards and manifest from a corpus",
                examples=("headway data build yaml/data/stdlib.yaml",),
                arguments=_corpus_arguments,
                run=_build,
            ),
            Verb(
                name="verify",
                help="verify the hash of every file",
                examples=("headway data verify yaml/data/stdlib.yaml",),
                arguments=_corpus_arguments,
                run=_verify,
            ),
        ),
    ),
    Verb(
        name="schema",
        help="write the JSON schema of specs for completion in editors",
        examples=("headway schema spec.schema.json",),
        arguments=_schema_arguments,
        run=_schema,
        order=95,
    ),
    Verb(
        name="completion",
        help="print a script that completes verbs, options, files and keys in a shell",
        examples=(
            "headway completion bash > ~/.local/share/bash-completion/completions/headway",
            "headway completion zsh > ~/.zsh_headway && echo 'source ~/.zsh_headway' >> ~/.zshrc",
            "headway completion fish > ~/.config/fish/completions/headway.fish",
        ),
        arguments=_completion_arguments,
        run=_completion,
        order=96,
    ),
    Verb(name="complete", help="words that may follow", arguments=_complete_arguments, run=_complete, hidden=True),
    Verb(name="fork-server", help="fork ranks", arguments=_server_arguments, run=_server, hidden=True),
)
