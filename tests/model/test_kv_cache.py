"""The buffers of the KV cache: what they return, how far they grow, and what autograd sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headway.model.base import KVCache


def keys(tokens: int, *, seed: int = 0) -> Tensor:
    return torch.randn(2, tokens, 3, 4, generator=torch.Generator().manual_seed(seed))  # [B, S, G, D]


def storage(tensor: Tensor) -> int:
    """Tokens for which the buffer behind a returned view has room."""
    return tensor.untyped_storage().nbytes() // (2 * 3 * 4 * 4)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 40])
@pytest.mark.parametrize("sizes", [(1,) * 60, (7, 1, 1, 30, 1, 5, 1, 1), (20, 20, 20), (1, 59)])
def test_a_call_returns_the_cached_and_the_new_tokens(window: int | None, sizes: tuple[int, ...]) -> None:
    k, v, cache, begin, kept = keys(60), keys(60, seed=1), KVCache(), 0, 0
    for size in sizes:
        end = begin + size
        got = cache.extend(k[:, begin:end], v[:, begin:end], part="", window=window)
        torch.testing.assert_close(got, (k[:, begin - kept : end], v[:, begin - kept : end]), rtol=0, atol=0)
        kept = kept + size if window is None else min(kept + size, window - 1)
        assert cache.numbers == 2 * kept * 2 * 3 * 4
        begin = end


def test_buffers_double_and_stay_within_the_known_number_of_tokens() -> None:
    k, cache, rooms = keys(100), KVCache(100), []
    for i in range(100):
        rooms.append(storage(cache.extend(k[:, i : i + 1], k[:, i : i + 1], part="", window=None)[0]))
    assert sorted(set(rooms)) == [2, 6, 14, 30, 62, 100]
    beyond, _ = cache.extend(k, k, part="", window=None)
    torch.testing.assert_close(beyond, torch.cat([k, k], 1), rtol=0, atol=0)


def test_the_buffer_of_a_window_does_not_grow() -> None:
    k, cache = keys(500), KVCache()
    rooms = {storage(cache.extend(k[:, i : i + 1], k[:, i : i + 1], part="", window=8)[0]) for i in range(500)}
    assert max(rooms) <= 2 * 8


def test_gradients_of_new_tokens_survive_later_calls() -> None:
    new, cache = keys(5).requires_grad_(), KVCache()
    first, _ = cache.extend(new[:, :2], new[:, :2], part="", window=None)
    product = (first**2).sum()
    second, _ = cache.extend(new[:, 2:], new[:, 2:], part="", window=None)
    (product + (second**2).sum()).backward()
    torch.testing.assert_close(new.grad, 2 * new.detach(), rtol=0, atol=0)
