"""The gradient that AdamW receives in bf16 runs: the fp32 sum of all micro-batches of all ranks, on every layout."""

import importlib.util
import sys
from collections.abc import Callable
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


@pytest.fixture
def gradients(tmp_path, run_ranks) -> Callable[..., dict[int, dict]]:
    """`gradients(ranks, stages, *zero)`: ZeRO stage -> parameter -> gradient."""

    def made(ranks: int, stages: int, *zero: int, reduction: str = "fp32") -> dict[int, dict]:
        run_ranks(ranks, HERE / "gradient_cases.py", tmp_path, stages, reduction, *zero)
        found: dict[int, dict] = {}
        for file in tmp_path.glob("*.pt"):
            found.setdefault(int(file.name.split(".")[0]), {}).update(torch.load(file, weights_only=True))
        return found

    return made


def error(gradient: dict, exact: dict) -> float:
    """The largest relative error of a parameter's gradient."""
    assert gradient.keys() == exact.keys()
    return max(float((gradient[n].double() - exact[n]).norm() / exact[n].norm()) for n in exact)


@pytest.mark.parametrize(
    ("ranks", "stages"), [pytest.param(*key, marks=[pytest.mark.slow] if key[0] == 8 else []) for key in LAYOUTS]
)
def test_gradients_are_summed_in_fp32(gradients, expected, ranks, stages):
    found = gradients(ranks, stages, *LAYOUTS[ranks, stages])
    assert found.keys() == set(LAYOUTS[ranks, stages])
    for zero, gradient in found.items():
        assert error(gradient, expected[stages]) < EXACT, f"ZeRO-{zero}"


def test_bf16_reduction_has_its_stated_error(gradients, expected):
    found = gradients(2, 1, 1, 2, 3, reduction="bf16")
    for zero, gradient in found.items():
        assert 5e-4 < error(gradient, expected[1]) < 5e-3, f"ZeRO-{zero}"
