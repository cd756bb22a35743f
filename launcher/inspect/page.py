"""The page of an inspection: a figure, a table of heads, a table of experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from headway.launcher.inspect.inspection import Inspection
from headway.launcher.inspect.patterns import CLASSES, HALF, LEAST
from headway.launcher.inspect.switched import Worth
from headway.launcher.report.page import Block, Heading, Image, Table, Text
from headway.launcher.report.plots.study import Plot, save
from headway.launcher.report.plots.style import STYLE


def blocks_of(found: Inspection, plot: Plot) -> Iterator[Block]:
    yield Heading(f"Heads and experts of {found.title}", 1)
    yield Text(_lead(found), "lead")
    yield Text(
        f"Loss of the whole model on {found.targets:,} tokens of {found.sequences} documents: {found.loss:.4f} nats "
        "per token. Rises of the loss are of this model with one part switched off and nothing trained again; "
        "intervals "
        "are over documents, for each part alone: of many parts some interval misses its value."
    )
    yield Image(plot)
    yield Heading("Heads")
    yield Text(
        f"Attention to a place, mean over the second half of {HALF} random tokens that come twice; a head is called by "
        f"its largest score from {LEAST} on, else mixed. "
        + "; ".join(f"{kind}: {meaning}" for kind, meaning in CLASSES.items())
        + ". Share: tokens that use the head, 100 % unless it is routed."
    )
    yield Table(list(_head_rows(found)), frozenset({0, 1}))
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
            rows.append([str(layer), f"{one['members']} {one['member']}s per group", *values])
        yield Table(rows, frozenset({1}))


def _lead(found: Inspection) -> str:
    names = Counter(row.name(head) for row in found.heads if row is not None for head in range(len(row.share)))
    total = sum(names.values())
    if not total:
        classes = "What heads attend to is not known: positions are relative, or heads keep a state."
    else:
        counts = ", ".join(f"{names[kind]} {kind}" for kind in (*CLASSES, "mixed", "unused") if names[kind])
        classes = f"Of {total} heads: {counts}."
    best = max(found.worths, key=lambda worth: worth.rise)
    return f"{classes} Worth most: {_name(best)}, without which the loss rises by {_interval(best)}."


def _name(worth: Worth) -> str:
    off = worth.off
    if not off.router:
        return f"head {off.layer}.{off.member}"
    return f"expert {off.layer}.{off.group}.{off.member} of {off.router}"


def _interval(worth: Worth) -> str:
    if worth.low is None or worth.high is None:
        return f"{worth.rise:+.4f} (no interval)"
    return f"{worth.rise:+.4f} [{worth.low:+.4f}, {worth.high:+.4f}]"


def _head_rows(found: Inspection) -> Iterator[list[str]]:
    yield ["head (layer.number)", "class", "share", *CLASSES, "rise of the loss without it [95 %]"]
    rises = {(w.off.layer, w.off.member): w for w in found.worths if not w.off.router}
    for (layer, head), worth in sorted(rises.items()):
        row = found.heads[layer]
        if row is None:
            yield [f"{layer}.{head}", "not known", "-", *["-"] * len(CLASSES), _interval(worth)]
            continue
        scores = [_score(float(row.scores[kind][head])) for kind in CLASSES]
        yield [f"{layer}.{head}", row.name(head), f"{row.share[head]:.1%}", *scores, _interval(worth)]


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
    """Worth of each head, layer by layer, with its class."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rises = {(w.off.layer, w.off.member): w.rise for w in found.worths if not w.off.router}
    layers, heads = max(layer for layer, _ in rises) + 1, max(head for _, head in rises) + 1
    values = np.full((layers, heads), np.nan)
    for (layer, head), rise in rises.items():
        values[layer, head] = rise
    most = max(1e-12, float(np.nanmax(np.abs(values))))
    with plt.rc_context({**STYLE, "svg.hashsalt": "inspection"}):
        size = (min(14.0, 2.0 + 0.62 * heads), 1.6 + 0.42 * layers)
        figure, axis = plt.subplots(figsize=size, layout="constrained")
        image = axis.imshow(values, cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto")
        for (layer, head), value in np.ndenumerate(values):
            row = found.heads[layer]
            if row is not None and not np.isnan(value):
                colour = "white" if abs(value) > 0.6 * most else "black"
                name = row.name(head)
                axis.text(
                    head, layer, "" if name == "mixed" else name, ha="center", va="center", fontsize=7, color=colour
                )
        axis.set_xlabel("head")
        axis.set_ylabel("layer")
        axis.set_yticks(range(layers))
        axis.grid(visible=False)
        figure.colorbar(image, ax=axis, label="rise of the loss (nats per token)")
        title = "What each head is worth, and what it attends to"
        caption = (
            "Colour: rise of the loss on text without the head. Words: its class on repeated random tokens, if it "
            "has one."
        )
        return save(figure, folder, "inspection", title=title, caption=caption)


def json_of(found: Inspection) -> dict[str, Any]:
    heads: list[dict[str, Any]] = []
    for layer, row in enumerate(found.heads):
        for head in range(0 if row is None else len(row.share)):
            assert row is not None
            scores = {kind: float(values[head]) for kind, values in row.scores.items()}
            heads.append({"layer": layer, "head": head, "class": row.name(head), "share": float(row.share[head]),
                          "scores": scores})  # fmt: skip
    return {
        "kind": "inspection",
        "format": 1,
        "model": found.identity,
        "loss": found.loss,
        "targets": found.targets,
        "sequences": found.sequences,
        "heads": heads,
        "worths": [{**w.off._asdict(), "rise": w.rise, "low": w.low, "high": w.high} for w in found.worths],
        "experts": [asdict(one) for one in found.experts],
        "likeness": {str(layer): one for layer, one in found.likeness.items()},
    }
