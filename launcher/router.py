"""Router figures of a step, summed over ranks: what is logged, and what loss-free balancing learns from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from headway.model.base import Attention
from headway.parallel.layout import Layout


class RouterMonitor:
    """Collects each routed layer's sums after every optimizer step; does nothing for dense mechanisms."""

    def __init__(self, layers: Sequence[Attention], layout: Layout) -> None:
        self._layers, self._layout = layers, layout

    def after_step(self) -> dict[str, Any]:
        """{"layer_00": {"q": {"load", "entropy", "margin", "dead"}}}; `load` [G][M] sums to 1 per group.

        `entropy` is the mean over tokens and groups in nats, `margin` that of the lowest chosen logit over the best
        other; `dead` counts heads chosen by less than 1 in 1000 selections of their group in this step. Biases are
        updated on the way.
        """
        entries = [(i, name, s) for i, layer in enumerate(self._layers) for name, s in layer.router_stats().items()]
        if not entries:
            return {}
        # One vector and one all-reduce for all layers.
        flat = torch.cat(
            [
                torch.cat([s.load.flatten().double(), torch.stack([s.tokens, s.entropy, s.margin]).double()])
                for *_, s in entries
            ]
        )
        self._layout.sum(flat)
        record: dict[str, Any] = {}
        loads: dict[int, dict[str, torch.Tensor]] = {}
        offset = 0
        for i, name, s in entries:
            size = s.load.numel()
            load = flat[offset : offset + size].view_as(s.load)
            tokens, entropy, margin = flat[offset + size : offset + size + 3].tolist()
            offset += size + 3
            loads.setdefault(i, {})[name] = load
            share = load / load.sum(-1, keepdim=True).clamp_min(1)
            per_group = max(1.0, tokens * s.load.shape[0])
            record.setdefault(f"layer_{i:02d}", {})[name] = {
                "load": [[round(x, 5) for x in group] for group in share.tolist()],
                "entropy": entropy / per_group,
                "margin": margin / per_group,
                "dead": int((share < 1e-3).sum()),
            }
        for i, layer in enumerate(self._layers):
            layer.after_step(loads.get(i, {}))
            layer.reset_router_stats()
        return record

    def pause(self) -> None:
        """Forget what was counted since the last step (nothing outside training may count)."""
        for layer in self._layers:
            layer.reset_router_stats()
