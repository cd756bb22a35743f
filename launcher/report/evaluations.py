"""Report sections on validation sets, the mixture that was trained on, and evaluations (`headway eval`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from headway.launcher.base.intervals import t_critical
from headway.launcher.compare.analyse import StudyResult
from headway.launcher.compare.cells import records_of
from headway.launcher.compare.evaluations import Compared, compared_evaluations, compared_sets
from headway.launcher.compare.findings import bits_per_byte, signed_interval
from headway.launcher.compare.simultaneous import Simultaneous
from headway.launcher.report.page import Block, Heading, Items, Table, Text


def set_blocks(result: StudyResult) -> Iterator[Block]:
    """Losses of the validation sets and what was seen of a mixture; no blocks for a study without them."""
    baseline = result.baseline.name
    paired, sets = result.pairing.status != "UNPAIRED", list[Compared]()
    if result.tokens is not None and not result.own_ends:
        sets = compared_sets(result.cells, baseline, result.tokens, paired=paired)
    if sets:
        yield Heading("Loss by validation set")
        yield Text(
            f"Nats per token, of pairs per target token, after {result.tokens:,} training tokens, mean over "
            "seeds. Intervals are simultaneous for the variants, not for the sets: with many sets some interval misses "
            "its difference."
        )
        known = result.card("validation_sets") or {}
        yield from _table(result, sets, {name: found.get("bytes_per_token") for name, found in known.items()})
        yield from _left_out(sets)
        yield from _over_documents(result)
    if mix := next((c.record.mix for c in result.cells if c.done and c.record.mix), None):
        yield Text("Trained of each dataset of the mixture, in every cell alike:")
        total = sum(found.get("tokens", 0) for found in mix.values()) or 1
        rows = [("dataset", "tokens", "share", "epochs")]
        for name, found in mix.items():
            tokens, epochs = found.get("tokens", 0), found.get("epochs")
            shown = "-" if epochs is None else f"{epochs:.3g}"
            rows.append((name, f"{tokens:,.0f}", f"{tokens / total:.1%}", shown))
        yield Table(rows, frozenset({0}))


def evaluation_blocks(result: StudyResult) -> Iterator[Block]:
    """What `headway eval` measured of the cells; no blocks if it measured none."""
    paired = result.pairing.status != "UNPAIRED"
    records = records_of(result.out, result.record)
    found = compared_evaluations(result.cells, result.baseline.name, records, paired=paired)
    if not found:
        return
    yield Heading("Evaluation")
    yield Text(
        f"Mean over seeds, and the {'paired' if paired else 'UNPAIRED'} difference to the baseline, as for losses. "
        "Intervals are simultaneous for the "
        "variants, not for the measures: with many measures some interval misses its difference. They are over seeds; "
        "the spread over documents or questions of one model is in the `evaluation.json` of its run."
    )
    yield from _table(result, found)
    yield from _left_out(found)


def _left_out(found: list[Compared]) -> Iterator[Block]:
    if left_out := [f"{c.name}: {cell}" for c in found for cell in c.left_out]:
        yield Text("Cells that are not in these numbers:", "warn")
        yield Items(left_out)


def _over_documents(result: StudyResult) -> Iterator[Block]:
    """How far the loss on all text of a set's kind may be from that on the set."""
    noise = next((c.record.set_noise for c in result.cells if c.done and c.record.set_noise), None)
    if noise is None:
        return
    rows = [("validation set", "documents", "95 % interval of a loss")]
    for name, found in noise.items():
        half = t_critical(found["documents"] - 1) * found["standard_error"]
        rows.append((name, f"{found['documents']:,.0f}", f"± {half:.4f}"))
    yield Text(
        "How well a loss on a set tells that on all text of its kind, from the spread over its documents in one cell. "
        "All cells are validated on the same documents, so most of it cancels in the differences above:"
    )
    yield Table(rows, frozenset({0}))


def _table(
    result: StudyResult, found: list[Compared], bytes_per_token: Mapping[str, float | None] | None = None
) -> Iterator[Block]:
    """One row per measure and variant; with `bytes_per_token` of each measure, losses in bits per byte too."""
    head = ("measure", "variant", "n", "mean", "difference [95 %]", "verdict")
    rows: list[tuple[str, ...]] = [head if bytes_per_token is None else (*head, "bits per byte")]
    for measure in found:
        for variant in result.variants:
            mean = measure.by_variant.get(variant.name)
            if mean is None:
                continue
            difference = measure.differences.get(variant.name)
            is_baseline = variant is result.baseline
            per_byte = None if bytes_per_token is None else bytes_per_token.get(measure.name)
            bits = "-" if not per_byte else f"{bits_per_byte(mean.mean, per_byte):.4f}"
            rows.append(
                (
                    _title(measure) if is_baseline or variant is result.variants[0] else "",
                    variant.name,
                    str(mean.n),
                    f"{mean.mean:.4f}",
                    "baseline" if is_baseline else signed_interval(difference),
                    "" if is_baseline else _verdict(measure, difference),
                    *([] if bytes_per_token is None else [bits]),
                )
            )
    yield Table(rows, frozenset({0, 1, 5}))


def _title(measure: Compared) -> str:
    chance = "" if measure.chance is None else f", chance {measure.chance:.3f}"
    unit = "" if measure.unit == "nats per token" else f" ({measure.unit}{chance})"
    return f"{measure.name}{unit}"


def _verdict(measure: Compared, difference: Simultaneous | None) -> str:
    if difference is None or not difference.excludes(0):
        return "undecided"
    return "better" if (difference.mean < 0) == (measure.better == "lower") else "worse"
