"""Read the folder of a ladder: the study of every size, and the trials of tuned keys."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.launcher.base.errors import SpecError
from headway.launcher.base.loss_unit import PER_TOKEN
from headway.launcher.compare.analyse import StudyResult, analyse
from headway.launcher.compare.ladder.result import LadderResult, ladder_result
from headway.launcher.compare.ladder.table import Size
from headway.launcher.compare.simultaneous import Simultaneous
from headway.launcher.compare.training_flops import training_flops
from headway.launcher.run.run_dir import read_mapping

LADDER, TUNING = "ladder.json", "tuning.json"


@dataclass(frozen=True, kw_only=True)
class SizeStudy:
    """One size. `study`: None if it was not begun. `left_out`: why its losses are in no statistics of the ladder."""

    name: str
    folder: str
    study: StudyResult | None
    left_out: str = ""

    @property
    def params(self) -> int | None:
        """Parameters of the baseline."""
        return None if self.study is None else int(self.study.baseline.cost["num_params"])


@dataclass(frozen=True, kw_only=True)
class Search:
    """The trials of one tuned key for one variant at one size: (value, seed, loss); a diverged trial has no loss.

    `extended`: values that were added to the grid. `how`: how the chosen value was found. `budget`: the share of the
    tokens of a full run that a trial trains.
    """

    key: str
    size: str
    variant: str
    trials: tuple[tuple[float, int, float | None], ...]
    chosen: float | None
    how: str
    extended: int
    budget: float = 1.0

    def curve(self) -> list[tuple[float, float]]:
        """(value, mean loss over seeds) in order, of values without a diverged trial."""
        values = sorted({value for value, _, _ in self.trials})
        found = []
        for value in values:
            losses = [loss for at, _, loss in self.trials if at == value]
            finite = [x for x in losses if x is not None]
            if len(finite) == len(losses):
                found.append((value, math.fsum(finite) / len(finite)))
        return found


@dataclass(frozen=True, kw_only=True)
class Check:
    """Trials of one variant around a value that was carried to a size. `holds`: whether it is the best of them."""

    key: str
    size: str
    variant: str
    holds: bool
    best: float


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The trials of a study, with sizes or without. `checks`: of values that were carried to a size."""

    baseline: str
    searches: tuple[Search, ...]
    checks: tuple[Check, ...]


@dataclass(frozen=True, kw_only=True)
class LadderStudy:
    """A ladder. `sizes`: in the order of ladder.json. `result`: the statistics of all sizes that are not left out."""

    out: Path
    record: dict[str, Any]
    sizes: tuple[SizeStudy, ...]
    result: LadderResult
    tuning: Tuning

    @property
    def name(self) -> str:
        return str(self.record.get("name") or self.record.get("study") or self.out.name)

    @property
    def unit(self) -> str:
        """Unit of the losses, as in `StudyResult.unit`."""
        return next((s.study.unit for s in self.sizes if s.study is not None), PER_TOKEN)

    def differences(self) -> list[tuple[str, Mapping[str, Simultaneous]]]:
        """(name, variant -> difference to the baseline) of the sizes in the statistics, by increasing parameters."""
        order = sorted(self.result.sizes, key=lambda size: size.params[self.result.baseline])
        studies = [(size.name, self.begun(size).study) for size in order]
        return [(name, study.comparison.differences) for name, study in studies if study is not None]

    def begun(self, size: Size) -> SizeStudy:
        return next(s for s in self.sizes if s.name == size.name)


def read_ladder(out: Path) -> LadderStudy:
    """Raises SpecError if the folder does not contain a ladder, or none of its sizes was begun."""
    record = read_mapping(out / LADDER)
    if record.get("format") != 1:
        raise SpecError(
            f"{out}: has no readable {LADDER}; run the study with `sizes`, or name the folder it was run in"
        )
    sizes = tuple(_size(out, entry) for entry in record["sizes"])
    if all(s.study is None for s in sizes):
        raise SpecError(f"{out}: no size was begun; run the study, or name the folder it was run in")
    tables = [_losses(s.name, s.study) for s in sizes if s.study is not None and not s.left_out]
    return LadderStudy(
        out=out,
        record=record,
        sizes=sizes,
        result=ladder_result(tables, list(record["variants"]), record["baseline"]),
        tuning=read_tuning({s.name: out / s.folder for s in sizes}, record["baseline"]),
    )


def read_tuning(folders: Mapping[str, Path], baseline: str) -> Tuning:
    """Read tuning.json of every size. `folders`: size -> folder of its study; the size of a plain study is empty."""
    keys = {size: read_mapping(folder / TUNING).get("keys", {}) for size, folder in folders.items()}
    return Tuning(baseline=baseline, searches=tuple(_searches(keys)), checks=tuple(_checks(keys)))


def _size(out: Path, entry: dict[str, Any]) -> SizeStudy:
    name, folder = entry["name"], entry["folder"]
    if not (out / folder / "study.json").exists():
        return SizeStudy(name=name, folder=folder, study=None)
    study = analyse(out / folder)
    why = ""
    if study.pairing.status == "UNPAIRED":
        why = "its variants did not read the same data, so seeds are no blocks"
    elif study.tokens is None:
        why = "no finished run has a validation loss at a token count that all of them share"
    return SizeStudy(name=name, folder=folder, study=study, left_out=why)


def _losses(name: str, study: StudyResult) -> Size:
    assert study.tokens is not None
    return Size(
        name=name,
        losses={v.name: v.losses for v in study.variants},
        params={v.name: float(v.cost["num_params"]) for v in study.variants},
        flops={v.name: float(training_flops(v.cost, study.tokens)) for v in study.variants},
    )


def _searches(keys: Mapping[str, dict[str, Any]]) -> Iterator[Search]:
    for size, by_key in keys.items():
        for key, found in by_key.items():
            for variant, choice in found.get("variants", {}).items():
                yield _search(key, size, variant, choice, found.get("extended", 0), found.get("budget", 1.0))


def _checks(keys: Mapping[str, dict[str, Any]]) -> Iterator[Check]:
    for size, by_key in keys.items():
        for key, found in by_key.items():
            if check := found.get("check"):
                variant, holds, best = check["variant"], bool(check["holds"]), float(check["best"])
                yield Check(key=key, size=size, variant=variant, holds=holds, best=best)


def _search(key: str, size: str, variant: str, choice: dict[str, Any], extended: int, budget: float) -> Search:
    trials = tuple(
        (float(t["value"]), int(t["seed"]), float(t["loss"]) if t.get("done") and t.get("loss") is not None else None)
        for t in choice.get("trials", [])
    )
    return Search(
        key=key,
        size=size,
        variant=variant,
        trials=trials,
        chosen=choice.get("chosen"),
        how=choice.get("how", ""),
        extended=int(extended),
        budget=float(budget),
    )
