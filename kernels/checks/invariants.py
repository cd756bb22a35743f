"""What kernels keep besides being right: equal runs, rows that do not know of each other, replays of a CUDA graph.

`CHECKS[name](device, dtype)` -> what was compared -> (numbers that differ, 0), bit for bit; form of `v0`.

Legend: T tokens, d width, G groups, N experts per group, k chosen ones, D channels, R rotated channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headway.kernels.checks.v0 import Errors, random_choice, random_normal
from headway.kernels.checks.v1 import kernels_on
from headway.kernels.rope import rope_tables
from headway.kernels.routed import make_slot_grad, make_weight_grad, pair_lists, routed_project
from headway.kernels.triton import routing as triton_routing
from headway.kernels.triton import slots as triton_slots

TOKENS, WIDTH, GROUPS, EXPERTS, K, CHANNELS = 75, 40, 2, 4, 2, 24
RUNS = 20
Operation = Callable[[Tensor, Tensor], Tensor]
"""x [T, d] and idx [T, G, k] -> rows of tokens, [T, ...]."""


def _inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = random_normal((TOKENS, WIDTH), device, dtype, 1)
    return x, random_choice((TOKENS, GROUPS, EXPERTS), K, device)


def operations(device: torch.device, dtype: torch.dtype) -> dict[str, Operation]:
    """Each writes one row per token, out of that token's row of x and its choice. Position is left out: RoPE is not."""
    columns = GROUPS * EXPERTS * CHANNELS
    w = random_normal((columns, WIDTH), device, dtype, 2)
    cos, sin = rope_tables(1, CHANNELS, 1e4, device)

    def pool_of(x: Tensor) -> Tensor:
        """[T, 1, G, N, D]: made of x without a product, whose result may depend on the number of rows."""
        repeated = x.repeat(1, -(-columns // WIDTH))[:, :columns]
        return repeated.reshape(len(x), 1, GROUPS, EXPERTS, CHANNELS).contiguous()

    def slots_of(x: Tensor) -> Tensor:
        return pool_of(x)[..., :K, :].flatten(1, 2)  # [T, G, k, D]

    def select(x: Tensor, idx: Tensor) -> Tensor:
        out = x.new_empty((len(x), 1, *idx.shape[1:], CHANNELS))
        run = triton_slots.launch_select_rope
        run(triton_slots.select_rope_forward, pool_of(x), idx.unsqueeze(1).contiguous(), cos, sin, EXPERTS, out)
        return out

    def expand(x: Tensor, idx: Tensor) -> Tensor:
        rows = len(x) * GROUPS
        out = x.new_empty((rows, EXPERTS, CHANNELS))
        slots, gate = slots_of(x).flatten(0, 1).contiguous(), x[:, : GROUPS * K].float().reshape(rows, K).contiguous()
        triton_slots.launch_expand(slots, idx.flatten(0, 1).contiguous(), gate, EXPERTS, out)
        return out.view(len(x), -1)

    def choose(x: Tensor, idx: Tensor) -> Tensor:
        scores = x[:, : GROUPS * EXPERTS].float().reshape(-1, EXPERTS).contiguous()
        found = torch.empty((len(scores), K), dtype=torch.int64, device=device)
        triton_routing.launch_top_k(scores, found)
        return found.view(len(x), -1)

    def project(x: Tensor, idx: Tensor) -> Tensor:
        with kernels_on(device):
            return routed_project(x, w, pair_lists(idx, EXPERTS))

    def slot_grad(x: Tensor, idx: Tensor) -> Tensor:
        gate = x[:, : GROUPS * K].float().reshape(idx.shape).contiguous()
        with kernels_on(device):
            lists = pair_lists(idx, EXPERTS)
            made, d_gate = make_slot_grad(x, w.t().contiguous(), slots_of(x).contiguous(), gate, *lists, True)
        return torch.cat([made.flatten(1).float(), d_gate.flatten(1)], 1)

    return {"select": select, "expand": expand, "top_k": choose, "project": project, "slot_grad": slot_grad}


def _differ(a: Tensor, b: Tensor) -> tuple[float, float]:
    return float((a != b).sum()), 0.0  # NaN differs from itself


def _with_weight_grad(device: torch.device, dtype: torch.dtype) -> dict[str, Operation]:
    """`operations`, and the weight gradient [G N D, d], which has no rows of tokens."""
    slots = random_normal((TOKENS, GROUPS, K, CHANNELS), device, dtype, 3)

    def weight_grad(x: Tensor, idx: Tensor) -> Tensor:
        with kernels_on(device):
            return make_weight_grad(x, slots, None, *pair_lists(idx, EXPERTS), True, True)

    return {**operations(device, dtype), "weight_grad": weight_grad}


def equal_runs(device: torch.device, dtype: torch.dtype) -> Errors:
    """The same again and again; on a GPU programs run in another order each time. The weight gradient too."""
    x, idx = _inputs(device, dtype)
    found = {}
    for name, operation in _with_weight_grad(device, dtype).items():
        first = operation(x, idx)
        runs = RUNS if device.type == "cuda" else 2
        found[name] = max(_differ(operation(x, idx), first) for _ in range(runs - 1))
    return found


def rows_alone(device: torch.device, dtype: torch.dtype) -> Errors:
    """A token's row is what it is without the tokens after it, which also change tiles and lengths of lists."""
    x, idx = _inputs(device, dtype)
    found = {}
    for name, operation in operations(device, dtype).items():
        whole = operation(x, idx)
        for tokens in (1, 33):
            found[f"{name}, {tokens} tokens"] = _differ(operation(x[:tokens], idx[:tokens]), whole[:tokens])
    return found


def permuted_tokens(device: torch.device, dtype: torch.dtype) -> Errors:
    """Tokens in another order give the same rows in that order."""
    x, idx = _inputs(device, dtype)
    order = random_normal((TOKENS,), device, torch.float32, 4).argsort()
    return {
        name: _differ(operation(x[order].contiguous(), idx[order].contiguous()), operation(x, idx)[order])
        for name, operation in operations(device, dtype).items()
    }


def replays(device: torch.device, dtype: torch.dtype) -> Errors:
    """A replay with other inputs and another choice of experts gives what a plain run on them gives.

    On a GPU a captured CUDA graph is replayed; on a CPU the operation runs once more. Both read the same tensors, whose
    contents were replaced in place, so nothing that was derived from the former choice may be used again. In the second
    choice one list is longer than twice the mean and one is empty: the schedules of both choices differ.
    """
    x, idx = _inputs(device, dtype)
    other_x = random_normal((TOKENS, WIDTH), device, dtype, 5)
    other_idx = random_normal((TOKENS, GROUPS, EXPERTS), device, torch.float32, 6)
    other_idx[..., 0] += 100  # every token chooses expert 0, and none the last
    other_idx[..., -1] -= 100
    other_idx = other_idx.argsort(-1, descending=True)[..., :K].contiguous()
    found = {}
    for name, operation in _with_weight_grad(device, dtype).items():
        expected, given, choice = operation(other_x, other_idx), x.clone(), idx.clone()
        out, graph = operation(given, choice), None
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = operation(given, choice)
        given.copy_(other_x)
        choice.copy_(other_idx)
        if graph is None:
            out = operation(given, choice)
        else:
            graph.replay()
        found[name] = _differ(out, expected)
    return found


CHECKS: dict[str, Callable[[torch.device, torch.dtype], Errors]] = {
    "equal runs": equal_runs,
    "rows alone": rows_alone,
    "permuted tokens": permuted_tokens,
    "replays": replays,
}
