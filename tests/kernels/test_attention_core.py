"""The attention core equals attention written out, with and without documents and windows."""

import pytest
import torch

from headway.kernels.attention import core, shares_kv_heads
from headway.kernels.documents import BLOCK, Documents


def written_out(q, k, v, visible):
    """q [B, S, H, D]; k, v [B, S, G, D]; visible [S, S]."""
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scores = torch.einsum("bshd,bthd->bhst", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhst,bthd->bshd", scores.masked_fill(~visible, float("-inf")).softmax(-1), v)


def inputs(seq_len, heads, kv_heads, head_dim=6):
    shapes = [(2, seq_len, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (4, 1)])
def test_equals_attention_written_out(packed, heads, kv_heads, window):
    q, k, v = inputs(13, heads, kv_heads)
    visible = torch.ones(13, 13).tril(0).triu(-(window or 13) + 1).bool()
    documents = None
    if packed:
        visible[5:, :5] = False
        documents = Documents.of((torch.arange(13) >= 5).int().expand(2, 13))
    out, expected = core(q, k, v, documents, window=window), written_out(q, k, v, visible)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_repeated_kv_heads_are_the_same_attention(monkeypatch):
    q, k, v = inputs(9, 6, 2)
    shared = core(q, k, v, None)
    monkeypatch.setattr("headway.kernels.attention.shares_kv_heads", lambda *args, **kwargs: False)
    repeated = core(q, k, v, None)
    torch.testing.assert_close(repeated, shared, rtol=0, atol=1e-13)
    upstream = torch.randn_like(shared)
    for got, want in zip(
        torch.autograd.grad(repeated, (q, k, v), upstream),
        torch.autograd.grad(shared, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_kv_heads_are_shared_only_where_a_fused_kernel_supports_it():
    assert shares_kv_heads("cpu", torch.float32, masked=True)
    assert shares_kv_heads("cuda", torch.bfloat16, masked=False)
    assert not shares_kv_heads("cuda", torch.bfloat16, masked=True)
    assert not shares_kv_heads("cuda", torch.float32, masked=False)


def test_the_last_queries_of_many_keys_are_attended_in_blocks_of_rows():
    """As in decoding of a chunk after a long cache."""
    keys, queries = 2 * BLOCK + 40, 2 * BLOCK + 7
    q, k, v = inputs(keys, 2, 1, head_dim=4)
    last, whole = core(q[:, -queries:], k, v, None), core(q, k, v, None)[:, -queries:]
    torch.testing.assert_close(last, whole, rtol=0, atol=1e-12)
    upstream = torch.randn_like(whole)
    for got, want in zip(
        torch.autograd.grad(last, (q, k, v), upstream), torch.autograd.grad(whole, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)  # sums over a thousand positions
