"""The gated delta rule (Yang, Kautz and Hatamizadeh, 2024, arXiv 2412.06464): token by token, and in chunks.

Legend: B batch, S sequence, H heads of queries and keys, V heads of values (each head of keys serves V/H of them),
D channels of a query or key, E channels of a value, L tokens of a chunk.

Each head of values has a state M [D, E], which is 0 at the start of a document:

    k_t = key / sqrt(|key|^2 + 1e-6),  q_t = query / sqrt(|query|^2 + 1e-6) / sqrt(D)
    u_t = b_t (v_t - a_t M_{t-1}^T k_t)          what the decayed state does not have yet of the value
    M_t = a_t M_{t-1} + k_t u_t^T
    o_t = M_t^T q_t

With S = M^T this is the source's S_t = S_{t-1} (a_t (I - b_t k_t k_t^T)) + b_t v_t k_t^T, o_t = S_t q_t. a_t in (0, 1]
is the decay, given by its logarithm, and b_t in (0, 1) the writing strength.

In chunks (section 3.3 of the source), with M the state before the chunk, G_ij the product of a over j < t <= i, and g_i
that over all t <= i of the chunk:

    u_i + sum over j < i of b_i G_ij (k_i . k_j) u_j = b_i (v_i - g_i M^T k_i)      a triangular system for all u
    o_i = g_i M^T q_i + sum over j <= i of G_ij (q_i . k_j) u_j
    M'  = g_L M + sum over j of G_Lj k_j u_j^T

A product over tokens of two documents is 0, which also resets the state. Logarithms are summed apart for each pair: no
rounding error of an earlier document or token enters, and no difference of two large sums is taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.documents import Documents

EPS = 1e-6
"""Added to squared norms of queries and keys, as published implementations do."""


def recurrent_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    documents: Documents | None = None,
    state: Tensor | None = None,
    chunk: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """`chunked_delta` token by token: the reference, and the form for decoding single tokens. `chunk` has no effect."""
    wide, heads = torch.promote_types(q.dtype, torch.float32), v.shape[2]
    keys, queries = (unit(t.to(wide)).repeat_interleave(heads // q.shape[2], 2) for t in (k, q))  # [B, S, V, D]
    queries = queries / q.shape[-1] ** 0.5
    values, decay, strength = v.to(wide), log_decay.to(wide).exp(), beta.to(wide)
    numbers = None if documents is None else documents.numbers(q.device)
    memory = _zeros(q, v) if state is None else state.to(wide)
    outs = []
    with _without_autocast(q):
        for t in range(q.shape[1]):
            if numbers is not None and t:
                memory = memory * (numbers[:, t] == numbers[:, t - 1])[:, None, None, None]
            memory = memory * decay[:, t, :, None, None]
            read = torch.einsum("bvde,bvd->bve", memory, keys[:, t])
            new = strength[:, t].unsqueeze(-1) * (values[:, t] - read)
            memory = memory + keys[:, t].unsqueeze(-1) * new.unsqueeze(-2)
            outs.append(torch.einsum("bvde,bvd->bve", memory, queries[:, t]))
    return torch.stack(outs, 1).to(v.dtype), None if state is None else memory


def chunked_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    documents: Documents | None = None,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """q, k [B, S, H, D]; v [B, S, V, E]; log_decay (<= 0) and beta [B, S, V] -> o [B, S, V, E], state [B, V, D, E].

    documents: Boundaries, at which the state begins anew; None for one document per sequence.
    state: That of earlier tokens, fp32 or wider; None: it is 0, and None is returned for it. Only without documents.
    chunk: L, tokens computed at once; the last chunk may be shorter. The result does not depend on it but for rounding.

    Computed in fp32 or wider. The backward pass keeps the inputs alone and computes the chunks again, so memory grows
    linearly with S, by L and by D E / L numbers per token and head while it runs.
    """
    assert documents is None or state is None, "a cache holds one document per sequence"
    numbers = None if documents is None or documents.whole else documents.numbers(q.device)
    o, last = _Chunked.apply(q, k, v, log_decay, beta, state, numbers, chunk)
    return o, None if state is None else last


def unit(x: Tensor) -> Tensor:
    """x [..., D] divided by its Euclidean norm."""
    return x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt()


def _without_autocast(like: Tensor) -> torch.autocast:
    """Under `torch.autocast`, products of tensors in fp32 would be rounded to bf16."""
    return torch.autocast(like.device.type, enabled=False)


def _zeros(q: Tensor, v: Tensor) -> Tensor:
    """The state before the first token."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_zeros(len(q), v.shape[2], q.shape[3], v.shape[3], dtype=wide)


