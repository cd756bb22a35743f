"""`headway bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from headway.launcher.base.verbs import Verb, out_argument, quiet_argument, spec_arguments


def _words(text: str) -> list[str]:
    """a,b -> [a, b]."""
    return [word.strip() for word in text.split(",")]


def _lengths(text: str) -> list[int]:
    """256,1024 -> [256, 1024]; argparse reports what is no number."""
    return [int(word) for word in text.split(",")]


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    spec_arguments(parser)
    parser.add_argument("--steps", type=int, default=30, help="measured steps, at least 2")
    out_argument(parser)
    quiet_argument(parser)


def _step_arguments(parser: argparse.ArgumentParser) -> None:
    _data_arguments(parser)
    parser.add_argument(
        "--against", action="append", default=[], metavar="key=value", help="a second spec in the same run"
    )


def _mechanism_arguments(parser: argparse.ArgumentParser) -> None:
    spec_arguments(parser, what="study")
    parser.add_argument(
        "--lengths", type=_lengths, default=[256, 1024, 2048], help="tokens per sequence: 256,1024,2048"
    )
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds, at least 2")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per pass: shorter sequences come in batches")
    parser.add_argument("--out", type=Path, default=None, help="where the JSON is written, and a table beside it")
    quiet_argument(parser)


def _checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    spec_arguments(parser)
    parser.add_argument("--rounds", type=int, default=10, help="measured saves, at least 2")
    out_argument(parser)
    quiet_argument(parser)


def _micro_batch_arguments(parser: argparse.ArgumentParser) -> None:
    spec_arguments(parser)
    out_argument(parser)
    quiet_argument(parser)


def _gpu_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=8.0, metavar="N", help="what does not fit is left (default 8)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="rows go here; the same again goes on")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: every row, reduced, to try it out"
    )
    parser.add_argument("--parts", type=_words, default=None, metavar="A,B", help="only these parts (default: all)")
    quiet_argument(parser)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with rows.jsonl")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="where report.md goes (default: DIR)")
    parser.add_argument("--refit", action="store_true", help="make the planner's constants of this device anew from it")


def _step(args: argparse.Namespace) -> int:
    from headway.launcher.bench.step import bench_step

    return bench_step(args.spec, args.overrides, steps=args.steps, out=args.out, against=args.against)


def _data(args: argparse.Namespace) -> int:
    from headway.launcher.bench.step import bench_data

    return bench_data(args.spec, args.overrides, steps=args.steps, out=args.out)


def _mechanism(args: argparse.Namespace) -> int:
    from headway.launcher.bench.mechanism import bench_mechanism

    options = {"lengths": args.lengths, "rounds": args.rounds, "tokens": args.tokens}
    return bench_mechanism(args.spec, args.overrides, **options, out=args.out)


def _checkpoint(args: argparse.Namespace) -> int:
    from headway.launcher.bench.checkpoint import bench_checkpoint

    return bench_checkpoint(args.spec, args.overrides, rounds=args.rounds, out=args.out)


def _micro_batch(args: argparse.Namespace) -> int:
    from headway.launcher.bench.micro_batch import bench_micro_batch

    return bench_micro_batch(args.spec, args.overrides, out=args.out)


def _gpu(args: argparse.Namespace) -> int:
    from headway.launcher.bench.gpu.run import PARTS, bench_gpu

    return bench_gpu(minutes=args.minutes, out=args.out, device=args.device, parts=args.parts or PARTS)


def _report(args: argparse.Namespace) -> int:
    from headway.launcher.bench.gpu.report import report_gpu

    return report_gpu(args.folder, out=args.out, refit=args.refit)


VERBS = (
    Verb(
        name="bench",
        help="measure speed",
        order=50,
        actions=(
            Verb(
                name="step",
                help="a training step: tokens/s, share of each part, cost over a bare PyTorch loop",
                examples=("headway bench step yaml/base/quickstart.yaml --steps 5",),
                arguments=_step_arguments,
                run=_step,
            ),
            Verb(
                name="mechanism",
                help="every variant of a study against its baseline, over lengths",
                examples=("headway bench mechanism yaml/quickstart.yaml --lengths 256,1024 --out mechanisms.json",),
                arguments=_mechanism_arguments,
                run=_mechanism,
            ),
            Verb(
                name="data",
                help="the loader alone: tokens/s and time per batch",
                examples=("headway bench data yaml/base/quickstart.yaml",),
                arguments=_data_arguments,
                run=_data,
            ),
            Verb(
                name="checkpoint",
                help="what training waits for a save, and steps beside its writing",
                examples=("headway bench checkpoint yaml/bench/checkpoint-82m.yaml --rounds 2",),
                arguments=_checkpoint_arguments,
                run=_checkpoint,
            ),
            Verb(
                name="micro-batch",
                help="what train.micro_batch: auto finds on this host, and why",
                examples=("headway bench micro-batch yaml/base/quickstart.yaml",),
                arguments=_micro_batch_arguments,
                run=_micro_batch,
            ),
            Verb(
                name="gpu",
                help="what a GPU can do, and what kernels and mechanisms make of it",
                examples=("headway bench gpu --minutes 8 --out gpu-results",),
                arguments=_gpu_arguments,
                run=_gpu,
            ),
            Verb(
                name="report",
                help="tables and plots of a folder that bench gpu wrote",
                examples=("headway bench report gpu-results",),
                arguments=_report_arguments,
                run=_report,
            ),
        ),
    ),
)
