"""`headway compare`: the report of a study for any runs, however they were started.

Runs whose specs differ in nothing but seeds, names and bookkeeping are one variant. The record of the study is made
from the specs of the runs and refers to their folders, which are only read.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.errors import SpecError, printable
from headway.launcher.compare.batch_hashes import first_hash
from headway.launcher.compare.cells import CellState, cell_state
from headway.launcher.run.branching import begin_of
from headway.launcher.run.folders import find_run
from headway.launcher.run.records import read_run
from headway.launcher.run.run_dir import SEEDS, SHA256, flatten, is_free, read_mapping, write_json
from headway.launcher.study.config import FULL, NAME
from headway.launcher.study.keeping import STUDY
from headway.launcher.study.run import now, refuse_foreign
from headway.launcher.study.status import report_record

FOLDER = Path("comparisons")
"""Where comparisons are written without --out."""

OF_A_VARIANT = ("parallel", "speed", "launch")
"""Sections whose keys do not change a result, but do change the speed: runs that differ there are two variants."""

BEGIN = ("init.run", "init.weights", SHA256)
"""Keys that tell what a run began from."""

_SAME_LOSS = ("data_fingerprint", "vocab_size")
"""Keys of a card without which validation losses of two runs are not losses of the same thing."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run to compare. `spec`: its keys, dotted. `pair`: number that it shares with the runs on the same data."""

    path: Path
    tree: dict[str, Any]
    spec: dict[str, Any]
    card: dict[str, Any]
    state: CellState
    data: str
    pair: int = 0

    @property
    def variant_key(self) -> str:
        """Equal for runs of one variant. Runs that began from runs of several seeds of one variant are one, too."""
        kept = {key: value for key, value in self.spec.items() if key not in SEEDS and not _is_free(key)}
        if (begin := begin_of(self.card)) is not None:
            kept |= {SHA256: None, "from": begin}
        return json.dumps(kept, sort_keys=True)


def compare_runs(paths: Sequence[Path], *, baseline: Path | None = None, out: Path | None = None) -> int:
    """Write the report of a comparison into `out`, or into a folder of `FOLDER` that the variants name. Returns 0.

    `baseline`: one of `paths`; default: the first. Raises NoInputError for a path that is no run, and SpecError for
    runs that cannot be compared: fewer than two variants with a finished run, other data, vocabulary or validation
    tokens. Nothing is written then.
    """
    runs = [_read(path) for path in paths]
    _refuse_twice(paths)
    first = _baseline(runs, baseline)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.variant_key, []).append(run)
    _refuse_incomparable(runs, list(groups.values()))
    names = dict(zip(groups, variant_names(list(groups.values())), strict=True))
    base = names[first.variant_key]
    keys = sorted(groups, key=lambda key: key != first.variant_key)  # the baseline first
    numbered = dict(zip(keys, paired([groups[key] for key in keys]), strict=True))
    variants = {names[key]: numbered[key] for key in groups}
    out = out or FOLDER / "-".join(variants)[:80].rstrip(".-")
    refuse_foreign(out, STUDY, what="a comparison")
    if (out / STUDY).exists() and read_mapping(out / STUDY).get("comparison") is not True:
        raise SpecError(f"--out: {out} is the folder of a study; name another folder for the comparison")
    record = _record(out, variants, base)
    words = ["headway", "compare", *map(str, paths), *(["--baseline", str(baseline)] if baseline else [])]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / STUDY, {**record, "command": shlex.join([*words, "--out", str(out)]), "written_at": now()})
    for name, group in variants.items():
        shown = ", ".join(f"{run.path} (seed {run.pair}, {run.state.state})" for run in group)
        console.say(f"{name}{' (baseline)' if name == base else ''}: {shown}")
    from headway.launcher.report.study import report  # matplotlib: only when a report is written

    page = report(out)
    if console.wants_json():
        console.emit(report_record(out, page))
    else:
        console.result(f"report: {page}")
    return 0


# ---------------------------------------------------------------- reading


