"""`headway bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from headway.launcher.base.numbers import real, whole, whole_list
from headway.launcher.base.verbs import Verb, out_argument, quiet_argument, spec_arguments


def _words(text: str) -> list[str]:
    """a,b -> [a, b]."""
    return [word.strip() for word in text.split(",")]


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    spec_arguments(parser)
    parser.add_argument("--steps", type=whole(2, 1_000_000), default=30, help="measured steps, at least 2 (default 30)")
    out_argument(parser)
    quiet_argument(parser)


def _step_arguments(parser: argparse.ArgumentParser) -> None:
    _data_arguments(parser)
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="key=value",
        help="compare with a second spec that has this value",
    )


def _mechanism_arguments(parser: argparse.ArgumentParser) -> None:
    spec_arguments(parser, what="study")
    parser.add_argument(
        "--lengths",
        type=whole_list(2, 10_000_000),
        default=None,
        help="tokens per sequence (default 256,1024,2048; with --at-bounds those of the bounds)",
    )
    parser.add_argument(
        "--at-bounds", action="store_true", help="measure the larger model that the study's bounds name, at equal sizes"
    )
    parser.add_argument(
        "--variants",
        type=_words,
        default=[],
        metavar="A,B",
        help="variants to measure beside the baseline (default: all)",
    )
    parser.add_argument("--rounds", type=whole(2, 100_000), default=15, help="measured rounds, at least 2 (default 15)")
    parser.add_argument(
        "--tokens",
        type=whole(2, 100_000_000),
        default=2048,
        help="tokens per pass; shorter sequences are batched (default 2048)",
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="file to which the JSON is written; a table is written beside it"
    )
    quiet_argument(parser)


def _decode_arguments(parser: argparse.ArgumentParser) -> None:
    spec_arguments(parser, what="study")
    parser.add_argument(
        "--batches", type=whole_list(1, 100_000), default=[1, 8], help="sequences decoded at once (default 1,8)"
    )
    parser.add_argument(
        "--lengths", type=whole_list(1, 10_000_000), default=[256, 2048], help="tokens of the prompt (default 256,2048)"
    )
    parser.add_argument(
        "--new", type=whole(1, 100_000), default=16, help="tokens decoded after the prompt (default 16)"
    )
    parser.add_argument("--rounds", type=whole(2, 100_000), default=7, help="measured rounds, at least 2 (default 7)")
    parser.add_argument(
        "--out", type=Path, default=None, help="file to which the JSON is written; a table is written beside it"
    )
    quiet_argument(parser)


def _documents_arguments(parser: argparse.ArgumentParser) -> None:
    spec_arguments(parser)
    parser.add_argument(
        "--lengths",
        type=whole_list(2, 10_000_000),
        default=[256, 2048, 8192],
        help="tokens per sequence (default 256,2048,8192)",
    )
    parser.add_argument("--rounds", type=whole(2, 100_000), default=15, help="measured rounds, at least 2 (default 15)")
    parser.add_argument(
        "--tokens",
        type=whole(2, 100_000_000),
        default=8192,
        help="most tokens per pass, one sequence at least (default 8192)",
    )
    out_argument(parser)
    quiet_argument(parser)


def _checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    spec_arguments(parser)
    parser.add_argument("--rounds", type=whole(2, 100_000), default=10, help="measured saves, at least 2 (default 10)")
    out_argument(parser)
    quiet_argument(parser)


def _micro_batch_arguments(parser: argparse.ArgumentParser) -> None:
    spec_arguments(parser)
    out_argument(parser)
    quiet_argument(parser)


def _peers_arguments(parser: argparse.ArgumentParser) -> None:
    spec_arguments(parser)
    parser.add_argument(
        "--sizes",
        type=_words,
        default=["1.2M", "11M", "47M"],
        metavar="A,B",
        help="1.2M, 11M, 47M, or spec: the size in the file (default 1.2M,11M,47M)",
    )
    parser.add_argument(
        "--peers",
        type=_words,
        default=["transformers", "litgpt", "bare"],
        metavar="A,B",
        help="transformers, litgpt, or bare: a plain PyTorch loop (default: all)",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto (default): fp32, and bf16 too if this CPU is faster in it",
    )
    parser.add_argument("--rounds", type=whole(2, 100_000), default=21, help="measured rounds, at least 2 (default 21)")
    out_argument(parser)
    quiet_argument(parser)


def _gpu_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes",
        type=real(most=100_000),
        default=8.0,
        metavar="N",
        help="time limit; rows that do not fit are omitted (default 8)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the rows; run again to continue"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: run every row in a reduced form"
    )
    parser.add_argument("--parts", type=_words, default=None, metavar="A,B", help="run only these parts (default: all)")
    quiet_argument(parser)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with rows.jsonl")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="folder for report.md (default: DIR)")
    parser.add_argument(
        "--refit", action="store_true", help="update the planner's constants of this device from the rows"
    )


def _step(args: argparse.Namespace) -> int:
    from headway.launcher.bench.step import bench_step

    return bench_step(args.spec, args.overrides, steps=args.steps, out=args.out, against=args.against)


def _data(args: argparse.Namespace) -> int:
    from headway.launcher.bench.step import bench_data

    return bench_data(args.spec, args.overrides, steps=args.steps, out=args.out)


def _mechanism(args: argparse.Namespace) -> int:
    from headway.launcher.bench.mechanism import bench_mechanism

    options = {"lengths": args.lengths, "rounds": args.rounds, "tokens": args.tokens}
    options |= {"at_bounds": args.at_bounds, "names": args.variants}
    return bench_mechanism(args.spec, args.overrides, **options, out=args.out)


def _decode(args: argparse.Namespace) -> int:
    from headway.launcher.bench.decode import bench_decode

    options = {"batches": args.batches, "lengths": args.lengths, "new": args.new, "rounds": args.rounds}
    return bench_decode(args.spec, args.overrides, **options, out=args.out)


def _documents(args: argparse.Namespace) -> int:
    from headway.launcher.bench.documents import bench_documents

    options = {"lengths": args.lengths, "rounds": args.rounds, "tokens": args.tokens}
    return bench_documents(args.spec, args.overrides, **options, out=args.out)


def _checkpoint(args: argparse.Namespace) -> int:
    from headway.launcher.bench.checkpoint import bench_checkpoint

    return bench_checkpoint(args.spec, args.overrides, rounds=args.rounds, out=args.out)


def _micro_batch(args: argparse.Namespace) -> int:
    from headway.launcher.bench.micro_batch import bench_micro_batch

    return bench_micro_batch(args.spec, args.overrides, out=args.out)


def _peers(args: argparse.Namespace) -> int:
    from headway.launcher.bench.peers.run import bench_peers

    options = {"sizes": args.sizes, "peers": args.peers, "precision": args.precision, "rounds": args.rounds}
    return bench_peers(args.spec, args.overrides, **options, out=args.out)


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
                help="time a training step: tokens/s, share of each part, ratio to a bare PyTorch loop",
                examples=("headway bench step yaml/base/quickstart.yaml --steps 5",),
                arguments=_step_arguments,
                run=_step,
            ),
            Verb(
                name="mechanism",
                help="time every variant of a study against its baseline, over sequence lengths",
                examples=(
                    "headway bench mechanism yaml/quickstart.yaml --lengths 256,1024 --out mechanisms.json",
                    "headway bench mechanism yaml/studies/frontier.yaml --at-bounds --variants delta-namoh",
                ),
                arguments=_mechanism_arguments,
                run=_mechanism,
            ),
            Verb(
                name="decode",
                help="time prefill and decoding of every variant of a study, with the bytes of its KV cache",
                examples=("headway bench decode yaml/quickstart.yaml --lengths 256,1024 --out decode.json",),
                arguments=_decode_arguments,
                run=_decode,
            ),
            Verb(
                name="documents",
                help="time the attention core within documents against a dense mask",
                examples=("headway bench documents yaml/base/quickstart.yaml --lengths 256,2048",),
                arguments=_documents_arguments,
                run=_documents,
            ),
            Verb(
                name="data",
                help="time the data loader alone: tokens/s and time per batch",
                examples=("headway bench data yaml/base/quickstart.yaml",),
                arguments=_data_arguments,
                run=_data,
            ),
            Verb(
                name="checkpoint",
                help="time how long a save blocks training, and steps while it is written",
                examples=("headway bench checkpoint yaml/bench/checkpoint-82m.yaml --rounds 2",),
                arguments=_checkpoint_arguments,
                run=_checkpoint,
            ),
            Verb(
                name="micro-batch",
                help="find the size that train.micro_batch: auto takes on this host, and explain it",
                examples=("headway bench micro-batch yaml/base/quickstart.yaml",),
                arguments=_micro_batch_arguments,
                run=_micro_batch,
            ),
            Verb(
                name="peers",
                help="time the training step beside Hugging Face transformers, litgpt and a bare PyTorch loop",
                examples=("headway bench peers yaml/base/quickstart.yaml --sizes 1.2M --out peers.json",),
                arguments=_peers_arguments,
                run=_peers,
            ),
            Verb(
                name="gpu",
                help="measure a GPU, check its kernel results, and time every mechanism",
                examples=("headway bench gpu --minutes 8 --out gpu-results",),
                arguments=_gpu_arguments,
                run=_gpu,
            ),
            Verb(
                name="report",
                help="write tables and plots from a folder of bench gpu",
                examples=("headway bench report gpu-results",),
                arguments=_report_arguments,
                run=_report,
            ),
        ),
    ),
)
