"""Packed segments: where pairs come from, their attention on both ways, and rotation by a position of their own."""

import pytest
import torch

from headway.kernels.attention import core
from headway.kernels.rope import apply_rope, rope_tables
from headway.model import segments as module
from headway.model.segments import Segments, packed_core, rotate_rows

LENGTHS = [(1,), (1, 1, 1), (7, 3, 12, 1, 5), (600, 30, 37, 38, 480), (4, 5) * 20]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alone(q, k, v, lengths):
    """Each segment by itself, with a mask."""
    outs = []
    for parts in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
        scores = parts[0] @ parts[1].T / parts[0].shape[1] ** 0.5
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
        outs.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ parts[2])
    return torch.cat(outs)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_both_ways_are_attention_within_each_segment(lengths):
    q, k, v = (drawn(sum(lengths), 6, seed=s).requires_grad_() for s in range(3))
    up = drawn(sum(lengths), 6, seed=3)
    documents = Segments(q, q, q, q, lengths, (), (1, 1, 1)).documents()
    rows = [t[None, :, None] for t in (q, k, v)]
    made = [
        alone(q, k, v, lengths),
        packed_core(q, k, v, lengths),
        core(rows[0], rows[1], rows[2], documents)[0, :, 0],  # as on a GPU, by varlen there
    ]
    for out in made[1:]:
        torch.testing.assert_close(out, made[0], rtol=0, atol=1e-13)
        for got, want in zip(
            torch.autograd.grad(out, (q, k, v), up),
            torch.autograd.grad(made[0], (q, k, v), up, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_segments_of_like_length_share_a_call_and_waste_is_bounded():
    lengths = (40, 50, 10, 48, 11, 100)
    calls = list(module._calls(lengths, torch.device("cpu")))
    assert [len(call.pair) for call in calls] == [2, 3, 1]
    assert sum(call.pair.numel() for call in calls) <= module.SPREAD * sum(lengths)


@pytest.mark.parametrize("rotated", [0, 4, 6])
def test_rotation_by_rows_is_rope_at_those_positions(rotated):
    x, tables = drawn(9, 6).requires_grad_(), rope_tables(20, rotated, 100.0, torch.device("cpu"))
    rows = torch.tensor([0, 3, 3, 19, 7, 1, 0, 2, 11])
    cos, sin = tables
    each = [apply_rope(x[None, i : i + 1, None], (cos[r : r + 1], sin[r : r + 1])) for i, r in enumerate(rows.tolist())]
    want = torch.cat(each)
    got = rotate_rows(x, tables, rows)
    torch.testing.assert_close(got, want[:, 0, 0], rtol=0, atol=0)
    up = drawn(9, 6, seed=1)
    grads = [torch.autograd.grad(out, x, up.view_as(out))[0] for out in (got, want)]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-15)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("first", "heads"), [(0, 5), (0, 2), (2, 3)])
def test_pairs_are_those_of_the_routing_in_order(first, heads, documents):
    g = torch.Generator().manual_seed(4)
    idx = torch.stack([torch.randperm(5, generator=g)[:2] for _ in range(3 * 7)]).view(3, 7, 2)
    numbers = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0] * 7, [0, 1, 2, 3, 4, 4, 5]]) if documents else None
    found = Segments.of(idx, heads=heads, first=first, numbers=numbers)
    pairs, lengths = [], {}
    for head in range(heads):
        for b in range(3):
            for s in range(7):
                slots = [j for j in range(2) if idx[b, s, j] == first + head]
                key = (head, b, 0 if numbers is None else int(numbers[b, s]))
                for slot in slots:
                    pairs.append((head, 7 * b + s, slot, lengths.get(key, 0)))
                    lengths[key] = lengths.get(key, 0) + 1
    columns = torch.stack([found.head, found.token, found.slot, found.place], 1).tolist()
    assert columns == [list(pair) for pair in pairs]
    assert found.lengths == tuple(lengths.values())
    assert found.per_head == tuple(sum(n for key, n in lengths.items() if key[0] == head) for head in range(heads))
    assert found.scores == sum(n * (n + 1) // 2 for n in lengths.values())
    pool = drawn(3, 7, heads, 4)
    packed = found.select(pool)
    expanded = found.expand(packed)
    for (head, token, *_), row in zip(pairs, packed, strict=True):
        assert torch.equal(row, pool[token // 7, token % 7, head])
        assert torch.equal(expanded[token // 7, token % 7, head], row)
    assert int((expanded != 0).any(-1).sum()) == len(pairs)
    assert found.in_slots().tolist() == [2 * token + slot for _, token, slot, _ in pairs]


def test_a_rank_whose_heads_no_token_chose_has_no_pairs():
    found = Segments.of(torch.zeros(2, 3, 1, dtype=torch.int64), heads=2, first=2)
    assert found.lengths == () and found.per_head == (0, 0) and found.scores == 0
    assert found.select(drawn(2, 3, 2, 4)).shape == (0, 4) and not found.expand(drawn(0, 4)).any()
