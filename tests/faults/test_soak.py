"""Short soak: real trainings with random kills and damage end like the uninterrupted ones."""

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

import soak


@pytest.mark.slow  # the faults are tested one by one in test_resume.py, test_supervisor.py and test_saves.py
@pytest.mark.timeout(900)
def test_trainings_survive_random_faults():
    # F1: with the kills of test_resume.py and test_supervisor.py, more than 20 of single ranks; F30. `make soak` does
    # 200 kills.
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    figures = soak.soak(seconds=15, kills=6, rank_kills=2, at_most_s=600, seed=seed)
    assert figures["kills"] >= 6 and figures["faults"]["rank"] >= 2
    assert figures["compared_bitwise"] >= 1 and figures["wrong"] == figures["left_behind"] == 0
    assert 0 < figures["effective_training_share"] < 1
