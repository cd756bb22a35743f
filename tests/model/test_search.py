"""Greedy and beam search: batches of different prompts, the cache of every mechanism, and exhaustive references."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import pytest
import torch

from headway.launcher.exchange.generate import Sampling, continuation
from headway.launcher.exchange.search import Found, Search, search
from headway.model.attention.gqa import GqaConfig
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8], [9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6], [2, 7]]


def tiny(vocabulary: int, *, seed: int = 1, positions: int | None = None) -> Decoder:
    fields = {} if positions is None else {"positions": "learned", "max_positions": positions}
    model = ModelConfig(width=20, layers=2, ffn_width=28, init_std=0.5, tied_embeddings=False, **fields)
    config = GqaConfig(heads=4, kv_heads=2, head_dim=6)
    return Decoder(model, config, vocab_size=vocabulary, seed=seed).double().eval()


def log_probabilities(model: Decoder, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
    """Of each token of `ids` after the prompt, in one pass without a cache."""
    with torch.no_grad():
        log_p = torch.log_softmax(model.logits(torch.tensor([[*prompt, *ids]])), -1)[0]
    return [float(log_p[len(prompt) - 1 + n, id]) for n, id in enumerate(ids)]


def plain_beam_search(model: Decoder, prompt: list[int], how: Search, eos_id: int) -> Found:
    """The rule, without a cache and without a batch: every continuation of every live hypothesis is ranked."""
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    candidates: list[tuple[float, Found]] = []
    for step in range(1, how.tokens + 1):
        ranked = []
        for total, ids in live:
            with torch.no_grad():
                last = torch.log_softmax(model.logits(torch.tensor([[*prompt, *ids]]))[0, -1], -1)
            ranked += [(total + float(p), (*ids, token)) for token, p in enumerate(last)]
        ranked.sort(key=lambda each: -each[0])
        for total, ids in ranked[: how.beams]:
            if ids[-1] == eos_id:
                candidates.append((total / step**how.length_penalty, Found(ids[:-1], total, True)))
        live = [each for each in ranked if each[1][-1] != eos_id][: how.beams]
        if len(candidates) >= how.beams:
            break
    else:
        candidates += [(total / how.tokens**how.length_penalty, Found(ids, total, False)) for total, ids in live]
    return max(candidates, key=lambda candidate: candidate[0])[1]


def check_same(found: Found, expected: Found) -> None:
    assert (found.ids, found.ended) == (expected.ids, expected.ended)
    assert found.log_p == pytest.approx(expected.log_p, rel=1e-12)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_of_different_prompts_gives_what_each_gives_alone(mechanism, decoder, beams):
    model, how = decoder(mechanism).eval(), Search(tokens=6, beams=beams)
    together = search(model, PROMPTS, how, eos_id=0, batch_rows=100)
    for prompt, found in zip(PROMPTS, together, strict=True):
        (alone,) = search(model, [prompt], how, eos_id=0)
        check_same(found, alone)
        ids = [*found.ids, 0] if found.ended else list(found.ids)
        assert found.log_p == pytest.approx(sum(log_probabilities(model, prompt, ids)), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_one_beam_is_greedy_search(seed):
    model = tiny(11, seed=seed)
    greedy = Sampling(tokens=9, temperature=0.0, top_p=1.0, seed=1)
    for eos_id in (0, 3, None):
        for prompt, found in zip(PROMPTS, search(model, PROMPTS, Search(tokens=9), eos_id=eos_id), strict=True):
            assert list(found.ids) == list(continuation(model, prompt, greedy, eos_id=eos_id, stats={}))


@pytest.mark.parametrize("beams", [2, 3, 5])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_beam_search_follows_its_rule(beams, penalty):
    ended = set()
    for seed in range(3):
        model, how = tiny(11, seed=seed), Search(tokens=7, beams=beams, length_penalty=penalty)
        for prompt, found in zip(PROMPTS, search(model, PROMPTS, how, eos_id=2), strict=True):
            check_same(found, plain_beam_search(model, prompt, how, eos_id=2))
            ended.add(found.ended)
    assert ended == {True, False}


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_with_beams_for_everything_it_finds_the_best_of_all_continuations(penalty):
    vocabulary, tokens, eos_id = 4, 4, 1
    beams = (vocabulary - 1) ** tokens + sum((vocabulary - 1) ** n for n in range(tokens))  # every continuation
    for seed in range(3):
        model = tiny(vocabulary, seed=seed)
        every = [
            [*ids, eos_id] if length < tokens else list(ids)
            for length in range(tokens + 1)
            for ids in product([id for id in range(vocabulary) if id != eos_id], repeat=length)
        ]
        for prompt in ([0, 2, 3], [2]):
            scores = [sum(log_probabilities(model, prompt, ids)) / len(ids) ** penalty for ids in every]
            best = every[max(range(len(every)), key=scores.__getitem__)]
            (found,) = search(
                model, [prompt], Search(tokens=tokens, beams=beams, length_penalty=penalty), eos_id=eos_id
            )
            assert [*found.ids, *([eos_id] if found.ended else [])] == best
            greedy = search(model, [prompt], Search(tokens=tokens), eos_id=eos_id)[0]
            assert greedy.log_p <= found.log_p + 1e-12 or penalty > 0


def test_prompts_are_spread_over_batches_and_keep_their_order():
    model = tiny(11, positions=160)
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 150, 3, 80, 2, 149, 5]
    prompts = [torch.randint(0, 11, (n,), generator=generator).tolist() for n in lengths]
    finished: list[int] = []
    many = search(model, prompts, Search(tokens=5, beams=2), eos_id=0, batch_rows=4, done=finished.append)
    assert sum(finished) == 7 and max(finished) == 2 and len(finished) > 3
    for prompt, found in zip(prompts, many, strict=True):
        check_same(found, plain_beam_search(model, prompt, Search(tokens=5, beams=2), eos_id=0))


def test_no_prompt_gives_nothing_and_one_token_is_the_most_likely():
    model = tiny(11)
    assert search(model, [], Search(tokens=3), eos_id=0) == []
    (found,) = search(model, [[4, 4]], Search(tokens=1), eos_id=None)
    assert math.isclose(found.log_p, max(log_probabilities(model, [4, 4], [id])[0] for id in range(11)), rel_tol=1e-12)
