"""Report section on the context of the numbers: epochs, noise, and how steadily the variants trained."""

from __future__ import annotations

from collections.abc import Iterator

from headway.launcher.compare.analyse import StudyResult
from headway.launcher.compare.context import SMALL, Context, ValidationNoise, context_of
from headway.launcher.report.page import Block, Heading, Table, Text


def context_blocks(result: StudyResult) -> Iterator[Block]:
    """The scale of the numbers, and the steps of each variant: two tables. No blocks without a finished run."""
    context = context_of(result)
    if not context.steadiness:
        return
    yield Heading("Context")
    yield Table([("quantity", "here"), *_scale_rows(context, result)], frozenset({0, 1}))
    yield Text(
        "Steps of all seeds of a variant. Clipped: gradient norm above `optimizer.clip_norm`. Loss spikes: by the rule "
        "of `guard.spike`. Skipped: the update was not applied. A variant that is clipped more often has in effect "
        "another learning rate."
    )
    yield Table(list(_step_rows(context)))


def _scale_rows(context: Context, result: StudyResult) -> Iterator[tuple[str, str]]:
    baseline = result.baseline.name
    yield "training data", _epochs(context)
    if context.baseline_sd is None or context.pair_sd is None:
        seeds = "one seed" if context.baseline_seeds == 1 else "no finished seed"
        yield f"noise of {baseline} repeated", f"not measured: {seeds}"
    else:
        text = (
            f"standard deviation {context.baseline_sd:.4f} {result.unit} over {context.baseline_seeds} seeds; two of "
            f"its runs with different seeds differ by a standard deviation of {context.pair_sd:.4f}"
        )
        if context.paired_sd is not None:
            text += f". That of a paired difference of one seed, pooled over variants: {context.paired_sd:.4f}"
        yield f"noise of {baseline} repeated", text
    yield "noise of validation", _validation(context.validation, result.unit)


def _epochs(context: Context) -> str:
    if context.trained_tokens is None:
        return "no common token count"
    tokens = f"{context.trained_tokens:,} tokens"
    if context.epochs is not None:
        return f"{tokens} of a dataset of {context.data_tokens:,}: {context.epochs:.3g} epochs"
    return f"{tokens} of synthetic data, which has no epochs" if context.synthetic else f"{tokens}; size not recorded"


def _validation(noise: ValidationNoise | None, unit: str) -> str:
    if noise is None:
        return "not recorded"
    text = (
        f"standard error {noise.standard_error:.4f} {unit} from {noise.tokens:,} validation tokens "
        f"({noise.groups}). All runs are validated on the same tokens, so it cancels partly in "
        "differences; what is left of it is the same for every seed and is in no interval"
    )
    if noise.needed_tokens is None:
        return text
    return (
        f"{text}. {noise.needed_tokens:,} validation tokens would make it {SMALL:.0%} of the spread of a run "
        f"({noise.spread:.4f}); a difference needs fewer"
    )


def _step_rows(context: Context) -> Iterator[list[str]]:
    yield ["variant", "steps", "clipped", "share", "at norm", "loss spikes", "skipped"]
    for name, found in context.steadiness.items():
        clipped = ["not recorded", "-"] if found.clipped is None else _count(found.clipped, found.steps)
        norm = "-" if found.clip_norm is None else f"{found.clip_norm:g}"
        spikes = "not watched" if found.spikes is None else str(found.spikes)
        yield [name, f"{found.steps:,}", *clipped, norm, spikes, str(found.skipped)]


def _count(count: int, steps: int) -> list[str]:
    return [f"{count:,}", f"{count / steps:.1%}" if steps else "-"]
