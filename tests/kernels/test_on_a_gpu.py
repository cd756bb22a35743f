"""Every kernel on a GPU against float64 and its twin, by the checks that other tests run in Triton's interpreter.

    python -m pytest -m gpu tests/kernels

Skipped without CUDA. `headway bench gpu` runs the same checks as rows.
"""

import pytest
import torch

from headway.kernels.checks import edges, invariants, v0, v1
from headway.kernels.device import fused

MODULES = {"v0": v0, "v1": v1, "invariants": invariants, "edges": edges}
CHECKS = {f"{where}: {name}": check for where, module in MODULES.items() for name, check in module.CHECKS.items()}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CHECKS)
def test_kernels_on_this_gpu(name, dtype):
    device = torch.device("cuda")
    assert fused(torch.empty(0, dtype=dtype, device=device)), "Triton's kernels do not run on this GPU"
    found = CHECKS[name](device, dtype)
    assert found
    wrong = {what: pair for what, pair in found.items() if not pair[0] <= pair[1]}  # NaN is wrong
    assert not wrong
