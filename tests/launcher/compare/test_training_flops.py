"""FLOPs of training by the recorded costs of a variant, with and without stages of `k_schedule`."""

import numpy as np
import pytest

from headway.launcher.compare.training_flops import per_token, training_flops

PLAIN = {"flops_per_token_useful": 10.0}
STAGED = {**PLAIN, "flops_per_token_stages": [[0, 40.0], [100, 20.0], [300, 10.0]]}


def test_without_stages_every_token_costs_the_same():
    assert training_flops(PLAIN, [0, 7]).tolist() == [0, 210] and per_token(PLAIN, 7) == per_token(PLAIN, None) == 10


def test_stages_add_up():
    tokens = np.array([0, 50, 100, 200, 300, 1000])
    expected = [0, 50 * 40, 100 * 40, 4000 + 100 * 20, 4000 + 200 * 20, 8000 + 700 * 10]
    assert training_flops(STAGED, tokens).tolist() == [3 * flops for flops in expected]
    assert float(training_flops(STAGED, 1000)) == 45_000
    assert per_token(STAGED, 1000) == pytest.approx(15) and per_token(STAGED, None) == 10
