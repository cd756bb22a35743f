"""Top-k selection, gates, and the gather and scatter between pool and slots."""

import pytest
import torch

from headway.kernels import routing
from headway.kernels.routing import GateName, expand, gates, router_logits, top_k
from headway.kernels.twins import select

LOGITS = torch.tensor([[0.3, -1.2, 2.0, 0.7], [0.0, 0.5, 0.5, -3.0]], dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_ties_go_to_the_lower_index(k):
    scores = torch.randint(0, 3, (50, 3, 4)).float()  # three values on four places: ties everywhere
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    assert torch.equal(top_k(scores, k), order[..., :k])
    assert torch.equal(top_k(torch.zeros(2, 4), k), torch.arange(k).expand(2, k))


def test_scores_are_left_as_they_were():
    scores = torch.randn(5, 4)
    before = scores.clone()
    top_k(scores, 3)
    assert torch.equal(scores, before)


def test_gate_values():
    idx = top_k(LOGITS, 2)
    picked, p = LOGITS.gather(-1, idx), LOGITS.softmax(-1).gather(-1, idx)
    renormalised = p / p.sum(-1, keepdim=True)
    expected: dict[GateName, torch.Tensor] = {
        "sigmoid2": 2 / (1 + torch.exp(-picked)),
        "softmax": p,
        "renorm": renormalised,
        "detached_renorm": renormalised,
        "hard": torch.ones_like(p),
    }
    for gate, value in expected.items():
        torch.testing.assert_close(gates(LOGITS, idx, gate), value, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("gate", "k", "reaches"),
    [("sigmoid2", 1, "picked"), ("softmax", 1, "all"), ("detached_renorm", 1, "all"), ("renorm", 1, "none"),
     ("renorm", 2, "picked"), ("hard", 2, "none")],
)  # fmt: skip
def test_which_logits_a_gate_moves(gate, k, reaches):
    logits = LOGITS.clone().requires_grad_()
    idx = top_k(logits, k)
    factor = gates(logits, idx, gate)
    weights = torch.tensor([0.7, -1.9], dtype=torch.float64)[:k]
    moved = torch.zeros_like(logits)
    if factor.requires_grad:
        (moved,) = torch.autograd.grad((factor * weights).sum(), logits)
    picked = torch.zeros_like(logits).scatter(-1, idx, 1.0).bool()
    expected = {"picked": picked, "all": torch.ones_like(picked), "none": torch.zeros_like(picked)}[reaches]
    assert torch.equal(moved != 0, expected)


def test_detached_renorm_at_one_slot_is_one_with_the_score_function_gradient():
    logits = LOGITS.clone().requires_grad_()
    idx = top_k(logits, 1)
    factor = gates(logits, idx, "detached_renorm")
    assert torch.equal(factor, torch.ones_like(factor))
    (moved,) = torch.autograd.grad(factor.sum(), logits)
    one_hot = torch.zeros_like(logits).scatter(-1, idx, 1.0)
    torch.testing.assert_close(moved, one_hot - LOGITS.softmax(-1), rtol=0, atol=1e-15)


def test_select_and_expand_are_gather_and_scatter():
    pool, logits = torch.randn(2, 3, 2, 5, 7, dtype=torch.float64), torch.randn(2, 3, 2, 5, dtype=torch.float64)
    idx, gate = top_k(logits, 3), torch.randn(2, 3, 2, 3, dtype=torch.float64)
    wide = idx.unsqueeze(-1).expand(-1, -1, -1, -1, 7)
    slots = select(pool, idx)
    assert torch.equal(slots, pool.gather(3, wide))
    expected = torch.zeros_like(pool).scatter(3, wide, slots * gate.unsqueeze(-1))
    assert torch.equal(expand(slots, idx, gate, 5), expected)


def test_select_and_expand_have_the_right_gradients():
    idx = top_k(torch.randn(1, 3, 2, 4), 2)
    pool = torch.randn(1, 3, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    slots = torch.randn(1, 3, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: select(p, idx), pool)
    assert torch.autograd.gradcheck(lambda s, g: expand(s, idx, g, 4), (slots, gate))


def test_router_is_computed_in_fp32_under_bf16():
    x, weight = torch.randn(1, 50, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    logits = router_logits(x, weight, 2)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, (x.float() @ weight.float().T).unflatten(-1, (2, 4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router_logits(x.float(), weight.float(), 2), logits)
    assert not torch.equal(logits.bfloat16().float(), logits)


def converted(x, weight):
    return (x.float() @ weight.float().T).unflatten(-1, (2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_keeps_its_input_in_its_dtype_with_the_same_gradients(dtype):
    x, weight, grad = torch.randn(2, 9, 64).to(dtype), torch.randn(8, 64).to(dtype), torch.randn(2, 9, 2, 4)
    leaves = [(x.clone().requires_grad_(), weight.clone().requires_grad_()) for _ in range(2)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.dtype), t)[1], lambda t: t):
        logits = router_logits(*leaves[0], 2)
    assert kept == [dtype, dtype]
    wanted = torch.autograd.grad(converted(*leaves[1]), leaves[1], grad)
    for found, exact in zip(torch.autograd.grad(logits, leaves[0], grad), wanted, strict=True):
        assert found.dtype == dtype and torch.equal(found, exact)


def test_router_on_tensor_cores_reads_bf16_and_accumulates_in_fp32(monkeypatch):
    """PyTorch has products with another dtype of the result on GPUs only: here they are converted first."""
    x, weight, grad = torch.randn(2, 9, 64).bfloat16(), torch.randn(8, 64).bfloat16(), torch.randn(2, 9, 2, 4)
    leaves = [(x.clone().requires_grad_(), weight.clone().requires_grad_()) for _ in range(2)]
    read, mm = [], torch.mm

    def with_out_dtype(a, b, *, out_dtype):
        read.append((a.dtype, b.dtype))
        return mm(a.to(out_dtype), b.to(out_dtype))

    wanted = torch.autograd.grad(converted(*leaves[1]), leaves[1], grad)
    monkeypatch.setattr(routing, "_on_tensor_cores", lambda x, weight: True)
    monkeypatch.setattr(torch, "mm", with_out_dtype)
    logits = router_logits(*leaves[0], 2)
    assert torch.equal(logits, converted(x, weight))
    for found, exact in zip(torch.autograd.grad(logits, leaves[0], grad), wanted, strict=True):
        assert found.dtype == torch.bfloat16
        # The gradient of the logits and the result are rounded, 2^-9 each.
        assert (found.float() - exact.float()).norm() <= 8e-3 * exact.float().norm()
    assert read == [(torch.bfloat16, torch.bfloat16)] * 2  # logits and the gradient of the weight
    assert router_logits(x[:0], weight, 2).shape == (0, 9, 2, 4)


def test_router_compiles_without_graph_breaks():
    x, weight = torch.randn(1, 9, 16).bfloat16().requires_grad_(), torch.randn(8, 16).bfloat16().requires_grad_()
    compiled = torch.compile(lambda x, w: router_logits(x, w, 2), fullgraph=True, backend="aot_eager")
    for found, wanted in zip(
        torch.autograd.grad(compiled(x, weight).square().sum(), (x, weight)),
        torch.autograd.grad(router_logits(x, weight, 2).square().sum(), (x, weight)),
        strict=True,
    ):
        assert torch.equal(found, wanted)


def test_router_separates_logits_that_would_tie_in_bf16():
    x = torch.tensor([[[1.0, 2.0**-9]]]).bfloat16()
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).bfloat16()  # logits 1 and 1 + 2^-9: one value in bf16
    assert (x @ weight.T).unique().numel() == 1
    assert top_k(router_logits(x, weight, 1), 1).item() == 1
