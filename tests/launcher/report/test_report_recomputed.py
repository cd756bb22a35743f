"""The section on FLOPs of a larger model says of which layers the counted FLOPs are not those of training."""

from __future__ import annotations

from typing import Any

import pytest

from headway.launcher.report.bounds import bound_blocks
from headway.launcher.report.page import Text
from headway.launcher.report.recomputed import recomputation

ROW = {"num_params": 10, "speed_up": {"64": 1.0}, "kv_bytes_per_token": {"64": 8.0}}
BOUNDS = {"spec": "large.yaml", "seq_len": [64], "variants": {"gqa": ROW, "other": ROW}}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"attention.type": "gated_delta"}, True),
        ({"attention": {"type": "mixed", "kinds": {"linear": {"type": "gated_delta"}}}}, True),
        ({"attention.kinds.linear.type": "gated_delta"}, True),
        ({"attention.type": "rgqa", "name": "gated_delta"}, False),
    ],
)
def test_training_is_said_to_execute_more_where_states_are_computed_again(keys: dict[str, Any], says: bool) -> None:
    ladder = {"baseline": "gqa", "bounds": BOUNDS, "match": None}
    study = ladder | {"variants": [{"name": "other", "keys": keys}]}
    for blocks in (bound_blocks(study, [], None), bound_blocks(ladder, [], None, studies=[study])):
        (text,) = (block.text for block in blocks if isinstance(block, Text))
        assert ("to five times its forward FLOPs, not three times" in text) == bool(recomputation(study)) == says
