"""Check whether a comparison is fair: spec differences besides the mechanism, and whether runs read the same data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from headway.launcher.compare.batch_hashes import Hashes, compare_hashes, first_hash
from headway.launcher.run.records import RunRecord
from headway.launcher.run.run_dir import changed, flatten

Kind = Literal["intervention", "matching", "CONFOUND"]

NOT_COMPARED = ("name", "run_dir", "tracking", "checkpoint")
"""Keys and sections that change neither losses nor the timed part of a step."""

ABSENT = "(absent)"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One key in which a variant differs from the baseline. `kind` matching: solved to keep the budget equal."""

    variant: str
    key: str
    baseline: Any
    value: Any
    kind: Kind
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Whether the runs of a seed read the same batches. `status` PAIRED: equal at all common steps of all seeds."""

    status: Literal["PAIRED", "UNPAIRED", "UNKNOWN"]
    lines: tuple[str, ...]


def spec_differences(
    variant: str,
    spec: dict[str, Any],
    baseline: dict[str, Any],
    *,
    declared: set[str],
    written: set[str],
    free: str | None,
    named: str = "named in the study",
) -> list[Difference]:
    """Every key in which two resolved specs (JSON) differ, with its kind.

    `declared`: dotted keys that the variant and the baseline set in the study. They are the intervention. The
    intervention also includes the consequences of a declared `...type`: keys that exist on one side only, and keys of
    both types that are not written anywhere, so that each side has its own default. `written`: dotted keys that a file
    or argument of either side sets. `free`: the dimension that matching solved. `named`: note on a declared key. All
    other differences are confounds.
    """
    ours, theirs = flatten(spec), flatten(baseline)
    types = {key.rpartition("type")[0] for key in declared if key.rpartition(".")[2] == "type"}
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = theirs.get(key, ABSENT), ours.get(key, ABSENT)
        if a == b or key.partition(".")[0] in NOT_COMPARED:
            continue
        with_type = next((t for t in sorted(types) if t and key.startswith(t)), None)
        default = ours.get(f"{with_type}type") != theirs.get(f"{with_type}type") and key not in written
        brought = with_type if ABSENT in (a, b) or default else None
        kind: Kind = "CONFOUND"
        note = "differs, and the study does not say so"
        if key == free:
            kind, note = "matching", "solved to match the budget"
        elif any(key == d or key.startswith(f"{d}.") for d in declared):
            kind, note = "intervention", named
        elif brought:
            kind, note = "intervention", f"comes with {brought}type"
        found.append(Difference(variant=variant, key=key, baseline=a, value=b, kind=kind, note=note))
    return found


def changed_sections(differences: list[Difference], *, tuned: Collection[str] = ()) -> list[str]:
    """Top-level sections that the intervention changes. With several sections, the cause of a difference is unknown.

    Keys of `tuned` do not count: each variant has the value that is best for it.
    """
    return sorted({d.key.split(".")[0] for d in differences if d.kind == "intervention" and d.key not in tuned})


def deviation(planned: dict[str, Any], trained: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, planned, trained) for each key in which a run differs from the plan of the study."""
    return changed(planned, trained) if trained else []


def run_differences(runs: Mapping[str, RunRecord], *, lengths: bool = True) -> list[str]:
    """One line for each property of the environment (data, code, versions, machine) that differs between runs.

    Keys of `runs` are cell names. `lengths`: whether their numbers of tokens count.
    """
    facts: dict[str, dict[str, list[str]]] = {}
    for cell, record in runs.items():
        run = record.run
        values = {key: run.get(key) for key in ("data_fingerprint", "vocab_size", "git_commit", "code_version")}
        values |= flatten({key: run.get(key) or {} for key in ("versions", "machine", "speed")})
        values |= {"tokens": record.summary.get("tokens")} if lengths else {}
        values |= {"tokens_per_step": run.get("tokens_per_step")}
        for key, value in values.items():
            facts.setdefault(key, {}).setdefault(str(value), []).append(cell)
    lines = []
    for key, values in sorted(facts.items()):
        if len(values) > 1:
            shown = "; ".join(f"{value} in {', '.join(cells)}" for value, cells in values.items())
            lines.append(f"{key}: {shown}")
    return lines + [line for cell, record in runs.items() for line in _changed_on_the_way(cell, record.run)]


