"""What balancing losses are made of, in one pass over the logits: how often experts are chosen, and their shares.

Importing this module needs Triton; `headway.kernels.ops` does so on a GPU. Twin in PyTorch: `balance_sums_twin` of
`headway.kernels.twins`. Partial sums of chunks of tokens are added in a fixed order.

Legend: B batch, S sequence, G groups, N experts per group, k chosen ones, C chunks of a sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.launch import Shipped, on_device_of_first, padded

CHUNK = 1024  # tokens of one program
ROWS = 64  # of them at once
WARPS = 4


@triton.jit
def _shares(logits, row, ok, N: tl.constexpr, SIGMOID: tl.constexpr, BN: tl.constexpr):
    """(p [BR, BN] that sums to 1 over N, its sigmoids, their sum [BR]); 0 where a row is not ok, and beyond N."""
    n = tl.arange(0, BN)
    inside = ok[:, None] & (n < N)[None, :]
    r = tl.load(logits + row[:, None] * N + n[None, :], mask=inside, other=-float("inf")).to(tl.float32)
    if SIGMOID:
        e = tl.where(inside, 1.0 / (1.0 + tl.exp(-r)), 0.0)
    else:
        e = tl.where(inside, tl.exp(r - tl.where(ok, tl.max(r, 1), 0.0)[:, None]), 0.0)
    total = tl.where(ok, tl.sum(e, 1), 1.0)
    return e / total[:, None], e, total


@triton.jit
def sums_forward(
    logits, idx, part, S, G: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr,
    CHUNK: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """part [B G, C, 2, N]: of a chunk of tokens how often each expert is chosen, and the sum of its shares."""
    sequence, chunk = tl.program_id(0), tl.program_id(1)
    first = (sequence // G).to(tl.int64) * S
    n = tl.arange(0, BN)
    counts, shares = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    for start in range(0, CHUNK, BR):
        s = chunk * CHUNK + start + tl.arange(0, BR)
        ok = s < S
        row = (first + s) * G + sequence % G
        for j in tl.static_range(K):
            chosen = tl.load(idx + row * K + j, mask=ok, other=-1)
            counts += tl.sum((n[None, :] == chosen[:, None]).to(tl.float32), 0)
        p, _, _ = _shares(logits, row, ok, N, SIGMOID, BN)
        shares += tl.sum(p, 0)
    out = part + (sequence * tl.num_programs(1) + chunk) * 2 * N
    tl.store(out + n, counts, mask=n < N)
    tl.store(out + N + n, shares, mask=n < N)


@triton.jit
def sums_backward(
    logits, grad, out, rows, S, G: tl.constexpr, N: tl.constexpr, SIGMOID: tl.constexpr, BR: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """out [B S G, N], the gradient of the logits, from that of the shares' sums, grad [B G, N]."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    ok = row < rows
    n = tl.arange(0, BN)
    inside = ok[:, None] & (n < N)[None, :]
    sequence = (row // (G * S)) * G + row % G
    g = tl.load(grad + sequence[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    p, e, _ = _shares(logits, row, ok, N, SIGMOID, BN)
    found = p * (g - tl.sum(p * g, 1)[:, None])
    if SIGMOID:
        found = found * (1.0 - e)
    tl.store(out + row[:, None] * N + n[None, :], found, mask=inside)


@on_device_of_first
def launch_sums(logits: Tensor, idx: Tensor, sigmoid: bool, out: Tensor) -> None:
    """logits [B, S, G, N], idx [B, S, G, k] -> out [2, B, G, N], counts and shares, added up in the order of chunks."""
    (batch, seq_len, groups, experts), k = logits.shape, idx.shape[-1]
    chunks = triton.cdiv(seq_len, CHUNK)
    part = torch.empty(batch, groups, chunks, 2, experts, dtype=torch.float32, device=logits.device)
    sizes = (groups, experts, k, sigmoid, CHUNK, ROWS, padded(experts))
    sums_forward[(batch * groups, chunks)](logits, idx, part, seq_len, *sizes, num_warps=WARPS)
    out.copy_(part.sum(2).movedim(2, 0))


@on_device_of_first
def launch_sums_backward(logits: Tensor, grad: Tensor, sigmoid: bool, out: Tensor) -> None:
    """grad [B, G, N] of the shares' sums -> out [B, S, G, N] of logits [B, S, G, N]."""
    batch, seq_len, groups, experts = logits.shape
    rows = batch * seq_len * groups
    sizes = (groups, experts, sigmoid, ROWS, padded(experts))
    sums_backward[(triton.cdiv(rows, ROWS),)](logits, grad, out, rows, seq_len, *sizes, num_warps=WARPS)


def shipped() -> list[Shipped]:
    """What is launched for N = 4 and 8, for compilation without a GPU."""
    found = []
    for experts, k in ((4, 1), (8, 2)):
        for sigmoid in (False, True):
            shape = {"G": 4, "N": experts, "SIGMOID": sigmoid, "BR": ROWS, "BN": padded(experts)}
            common = {"logits": "*fp32", "S": "i32"}
            signature = {**common, "idx": "*i64", "part": "*fp32"}
            found.append(Shipped(sums_forward, signature, shape | {"K": k, "CHUNK": CHUNK}, WARPS))
            signature = {**common, "grad": "*fp32", "out": "*fp32", "rows": "i32"}
            found.append(Shipped(sums_backward, signature, shape, WARPS))
    return found
