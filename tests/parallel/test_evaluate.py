"""Loss and accuracy of an evaluation are exact means over the targets of all ranks, under every ZeRO stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_accuracy_and_loss_are_sums_over_ranks_with_different_numbers_of_targets():
    script = str(Path(__file__).parent / "evaluate_cases.py")
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    cases = [json.loads(body) for kind, body in lines if kind == "CASE"]
    plain = next(float(body) for kind, body in lines if kind == "PLAIN")
    assert [case["zero"] for case in cases] == [1, 3]
    for case in cases:
        expected = case["expected"]
        assert case["targets"] == expected["targets"] and case["mine"] != expected["targets"] / 2
        assert case["accuracy"] == expected["hits"] / expected["targets"]
        assert 0 < case["accuracy"] < 1
        assert case["loss"] == pytest.approx(plain, rel=1e-6)  # fp32 sums in another order
