"""The page of an inspection: a figure, tables of heads, a table of experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from headway.launcher.inspect.inspection import Inspection
from headway.launcher.inspect.patterns import CLASSES_OF, HALF, LEAST, HeadScores
from headway.launcher.inspect.places import STACKS
from headway.launcher.inspect.switched import Worth
from headway.launcher.report.page import Block, Heading, Image, Table, Text
from headway.launcher.report.plots.study import Plot, save
from headway.launcher.report.plots.style import STYLE

_MEASURED_ON = {
    "": f"the second half of {HALF} random tokens that come twice",
    "encoder": f"a source of up to {HALF} random tokens that come twice",
    "decoder": f"the second half of up to {HALF} random tokens that come twice, with another source",
    "cross": f"a target of up to {HALF} random tokens that repeats its source",
}


def blocks_of(found: Inspection, plot: Plot) -> Iterator[Block]:
    yield Heading(f"Heads and experts of {found.title}", 1)
    yield Text(_lead(found), "lead")
    yield Text(
        f"Loss of the whole model on {found.targets:,} tokens of {found.sequences} {found.unit}: {found.loss:.4f} "
        "nats per predicted token. Rises of the loss are of this model with one part switched off and nothing trained "
        f"again; intervals are over {found.unit}, for each part alone: of many parts some interval misses its value."
    )
    yield Image(plot)
    for stack in _stacks(found):
        yield Heading(f"Heads of {STACKS[stack]}" if stack else "Heads")
        classes = "; ".join(f"{kind}: {meaning}" for kind, meaning in CLASSES_OF[stack].items())
        yield Text(
            f"Attention to a place, mean over {_MEASURED_ON[stack]}; a head is called by its largest score from "
            f"{LEAST} on, else mixed. {classes}."
            + ("" if stack else " Share: tokens that use the head, 100 % unless it is routed.")
        )
        yield Table(list(_head_rows(found, stack)), frozenset({0, 1}))
    if found.cross:
        yield Heading(f"Cross attention on the {found.unit}")
        yield Text(
            "Entropy of the attention of a target token over the source tokens that it sees, in nats, and its share of "
            "that of equal attention. Places (of the source, from 0) with the largest shares of the attention, and "
            "tokens that get most of it beyond what equal attention gives, among tokens that the sources have three "
            "times or more. In brackets: the share over that of equal attention."
        )
        yield Table(list(_cross_rows(found)), frozenset({0, 3, 4}))
    if found.experts:
        yield Heading("Experts")
        yield Text(
            "Of each expert the tokens that say most about it: how much more often than all tokens they choose it, and "
            "(in brackets) how often, ordered by the number times the logarithm of the ratio, among tokens that occur "
            "three times or more; and contexts whose last token gave it the largest gates. Share: of the choices of "
            "its group. A random router has such lists too: compare the ratios with its."
        )
        yield Table(list(_expert_rows(found)), frozenset({0, 5, 6}))
    if found.likeness:
        yield Heading("Likeness of the heads of a group")
        yield Text(
            "C_W: absolute cosine of weights; C_q, C_o: cosine of projections and of outputs, token by token; "
            "effective rank of the weights; CKA of the outputs. They can be compared before and after a conversion or "
            "a training."
        )
        rows = [["layer", "compared", "C_W", "C_q", "C_o", "effective rank", "CKA"]]
        for layer, one in found.likeness.items():
            values = [f"{one[key]:.3f}" for key in ("c_w", "c_q", "c_o", "effective_rank", "cka")]
            rows.append([found.places[layer].title, f"{one['members']} {one['member']}s per group", *values])
        yield Table(rows, frozenset({1}))


def _lead(found: Inspection) -> str:
    counted = [_counts(found, stack) for stack in _stacks(found)]
    best = max(found.worths, key=lambda worth: worth.rise)
    return f"{' '.join(counted)} Worth most: {_name(found, best)}, without which the loss rises by {_interval(best)}."


def _counts(found: Inspection, stack: str) -> str:
    """How many heads of the stack have each class, a sentence."""
    rows = [row for place, row in zip(found.places, found.heads, strict=True) if place.stack == stack]
    names = Counter(row.name(head) for row in rows if row is not None for head in range(len(row.share)))
    if not names:
        return "What heads attend to is not known: positions are relative, or heads keep a state."
    counts = ", ".join(f"{names[kind]} {kind}" for kind in (*CLASSES_OF[stack], "mixed", "unused") if names[kind])
    text = f"Of {names.total()} heads{f' of {STACKS[stack]}' if stack else ''}: {counts}."
    unknown = {n for n, place in enumerate(found.places) if place.stack == stack and found.heads[n] is None}
    others = sum(worth.off.layer in unknown and not worth.off.router for worth in found.worths)
    return f"{text} What {others} more attend to is not known, as they keep a state." if others else text


def _stacks(found: Inspection) -> list[str]:
    known = {place.stack for place in found.places}
    return [stack for stack in CLASSES_OF if stack in known]


def _name(found: Inspection, worth: Worth) -> str:
    off = worth.off
    if not off.router:
        return f"head {found.places[off.layer].title}.{off.member}"
    return f"expert {off.layer}.{off.group}.{off.member} of {off.router}"


def _interval(worth: Worth) -> str:
    if worth.low is None or worth.high is None:
        return f"{worth.rise:+.4f} (no interval)"
    return f"{worth.rise:+.4f} [{worth.low:+.4f}, {worth.high:+.4f}]"


def _head_rows(found: Inspection, stack: str) -> Iterator[list[str]]:
    classes = CLASSES_OF[stack]
    share = [] if stack else ["share"]
    yield ["head (layer.number)", "class", *share, *classes, "rise of the loss without it [95 %]"]
    rises = {(w.off.layer, w.off.member): w for w in found.worths if not w.off.router}
    for (layer, head), worth in sorted(rises.items()):
        place, row = found.places[layer], found.heads[layer]
        if place.stack != stack:
            continue
        name = f"{place.title}.{head}"
        if row is None:
            yield [name, "not known", *["-"] * len(share), *["-"] * len(classes), _interval(worth)]
            continue
        scores = [_score(float(row.scores[kind][head])) for kind in classes]
        used = [f"{row.share[head]:.1%}"] if share else []
        yield [name, row.name(head), *used, *scores, _interval(worth)]


def _cross_rows(found: Inspection) -> Iterator[list[str]]:
    yield ["head (layer.number)", "entropy", "of equal attention", "places", "tokens"]
    for one in found.cross:
        yield [
            f"cross {one.layer}.{one.head}",
            f"{one.entropy:.2f}",
            "-" if one.of_uniform is None else f"{one.of_uniform:.0%}",
            ", ".join(f"{each.what}: {each.share:.0%} ({each.ratio:.1f}x)" for each in one.places),
            ", ".join(f"{_shown(str(each.what))} {each.share:.0%} ({each.ratio:.1f}x)" for each in one.tokens) or "-",
        ]


def _score(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"


def _expert_rows(found: Inspection) -> Iterator[list[str]]:
    yield ["router", "expert (layer.group.number)", "share", "gate", "rise of the loss without it [95 %]", "tokens",
           "contexts"]  # fmt: skip
    rises = {(w.off.layer, w.off.router, w.off.group, w.off.member): w for w in found.worths if w.off.router}
    for one in found.experts:
        worth = rises.get((one.layer, one.router, one.group, one.expert))
        yield [
            one.router,
            f"{one.layer}.{one.group}.{one.expert}",
            f"{one.share:.1%}",
            f"{one.gate:.2f}",
            "as its head" if worth is None else _interval(worth),
            ", ".join(f"{_shown(text)} {lift:.1f}x ({count})" for text, lift, count in one.tokens) or "-",
            " | ".join(_shown(text) for text in one.contexts) or "-",
        ]


def _shown(text: str) -> str:
    """A text of the model on one line, in quotation marks."""
    return "\u201c" + text.replace("\n", "\u21b5").replace("\t", "\u21e5").replace("`", "'") + "\u201d"


def draw(found: Inspection, folder: Path) -> Plot:
    """Worth of each head, layer by layer, with its class; a panel for each stack."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {stack: _rises(found, stack) for stack in _stacks(found)}
    most = max(1e-12, *(float(np.nanmax(np.abs(values))) for _, values in panels.values()))
    heights = [1.6 + 0.42 * len(values) for _, values in panels.values()]
    widest = max(values.shape[1] for _, values in panels.values())
    with plt.rc_context({**STYLE, "svg.hashsalt": "inspection"}):
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(min(14.0, 2.0 + 0.62 * widest), sum(heights)), layout="constrained", squeeze=False,
            height_ratios=heights,
        )  # fmt: skip
        image = None
        for axis, (stack, (rows, values)) in zip(axes[:, 0], panels.items(), strict=True):
            image = axis.imshow(values, cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto")
            for (layer, head), value in np.ndenumerate(values):
                row = rows[layer]
                if row is not None and not np.isnan(value):
                    colour = "white" if abs(value) > 0.6 * most else "black"
                    name = row.name(head)
                    axis.text(
                        head, layer, "" if name == "mixed" else name, ha="center", va="center", fontsize=7, color=colour
                    )
            if stack:
                axis.set_title(STACKS[stack])
            axis.set_xlabel("head")
            axis.set_ylabel("layer")
            axis.set_yticks(range(len(values)))
            axis.grid(visible=False)
        assert image is not None
        figure.colorbar(image, ax=axes[:, 0].tolist(), label="rise of the loss (nats per predicted token)")
        title = "What each head is worth, and what it attends to"
        caption = (
            "Colour: rise of the loss on text without the head. Words: its class on repeated random tokens, if it "
            "has one."
        )
        return save(figure, folder, "inspection", title=title, caption=caption)


def _rises(found: Inspection, stack: str) -> tuple[list[HeadScores | None], np.ndarray]:
    """(scores of each layer, rises of the loss [layers, heads], nan where there is no head) of a stack."""
    numbers = {number: place.layer for number, place in enumerate(found.places) if place.stack == stack}
    worth = {(w.off.layer, w.off.member): w.rise for w in found.worths if not w.off.router and w.off.layer in numbers}
    values = np.full((len(numbers), max(head for _, head in worth) + 1), np.nan)
    for (number, head), rise in worth.items():
        values[numbers[number], head] = rise
    return [found.heads[number] for number in numbers], values


def json_of(found: Inspection) -> dict[str, Any]:
    heads: list[dict[str, Any]] = []
    for place, row in zip(found.places, found.heads, strict=True):
        for head in range(0 if row is None else len(row.share)):
            assert row is not None
            scores = {kind: float(values[head]) for kind, values in row.scores.items()}
            heads.append({**place.keys, "head": head, "class": row.name(head), "share": float(row.share[head]),
                          "scores": scores})  # fmt: skip
    return {
        "kind": "inspection",
        "format": 1,
        "model": found.identity,
        "loss": found.loss,
        "targets": found.targets,
        "sequences": found.sequences,
        "heads": heads,
        "worths": [
            {**w.off._asdict(), **found.places[w.off.layer].keys, "rise": w.rise, "low": w.low, "high": w.high}
            for w in found.worths
        ],
        "experts": [asdict(one) for one in found.experts],
        "likeness": {found.places[layer].title: one for layer, one in found.likeness.items()},
        **({"cross": [asdict(one) for one in found.cross]} if found.cross else {}),
    }
