"""Speed options in real engines, in two processes over gloo: equal training, bitwise or up to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LAYOUTS = ("tensor", "pipeline")
MORE = ("zero2", "zero3")


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    return cases(*LAYOUTS)


def cases(*layouts: str) -> dict[str, dict]:
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(HERE / "speed_cases.py"), *layouts]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.removeprefix("CASE ") for line in done.stdout.splitlines() if line.startswith("CASE ")]
    return {case["layout"]: case for case in map(json.loads, lines)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_selective_recomputation_is_the_same_training_bit_by_bit(found, layout):
    assert found[layout]["selective"] == found[layout]["plain"]
    assert found[layout]["plain"][0] != found[layout]["plain"][1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_functions_train_equally_with_any_recomputation(found, layout):
    for mine, plain in zip(found[layout]["compiled"], found[layout]["plain"], strict=True):
        assert mine == pytest.approx(plain, rel=2e-5)


@pytest.mark.slow
def test_data_parallel_ranks_train_equally_too():
    found = cases(*MORE)
    for layout in MORE:
        for mine, plain in zip(found[layout]["compiled"], found[layout]["plain"], strict=True):
            assert mine == pytest.approx(plain, rel=2e-5)
    assert found["zero3"]["selective"] == found["zero3"]["plain"]
    for mine, plain in zip(found["zero3"]["torch's loss"], found["zero3"]["plain"], strict=True):
        assert mine == pytest.approx(plain, rel=2e-5)


def test_pytorchs_loss_trains_equally(found):
    for mine, plain in zip(found["pipeline"]["torch's loss"], found["pipeline"]["plain"], strict=True):
        assert mine == pytest.approx(plain, rel=2e-5)
