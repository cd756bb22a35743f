"""The global order: every sequence once per epoch, shards in windows, and stable between versions."""

from __future__ import annotations

import numpy as np
import pytest

from headway.data.order import GlobalOrder, permutation

COUNTS = [5, 0, 7, 1, 0, 0, 9, 3, 4]


def epoch_of(order: GlobalOrder, epoch: int) -> list[int]:
    n = order.num_sequences
    return [order.index(epoch * n + place) for place in range(n)]


@pytest.mark.parametrize("window", [1, 2, 3, 8, 100])
def test_every_sequence_occurs_once_per_epoch(window: int) -> None:
    order = GlobalOrder(COUNTS, seed=3, window=window)
    assert order.num_sequences == sum(COUNTS)
    epochs = [epoch_of(order, epoch) for epoch in range(3)]
    for found in epochs:
        assert sorted(found) == list(range(sum(COUNTS)))
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_window_holds_its_shards_and_no_others(window: int) -> None:
    order = GlobalOrder(COUNTS, seed=1, window=window)
    shard_of = np.repeat(np.arange(len(COUNTS)), COUNTS)
    shards = shard_of[epoch_of(order, 0)].tolist()
    seen: list[set[int]] = []  # were windows mixed, a shard would come again in a later set
    while shards:
        members = set(shards[:1])
        while shards and (shards[0] in members or len(members) < window):
            members.add(shards.pop(0))
        seen.append(members)
    assert sum(len(members) for members in seen) == len({s for s, count in enumerate(COUNTS) if count})
    assert set(order.shards_after(0)) == seen[1]


def test_the_window_after_the_last_is_the_first_of_the_next_epoch() -> None:
    order = GlobalOrder(COUNTS, seed=1, window=2)
    n = order.num_sequences
    shard_of = np.repeat(np.arange(len(COUNTS)), COUNTS)
    assert shard_of[order.index(n)] in order.shards_after(n - 1)


def test_positions_can_be_asked_for_in_any_order() -> None:
    forward = GlobalOrder(COUNTS, seed=5, window=2)
    expected = [forward.index(position) for position in range(200)]
    backward = GlobalOrder(COUNTS, seed=5, window=2)
    assert [backward.index(position) for position in reversed(range(200))] == expected[::-1]


def test_seeds_give_different_orders() -> None:
    assert epoch_of(GlobalOrder([50], seed=0, window=8), 0) != epoch_of(GlobalOrder([50], seed=1, window=8), 0)


def test_the_order_is_the_one_of_every_other_version() -> None:
    # Written down once: a change here means that no run can be resumed or compared across the change.
    assert permutation(8, "window", 0, 0, 0).tolist() == [4, 1, 5, 3, 7, 2, 0, 6]
    order = GlobalOrder([3, 2, 4], seed=0, window=2)
    assert [order.index(position) for position in range(12)] == [4, 1, 3, 2, 0, 5, 8, 6, 7, 2, 1, 3]
