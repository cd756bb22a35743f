"""The learning rate is a pure function of tokens."""

import pytest

from headway.parallel.config import OptimizerConfig
from headway.parallel.schedule import (
    AnySchedule,
    CosineSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    WsdSchedule,
    learning_rate,
)

OPT = OptimizerConfig(lr=1.0)


def rate(schedule: AnySchedule, step: int, steps: int = 100, per_step: int = 10) -> float:
    return learning_rate(
        OPT, schedule, tokens_before=step * per_step, tokens_after=(step + 1) * per_step, total_tokens=steps * per_step
    )


def test_warmup_is_linear_and_reaches_the_peak():
    s = WsdSchedule(warmup_tokens=100)
    assert [rate(s, i) for i in range(10)] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rate(s, 10) == 1.0


def test_wsd_is_constant_then_falls_linearly_to_its_floor():
    s = WsdSchedule(decay_fraction=0.2, min_lr_ratio=0.1)
    assert rate(s, 0) == rate(s, 79) == 1.0
    assert rate(s, 90) == pytest.approx(0.1 + 0.9 * 0.5)
    assert rate(s, 99) == pytest.approx(0.1 + 0.9 * 0.05)


def test_wsd_without_decay_stays_at_the_peak():
    assert rate(WsdSchedule(decay_fraction=0.0), 99) == 1.0


def test_cosine_is_half_way_down_at_half_the_tokens():
    s = CosineSchedule(min_lr_ratio=0.2)
    assert rate(s, 0) == 1.0
    assert rate(s, 50) == pytest.approx(0.6)
    assert rate(s, 99) < 0.21


def test_linear_falls_from_the_end_of_the_warmup_to_the_end_of_the_run():
    s = LinearSchedule(warmup_tokens=200, min_lr_ratio=0.5)
    assert rate(s, 9) == pytest.approx(0.5)  # in the warm-up
    assert rate(s, 20) == 1.0
    assert rate(s, 60) == pytest.approx(0.75)
    assert rate(s, 100) == 0.5


def test_inverse_sqrt_halves_at_four_times_the_warmup():
    s = InverseSqrtSchedule(warmup_tokens=100)
    assert rate(s, 10) == 1.0
    assert rate(s, 40) == 0.5
    assert rate(s, 40, steps=4000) == 0.5


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        (WsdSchedule(warmup_tokens=1001), "does not end within the 1,000 tokens"),
        (CosineSchedule(warmup_tokens=1001), "does not end within the 1,000 tokens"),
        (InverseSqrtSchedule(warmup_tokens=1001), "does not end within the 1,000 tokens"),
        (
            WsdSchedule(warmup_tokens=300, decay_fraction=0.8),
            "begins at token 200, before the warm-up ends at token 300, so the learning rate would jump; use "
            "schedule.decay_fraction of at most 0.7,",
        ),
    ],
)
def test_schedules_that_do_not_fit_the_run_say_why(schedule, says):
    assert says in str(schedule.why_not(1000))


@pytest.mark.parametrize(
    "schedule",
    [
        WsdSchedule(warmup_tokens=999, decay_fraction=0.0),
        WsdSchedule(warmup_tokens=100, decay_fraction=0.9),
        WsdSchedule(warmup_tokens=300, decay_fraction=0.7),
        CosineSchedule(warmup_tokens=999),
    ],
)
def test_schedules_that_fit_have_no_jump_beside_the_warmup(schedule):
    assert schedule.why_not(1000) is None
    rates = [rate(schedule, step) for step in range(100)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) >= 0.99
