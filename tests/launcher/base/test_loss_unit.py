"""The unit of a loss follows from what a run predicts."""

from __future__ import annotations

from typing import Any

import pytest

from headway.launcher.base.loss_unit import PER_TARGET, PER_TOKEN, loss_unit


@pytest.mark.parametrize(
    ("data", "unit"),
    [
        ({"source": {"type": "mds", "path": "a"}}, PER_TOKEN),
        ({"source": {"type": "mix", "sources": []}}, PER_TOKEN),
        ({"source": {"type": "pairs", "path": "a", "loss": "targets"}}, PER_TARGET),
        ({"source": {"type": "pairs", "path": "a"}}, PER_TARGET),
        ({"source": {"type": "pairs", "path": "a", "loss": "all"}}, PER_TOKEN),
        ({"source": {"type": "synthetic", "task": "mqar"}}, PER_TARGET),
        ({"source": {"type": "mds", "path": "a"}, "encoder_tokens": 64}, PER_TARGET),
        ({"source": {"type": "mds", "path": "a"}, "encoder_tokens": None}, PER_TOKEN),
        ({}, PER_TOKEN),
        (None, PER_TOKEN),
    ],
)
def test_a_loss_is_per_target_where_targets_alone_are_predicted(data: Any, unit: str) -> None:
    assert loss_unit({"data": data}) == unit
