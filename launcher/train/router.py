"""Router figures, summed over ranks and steps: what is logged, and what loss-free balancing learns from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from headway.model.base import Attention, RouterDetail
from headway.model.router_meter import figures
from headway.parallel.layout import Layout

_Figures = tuple[bool, dict[str, Any]]  # whether the groups are this tensor-parallel rank's alone; figures by name

MEASURED_TOKENS = 65_536
"""Tokens of which a record has the details: the last ones before it. Loads and dead experts are of all of them."""


class RouterMonitor:
    """Collects each layer's sums after every optimizer step; figures of a window of steps when their record is due.

    The window reaches back to the last record, or to the start of the process. Due: the first step, the last one, and
    every `every_steps`.
    """

    def __init__(
        self,
        layers: Mapping[int, Attention],
        layout: Layout,
        *,
        every_steps: int,
        total_steps: int,
        tokens_per_step: int,
    ) -> None:
        self._layers, self._layout = layers, layout
        self._every, self._total, self._tokens_per_step = every_steps, total_steps, tokens_per_step
        # Sums of the window: (layer, router) -> loads over all ranks; this rank's details, all in one vector.
        self._loads: dict[tuple[int, str], Tensor] = {}
        self._details: Tensor | None = None

    def before_step(self, step: int) -> None:
        """`step` is about to be taken (from 1); what was counted outside of steps is forgotten."""
        closely = (self._due_from(step) - step) * self._tokens_per_step < MEASURED_TOKENS
        for layer in self._layers.values():
            layer.reset_router_stats()
            layer.watch_routers(closely=closely)

    def after_step(self, step: int, *, applied: bool = True) -> dict[str, Any]:
        """Update router biases if the step was `applied`; {"layer_00": {"router": figures}} where a record is due.

        Figures: `headway.model.router_meter.RouterFigures` as a dict, rounded, None for NaN. Every rank calls it.
        """
        stats = [(i, name, s) for i, layer in self._layers.items() for name, s in layer.router_stats().items()]
        details = {(i, name): s.detail for i, name, s in stats if s.detail is not None}
        if details:
            flat = _flat([t for detail in details.values() for t in detail.tensors()])
            self._details = flat if self._details is None else self._details.add_(flat)
        loads = [(i, name, s.load) for i, name, s in stats]
        others = [(i, name, t) for i, layer in self._layers.items() for name, t in layer.step_sums().items()]
        summed = self._sum([t for *_, t in loads + others])
        given: dict[int, dict[str, Tensor]] = {}
        for (i, name, _), total in zip(loads + others, summed, strict=True):
            given.setdefault(i, {})[name] = total
        for (i, name, _), load in zip(loads, summed, strict=False):
            self._loads[i, name] = load + self._loads.get((i, name), 0)
        for i, layer in self._layers.items():
            if applied:
                layer.after_step(given.get(i, {}))
            layer.reset_router_stats()
        if self._due_from(step) != step:
            return {}
        cut = {(i, name): s.cut for i, name, s in stats}
        return self._merged(self._record(details, cut))

    def _due_from(self, step: int) -> int:
        """The first step from `step` on whose record is due."""
        regular = -(-step // self._every) * self._every
        return min([regular, *(single for single in (1, self._total) if single >= step)])

    def _sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """Float64 sums over the ranks that hold the same parameters, by one all-reduce for all tensors."""
        if not tensors:
            return []
        return _like(self._layout.sum_data(_flat(tensors)), tensors)

    def _record(
        self, details: dict[tuple[int, str], RouterDetail], cut: dict[tuple[int, str], bool]
    ) -> dict[str, dict[str, _Figures]]:
        """Figures of the routers this rank holds. `details` of the last step: the shapes of the window's."""
        if self._details is None:
            return {}
        record: dict[str, dict[str, _Figures]] = {}
        shapes = [t for detail in details.values() for t in detail.tensors()]
        summed = iter(_like(self._layout.sum_data(self._details), shapes))
        for (i, name), detail in details.items():
            total = detail.like([next(summed) for _ in detail.tensors()])
            values = asdict(figures(self._loads[i, name], total))
            plain = {key: _plain(value) for key, value in values.items()}
            record.setdefault(f"layer_{i:02d}", {})[name] = (cut[i, name], plain)
        self._loads, self._details = {}, None
        return record

    def _merged(self, mine: dict[str, dict[str, _Figures]]) -> dict[str, Any]:
        """The figures of all stages' layers and of all groups of each: those of cut routers are put together."""
        layout, merged = self._layout, dict[str, Any]()
        parts = [mine]
        if layout.tp_size * layout.pp_size > 1:  # ranks that share a layer come in the order of its groups
            parts = layout.gather_json(mine if layout.data_index == 0 else {})
        for part in parts:
            for layer, routers in part.items():
                for name, (cut, values) in routers.items():
                    known = merged.setdefault(layer, {}).setdefault(name, values)
                    if cut and known is not values:
                        lists = {key: known[key] + v for key, v in values.items() if isinstance(v, list)}
                        merged[layer][name] = known | lists
        return dict(sorted(merged.items()))


def _flat(tensors: list[Tensor]) -> Tensor:
    """One float64 vector."""
    return torch.cat([t.flatten() for t in tensors]).double()


def _like(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """The inverse of `_flat`, in the shapes of `tensors`."""
    parts = flat.split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


def _plain(value: Any) -> Any:
    """Five decimals, which JSON can hold; None for NaN."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 5)
    return value
