"""The buffers of the KV cache: what they return, how far they grow, and what autograd sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headway.model.attention.gqa import GqaConfig
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder
from headway.model.kv_cache import KVCache


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


@pytest.mark.parametrize("positions", ["rope", "relative_xl"])
def test_a_model_that_decoded_in_inference_mode_has_the_gradients_of_a_fresh_one(positions: str) -> None:
    """Tables that are kept between passes must not be made in that mode: autograd refuses them."""
    config = GqaConfig(heads=4, kv_heads=2, head_dim=8)
    shape = ModelConfig(width=32, layers=2, ffn_width=48, init_std=0.1, positions=positions)  # pyright: ignore[reportArgumentType]
    used, fresh = (Decoder(shape, config, vocab_size=16, seed=1) for _ in range(2))
    tokens = torch.randint(0, 16, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        cache = used.new_cache()
        used.logits(tokens, cache=cache)
        used.logits(tokens[:, :1], cache=cache)
    for model in (used, fresh):
        model(tokens, tokens).loss_sum.backward()
    for (name, got), (_, expected) in zip(used.named_parameters(), fresh.named_parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=0, atol=0, msg=name)