def _advance(
    state: Tensor, numbers: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk: outputs [B, L, V, E], and the state [B, V, D, E] after it.

    numbers [B, 1 + L]: documents of the token before the chunk and of its tokens; None if all are of one document.
    """
    wide, heads, length = state.dtype, q.shape[2], q.shape[1]
    q, k = (unit(t.to(wide)).transpose(1, 2).unsqueeze(2) for t in (q, k))  # [B, H, 1, L, D]
    q = q / q.shape[-1] ** 0.5
    v = v.to(wide).unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)  # [B, H, V/H, L, E]
    logs, strength = (t.to(wide).unflatten(2, (heads, -1)).permute(0, 2, 3, 1) for t in (log_decay, beta))
    strength = strength.unsqueeze(-1)  # [B, H, V/H, L, 1]
    memory = state.unflatten(1, (heads, -1))  # [B, H, V/H, D, E]
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    # Row i, column j: the logarithm of row i below the diagonal, so that the sum down a column is that over j < t <= i.
    steps = logs.unsqueeze(-1).masked_fill(~seen.tril(-1), 0)
    between, since = steps.cumsum(-2).exp(), logs.cumsum(-1).exp()
    if numbers is not None:
        own, before = numbers[:, 1:], numbers[:, :1]
        seen = seen & (own.unsqueeze(2) == own.unsqueeze(1))[:, None, None]
        since = since * (own == before)[:, None, None]
    between = between.masked_fill(~seen, 0)  # [B, H, V/H, L, L]
    since = since.unsqueeze(-1)  # [B, H, V/H, L, 1]
    system = strength * between * (k @ k.mT)  # read below the diagonal, which is 1
    u = torch.linalg.solve_triangular(
        system, strength * (v - since * (k @ memory)), upper=False, unitriangular=True
    )  # [B, H, V/H, L, E]
    o = since * (q @ memory) + (between * (q @ k.mT)) @ u
    after = since[..., -1:, :] * memory + (k * between[..., -1, :].unsqueeze(-1)).mT @ u
    return o.permute(0, 3, 1, 2, 4).flatten(2, 3), after.flatten(1, 2)


def _part(numbers: Tensor | None, begin: int, end: int) -> Tensor | None:
    """The documents of a chunk and of the token before it; the first token stands for that before the first chunk."""
    if numbers is None:
        return None
    return torch.cat([numbers[:, max(begin - 1, 0)].unsqueeze(1), numbers[:, begin:end]], 1)


class _Chunked(torch.autograd.Function):
    """Chunk after chunk. Backward: the states before all chunks, then the gradient of each chunk from last to first."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        state: Tensor | None,
        numbers: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        memory = _zeros(q, v) if state is None else state
        inputs, outs = (q, k, v, log_decay, beta), []
        with _without_autocast(q):
            for begin in range(0, q.shape[1], chunk):
                end = min(begin + chunk, q.shape[1])
                parts = [t[:, begin:end] for t in inputs]
                o, memory = _advance(memory, _part(numbers, begin, end), *parts)
                outs.append(o.to(v.dtype))
        ctx.save_for_backward(*inputs, state, numbers)
        ctx.chunk = chunk
        return torch.cat(outs, 1), memory

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (as the decorator is typed)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        with _without_autocast(grad_outputs[0]):
            return _chunk_gradients(ctx, *grad_outputs)


def _chunk_gradients(ctx: Any, grad_o: Tensor, grad_memory: Tensor) -> tuple[Tensor | None, ...]:
    """The backward pass of `_Chunked`."""
    *inputs, state, numbers = ctx.saved_tensors
    memory, length = _zeros(inputs[0], inputs[2]) if state is None else state, inputs[0].shape[1]
    bounds = [(begin, min(begin + ctx.chunk, length)) for begin in range(0, length, ctx.chunk)]
    before = [memory]
    for begin, end in bounds[:-1]:
        parts = [t[:, begin:end] for t in inputs]
        before.append(_advance(before[-1], _part(numbers, begin, end), *parts)[1])
    grads = [torch.empty_like(t) for t in inputs]
    while bounds:
        begin, end = bounds.pop()
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (*(t[:, begin:end] for t in inputs), before.pop())]
            o, after = _advance(leaves[5], _part(numbers, begin, end), *leaves[:5])
        found = torch.autograd.grad((o, after), leaves, (grad_o[:, begin:end].to(o.dtype), grad_memory))
        for grad, part in zip(grads, found[:5], strict=True):
            grad[:, begin:end] = part
        grad_memory = found[5]
    return *grads, grad_memory if ctx.needs_input_grad[5] else None, None, None
