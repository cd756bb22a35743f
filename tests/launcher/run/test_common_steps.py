"""`common_steps`: how long two schedules have exactly equal learning rates."""

import itertools
import random
import time

import pytest

from headway.launcher.run.branching import common_steps
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec
from headway.parallel.schedule import (
    CosineSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    WsdSchedule,
    learning_rate,
)

EACH = 256  # tokens per step of the spec of conftest.py


@pytest.fixture(scope="module")
def base(headway_once) -> Spec:
    return load_spec(headway_once.spec).spec


def changed(base: Spec, *, steps: int, lr: float = 3e-3, **schedule) -> Spec:
    kind = {"wsd": WsdSchedule, "cosine": CosineSchedule, "linear": LinearSchedule, "inverse_sqrt": InverseSqrtSchedule}
    model = kind[schedule.get("type", "wsd")]
    sections = {
        "train": base.train.model_copy(update={"tokens": steps * EACH}),
        "optimizer": base.optimizer.model_copy(update={"lr": lr}),
        "schedule": model(**{k: v for k, v in schedule.items() if k in model.model_fields}),
    }
    return base.model_copy(update=sections)


def rate(spec: Spec, step: int) -> float:
    before, after, total = step * EACH, (step + 1) * EACH, spec.steps * EACH
    return learning_rate(spec.optimizer, spec.schedule, tokens_before=before, tokens_after=after, total_tokens=total)


def one_by_one(a: Spec, b: Spec) -> int:
    last = min(a.steps, b.steps)
    return next((step for step in range(last) if rate(a, step) != rate(b, step)), last)


def test_wsd_is_equal_up_to_the_first_lower_rate_of_the_earlier_decay(base):
    # 100 steps decay over the last 20: the rate of step 81 is that of 20 tokens left of 20, and step 82 is lower.
    stable, short = changed(base, steps=1000, decay_fraction=0.0), changed(base, steps=100, decay_fraction=0.2)
    assert common_steps(stable, short) == common_steps(short, stable) == 81
    assert common_steps(changed(base, steps=1000, decay_fraction=0.5), short) == 81
    assert common_steps(changed(base, steps=80, decay_fraction=0.2), short) == 65
    assert common_steps(short, short) == 100 and common_steps(stable, changed(base, steps=9, decay_fraction=0.0)) == 9


def test_other_peaks_warm_ups_and_cosines_differ_early(base):
    plain = changed(base, steps=100)
    assert common_steps(plain, changed(base, steps=100, lr=1e-3)) == 0
    assert common_steps(plain, changed(base, steps=100, warmup_tokens=2 * EACH)) == 0
    assert common_steps(plain, changed(base, steps=100, warmup_tokens=EACH)) == 100  # over before it has an effect
    roots = [changed(base, steps=steps, warmup_tokens=EACH, type="inverse_sqrt") for steps in (100, 200)]
    assert common_steps(*roots) == 100  # does not depend on the length of the run
    warm = [changed(base, steps=steps, warmup_tokens=10 * EACH) for steps in (100, 200)]
    assert common_steps(*warm) == 81
    cosine = [changed(base, steps=steps, warmup_tokens=10 * EACH, type="cosine") for steps in (100, 200)]
    assert common_steps(*cosine) == one_by_one(*cosine) < 15
    assert common_steps(cosine[0], cosine[0]) == 100
    assert common_steps(warm[0], cosine[0]) == one_by_one(warm[0], cosine[0]) >= 10


def test_any_two_schedules_agree_with_a_comparison_of_every_step(base):
    draw = random.Random(0)
    found = set()
    for _ in range(600):
        shared = {"warmup_tokens": draw.choice([1, 17, EACH, 700, 30 * EACH, 999 * EACH])}
        pair = [
            changed(
                base,
                steps=draw.choice([1, 2, 20, 100, 101, 200]),
                type=draw.choice(["wsd", "wsd", "wsd", "cosine", "linear", "inverse_sqrt"]),
                decay_fraction=draw.choice([0.0, 0.1, 0.3, 1.0]),
                min_lr_ratio=draw.choice([0.0, 0.1, 1.0]),
                **shared,
            )
            for _ in range(2)
        ]
        common = common_steps(*pair)
        assert common == one_by_one(*pair), [spec.schedule for spec in pair]
        found.add(common)
    assert len(found) > 10


def test_a_million_steps_take_no_time(base):
    million = 10**6
    kinds = [
        {"decay_fraction": 0.0},
        {"decay_fraction": 0.1},
        {"decay_fraction": 0.2, "warmup_tokens": 10**8},
        {"type": "cosine"},
        {"type": "cosine", "min_lr_ratio": 1.0},
    ]
    specs = [changed(base, steps=steps, **kind) for kind in kinds for steps in (million, million * 4 // 5)]
    begin = time.process_time()
    for a, b in itertools.product(specs, specs):
        common_steps(a, b)
    assert time.process_time() - begin < 1  # 100 pairs; one pair step by step takes more than this
    assert common_steps(specs[0], specs[3]) == 720_001
