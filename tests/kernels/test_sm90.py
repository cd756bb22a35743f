"""Kernels compile for an H100 in their launch configuration: no spills, shared memory fits, matmuls on tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
MODULES = sorted(f"headway.kernels.triton.{path.stem}" for path in (KERNELS / "triton").glob("[!_]*.py"))
assert len(MODULES) >= 6
# One with tensor cores and one without; `make test-all` compiles the others too, which takes ten seconds for each.
FAST = {f"headway.kernels.triton.{name}" for name in ("weight_grad", "lists")}
SHARED_BYTES = 227 << 10  # of one block on compute capability 9.0


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in MODULES],
)
def compiled(request, tmp_path_factory):
    cache = tmp_path_factory.mktemp("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    script = [sys.executable, "-P", str(Path(__file__).with_name("offline.py")), request.param]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def report(found):
    """Registers of a kernel, shown by `pytest -rP` and where the test fails."""
    constants = " ".join(f"{name}={value}" for name, value in found["constants"].items())
    print(f"{found['kernel']}: {found['registers']} of {found['registers_available']} registers ({constants})")


def test_kernels_compile_for_sm_90_without_spills_and_within_shared_memory(compiled):
    assert compiled
    for found in compiled:
        report(found)
        assert found["instructions"] > 50, found  # there is code that was looked at
        assert found["local_bytes"] == found["spill_instructions"] == 0, found
        assert found["shared_bytes"] <= SHARED_BYTES, found
        assert (found["tensor_core_instructions"] > 0) == found["tensor_cores"], found
