"""The gradient that AdamW receives in bf16 runs: the fp32 sum of all micro-batches of all ranks, on every layout."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
EXACT = 1e-7  # measured: at most 4e-9; fp32 sums in another order
LAYOUTS = {  # (ranks, pipeline stages) -> ZeRO stages
    (1, 1): (1, 2, 3),
    (2, 1): (1, 2, 3),
    (8, 1): (1, 2, 3),
    (4, 2): (1,),
}


@pytest.fixture(scope="module")
def cases():
    sys.path.insert(0, str(HERE))
    try:
        spec = importlib.util.spec_from_file_location("gradient_cases", HERE / "gradient_cases.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(HERE))
    return module


@pytest.fixture(scope="module")
def expected(cases):
    """Pipeline stages -> the exact gradient: bf16 gradients of single sequences, summed in fp64.

    A pipeline has the two uses of a tied embedding in two stages; each computes its own bf16 gradient.
    """
    return {stages: cases.exact_sum(apart=stages > 1) for stages in (1, 2)}


def gradients(folder: Path, ranks: int, stages: int, *zero: int, reduction: str = "fp32") -> dict[int, dict]:
    """ZeRO stage -> parameter -> gradient."""
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(HERE / "gradient_cases.py"), str(folder), str(stages), reduction, *map(str, zero)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[int, dict] = {}
    for file in folder.glob("*.pt"):
        found.setdefault(int(file.name.split(".")[0]), {}).update(torch.load(file, weights_only=True))
    return found


def error(gradient: dict, exact: dict) -> float:
    """The largest relative error of a parameter's gradient."""
    assert gradient.keys() == exact.keys()
    return max(float((gradient[n].double() - exact[n]).norm() / exact[n].norm()) for n in exact)


@pytest.mark.parametrize(
    ("ranks", "stages"), [pytest.param(*key, marks=[pytest.mark.slow] if key[0] == 8 else []) for key in LAYOUTS]
)
def test_gradients_are_summed_in_fp32(tmp_path, expected, ranks, stages):
    found = gradients(tmp_path, ranks, stages, *LAYOUTS[ranks, stages])
    assert found.keys() == set(LAYOUTS[ranks, stages])
    for zero, gradient in found.items():
        assert error(gradient, expected[stages]) < EXACT, f"ZeRO-{zero}"


def test_bf16_reduction_has_its_stated_error(tmp_path, expected):
    found = gradients(tmp_path, 2, 1, 1, 2, 3, reduction="bf16")
    for zero, gradient in found.items():
        assert 5e-4 < error(gradient, expected[1]) < 5e-3, f"ZeRO-{zero}"
