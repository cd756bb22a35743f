"""Routed projections equal a float64 reference, in PyTorch and with the Triton kernels in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headway.kernels import device
from headway.kernels.checks.v1 import CHECKS
from headway.kernels.rope import rope_tables
from headway.kernels.routed import (
    Forms,
    combine,
    make_lists,
    make_slot_grad,
    make_weight_grad,
    pair_lists,
    project,
    routed_combine,
    routed_project,
)

CPU = torch.device("cpu")
SCRIPT = Path(__file__).with_name("interpreted.py")
NARROW = "products: four experts, two slots, half rotated"


def interpreted(*arguments):
    """Errors of the checks by name and by the launch function that was broken, in a process of their own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(SCRIPT), "headway.kernels.checks.v1", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {(r["check"], r["broken"]): r["errors"] for r in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def kernels():
    return interpreted()


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_equal_float64(kernels, name):
    for what, (error, tolerance) in kernels[name, ""].items():
        assert error <= tolerance, (what, error)  # false for NaN too


def test_one_wrong_element_of_a_kernel_is_detected():
    gather, weights = "headway.kernels.triton.gather", "headway.kernels.triton.weight_grad"
    launches = [f"{gather}.gather_project", f"{gather}.gather_slot_grad", f"{weights}.weight_grad"]
    found = interpreted(*(f"{NARROW}={launch}" for launch in launches))
    assert len(found) == len(launches)
    for broken, errors in found.items():
        assert any(not error <= tolerance for error, tolerance in errors.values()), broken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHECKS)
def test_the_twin_equals_float64(name, dtype):
    for what, (error, tolerance) in CHECKS[name](CPU, dtype).items():
        assert error <= tolerance, (what, error)


def inputs(dtype=torch.float64):
    """x, w, w_o, slots, gate and lists of 9 tokens, 2 groups of 3 experts of which 2 are chosen, 8 channels."""
    x, w, w_o = torch.randn(9, 12, dtype=dtype), torch.randn(48, 12, dtype=dtype), torch.randn(12, 48, dtype=dtype)
    slots, gate = torch.randn(9, 2, 2, 8, dtype=dtype), torch.rand(9, 2, 2, dtype=dtype)
    return [t.requires_grad_() for t in (x, w, w_o, slots, gate)], pair_lists(
        torch.rand(9, 2, 3).topk(2, -1).indices, 3
    )


def test_gradients_are_those_of_finite_differences():
    (x, w, w_o, slots, gate), lists = inputs()
    rope = rope_tables(3, 6, 10.0, CPU)
    assert torch.autograd.gradcheck(lambda x, w: routed_project(x, w, lists, rope), (x, w))
    assert torch.autograd.gradcheck(lambda s, w, g: routed_combine(s, w, lists, g), (slots, w_o, gate))


def test_compiles_without_graph_breaks_and_with_the_same_gradients():
    (x, w, w_o, _, gate), lists = inputs(torch.float32)

    def layer(x, w, w_o, gate):
        lists_now = pair_lists(lists.idx, 3)
        return routed_combine(routed_project(x, w, lists_now), w_o, lists_now, gate)

    given = [x, w, w_o, gate]
    eager = torch.autograd.grad(layer(*given).square().sum(), given)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*given).square().sum(), given), eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("routed", [True, False])
def test_operators_pass_torchs_own_check(routed):
    (x, w, w_o, slots, gate), lists = inputs(torch.float32)
    table, forms = torch.randn(3, 8), Forms(routed, routed)
    torch.library.opcheck(make_lists, (lists.idx, 3))
    torch.library.opcheck(project, (x, w, table, table, *lists, *forms))
    torch.library.opcheck(combine, (slots, w_o, gate, *lists, *forms))
    plain = [t.detach() for t in (x, slots, gate)]
    for rows, factor in ((True, None), (False, plain[2])):
        torch.library.opcheck(make_weight_grad, (plain[0], plain[1], factor, *lists, rows, routed))
    torch.library.opcheck(make_slot_grad, (plain[0], w_o.detach(), plain[1], plain[2], *lists, routed))


def test_different_dtypes_are_refused_with_a_message():
    (x, w, w_o, slots, gate), lists = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"activations are torch\.bfloat16, the weight is torch\.float32"):
        routed_project(x.bfloat16(), w, lists)
    with pytest.raises(ValueError, match="projections dense"):
        routed_combine(slots.bfloat16(), w_o, lists, gate)


@pytest.mark.parametrize("forms", [Forms(True, False), Forms(False, True)])
def test_heads_too_wide_for_registers_are_refused_before_a_kernel_is_launched_and_stay_legal_where_dense(forms):
    lists = pair_lists(torch.zeros(3, 1, 1, dtype=torch.int64), 2)
    x, w, slots, gate = torch.ones(3, 4), torch.ones(2 * 256, 4), torch.ones(3, 1, 1, 256), torch.ones(3, 1, 1)
    calls = (
        lambda: routed_project(x, w, lists, forms=forms),
        lambda: routed_combine(slots, w.t(), lists, gate, forms),
    )
    for call in calls:
        call()  # the twins take any size
        with device.interpreted():
            if not forms.gather:
                call()
                continue
            with pytest.raises(ValueError, match=r"at most 128 channels per expert, not 256; use projections auto"):
                call()
