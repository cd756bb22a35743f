"""The core over chosen blocks of keys against a masked dense form, and its choice against one that is written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from headway.kernels.documents import Documents
from headway.model import blocks as module
from headway.model.blocks import Blocks, blocks_core, choose_blocks

CPU = torch.device("cpu")
KEYS = 23
ROWS = {
    "whole": ((KEYS,), (KEYS,)),
    "documents": ((4, 9, 1, 9), (12, 11)),
    "many and one": ((2, 1, 3, 5, 12), (KEYS,)),
}
# query heads, KV heads, choosers
HEADS = {"group": (6, 2, 2), "head": (6, 2, 6), "one KV head": (3, 1, 1), "one query head each": (2, 2, 2)}
each_heads = pytest.mark.parametrize("heads", HEADS.values(), ids=list(HEADS))


@pytest.fixture(params=[*ROWS, "cached"])
def documents(request: pytest.FixtureRequest) -> Documents:
    """Of two sequences; with cached tokens there is one document, and queries are the last 9 positions."""
    if request.param == "cached":
        return Documents(((KEYS,), (KEYS,)), KEYS - 9)
    return Documents(ROWS[request.param])


def drawn(documents: Documents, heads: tuple[int, int, int], *, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v of head size 4."""
    generator, batch = torch.Generator().manual_seed(3), len(documents.lengths)
    shapes = [(documents.queries, heads[0]), (documents.keys, heads[1]), (documents.keys, heads[1])]
    made = [torch.randn(batch, *shape, 4, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.to(dtype).requires_grad_() for t in made]


def own_and_earlier(row: tuple[int, ...], size: int, t: int) -> tuple[int, list[int]]:
    """Where the own block of position t begins, and where the complete blocks of its document before it do."""
    begin = 0
    for length in row:
        if t < begin + length:
            break
        begin += length
    own = begin + (t - begin) // size * size
    return own, list(range(begin, own, size))


@torch.no_grad()
def written_out(
    q: Tensor, k: Tensor, documents: Documents, heads: tuple[int, int, int], *, size: int, count: int
) -> tuple[list[list[int]], Tensor]:
    """First positions of the chosen blocks by sequence, query and chooser; and what is seen, bool [B, C, S, K]."""
    (query_heads, groups, choosers), (batch, queries) = heads, q.shape[:2]
    members, chosen = query_heads // choosers, []
    seen = torch.zeros(batch, choosers, queries, documents.keys, dtype=torch.bool)
    for b in range(batch):
        for i in range(queries):
            t = documents.start + i
            own, earlier = own_and_earlier(documents.lengths[b], size, t)
            for c in range(choosers):
                query = q[b, i, c * members : (c + 1) * members].mean(0)
                group = c * members // (query_heads // groups)
                scores = {j: float(query @ k[b, j : j + size, group].mean(0)) for j in earlier}
                best = sorted(scores, key=lambda j, own=scores: (-own[j], j))[:count]
                chosen.append(best)
                seen[b, c, i, own : t + 1] = True
                for j in best:
                    seen[b, c, i, j : j + size] = True
    return chosen, seen


def masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    keys, values = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, keys) / math.sqrt(q.shape[-1])
    hidden = ~seen.repeat_interleave(q.shape[2] // seen.shape[1], 1)
    return torch.einsum("bhst,bthd->bshd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)


@each_heads
@pytest.mark.parametrize(("size", "count"), [(1, 2), (3, 1), (3, 2), (4, 9), (5, 2), (30, 1)])
def test_the_choice_and_what_is_seen_are_those_written_out(
    documents: Documents, heads: tuple[int, int, int], size: int, count: int
) -> None:
    q, k, _ = drawn(documents, heads)
    blocks = Blocks.of(documents, size, CPU)
    chosen = choose_blocks(q, blocks.means(k), blocks, count=count, choosers=heads[2])
    assert chosen.shape == (2, documents.queries, heads[2], count)
    expected, seen = written_out(q, k, documents, heads, size=size, count=count)
    places = [
        [int(blocks.starts[b, j - 1]) for j in row if j] for b in range(2) for row in chosen[b].flatten(0, 1).tolist()
    ]
    assert places == expected
    assert torch.equal(blocks.seen(chosen), seen)


@each_heads
@pytest.mark.parametrize(("size", "count"), [(1, 2), (3, 2), (4, 9), (5, 1), (30, 1)])
def test_the_core_is_masked_attention_forward_and_backward(
    documents: Documents, heads: tuple[int, int, int], size: int, count: int
) -> None:
    q, k, v = drawn(documents, heads)
    blocks = Blocks.of(documents, size, CPU)
    chosen = choose_blocks(q, blocks.means(k), blocks, count=count, choosers=heads[2])
    _, seen = written_out(q, k, documents, heads, size=size, count=count)
    up = torch.randn(q.shape, generator=torch.Generator().manual_seed(4), dtype=q.dtype)
    found, expected = blocks_core(q, k, v, chosen, blocks), masked(q, k, v, seen)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    grads = [torch.autograd.grad(t, (q, k, v), up) for t in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("most", [1, 20, 64, 200])
def test_calls_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """A block that many queries choose is cut into pieces, and products with means into rows."""
    documents, heads = Documents(ROWS["documents"]), HEADS["group"]
    q, k, v = drawn(documents, heads)
    results = []
    for scores in (module.SCORES, most):
        monkeypatch.setattr(module, "SCORES", scores)
        blocks = Blocks.of(documents, 3, CPU)
        chosen = choose_blocks(q, blocks.means(k), blocks, count=2, choosers=2)
        out = blocks_core(q, k, v, chosen, blocks)
        results.append([chosen, out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_equal_products_choose_the_earlier_blocks() -> None:
    documents = Documents(((20,), (8, 12)))
    blocks, means = Blocks.of(documents, 4, CPU), torch.ones(2, 5, 1, 4)
    chosen = choose_blocks(torch.ones(2, 20, 1, 4), means, blocks, count=2, choosers=1)
    own = torch.arange(20) // 4
    assert chosen[0, :, 0].tolist() == [[min(1, o), 2 if o > 1 else 0] for o in own.tolist()]
    assert chosen[1, :, 0].tolist() == [[0, 0]] * 4 + [[1, 0]] * 4 + [[0, 0]] * 4 + [[3, 0]] * 4 + [[3, 4]] * 4


def test_autocast_does_not_round_the_products_that_are_compared() -> None:
    """The second block is larger by 2^-10, which bf16 rounds away."""
    blocks, means = Blocks.of(Documents(((12,),)), 4, CPU), torch.ones(1, 3, 1, 4)
    means[0, 1] += 2**-10
    with torch.autocast("cpu", torch.bfloat16):
        chosen = choose_blocks(torch.ones(1, 12, 1, 4), means, blocks, count=1, choosers=1)
    assert chosen[0, 8:, 0].tolist() == [[2]] * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_query_that_is_no_number_does_not_choose_a_block_that_is_none_of_its_candidates(value: float) -> None:
    blocks = Blocks.of(Documents(((20,),)), 4, CPU)
    chosen = choose_blocks(torch.full((1, 20, 1, 4), value), torch.ones(1, 5, 1, 4), blocks, count=3, choosers=1)
    for t, row in enumerate(chosen[0, :, 0].tolist()):
        assert all(j <= t // 4 for j in row)


def test_scores_of_blocks_that_were_not_chosen_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of chosen blocks at most 1.25 times as many as are needed, of own blocks their full square."""
    documents, size, members = Documents(((256,), (256,))), 16, 3
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(2, 256, n, 8, generator=generator) for n in (2 * members, 2))
    blocks = Blocks.of(documents, size, CPU)
    chosen = choose_blocks(q, blocks.means(k), blocks, count=2, choosers=2)
    made: dict[bool, int] = {True: 0, False: 0}
    plain = module._Call.scores

    def counted(call: module._Call, *given: Tensor) -> Tensor:
        scores = plain(call, *given)
        made[call.hidden is None] += scores.numel()
        return scores

    monkeypatch.setattr(module._Call, "scores", counted)
    blocks_core(q, k, k, chosen, blocks)
    needed = int((chosen > 0).sum()) * members * size
    assert needed <= made[True] <= module.SPREAD * needed
    assert made[False] == 2 * 256 * 2 * members * size
    assert made[True] + made[False] < 2 * 6 * 256 * 257 / 2 / 2  # half of what causal attention needs


@each_heads
def test_in_bf16_it_is_close_to_float64(heads: tuple[int, int, int]) -> None:
    """Rounding of products to 8 bits, as of relative positions: 1e-2 of the norm."""
    documents = Documents(((300,), (120, 180)))
    generator = torch.Generator().manual_seed(6)
    shapes = [heads[0], heads[1], heads[1], heads[0]]
    q, k, v, up = (torch.randn(2, 300, n, 16, generator=generator).bfloat16() for n in shapes)
    blocks = Blocks.of(documents, 32, CPU)
    chosen = choose_blocks(q, blocks.means(k), blocks, count=2, choosers=heads[2])
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        given = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = blocks_core(given[0], given[1], given[2], chosen, blocks)
        results.append([out, *torch.autograd.grad(out, given, up.to(dtype))])
    for a, b in zip(*results, strict=True):
        assert a.dtype == torch.bfloat16
        assert float(((a.double() - b).norm() / b.norm()).detach()) < 1e-2
