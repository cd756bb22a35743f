"""`headway study run | status | report` of any study file: a plain study, or one with `sizes` or `tune`.

A file with `sizes` or `tune` consists of several plain studies (`headway.launcher.study.ladder.plan`). Trials are
trained first, because the cells of the study need the values that they give.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.errors import PREEMPTED, SpecError
from headway.launcher.base.text import short_number
from headway.launcher.match.bounds import bound_rows
from headway.launcher.match.measured import Measurements
from headway.launcher.run.run_dir import RunDir, read_mapping, write_json
from headway.launcher.study.cluster.submit import Arrays, Cluster, QueuedError, say_queued, with_method
from headway.launcher.study.cluster.submitted import cells_in_queue
from headway.launcher.study.config import Study, load_study
from headway.launcher.study.keeping import keep_file, restore_design, restore_file
from headway.launcher.study.ladder.plan import (
    Ladder,
    Size,
    plan_ladder,
    records_below,
    size_names,
    unplanned,
    unplanned_trials,
)
from headway.launcher.study.ladder.trials import (
    TUNING,
    Values,
    check_carried,
    stored_values,
    trial_plans,
    tune,
    without_diverged,
)
from headway.launcher.study.plan import StudyPlan, plan_study
from headway.launcher.study.run import (
    OWN,
    RECORD,
    check_host,
    check_method,
    design_record,
    move_aside,
    now,
    print_design,
    refuse_changed,
    refuse_foreign,
    refuse_queued,
    report_study,
    run_study,
    status_study,
    train_plans,
)
from headway.launcher.study.status import HEADINGS, report_record, status_record, status_rows, table

LADDER = "ladder.json"
"""The file in the folder of a study with sizes that lists them."""


def run_file(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    dry_run: bool = False,
    fresh: bool = False,
    jobs: int | None = None,
    timing: bool = True,
    arrays: Arrays | None = None,
) -> int:
    """Train what is missing of a study file, then write its reports. Arguments and exit status as for `run_study`.

    `arrays`: submit the cells as array jobs (`--slurm`).
    """
    study = load_study(Path(path))
    cluster = Cluster.of(study, "study", path, overrides, arrays)
    overrides = overrides if cluster is None else with_method(overrides)
    if not study.config.is_ladder:
        return run_study(path, overrides, dry_run=dry_run, fresh=fresh, jobs=jobs, timing=timing, cluster=cluster)
    ladder = plan_ladder(study, overrides)
    held = {} if fresh else stored_values(ladder)
    first = [_plan(ladder, ladder.main(size, held.get(size.name, {}))) for size in ladder.sizes]
    check_method(first, cluster, dry_run=dry_run)
    for key, search in ladder.config.tune.items():  # a trial that is not possible must not wait for others
        for size in ladder.tuned_sizes(key):
            _plan(ladder, ladder.trial(size, key, search.grid[0], {}))
    _print_ladder(ladder, first, held, commands=dry_run)
    if dry_run:
        if console.wants_json():
            console.emit(_design(ladder, first))
        return 0
    refuse_queued(study.out, cluster, fresh=fresh)
    check_host(first, jobs, cluster, fresh=fresh)
    if fresh:
        move_aside(study)
    else:
        _refuse(ladder, first, held)
    command = cluster.command if cluster else shlex.join(["headway", "study", "run", str(study.path), *overrides])
    try:
        with RunDir(study.out).locked("ladder.lock"):
            if study.config.sizes:
                write_json(study.out / LADDER, {**_record(ladder), "command": command, "written_at": now()})
                keep_file(study.out, study.records, LADDER)
            code = _train(ladder, command, jobs, timing=timing, cluster=cluster)
    except QueuedError as queued:
        return say_queued(queued)
    if code == PREEMPTED:
        console.alert(f"stopped; the same command continues: {command}", "yellow")
        if console.wants_json():
            console.emit(_status(study))
        return code
    if not console.quiet():
        console.say(_status_text(study))
    _conclude(study)
    return code


def status_file(path: Path | str, overrides: Sequence[str] = ()) -> int:
    """Print one line per cell of every size and trial. Arguments and exit status as for `status_study`."""
    study = load_study(Path(path))
    if not study.config.is_ladder:
        return status_study(path, overrides)
    if console.wants_json():
        console.emit(_status(study))
    else:
        console.result(_status_text(study))
    return 0


def report_file(path: Path | str, overrides: Sequence[str] = ()) -> int:
    """Write the reports from the current records. Returns 0. Raises SpecError if no cell was started.

    `path`: a study file, or the folder of a study or of a ladder.
    """
    if (Path(path) / LADDER).is_file():
        from headway.launcher.report.ladder import ladder_report

        console.result(f"report: {ladder_report(Path(path))}")
        return 0
    if Path(path).is_dir():
        return report_study(path, overrides)
    study = load_study(Path(path))
    if not study.config.is_ladder:
        return report_study(path, overrides)
    if not any(restore_design(unplanned(study, name, out)) for name, out in size_names(study).items()):
        begun = "only trials were trained here yet; the" if any(study.out.glob("**/tune")) else "no cell was trained:"
        raise SpecError(
            f"{study.out}: {begun} report needs cells of the study; continue with `headway study run {study.path}`, "
            "or give the `out` folder it was run with"
        )
    _conclude(study)
    return 0


# ---------------------------------------------------------------- training


def _train(ladder: Ladder, command: str, jobs: int | None, *, timing: bool, cluster: Cluster | None) -> int:
    """Train the trials, then the cells of all sizes. Returns an exit status as `run_study`."""

    def train(plans: Sequence[StudyPlan], *, timing: bool = False) -> int:
        measured = [Measurements.of(plan.study.out) for plan in plans]
        return train_plans(plans, measured, command=command, jobs=jobs, timing=timing, in_order=True, cluster=cluster)

    def train_trials(studies: Sequence[Study]) -> int:
        return train([without_diverged(_plan(ladder, study)) for study in studies])

    code, values = tune(ladder, train_trials)
    if code:
        return code
    plans = [_plan(ladder, ladder.main(size, values[size.name])) for size in ladder.sizes]
    for plan in plans:
        refuse_changed(plan)
    code = train(plans, timing=timing)
    return code if code == PREEMPTED else code | check_carried(ladder, values, train_trials)


def _plan(ladder: Ladder, study: Study) -> StudyPlan:
    return plan_study(study, ladder.arguments, facts=ladder.facts)


def _refuse(ladder: Ladder, plans: Sequence[StudyPlan], held: Values) -> None:
    """Raise SpecError if a folder has other content, or cells of another definition, before anything is trained."""
    out = ladder.study.out
    if ladder.config.sizes:
        refuse_foreign(out, LADDER, own=("sizes", "ladder.lock", "slurm"), what="a study with sizes")
    else:
        refuse_foreign(out, RECORD, own=OWN, what="a study")
    for plan, size in zip(plans, ladder.sizes, strict=True):
        if held.get(size.name) or not ladder.config.tune:
            refuse_changed(plan)


# ---------------------------------------------------------------- design, status, report


def _record(ladder: Ladder) -> dict[str, Any]:
    """Content of ladder.json."""
    config = ladder.config
    return {
        "format": 1,
        "study": config.study,
        "path": str(ladder.study.path),
        "arguments": list(ladder.arguments),
        "baseline": config.baseline_name,
        "variants": list(config.variants),
        "tokens_per_param": config.tokens_per_param,
        "scale": dict(config.scale),
        "extrapolate": config.extrapolate,
        **({} if ladder.bounds is None else {"bounds": ladder.bounds}),
        "match": None if config.match is None else config.match.model_dump(),
        "sizes": [
            {
                "name": size.name,
                "folder": f"sizes/{size.name}",
                "params": size.params,
                "tokens": size.tokens,
                "keys": size.keys,
            }
            for size in ladder.sizes
        ],
        "tune": {key: search.model_dump(mode="json") for key, search in config.tune.items()},
    }


def _design(ladder: Ladder, plans: Sequence[StudyPlan]) -> dict[str, Any]:
    trials = [
        {"size": size, "key": key, "grid": grid, "trials": count} for size, key, grid, count in trial_plans(ladder)
    ]
    return {
        **_record(ladder),
        "out": str(ladder.study.out),
        "trials": trials,
        "studies": {size.name: design_record(plan) for size, plan in zip(ladder.sizes, plans, strict=True)},
    }


def _print_ladder(ladder: Ladder, plans: Sequence[StudyPlan], held: Values, *, commands: bool) -> None:
    say, match = console.result if commands else console.say, ladder.config.match
    trials = trial_plans(ladder)
    for size, key, grid, count in trials:
        shown = ", ".join(f"{value:g}" for value in grid)
        say(f"tune {key} at {size}: {count} trials ({shown}), and more where the best value lies on an edge")
    tuned = {s.name: set(ladder.config.tune) <= _tuned_keys(held, s) for s in ladder.sizes}
    if trials and not all(tuned.values()):
        say(f"the trials come first; until then the cells below have the base's {', '.join(ladder.config.tune)}")
    for size, plan in zip(ladder.sizes, plans, strict=True):
        name = f"size {size.name}: " if size.name else ""
        say(f"{name}{size.params:,} parameters, {size.tokens:,} tokens ({size.tokens / size.params:.3g} a parameter)")
        print_design(plan, commands=commands and tuned[size.name])
    if note := _beyond_reach(ladder):
        say(note)
    if ladder.bounds is not None:
        say(table(bound_rows(ladder.bounds, match and match.model_dump())))


def _beyond_reach(ladder: Ladder) -> str:
    """Why the report will not predict the size that `extrapolate` names; empty if it will."""
    from headway.launcher.compare.ladder.curve import reach

    named = ladder.config.extrapolate
    if not named or not ladder.config.sizes or named <= (most := reach([size.params for size in ladder.sizes])):
        return ""
    return (
        f"note: extrapolate: {short_number(named)} parameters are farther away than the report predicts from these "
        f"sizes (up to {short_number(most)}); add a larger size, or name a smaller one"
    )


def _tuned_keys(held: Values, size: Size) -> set[str]:
    by_variant = list(held.get(size.name, {}).values())
    return set.intersection(*map(set, by_variant)) if by_variant else set()


def parts_of(study: Study) -> Iterator[tuple[str, Study]]:
    """(label, study) of the trials and the cells of every size."""
    for name, out in size_names(study).items():
        for trial, part in unplanned_trials(study, name, out):
            yield f"{name} {trial}".strip(), part
        yield name or "study", unplanned(study, name, out)


def _status(study: Study) -> dict[str, Any]:
    queue, note = cells_in_queue(study.out)
    parts = {label: status_record(part, queue) for label, part in parts_of(study)}
    record = {"study": study.config.study, "out": str(study.out), "parts": parts}
    return {**record, "note": note} if note else record


def _status_text(study: Study) -> str:
    rows: list[tuple[str, ...]] = [("part", *HEADINGS)]
    queue, note = cells_in_queue(study.out)
    for label, part in parts_of(study):
        trained = read_mapping(part.out / RECORD).get("variants")
        known = {v["name"] for v in trained} if isinstance(trained, list) else None
        cells = [row for row in status_rows(part, queue)[1:] if known is None or row[0].split("/")[0] in known]
        rows += [(label, *row) for row in cells]
    return table(rows) + (f"\nnote: {note}" if note else "")


def _conclude(study: Study) -> None:
    """Write the report of every size with cells, and that of the ladder."""
    from headway.launcher.report.study import report  # matplotlib: only when a report is written

    written = {}
    if study.config.sizes:
        restore_file(study.out, study.records, LADDER)
    for name, out in size_names(study).items():
        restore_file(out, records_below(study, out), TUNING)
        if restore_design(unplanned(study, name, out)):
            written[name] = report(out)
    if study.config.sizes:
        from headway.launcher.report.ladder import ladder_report

        main = ladder_report(study.out)
    else:
        main = next(iter(written.values()), None)
    if console.wants_json():
        sizes = {name: report_record(path.parent, path) for name, path in written.items()}
        console.emit({**_status(study), "report": main and str(main), "sizes": sizes})
        return
    for name, path in written.items():
        if name:
            console.say(f"report of size {name}: {path}")
    console.result(f"report: {main}")
