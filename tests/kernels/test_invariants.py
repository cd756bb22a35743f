"""Invariants of the kernels, in Triton's interpreter: bitwise reproducible, and rows are independent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headway.kernels.checks import invariants
from headway.kernels.checks.invariants import CHECKS

SCRIPT = Path(__file__).with_name("interpreted.py")
SLOTS, GATHER = "headway.kernels.triton.slots", "headway.kernels.triton.gather"


def interpreted(*arguments):
    command = [sys.executable, "-P", str(SCRIPT), "headway.kernels.checks.invariants", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {(r["check"], r["broken"]): r["errors"] for r in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def found():
    return interpreted()


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_keep_the_invariants_bit_for_bit(found, name):
    assert len(found[name, ""]) >= 5
    for what, (differing, _) in found[name, ""].items():
        assert differing == 0, what


def test_a_row_that_depends_on_other_rows_is_detected():
    """The first number of a result is another one in each run."""
    broken = [f"rows alone={SLOTS}.launch_expand", f"permuted tokens={GATHER}.gather_project"]
    for errors in interpreted(*broken).values():
        assert any(differing > 0 for differing, _ in errors.values())


def test_an_operation_that_keeps_the_lists_of_a_former_choice_is_detected(monkeypatch):
    """As one that finds them by the address of the tensor, whose contents a replay changes in place."""
    kept = {}

    def stale(x, idx):
        return kept.setdefault(idx.data_ptr(), (idx.clone(), idx))[0].float() + x[:, :1, None]

    def fresh(x, idx):
        return idx.float() + x[:, :1, None]

    monkeypatch.setattr(invariants, "_with_weight_grad", lambda *_: {"stale": stale, "fresh": fresh})
    found = invariants.replays(torch.device("cpu"), torch.float32)
    assert found["fresh"][0] == 0 < found["stale"][0]
