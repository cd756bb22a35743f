"""Attention within documents equals attention with a dense mask, forward and backward, at any boundaries."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headway.kernels import documents as module
from headway.kernels.attention import core
from headway.kernels.documents import BLOCK, MERGED, Documents
from headway.kernels.masked import document_mask, masked_core


def segments_of(lengths):
    """[[2, 1], [3]] -> [[0, 0, 1], [0, 0, 0]]."""
    return torch.tensor([[i for i, length in enumerate(row) for _ in range(length)] for row in lengths])


def inputs(batch, seq_len, heads, kv_heads, head_dim=4):
    shapes = [(batch, seq_len, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def cut(total, most):
    """Random lengths that sum to `total`."""
    lengths = []
    while total:
        lengths.append(min(total, random.randint(1, most)))
        total -= lengths[-1]
    return lengths


def compare(run, lengths, heads, kv_heads, window, rows=slice(None)):
    """`run(q, k, v, documents, window)` against the dense mask at float64: output and gradients of rows `rows`."""
    q, k, v = inputs(len(lengths), sum(lengths[0]), heads, kv_heads)
    segments = segments_of(lengths)
    out = run(q, k, v, Documents.of(segments), window)
    expected = masked_core(q, k, v, document_mask(segments, q.dtype), window=window)[:, rows]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)  # sums over hundreds of positions


def run_core(q, k, v, documents, window):
    return core(q, k, v, documents, window=window)


@pytest.mark.parametrize("window", [None, 1, 40, 133, 600, 5000])
@pytest.mark.parametrize(
    "lengths",
    [
        [[601]],
        [[1] * 601],
        [[1, 299, 1, 300], [301, 300]],
        [[3, 5, 7, 11, 13, 17, 545], [545, 56]],
        [[130, 1, 130, 340], [601]],
    ],
    ids=["one document", "one token each", "one token between", "many and one", "long ones"],
)
def test_documents_equal_the_dense_mask(lengths, window):
    compare(run_core, lengths, 4, 2, window)


@pytest.mark.parametrize("case", range(24))
def test_random_documents_equal_the_dense_mask(case, monkeypatch):
    """Small blocks, so that short sequences are cut as long ones are."""
    random.seed(case)
    monkeypatch.setattr(module, "BLOCK", random.choice([4, 16]))
    monkeypatch.setattr("headway.kernels.attention.BLOCK", module.BLOCK)
    monkeypatch.setattr(module, "MERGED", random.choice([1, 3, 8]))
    seq_len, most = random.randint(17, 60), random.choice([1, 3, 10, 60])
    lengths = [cut(seq_len, most) for _ in range(random.randint(1, 3))]
    heads, kv_heads = random.choice([(4, 4), (4, 2), (6, 2), (3, 1)])
    compare(run_core, lengths, heads, kv_heads, random.choice([None, None, 1, 2, 7, 33]))


@pytest.mark.parametrize("case", range(16))
def test_queries_of_a_part_of_the_sequences_equal_rows_of_the_dense_mask(case, monkeypatch):
    """As with context parallelism, where keys are gathered and queries are not."""
    random.seed(case)
    if case % 2:
        monkeypatch.setattr(module, "BLOCK", 8)
        monkeypatch.setattr("headway.kernels.attention.BLOCK", 8)
        monkeypatch.setattr(module, "MERGED", random.choice([1, 6]))
    lengths = [cut(48, random.choice([2, 9, 48])) for _ in range(2)]
    rank = random.randrange(3)
    rows = slice(16 * rank, 16 * (rank + 1))

    def run(q, k, v, documents, window):
        part = documents.part(rows.start, rows.stop)
        return core(q[:, rows], k[:, : rows.stop], v[:, : rows.stop], part, window=window)

    compare(run, lengths, 4, 1, random.choice([None, 1, 5, 20]), rows)


def test_short_sequences_are_one_call_with_the_dense_mask_bit_for_bit():
    q, k, v = inputs(2, 256, 4, 2)
    segments = segments_of([[200, 56], [256]])
    calls = []

    def scores(*args, **options):
        calls.append(options["attn_mask"])
        return torch.nn.functional.scaled_dot_product_attention(*args, **options)

    mask = document_mask(segments, q.dtype)
    out = core(q, k, v, Documents.of(segments), scores=scores)
    assert torch.equal(out, masked_core(q, k, v, mask))
    assert len(calls) == 1 and torch.equal(calls[0], mask)


def test_long_documents_are_causal_calls_and_short_neighbours_share_one():
    documents = Documents.of(segments_of([[1000, 50, 60, 40, 850]]))
    pieces = documents.pieces(None)
    assert [(piece.queries, piece.masked) for piece in pieces] == [
        (1000, False),
        (110, True),
        (40, False),
        (850, False),
    ]
    assert all(piece.last - piece.first <= max(MERGED, 1000) for piece in pieces)


def test_all_layers_share_the_masks():
    documents = Documents.of(segments_of([[50, 60, 700]]))
    (piece, _) = documents.pieces(None)
    first, second = (documents.piece_mask(piece, None, torch.float32, torch.device("cpu")) for _ in range(2))
    assert first is second and first.shape == (110, 110)
    assert documents.part(0, 400) is documents.part(0, 400)


@pytest.mark.parametrize("window", [None, 64])
def test_no_tensor_grows_with_the_square_of_the_sequence(window):
    seq_len, largest = 8 * BLOCK, []
    documents = Documents.of(segments_of([[seq_len // 2, 100, 1, seq_len // 2 - 101]]))
    q, k, v = (torch.randn(1, seq_len, n, 4, requires_grad=True) for n in (2, 1, 1))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(each.numel() for each in tree_leaves(out) if torch.is_tensor(each))
            return out

    with Watch():
        core(q, k, v, documents, window=window).sum().backward()
    assert max(largest) <= seq_len * BLOCK < seq_len**2


@pytest.mark.parametrize("numbers", [[0, 1, 0], [2, 1, 1]])
def test_documents_that_are_not_runs_are_refused(numbers):
    with pytest.raises(ValueError, match=r"segments: sequence 1 has document . after . \(token .\); number the"):
        Documents.of(torch.tensor([[0, 0, 0], numbers]))


def test_numbers_may_start_anywhere_and_skip():
    assert Documents.of(torch.tensor([[3, 3, 5], [1, 2, 2]])).lengths == ((2, 1), (1, 2))


def test_the_dense_mask_shows_a_token_its_own_document_up_to_itself():
    visible = torch.tensor([[[1, 0, 0], [1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 0], [0, 1, 1]]]).bool()
    segments = torch.tensor([[3, 3, 5], [1, 2, 2]])
    for mask in (
        document_mask(segments, torch.float32),
        Documents.of(segments).mask(torch.float32, torch.device("cpu")),
    ):
        assert torch.equal(mask[:, 0] == 0, visible)
        assert torch.isneginf(mask[mask != 0]).all()
