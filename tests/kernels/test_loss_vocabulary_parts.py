"""Head and loss over a sharded vocabulary equal those of the whole vocabulary. Each rank is a thread here."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.loss import VocabularyPart, linear_cross_entropy_by_token, linear_cross_entropy_sum

TOKENS, WIDTH, VOCAB = 23, 5, 11
CUTS = {1: [0, 11], 2: [0, 4, 11], 3: [0, 4, 5, 11]}  # where each rank's rows begin; one rank has a single row
PARTS = pytest.mark.parametrize("cuts", CUTS.values(), ids=[f"{n} parts" for n in CUTS])
CHUNKS = pytest.mark.parametrize("chunk_tokens", [1, 4, 23, 100])


class Exchange:
    """Reductions between threads; `shapes`: what rank 0 gave, in order, under the reduction's name."""

    def __init__(self, ranks: int) -> None:
        self.shapes: list[tuple[str, list[int]]] = []
        self.barrier = Barrier(ranks, timeout=30)
        self._given = [torch.empty(0)] * ranks

    def part(self, rank: int, start: int) -> VocabularyPart:
        add, most = (partial(self._reduce, rank, name) for name in ("sum", "amax"))
        return VocabularyPart(start=start, sum=add, largest=most)

    def _reduce(self, rank: int, name: str, tensor: Tensor) -> Tensor:
        if rank == 0:
            self.shapes.append((name, list(tensor.shape)))
        self._given[rank] = tensor
        self.barrier.wait()
        reduced = getattr(torch.stack(self._given), name)(0)
        self.barrier.wait()  # wait until all ranks have read the values, before one replaces its own
        return reduced


def on_ranks(cuts: list[int], weight: Tensor, run: Callable[[Tensor, VocabularyPart], Any]) -> tuple[list, Exchange]:
    """run(rows of the weight, their part) of every rank, at once."""
    exchange = Exchange(len(cuts) - 1)

    def guarded(rank: int, start: int, end: int) -> Any:
        try:
            return run(weight[start:end], exchange.part(rank, start))
        except BaseException:
            exchange.barrier.abort()
            raise

    with ThreadPoolExecutor(len(cuts) - 1) as pool:
        waiting = [pool.submit(guarded, rank, *rows) for rank, rows in enumerate(pairwise(cuts))]
        return [one.result() for one in waiting], exchange


def loss_and_gradients(cuts, hidden, weight, labels, *, scale=1.0, **kw):
    """(each rank's loss, gradient of hidden: the ranks' shares added up, gradient of the whole weight)."""

    def run(rows, part):
        mine, rows = (t.detach().clone().requires_grad_() for t in (hidden, rows))
        loss = linear_cross_entropy_sum(mine, rows, labels, part=part, **kw)
        return loss.detach(), *torch.autograd.grad(scale * loss, (mine, rows))

    losses, shares, rows = zip(*on_ranks(cuts, weight, run)[0], strict=True)
    return losses, torch.stack(shares).sum(0), torch.cat(rows)


def problem(dtype=torch.float64, tokens=TOKENS):
    hidden, weight = torch.randn(tokens, WIDTH, dtype=dtype), torch.randn(VOCAB, WIDTH, dtype=dtype)
    labels = torch.arange(tokens) % VOCAB  # every row of every part is a label
    labels[::4] = -100
    return hidden, weight, labels


