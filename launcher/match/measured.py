"""Match sizes by measured time, and store them in the study's folder, so that a continued study keeps its sizes."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.launcher.base import console
from headway.launcher.base.console import Bar
from headway.launcher.base.errors import SpecError
from headway.launcher.match.matching import (
    MatchConfig,
    Matched,
    Spread,
    beyond_tolerance,
    candidate,
    check_free,
    nothing_legal,
    spec_cost,
    spec_with,
    value_at,
)
from headway.launcher.match.search import Candidates, Illegal
from headway.launcher.match.time import Build, Pass, Ratios, TimeSolver, compare, decoder_pass
from headway.launcher.run.machine import machine, versions
from headway.launcher.run.run_dir import identity, read_mapping, write_json

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec

FILE = "matching.json"
"""File in the study's folder: key of a measurement -> its result."""

HEAVIEST = 8.0
"""Sizes with more than this many times the baseline's FLOPs or parameters are not built: they cannot be as fast."""


class Measurements:
    """Measurements of a study, keyed by specs, match, machine and versions. Missing ones are measured on demand.

    `stored` is the content of `matching.json`. `build` creates the pass that is timed (default: `decoder_pass`).
    """

    def __init__(self, stored: dict[str, Any] | None = None, *, build: Build | None = None) -> None:
        self.stored = dict(stored or {})
        self._build = build or decoder_pass
        self._baseline: tuple[str, Pass] | None = None

    @classmethod
    def of(cls, out: Path) -> Measurements:
        """Read the measurements in the study's folder; empty if there are none, or if the file is damaged."""
        return cls(read_mapping(out / FILE))

    def write(self, out: Path) -> None:
        """Write the measurements to the study's folder."""
        if self.stored:
            write_json(out / FILE, self.stored)

    def match(self, variant: str, spec: Spec, baseline: Spec, match: MatchConfig) -> Matched:
        """Solve `match.free` so that `spec` takes the baseline's time. Both specs must have their vocabulary size set.

        Raises SpecError if no size is legal, if the time does not depend on the dimension, or if the nearest size
        differs from the baseline by more than the tolerance.
        """
        head = f"variant {variant}: match.free {match.free}"
        check_free(spec, match, head)
        key = _key(spec, baseline, match)
        if key not in self.stored:
            console.say(f"measuring {variant}: solving {match.free} for the baseline's time per micro-batch")
            self.stored[key] = {
                "variant": variant,
                **self._solved(head, spec, baseline, match),
                "machine": machine(),
                "versions": versions(),
                "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
        kept = self.stored[key]["matched"]
        return Matched(**{**kept, "spread": Spread(**kept["spread"])})

    def _solved(self, head: str, spec: Spec, baseline: Spec, match: MatchConfig) -> dict[str, Any]:
        theirs = self._baseline_pass(baseline, match)
        candidates = _buildable(spec, baseline, match)
        with console.progress(f"measure {match.free}", unit="passes", tick=False) as bar:

            def measure(value: int, rounds: int) -> Ratios:
                ours = self._build(spec_with(spec, match.free, value), match.seq_len or spec.data.seq_len)
                return compare(_counted(ours, bar), theirs, rounds=rounds)

            return self._search(head, TimeSolver(measure, candidates), candidates, spec, match)

    def _search(
        self, head: str, solver: TimeSolver, candidates: Candidates, spec: Spec, match: MatchConfig
    ) -> dict[str, Any]:
        if not solver.look(value_at(spec, match.free)):
            raise SpecError(nothing_legal(head, candidates, match))
        if not solver.is_affected():
            raise SpecError(
                f"{head}: the measured time does not depend on it beyond the noise, from {min(solver.points)} to "
                f"{max(solver.points)}; free a dimension that takes time, such as model.ffn_width, or use "
                "match.quantity: flops"
            )
        value, ratios = solver.check()
        matched = Matched(
            free=match.free,
            value=value,
            cost=ratios.candidate_s,
            target=ratios.baseline_s,
            residual=ratios.median - 1,
            spread=Spread(low=ratios.low - 1, high=ratios.high - 1, rounds=ratios.rounds),
        )
        if abs(matched.residual) > match.tolerance:
            found = (
                f"{1e3 * matched.cost:.4g} ms per pass, the baseline takes {1e3 * matched.target:.4g} ms (quartiles "
                f"{ratios.low - 1:+.2%} to {ratios.high - 1:+.2%} over {ratios.rounds} rounds)"
            )
            raise SpecError(beyond_tolerance(head, matched, match, candidates, found))
        return {"matched": asdict(matched), "points": {v: asdict(r) for v, r in sorted(solver.points.items())}}

    def _baseline_pass(self, baseline: Spec, match: MatchConfig) -> Pass:
        key = _key(baseline, baseline, match)
        if self._baseline is None or self._baseline[0] != key:
            self._baseline = (key, self._build(baseline, match.seq_len or baseline.data.seq_len))
        return self._baseline[1]


def _counted(run: Pass, bar: Bar) -> Pass:
    """The bar is drawn between passes, while no time is taken."""

    def counted() -> float:
        seconds = run()
        bar.update()
        return seconds

    return counted


def _buildable(spec: Spec, baseline: Spec, match: MatchConfig) -> Candidates:
    """Legal sizes below `HEAVIEST` times the baseline's cost; their counted cost is executed FLOPs."""
    vocab_size, limit = spec.model.vocab_size, spec_cost(baseline, baseline.model.vocab_size or 0, match.seq_len)
    assert vocab_size is not None

    def cost(value: int) -> float:
        counted = candidate(spec, match, value, vocab_size)[1]
        for name, own, most in (
            ("FLOPs", counted.flops_per_token.executed, limit.flops_per_token.executed),
            ("parameters", counted.num_params, limit.num_params),
        ):
            if own > HEAVIEST * most:
                raise Illegal(f"it has {own / most:.1f} times the baseline's {name}")
        return counted.flops_per_token.executed

    return Candidates(cost, multiple=match.multiple)


def _key(spec: Spec, baseline: Spec, match: MatchConfig) -> str:
    """sha256 (16 hex digits) of everything on which a measurement depends."""
    facts = {
        "match": match.model_dump(),
        "machine": machine(),
        "versions": versions(),
        "specs": [
            {**identity(s.model_dump(mode="json")), "launch": s.launch.model_dump(exclude={"port", "timeout_s"})}
            for s in (baseline, spec)
        ],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def spread_note(matched: Matched, match: MatchConfig) -> str | None:
    """A note about a measured size whose quartiles exceed the tolerance; None if they do not."""
    spread = matched.spread
    if spread is None or max(-spread.low, spread.high) <= match.tolerance:
        return None
    return (
        f"the quartiles of its measured residual, {spread.low:+.2%} to {spread.high:+.2%} over {spread.rounds} rounds, "
        f"exceed the tolerance of {match.tolerance:.2%}, so the match is less certain than the tolerance"
    )
