"""`headway study` and `headway probe`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from headway.launcher.base.errors import SpecError
from headway.launcher.base.numbers import real, whole
from headway.launcher.base.verbs import Verb, output_arguments, spec_arguments


def _study_arguments(parser: argparse.ArgumentParser) -> None:
    spec_arguments(parser, what="study")
    output_arguments(parser)


def _jobs_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs",
        type=whole(1, 4096),
        default=None,
        metavar="N",
        help="cells that train at once (default: as many as cores or GPUs allow)",
    )

    parser.add_argument(
        "--slurm", action="store_true", help="submit the cells as array jobs of Slurm, and a last job that goes on"
    )
    parser.add_argument(
        "--array-limit",
        type=whole(1, 100_000),
        default=None,
        metavar="N",
        help="with --slurm: cells of an array that train at once (default: no limit)",
    )
    parser.add_argument("--follow-up", action="store_true", help=argparse.SUPPRESS)  # the last job runs with it


def _study_run_arguments(parser: argparse.ArgumentParser) -> None:
    _study_arguments(parser)
    _jobs_argument(parser)
    parser.add_argument(
        "--no-timing",
        action="store_true",
        help="do not time the variants alone after cells that trained beside others; the report then has no speeds",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the matched sizes and commands, and exit")
    parser.add_argument("--fresh", action="store_true", help="first move an existing folder of the study aside")


def _probe_arguments(parser: argparse.ArgumentParser) -> None:
    spec_arguments(parser, what="probe tasks", kind="probe")
    output_arguments(parser)


def _probe_run_arguments(parser: argparse.ArgumentParser) -> None:
    _probe_arguments(parser)
    _jobs_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the matched sizes and commands, and exit")
    parser.add_argument("--fresh", action="store_true", help="first move an existing folder of the tasks aside")


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _study_arguments(parser)
    parser.add_argument(
        "--power", type=real(most=0.999), default=0.8, metavar="P", help="chance to decide (default 0.8)"
    )
    parser.add_argument(
        "--margin",
        type=real(least=1e-6, most=100),
        default=None,
        metavar="NATS",
        help="difference in loss that matters (default: margin_nats of the study, else 0.01)",
    )


def _plan_study(args: argparse.Namespace) -> int:
    from headway.launcher.study.seeds import plan_seeds

    return plan_seeds(args.spec, args.overrides, power=args.power, margin=args.margin, as_json=args.json)


def _run_options(args: argparse.Namespace) -> dict[str, Any]:
    from headway.launcher.study.cluster.submit import Arrays

    if args.slurm and args.jobs is not None:
        raise SpecError(
            "--jobs: with --slurm, every cell has a job of its own, and nothing trains on this machine; use "
            "--array-limit for the number of cells that train at once, or leave --jobs out"
        )
    if not args.slurm and (args.array_limit is not None or args.follow_up):
        raise SpecError("--array-limit: only --slurm submits arrays; add --slurm, or use --jobs on this machine")
    arrays = Arrays(limit=args.array_limit, follows=args.follow_up) if args.slurm else None
    return {"dry_run": args.dry_run, "fresh": args.fresh, "jobs": args.jobs, "arrays": arrays}


def _run_study(args: argparse.Namespace) -> int:
    from headway.launcher.study.ladder.run import run_file

    return run_file(args.spec, args.overrides, timing=not args.no_timing, **_run_options(args))


def _status_study(args: argparse.Namespace) -> int:
    from headway.launcher.study.ladder.run import status_file

    return status_file(args.spec, args.overrides)


def _watch_arguments(parser: argparse.ArgumentParser) -> None:
    spec_arguments(parser, what="study")
    parser.add_argument(
        "--port", type=whole(0, 65535), default=6007, help="port on this machine (default 6007; 0: any free one)"
    )


def _watch_study(args: argparse.Namespace) -> int:
    from headway.launcher.study.watch.command import watch

    return watch(args.spec, args.overrides, port=args.port)


def _report_study(args: argparse.Namespace) -> int:
    from headway.launcher.study.ladder.run import report_file

    return report_file(args.spec, args.overrides)


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources", type=Path, nargs="+", metavar="FOLDER", help="folder of the study or of its records, or its file"
    )
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="new folder for the joint study")
    output_arguments(parser)


def _merge_study(args: argparse.Namespace) -> int:
    from headway.launcher.study.ladder.merge import merge_folders

    return merge_folders(args.sources, args.to)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    _study_arguments(parser)
    parser.set_defaults(folder_kinds=("study", "ladder"))


def _run_probe(args: argparse.Namespace) -> int:
    from headway.launcher.study.probe import run_probe

    return run_probe(args.spec, args.overrides, **_run_options(args))


def _status_probe(args: argparse.Namespace) -> int:
    from headway.launcher.study.probe import status_probe

    return status_probe(args.spec, args.overrides)


def _report_probe(args: argparse.Namespace) -> int:
    from headway.launcher.study.probe import report_probe

    return report_probe(args.spec, args.overrides)


def _timing_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path)


def _time_study(args: argparse.Namespace) -> int:
    from headway.launcher.study.timing import time_study

    return time_study(args.out)


def _cell_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", type=Path)
    parser.add_argument("element", type=whole(0, 10_000_000))
    parser.add_argument("part", type=whole(0, 100_000))
    parser.add_argument("found", nargs="*")
    parser.add_argument("--node-rank", type=whole(0, 4095), default=0)


def _train_part(args: argparse.Namespace) -> int:
    from headway.launcher.study.cluster.cell import train_part

    return train_part(args.index, args.element, args.part, args.found, host=args.node_rank)


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--baseline", type=Path, default=None, metavar="RUN", help="run of the variant to compare with (default: first)"
    )
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FOLDER", help="folder of the report (default: in comparisons/)"
    )
    output_arguments(parser)


def _compare(args: argparse.Namespace) -> int:
    from headway.launcher.study.compare_runs import compare_runs

    return compare_runs(args.runs, baseline=args.baseline, out=args.out)


VERBS = (
    Verb(
        name="study",
        help="train variants over several seeds and compare them",
        order=40,
        actions=(
            Verb(
                name="run",
                help="train what is missing, then write the report",
                examples=(
                    "headway study run yaml/quickstart.yaml",
                    "headway study run yaml/quickstart.yaml launch.threads=1 --jobs 2",
                    "headway study run yaml/quickstart.yaml --slurm launch.slurm.partition=gpu --array-limit 8",
                ),
                arguments=_study_run_arguments,
                run=_run_study,
            ),
            Verb(
                name="status",
                help="show the state of every run of the study",
                examples=("headway study status yaml/quickstart.yaml",),
                arguments=_study_arguments,
                run=_status_study,
            ),
            Verb(
                name="watch",
                help="serve a page of the running study on this machine, which renews itself",
                examples=("headway study watch yaml/quickstart.yaml",),
                arguments=_watch_arguments,
                run=_watch_study,
            ),
            Verb(
                name="plan",
                help="seeds needed to decide, from the spread of the cells that are done",
                examples=("headway study plan yaml/quickstart.yaml --power 0.8 --margin 0.01",),
                arguments=_plan_arguments,
                run=_plan_study,
            ),
            Verb(
                name="report",
                help="write the report from the finished runs",
                examples=("headway study report yaml/quickstart.yaml", "headway study report joint"),
                arguments=_report_arguments,
                run=_report_study,
            ),
            Verb(
                name="merge",
                help="join finished cells of one study from several folders",
                examples=("headway study merge studies/quickstart /mnt/b/studies/quickstart --to joint",),
                arguments=_merge_arguments,
                run=_merge_study,
            ),
        ),
    ),
    Verb(
        name="compare",
        help="compare runs, however they were started, with the report of a study",
        order=42,
        examples=(
            "headway compare runs/gqa runs/rgqa",
            "headway compare runs/a-1 runs/a-2 runs/b-1 runs/b-2 --baseline runs/a-1 --out a-or-b",
        ),
        arguments=_compare_arguments,
        run=_compare,
    ),
    Verb(
        name="probe",
        help="train variants on synthetic tasks and compare accuracy",
        order=45,
        actions=(
            Verb(
                name="run",
                help="train what is missing of every task, then write the table",
                examples=("headway probe run yaml/probes.yaml --dry-run",),
                arguments=_probe_run_arguments,
                run=_run_probe,
            ),
            Verb(
                name="status",
                help="show the state of every run of every task",
                examples=("headway probe status yaml/probes.yaml",),
                arguments=_probe_arguments,
                run=_status_probe,
            ),
            Verb(
                name="report",
                help="write the table from the finished runs",
                examples=("headway probe report yaml/probes.yaml",),
                arguments=_probe_arguments,
                run=_report_probe,
            ),
        ),
    ),
    Verb(name="time-study", help="time variants", arguments=_timing_arguments, run=_time_study, hidden=True),
    Verb(name="array-cell", help="train a cell", arguments=_cell_arguments, run=_train_part, hidden=True),
)
