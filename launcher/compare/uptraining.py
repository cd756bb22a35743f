"""Uptraining in a study: losses over alpha, and uptrained variants against variants from scratch at equal compute.

Training FLOPs are useful ones, three times those of the forward pass, in units of the teacher's whole training. Loss at
alpha 0 is that of the converted model before its first step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from headway.launcher.compare.analyse import StudyResult
from headway.launcher.compare.cell_results import CellResult
from headway.launcher.compare.simultaneous import sidak
from headway.launcher.compare.stats import Estimate, estimate, paired_difference
from headway.launcher.compare.training_flops import TRAINING, training_flops
from headway.model.convert.methods import COMPARED


@dataclass(frozen=True, kw_only=True)
class Point:
    """A method at one alpha. `tokens`: of the uptraining. `flops`: of the uptraining over those of the teacher.

    `loss`: over seeds. `difference`: to the teacher, paired; intervals hold for all points of the study at once. None
    if the teacher is not in the study.
    """

    variant: str | None
    alpha: float
    tokens: int
    flops: float
    losses: Mapping[int, float]
    loss: Estimate
    difference: Estimate | None


@dataclass(frozen=True, kw_only=True)
class Method:
    """A teacher and a conversion. `points`: by increasing alpha."""

    name: str
    teacher: str
    what: str
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Versus:
    """An uptrained variant against one from scratch with the same training FLOPs.

    `teacher`: whether these include the teacher's, `counted` or `free`. `tokens`: of the variant from scratch.
    `difference`: uptrained - scratch, paired; intervals hold for all such rows at once.
    """

    uptrained: str
    scratch: str
    teacher: str
    tokens: int
    difference: Estimate


@dataclass(frozen=True, kw_only=True)
class Uptraining:
    """The numbers of the section on uptraining.

    `teachers`: losses of the teachers that are variants of the study. `others`: (teacher outside of the study, its
    loss in the cards of the conversions, tokens of the validation split that it was measured on).
    """

    methods: tuple[Method, ...]
    versus: tuple[Versus, ...]
    teachers: dict[str, Estimate]
    others: tuple[tuple[str, float, int], ...]


def uptraining_of(result: StudyResult) -> Uptraining | None:
    """The numbers of a study with variants that have `from`; None for other studies."""
    planned = {v.name: v.planned["uptraining"] for v in result.variants if v.planned.get("uptraining")}
    origins = {name: about for name, about in planned.items() if about["kind"] == "from"}
    if not origins:
        return None
    losses = {v.name: v.losses for v in result.variants}
    costs = {v.name: v.cost for v in result.variants}
    points = [p for name, about in origins.items() for p in _losses(result, name, about, origins)]
    confidence = sidak(max(1, len(points)))
    methods: dict[str, list[Point]] = {}
    for name, alpha, tokens, by_seed in points:
        about = origins[name]
        teacher = losses.get(about["teacher"] or "", {})
        taught = TRAINING * about["teacher_flops_per_token"] * about["teacher_tokens"]
        share = float(training_flops(costs[name], tokens)) / taught
        methods.setdefault(about["method"], []).append(
            Point(
                variant=name if alpha else None,
                alpha=alpha,
                tokens=tokens,
                flops=share,
                losses=by_seed,
                loss=estimate(list(by_seed.values())),
                difference=paired_difference(by_seed, teacher, confidence=confidence),
            )
        )
    return Uptraining(
        methods=tuple(
            _method(name, found, next(o for o in origins.values() if o["method"] == name))
            for name, found in methods.items()
        ),
        versus=tuple(_versus(planned, losses)),
        teachers={
            name: estimate(list(losses[name].values()))
            for name in dict.fromkeys(o["teacher"] for o in origins.values())
            if name is not None and losses.get(name)
        },
        others=tuple(_others(result, origins)),
    )


def _others(result: StudyResult, origins: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float, int]]:
    for run in dict.fromkeys(o["run"] for o in origins.values() if o["teacher"] is None):
        names = [name for name, o in origins.items() if o["run"] == run]
        cards = [c.record.run.get("conversion") for c in result.cells if c.variant in names and c.done]
        found = next((card["loss"] for card in cards if isinstance(card, dict) and card.get("loss")), None)
        if found is not None:
            yield run, float(found["before"]), int(found["tokens"])


_Found = tuple[str, float, int, dict[int, float]]
"""(variant, alpha, tokens of the uptraining, loss by seed)."""


def _losses(
    result: StudyResult, name: str, about: Mapping[str, Any], origins: Mapping[str, Mapping[str, Any]]
) -> list[_Found]:
    """Losses of a variant at its end, and at alpha 0 for the smallest alpha of its method."""
    cells = [c for c in result.cells if c.variant == name and c.done]
    smallest = min(o["alpha"] for o in origins.values() if o["method"] == about["method"])
    found: list[_Found] = []
    first = _before_training(cells) if about["alpha"] == smallest else {}
    if first:
        found.append((name, 0.0, 0, first))
    last = {c.seed: c.loss for c in cells if c.loss is not None}
    if last:
        found.append((name, about["alpha"], cells[0].record.tokens, last))
    return found


def _before_training(cells: list[CellResult]) -> dict[int, float]:
    losses = {c.seed: c.record.validation.loss_at_tokens(0) for c in cells}
    return {seed: loss for seed, loss in losses.items() if loss is not None}


def _method(name: str, points: list[Point], about: Mapping[str, Any]) -> Method:
    heads = "" if about["kv_heads"] is None or about["to"] == "mqa" else f", {about['kv_heads']} KV heads"
    compared = " of weights" if about.get("by") == "weights" and about["how"] in COMPARED else ""
    return Method(
        name=name,
        teacher=about["teacher"] or about["run"],
        what=f"{about['teacher_type']} to {about['to']}{heads}, by {about['how']}{compared}",
        points=tuple(sorted(points, key=lambda p: p.alpha)),
    )


def _versus(planned: Mapping[str, Any], losses: Mapping[str, Mapping[int, float]]) -> list[Versus]:
    rows = [(name, about) for name, about in planned.items() if about["kind"] == "compute"]
    found = []
    for name, about in rows:
        difference = paired_difference(losses[about["of"]], losses[name], confidence=sidak(len(rows)))
        if difference is not None:
            found.append(
                Versus(
                    uptrained=about["of"],
                    scratch=name,
                    teacher=about["teacher"],
                    tokens=about["tokens"],
                    difference=difference,
                )
            )
    return found
