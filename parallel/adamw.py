"""AdamW without PyTorch's compiler, whose import takes a rank one to two seconds.

`torch.optim.Optimizer` marks its methods as not to be compiled, and imports the compiler (`torch._dynamo`) for that
when one is first called. Headway never compiles the optimizer. A rank that compiles a part of its model imports it
then.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

_plain_step: Callable[..., Any] = inspect.unwrap(torch.optim.AdamW.step)


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with the same arithmetic; its methods are PyTorch's own, without the marks."""

    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return _plain_step(self, closure)
