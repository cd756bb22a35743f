"""The scalars of a record, which TensorBoard, W&B and MLflow show under the same names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

Scalars = dict[str, float]

ROUTER_MEANS = {
    "entropy": "entropy",
    "effective": "effective_experts",
    "gate": "gate",
    "top1_margin": "top1_margin",
    "close": "close_share",
    "switch_rate": "switch_rate",
    "mutual_information": "mutual_information",
    "information_share": "mutual_information_share",
}
"""Key of `headway.model.measure.router_meter.RouterFigures` -> name of its mean over groups."""

_OVER_LAYERS: dict[str, Callable[[list[float]], float]] = {"dead": sum, "peak": max}
"""Figures of routers of which all layers have no mean but a sum, or the largest value."""

HEAD_MEASURES = ("c_w", "c_q", "c_o", "effective_rank", "cka")
"""Measures of `headway.model.measure.diversity.HeadDiversity`."""


def scalars_of(record: Mapping[str, Any], *, per_layer: bool) -> Scalars:
    """The scalars of a record by name; none if its kind is not shown.

    `per_layer`: with the figures of each layer, in addition to those over all layers. Raises KeyError, TypeError,
    ValueError, AttributeError or IndexError for a record that does not have Headway's format.
    """
    read = _OF_KIND.get(record["kind"])
    return {} if read is None else read(record, per_layer)


def _train(record: Mapping[str, Any], per_layer: bool) -> Scalars:
    found = {
        "train/loss": record["loss"],
        "train/perplexity": _perplexity(record["loss"]),
        "train/aux_loss": record["aux_loss"],
        "train/grad_norm": record["grad_norm"],
        "train/lr": record["lr"],
        "train/tokens": record["tokens"],
    }
    if not record.get("profiled"):  # the profiler makes a step slower
        found["perf/tokens_per_s"] = record["tokens_per_s"]
        found["perf/data_wait_share"] = record["data_s"] / max(1e-9, record["step_s"])
    if "router" in record:
        found |= _routers(record["router"], per_layer)
    return found


def _validation(record: Mapping[str, Any], per_layer: bool) -> Scalars:
    found = {
        "val/loss": record["loss"],
        "val/perplexity": _perplexity(record["loss"]),
        "val/accuracy": record["accuracy"],
    }
    if "loss_low" in record:
        found |= {"val/loss_low": record["loss_low"], "val/loss_high": record["loss_high"]}
    if "bits_per_byte" in record:
        found["val/bits_per_byte"] = record["bits_per_byte"]
    for name, one in record.get("sets", {}).items():
        found[f"val_sets/{name}"] = one["loss"]
        if "loss_low" in one:
            ends = {"low": one["loss_low"], "high": one["loss_high"]}
            found |= {f"val_sets_{end}/{name}": value for end, value in ends.items()}
        if "bits_per_byte" in one:
            found[f"val_sets_bits_per_byte/{name}"] = one["bits_per_byte"]
    return found


def _heads(record: Mapping[str, Any], per_layer: bool) -> Scalars:
    """`heads/mean/MEASURE`, and `heads/LAYER/MEASURE`."""
    found, layers = Scalars(), record["layers"]
    for key in HEAD_MEASURES:
        if per_layer:
            found |= {f"heads/{layer}/{key}": measures[key] for layer, measures in layers.items()}
        found[f"heads/mean/{key}"] = float(np.mean([measures[key] for measures in layers.values()]))
    return found


def _routers(layers: Mapping[str, Any], per_layer: bool) -> Scalars:
    """`router/all/ROUTER_NAME` over all layers, and `router/LAYER/ROUTER_NAME`.

    `layers`: {layer: {router: figures}}, as `headway.launcher.train.router.RouterMonitor` returns.
    """
    found, over = Scalars(), dict[str, list[float]]()
    for layer, routers in layers.items():
        for name, figures in routers.items():
            for key, value in _router(figures).items():
                over.setdefault(f"{name}_{key}", []).append(value)
                if per_layer:
                    found[f"router/{layer}/{name}_{key}"] = value
    for key, values in over.items():
        of_all = _OVER_LAYERS.get(key.rpartition("_")[2], _mean)
        found[f"router/all/{key}"] = float(of_all(values))
    return found


def _router(figures: Mapping[str, Any]) -> Scalars:
    means = {short: _known_mean(figures[key]) for key, short in ROUTER_MEANS.items()}
    found = {key: value for key, value in means.items() if value is not None}
    return found | {"dead": float(sum(figures["dead"])), "peak": max(max(group) for group in figures["load"])}


def _saved(record: Mapping[str, Any], per_layer: bool) -> Scalars:
    found = {"stall_s": record["stall_s"], "write_s": record["write_s"], "failed_in_a_row": 0}
    return {f"checkpoint/{name}": value for name, value in found.items()}


def _not_saved(record: Mapping[str, Any], per_layer: bool) -> Scalars:
    return {"checkpoint/failed_in_a_row": record.get("in_a_row", 1)}


def _skipped(record: Mapping[str, Any], per_layer: bool) -> Scalars:
    return {"guard/skipped_steps": record["total"]}


_OF_KIND: dict[str, Callable[[Mapping[str, Any], bool], Scalars]] = {
    "train": _train,
    "validation": _validation,
    "heads": _heads,
    "checkpoint": _saved,
    "checkpoint_failed": _not_saved,
    "skipped": _skipped,
}

KINDS = frozenset(_OF_KIND)
"""Kinds of records that are shown."""


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 50.0))


def _known_mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return _mean(known) if known else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
