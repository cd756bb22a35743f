"""Report sections on the joint law of a ladder: its numbers, speed-ups, and the prediction at a named size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from headway.launcher.base.text import short_number
from headway.launcher.compare.effective import ratio_text
from headway.launcher.compare.findings import speed_up
from headway.launcher.compare.ladder.curve import LEAST_SIZES, Law, Range
from headway.launcher.compare.ladder.noise import LackOfFit
from headway.launcher.compare.ladder.read import LadderStudy, SizeStudy
from headway.launcher.compare.ladder.slope import Lines
from headway.launcher.compare.ladder.table import Refusal
from headway.launcher.report.page import Block, Heading, Table, Text

NOT_MEASURED, NOT_PLANNED = "not measured", "not planned"


def missing_words(size: SizeStudy, variant: str) -> str:
    """In place of a number: whether the study trains this variant at this size at all."""
    planned = None if size.study is None else {v.name for v in size.study.variants}
    return NOT_MEASURED if planned is None or variant in planned else NOT_PLANNED


def interval(found: Range | None, form: str = "+.4f", unit: str = "") -> str:
    """Text such as `-0.0123 [-0.0200, -0.0046]`, or "not measured". Infinite ends are shown as such.

    A ratio between 0 and infinity has no interval, and the text says so. `unit`: `x` for ratios, which have two digits.
    """
    if found is None or math.isnan(found.value):
        return NOT_MEASURED

    def end(value: float) -> str:
        if math.isinf(value):
            return "-\u221e" if value < 0 else "\u221e"
        return ratio_text(value) if unit == "x" else f"{value:{form}}"

    if unit == "x" and found.low == 0 and math.isinf(found.high):
        return f"{end(found.value)}{unit} (no interval)"
    return f"{end(found.value)}{unit} [{end(found.low)}, {end(found.high)}]"


def law_blocks(study: LadderStudy) -> Iterator[Block]:
    """The numbers of the law over parameters and over FLOPs."""
    result = study.result
    yield Heading("The joint law")
    yield Text(
        "L = E + A N^-a, fitted to all runs at once: all variants share the irreducible loss E and the exponent a; A "
        "is the variant's own. N is the number of parameters, or the useful training FLOPs of a run. Intervals (95 %) "
        "have the noise of runs, the effects of seeds (a seed is a block: it moves all variants of its size together), "
        "and lack of fit."
    )
    laws = {"parameters": result.by_params, "useful training FLOPs": result.by_flops}
    fitted = {what: law for what, law in laws.items() if isinstance(law, Law)}
    for what, law in laws.items():
        if isinstance(law, str):
            yield Text(f"Over {what}: not fitted. {_sentence(law)}", "warn")
    if not fitted:
        return
    rows = [["", *(f"over {what}" for what in fitted)]]
    rows.append(["exponent a", *(interval(law.a, ".3f") for law in fitted.values())])
    rows.append(["irreducible loss E", *(interval(law.e, ".3f") for law in fitted.values())])
    for v in result.variants:
        at = [law for law in fitted.values() if result.index(v) in law.covered]
        if at:
            shown = [interval(law.coefficient(result.index(v)), ".4f") for law in at]
            rows.append([f"{v}: reducible loss in the middle", *shown])
    rows.append(["lack of fit", *(lack_words(law.lack) for law in fitted.values())])
    yield Table(rows)
    middle = " and ".join(f"{short_number(math.exp(law.center))} {what}" for what, law in fitted.items())
    yield Text(
        f"Middle: {middle}. Lack of fit: standard deviation of a mean around the law beyond the noise of seeds, and p "
        "of the test that there is none."
    )
    if few := _few_sizes(study, next(iter(fitted.values()))):
        yield Text(
            f"No numbers by the law for {', '.join(few)}: with finished runs at fewer than {LEAST_SIZES} sizes, they "
            "would be the shape of the other variants' curves, and not measured."
        )
    if any(math.isinf(law.e.low) for law in fitted.values()):
        yield Text(
            "E has no lower bound where losses that fall on a straight line over ln N are possible. Predictions do not "
            "depend on that bound; a wider range of sizes or more seeds would set it."
        )


def _few_sizes(study: LadderStudy, law: Law) -> list[str]:
    """Variants with finished runs at too few sizes for numbers by the law."""
    result = study.result
    return [v for v in result.variants if result.index(v) in set(law.names) - law.covered]


def lack_words(lack: LackOfFit) -> str:
    if lack.p_value is None:
        return "no degrees of freedom"
    p = "p < 0.001" if lack.p_value < 0.001 else f"p = {lack.p_value:.3f}"
    return f"{lack.sd:.4f} nats, at most {lack.upper:.4f} (90 %); {p}"


def speed_up_blocks(study: LadderStudy) -> Iterator[Block]:
    """Effective speed-ups at each size and over all sizes."""
    result = study.result
    yield Heading("Effective speed-up")
    yield Text(
        f"How many times more {result.baseline} needs for the loss of the variant; above 1, the variant is better. In "
        "tokens: at one size, from its runs of several `budgets`. In parameters and FLOPs: from the joint law, at one "
        "size by its paired difference there and the interval of that (none with one seed), and over all sizes by the "
        "law itself, whose shared exponent makes it the same at every size. Intervals (95 %) hold for all variants of "
        "a column at once."
    )
    header = ["variant", "speed-up in", *(s.name for s in study.sizes), "all sizes, by the law"]
    rows = [header]
    for v in result.others:
        rows.append([v, "tokens (measured)", *_measured(study, v), "-"])
        for what, law in (("parameters", result.by_params), ("training FLOPs", result.by_flops)):
            rows.append([v, what, *_by_law(study, law, v)])
    yield Table(rows, frozenset({0, 1}))


def _measured(study: LadderStudy, variant: str) -> Iterator[str]:
    for size in study.sizes:
        found = None if size.study is None else next((v for v in size.study.variants if v.name == variant), None)
        tokens = found and found.effective and found.effective.tokens
        yield speed_up(tokens) if tokens else missing_words(size, variant)


def _by_law(study: LadderStudy, law: Law | str, variant: str) -> Iterator[str]:
    result = study.result
    v, base = result.index(variant), result.index(result.baseline)
    for size in study.sizes:
        found = None
        if isinstance(law, Law) and {v, base} <= set(law.names):
            found = result.speed_up_at(law, variant, size.name)
        yield missing_words(size, variant) if found is None else interval(found, unit="x")
    known = isinstance(law, Law) and {v, base} <= law.covered
    yield interval(law.speed_up(v, base), unit="x") if known and isinstance(law, Law) else NOT_MEASURED


# ---------------------------------------------------------------- prediction


def prediction_blocks(study: LadderStudy) -> Iterator[Block]:
    """Losses and differences at the size that the ladder names."""
    result, target = study.result, study.record.get("extrapolate")
    yield Heading("Prediction at a larger size")
    if not target:
        yield Text("No size is named: `extrapolate: 25e6` in the study would predict losses at 25M parameters.")
        return
    if isinstance(result.by_params, str):
        yield Text(f"Not predicted. {_sentence(result.by_params)}", "warn")
        return
    try:
        rows = list(prediction_rows(study, result.by_params, float(target)))
    except Refusal as refused:
        yield Text(f"Not predicted: {refused}.", "warn")
        return
    yield Text(
        f"At {short_number(target)} parameters and the tokens per parameter of the ladder. Intervals (95 %) include "
        "the noise of runs, of the exponent and of E, and the lack of fit of a new size; in columns of one seed, also "
        "the noise of that seed. Those of differences hold for all variants at once. By the law, a difference shrinks "
        "as N^-a. By the line, the trend of the difference over ln N goes on. If both disagree, the sizes do not tell "
        "which of them holds."
    )
    yield Table(rows)


def prediction_rows(study: LadderStudy, law: Law, target: float) -> Iterator[list[str]]:
    """Raises Refusal if the size is too far."""
    base = study.result.baseline
    yield [
        "variant",
        "expected loss",
        "loss of one seed",
        f"expected difference to {base}",
        "difference of one paired seed",
        "expected difference, by the line",
    ]
    for v in study.result.variants:
        cells = {key: compute() for key, compute in predictions(study, law, v, target).items()}
        shown = [interval(cells[key], ".4f") for key in ("loss", "loss_one_seed")]
        differences = ("difference", "difference_one_seed", "difference_by_line")
        yield [v, *shown, *(["baseline"] * 3 if v == base else [interval(cells.get(key)) for key in differences])]


def predictions(study: LadderStudy, law: Law, variant: str, target: float) -> dict[str, Callable[[], Range | None]]:
    """Name -> the prediction, computed when it is called."""
    result, x = study.result, math.log(target)
    v, base = result.index(variant), result.index(result.baseline)
    if v not in law.covered:
        return {"loss": lambda: None, "loss_one_seed": lambda: None}
    found: dict[str, Callable[[], Range | None]] = {
        "loss": lambda: law.loss(v, x),
        "loss_one_seed": lambda: law.loss(v, x, seeds=1),
    }
    if variant != result.baseline and base in law.covered:
        found["difference"] = lambda: law.difference(v, base, x)
        found["difference_one_seed"] = lambda: law.difference(v, base, x, seeds=1)
        found["difference_by_line"] = lambda: _on_line(study, variant, x)
    return found


def _on_line(study: LadderStudy, variant: str, x: float) -> Range | None:
    lines = study.result.lines
    line = lines.by_variant.get(variant) if isinstance(lines, Lines) else None
    if line is None or not isinstance(lines, Lines):
        return None
    value, half = line.at(x, extra=2 * lines.lack.upper**2)
    return Range(value=float(value), low=float(value - half), high=float(value + half))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
