"""Triton kernels for routing, selection and expansion, in Triton's interpreter, and their registration in PyTorch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headway.kernels import ops, routing, twins
from headway.kernels.device import fused
from headway.kernels.rope import rope_tables

CPU = torch.device("cpu")
GATED = ("sigmoid", "sigmoid2", "renorm", "softmax", "softmax_n", "detached_renorm", "straight_through")
CHECKS = ("select_rope", "expand", "top_k", "gates", "balance_sums")


def interpreted(*arguments):
    """(check, launch function that was broken or "") -> what was compared -> (error, tolerance)."""
    script = [sys.executable, "-P", str(Path(__file__).with_name("interpreted.py")), *arguments]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(line["check"], line["broken"]): line["errors"] for line in lines}


@pytest.fixture(scope="module")
def errors():
    return interpreted("headway.kernels.checks.v0")


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_match_float64_at_odd_sizes_forward_and_backward(name, errors):
    assert {check for check, _ in errors} == set(CHECKS) and len(errors[name, ""]) >= 10
    for what, (error, tolerance) in errors[name, ""].items():
        assert error <= tolerance, (what, error)  # false for NaN too


@pytest.mark.slow
def test_one_wrong_element_of_a_kernel_is_detected():
    slots, choice = "headway.kernels.triton.slots", "headway.kernels.triton.routing"
    launches = [
        f"select_rope={slots}.launch_select_rope",
        *(f"expand={slots}.launch_{name}" for name in ("expand", "expand_backward")),
        f"top_k={choice}.launch_top_k",
        *(f"gates={choice}.launch_{name}" for name in ("gates", "gates_backward")),
        *(f"balance_sums=headway.kernels.triton.balance.launch_{name}" for name in ("sums", "sums_backward")),
    ]
    found = interpreted("headway.kernels.checks.v0", *launches)
    assert len(found) == len(launches)
    for broken, errors in found.items():
        assert any(not error <= tolerance for error, tolerance in errors.values()), broken


# ---------------------------------------------------------------- what PyTorch is told


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    pool = torch.randn(2, 5, 3, 4, 8, dtype=dtype)
    idx = torch.rand(2, 5, 3, 4).argsort(-1)[..., :2].contiguous()
    gate = torch.rand(2, 5, 3, 2, dtype=dtype)
    cos, sin = rope_tables(5, 6, 1e4, CPU)
    return pool, idx, gate, cos.to(dtype), sin.to(dtype)


def calls():
    pool, idx, gate, cos, sin = inputs()
    slots = torch.randn(2, 5, 3, 2, 8, dtype=pool.dtype)
    one = torch.randn(2, 5, 3, 1, 8, dtype=pool.dtype).expand(2, 5, 3, 2, 8)
    yield "top_k", ops.top_k, routing.top_k, (pool[..., 0], 2)
    yield (
        "select_rope",
        ops.select_rope,
        lambda p, i, c, s: twins.select_rope_twin(p, i, (c, s)),
        (pool, idx, cos, sin),
    )
    for name, value in (("expand", slots), ("expand of one row for all slots", one)):
        yield name, ops.expand, twins.expand_twin, (value, idx, gate, 4)
    for name in GATED:
        yield name, ops.gates, twins.gates_twin, (pool[..., 0].contiguous(), idx, name)
    for name, sigmoid in (("sums of a softmax", False), ("sums of sigmoids", True)):
        yield name, ops.balance_sums, twins.balance_sums_twin, (pool[..., 0].contiguous(), idx, sigmoid)


@pytest.mark.parametrize(("name", "op", "twin", "arguments"), [pytest.param(*call, id=call[0]) for call in calls()])
def test_a_registered_operation_is_its_twin_with_gradients_shapes_and_tracing(name, op, twin, arguments):
    differentiable = [
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() and name != "top_k" else x
        for x in arguments
    ]
    if name == "select_rope":
        differentiable[2:] = [x.detach() for x in differentiable[2:]]  # positions are not trained
    found, expected = op(*differentiable), twin(*differentiable)
    assert torch.equal(found, expected)
    if found.requires_grad:
        leaves = [x for x in differentiable if isinstance(x, torch.Tensor) and x.requires_grad]
        grad = torch.randn_like(found)
        for a, b in zip(
            torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.library.opcheck(op, tuple(differentiable))


def test_operations_of_the_backward_pass_pass_torchs_own_check_too():
    pool, idx, gate, cos, sin = inputs()
    slots, logits = torch.randn(2, 5, 3, 2, 8, dtype=pool.dtype), pool[..., 0].contiguous()
    for name in GATED:
        torch.library.opcheck(ops.gates_backward, (torch.randn_like(gate), logits, idx, name))
    torch.library.opcheck(ops.select_rope_backward, (slots, idx, cos, sin, 4))
    torch.library.opcheck(ops.expand_backward, (pool, slots, idx, gate))
    for sigmoid in (False, True):
        torch.library.opcheck(ops.balance_sums_backward, (torch.randn(2, 3, 4, dtype=pool.dtype), logits, sigmoid))


def test_operations_compile_into_one_graph():
    pool, idx, gate, cos, sin = inputs(torch.float32)

    def layer(pool, gate):
        slots = ops.select_rope(pool, ops.top_k(pool.sum(-1), 2), cos, sin)
        factor = ops.gates(pool[..., 0].contiguous(), idx, "softmax")
        return ops.expand(slots * factor[..., None], idx, gate, 4).square().sum()

    leaves = [pool.requires_grad_(), gate.requires_grad_()]
    expected = torch.autograd.grad(layer(*leaves), leaves)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_cpu_takes_the_twins_and_never_needs_triton():
    assert not fused(torch.zeros(1))
    script = """if True:
    import sys
    sys.modules["triton"] = None  # an import of it fails
    import torch
    from headway.kernels import experts, ops, routing
    from headway.kernels.rope import rope_tables
    pool, idx = torch.randn(1, 2, 1, 3, 4), torch.zeros(1, 2, 1, 1, dtype=torch.int64)
    slots = routing.select_rope(pool, idx, rope_tables(2, 4, 1e4, torch.device("cpu")))
    routing.expand(slots, idx, torch.ones(1, 2, 1, 1), 3)
    routing.gates(pool[..., 0], routing.top_k(pool[..., 0], 1), "softmax")
    print(sorted(name for name in sys.modules if name.startswith("triton.")))
    """
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
