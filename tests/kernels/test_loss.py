"""The chunked head and loss equal the plain ones."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from headway.kernels.loss import linear_cross_entropy_by_token, linear_cross_entropy_sum


def problem(tokens=23, width=5, vocab=11, dtype=torch.float64):
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,))
    labels[::4] = -100
    return hidden, weight, labels


def plain(hidden, weight, labels):
    return F.cross_entropy(hidden @ weight.T, labels, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 22, 23, 100])
def test_value_and_gradients_do_not_depend_on_the_chunks(chunk_tokens):
    hidden, weight, labels = problem()
    loss = linear_cross_entropy_sum(hidden, weight, labels, chunk_tokens=chunk_tokens)
    expected = plain(hidden, weight, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    got, want = (torch.autograd.grad(value / 7, (hidden, weight)) for value in (loss, expected))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("chunk_tokens", [4, 100])
def test_ignored_labels_add_nothing(chunk_tokens):
    hidden, weight, labels = problem()
    kept = labels != -100
    loss = linear_cross_entropy_sum(hidden, weight, labels, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(loss, plain(hidden[kept], weight, labels[kept]), rtol=1e-13, atol=0)
    nothing = linear_cross_entropy_sum(hidden, weight, torch.full_like(labels, -100), chunk_tokens=chunk_tokens)
    assert nothing.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(nothing, (hidden, weight)))


def test_without_gradients_only_the_loss_is_formed():
    hidden, weight, labels = problem()
    with torch.no_grad():
        loss = linear_cross_entropy_sum(hidden, weight, labels, chunk_tokens=4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, labels).detach(), rtol=1e-13, atol=0)


def test_the_backward_pass_can_run_twice():
    hidden, weight, labels = problem()
    loss = linear_cross_entropy_sum(hidden, weight, labels, chunk_tokens=4)
    first = torch.autograd.grad(3 * loss, hidden, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(3 * loss, hidden)[0], first)


def test_bf16_sums_in_fp32():
    hidden, weight, labels = problem(tokens=600, width=16, vocab=40, dtype=torch.bfloat16)
    loss = linear_cross_entropy_sum(hidden, weight, labels, chunk_tokens=7)
    assert loss.dtype == torch.float32
    # logits are rounded to bf16 (8 bits) before the softmax; a running sum in bf16 would stop near 256
    exact = plain(hidden.detach().double(), weight.detach().double(), labels)
    assert abs(loss.item() / exact.item() - 1) < 2e-3
    grad_weight = torch.autograd.grad(loss, weight)[0].double()
    wide = weight.detach().double().requires_grad_()
    exact_grad = torch.autograd.grad(plain(hidden.detach().double(), wide, labels), wide)[0]
    assert (grad_weight - exact_grad).norm() / exact_grad.norm() < 1e-2


@pytest.mark.parametrize("grad", [True, False])
def test_gradients_are_computed_only_where_required(grad):
    tokens, width, vocab = 12, 4, 7
    hidden, weight = (torch.randn(n, width, requires_grad=True) for n in (tokens, vocab))
    labels = torch.randint(0, vocab, (tokens,))
    product = 2 * tokens * width * vocab
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
        linear_cross_entropy_sum(hidden, weight, labels, chunk_tokens=5)
    # The counter knows mm, not the in-place addmm_ of the weight's gradient: two products with gradients, one without.
    assert counter.get_total_flops() == (2 * product if grad else product)


def test_in_bf16_the_scale_of_the_loss_is_not_rounded():
    hidden = torch.randn(8, 4, dtype=torch.bfloat16, requires_grad=True)
    weight, labels = torch.randn(7, 4, dtype=torch.bfloat16), torch.randint(0, 7, (8,))
    scale = 1.00390625 - 2**-10  # half-way between bf16 neighbours: rounded, it would be off by 0.3 %
    one = torch.autograd.grad(linear_cross_entropy_sum(hidden, weight, labels, chunk_tokens=3), hidden)[0]
    scaled = torch.autograd.grad(scale * linear_cross_entropy_sum(hidden, weight, labels, chunk_tokens=3), hidden)[0]
    assert torch.equal(scaled, (one.float() * scale).bfloat16())


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 100])
def test_a_bias_is_added_to_the_logits_and_ignored_tokens_do_not_reach_its_gradient(chunk_tokens):
    hidden, weight, labels = problem()
    bias = torch.randn(len(weight), dtype=torch.float64, requires_grad=True)
    leaves = (hidden, weight, bias)
    loss = linear_cross_entropy_sum(hidden, weight, labels, bias=bias, chunk_tokens=chunk_tokens)
    logits = hidden @ weight.T + bias
    expected = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    got, want = (torch.autograd.grad(value / 7, leaves) for value in (loss, expected))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    found, hits = linear_cross_entropy_by_token(hidden, weight, labels, bias=bias, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(found.sum(), expected.detach(), rtol=1e-13, atol=0)
    assert hits.sum() == (logits.argmax(-1) == labels).sum()


def test_a_bias_alone_gets_a_gradient():
    hidden, weight, labels = (t.detach() for t in problem())
    bias = torch.randn(len(weight), dtype=torch.float64, requires_grad=True)
    got, want = (
        torch.autograd.grad(linear_cross_entropy_sum(hidden, weight, labels, bias=bias, chunk_tokens=n), bias)[0]
        for n in (4, 100)
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("odd", [None, float("nan"), float("inf"), 1e30])
def test_overwriting_the_logits_changes_no_bit(monkeypatch, dtype, odd):
    """Against log_softmax into a new tensor, as it was before."""

    def out_of_place(logits, labels, want_grad):
        label = labels.clamp_min(0)[:, None]
        log_p = F.log_softmax(logits, -1)
        log_p_of_label = log_p.gather(1, label)[:, 0]
        if not want_grad:
            return log_p_of_label, None
        minus_one = log_p.new_full((1, 1), -1.0).expand_as(label)
        return log_p_of_label, log_p.exp_().scatter_add_(1, label, minus_one)

    hidden, weight, labels = problem(tokens=301, width=24, vocab=1003, dtype=dtype)
    if odd is not None:
        with torch.no_grad():
            hidden[5] = odd

    def bits():
        loss = linear_cross_entropy_sum(hidden, weight, labels, chunk_tokens=64)
        found = (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))
        with torch.no_grad():
            found += (linear_cross_entropy_sum(hidden, weight, labels, chunk_tokens=64),)
        return [tensor.contiguous().view(torch.uint8) for tensor in (t.reshape(-1) for t in found)]

    ours = bits()
    monkeypatch.setattr("headway.kernels.loss._log_p_and_gradient", out_of_place)
    assert all(map(torch.equal, ours, bits()))
