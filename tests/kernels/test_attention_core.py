"""The attention core equals attention written out, with every kind of mask, with and without blocks of queries."""

import pytest
import torch

from headway.kernels.attention import MASKED_BLOCK, core, shares_kv_heads


def written_out(q, k, v, visible):
    """q [B, S, H, D]; k, v [B, S, G, D]; visible [S, S]."""
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scores = torch.einsum("bshd,bthd->bhst", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhst,bthd->bshd", scores.masked_fill(~visible, float("-inf")).softmax(-1), v)


def inputs(seq_len, heads, kv_heads, head_dim=6):
    shapes = [(2, seq_len, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("kind", ["causal", "bool", "additive"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (4, 1)])
def test_equals_attention_written_out(kind, heads, kv_heads):
    q, k, v = inputs(13, heads, kv_heads)
    visible = torch.ones(13, 13).tril().bool()
    if kind != "causal":
        visible[5:, :5] = False  # two documents
    mask = None if kind == "causal" else visible[None, None].expand(2, 1, 13, 13)
    if kind == "additive" and mask is not None:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    out, expected = core(q, k, v, mask), written_out(q, k, v, visible)
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


def test_blocks_of_queries_change_nothing():
    seq_len = 2 * MASKED_BLOCK + 7
    q, k, v = inputs(seq_len, 2, 1, head_dim=4)
    causal = torch.ones(seq_len, seq_len).tril().bool()[None, None]
    masked, plain = core(q, k, v, causal), core(q, k, v, None)
    torch.testing.assert_close(masked, plain, rtol=0, atol=1e-12)
    upstream = torch.randn_like(plain)
    for got, want in zip(
        torch.autograd.grad(masked, (q, k, v), upstream), torch.autograd.grad(plain, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)  # sums over a thousand positions
