"""`headway generate`, `headway export`, `headway import`."""

from __future__ import annotations

import argparse
from pathlib import Path

from headway.launcher.base.numbers import SEEDS, real, whole
from headway.launcher.base.verbs import Verb, output_arguments
from headway.model.convert.methods import BYS, HOWS, TARGETS


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of a run, of an export, or of a Hugging Face Llama")
    parser.add_argument("prompt", help="text to continue; token ids if the run was trained on synthetic data")
    parser.add_argument(
        "--tokens", type=whole(1, 1_000_000), default=100, help="maximum number of new tokens (default 100)"
    )
    parser.add_argument(
        "--temperature",
        type=real(least=0, most=100),
        default=0.8,
        help="sampling temperature; 0: take the most likely token (default 0.8)",
    )
    parser.add_argument(
        "--top-p",
        type=real(most=1),
        default=0.95,
        help="sample from the most likely tokens with this total probability (default 0.95)",
    )
    parser.add_argument(
        "--seed", type=whole(0, SEEDS), default=1, help="seed of the sampling; equal seeds give equal text (default 1)"
    )


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
        help="hf: for Hugging Face transformers, a Llama where it has the form (mha, mqa, gqa, sqa, folded wgqa), else "
        "a model that `import headway.hf` registers; safetensors: with Headway's own config",
    )
    parser.add_argument(
        "--step", type=whole(0), default=None, metavar="N", help="step of the checkpoint (default: the newest)"
    )
    parser.add_argument(
        "--max-shard-bytes",
        type=real(least=1, most=1e18),
        default=5e9,
        metavar="N",
        help="maximum size of a tensor file (default 5e9)",
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload the folder to this repository of the Hugging Face hub; a new one is private",
    )
    parser.add_argument("--public", action="store_true", help="with --push: everybody may see the repository")
    output_arguments(parser)


def _export(args: argparse.Namespace) -> int:
    from headway.launcher.exchange.export import export

    return export(
        args.run,
        args.out,
        to=args.to,
        step=args.step,
        max_shard_bytes=int(args.max_shard_bytes),
        push=args.push,
        public=args.public,
    )


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, help="folder with config.json and safetensors, or hf://OWNER/NAME[@REVISION]"
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="new folder to write")
    output_arguments(parser)


def _import(args: argparse.Namespace) -> int:
    from headway.launcher.exchange.import_hf import import_hf

    return import_hf(args.folder, args.to)


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="folder of a run, of exported or imported weights, or of a Llama")
    parser.add_argument("overrides", nargs="*", metavar="attention.KEY=value", help="options of the new attention")
    parser.add_argument("--to", choices=TARGETS, required=True, help="the new mechanism")
    parser.add_argument(
        "--kv-heads", type=whole(1, 65_536), default=None, metavar="G", help="its KV heads (default: as the source)"
    )
    parser.add_argument(
        "--how",
        choices=HOWS,
        default="mean",
        help="how KV heads of a group become one (default mean)",
    )
    parser.add_argument(
        "--by",
        choices=BYS,
        default="activations",
        help="what align and cluster compare: keys and values of calibration tokens, or W_K and W_V",
    )
    parser.add_argument(
        "--unequal",
        action="store_true",
        help="with cluster: groups of different sizes, the same in all layers, that are closest to their means",
    )
    parser.add_argument(
        "--by-layer",
        action="store_true",
        help="with cluster: choose the number of KV heads of each layer; --kv-heads is the largest average",
    )
    parser.add_argument(
        "--tokens",
        type=whole(1, 1_000_000_000),
        default=16_384,
        metavar="N",
        help="tokens for calibration, and for the losses before and after (default 16384)",
    )
    parser.add_argument(
        "--data", type=Path, default=None, metavar="DATASET", help="dataset of these tokens (default: that of the run)"
    )
    parser.add_argument(
        "--step", type=whole(0), default=None, metavar="N", help="checkpoint of a run (default: newest)"
    )
    parser.add_argument("--seed", type=whole(0, SEEDS), default=1, help="seed of random values (default 1)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder to write")
    output_arguments(parser)


def _convert(args: argparse.Namespace) -> int:
    from headway.launcher.exchange.convert import Asked, convert_folder

    asked = Asked(
        to=args.to,
        kv_heads=args.kv_heads,
        how=args.how,
        by=args.by,
        unequal=args.unequal,
        by_layer=args.by_layer,
        overrides=tuple(args.overrides),
        tokens=args.tokens,
        data=args.data,
        step=args.step,
        seed=args.seed,
    )
    return convert_folder(args.source, args.out, asked)


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
        help="write a run's weights for Hugging Face (compares ids and logits) or as safetensors",
        examples=(
            "headway export runs/quickstart exported --to safetensors",
            "headway export runs/quickstart exported --to hf --push OWNER/NAME",
        ),
        arguments=_export_arguments,
        run=_export,
        order=80,
    ),
    Verb(
        name="convert",
        help="convert a trained model to another attention mechanism, to train it further",
        examples=(
            "headway convert runs/mha --to gqa --kv-heads 2 --how align --out converted",
            "headway convert llama-folder --to mqa --data datasets/stdlib --out converted",
            "headway convert runs/mha --to rgqa --kv-heads 2 attention.gate=sigmoid2 --out converted",
        ),
        arguments=_convert_arguments,
        run=_convert,
        order=82,
    ),
    Verb(
        name="import",
        help="convert a model of Hugging Face's format, or of its hub, for generation and training",
        examples=("headway import llama-folder --to imported", "headway import hf://OWNER/NAME --to imported"),
        arguments=_import_arguments,
        run=_import,
        order=81,
    ),
)
