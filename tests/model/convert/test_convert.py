"""Reordering and aligning heads do not change the function, and alignment lowers the error of pooling."""

from itertools import combinations, product

import pytest
import torch

from headway.model.attention.gqa import GqaConfig, MhaConfig
from headway.model.convert.grouping import (
    best_numbers,
    best_sizes,
    cohesion,
    dispersion,
    group_heads,
    split,
    tree_sizes,
)
from headway.model.convert.heads import align, mean_pool, permute_heads, similarity

HEADS, D, WIDTH = 6, 10, 20


def mha(rope_fraction=0.6):
    return MhaConfig(heads=HEADS, head_dim=D, rope_fraction=rope_fraction)


def gqa(groups, **fields):
    return GqaConfig(heads=HEADS, kv_heads=groups, head_dim=D, **{"rope_fraction": 0.6, **fields})


def weights_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.fixture
def output(layer, context, x):
    """What a layer with the given weights makes of x."""

    def compute(config, weights):
        module = layer(config)
        module.load_state_dict(weights)
        return module(x, context(config)).y.detach()

    return compute


def unchanged(after, before):
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)


def orthogonal(count, size):
    return torch.linalg.qr(torch.randn(count, size, size, dtype=torch.float64)).Q


def plane_rotations(count, rotated):
    """Random rotations of channels (i, i + R/2), and orthogonal matrices on those without RoPE: [count, D, D]."""
    half = rotated // 2
    angle = torch.rand(count, half, dtype=torch.float64) * 6.3
    cos, sin = torch.diag_embed(angle.cos()), torch.diag_embed(angle.sin())
    turn = torch.zeros(count, D, D, dtype=torch.float64)
    turn[:, :rotated, :rotated] = torch.cat([torch.cat([cos, -sin], 2), torch.cat([sin, cos], 2)], 1)
    turn[:, rotated:, rotated:] = orthogonal(count, D - rotated)
    return turn


