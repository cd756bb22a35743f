"""The values that a rank holds of a parameter, with and without ZeRO-3."""

import math
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from headway.model.attention.rgqa import RgqaConfig
from headway.model.base import Ranks, Shard
from headway.model.config import ModelConfig
from headway.model.decoder import Block
from headway.model.shard import cut_attention
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


def test_buffers_of_a_mechanism_are_split_and_saved_as_it_declares():
    config = RgqaConfig.model_validate(
        {"heads": 8, "kv_heads": 4, "head_dim": 4, "top_k": 1, "balance": {"f_p": 0.0, "loss_free_rate": 0.1}}
    )
    parts = []
    for index in range(2):
        block = Block(ModelConfig(width=16, layers=1, ffn_width=16), config)
        block.attn.register_buffer("power", torch.arange(24.0).reshape(3, 8))
        block.attn.register_buffer("everywhere", torch.arange(6.0))
        block.attn.register_buffer("unsaved", torch.arange(8.0), persistent=False)
        block._attention_shards = config.shards() | {"power": Shard(1, 4), "unsaved": Shard(0, 4)}
        cut_attention(block.attn, block._attention_shards, Ranks(index=index, count=2))
        assert block.attn.get_buffer("unsaved").tolist() == torch.arange(8.0).chunk(2)[index].tolist()
        parts.append(Engine.buffers(cast(Engine, SimpleNamespace(blocks={3: block}))))
    dims = {name.removeprefix("blocks.3.attn."): buffer.dim for name, buffer in parts[0].items()}
    router = next(name for name in dims if name.endswith("router.bias"))
    assert dims == {"power": 1, "everywhere": None, router: 0}
    power = torch.cat([part["blocks.3.attn.power"].tensor for part in parts], dim=1)
    assert torch.equal(power, torch.arange(24.0).reshape(3, 8))
    assert all(part["blocks.3.attn.everywhere"].tensor.tolist() == list(range(6)) for part in parts)
