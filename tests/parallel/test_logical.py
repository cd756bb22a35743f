"""The values that a rank holds of a parameter, with and without ZeRO-3."""

import math
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from headway.parallel.engine import Engine
from headway.parallel.logical import LogicalParameter


def partitioned(values: torch.Tensor, *, shape: tuple[int, ...]) -> nn.Parameter:
    """A parameter as ZeRO-3 leaves it between passes: a placeholder, and this rank's part."""
    parameter: Any = nn.Parameter(torch.empty(0))
    parameter.ds_shape, parameter.ds_tensor = torch.Size(shape), values
    return parameter


def test_nan_in_the_part_of_a_rank_is_named_under_zero_3():
    found = {
        "whole": nn.Parameter(torch.tensor([1.0, math.inf])),
        "fine": partitioned(torch.ones(3), shape=(2, 3)),
        "part": partitioned(torch.tensor([1.0, math.nan, 1.0]), shape=(2, 3)),
    }
    logical = [LogicalParameter(name, parameter, None) for name, parameter in found.items()]
    assert Engine.not_finite(cast(Engine, SimpleNamespace(_logical=logical))) == ["whole", "part"]