def turned_copies(layer, rotated, *, groups=2, noise=0.0):
    """MHA whose heads are, group by group, turned copies of one key and one value head; queries and w_o are free."""
    weights = weights_of(layer(mha(rotated / D)))
    for name, turns in (("w_k", plane_rotations(HEADS, rotated)), ("w_v", orthogonal(HEADS, D))):
        heads = weights[name].unflatten(0, (HEADS, D))
        first = heads[:: HEADS // groups].repeat_interleave(HEADS // groups, 0)
        copies = turns @ first
        weights[name] = (copies + noise * torch.randn_like(copies)).flatten(0, 1)
    return weights


SHUFFLED = [4, 0, 3, 1, 5, 2]


def partition(order, groups):
    size = len(order) // groups
    return {frozenset(order[i : i + size]) for i in range(0, len(order), size)}


@pytest.mark.parametrize("qk_norm", [False, True])
def test_reordered_heads_are_the_same_function(layer, output, qk_norm):
    config = MhaConfig(heads=HEADS, head_dim=D, qk_norm=qk_norm)
    weights = weights_of(layer(config))
    moved = permute_heads(weights, SHUFFLED, head_dim=D)
    assert torch.equal(moved["w_k"][:D], weights["w_k"][4 * D : 5 * D])
    unchanged(output(config, moved), output(config, weights))


def test_whole_groups_move_with_their_key_and_value(layer, output):
    weights = weights_of(layer(gqa(2)))
    moved = permute_heads(weights, [5, 3, 4, 0, 2, 1], head_dim=D)
    assert torch.equal(moved["w_v"], weights["w_v"].roll(D, 0))
    unchanged(output(gqa(2), moved), output(gqa(2), weights))
    with pytest.raises(ValueError, match=r"^order: separates query heads.*use .* or "):
        permute_heads(weights, [0, 1, 3, 2, 4, 5], head_dim=D)


def test_reordering_without_the_output_projection_is_another_function(layer, output):
    weights = weights_of(layer(mha()))
    moved = permute_heads(weights, SHUFFLED, head_dim=D)
    moved["w_o"] = weights["w_o"]
    assert (output(mha(), moved) - output(mha(), weights)).abs().max() > 0.1


@pytest.mark.parametrize("how", ["mean", "first"])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_pooling_is_mha_whose_groups_share_one_key_and_value(layer, output, groups, how):
    weights = weights_of(layer(mha()))
    shared = dict(weights)
    for name in ("w_k", "w_v"):
        heads = list(weights[name].split(D))
        size = HEADS // groups
        for g in range(groups):
            members = heads[g * size : (g + 1) * size]
            heads[g * size : (g + 1) * size] = [sum(members) / size if how == "mean" else members[0]] * size
        shared[name] = torch.cat(heads)
    pooled = mean_pool(weights, groups, head_dim=D, how=how)
    assert pooled["w_k"].shape == (groups * D, WIDTH)
    torch.testing.assert_close(output(gqa(groups), pooled), output(mha(), shared), rtol=0, atol=1e-12)


@pytest.mark.parametrize("criterion", ["cosine", "distance"])
@pytest.mark.parametrize("rotated", [0, 6, 10])
def test_alignment_is_the_same_function(layer, output, x, rotated, criterion):
    config = mha(rotated / D)
    weights = weights_of(layer(config))
    aligned = align(weights, x, groups=2, head_dim=D, rotated=rotated, criterion=criterion)
    assert all((aligned[name] - weights[name]).abs().max() > 0.1 for name in weights)
    unchanged(output(config, aligned), output(config, weights))


def test_alignment_of_heads_that_already_share_keys_is_the_same_function(layer, output, x):
    weights = weights_of(layer(gqa(3)))
    aligned = align(weights, x, groups=1, head_dim=D, rotated=6)
    assert all((aligned[name] - weights[name]).abs().max() > 0.1 for name in weights)
    unchanged(output(gqa(3), aligned), output(gqa(3), weights))


def test_rotating_channels_across_rope_planes_changes_the_function(layer, output, x):
    """The planes of `align` must be those of RoPE: with others declared, the function is lost."""
    weights = weights_of(layer(mha(0.6)))
    aligned = align(weights, x, groups=2, head_dim=D, rotated=10)
    assert (output(mha(0.6), aligned) - output(mha(0.6), weights)).abs().max() > 0.01


@pytest.mark.parametrize("by", ["activations", "weights"])
@pytest.mark.parametrize("criterion", ["cosine", "distance"])
@pytest.mark.parametrize("rotated", [0, 6, 10])
def test_pooling_rotated_copies_is_exact_after_grouping_and_alignment(layer, output, x, rotated, criterion, by):
    config, pooled_config = mha(rotated / D), gqa(2, rope_fraction=rotated / D)
    given = permute_heads(turned_copies(layer, rotated), SHUFFLED, head_dim=D)
    before = output(config, given)

    def pooled(weights):
        return output(pooled_config, mean_pool(weights, 2, head_dim=D))

    x = x if by == "activations" else None
    for of in ("value", "key"):
        scores = similarity(given, x, head_dim=D, rotated=rotated, of=of, criterion=criterion)
        order = group_heads(scores, 2, restarts=5, swaps=50)
        assert partition([SHUFFLED[head] for head in order], 2) == {frozenset({0, 1, 2}), frozenset({3, 4, 5})}
    grouped = permute_heads(given, order, head_dim=D)
    aligned = align(grouped, x, groups=2, head_dim=D, rotated=rotated, criterion=criterion)
    unchanged(pooled(aligned), before)
    in_place = align(given, x, groups=2, head_dim=D, rotated=rotated, criterion=criterion)
    for incomplete in (given, grouped, in_place):  # neither; no alignment; no grouping
        assert (pooled(incomplete) - before).norm() > 0.1 * before.norm()


def test_alignment_and_grouping_lower_the_error_of_pooling_noisy_copies(layer, output, x):
    given = permute_heads(turned_copies(layer, 6, noise=0.05), SHUFFLED, head_dim=D)
    before = output(mha(), given)

    def error(weights):
        return float((output(gqa(2), mean_pool(weights, 2, head_dim=D)) - before).norm() / before.norm())

    order = group_heads(similarity(given, x, head_dim=D, rotated=6), 2, restarts=5, swaps=50)
    grouped = permute_heads(given, order, head_dim=D)
    aligned = error(align(grouped, x, groups=2, head_dim=D, rotated=6))
    in_place = error(align(given, x, groups=2, head_dim=D, rotated=6))
    assert 0.01 < aligned < 0.5 * in_place
    assert in_place < error(given)


def test_no_rotation_moves_a_head_closer_to_the_mean_of_its_aligned_group(layer, x):
    weights = weights_of(layer(mha()))
    aligned = align(weights, x, groups=2, head_dim=D, rotated=0, criterion="distance")
    for name in ("w_k", "w_v"):

        def heads(weights, name=name):  # [G, P, N, D]
            return (x.flatten(0, 1) @ weights[name].T).unflatten(-1, (2, 3, D)).permute(1, 2, 0, 3)

        def spread(heads):
            return float((heads - heads.mean(1, keepdim=True)).square().sum())

        y = heads(aligned)
        u, _, vh = torch.linalg.svd(y.mT @ y.mean(1, keepdim=True))
        assert spread(y) < 0.5 * spread(heads(weights))
        # Iteration stops at a gain of 1e-5 of the squared norm of the mean; after one round, 1e-2 is left.
        assert spread(y @ (u @ vh)) > (1 - 1e-3) * spread(y)


@pytest.mark.parametrize(("of", "turns"), [("value", orthogonal), ("key", plane_rotations)])
def test_similarity_is_that_of_the_best_rotation(layer, x, of, turns):
    """No turn of 2000 random ones brings two heads nearer; a turned copy is as near as the head itself."""
    weights = weights_of(layer(mha()))
    name = {"value": "w_v", "key": "w_k"}[of]
    heads = weights[name].unflatten(0, (HEADS, D))
    heads[1] = turns(1, 6 if of == "key" else D)[0] @ heads[0]
    y = torch.einsum("bsx,hdx->hbsd", x, heads).flatten(1, 2)  # [H, N, D]
    cosine = similarity(weights, x, head_dim=D, rotated=6, of=of)
    distance = similarity(weights, x, head_dim=D, rotated=6, of=of, criterion="distance")
    torch.testing.assert_close(cosine.diagonal(), torch.ones(HEADS, dtype=torch.float64))
    assert float(cosine[0, 1]) == pytest.approx(1.0) and float(distance[0, 1]) == pytest.approx(0.0, abs=1e-9)
    assert float(cosine[0, 2]) < 0.99
    turned = y[0] @ turns(2000, 6 if of == "key" else D)  # [2000, N, D]
    best = torch.nn.functional.cosine_similarity(turned, y[2], dim=-1).mean(1).max()
    nearest = (turned - y[2]).square().sum(-1).mean(1).min()
    assert best < cosine[0, 2] and -nearest < distance[0, 2]


@pytest.mark.parametrize(("of", "turns"), [("value", orthogonal), ("key", plane_rotations)])
def test_similarity_of_weights_is_the_cosine_of_the_best_rotation(layer, of, turns):
    """For values the largest inner product is the sum of the singular values of W_i W_j^T (orthogonal Procrustes)."""
    weights = weights_of(layer(mha()))
    name = {"value": "w_v", "key": "w_k"}[of]
    heads = weights[name].unflatten(0, (HEADS, D))
    heads[1] = 3 * turns(1, 6 if of == "key" else D)[0] @ heads[0]
    own = {"head_dim": D, "rotated": 6, "of": of}
    cosine, plain = similarity(weights, None, **own), similarity(weights, None, aligned=False, **own)
    flat = torch.nn.functional.normalize(heads.flatten(1), dim=1)
    torch.testing.assert_close(plain, flat @ flat.T, rtol=0, atol=1e-12)
    assert float(cosine[0, 1]) == pytest.approx(1.0) and float(plain[0, 1]) < 0.99
    turned = (turns(2000, 6 if of == "key" else D) @ heads[0]).flatten(1)
    best = torch.nn.functional.cosine_similarity(turned, heads[2].flatten(), dim=1).max()
    assert best < cosine[0, 2] < 1
    if of == "value":
        nuclear = torch.linalg.matrix_norm(heads[0] @ heads[2].T, ord="nuc")
        assert float(cosine[0, 2]) == pytest.approx(float(nuclear / heads[0].norm() / heads[2].norm()))


def vectors(groups, *, noise=0.0):
    """Unit vectors [K, 12] of heads that are equal within each of the groups of the given sizes, in a mixed order."""
    centre = torch.repeat_interleave(torch.randn(len(groups), 12, dtype=torch.float64), torch.tensor(groups), 0)
    mixed = torch.randperm(len(centre))
    found = centre[mixed] + noise * torch.randn(len(centre), 12, dtype=torch.float64)
    owner = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))[mixed]
    planted = {frozenset(torch.nonzero(owner == g)[:, 0].tolist()) for g in range(len(groups))}
    return torch.nn.functional.normalize(found, dim=1), planted