def plain(hidden, weight, labels):
    hidden, weight = (t.detach().requires_grad_() for t in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.T, labels, ignore_index=-100, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


@PARTS
@CHUNKS
def test_loss_and_gradients_are_those_of_the_whole_vocabulary(cuts, chunk_tokens):
    hidden, weight, labels = problem()
    losses, grad_hidden, grad_weight = loss_and_gradients(
        cuts, hidden, weight, labels, scale=1 / 7, chunk_tokens=chunk_tokens
    )
    loss, want_hidden, want_weight = plain(hidden, weight, labels)
    for rank_loss in losses:
        torch.testing.assert_close(rank_loss, loss, rtol=1e-13, atol=0)
    assert all(torch.equal(rank_loss, losses[0]) for rank_loss in losses)
    torch.testing.assert_close(grad_hidden, want_hidden / 7, rtol=0, atol=1e-13)
    torch.testing.assert_close(grad_weight, want_weight / 7, rtol=0, atol=1e-13)


@PARTS
def test_where_every_label_is_ignored_nothing_is_added(cuts):
    hidden, weight, labels = problem()
    losses, *grads = loss_and_gradients(cuts, hidden, weight, torch.full_like(labels, -100), chunk_tokens=4)
    assert all(loss == 0 for loss in losses) and all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("label", range(VOCAB))
def test_a_label_counts_in_whichever_part_it_is(label):
    hidden, weight, _ = problem(tokens=1)
    losses, _, grad_weight = loss_and_gradients(CUTS[3], hidden, weight, torch.tensor([label]), chunk_tokens=1)
    loss, _, want = plain(hidden, weight, torch.tensor([label]))
    torch.testing.assert_close(losses[0], loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad_weight, want, rtol=0, atol=1e-13)


@PARTS
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_logits_far_from_zero_neither_overflow_nor_vanish(cuts, shift):
    # One part's largest logit may be 1e4 below another's, and all of them 1e4 from 0: exp(1e4) is infinite in float32.
    hidden = torch.tensor([[1.0, shift], [-1.0, shift], [0.0, shift], [0.0, 0.0]])
    weight = torch.stack([torch.tensor([1e4, -1e4, 3.0, 0.0]).repeat(3)[:VOCAB], torch.ones(VOCAB)], 1)
    labels = torch.tensor([5, 10, 7, 0])
    losses, *grads = loss_and_gradients(cuts, hidden, weight, labels, chunk_tokens=4)
    loss, *want = plain(hidden.double(), weight.double(), labels)
    torch.testing.assert_close(losses[0].double(), loss, rtol=1e-6, atol=0)
    for got, expected in zip(grads, want, strict=True):
        # entries are sums of products of up to 1e4, each rounded to 24 bits
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-3)


@PARTS
def test_bf16_rounds_as_it_does_without_parts(cuts):
    hidden, weight, labels = problem(torch.bfloat16, tokens=300)
    losses, *grads = loss_and_gradients(cuts, hidden, weight, labels, chunk_tokens=7)
    whole_hidden, whole_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cross_entropy_sum(whole_hidden, whole_weight, labels, chunk_tokens=7)
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(losses[0], loss.detach(), rtol=1e-6, atol=0)
    for got, want in zip(grads, torch.autograd.grad(loss, (whole_hidden, whole_weight)), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - want).norm() / want.norm() < 2**-8  # a share is rounded to bf16 before the ranks' sum


@PARTS
@CHUNKS
def test_hits_are_those_of_the_whole_vocabulary(cuts, chunk_tokens):
    hidden, weight, labels = problem()
    guesses = (hidden @ weight.T).argmax(-1)
    labels = torch.where((labels != -100) & (torch.arange(TOKENS) % 3 != 0), guesses, labels)
    want_losses, want_hits = linear_cross_entropy_by_token(hidden, weight, labels)
    assert 0 < want_hits.sum() < (labels != -100).sum()
    got, _ = on_ranks(
        cuts,
        weight,
        lambda rows, part: linear_cross_entropy_by_token(hidden, rows, labels, chunk_tokens=chunk_tokens, part=part),
    )
    for losses, hits in got:
        torch.testing.assert_close(losses, want_losses, rtol=1e-13, atol=1e-14)
        assert torch.equal(hits, want_hits)


@PARTS
@pytest.mark.parametrize("rivals", [range(VOCAB), [3, 4], [2, 9], [6, 8], [10]])
def test_of_equal_logits_in_several_parts_the_first_is_the_guess(cuts, rivals):
    weight = torch.zeros(VOCAB, WIDTH)
    weight[list(rivals)] = 1.0
    labels = torch.arange(VOCAB)  # the same token once with every label
    hidden = torch.ones(VOCAB, WIDTH)
    for rows in (slice(0, VOCAB), *(slice(n, n + 1) for n in range(VOCAB))):
        got, _ = on_ranks(
            cuts,
            weight,
            lambda w, part, rows=rows: linear_cross_entropy_by_token(hidden[rows], w, labels[rows], part=part)[1],
        )
        assert all(torch.equal(hits, labels[rows] == rivals[0]) for hits in got)


