"""The `headway` command. Nothing heavy is imported until a verb needs it."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_DESCRIPTION = """Headway pretrains language models to find out which attention mechanism is worth its cost.

  headway doctor                        what this machine has and what will be used
  headway data build yaml/data/x.yaml   text to tokenizer and shards
  headway plan  spec.yaml               parameters, memory, communication and speed, without training
  headway train spec.yaml               train one spec; start the same command again to continue
  headway study run study.yaml          train variants and seeds, then write the report
  headway probe run probes.yaml         what each variant can do on synthetic tasks
  headway generate RUN "prompt"         continue a prompt with a run's newest checkpoint
  headway checkpoint list|verify|show RUN   what a run has saved, and whether it is whole
  headway board RUN...                  TensorBoard over runs and studies, on this machine alone
  headway export RUN OUT --to hf        a run's weights as a Llama of Hugging Face, logits compared
  headway import FOLDER --to DIR        a Llama of Hugging Face to generate with and train from
  headway chaos                         ten kinds of faults, done to stock DeepSpeed and to Headway, here and now

Any spec value can be set behind the file: headway train spec.yaml optimizer.lr=1e-3 attention.top_k=2"""


class _Parser(argparse.ArgumentParser):
    """Says which word was probably meant, and does not call the optional key=value arguments required."""

    def error(self, message: str) -> NoReturn:
        message = message.removesuffix(", key=value")
        wrong = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if wrong and (close := difflib.get_close_matches(wrong[1], re.findall(r"\w+", wrong[2]), n=1)):
            message += f". Did you mean {close[0]}?"
        super().error(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="headway", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "doctor|data|plan|train|study|probe|bench|generate|checkpoint|board|export|import|chaos|schema"
    verbs = parser.add_subparsers(dest="verb", metavar=names, required=True)

    def verb(name: str, help_text: str, *, spec: bool = True) -> argparse.ArgumentParser:
        p = verbs.add_parser(name, help=help_text, description=help_text)
        if spec:
            _spec_arguments(p)
        return p

    doctor = verb("doctor", "what this machine has and what will be used", spec=False)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    data = verb("data", "build a dataset", spec=False)
    actions = data.add_subparsers(dest="action", metavar="build|verify", required=True)
    for name, text in (("build", "text to tokenizer, shards and manifest"), ("verify", "check every file's hash")):
        _spec_arguments(actions.add_parser(name, help=text, description=text))
    plan = verb("plan", "parameters, memory, communication and expected speed of a spec, without training")
    plan.add_argument("--gpus", type=int, default=None, metavar="N", help="search for the best layouts over N GPUs")
    plan.add_argument("--gpu", default="h100", metavar="NAME", help="the GPU that is planned for (default h100)")
    plan.add_argument("--network", default="ndr", metavar="NAME", help="what joins the hosts (default ndr)")
    plan.add_argument("--json", action="store_true", help="print JSON")
    train = verb("train", "train one spec; the same command again continues it")
    train.add_argument("--dry-run", action="store_true", help="print what would be executed on each host, and stop")
    train.add_argument("--node-rank", type=int, default=None, metavar="N", help="which of launch.hosts this is, from 0")
    train.add_argument(
        "--print-config", action="store_true", help="print every value and where it comes from, and stop"
    )
    study = verb("study", "train and compare variants", spec=False)
    steps = study.add_subparsers(dest="action", metavar="run|status|report", required=True)
    for name, text in (
        ("run", "train what is missing, then report"),
        ("status", "what is done"),
        ("report", "write the report"),
    ):
        p = steps.add_parser(name, help=text, description=text)
        _spec_arguments(p, what="study")
        if name == "run":
            p.add_argument("--dry-run", action="store_true", help="print the matched sizes and commands, and stop")
            p.add_argument("--fresh", action="store_true", help="move an older folder of the study aside first")
    probe = verb("probe", "what each variant can do on synthetic tasks", spec=False)
    steps = probe.add_subparsers(dest="action", metavar="run|report", required=True)
    for name, text in (
        ("run", "train what is missing of every task, then write the table"),
        ("report", "write the table"),
    ):
        p = steps.add_parser(name, help=text, description=text)
        _spec_arguments(p, what="probe tasks")
        if name == "run":
            p.add_argument("--dry-run", action="store_true", help="print the matched sizes and commands, and stop")
            p.add_argument("--fresh", action="store_true", help="move an older folder of the tasks aside first")
    bench = verb("bench", "measure speed", spec=False)
    names = "step|mechanism|data|checkpoint|micro-batch|gpu|report"
    kinds = bench.add_subparsers(dest="action", metavar=names, required=True)
    for name, text in (
        ("step", "a training step: tokens/s, share of each part, cost over a bare PyTorch loop"),
        ("data", "the loader alone: tokens/s and time per batch"),
    ):
        p = kinds.add_parser(name, help=text, description=text)
        _spec_arguments(p)
        p.add_argument("--steps", type=int, default=30, help="measured steps, at least 2")
        p.add_argument("--out", type=Path, default=None, help="where the JSON is written")
        if name == "step":
            p.add_argument(
                "--against", action="append", default=[], metavar="key=value", help="a second spec in the same run"
            )
    p = kinds.add_parser("mechanism", help=(text := "every variant of a study against its baseline, over lengths"))
    p.description = text
    _spec_arguments(p, what="study")
    p.add_argument("--lengths", type=_lengths, default=[256, 1024, 2048], help="tokens per sequence: 256,1024,2048")
    p.add_argument("--rounds", type=int, default=15, help="measured rounds, at least 2")
    p.add_argument("--tokens", type=int, default=2048, help="tokens per pass: shorter sequences come in batches")
    p.add_argument("--out", type=Path, default=None, help="where the JSON is written, and a table beside it")
    p = kinds.add_parser("checkpoint", help=(text := "what training waits for a save, and steps beside its writing"))
    p.description = text
    _spec_arguments(p)
    p.add_argument("--rounds", type=int, default=10, help="measured saves, at least 2")
    p.add_argument("--out", type=Path, default=None, help="where the JSON is written")
    p = kinds.add_parser("micro-batch", help=(text := "what train.micro_batch: auto finds on this host, and why"))
    p.description = text
    _spec_arguments(p)
    p.add_argument("--out", type=Path, default=None, help="where the JSON is written")
    p = kinds.add_parser("gpu", help=(text := "what a GPU can do, and what kernels and mechanisms make of it"))
    p.description = text
    p.add_argument("--minutes", type=float, default=8.0, metavar="N", help="what does not fit is left (default 8)")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="rows go here; the same again goes on")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: every row, reduced, to try it out")
    p.add_argument("--parts", type=_words, default=None, metavar="A,B", help="only these parts (default: all)")
    p = kinds.add_parser("report", help=(text := "tables and plots of a folder that bench gpu wrote"))
    p.description = text
    p.add_argument("folder", type=Path, metavar="DIR", help="folder with rows.jsonl")
    p.add_argument("--out", type=Path, default=None, metavar="DIR", help="where report.md goes (default: DIR)")
    p.add_argument("--refit", action="store_true", help="make the planner's constants of this device anew from it")
    generate = verb("generate", "continue a prompt with a run's newest checkpoint", spec=False)
    generate.add_argument("run", type=Path, help="folder of the run")
    generate.add_argument("prompt", help="text to continue; token ids where the run learned synthetic data")
    generate.add_argument("--tokens", type=int, default=100, help="new tokens at most (default 100)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token (default 0.8)")
    generate.add_argument("--top-p", type=float, default=0.95, help="choose among tokens of this probability together")
    generate.add_argument("--seed", type=int, default=1, help="equal seeds give equal text (default 1)")
    export = verb("export", "write a run's weights as a folder that others read", spec=False)
    export.add_argument("run", type=Path, help="folder of the run")
    export.add_argument("out", type=Path, help="new folder to write")
    export.add_argument(
        "--to",
        choices=("hf", "safetensors"),
        required=True,
        help="hf: a Llama of Hugging Face (mha, mqa, gqa, sqa, folded wgqa); safetensors: any mechanism",
    )
    export.add_argument("--step", type=int, default=None, metavar="N", help="of this checkpoint (default: the newest)")
    export.add_argument(
        "--max-shard-bytes", type=float, default=5e9, metavar="N", help="of one file of tensors (default 5e9)"
    )
    bring = verb("import", "a Llama of Hugging Face as weights to generate with and train from", spec=False)
    bring.add_argument("folder", type=Path, help="folder with config.json and safetensors")
    bring.add_argument("--to", type=Path, required=True, metavar="DIR", help="new folder to write")
    saved = verb("checkpoint", "what a run has saved, and whether it is whole", spec=False)
    actions = saved.add_subparsers(dest="action", metavar="list|verify|show", required=True)
    for name, text in (
        ("list", "step, tokens, loss, size and age of every checkpoint"),
        ("verify", "hash every file and name the one that changed (exit 74)"),
        ("show", "where the newest comes from, its files, its tensors"),
    ):
        p = actions.add_parser(name, help=text, description=text)
        p.add_argument("run", type=Path, help="folder of the run")
        p.add_argument("--step", type=int, default=None, help="the checkpoint of this step only")
        p.add_argument("--json", action="store_true", help="print JSON")
    board = verb("board", "TensorBoard over runs and studies, on this machine alone", spec=False)
    board.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or of a study")
    board.add_argument("--rebuild", action="store_true", help="make the event files anew from metrics.jsonl first")
    board.add_argument("--no-server", action="store_true", help="stop after --rebuild")
    board.add_argument("--port", type=int, default=None, metavar="N", help="default 6006 or the next; 0: any")
    board.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="beyond this machine it needs --expose")
    board.add_argument("--expose", action="store_true", help="others may read it: it asks nobody for a password")
    chaos = verb("chaos", "ten kinds of faults, done to stock DeepSpeed and to Headway, here and now", spec=False)
    chaos.add_argument("--faults", default=None, metavar="F1,F8", help="only these (default: F1 to F10)")
    chaos.add_argument("--seconds", type=float, default=170, metavar="N", help="no trial begins later (default 170)")
    chaos.add_argument("--seed", type=int, default=None, metavar="N", help="default: another one every time, printed")
    chaos.add_argument("--json", type=Path, default=None, metavar="OUT", help="every trial, and the table beside it")
    server = verbs.add_parser("fork-server")  # hidden: what `headway.launcher.hosts.forked` starts
    server.add_argument("socket", type=Path)
    server.add_argument("owner", type=int)
    server.add_argument("padding")
    schema = verb("schema", "write the JSON schema of specs, for completion in editors", spec=False)
    schema.add_argument(
        "out",
        type=Path,
        nargs="?",
        default=None,
        help="file, or a folder for the schemas of all kinds; default: standard output",
    )
    return parser


def _words(text: str) -> list[str]:
    """a,b -> [a, b]."""
    return [word.strip() for word in text.split(",")]


def _lengths(text: str) -> list[int]:
    """256,1024 -> [256, 1024]; argparse reports what is no number."""
    return [int(word) for word in text.split(",")]


def _spec_arguments(parser: argparse.ArgumentParser, what: str = "spec") -> None:
    parser.add_argument("spec", type=Path, help=f"YAML file of the {what}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, override the file")


def _run(args: argparse.Namespace) -> int:
    match args.verb, getattr(args, "action", None):
        case "doctor", _:
            from headway.launcher.cli.doctor import doctor

            return doctor(as_json=args.json)
        case "data", action:
            from headway.launcher.cli.corpus import build_corpus, verify_corpus

            return (build_corpus if action == "build" else verify_corpus)(args.spec, args.overrides)
        case "plan", _:
            from headway.launcher.plan.planner import plan

            options = {"gpus": args.gpus, "gpu": args.gpu, "network": args.network}
            return plan(args.spec, args.overrides, **options, as_json=args.json)
        case "train", _ if args.print_config:
            from headway.launcher.spec.load import format_config, load_spec

            print(format_config(load_spec(args.spec, args.overrides, no_auto=None)))
            return 0
        case "train", _:
            from headway.launcher.launch.start import train

            return train(args.spec, args.overrides, node_rank=args.node_rank, dry_run=args.dry_run)
        case "study", "run":
            from headway.launcher.study.run import run_study

            return run_study(args.spec, args.overrides, dry_run=args.dry_run, fresh=args.fresh)
        case "study", action:
            from headway.launcher.study import run as study

            return getattr(study, f"{action}_study")(args.spec, args.overrides)
        case "probe", "run":
            from headway.launcher.study.probe import run_probe

            return run_probe(args.spec, args.overrides, dry_run=args.dry_run, fresh=args.fresh)
        case "probe", _:
            from headway.launcher.study.probe import report_probe

            return report_probe(args.spec, args.overrides)
        case "bench", "step":
            from headway.launcher.bench.step import bench_step

            return bench_step(args.spec, args.overrides, steps=args.steps, out=args.out, against=args.against)
        case "bench", "mechanism":
            from headway.launcher.bench.mechanism import bench_mechanism

            return bench_mechanism(
                args.spec, args.overrides, lengths=args.lengths, rounds=args.rounds, tokens=args.tokens, out=args.out
            )
        case "bench", "checkpoint":
            from headway.launcher.bench.checkpoint import bench_checkpoint

            return bench_checkpoint(args.spec, args.overrides, rounds=args.rounds, out=args.out)
        case "bench", "micro-batch":
            from headway.launcher.bench.micro_batch import bench_micro_batch

            return bench_micro_batch(args.spec, args.overrides, out=args.out)
        case "bench", "gpu":
            from headway.launcher.bench.gpu.run import PARTS, bench_gpu

            return bench_gpu(minutes=args.minutes, out=args.out, device=args.device, parts=args.parts or PARTS)
        case "bench", "report":
            from headway.launcher.bench.gpu.report import report_gpu

            return report_gpu(args.folder, out=args.out, refit=args.refit)
        case "bench", _:
            from headway.launcher.bench.step import bench_data

            return bench_data(args.spec, args.overrides, steps=args.steps, out=args.out)
        case "generate", _:
            from headway.launcher.exchange.generate import Sampling, generate

            sampling = Sampling(tokens=args.tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed)
            return generate(args.run, args.prompt, sampling)
        case "checkpoint", action:
            from headway.launcher.run import checkpoints

            verb = {"list": checkpoints.list_checkpoints, "verify": checkpoints.verify_checkpoints}
            act = verb.get(action or "", checkpoints.show_checkpoint)
            return act(args.run, step=args.step, as_json=args.json)
        case "board", _:
            from headway.launcher.board.server import board

            options = {"host": args.host, "port": args.port, "expose": args.expose}
            return board(args.runs, **options, rebuild_files=args.rebuild, serve=not args.no_server)
        case "export", _:
            from headway.launcher.exchange.export import export

            limit = int(max(0.0, min(args.max_shard_bytes, 1e18)))
            return export(args.run, args.out, to=args.to, step=args.step, max_shard_bytes=limit)
        case "import", _:
            from headway.launcher.exchange.import_hf import import_hf

            return import_hf(args.folder, args.to)
        case "chaos", _:
            from headway.launcher.chaos.drill import chaos

            faults = None if args.faults is None else args.faults.split(",")
            return chaos(faults=faults, seconds=args.seconds, seed=args.seed, out=args.json)
        case "fork-server", _:
            from headway.launcher.cli.fork_server import serve

            return serve(args.socket, args.owner, main)
        case "schema", _:
            from headway.launcher.cli.schema import write_schema

            return write_schema(args.out)
    raise AssertionError(args.verb)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Mistakes of the user end with one message and their exit status, never a traceback."""
    os.umask(os.umask(0o077) | 0o022)  # what is written here is read back later: nobody else may change it
    parser = _parser()
    try:
        # argparse does not collect key=value arguments that stand behind an option; they are overrides all the same.
        args, rest = parser.parse_known_args(argv)
        if any(word.startswith("-") or "=" not in word for word in rest) or (rest and "overrides" not in args):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    except SystemExit as e:  # argparse says what is wrong; 2 is its own status, ours is 64
        return 64 if e.code else 0
    if rest:
        args.overrides = [*args.overrides, *rest]
    try:
        return _run(args)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of a pipe has gone, as in `headway plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        from headway.launcher.base.errors import exit_code, format_error

        code = exit_code(e)
        if code is None and isinstance(e, OSError) and (e.filename is not None or e.errno in _DISK):
            code, e = 74, _input_output(e)
        if code is None:
            raise
        print(format_error(e), file=sys.stderr)
        return code


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def _input_output(error: OSError) -> OSError:
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
    return OSError(
        f"{where}{error.strerror or error}; name another place, or mend this one (permissions, free space, a file "
        "where a folder should be), and run the same command again"
    )


if __name__ == "__main__":
    sys.exit(main())
