"""Checks of the routed projections against float64, for the interpreter's tests and for a GPU alike.

`CHECKS[name](device, dtype)` -> what was compared -> (relative error, tolerance). NaN fails, for it is not within any
tolerance. On a CPU the twins are checked, or with TRITON_INTERPRET=1 the kernels.

Legend: B batch, S sequence, T = B S tokens, d width, G groups, N experts per group, k slots, D channels, R turned.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from headway.kernels.checks.v0 import Errors, relative
from headway.kernels.device import interpreted
from headway.kernels.launch import TILE_PAIRS, schedule_sizes
from headway.kernels.rope import apply_rope, rope_tables
from headway.kernels.routed import pair_lists, routed_combine, routed_project
from headway.kernels.routing import expand
from headway.kernels.twins import select

Check = Callable[[torch.device, torch.dtype], Errors]

# Of bf16 operands: one rounding of the result; two, where an intermediate is rounded; a sum in fp32 of products.
ONE, TWO, NONE = 4e-3, 8e-3, 1e-4
TOLERANCES = {
    "project": (ONE, TWO, TWO),  # the output, then gradients of x and w: the turned slots are rounded in between
    "combine": (TWO, ONE, TWO, NONE),  # the output, then gradients of slots, w and gate
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and the kind of routing; `skew` sends every token to the experts 0..k-1 and leaves other lists empty."""

    seq: int
    experts: int
    k: int
    head_dim: int
    rotated: int
    batch: int = 1
    groups: int = 2
    width: int = 40
    skew: bool = False


CASES = {
    "three experts, one slot, odd length": Case(seq=67, experts=3, k=1, head_dim=16, rotated=16, batch=2),
    "four experts, two slots, half rotated": Case(seq=45, experts=4, k=2, head_dim=24, rotated=12),
    "eight experts, three slots, not rotated": Case(seq=37, experts=8, k=3, head_dim=32, rotated=0, groups=3),
    "five experts, every one chosen": Case(seq=19, experts=5, k=5, head_dim=16, rotated=8),
    "all tokens on one expert": Case(seq=301, experts=4, k=1, head_dim=16, rotated=16, groups=1, skew=True),
    "odd head size, one channel not rotated": Case(seq=21, experts=3, k=2, head_dim=17, rotated=16),
    "one token": Case(seq=1, experts=4, k=2, head_dim=16, rotated=16),
}


def kernels_on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within it operators take the kernels: on a GPU as always, on a CPU where TRITON_INTERPRET=1."""
    wanted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return interpreted() if wanted else contextlib.nullcontext()


def _choice(case: Case, made: torch.Generator) -> Tensor:
    scores = torch.rand(case.batch * case.seq, case.groups, case.experts, generator=made)
    if case.skew:
        scores += torch.arange(case.experts, 0, -1)
    return scores.topk(case.k, -1).indices


def lists_check(case: Case, device: torch.device, dtype: torch.dtype) -> Errors:
    """The lists equal a stable sort, the schedule one made part by part; the error is the count of what differs."""
    idx = _choice(case, torch.Generator().manual_seed(1))
    expert = (idx + case.experts * torch.arange(case.groups)[:, None]).flatten()
    with kernels_on(device):
        lists = pair_lists(idx.to(device), case.experts)
    sizes = torch.bincount(expert, minlength=case.groups * case.experts)
    wrong = (lists.order.cpu() != expert.argsort(stable=True)).sum(), (lists.offsets.diff().cpu() != sizes).sum()
    found = {"order": (float(wrong[0]), 0.0), "offsets": (float(wrong[1]), 0.0)}
    return found | {"schedule": (float((lists.schedule.cpu() != _scheduled(sizes, idx.numel())).sum()), 0.0)}


def _scheduled(sizes: Tensor, pairs: int) -> Tensor:
    """The schedule of lists with these sizes [H], part by part."""
    bounds = schedule_sizes(pairs, len(sizes))
    made = []
    for length, bound, least in ((TILE_PAIRS, bounds.tiles, 0), (bounds.chunk, bounds.items, 1)):
        parts = [max(least, -(-size // length)) for size in sizes.tolist()]
        entries = [i * len(parts) + h for i in range(max(parts)) for h, count in enumerate(parts) if i < count]
        made += entries + [-1] * (bound - len(entries))
    return torch.tensor(made)


def products_check(case: Case, device: torch.device, dtype: torch.dtype) -> Errors:
    """Projection and combination, forward and every gradient."""
    made = torch.Generator().manual_seed(2)
    tokens, columns = case.batch * case.seq, case.groups * case.experts * case.head_dim

    def given(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=made).to(kind)

    idx = _choice(case, made)
    x, w, w_o = given(tokens, case.width), given(columns, case.width), given(case.width, columns)
    gate = given(tokens, case.groups, case.k, kind=torch.float32)
    slots = given(tokens, case.groups, case.k, case.head_dim)
    rope = rope_tables(case.seq, case.rotated, 100.0, torch.device("cpu"))
    with kernels_on(device):
        lists = pair_lists(idx.to(device), case.experts)
    cos, sin = (table.to(device) for table in rope)

    def pool(a: Tensor, weight: Tensor) -> Tensor:
        made = (a @ weight.t()).view(case.batch, case.seq, case.groups, case.experts, -1)
        return select(made, idx.view(case.batch, case.seq, case.groups, -1))

    def project(a: Tensor, weight: Tensor) -> Tensor:
        return apply_rope(pool(a, weight).flatten(2, 3), rope).view(*idx.shape, -1)

    def combine(s: Tensor, weight: Tensor, g: Tensor) -> Tensor:
        return expand(s, idx, g, case.experts).flatten(1) @ weight.t()

    return {
        **_both("project", lambda a, b: routed_project(a, b, lists, (cos, sin)), project, [x, w], device, made),
        **_both("combine", lambda s, b, g: routed_combine(s, b, lists, g), combine, [slots, w_o, gate], device, made),
    }


def _both(
    name: str,
    fast: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    given: list[Tensor],
    device: torch.device,
    made: torch.Generator,
) -> Errors:
    """Errors of the output and of the gradient of every input; exact runs in float64 on the same numbers."""
    near = [tensor.to(device).requires_grad_() for tensor in given]
    far = [tensor.double().requires_grad_() for tensor in given]
    reference = exact(*far)
    d_out = torch.randn(reference.shape, generator=made).to(given[0].dtype)
    with kernels_on(device):
        out = fast(*near)
        got = torch.autograd.grad(out, near, d_out.to(device))
    wanted = torch.autograd.grad(reference, far, d_out.double())
    # PyTorch's own form rounds what the gate's gradient is summed over; the kernel has it in fp32.
    allowed = [ONE if t == NONE and device.type == "cpu" else t for t in TOLERANCES[name]]
    if given[0].dtype == torch.float32:
        allowed = [2e-6] * len(allowed)
    report = {name: (relative(out.detach().cpu(), reference.detach()), allowed[0])}
    for place, (a, b) in enumerate(zip(got, wanted, strict=True)):
        report[f"{name}, gradient {place}"] = relative(a.cpu(), b), allowed[1 + place]
    return report


# Several programs make the schedule. The interpreter takes too long for its products.
LONG = {"many experts, long lists": Case(seq=700, experts=300, k=1, head_dim=16, rotated=0, width=16, skew=True)}
CHECKS: dict[str, Check] = {f"lists: {name}": partial(lists_check, case) for name, case in (CASES | LONG).items()} | {
    f"products: {name}": partial(products_check, case) for name, case in CASES.items()
}
