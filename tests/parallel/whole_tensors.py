"""The state of an engine as whole tensors, put together by DeepSpeed itself: what checkpoints are compared with."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.engine import MOMENTS, Engine
from headway.parallel.single_engine import SingleEngine


def whole_tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yield (key as in `Engine.read_spans`, unsharded fp32 tensor) of this rank's layers. Collective.

    A parameter that two stages share is yielded by the first one.
    """
    if isinstance(engine, SingleEngine):
        yield from ((key, tensor) for key, _, tensor in engine.read_spans())
        return
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    layout = engine.layout
    for logical in engine.logical:
        if logical.copy:
            continue
        parts = {"param": safe_get_full_fp32_param(logical.parameter)}
        parts |= {key: safe_get_full_optimizer_state(logical.parameter, key) for key in MOMENTS}
        for part, tensor in parts.items():
            assert tensor is not None, logical.name
            if logical.dim is not None and layout.tp_size > 1:
                cut = [torch.empty_like(tensor) for _ in range(layout.tp_size)]
                dist.all_gather(cut, tensor.contiguous(), group=layout.tensor_group)
                tensor = torch.cat(cut, logical.dim)
            yield f"{part}/{logical.name}", tensor
