"""Synthetic tasks: answers are determined by earlier tokens (minimum loss 0), not by the current one (chance loss)."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from headway.data.config import DataConfig, SyntheticSource
from headway.data.synthetic import SyntheticTask

CONFIGS: list[dict[str, Any]] = [
    {"task": "mqar", "vocab_size": 9, "pairs": 3, "queries": 2},
    {"task": "mqar", "vocab_size": 64},
    {"task": "copy", "vocab_size": 8, "span": 5},
    {"task": "induction", "vocab_size": 8, "span": 6, "queries": 4},
    {"task": "induction", "vocab_size": 64},
]
IDS = [f"{config['task']}-{config['vocab_size']}" for config in CONFIGS]


def task(config: dict[str, Any], **kwargs: Any) -> SyntheticTask:
    source = SyntheticSource(type="synthetic", **config)
    return SyntheticTask(source, **({"split": "train", "seq_len": 200, "seed": 7} | kwargs))


def problems(source: SyntheticTask, count: int) -> list[tuple[list[int], list[bool]]]:
    """(tokens, which of them are answers) of each problem of the first `count` sequences."""
    found = []
    for index in range(count):
        sample = source.sample(index)
        assert sample.targets is not None and len(sample.tokens) == source.seq_len + 1
        answers = np.concatenate([[False], sample.targets])
        for number in range(source.problems):
            inside = sample.segments == number
            found.append((sample.tokens[inside].tolist(), answers[inside].tolist()))
    return found


def oracle(kind: str, past: list[int], span: int) -> int:
    """Compute the answer from the earlier tokens only."""
    if kind == "copy":
        return past[len(past) - span - 1]
    return past[past.index(past[-1]) + 1]


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_an_oracle_that_sees_the_past_reaches_the_floor(config: dict[str, Any]) -> None:
    source = task(config)
    losses = []
    for tokens, answers in problems(source, 50):
        places = [place for place, answer in enumerate(answers) if answer]
        for place in places:
            guess = oracle(source.cfg.task, tokens[:place], source.cfg.span)
            losses.append(0.0 if guess == tokens[place] else math.inf)
    assert np.mean(losses) == source.loss_floor() == 0.0


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2], CONFIGS[3]], ids=lambda config: config["task"])
def test_the_best_predictor_without_memory_reaches_the_chance_loss(config: dict[str, Any]) -> None:
    # Frequencies of each answer, given its place in the problem and the token before it: everything such a predictor
    # can use. They are fitted to the very answers they predict, so they can only be too good, by about
    # cells / (2 * answers) <= 5 * 7 * 6 / 2 / 30_000 < 0.004.
    source = task(config)
    counts: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for tokens, answers in problems(source, 900):
        for place, answer in enumerate(answers):
            if answer:
                counts[place, tokens[place - 1]][tokens[place]] += 1
    total = sum(counter.total() for counter in counts.values())
    assert total > 30_000
    loss = sum(-n * math.log(n / counter.total()) for counter in counts.values() for n in counter.values()) / total
    assert source.chance_loss() - 0.005 < loss < source.chance_loss() + 0.001


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_problems_have_the_documented_layout(config: dict[str, Any]) -> None:
    source = task(config)
    cfg = source.cfg
    keys = (cfg.vocab_size - 1) // 2
    for tokens, answers in problems(source, 20):
        assert len(tokens) == cfg.problem_length and max(tokens) < cfg.vocab_size
        if cfg.task == "copy":
            assert sum(answers) == cfg.span and tokens[cfg.span] == 0 and 0 not in tokens[: cfg.span]
            continue
        assert sum(answers) == cfg.queries and 0 not in tokens
        asked = tokens[cfg.problem_length - 2 * cfg.queries :: 2]
        assert len(set(asked)) == cfg.queries
        if cfg.task == "mqar":
            shown = tokens[: 2 * cfg.pairs : 2]
            assert len(set(shown)) == cfg.pairs and set(asked) <= set(shown)
            assert max(shown) <= keys < min(tokens[1::2])
        else:
            assert len(set(tokens[: cfg.span])) == cfg.span and set(asked) <= set(tokens[: cfg.span - 1])


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_the_rest_of_a_sequence_is_padding_without_targets(config: dict[str, Any]) -> None:
    source = task(config)
    used = source.problems * source.cfg.problem_length
    assert 0 <= source.seq_len + 1 - used < source.cfg.problem_length
    sample = source.sample(0)
    assert sample.targets is not None
    assert not sample.tokens[used:].any() and not sample.targets[used:].any()
    assert set(sample.segments[used:].tolist()) <= {source.problems}


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_a_sequence_depends_on_seed_split_and_index_alone(config: dict[str, Any]) -> None:
    source = task(config)
    later = source.sample(41).tokens
    source.sample(3)
    np.testing.assert_array_equal(source.sample(41).tokens, later)
    np.testing.assert_array_equal(task(config).sample(41).tokens, later)
    for other in (task(config, seed=8), task(config, split="validation")):
        assert not np.array_equal(other.sample(41).tokens, later)
    assert not np.array_equal(source.sample(42).tokens, later)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"task": "mqar", "pairs": 3, "queries": 2}, [5, 11, 2, 10, 3, 11, 5, 11, 3, 11, 0, 0]),
        ({"task": "copy", "span": 5}, [5, 13, 15, 6, 14, 0, 5, 13, 15, 6, 14, 0]),
        ({"task": "induction", "span": 6, "queries": 2}, [1, 12, 8, 5, 10, 6, 12, 8, 5, 10, 0, 0]),
    ],
)
def test_the_sequences_are_the_ones_of_every_other_version(config: dict[str, Any], tokens: list[int]) -> None:
    # Written down once: results on these tasks can be compared as long as this stands.
    assert task(config | {"vocab_size": 16}, seq_len=11, seed=0).sample(0).tokens.tolist() == tokens


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"task": "mqar", "queries": 9}, "use queries <= pairs"),
        ({"task": "mqar", "vocab_size": 16}, "use pairs <= 7 or vocab_size >= 17"),
        ({"task": "induction", "span": 70}, "use span <= 63 or vocab_size >= 71"),
        ({"task": "induction", "span": 8}, "use queries <= 7 or span >= 9"),
    ],
)
def test_a_task_that_cannot_be_drawn_is_refused_with_two_ways_out(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SyntheticSource(type="synthetic", **settings)
    assert says in str(caught.value)


def test_the_smallest_legal_vocabularies_work() -> None:
    task({"task": "mqar", "vocab_size": 17, "pairs": 8}).sample(0)
    task({"task": "induction", "vocab_size": 17, "span": 16}).sample(0)


def test_a_sequence_too_short_for_a_problem_is_refused_and_the_shortest_works() -> None:
    source = SyntheticSource(type="synthetic", task="copy", span=16)
    DataConfig(source=source, seq_len=32)
    with pytest.raises(ValidationError, match="use seq_len >= 32"):
        DataConfig(source=source, seq_len=31)