def test_the_dispersion_is_the_mean_squared_distance_to_the_mean_of_the_own_group():
    unit, _ = vectors([1, 1, 1, 1, 1, 1, 1])
    groups = [[3, 0, 5], [1], [6, 2, 4]]
    apart = sum(float((unit[group] - unit[group].mean(0)).square().sum()) for group in groups)
    assert dispersion(unit @ unit.T, groups) == pytest.approx(apart / 7, abs=1e-12)
    assert cohesion(unit @ unit.T, groups) == pytest.approx(7 - 3 - apart, abs=1e-12)


@pytest.mark.parametrize("sizes", [[2, 2, 2], [1, 2, 5], [4, 1, 1, 3]])
def test_planted_groups_of_any_sizes_are_recovered(sizes):
    unit, planted = vectors(sizes, noise=0.1)
    alike = unit @ unit.T
    order = group_heads(alike, sizes, restarts=30, swaps=200)
    assert {frozenset(group) for group in split(order, sizes)} == planted
    assert tree_sizes(alike, len(sizes)) == sorted(sizes) == best_sizes([alike, alike], len(sizes))
    exact, _ = vectors(sizes)
    order = group_heads(exact @ exact.T, sizes, restarts=30, swaps=200)
    assert dispersion(exact @ exact.T, split(order, sizes)) == pytest.approx(0, abs=1e-12)