def weights_differences(cells: Iterable[tuple[str, str, str]]) -> list[str]:
    """One line for each place of initial weights that did not hold the same ones for all runs of a study.

    `cells`: (name, `init.weights` of the plan, `init.sha256` of the run). The place of a teacher of the study names its
    seed.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for cell, place, sha256 in cells:
        found.setdefault(place, {}).setdefault(sha256, []).append(cell)
    return [
        f"init.weights {place} held other weights when some runs began: "
        + "; ".join(f"sha256 {sha256[:16]} in {', '.join(names)}" for sha256, names in held.items())
        for place, held in found.items()
        if len(held) > 1
    ]


def _changed_on_the_way(cell: str, run: dict[str, Any]) -> list[str]:
    """One line for each property that changed between starts of a run: part of it was trained with another value."""
    seen: dict[str, dict[str, int]] = {}
    for attempt in _attempts_that_count(run):
        for key, value in _circumstances(attempt).items():
            if value is not None:
                seen.setdefault(key, {}).setdefault(str(value), attempt.get("from_step") or 0)
    return [
        f"{key} changed within {cell}: " + ", ".join(f"{value} from step {step}" for value, step in values.items())
        for key, values in seen.items()
        if len(values) > 1
    ]


def changing_attempts(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Starts of a run that are needed to say what changed on the way: the first, and those that differ from before."""
    kept: list[dict[str, Any]] = []
    for attempt in _attempts_that_count(run):
        if not kept or _stated(attempt) != _stated(kept[-1]):
            kept.append(attempt)
    return kept


def _stated(attempt: dict[str, Any]) -> dict[str, Any]:
    """All that a report says of a start."""
    return _circumstances(attempt) | {key: attempt.get(key) for key in ("layout", "zero", "run")}


def _circumstances(attempt: dict[str, Any]) -> dict[str, Any]:
    values = {key: attempt.get(key) for key in ("git_commit", "code")}
    return values | flatten({key: attempt.get(key) or {} for key in ("versions", "machine", "mechanism", "speed")})


def _attempts_that_count(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Starts that contributed to the final run. Steps after the step from which a later start resumed were dropped."""
    attempts, kept = run.get("attempts"), list[dict[str, Any]]()
    for attempt in attempts if isinstance(attempts, list) else []:
        if not isinstance(attempt, dict):
            continue
        while kept and (kept[-1].get("from_step") or 0) >= (attempt.get("from_step") or 0):
            kept.pop()
        kept.append(attempt)
    return kept


def check_pairing(hashes: Mapping[str, Mapping[int, Hashes]], baseline: str) -> Pairing:
    """Compare batch hashes (variant -> seed -> hashes) at every step that the variants of a seed share."""
    seeds = sorted({seed for by_seed in hashes.values() for seed in by_seed})
    lines, differs, compared = [], False, False
    for seed in seeds:
        runs = {variant: by_seed[seed] for variant, by_seed in hashes.items() if by_seed.get(seed)}
        reference = baseline if baseline in runs else next(iter(runs), None)
        for variant, steps in runs.items():
            if variant == reference or reference is None:
                continue
            found = compare_hashes(steps, runs[reference])
            compared = compared or bool(found.common)
            if found.difference is not None:
                differs = True
                lines.append(f"seed {seed}: {variant} and {reference} read different batches, {found.difference}")
            else:
                lines.append(f"seed {seed}: {variant} and {reference}: {found.common} common steps, all hashes equal")
    lines += _same_data_in_all_seeds(hashes.get(baseline, {}))
    status = "UNPAIRED" if differs else "PAIRED" if compared else "UNKNOWN"
    if status == "UNKNOWN":
        lines.append("no two runs of a seed have batch hashes of a common step")
    return Pairing(status=status, lines=tuple(lines))


def _same_data_in_all_seeds(by_seed: Mapping[int, Hashes]) -> list[str]:
    first = [first_hash(steps) for steps in by_seed.values() if steps]
    if len(first) > 1 and len(set(first)) == 1:
        return ["every seed read the same first batch: the spread over seeds leaves out the variation of the data"]
    return []
