"""Greedy and beam search: batches of different prompts, the cache of every mechanism, and exhaustive references.

Also of encoder-decoders, whose prompt starts a target, and whose encoder reads a source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from layer_chains import FORMS, made

from headway.launcher.exchange.generate import Sampling, continuation
from headway.launcher.exchange.search import Found, Search, search
from headway.model.attention.block_sparse import BlockSparseConfig
from headway.model.attention.gated_delta import GatedDeltaConfig
from headway.model.attention.gqa import GqaConfig
from headway.model.attention.mla import MlaConfig
from headway.model.attention.namoh import NamohConfig
from headway.model.attention.wgqa import WgqaConfig
from headway.model.base import AttentionConfig
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder
from headway.model.mixed import MixedConfig
from headway.model.seq2seq.build import Model
from headway.model.seq2seq.model import EncoderDecoder, SequenceCache

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8], [9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6], [2, 7]]


def tiny(vocabulary: int, *, seed: int = 1, positions: int | None = None) -> Decoder:
    fields = {} if positions is None else {"positions": "learned", "max_positions": positions}
    model = ModelConfig(width=20, layers=2, ffn_width=28, init_std=0.5, tied_embeddings=False, **fields)
    config = GqaConfig(heads=4, kv_heads=2, head_dim=6)
    return Decoder(model, config, vocab_size=vocabulary, seed=seed).double().eval()


def whole_pass(model: Model, ids: Sequence[int], source: Sequence[int] | None) -> torch.Tensor:
    """Log-probabilities [S, V] after each of the tokens, without a cache, a batch and padding."""
    with torch.no_grad():
        if isinstance(model, EncoderDecoder):
            assert source is not None
            return torch.log_softmax(model.logits(torch.tensor([[*source]]), torch.tensor([[*ids]])), -1)[0]
        return torch.log_softmax(model.logits(torch.tensor([[*ids]])), -1)[0]


def log_probabilities(
    model: Model, prompt: Sequence[int], ids: Sequence[int], source: Sequence[int] | None = None
) -> list[float]:
    """Of each token of `ids` after the prompt, in one pass without a cache."""
    log_p = whole_pass(model, [*prompt, *ids], source)
    return [float(log_p[len(prompt) - 1 + n, id]) for n, id in enumerate(ids)]


def plain_beam_search(
    model: Model, prompt: Sequence[int], how: Search, eos_id: int, source: Sequence[int] | None = None
) -> Found:
    """The rule, without a cache and without a batch: every continuation of every live hypothesis is ranked."""
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    candidates: list[tuple[float, Found]] = []
    for step in range(1, how.tokens + 1):
        ranked = []
        for total, ids in live:
            last = whole_pass(model, [*prompt, *ids], source)[-1]
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


MIXED = MixedConfig(
    kinds={
        "state": GatedDeltaConfig(heads=2, head_dim=6, chunk=4),
        "blocks": BlockSparseConfig(heads=4, kv_heads=2, head_dim=6, block=3, blocks=1),
        "routed": NamohConfig(heads=4, head_dim=6, top_k=2),
        "latent": MlaConfig(heads=4, head_dim=6, latent=7, rope_dim=4),
    },
    pattern=["state", "blocks", "routed", "latent"],
)
"""With a cache of its own form in each layer."""


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_of_different_prompts_gives_what_each_gives_alone(mechanism, decoder, beams):
    check_batch(decoder(mechanism).eval(), beams)


@pytest.mark.parametrize("config", [FORMS["learned"], FORMS["shared, windows"], MIXED], ids=["values", "kv", "mixed"])
def test_so_does_one_where_layers_share_or_differ(config):
    check_batch(made(config).eval(), beams=3)


def check_batch(model: Decoder, beams: int) -> None:
    how = Search(tokens=6, beams=beams)
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


# ------------------------------------------------------------ encoder-decoders

STARTS = [[7], [7], [7, 1, 0], [7], [7, 1]]


def both_stacks(
    positions: Any, *, attention: AttentionConfig | None = None, vocabulary: int = 11, seed: int = 1
) -> EncoderDecoder:
    shape: dict[str, Any] = {"width": 20, "layers": 2, "encoder_layers": 1, "ffn_width": 28, "init_std": 0.5}
    model = ModelConfig(type="encoder_decoder", positions=positions, tied_embeddings=False, **shape)
    config = attention or GqaConfig(heads=4, kv_heads=2, head_dim=6)
    return EncoderDecoder(model, config, vocab_size=vocabulary, seed=seed).double().eval()


@pytest.mark.parametrize("positions", ["rope", "relative_t5"])
@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (3, 0.0), (4, 1.0)])
def test_sources_of_a_batch_are_continued_by_the_rule(positions: str, beams: int, penalty: float) -> None:
    """Scores are those of the whole pass of one source and one hypothesis."""
    ended = set()
    for seed in range(3):
        model, how = both_stacks(positions, seed=seed), Search(tokens=6, beams=beams, length_penalty=penalty)
        found = search(model, STARTS, how, eos_id=2, sources=PROMPTS, batch_rows=100)
        for start, source, result in zip(STARTS, PROMPTS, found, strict=True):
            check_same(result, plain_beam_search(model, start, how, 2, source))
            ended.add(result.ended)
    assert ended == {True, False}


@pytest.mark.parametrize("attention", [WgqaConfig(heads=4, kv_heads=2, head_dim=6, weights="column", start="random")])
def test_one_beam_of_an_encoder_decoder_is_greedy_search(attention: AttentionConfig) -> None:
    model = both_stacks("relative_t5", attention=attention)
    greedy = Sampling(tokens=9, temperature=0.0, top_p=1.0, seed=1)
    for eos_id in (3, None):
        many = search(model, STARTS, Search(tokens=9), eos_id=eos_id, sources=PROMPTS)
        for start, source, found in zip(STARTS, PROMPTS, many, strict=True):
            alone = continuation(model, start, greedy, eos_id=eos_id, stats={}, sources=[source])
            assert list(found.ids) == list(alone)


def test_a_source_is_read_once_and_hypotheses_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read, kept = both_stacks("rope"), [], []
    encode, next_logits = EncoderDecoder.encode, EncoderDecoder.next_logits

    def counted(self: EncoderDecoder, source: torch.Tensor, *args: Any) -> torch.Tensor:
        read.append(tuple(source.shape))
        return encode(self, source, *args)

    def watched(self: EncoderDecoder, tokens: torch.Tensor, cache: SequenceCache) -> torch.Tensor:
        logits = next_logits(self, tokens, cache)
        held = cache.across[0].held
        assert held is not None and len(held[0]) == len(tokens) == len(cache.states)
        kept.append((len(tokens), held[0].data_ptr()))
        return logits

    monkeypatch.setattr(EncoderDecoder, "encode", counted)
    monkeypatch.setattr(EncoderDecoder, "next_logits", watched)
    search(model, [[7]] * 2, Search(tokens=8, beams=3), eos_id=None, sources=[[1, 2, 3], [4, 5]])
    assert read == [(2, 3)]
    assert [rows for rows, _ in kept] == [2] + [6] * 7
    assert len({place for _, place in kept[1:]}) == 1  # beams change places, and nothing of the sources is copied


def test_long_sources_do_not_share_a_batch_with_short_ones() -> None:
    model, finished = both_stacks("relative_t5"), []
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randint(0, 11, (n,), generator=generator).tolist() for n in (2, 90, 5, 80)]
    many = search(model, [[7]] * 4, Search(tokens=3, beams=2), eos_id=0, sources=sources, done=finished.append)
    assert finished == [2, 2]
    for source, found in zip(sources, many, strict=True):
        check_same(found, plain_beam_search(model, [7], Search(tokens=3, beams=2), 0, source))
