"""`headway generate`, `headway export`, `headway import`."""

from __future__ import annotations

import argparse
from pathlib import Path

from headway.launcher.base.verbs import Verb, output_arguments


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("prompt", help="text to continue; token ids where the run learned synthetic data")
    parser.add_argument("--tokens", type=int, default=100, help="new tokens at most (default 100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token (default 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="choose among tokens of this probability together")
    parser.add_argument("--seed", type=int, default=1, help="equal seeds give equal text (default 1)")


def _generate(args: argparse.Namespace) -> int:
    from headway.launcher.exchange.generate import Sampling, generate

    sampling = Sampling(tokens=args.tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    return generate(args.run, args.prompt, sampling)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("out", type=Path, help="new folder to write")
    parser.add_argument(
        "--to",
        choices=("hf", "safetensors"),
        required=True,
        help="hf: a Llama of Hugging Face (mha, mqa, gqa, sqa, folded wgqa); safetensors: any mechanism",
    )
    parser.add_argument("--step", type=int, default=None, metavar="N", help="of this checkpoint (default: the newest)")
    parser.add_argument(
        "--max-shard-bytes", type=float, default=5e9, metavar="N", help="of one file of tensors (default 5e9)"
    )
    output_arguments(parser)


def _export(args: argparse.Namespace) -> int:
    from headway.launcher.exchange.export import export

    limit = int(max(0.0, min(args.max_shard_bytes, 1e18)))
    return export(args.run, args.out, to=args.to, step=args.step, max_shard_bytes=limit)


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder with config.json and safetensors")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="new folder to write")
    output_arguments(parser)


def _import(args: argparse.Namespace) -> int:
    from headway.launcher.exchange.import_hf import import_hf

    return import_hf(args.folder, args.to)


VERBS = (
    Verb(
        name="generate",
        help="continue a prompt with a run's newest checkpoint",
        examples=('headway generate runs/quickstart "def "',),
        arguments=_generate_arguments,
        run=_generate,
        order=60,
    ),
    Verb(
        name="export",
        help="write a run's weights for Hugging Face, logits compared, or as safetensors",
        examples=("headway export runs/quickstart exported --to safetensors",),
        arguments=_export_arguments,
        run=_export,
        order=80,
    ),
    Verb(
        name="import",
        help="a Llama of Hugging Face as weights to generate with and train from",
        examples=("headway import llama-folder --to imported",),
        arguments=_import_arguments,
        run=_import,
        order=81,
    ),
)
