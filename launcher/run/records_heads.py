"""What a run recorded of its routers and heads, read back. Needs no torch; what an older run lacks is NaN, or absent.

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
"""Recorded figures of a router (`headway.model.router_meter.RouterFigures`) of which there is one per group."""

HEAD_KEYS = ("c_w", "c_q", "c_o", "effective_rank", "cka")
"""Recorded measures of a layer's heads (`headway.model.diversity.HeadDiversity`)."""


@dataclass(frozen=True, kw_only=True)
class Router:
    """One router over the last tenth of a run, mean over the records in it.

    `load` [G, N]: share of each expert within its group (rows sum to 1). `means`: each of `ROUTER_KEYS`, mean over
    groups. `dead`: experts that almost no token chose, at the last record.
    """

    layer: str
    name: str
    load: Floats
    means: Mapping[str, float]
    dead: int

    @property
    def effective(self) -> float:
        """exp of the entropy of the load, mean over groups: 1 to N."""
        logs = np.log(np.where(self.load > 0, self.load, 1.0))
        return float(np.exp(-(self.load * logs).sum(1)).mean())


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Head diversity over a run; one entry per record, in order of steps.

    `layers`: layer -> each of `HEAD_KEYS`. `member`: what is compared; `members`: how many to a group, of the first
    layer that has a pool.
    """

    member: str
    members: int
    tokens: Floats
    layers: Mapping[str, Mapping[str, Floats]]

    def mean(self, key: str) -> Floats:
        """Over layers."""
        return np.mean([values[key] for values in self.layers.values()], axis=0)


def read_routers(train: Sequence[dict[str, Any]]) -> tuple[Router, ...]:
    """From the train records of a run, in order of steps."""
    seen: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in train[len(train) - max(1, len(train) // 10) :]:
        layers = record.get("router")
        for layer, routers in layers.items() if isinstance(layers, dict) else ():
            for name, values in routers.items() if isinstance(routers, dict) else ():
                if isinstance(values, dict) and values.get("load"):
                    seen.setdefault((layer, name), []).append(values)
    return tuple(
        Router(
            layer=layer,
            name=name,
            load=np.mean([np.asarray(v["load"], dtype=np.float64) for v in found], axis=0),
            means={key: mean(number for v in found for number in numbers(v.get(key))) for key in ROUTER_KEYS},
            dead=int(np.nansum(numbers(found[-1].get("dead")))),
        )
        for (layer, name), found in sorted(seen.items())
    )


def mean_routers(runs: Iterable[tuple[Router, ...]]) -> tuple[Router, ...]:
    """Routers averaged over seeds; `dead` is the worst seed's."""
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
    """From the records of kind heads, in order of steps; None where there are none."""
    records = [r for r in records if isinstance(r.get("layers"), dict) and r["layers"]]
    if not records:
        return None
    first = records[0]["layers"]
    one = next(iter(first.values()))
    return Heads(
        member=str(one.get("member")),
        members=int(one.get("members") or 0),
        tokens=np.array([mean(numbers(r.get("tokens"))) for r in records]),
        layers={
            layer: {
                key: np.array([mean(numbers(r["layers"].get(layer, {}).get(key))) for r in records])
                for key in HEAD_KEYS
            }
            for layer in sorted(first)
        },
    )


def numbers(value: Any) -> list[float]:
    """A recorded number, or numbers one per group, as a list; NaN for what is none."""
    values = value if isinstance(value, list) else [value]
    return [float(v) if isinstance(v, int | float) and not isinstance(v, bool) else math.nan for v in values]


def mean(values: Iterable[float]) -> float:
    """Of those that are numbers; NaN where there are none."""
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan
