"""Where the speeds of a report come from: steps of cells that trained alone, or a timing part of the study.

The speed of a cell that trained beside others depends on them: they share caches, memory bandwidth and the boost clock.
A study with several jobs therefore times all variants alone, step by step in turns, in one process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from headway.launcher.compare.cell_results import FULL, CellResult
from headway.launcher.compare.stats import Speed
from headway.launcher.run.run_dir import identity, read_mapping

FILE = "timing.json"
"""File in the folder of a study: seconds of the timed steps of each variant, and where they were measured."""

Source = Literal["cells", "timing", "missing"]


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """The speeds of a study. `source`: steps of cells that trained alone; the timing part; missing: neither.

    `beside`: most other cells beside a finished cell. `by_variant`: variant -> seed (cells) or round (timing) -> speed;
    empty if they are missing. `why`: why they are missing. `card`: `machine` and `versions` of the timing part, which
    may be others than those of the cells.
    """

    source: Source
    beside: int
    by_variant: dict[str, dict[int, Speed]]
    why: str = ""
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> dict[str, dict[int, float]]:
        return {v: {key: s.tokens_per_s for key, s in found.items()} for v, found in self.by_variant.items()}

    @property
    def rounds(self) -> int:
        """Rounds of the timing part."""
        return max((len(found) for found in self.by_variant.values()), default=0) if self.source == "timing" else 0

    def seconds(self, variant: str, tokens: float) -> float | None:
        """Training seconds of `tokens` at the median speed of the timing part; None without it."""
        found = sorted(s.tokens_per_s for s in self.by_variant.get(variant, {}).values())
        return tokens / found[len(found) // 2] if found and self.source == "timing" else None


def speeds_of(out: Path, record: Mapping[str, Any], cells: Sequence[CellResult], records: Path | None) -> Speeds:
    """The speeds of a study in the folder `out` with the content `record` of study.json. `records`: of its cells."""
    done = [c for c in cells if c.done and c.budget == FULL]
    beside = max((c.beside for c in done), default=0)
    if beside == 0:
        own: dict[str, dict[int, Speed]] = {}
        for c in done:
            if c.speed is not None:
                own.setdefault(c.variant, {})[c.seed] = c.speed
        return Speeds(source="cells", beside=0, by_variant=own)
    where = records if records is not None and not read_timing(out) else out
    stored = read_timing(where)
    if missing := untimed(record, stored):
        why = "the variants were not timed alone" if not stored else f"{', '.join(missing)} not timed alone"
        return Speeds(source="missing", beside=beside, by_variant={}, why=why)
    return Speeds(
        source="timing",
        beside=beside,
        by_variant={name: _rounds(stored[name]) for name in (v["name"] for v in record["variants"])},
        card=read_mapping(where / FILE),
    )


def read_timing(out: Path) -> dict[str, dict[str, Any]]:
    """Variant -> its timing record in the folder of a study; empty without a readable file."""
    found = read_mapping(out / FILE)
    variants = found.get("variants") if found.get("format") == 1 else None
    return {name: one for name, one in variants.items() if _is_whole(one)} if isinstance(variants, dict) else {}


def untimed(record: Mapping[str, Any], stored: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Variants of study.json without a timing of their present spec."""
    specs = first_specs(record)
    return [name for name, spec in specs.items() if stored.get(name, {}).get("spec") != speed_key(spec)]


def first_specs(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Variant -> the resolved spec of the full run of its first seed in study.json."""
    seed = record["seeds"][0]
    return {
        c["variant"]: c["spec"] for c in record["cells"] if c["seed"] == seed and float(c.get("budget", FULL)) == FULL
    }


def speed_key(spec: Mapping[str, Any]) -> str:
    """sha256 (16 hex digits) of what the speed of a spec depends on: all but its seeds, names and folders."""
    flat = {k: v for k, v in identity(dict(spec)).items() if k not in ("seed", "data.seed")}
    launch = spec.get("launch") or {}
    facts = [flat, {key: launch.get(key) for key in ("device", "threads", "processes")}]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _is_whole(one: Any) -> bool:
    return (
        isinstance(one, dict)
        and isinstance(one.get("tokens_per_step"), int)
        and isinstance(one.get("step_s"), list)
        and len(one["step_s"]) > 1
        and all(isinstance(s, int | float) and s > 0 for s in one["step_s"])
    )


def _rounds(one: Mapping[str, Any]) -> dict[int, Speed]:
    """Round -> speed of its step."""
    speeds = [one["tokens_per_step"] / s for s in one["step_s"]]
    return {i: Speed(tokens_per_s=s, low=s, high=s, steps=1) for i, s in enumerate(speeds, 1)}