def test_sizes_are_those_of_the_least_dispersion_over_all_layers():
    """Two layers whose own best sizes differ: the choice has the smaller sum, which is compared by hand."""
    one, two = (vectors(sizes, noise=noise)[0] for sizes, noise in (([1, 5], 0.02), ([3, 3], 0.6)))
    layers = [one @ one.T, two @ two.T]
    assert tree_sizes(layers[0], 2) == [1, 5]

    def total(sizes):
        return sum(dispersion(a, split(group_heads(a, sizes, restarts=30, swaps=200), sizes)) for a in layers)

    candidates = {tuple(tree_sizes(alike, 2)) for alike in layers} | {(3, 3)}
    assert len(candidates) > 1
    assert best_sizes(layers, 2) == list(min(candidates, key=total))
    assert best_sizes([torch.ones(6, 6)], 3) == [2, 2, 2]  # of equal sums, the equal sizes
    with pytest.raises(ValueError, match=r"^groups: 6 KV heads do not make 7 groups; use 1 to 6"):
        best_sizes(layers, 7)


def test_numbers_of_layers_are_those_of_the_least_dispersion_of_all_choices():
    """Compared with every choice of a divisor for each of three layers."""
    layers = [v @ v.T for v in (vectors(s, noise=n)[0] for s, n in (([6], 0.1), ([3, 3], 0.3), ([2, 2, 2], 0.5)))]
    legal = (1, 2, 3, 6)

    def loss(alike, groups):
        sizes = [6 // groups] * groups
        return dispersion(alike, split(group_heads(alike, groups), sizes))

    losses = [{g: loss(alike, g) for g in legal} for alike in layers]
    seen = set()
    for total in (3, 4, 7, 10, 14):
        choices = [numbers for numbers in product(legal, repeat=3) if sum(numbers) <= total]
        least = min(sum(losses[i][g] for i, g in enumerate(numbers)) for numbers in choices)
        found = best_numbers(layers, total)
        assert sum(found) <= total
        assert sum(losses[i][g] for i, g in enumerate(found)) == pytest.approx(least, abs=1e-8)
        seen.add(tuple(found))
    assert len(seen) > 3 and any(len(set(numbers)) > 1 for numbers in seen)
    assert best_numbers([torch.ones(6, 6)] * 2, 6) == [1, 1]  # equal heads: no more groups than needed
    with pytest.raises(ValueError, match=r"^groups: 2 in 3 layers leave a layer without one; use more"):
        best_numbers(layers, 2)


def test_grouping_finds_the_best_of_all_groupings_with_given_sizes():
    scores = torch.randn(7, 7)
    scores = scores + scores.T
    found = [
        [[one], [a, b], [h for h in range(7) if h not in (one, a, b)]]
        for one in range(7)
        for a, b in combinations([h for h in range(7) if h != one], 2)
    ]
    best = max(found, key=lambda grouping: cohesion(scores, grouping))
    order = group_heads(scores, [1, 2, 4], seed=3, restarts=30, swaps=200)
    assert split(order, [1, 2, 4]) == best


@pytest.mark.parametrize("groups", [2, 4])
def test_grouping_finds_the_best_of_all_groupings(groups):
    count = 8
    scores = 10 + torch.randn(count, count)
    scores = scores + scores.T

    def groupings(heads, size):
        if not heads:
            yield []
            return
        for rest in combinations(heads[1:], size - 1):
            group = (heads[0], *rest)
            for others in groupings([h for h in heads if h not in group], size):
                yield [group, *others]

    def total(grouping):
        return sum(float(scores[a, b]) for group in grouping for a, b in combinations(group, 2))

    best = max(groupings(list(range(count)), count // groups), key=total)
    order = group_heads(scores, groups, seed=3, restarts=20, swaps=100)
    assert order == [head for group in best for head in group]
    assert order == group_heads(scores, groups, seed=4, restarts=20, swaps=100)


def test_one_group_and_groups_of_one_keep_the_order():
    assert group_heads(torch.rand(4, 4), 1) == group_heads(torch.rand(4, 4), 4) == [0, 1, 2, 3]


def test_results_have_the_dtype_of_the_weights_and_leave_them_alone(layer, x):
    weights = {name: tensor.float() for name, tensor in layer(mha()).state_dict().items()}
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    for result in (
        permute_heads(weights, SHUFFLED, head_dim=D),
        mean_pool(weights, 3, head_dim=D),
        align(weights, x, groups=3, head_dim=D, rotated=6),
    ):
        assert set(result) == set(weights)
        assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in result.values())
    assert all(torch.equal(weights[name], copies[name]) for name in weights)


def test_qk_norm_cannot_be_aligned_but_is_pooled_with_its_gains(layer, x):
    weights = weights_of(layer(MhaConfig(heads=HEADS, head_dim=D, qk_norm=True)))
    with pytest.raises(ValueError, match=r"^weights: .*QK-norm.*use pooling without alignment, or a model"):
        align(weights, x, groups=2, head_dim=D, rotated=10)
    with pytest.raises(ValueError, match=r"^weights: .*QK-norm.*use the similarity of values, or a model"):
        similarity(weights, x, head_dim=D, rotated=10, of="key")
    assert similarity(weights, x, head_dim=D, rotated=10).shape == (HEADS, HEADS)
    layer(gqa(2, qk_norm=True)).load_state_dict(mean_pool(weights, 2, head_dim=D))


def test_incompatible_arguments_are_refused_with_two_ways_out(layer, x):
    weights = weights_of(layer(mha()))
    for call, message in (
        (lambda: mean_pool(weights, 4, head_dim=D), "groups: 6 KV heads .* 4 .* use 3 or 6"),
        (lambda: align(weights, x, groups=4, head_dim=D, rotated=6), "groups: .* use 3 or 6"),
        (lambda: group_heads(torch.rand(6, 6), 0), "groups: .* 0 .* use 1"),
        (lambda: permute_heads(weights, [0, 1, 2, 3, 4, 4], head_dim=D), "order: .* use .* or a permutation of 0 to 5"),
        (lambda: align(weights, x, groups=2, head_dim=D, rotated=5), "rotated: 5 of 10 .* use .* or an even number"),
        (lambda: mean_pool(weights, 2, head_dim=7), "head_dim: .* use .* or "),
        (lambda: mean_pool({**weights, "w_gate": x}, 2, head_dim=D), "weights: w_gate, .* use .* or "),
    ):
        with pytest.raises(ValueError, match="^" + message):
            call()