def _read(path: Path) -> Run:
    folder = find_run(path).path
    tree = read_mapping(folder / "spec.json")
    if not tree:
        raise SpecError(f"{folder / 'spec.json'}: is damaged; restore it from a copy, or leave this run out")
    record = read_run(folder)
    seeds = [flatten(tree).get(key) for key in SEEDS]
    return Run(
        path=folder,
        tree=tree,
        spec=flatten(tree),
        card=read_mapping(folder / "run.json"),
        state=cell_state(folder, None),
        data=first_hash(record.batch_hash) if record.batch_hash else f"seed {seeds[1]}",
    )


def _is_free(key: str) -> bool:
    """Whether a key concerns neither the result nor the speed of a run."""
    return is_free(key) and key.partition(".")[0] not in OF_A_VARIANT


def _refuse_twice(paths: Sequence[Path]) -> None:
    counts = Counter(path.resolve() for path in paths)
    if twice := [path for path in paths if counts[path.resolve()] > 1]:
        raise SpecError(f"{twice[0]}: is given twice; a repeated run is no second seed, so name each run once")
    if len(paths) < 2:
        raise SpecError(f"{paths[0]}: one run alone has nothing to be compared with; name two or more runs")


def _baseline(runs: Sequence[Run], baseline: Path | None) -> Run:
    if baseline is None:
        return runs[0]
    found = next((run for run in runs if run.path.resolve() == baseline.resolve()), None)
    if found is None:
        shown = printable(str(baseline), 300)
        raise SpecError(f"--baseline: {shown} is not one of the runs; name one of them: {_listed(runs)}")
    return found


def _listed(runs: Sequence[Run]) -> str:
    return ", ".join(str(run.path) for run in runs[:10]) + (" ..." if len(runs) > 10 else "")


def _refuse_incomparable(runs: Sequence[Run], groups: Sequence[Sequence[Run]]) -> None:
    if len(groups) < 2:
        raise SpecError(
            f"the specs of all {len(runs)} runs are equal but for their seeds and names, so there is nothing to "
            "compare; name runs of at least two specs"
        )
    finished = [[run for run in group if run.state.state == "done"] for group in groups]
    if sum(map(bool, finished)) < 2:
        states = "\n".join(f"  {run.path}: {run.state.state} {run.state.detail}".rstrip() for run in runs)
        raise SpecError(f"fewer than two variants have a finished run:\n{states}\nfinish their training first")
    for group in groups:
        seen: dict[tuple[Any, ...], Run] = {}
        for run in group:
            other = seen.setdefault(tuple(run.spec.get(key) for key in SEEDS), run)
            if other is not run:
                raise SpecError(
                    f"{run.path} and {other.path} have one spec and one seed: a repeated run is not another sample; "
                    "leave one of them out"
                )
    done = [run for group in finished for run in group]
    for run in done[1:]:
        for key, one, other in _other_loss(done[0], run):
            raise SpecError(
                f"{run.path} has {key} {printable(str(other))}, {done[0].path} has {printable(str(one))}: their "
                "validation losses are not of the same text and cannot be compared; name runs on the same data"
            )


def _other_loss(one: Run, other: Run) -> list[tuple[str, Any, Any]]:
    """(key, value, value) where two runs do not have validation losses of the same text."""
    facts = [(key, one.card.get(key), other.card.get(key)) for key in _SAME_LOSS]
    facts += [("train.validation_tokens", *(run.spec.get("train.validation_tokens") for run in (one, other)))]
    if one.card.get("data_fingerprint") is None:  # synthetic: the source is the data
        keys = sorted(key for key in one.spec.keys() | other.spec.keys() if key.startswith("data.source."))
        facts += [(key, one.spec.get(key), other.spec.get(key)) for key in keys]
    return [(key, a, b) for key, a, b in facts if a != b]


# ---------------------------------------------------------------- variants and pairs


def variant_names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """A name for each variant: of its specs, else of its folders, without what tells its seeds apart, else of one.

    If none of these tells all variants apart, they are numbered.
    """
    by_spec = [_common([str(run.spec.get("name") or "") for run in group]) for group in groups]
    by_folder = [_common([_folder_name(run.path) for run in group]) for group in groups]
    by_first = [_folder_name(group[0].path) for group in groups]
    for names in (by_spec, by_folder, by_first):
        if len(set(names)) == len(groups) and all(re.match(NAME, name) for name in names):
            return names
    plain = [name if re.match(NAME, name) else "run" for name in by_first]
    return [f"{name}-{number}" for number, name in enumerate(plain, 1)]


