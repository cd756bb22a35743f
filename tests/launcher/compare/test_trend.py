"""Differences over the course of training, and what a report says about the intervals of their changes."""

import numpy as np

from headway.launcher.compare.trend import not_pooled, sentence, trend_of
from headway.launcher.run.records import Curve

TOKENS = np.array([100.0, 200.0, 400.0])
NOISE = {"gqa": 0.0, "a": 0.001, "b": -0.002, "c": 0.003, "d": -0.001}
"""Half of the difference of the last loss between both seeds."""


def curves(**noise: float) -> dict[str, dict[int, Curve]]:
    """Losses of gqa are 4, 3 and 2; those of others lower by 0.3, 0.3 and 0.2, and the last ones have noise."""
    found = {}
    for name, half in (NOISE | noise).items():
        first = np.array([4.0, 3.0, 2.0]) - (name != "gqa") * np.array([0.3, 0.3, 0.2])
        found[name] = {
            seed: Curve(
                step=TOKENS, tokens=TOKENS, train_s=TOKENS, loss=first + sign * half * np.array([0.0, 0.0, 1.0])
            )
            for seed, sign in ((1, -1), (2, 1))
        }
    return found


def test_a_change_that_all_spreads_together_show_needs_no_further_word():
    trend = trend_of(curves(), "gqa")
    assert trend is not None and trend.middle == 200
    assert sentence(trend, "a") == "-0.300 at 100 tokens, -0.200 at 400; still shrinking (+0.100 since 200 tokens)"
    assert not_pooled(trend, "gqa") is None


def test_a_change_that_one_variant_s_spread_would_hide_names_that_variant():
    trend = trend_of(curves(d=0.2), "gqa")
    assert trend is not None and trend.change is not None
    losses = np.array([NOISE[name] for name in ("gqa", "a", "b", "c")] + [0.2])
    spread = np.sqrt(2 * ((losses - losses.mean()) ** 2).sum() / 4)
    assert 2.2 * spread > 0.1  # the critical value of one comparison at infinite degrees of freedom is 1.96
    assert str(sentence(trend, "a")).endswith("still shrinking (+0.100 since 200 tokens)")
    assert str(sentence(trend, "d")).endswith("no change shown since 200 tokens")
    assert not_pooled(trend, "gqa") == (
        "The spread of the changes since 200 tokens is too large to be pooled for d: intervals of such variants rest "
        "on own seeds alone, and those of the others do not contain it."
    )


def test_without_the_baseline_in_the_pool_all_intervals_rest_on_own_seeds():
    trend = trend_of(curves(gqa=0.2), "gqa")
    assert trend is not None
    text = str(not_pooled(trend, "gqa"))
    assert "for gqa: all intervals rest on own seeds alone." in text and "others" not in text


def test_two_validations_have_no_change():
    short = {
        name: {
            seed: Curve(step=c.step[1:], tokens=c.tokens[1:], loss=c.loss[1:], train_s=c.train_s[1:])
            for seed, c in by_seed.items()
        }
        for name, by_seed in curves(d=0.2).items()
    }
    trend = trend_of(short, "gqa")
    assert trend is not None and trend.change is None and not_pooled(trend, "gqa") is None
    assert sentence(trend, "a") == "-0.300 at 200 tokens, -0.200 at 400"
