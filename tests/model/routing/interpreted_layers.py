"""Layers with routed products beside their dense references, in fp32 on the CPU, in Triton's interpreter.

    python -P tests/model/routing/interpreted_layers.py [MECHANISM=MODULE.FUNCTION ...]

Prints one JSON object a line for each mechanism, once by the kernels and once by their twins, or for each of those
named, by kernels of which the launch function writes a wrong last number: relative errors of y and of every gradient
against `forward_reference` in float64; how often each kernel was launched; how many numbers of the first tokens' rows,
and of the others, differ after later tokens changed. In a process of its own: Triton decides at its import whether it
interprets.

Legend: B batch, S sequence, d width.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import collections
import contextlib
import copy
import functools
import importlib
import json
import sys

import torch

from headway.kernels.checks.v0 import relative
from headway.kernels.device import interpreted
from headway.kernels.rope import rope_tables
from headway.kernels.triton import gather as triton_gather
from headway.kernels.triton import lists as triton_lists
from headway.kernels.triton import weight_grad as triton_weight_grad
from headway.model.attention.gqe import GqeConfig
from headway.model.attention.hybrid import HybridConfig
from headway.model.attention.moa import MoaConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.base import Context
from headway.model.init import initialise

BATCH, SEQ, WIDTH, CHANGED = 2, 11, 20, 7
POOL = {"heads": 8, "kv_heads": 2, "head_dim": 6, "projections": "routed"}
HEADS = {"kv_heads": 3, "head_dim": 6, "projections": "routed"}
MECHANISMS = {
    "rgqa": RgqaConfig.model_validate({**POOL, "top_k": 1}),
    "rgqa, half rotated, odd heads": RgqaConfig.model_validate(
        {**POOL, "heads": 6, "head_dim": 9, "rope_fraction": 4 / 9, "top_k": 2}
    ),
    "rgqa, normed, one always on": RgqaConfig.model_validate(
        {**POOL, "top_k": 2, "always_on": 1, "qk_norm": True, "gate": "softmax"}
    ),
    "rgqa, output slices of slots": RgqaConfig.model_validate({**POOL, "top_k": 2, "output": "slot"}),
    "gqe": GqeConfig.model_validate({**POOL, "top_k": 2}),
    "moa": MoaConfig.model_validate({"heads": 4, "head_dim": 6, "top_k": 2, "projections": "routed"}),
    "switchhead": SwitchHeadConfig.model_validate({**HEADS, "experts": 4, "top_k": 2}),
    "switchhead, one router": SwitchHeadConfig.model_validate(
        {**HEADS, "experts": 4, "top_k": 1, "shared_selection": True}
    ),
    "hybrid": HybridConfig.model_validate({**POOL, "top_k": 1, "value_experts": 3, "value_top_k": 2}),
}
LAUNCHES = {
    "lists": (triton_lists, "pair_lists"),
    "project": (triton_gather, "gather_project"),
    "slot_grad": (triton_gather, "gather_slot_grad"),
    "weight_grad": (triton_weight_grad, "weight_grad"),
}


def built(config):
    """One layer in fp32, with weights large enough that gates and scores matter."""
    module = config.build(width=WIDTH, layers=1, init_std=0.4, norm_eps=1e-5)
    initialise(module, seed=1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.4)
    return module


def trained(run, module, x, weight, context):
    """y, and gradients of a loss that weighs every output differently."""
    y = run(x, context).y
    given = {"x": x, **dict(module.named_parameters())}
    found = torch.autograd.grad((y * weight).sum(), list(given.values()), allow_unused=True)
    gradients = {f"d {name}": g for name, g in zip(given, found, strict=True) if g is not None}
    return {"y": y.detach(), **gradients}


def compared(config, by_kernels, launched):
    torch.manual_seed(1)
    module = built(config)
    x, weight = torch.randn(BATCH, SEQ, WIDTH), torch.randn(BATCH, SEQ, WIDTH)
    context = Context(rope=rope_tables(SEQ, config.rotated, config.rope_base, torch.device("cpu")), documents=None)
    exact = copy.deepcopy(module).double()
    wanted = trained(exact.forward_reference, exact, x.double().requires_grad_(), weight.double(), context)
    launched.clear()
    with interpreted() if by_kernels else contextlib.nullcontext():
        found = trained(module, module, x.clone().requires_grad_(), weight, context)
        launches = dict(launched)
        changed = torch.cat([x[:, :CHANGED], torch.randn(BATCH, SEQ - CHANGED, WIDTH)], 1)
        with torch.no_grad():
            after = module(changed, context).y
    assert found.keys() == wanted.keys()
    return {
        "errors": {name: relative(found[name], wanted[name]) for name in wanted},
        "launches": launches,
        "earlier": int((after[:, :CHANGED] != found["y"][:, :CHANGED]).sum()),
        "later": int((after[:, CHANGED:] != found["y"][:, CHANGED:]).sum()),
    }


def counting(name, right, launched, *args):
    launched[name] += 1
    return right(*args)


@contextlib.contextmanager
def broken(name):
    """Let a launch function write a wrong last number."""
    module, _, function = name.rpartition(".")
    module = importlib.import_module(module)
    right = getattr(module, function)

    def wrong(*args):
        right(*args)
        args[-1].view(-1)[-1] = -7  # not of the first token, which attends only to itself, so its query has no effect

    setattr(module, function, wrong)
    yield
    setattr(module, function, right)


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills new memory too: what is not written stays NaN
    assert torch.empty(1).isnan().all()
    launched = collections.Counter()
    for name, (module, function) in LAUNCHES.items():
        setattr(module, function, functools.partial(counting, name, getattr(module, function), launched))
    for name, _, launch in (argument.partition("=") for argument in sys.argv[1:] or MECHANISMS):
        for form in ("kernels",) if launch else ("kernels", "twins"):
            with broken(launch) if launch else contextlib.nullcontext():
                found = compared(MECHANISMS[name], form == "kernels", launched)
            print(json.dumps({"name": name, "form": launch or form, **found}), flush=True)


if __name__ == "__main__":
    main()