@PARTS
def test_an_ignored_row_adds_nothing_whatever_it_holds(cuts):
    hidden, weight, labels = problem()
    for value in (0.0, float("nan")):
        hidden[::4] = value  # a row of zeros makes every logit a largest one
        got, _ = on_ranks(
            cuts,
            weight,
            lambda rows, part: linear_cross_entropy_by_token(hidden, rows, labels, chunk_tokens=5, part=part),
        )
        kept = labels != -100
        want = linear_cross_entropy_by_token(hidden[kept], weight, labels[kept])
        for losses, hits in got:
            assert torch.allclose(losses[kept], want[0]) and torch.equal(hits[kept], want[1])
            assert not losses[~kept].any() and not hits[~kept].any()


@pytest.mark.parametrize("row", [0, 10])
def test_nan_on_one_rank_reaches_all_ranks(row):
    hidden, weight, labels = problem()
    weight[row] = float("nan")
    losses, *_ = loss_and_gradients(CUTS[2], hidden, weight, labels, chunk_tokens=4)
    assert all(loss.isnan() for loss in losses)


def test_two_exchanges_per_chunk_with_and_without_hits():
    hidden, weight, labels = problem()
    chunks = [8, 8, 7]
    _, exchange = on_ranks(
        CUTS[2], weight, lambda rows, part: linear_cross_entropy_sum(hidden, rows, labels, chunk_tokens=8, part=part)
    )
    assert exchange.shapes == [call for c in chunks for call in (("amax", [c]), ("sum", [2, c]))]
    _, exchange = on_ranks(
        CUTS[2],
        weight,
        lambda rows, part: linear_cross_entropy_by_token(hidden, rows, labels, chunk_tokens=8, part=part),
    )
    assert exchange.shapes == [call for c in chunks for call in (("amax", [c]), ("sum", [3, c]))]


def test_without_gradients_the_exchanges_are_the_same_and_only_the_loss_is_formed():
    hidden, weight, labels = problem()

    def run(rows, part):
        with torch.no_grad():
            return linear_cross_entropy_sum(hidden, rows.requires_grad_(), labels, chunk_tokens=8, part=part)

    losses, exchange = on_ranks(CUTS[2], weight, run)
    assert not losses[0].requires_grad and len(exchange.shapes) == 6
    torch.testing.assert_close(losses[0], plain(hidden, weight, labels)[0], rtol=1e-13, atol=0)


@PARTS
@CHUNKS
def test_a_bias_is_shared_out_with_the_rows(cuts, chunk_tokens):
    hidden, weight, labels = problem()
    bias = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)

    def run(rows, part):
        mine = bias[part.start : part.start + len(rows)].clone().requires_grad_()
        loss = linear_cross_entropy_sum(hidden, rows, labels, bias=mine, part=part, chunk_tokens=chunk_tokens)
        found = linear_cross_entropy_by_token(hidden, rows, labels, bias=mine, part=part, chunk_tokens=chunk_tokens)
        return loss.detach(), torch.autograd.grad(loss, mine)[0], found

    losses, grads, found = zip(*on_ranks(cuts, weight, run)[0], strict=True)
    whole = bias.clone().requires_grad_()
    logits = hidden @ weight.T + whole
    expected = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    (want,) = torch.autograd.grad(expected, whole)
    torch.testing.assert_close(torch.cat(grads), want, rtol=0, atol=1e-13)
    for loss, (other, hits) in zip(losses, found, strict=True):
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)
        torch.testing.assert_close(other.sum(), expected.detach(), rtol=1e-13, atol=0)
        assert hits.sum() == (logits.argmax(-1) == labels).sum()
