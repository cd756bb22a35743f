"""Router figures, summed over ranks and steps, for the log and for loss-free balancing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from headway.model.base import Attention
from headway.model.measure.router_meter import figures
from headway.model.router_stats import RouterDetail
from headway.parallel.layout import Layout

_Figures = tuple[bool, dict[str, Any]]  # whether the groups are only on this tensor-parallel rank; name -> figure

MEASURED_TOKENS = 65_536
"""Number of last tokens that the detailed figures of a record cover. Loads and dead experts cover all its tokens."""


class RouterMonitor:
    """Collect the sums of each layer after every optimizer step, and compute figures of a window when a record is due.

    The window begins after the last record, or at the start of the process. Records are due at the first step, at the
    last step and every `every_steps`.
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
        # Sums of the window: (layer, router) -> loads over all ranks; details of this rank as one vector.
        self._loads: dict[tuple[int, str], Tensor] = {}
        self._details: Tensor | None = None

    def before_step(self, step: int) -> None:
        """Prepare for `step` (counted from 1). Discards values that were counted outside of steps."""
        closely = (self._due_from(step) - step) * self._tokens_per_step < MEASURED_TOKENS
        for layer in self._layers.values():
            layer.reset_router_stats()
            layer.watch_routers(closely=closely)

    def after_step(self, step: int, *, applied: bool = True) -> dict[str, Any]:
        """Update router biases if the step was `applied`. Returns {"layer_00": {"router": figures}} if a record is due.

        Figures: `headway.model.measure.router_meter.RouterFigures` as a dict, rounded, None for NaN. All ranks must
        call it.
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
        """The first step with a due record, at or after `step`."""
        regular = -(-step // self._every) * self._every
        return min([regular, *(single for single in (1, self._total) if single >= step)])

    def _sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """Float64 sums over the ranks that hold the same parameters, with one all-reduce for all tensors."""
        if not tensors:
            return []
        return _like(self._layout.sum_data(_flat(tensors)), tensors)

    def _record(
        self, details: dict[tuple[int, str], RouterDetail], cut: dict[tuple[int, str], bool]
    ) -> dict[str, dict[str, _Figures]]:
        """Figures of the routers of this rank. `details`: those of the last step, for the shapes of the window sums."""
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
        """Figures of the layers of all stages with all their groups. Figures of sharded routers are concatenated."""
        layout, merged = self._layout, dict[str, Any]()
        parts = [mine]
        if layout.tp_size * layout.pp_size > 1:  # ranks that share a layer are in the order of its groups
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
    """Concatenate tensors into one float64 vector."""
    return torch.cat([t.flatten() for t in tensors]).double()


def _like(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """The inverse of `_flat`, in the shapes of `tensors`."""
    parts = flat.split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


def _plain(value: Any) -> Any:
    """Round to five decimals and replace NaN with None, for JSON."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 5)
    return value
