"""Time the dense and the routed form of each product, for the table in kernels/choice.json.

The dense form is the default: one large product, and Headway's kernels that select and expand.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from headway.kernels import routing
from headway.kernels.choice import Product, Shape
from headway.kernels.device import architecture
from headway.kernels.rope import rope_tables
from headway.kernels.routed import DENSE, ROUTED, Forms, make_weight_grad, pair_lists, routed_project
from headway.launcher.bench.gpu.rows import Machine, Row, product_rows
from headway.launcher.bench.gpu.shapes import Size
from headway.launcher.bench.gpu.timing import Call, randn, ratio, short, summary

PRODUCTS: tuple[Product, Product] = ("gather", "weight_grad")
KINDS = ("even", "one head")
"""Distribution of the tokens: over random heads, or all on the same head, which gives one long list."""


def forms(machine: Machine) -> list[Row]:
    """One row per size, number of selected heads, and number of tokens."""
    return product_rows(machine, "forms", "dense or routed products", compare, seconds=10)


def compare(size: Size, k: int, tokens: int, machine: Machine) -> dict[str, Any]:
    """Seconds of each product in both forms, and the speedup of the routed form, including the time to build lists."""
    groups, heads = size.kv_heads, size.heads // size.kv_heads
    shape = Shape(tokens=tokens, width=size.width, head_dim=size.head_dim, groups=groups, experts=heads, k=k)
    found = []
    for kind in KINDS:
        calls = _calls(shape, kind, machine)
        seconds = short(calls, machine.device, rounds=max(2, machine.scale.rounds // 3))
        for product in PRODUCTS:
            dense, routed = (seconds[f"{product}: {form}"] for form in ("dense", "routed"))
            found.append(
                {
                    "product": product,
                    "kind": kind,
                    "key": shape.key(architecture(machine.device), product),
                    "dense": summary(dense),
                    "routed": summary(routed),
                    "ratio": ratio(dense, routed),
                    "flops": 2.0 * tokens * size.width * size.head_dim * groups * k,
                }
            )
    return {"shape": shape.key("", "gather").split("/", 2)[2], "products": found}


def _calls(shape: Shape, kind: str, machine: Machine) -> dict[str, Call]:
    device, dtype = machine.device, machine.scale.dtype
    x = randn((shape.tokens, shape.width), device, dtype)
    w = randn((shape.groups * shape.experts * shape.head_dim, shape.width), device, dtype, 1)
    scores = randn((shape.tokens, shape.groups, shape.experts), device, torch.float32, 2)
    if kind == "one head":
        scores = torch.zeros_like(scores)
    idx = routing.top_k(scores, shape.k)
    slots = randn((*idx.shape, shape.head_dim), device, dtype, 3)
    rope = rope_tables(shape.tokens, shape.head_dim, 1e4, device)

    def gather(forms: Forms, _: int) -> None:
        if forms == DENSE:
            pool = torch.nn.functional.linear(x, w).view(1, *scores.shape, shape.head_dim)
            routing.select_rope(pool, idx[None], rope)
        else:
            routed_project(x, w, pair_lists(idx, shape.experts), rope, forms)

    def weight_grad(forms: Forms, _: int) -> None:
        lists = pair_lists(idx, shape.experts)
        make_weight_grad(x, slots, None, *lists, True, forms.weight_grad)

    named = (("dense", DENSE), ("routed", ROUTED))
    return {
        **{f"gather: {name}": functools.partial(gather, form) for name, form in named},
        **{f"weight_grad: {name}": functools.partial(weight_grad, form) for name, form in named},
    }
