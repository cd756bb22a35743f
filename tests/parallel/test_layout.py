"""Process groups."""

from datetime import timedelta

import pytest
import torch.distributed as dist

from headway.parallel import layout


@pytest.mark.parametrize("given", [None, timedelta(seconds=3)])
def test_the_timeout_of_the_spec_reaches_groups_that_are_made_without_one(monkeypatch, given):
    made = []
    monkeypatch.setattr(layout, "_new_group", lambda *args, **kwargs: made.append(kwargs["timeout"]))
    for module in (dist, layout.distributed_c10d):  # put back after the test
        monkeypatch.setattr(module, "new_group", module.new_group)
    layout._set_default_group_timeout(timedelta(seconds=7))
    for module in (dist, layout.distributed_c10d):
        module.new_group([0], timeout=given)
    assert made == [given or timedelta(seconds=7)] * 2
