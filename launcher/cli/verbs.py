"""Verbs that belong to no other package: machine, projects, datasets, folders, schemas, shells, hidden fork server."""

from __future__ import annotations

import argparse
from pathlib import Path

from headway.launcher.base.numbers import whole
from headway.launcher.base.verbs import Verb, output_arguments, spec_arguments


def _doctor(args: argparse.Namespace) -> int:
    from headway.launcher.cli.doctor import doctor

    return doctor(as_json=args.json)


def _corpus_arguments(parser: argparse.ArgumentParser) -> None:
    spec_arguments(parser, what="corpus", keys_of="corpus")
    output_arguments(parser)


def _build(args: argparse.Namespace) -> int:
    from headway.launcher.cli.corpus import build_corpus

    return build_corpus(args.spec, args.overrides)


def _verify(args: argparse.Namespace) -> int:
    from headway.launcher.cli.corpus import verify_corpus

    return verify_corpus(args.spec, args.overrides)


def _init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", default=Path(), metavar="DIR", help="default: this folder")


def _init(args: argparse.Namespace) -> int:
    from headway.launcher.cli.project import init_project

    return init_project(args.folder)


def _ls_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", type=Path, nargs="*", metavar="FOLDER", help="default: runs and studies, or else this folder"
    )
    output_arguments(parser)


def _ls(args: argparse.Namespace) -> int:
    from headway.launcher.cli.listing import list_places

    return list_places(args.folders, as_json=args.json)


def _rm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN|STUDY", help="folder of a run or a study")
    parser.add_argument("--checkpoints", action="store_true", help="delete checkpoints only, keep all records")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def _rm(args: argparse.Namespace) -> int:
    from headway.launcher.cli.removing import remove

    return remove(args.folders, yes=args.yes, checkpoints=args.checkpoints)


def _schema_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "out",
        type=Path,
        nargs="?",
        default=None,
        help=".json file, or existing folder for the schemas of all kinds (default: standard output)",
    )


def _schema(args: argparse.Namespace) -> int:
    from headway.launcher.cli.schema import write_schema

    return write_schema(args.out)


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def _completion(args: argparse.Namespace) -> int:
    from headway.launcher.cli.completion import SCRIPTS
    from headway.launcher.cli.keys import keys_of

    print(SCRIPTS[args.shell], flush=True)
    for kind in ("spec", "corpus"):  # fill the cache, so that completion does not wait for the import of PyTorch
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
    parser.add_argument("owner", type=whole(1))
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
        name="init",
        help="write the files of a first project: corpus, model, study, README",
        examples=("headway init my-project",),
        arguments=_init_arguments,
        run=_init,
        order=5,
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
        name="ls",
        help="runs and studies: state, steps, tokens, validation loss, size, age",
        examples=("headway ls", "headway ls studies/quickstart --json"),
        arguments=_ls_arguments,
        run=_ls,
        order=71,
    ),
    Verb(
        name="rm",
        help="delete runs and studies, or their checkpoints, after asking",
        examples=("headway rm runs/quickstart", "headway rm studies/quickstart --checkpoints --yes"),
        arguments=_rm_arguments,
        run=_rm,
        order=72,
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
