"""Read the router and head records of a run. Does not import torch. Values that an older run lacks are NaN or absent.

Legend: G groups, N experts per group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ROUTER_KEYS = (
    "entropy",
    "gate",
    "top1_margin",
    "close",
    "switch_rate",
    "mutual_information",
    "information_bias",
    "information_share",
)
"""Recorded figures of a router (`headway.model.measure.router_meter.RouterFigures`) with one value per group."""

HEAD_KEYS = ("c_w", "c_q", "c_o", "effective_rank", "cka")
"""Recorded measures of the heads of a layer (`headway.model.measure.diversity.HeadDiversity`)."""


@dataclass(frozen=True, kw_only=True)
class Router:
    """Figures of one router, averaged over the records in the last tenth of a run.

    `load` [G, N]: share of each expert within its group (rows sum to 1). `means`: each of `ROUTER_KEYS`, mean over
    groups. `dead`: number of experts that almost no token selected, in the last record.
    """

    layer: str
    name: str
    load: Floats
    means: Mapping[str, float]
    dead: int

    @property
    def effective(self) -> float:
        """Effective number of experts, 1 to N: exp of the entropy of the load, mean over groups."""
        logs = np.log(np.where(self.load > 0, self.load, 1.0))
        return float(np.exp(-(self.load * logs).sum(1)).mean())


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Head diversity over a run, with one entry per record in order of steps.

    `layers`: layer -> each of `HEAD_KEYS`. `member`: kind of the compared members; `members`: number of members per
    group. Where layers differ, the kinds are joined by " or ", and `members` is 0.
    """

    member: str
    members: int
    tokens: Floats
    layers: Mapping[str, Mapping[str, Floats]]

    def mean(self, key: str) -> Floats:
        """Mean of a measure over layers."""
        return np.mean([values[key] for values in self.layers.values()], axis=0)


def read_routers(train: Iterable[dict[str, Any]]) -> tuple[Router, ...]:
    """Read the routers from the train records in the last tenth of a run, in order of steps."""
    seen: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in train:
        layers = record.get("router")
        for layer, routers in layers.items() if isinstance(layers, dict) else ():
            for name, values in routers.items() if isinstance(routers, dict) else ():
                if isinstance(values, dict) and values.get("load"):
                    seen.setdefault((layer, name), []).append(values)
    return tuple(
        Router(
            layer=layer,
            name=name,
            load=np.mean([np.asarray(v["load"], dtype=np.float64) for v in found], axis=0).round(6),
            means={
                key: significant(mean(number for v in found for number in numbers(v.get(key)))) for key in ROUTER_KEYS
            },
            dead=int(np.nansum(numbers(found[-1].get("dead")))),
        )
        for (layer, name), found in sorted(seen.items())
    )


def mean_routers(runs: Iterable[tuple[Router, ...]]) -> tuple[Router, ...]:
    """Average routers over seeds. `dead` is the largest value of any seed."""
    same: dict[tuple[str, str], list[Router]] = {}
    for routers in runs:
        for router in routers:
            same.setdefault((router.layer, router.name), []).append(router)
    return tuple(
        Router(
            layer=layer,
            name=name,
            load=np.mean([r.load for r in found], axis=0),
            means={key: mean(r.means[key] for r in found) for key in ROUTER_KEYS},
            dead=max(r.dead for r in found),
        )
        for (layer, name), found in sorted(same.items())
    )


def read_heads(records: Sequence[dict[str, Any]]) -> Heads | None:
    """Read head diversity from the records of kind heads, in order of steps; None if there are none."""
    records = [r for r in records if isinstance(r.get("layers"), dict) and r["layers"]]
    if not records:
        return None
    first = records[0]["layers"]
    kinds, sizes = ({str(one.get(key)): one.get(key) for one in first.values()} for key in ("member", "members"))
    alike = len(kinds) == len(sizes) == 1
    return Heads(
        member=" or ".join(sorted(kinds)),
        members=int(next(iter(sizes.values())) or 0) if alike else 0,
        tokens=np.array([mean(numbers(r.get("tokens"))) for r in records]),
        layers={
            layer: {
                key: np.array([significant(mean(numbers(r["layers"].get(layer, {}).get(key)))) for r in records])
                for key in HEAD_KEYS
            }
            for layer in sorted(first)
        },
    )


def numbers(value: Any) -> list[float]:
    """A recorded number, or numbers per group, as a list. Values that are not numbers become NaN."""
    values = value if isinstance(value, list) else [value]
    return [float(v) if isinstance(v, int | float) and not isinstance(v, bool) else math.nan for v in values]


def significant(value: float) -> float:
    """A measure with 5 significant digits, which are more than it is known to; cell records keep them as text."""
    return float(f"{value:.5g}")


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan
