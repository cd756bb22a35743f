"""Groups of heads that are alike: the search for given sizes, and sizes that scipy's hierarchical clustering proposes.

Legend: K heads, G groups, s_ij similarity of heads i and j (`headway.model.convert.heads.similarity`), |g| heads of
group g. All searches maximize

    J = sum over groups g of 1/|g| sum over i, j in g, i != j, of s_ij                     (`cohesion`)

For vectors of length 1 whose inner products are s_ij, the sum of squared distances to the mean of the own group is
K - G - J. The largest J of G groups is thus the smallest loss of replacing each head by the mean of its group, as in
Ward's clustering and k-means. For groups of equal size J orders groupings as the sum of similarities within groups
does, which arXiv 2412.20677 maximizes. After alignment, s_ij is that of the best rotation of each pair alone, so the
loss of the whole group may be larger.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def group_heads(
    similarity: Tensor, groups: int | Sequence[int], *, seed: int = 0, restarts: int = 200, swaps: int | None = None
) -> list[int]:
    """Group K heads by similarity: returns their order, as consecutive groups of K/G heads, or of the given sizes.

    similarity [K, K] is symmetric. `cohesion` is maximized by greedy hill climbing: starting from each of `restarts`
    random groupings, `swaps` random swaps of two heads of different groups are tried and kept if it increases (default:
    3000, fewer for few heads, so that each pair is tried about 40 times). Heads are sorted within their group, and
    groups of equal size by their first head, so equal groupings have equal orders.
    Raises ValueError unless `groups` divides K, or adds up to K.
    """
    count, sizes = len(similarity), sizes_of(len(similarity), groups)
    if len(sizes) in (1, count):
        return list(range(count))
    size = torch.tensor(sizes)
    place = torch.repeat_interleave(torch.arange(len(sizes)), size)  # [K]: the group of a position
    pairs = similarity.double().clone().fill_diagonal_(0.0)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(count, generator=generator) for _ in range(restarts)])  # [restarts, K]
    member = torch.nn.functional.one_hot(place, len(sizes)).double()  # [K, G]
    rows = torch.arange(restarts)
    swaps = min(3000, 20 * count * count) if swaps is None else swaps
    ends = size.cumsum(0)
    for _ in range(swaps):
        a = torch.randint(count, (restarts,), generator=generator)
        mine = size[place[a]]
        # A random position in another group: those behind the own group, and then from the first on.
        step = (torch.rand(restarts, generator=generator) * (count - mine)).long()
        b = (ends[place[a]] + step) % count
        head_a, head_b = order[rows, a], order[rows, b]
        of_a = pairs[head_a].gather(1, order) @ member  # [restarts, G]: sums of similarities to the heads of a group
        of_b = pairs[head_b].gather(1, order) @ member
        ours, theirs, between = place[a], place[b], pairs[head_a, head_b]
        gain = (of_b[rows, ours] - of_a[rows, ours] - between) / size[ours]
        gain += (of_a[rows, theirs] - of_b[rows, theirs] - between) / size[theirs]
        better = gain > 0
        order[rows, a] = torch.where(better, head_b, head_a)
        order[rows, b] = torch.where(better, head_a, head_b)
    found = [_sorted([part.tolist() for part in each.split(sizes)]) for each in order]
    best = max(found, key=lambda grouping: cohesion(similarity, grouping))
    return [head for group in best for head in group]


def cohesion(similarity: Tensor, groups: Sequence[Sequence[int]]) -> float:
    """J of a grouping: see the top of this file. similarity [K, K]."""
    total = 0.0
    for group in groups:
        within = similarity[list(group)][:, list(group)].double()
        total += float(within.sum() - within.diagonal().sum()) / len(group)
    return total


def dispersion(similarity: Tensor, groups: Sequence[Sequence[int]]) -> float:
    """1 - (G + J) / K of a grouping, from cosines [K, K]. 0: all heads of each group are equal.

    The mean over heads of the squared distance to the mean of the own group, where every head has length 1.
    """
    return 1 - (len(groups) + cohesion(similarity, groups)) / len(similarity)


def split(order: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """An order of heads as groups of consecutive heads of these sizes."""
    heads, found = list(order), []
    for size in sizes:
        found.append(heads[:size])
        heads = heads[size:]
    return found


def tree_sizes(similarity: Tensor, groups: int) -> list[int]:
    """Sizes of the `groups` clusters into which a tree of the heads is cut, ascending.

    The tree is scipy's hierarchical clustering by Ward's criterion, of the distances sqrt(2 - 2 s_ij). similarity
    [K, K]: of cosines. Raises ValueError unless there are 1 to K groups.
    """
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    count = len(similarity)
    if not 1 <= groups <= count:
        raise ValueError(f"groups: {count} KV heads do not make {groups} groups; use 1 to {count}")
    if count == 1:
        return [1]
    distance = (2 - 2 * similarity.double()).clamp_min(0).sqrt().fill_diagonal_(0.0)
    distance = (distance + distance.T) / 2  # equal but for rounding, and scipy demands it
    tree = hierarchy.linkage(squareform(distance.cpu().numpy(), checks=False), method="ward")
    labels = torch.from_numpy(hierarchy.cut_tree(tree, n_clusters=groups)[:, 0].copy()).long()
    return sorted(torch.bincount(labels, minlength=groups).tolist())


def best_sizes(similarities: Sequence[Tensor], groups: int, *, seed: int = 0) -> list[int]:
    """Sizes of G groups, ascending and the same in all layers, that have the largest `cohesion`, summed over layers.

    similarities: [K, K] of cosines, of each layer. Candidates are the sizes of each layer's tree (`tree_sizes`), and
    equal sizes if G divides K; for each, every layer is searched with `group_heads`. Of equal sums, the more equal
    sizes are taken. Raises ValueError unless there are 1 to K groups.
    """
    count = len(similarities[0])
    found = {tuple(tree_sizes(each, groups)) for each in similarities}
    if count % groups == 0:
        found.add((count // groups,) * groups)

    def total(sizes: tuple[int, ...]) -> float:
        orders = [group_heads(each, sizes, seed=seed, restarts=50, swaps=1000) for each in similarities]
        parts = zip(similarities, orders, strict=True)
        return sum(cohesion(each, split(order, sizes)) for each, order in parts)

    # Rounded, so that equal sums are equal. The most equal sizes have the smallest largest group.
    return list(max(sorted(found, key=lambda s: (max(s), s)), key=lambda sizes: round(total(sizes), 9)))


def best_numbers(similarities: Sequence[Tensor], total: int, *, seed: int = 0) -> list[int]:
    """Number of equal groups of each layer, `total` over all layers at most, with the least sum of `dispersion`.

    similarities: [K, K] of cosines, of each layer. Each layer is searched with `group_heads` for every divisor of K;
    the sum is then minimized exactly over all choices. Of equal sums, the more equal numbers are taken. Raises
    ValueError unless total is the number of layers or more.
    """
    count = len(similarities[0])
    if total < len(similarities):
        raise ValueError(f"groups: {total} in {len(similarities)} layers leave a layer without one; use more")
    legal = [g for g in range(1, count + 1) if count % g == 0]
    # Groups used so far -> (sum of dispersions, sum of squared numbers, the numbers), the best of each.
    best: dict[int, tuple[float, int, list[int]]] = {0: (0.0, 0, [])}
    for each in similarities:
        losses = {g: dispersion(each, split(group_heads(each, g, seed=seed), sizes_of(count, g))) for g in legal}
        found: dict[int, tuple[float, int, list[int]]] = {}
        for used, (loss, squares, numbers) in best.items():
            for g in legal:
                # Rounded, so that equal sums are equal.
                option = (round(loss + losses[g], 9), squares + g * g, [*numbers, g])
                if used + g <= total and (used + g not in found or option < found[used + g]):
                    found[used + g] = option
        best = found
    return min(best.values())[2]


def check_equal_groups(kv_heads: int, groups: int) -> None:
    """Raise ValueError unless the KV heads divide into `groups` equal groups."""
    if groups < 1 or kv_heads % groups:
        legal = [g for g in range(1, kv_heads + 1) if kv_heads % g == 0]
        below = max((g for g in legal if g < groups), default=1)
        above = min((g for g in legal if g > groups), default=kv_heads)
        use = f"{below} or {above}" if below != above else f"{below}, or a layer with {groups} KV heads"
        raise ValueError(f"groups: {kv_heads} KV heads do not divide into {groups} equal groups; use {use}")


def sizes_of(kv_heads: int, groups: int | Sequence[int]) -> list[int]:
    """KV heads of each group. Raises ValueError unless `groups` divides the KV heads, or adds up to them."""
    if isinstance(groups, int):
        check_equal_groups(kv_heads, groups)
        return [kv_heads // groups] * groups
    sizes = list(groups)
    if min(sizes, default=0) < 1 or sum(sizes) != kv_heads:
        raise ValueError(f"groups: sizes {sizes} do not add up to {kv_heads} KV heads; use sizes that do")
    return sizes


def _sorted(groups: list[list[int]]) -> list[list[int]]:
    """Heads sorted within their group; groups of one size sorted by their first head, at the places of that size."""
    inner = [sorted(group) for group in groups]
    by_size = {n: iter(sorted(group for group in inner if len(group) == n)) for n in {len(group) for group in inner}}
    return [next(by_size[len(group)]) for group in inner]