def _folder_name(path: Path) -> str:
    path = path.resolve()
    return path.parent.name if re.fullmatch(r"seed-\d+(\..*)?", path.name) else path.name


def _common(names: Sequence[str]) -> str:
    """What the names of the runs of a variant begin with alike, without what numbers a seed."""
    if len(set(names)) == 1:
        return re.sub(r"[._-]+seed[._-]?\d+$", "", names[0])
    alike = "".join(letters[0] for letters in takewhile(lambda found: len(set(found)) == 1, zip(*names, strict=False)))
    return re.sub(r"[._-]+(seed|s)?[._-]*\d*$", "", alike)


def paired(groups: Sequence[Sequence[Run]]) -> list[list[Run]]:
    """The runs of each variant with their `pair`: one number for runs on the same data. The baseline comes first.

    If a variant has no run on the data of a baseline's run, runs are numbered in order of their seeds. The hashes of
    their batches then show that they are unpaired. The number is `data.seed` where that tells the same.
    """
    blocks = [_blocks(group) for group in groups]
    if not all(blocks[0].keys() & found.keys() for found in blocks[1:]):
        return [[replace(run, pair=i) for i, run in enumerate(_by_seed(group), 1)] for group in groups]
    every = list(dict.fromkeys(key for found in blocks for key in found))
    seeds = {key: {found[key].spec.get("data.seed") for found in blocks if key in found} for key in every}
    given = [next(iter(found)) for found in seeds.values() if len(found) == 1]
    labels = given if len(set(given)) == len(every) and all(type(seed) is int for seed in given) else None
    number = dict(zip(every, labels or range(1, len(every) + 1), strict=True))
    return [[replace(run, pair=number[key]) for key, run in found.items()] for found in blocks]


def _blocks(group: Sequence[Run]) -> dict[tuple[str, int], Run]:
    """(data, number) -> run: several runs of one variant on the same data are numbered in order of their seeds."""
    seen: Counter[str] = Counter()
    found: dict[tuple[str, int], Run] = {}
    for run in _by_seed(group):
        found[run.data, seen[run.data]] = run
        seen[run.data] += 1
    return found


def _by_seed(group: Sequence[Run]) -> list[Run]:
    return sorted(group, key=lambda run: [(run.spec.get(key) is not None, run.spec.get(key) or 0) for key in SEEDS])


# ---------------------------------------------------------------- the record


def _record(out: Path, variants: dict[str, list[Run]], baseline: str) -> dict[str, Any]:
    """The content of study.json, as `plan.study_record` makes it for a study."""
    base = variants[baseline][0].spec
    return {
        "format": 1,
        "comparison": True,
        "study": out.resolve().name,
        "path": "",
        "base": "",
        "arguments": [],
        "baseline": baseline,
        "seeds": sorted({run.pair for group in variants.values() for run in group}),
        "budgets": [FULL],
        "match": None,
        "branch_start": None,
        "margin_nats": None,
        "asks": [],
        "variants": [_variant(name, group[0], base) for name, group in variants.items()],
        "cells": [
            {
                "key": f"{name}/seed-{run.pair}",
                "variant": name,
                "seed": run.pair,
                "budget": FULL,
                "run_dir": os.path.relpath(run.path.resolve(), out.resolve()),
                "overrides": [],
                "spec": run.tree,
            }
            for name, group in variants.items()
            for run in group
        ],
    }


def _variant(name: str, run: Run, base: dict[str, Any]) -> dict[str, Any]:
    cost = run.card.get("cost")
    if not isinstance(cost, dict):
        raise SpecError(f"{run.path}/run.json: does not have the cost of the model; leave this run out")
    told = {k: v for k, v in run.spec.items() if k in BEGIN or (k not in SEEDS and not _is_free(k))}
    keys = {k: v for k, v in told.items() if k not in base or base[k] != v}
    return {
        "name": name,
        "keys": keys,
        "matched": None,
        "free_value": None,
        "notes": [],
        "cost": cost,
    }
