"""The learning rate is a pure function of tokens."""

import pytest

from headway.parallel.config import OptimizerConfig, ScheduleConfig
from headway.parallel.schedule import learning_rate

OPT = OptimizerConfig(lr=1.0)


def rate(schedule: ScheduleConfig, step: int, steps: int = 100, per_step: int = 10) -> float:
    return learning_rate(
        OPT, schedule, tokens_before=step * per_step, tokens_after=(step + 1) * per_step, total_tokens=steps * per_step
    )


def test_warmup_is_linear_and_reaches_the_peak():
    s = ScheduleConfig(warmup_tokens=100)
    assert [rate(s, i) for i in range(10)] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rate(s, 10) == 1.0


def test_wsd_is_constant_then_falls_linearly_to_its_floor():
    s = ScheduleConfig(type="wsd", decay_fraction=0.2, min_lr_ratio=0.1)
    assert rate(s, 0) == rate(s, 79) == 1.0
    assert rate(s, 90) == pytest.approx(0.1 + 0.9 * 0.5)
    assert rate(s, 99) == pytest.approx(0.1 + 0.9 * 0.05)


def test_wsd_without_decay_stays_at_the_peak():
    assert rate(ScheduleConfig(decay_fraction=0.0), 99) == 1.0


def test_cosine_is_half_way_down_at_half_the_tokens():
    s = ScheduleConfig(type="cosine", min_lr_ratio=0.2)
    assert rate(s, 0) == 1.0
    assert rate(s, 50) == pytest.approx(0.6)
    assert rate(s, 99) < 0.21
