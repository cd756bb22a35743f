"""Report section on uptraining: losses over alpha, and the comparison with training from scratch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from headway.launcher.compare.analyse import StudyResult
from headway.launcher.compare.stats import Estimate
from headway.launcher.compare.uptraining import Uptraining, uptraining_of
from headway.launcher.report.page import Block, Heading, Image, Table, Text
from headway.launcher.report.plots.study import Plot


def uptraining_blocks(result: StudyResult, plots: Mapping[str, Plot]) -> Iterator[Block]:
    """The section; nothing for a study without variants that have `from`."""
    found = uptraining_of(result)
    if found is None:
        return
    yield Heading("Uptraining")
    yield Text(
        "Alpha: tokens of the uptraining over those of the teacher; at alpha 0, the converted model without training. "
        "FLOPs are those of training, over those of the teacher's whole training: of the uptraining alone, for a "
        f"teacher that is there anyway, and with the teacher's. Losses: validation loss in {result.unit}, mean over "
        "seeds with a 95 % interval of its own. Differences to the teacher are paired, with intervals that hold for "
        "all rows at once. The uptraining reads the data in the order of its seed from the beginning: a teacher of the "
        "study has read these batches before."
    )
    yield Table(list(_curve(found)), frozenset({0, 1}))
    for name, loss, tokens in found.others:
        yield Text(
            f"Teacher {name}: loss {loss:.4f} before the conversion, on {tokens:,} tokens of the validation split "
            "(card of the conversion)."
        )
    if "uptraining" in plots:
        yield Image(plots["uptraining"])
    yield from _against_scratch(found)


def _curve(found: Uptraining) -> Iterator[list[str]]:
    yield [
        "method",
        "conversion",
        "alpha",
        "tokens",
        "FLOPs, uptraining",
        "FLOPs, with teacher",
        "n",
        "loss [95 %]",
        "sd over seeds",
        "difference to the teacher [95 %, all at once]",
    ]
    for name, loss in found.teachers.items():
        sd = "-" if loss.sd is None else f"{loss.sd:.4f}"
        yield [f"{name}, teacher", "-", "-", "-", "-", "1.000", str(loss.n), _interval(loss), sd, "-"]
    for method in found.methods:
        for p in method.points:
            sd = "-" if p.loss.sd is None else f"{p.loss.sd:.4f}"
            yield [
                method.name,
                method.what,
                f"{p.alpha:g}",
                f"{p.tokens:,}",
                f"{p.flops:.3f}",
                f"{1 + p.flops:.3f}",
                str(p.loss.n),
                _interval(p.loss),
                sd,
                "-" if p.difference is None else _interval(p.difference, sign="+"),
            ]


def _against_scratch(found: Uptraining) -> Iterator[Block]:
    yield Heading("Uptrained or from scratch", 3)
    if not found.versus:
        yield Text(
            "Not measured: the study has no variant with `compute: {of: NAME, teacher: counted}`, which trains from "
            "scratch with the FLOPs of an uptrained one."
        )
        return
    yield Text(
        "Both have the same training FLOPs, to within one step. Teacher counted: they include the teacher's whole "
        "training, for a reader who has no trained model. Teacher free: those of the uptraining alone, for a reader "
        "who has one. Differences are paired; below 0, uptraining is better."
    )
    rows = [
        ["uptrained", "from scratch", "teacher", "tokens from scratch", "n", "difference [95 %, all at once]", "reads"]
    ]
    for v in found.versus:
        rows.append(
            [
                v.uptrained,
                v.scratch,
                v.teacher,
                f"{v.tokens:,}",
                str(v.difference.n),
                _interval(v.difference, sign="+"),
                _reads(v.difference),
            ]
        )
    yield Table(rows, frozenset({0, 1, 2, 6}))


def _reads(difference: Estimate) -> str:
    if difference.low is None or difference.high is None or difference.low <= 0 <= difference.high:
        return "undecided"
    return "uptrained is better" if difference.high < 0 else "from scratch is better"


def _interval(e: Estimate, *, sign: str = "") -> str:
    if e.low is None or e.high is None:
        return f"{e.mean:{sign}.4f} (no interval)"
    return f"{e.mean:{sign}.4f} [{e.low:{sign}.4f}, {e.high:{sign}.4f}]"
