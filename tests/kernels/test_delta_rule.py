"""The gated delta rule: its equation, token by token and in chunks, gradients, documents, states; the convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.delta import rule
from headway.kernels.delta.convolution import short_convolution
from headway.kernels.delta.rule import chunked_delta, recurrent_delta
from headway.kernels.documents import Documents

B, S, H, V, D, E = 2, 13, 2, 4, 5, 3
PACKED = Documents(((4, 5, 1, 3), (13,)))
SHORT = Documents(((1,) * 13, (12, 1)))


def problem(
    *, length: int = S, heads: int = H, values: int = V, seed: int = 1, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v, logarithms of the decay (of about -0.05 to -3), writing strengths."""
    g = torch.Generator().manual_seed(seed)
    sizes = [(heads, D), (heads, D), (values, E), (values,), (values,)]
    q, k, v, decay, beta = (torch.randn(B, length, *size, dtype=torch.float64, generator=g) for size in sizes)
    return [t.to(dtype).requires_grad_() for t in (q, k, v, -F.softplus(decay), beta.sigmoid())]


def drawn_state(values: int = V) -> Tensor:
    return torch.randn(B, values, D, E, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def by_the_equation(inputs: list[Tensor], documents: Documents | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Head by head, with the matrices of the source: S_t = S_{t-1} (a (I - b k k^T)) + b v k^T, o = S q, S [E, D]."""
    q, k, v, log_decay, beta = inputs
    numbers = None if documents is None else documents.numbers(q.device)
    outs, lasts = torch.zeros_like(v), []
    for row in range(len(q)):
        for head in range(v.shape[2]):
            of_keys = head // (v.shape[2] // q.shape[2])
            memory = torch.zeros(E, D, dtype=v.dtype) if state is None else state[row, head].T.clone()
            for t in range(q.shape[1]):
                if numbers is not None and t and numbers[row, t] != numbers[row, t - 1]:
                    memory = torch.zeros_like(memory)
                key, query = k[row, t, of_keys], q[row, t, of_keys]
                key, query = (x / (x.square().sum() + 1e-6).sqrt() for x in (key, query))
                a, b = log_decay[row, t, head].exp(), beta[row, t, head]
                kept = a * (torch.eye(D, dtype=v.dtype) - b * torch.outer(key, key))
                memory = memory @ kept + b * torch.outer(v[row, t, head], key)
                outs[row, t, head] = memory @ query / D**0.5
            lasts.append(memory.T)
    return outs, torch.stack(lasts).unflatten(0, (len(q), -1))


each_form = pytest.mark.parametrize("form", [recurrent_delta, chunked_delta])
each_documents = pytest.mark.parametrize("documents", [None, PACKED, SHORT], ids=["whole", "packed", "short"])


@torch.no_grad()
@each_form
@each_documents
@pytest.mark.parametrize("values", [H, V])
def test_both_forms_are_the_equation_of_the_source(form: Any, documents: Documents | None, values: int) -> None:
    inputs = problem(values=values)
    found, none = form(*inputs, documents=documents, chunk=4)
    assert none is None
    torch.testing.assert_close(found, by_the_equation(inputs, documents, None)[0], rtol=0, atol=1e-12)


@torch.no_grad()
@each_form
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_a_state_continues_and_the_last_one_is_returned(form: Any, chunk: int) -> None:
    inputs, state = problem(), drawn_state()
    both = form(*inputs, state=state, chunk=chunk), by_the_equation(inputs, None, state)
    for found, expected in zip(*both, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def results(form: Callable[..., Any], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """o, the state, and the gradients of a loss that weighs all numbers of both differently."""
    o, last = form(*inputs, **options)
    loss = (o * torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view_as(o)).sum()
    leaves = list(inputs)
    if last is not None:
        loss = loss + (last * torch.linspace(1, -2, last.numel(), dtype=o.dtype).view_as(last)).sum()
        leaves.append(options["state"])
    return [o, *([] if last is None else [last]), *torch.autograd.grad(loss, leaves)]


@each_documents
@pytest.mark.parametrize("chunk", [1, 3, 4, 13, 64])
def test_chunks_have_the_values_and_gradients_of_single_tokens(documents: Documents | None, chunk: int) -> None:
    """Autograd differentiates the form token by token; chunks have a backward pass of their own."""
    inputs = problem()
    both = [results(form, inputs, documents=documents, chunk=chunk) for form in (recurrent_delta, chunked_delta)]
    for expected, found in zip(*both, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_the_gradient_reaches_the_state_before_the_first_token() -> None:
    inputs, state = problem(), drawn_state().requires_grad_()
    both = [results(form, inputs, state=state, chunk=4) for form in (recurrent_delta, chunked_delta)]
    for expected, found in zip(*both, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_gradients_are_those_of_finite_differences() -> None:
    documents = Documents(((2, 3), (5,)))
    inputs = problem(length=5, heads=1, values=2)
    assert torch.autograd.gradcheck(lambda *given: chunked_delta(*given, documents=documents, chunk=2)[0], inputs)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [3, 64])
def test_documents_packed_are_documents_apart(chunk: int) -> None:
    """Bit for bit where chunks are the same; else but for rounding."""
    inputs = problem()
    packed, _ = chunked_delta(*inputs, documents=PACKED, chunk=chunk)
    begin = 0
    for length in PACKED.lengths[0]:
        alone, _ = chunked_delta(*(t[:1, begin : begin + length] for t in inputs), chunk=chunk)
        torch.testing.assert_close(packed[:1, begin : begin + length], alone, rtol=0, atol=1e-13)
        begin += length


@torch.no_grad()
def test_a_document_and_a_later_token_change_no_bit_of_another() -> None:
    inputs = problem()
    before, _ = chunked_delta(*inputs, documents=PACKED, chunk=6)
    for token in range(S):
        changed = [t.clone() for t in inputs]
        for t in changed:
            t[:, token] = t[:, token] * 0.5
        after, _ = chunked_delta(*changed, documents=PACKED, chunk=6)
        same = (before == after).all(-1).all(-1)  # [B, S]
        numbers = PACKED.numbers(before.device)
        others = (torch.arange(S) < token) | (numbers != numbers[:, token : token + 1])
        assert same[others].all() and not same[:, token].any(), token


@torch.no_grad()
def test_no_decay_and_no_strength_are_the_limits_that_they_should_be() -> None:
    """With a = 1 and b = 1 a key reads back the value last written with it; with b = 0 nothing is ever written."""
    q, k, v, log_decay, beta = problem(values=H)
    k = k[:, :1].expand_as(k)
    o, _ = chunked_delta(k, k, v, log_decay * 0, torch.ones_like(beta), chunk=4)
    torch.testing.assert_close(o * D**0.5, v, rtol=0, atol=1e-5)  # lengths are 1 but for the added 1e-6
    o, _ = chunked_delta(q, k, v, log_decay, torch.zeros_like(beta), chunk=4)
    assert not o.any()


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.1, 30.0])
def test_in_fp32_long_products_of_decays_stay_accurate(strength: float) -> None:
    """A strong decay makes logarithms of -2000 within a chunk, whose differences would be off by 1e-4."""
    exact = problem(length=130)
    exact[3] = exact[3] * strength
    single = [t.float() for t in exact]
    expected, _ = recurrent_delta(*exact)
    found, _ = chunked_delta(*single)
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 2e-6 * expected.norm()


def test_in_bf16_sums_are_in_fp32() -> None:
    """Inputs and outputs are rounded (2^-9 each), and nothing in between."""
    rounded = problem(length=130, dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in rounded]
    both = [results(form, given, chunk=32) for form, given in ((recurrent_delta, exact), (chunked_delta, rounded))]
    for expected, found in zip(*both, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - expected).norm() <= 2**-8 * expected.norm()


@pytest.mark.parametrize(
    ("form", "backward"), [(recurrent_delta, False), (chunked_delta, False), (chunked_delta, True)]
)
def test_autocast_does_not_round_what_is_computed_in_fp32(form: Any, backward: bool) -> None:
    """In the backward pass of chunks neither."""
    found = []
    for enabled in (False, True):
        given = problem(length=40, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            o, _ = form(*given, chunk=16)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled and backward):
            found.append([o, *torch.autograd.grad(o.square().sum(), given)])
    for expected, mine in zip(*found, strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, expected)


def test_second_derivatives_are_refused_as_the_chunks_are_computed_again_apart() -> None:
    q, *others = problem()
    o, _ = chunked_delta(q, *others, chunk=4)
    (first,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (first + q).square().sum().backward()


def test_the_backward_pass_keeps_the_inputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No state of a chunk and no square of it is kept, so memory does not depend on the chunk."""
    inputs = problem(length=64)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        chunked_delta(*inputs, chunk=16)
    assert sum(kept.values()) == 8 * sum(t.numel() for t in inputs)
    largest: list[int] = []
    monkeypatch.setattr(rule, "_advance", _measured(rule._advance, largest))
    chunked_delta(*inputs, chunk=16)[0].sum().backward()
    assert set(largest) == {16}


def _measured(advance: Callable[..., Any], lengths: list[int]) -> Callable[..., Any]:
    def call(*given: Any) -> Any:
        lengths.append(given[2].shape[1])
        return advance(*given)

    return call


# ---------------------------------------------------------------- the convolution

W, C = 4, 3


def convolution_problem(length: int = S) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(*s, dtype=torch.float64, generator=g).requires_grad_() for s in ((B, length, C), (C, W))]


@pytest.mark.parametrize("length", [1, 2, S])
def test_the_convolution_is_pytorchs_of_each_channel_followed_by_silu(length: int) -> None:
    x, weight = convolution_problem(length)
    padded = F.pad(x.transpose(1, 2), (W - 1, 0))
    expected = F.silu(F.conv1d(padded, weight.unsqueeze(1), groups=C)).transpose(1, 2)
    found, upstream = short_convolution(x, weight), torch.linspace(-1, 2, expected.numel(), dtype=x.dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    both = [torch.autograd.grad(y, (x, weight), upstream.view_as(y)) for y in (found, expected)]
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_the_convolution_does_not_reach_over_documents_and_has_its_gradients() -> None:
    x, weight = convolution_problem()
    found, begin = short_convolution(x, weight, documents=PACKED), 0
    for length in PACKED.lengths[0]:
        alone = short_convolution(x[:1, begin : begin + length], weight)
        torch.testing.assert_close(found[:1, begin : begin + length], alone, rtol=0, atol=1e-15)
        begin += length
    torch.testing.assert_close(found[1:], short_convolution(x[1:], weight), rtol=0, atol=1e-15)
    assert torch.autograd.gradcheck(lambda *given: short_convolution(*given, documents=PACKED), (x, weight))


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 2, 3, 7])
def test_a_tail_stands_for_the_tokens_before(cut: int) -> None:
    x, weight = convolution_problem()
    tail = F.pad(x, (0, 0, W - 1, 0))[:, cut : cut + W - 1]
    torch.testing.assert_close(
        short_convolution(x[:, cut:], weight, tail=tail), short_convolution(x, weight)[:, cut:], rtol=0, atol=1e-14
    )
