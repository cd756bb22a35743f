"""Choosing k of N experts and their gates on a GPU, in registers: two launches forward and one backward.

Importing this module needs Triton; `headway.kernels.ops` does so on a GPU. Twins in PyTorch: `top_k` and `gates_twin`
of `headway.kernels.twins`. Choice and gates are two operations because a recomputed layer gates anew what was chosen
before (`Context.choice`).

Legend: R rows (tokens x groups), N experts per group, k chosen ones.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.launch import Shipped, on_device_of_first, padded

ROWS = 64  # per program
WARPS = 4

# Numbers of the gates: constants of the kernels.
GATES = {
    name: number
    for number, name in enumerate(
        ("hard", "sigmoid", "sigmoid2", "renorm", "softmax", "softmax_n", "detached_renorm", "straight_through")
    )
}


@triton.jit
def top_k_forward(scores, idx, rows, N: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr):
    """idx [R, K] of the K largest of scores [R, N], largest first, ties to the lower; NaN counts as the largest."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    n = tl.arange(0, BN)
    ok = row < rows
    s = tl.load(scores + row[:, None] * N + n[None, :], mask=ok[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
    s = tl.where(s == s, s, float("inf"))
    left = tl.zeros([BR, BN], tl.int32) + (n < N).to(tl.int32)[None, :]
    for j in tl.static_range(K):
        best = tl.max(tl.where(left > 0, s, -float("inf")), 1)
        candidate = (left > 0) & (s == best[:, None])
        chosen = tl.min(tl.where(candidate, n[None, :], BN), 1)
        tl.store(idx + row * K + j, chosen.to(tl.int64), mask=ok)
        left = tl.where(n[None, :] == chosen[:, None], 0, left)


@triton.jit
def _among(idx, row, ok, K: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr):
    """1 at the chosen experts of each row, else 0: [BR, BN] fp32."""
    n = tl.arange(0, BN)
    found = tl.zeros([BR, BN], tl.float32)
    for j in tl.static_range(K):
        found += (n[None, :] == tl.load(idx + row * K + j, mask=ok, other=0)[:, None]).to(tl.float32)
    return found


@triton.jit
def _probabilities(
    logits, row, ok, among, N: tl.constexpr, GATE: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Softmax of each row of logits [R, N]: [BR, BN] fp32, 0 beyond N; over the chosen alone where the gate is that."""
    n = tl.arange(0, BN)
    inside = ok[:, None] & (n < N)[None, :]
    if GATE == 3:
        inside = inside & (among > 0)
    r = tl.load(logits + row[:, None] * N + n[None, :], mask=inside, other=-float("inf")).to(tl.float32)
    largest = tl.max(r, 1)
    e = tl.exp(r - tl.where(ok, largest, 0.0)[:, None])
    return e / tl.where(ok, tl.sum(e, 1), 1.0)[:, None]


@triton.jit
def _picked(values, chosen, n):
    """values[row, chosen[row]] of values [BR, BN]."""
    return tl.sum(tl.where(n[None, :] == chosen[:, None], values, 0.0), 1)


@triton.jit
def gates_forward(
    logits, idx, gate, rows, N: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr
):
    """gate [R, K] of `headway.kernels.routing.gates`, by its number in GATES."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    ok = row < rows
    n = tl.arange(0, BN)
    if GATE == 1 or GATE == 2:
        for j in tl.static_range(K):
            chosen = tl.load(idx + row * K + j, mask=ok, other=0)
            r = tl.load(logits + row * N + chosen, mask=ok, other=0.0).to(tl.float32)
            tl.store(gate + row * K + j, GATE / (1.0 + tl.exp(-r)), mask=ok)
    else:
        among = _among(idx, row, ok, K, BR, BN)
        p = _probabilities(logits, row, ok, among, N, GATE, BR, BN)
        total = tl.sum(p * among, 1)
        for j in tl.static_range(K):
            own = _picked(p, tl.load(idx + row * K + j, mask=ok, other=0), n)
            if GATE == 6:
                own = own / tl.where(ok, total, 1.0)
            elif GATE == 5:
                own = own * N
            elif GATE == 7:
                own = 1.0 + (own - own)
            tl.store(gate + row * K + j, own, mask=ok)


@triton.jit
def gates_backward(
    logits, idx, grad, out, rows, N: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, BR: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """out [R, N], the gradient of the logits, from that of the gates, grad [R, K]; experts are chosen at most once."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    ok = row < rows
    n = tl.arange(0, BN)
    found = tl.zeros([BR, BN], tl.float32)
    if GATE == 1 or GATE == 2:
        for j in tl.static_range(K):
            chosen = tl.load(idx + row * K + j, mask=ok, other=0)
            g = tl.load(grad + row * K + j, mask=ok, other=0.0).to(tl.float32)
            s = 1.0 / (1.0 + tl.exp(-tl.load(logits + row * N + chosen, mask=ok, other=0.0).to(tl.float32)))
            found += tl.where(n[None, :] == chosen[:, None], (GATE * g * s * (1.0 - s))[:, None], 0.0)
    else:
        among = _among(idx, row, ok, K, BR, BN)
        p = _probabilities(logits, row, ok, among, N, GATE, BR, BN)
        given = tl.zeros([BR, BN], tl.float32)  # each gate's gradient, at its expert
        for j in tl.static_range(K):
            chosen = tl.load(idx + row * K + j, mask=ok, other=0)
            g = tl.load(grad + row * K + j, mask=ok, other=0.0).to(tl.float32)
            given += tl.where(n[None, :] == chosen[:, None], g[:, None], 0.0)
        found = p * (given - tl.sum(given * p, 1)[:, None])
        if GATE == 3:
            found = tl.where(among > 0, found, 0.0)  # NaN stays with the chosen
        elif GATE == 5:
            found = found * N
        elif GATE == 6:
            found = found / tl.where(ok, tl.sum(p * among, 1), 1.0)[:, None]
    tl.store(out + row[:, None] * N + n[None, :], found, mask=ok[:, None] & (n < N)[None, :])


# ---------------------------------------------------------------- launches: any device that the kernels run on


@on_device_of_first
def launch_top_k(scores: Tensor, idx: Tensor) -> None:
    """`top_k_forward` of scores [R, N] into idx [R, k]."""
    rows, experts = scores.shape
    grid = (triton.cdiv(rows, ROWS),)
    top_k_forward[grid](scores, idx, rows, experts, idx.shape[1], ROWS, padded(experts), num_warps=WARPS)


@on_device_of_first
def launch_gates(logits: Tensor, idx: Tensor, name: str, gate: Tensor) -> None:
    """`gates_forward` of logits [R, N] and idx [R, k] into gate [R, k]."""
    (rows, experts), k = logits.shape, idx.shape[1]
    grid = (triton.cdiv(rows, ROWS),)
    gates_forward[grid](logits, idx, gate, rows, experts, k, GATES[name], ROWS, padded(experts), num_warps=WARPS)


@on_device_of_first
def launch_gates_backward(logits: Tensor, idx: Tensor, name: str, grad: Tensor, out: Tensor) -> None:
    """`gates_backward` of grad [R, k] into out [R, N]."""
    (rows, experts), k = logits.shape, idx.shape[1]
    grid = (triton.cdiv(rows, ROWS),)
    gates_backward[grid](logits, idx, grad, out, rows, experts, k, GATES[name], ROWS, padded(experts), num_warps=WARPS)


def shipped() -> list[Shipped]:
    """What is launched for N = 4 and 8, k = 1 and 2, for compilation without a GPU."""
    found = []
    for experts, k in ((4, 1), (8, 2)):
        shape = {"N": experts, "K": k, "BR": ROWS, "BN": padded(experts)}
        common = {"idx": "*i64", "rows": "i32"}
        found.append(Shipped(top_k_forward, {"scores": "*fp32", **common}, shape, WARPS))
        for name in ("sigmoid2", "detached_renorm"):
            sizes, logits = shape | {"GATE": GATES[name]}, {"logits": "*fp32", **common}
            found.append(Shipped(gates_forward, {**logits, "gate": "*fp32"}, sizes, WARPS))
            found.append(Shipped(gates_backward, {**logits, "grad": "*fp32", "out": "*fp32"}, sizes, WARPS))
    return found
