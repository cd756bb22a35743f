"""Budgets of a study: runs over a fraction of `train.tokens`, each with a decay of its own.

Two learning rate schedules of type wsd with different lengths have equal rates up to the decay of the shorter one. A
run of a smaller budget therefore continues a checkpoint of the full run and trains the decay only. The result is that
of a run from its start, because all that a step depends on is equal: weights, moments, data and learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from headway.launcher.base.errors import SpecError
from headway.launcher.study.config import FULL, Study

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec

MIN_SHARED = 0.1
"""Minimum share of a run's steps that must be shared with the full run for it to continue the full run's checkpoint.

Below it, a branch saves less than a tenth of its training, and costs a checkpoint that is kept, and a run that cannot
be trained before the full run. Cosine schedules share only their warm-up.
"""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A budget below 1 of one variant. `branch_step`: the step of the full run that it continues; 0: it starts anew."""

    fraction: float
    tokens: int
    steps: int
    branch_step: int

    @property
    def steps_to_train(self) -> int:
        return self.steps - self.branch_step


def budget_text(fraction: float) -> str:
    """A budget in names of cells: the shortest decimal number that is read as the same float."""
    return repr(float(fraction))


def cell_key(variant: str, seed: int, budget: float = FULL) -> str:
    """Name of a cell and of its folder in `cells/`."""
    return f"{variant}/seed-{seed}" + ("" if budget == FULL else f".budget-{budget_text(budget)}")


def plan_budgets(
    study: Study, variant: str, full: Spec, load: Callable[[Mapping[str, Any], str], Spec]
) -> list[Budget]:
    """The budgets of a variant below 1, smallest first.

    `full`: its spec with the full budget. `load(keys, origin)`: its spec with further keys. Raises SpecError if a
    budget ends within the warm-up, has as many steps as another one, or is too short for the spec.
    """
    place, found = f"{study.place('budgets')}: budgets", list[Budget]()
    if len(study.config.budgets) > 1 and full.init.run is not None:
        raise SpecError(
            f"{place}: variant {variant} has init.run, so its full run is a branch itself, and smaller budgets cannot "
            "begin where it does; leave init.run or budgets out"
        )
    steps_of = {full.steps: FULL}
    for fraction in study.config.budgets:
        if fraction == FULL:
            continue
        steps = -(-Fraction(budget_text(fraction)) * full.train.tokens // full.tokens_per_step)
        tokens = int(steps) * full.tokens_per_step
        what = f"{budget_text(fraction)} of variant {variant} is {int(steps):,} steps ({tokens:,} tokens)"
        if tokens <= full.schedule.warmup_tokens:
            raise SpecError(
                f"{place}: {what}, which ends within the warm-up of {full.schedule.warmup_tokens:,} tokens; use a "
                "larger budget, more train.tokens or fewer schedule.warmup_tokens"
            )
        if steps in steps_of:
            raise SpecError(
                f"{place}: {what}, and so is budget {budget_text(steps_of[steps])}; leave one of them out, or use more "
                "train.tokens"
            )
        steps_of[steps] = fraction
        try:
            short = load({"train.tokens": tokens}, f"budget {budget_text(fraction)} of the study")
        except SpecError as e:
            raise SpecError(
                f"{place}: {what}, and this run is not possible: {e}\nkeys in tokens do not shrink with the budget: "
                "leave the budget out, or change the key"
            ) from e
        assert short.steps == steps
        found.append(Budget(fraction=fraction, tokens=tokens, steps=short.steps, branch_step=_branch_step(full, short)))
    return found


def _branch_step(full: Spec, short: Spec) -> int:
    from headway.launcher.run.branching import common_steps

    step = min(common_steps(full, short), short.steps - 1)  # without decay, no step would be left to train
    return step if step >= MIN_SHARED * short.steps else 0


def budget_lines(variants: Mapping[str, tuple[Spec, Sequence[Budget]]], seeds: int) -> list[str]:
    """What the budgets of a study train, and what they cost beyond the full runs. Empty without budgets below 1."""
    lines: dict[tuple[float, str], list[str]] = {}
    for name, (spec, budgets) in variants.items():
        for budget in budgets:
            text = f"{budget.tokens:,} tokens, {budget.steps:,} steps"
            if budget.branch_step:
                text += f": continues its full run at step {budget.branch_step:,}, {budget.steps_to_train:,} to train"
            else:
                text += f"; {spec.schedule.type}: trained from its start, as it shares too few steps with the full run"
            lines.setdefault((budget.fraction, text), []).append(name)
    if not lines:
        return []
    shown = [
        f"budget {budget_text(fraction)}{'' if len(names) == len(variants) else ' of ' + ', '.join(names)}: {text}"
        for (fraction, text), names in sorted(lines.items(), key=lambda line: line[0][0])
    ]
    whole = seeds * sum(spec.steps for spec, _ in variants.values())
    more = seeds * sum(budget.steps_to_train for _, budgets in variants.values() for budget in budgets)
    return [*shown, f"the budgets add {more:,} steps to the {whole:,} steps of the full runs ({more / whole:+.1%})"]
