"""Each kernel that routes and moves slots against float64, for tests under the interpreter and for a GPU.

`CHECKS[name](device, dtype)` -> what was compared -> (relative error, tolerance). An error of NaN fails: outputs hold
NaN before the kernel runs. Importing this module needs Triton. Tolerances: fp32 rounding where dtype is fp32, one
rounding of the result in bf16 and fp16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from headway.kernels import twins
from headway.kernels.rope import rope_tables
from headway.kernels.triton import balance as triton_balance
from headway.kernels.triton import routing as triton_routing
from headway.kernels.triton import slots as triton_slots

Errors = dict[str, tuple[float, float]]

# B, S, G, N, k, D, rotated channels: nothing a multiple of a tile, heads in odd numbers, partly and not rotated
SHAPES = (
    (2, 37, 3, 5, 2, 24, 16),
    (1, 130, 2, 4, 1, 64, 64),
    (1, 33, 1, 8, 3, 96, 0),
    (3, 7, 2, 3, 3, 20, 20),
    (1, 11, 2, 4, 1, 256, 128),
)
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in float64."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))


def _poisoned(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.full(shape, float("nan"), dtype=like.dtype, device=like.device)


def random_normal(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    """Equal on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def random_choice(shape: tuple[int, ...], k: int, device: torch.device) -> Tensor:
    """k different heads for each row, in random order."""
    return random_normal(shape, device, torch.float32, 7).argsort(-1)[..., :k].contiguous()


def _cases() -> Iterator[tuple[str, tuple[int, ...]]]:
    for shape in SHAPES:
        yield " ".join(map(str, shape)), shape


def select_rope(device: torch.device, dtype: torch.dtype) -> Errors:
    """Gather and rotation, and the way back."""
    found: Errors = {}
    for name, (batch, seq_len, groups, heads, k, channels, rotated) in _cases():
        pool = random_normal((batch, seq_len, groups, heads, channels), device, dtype, 1)
        idx = random_choice((batch, seq_len, groups, heads), k, device)
        cos, sin = rope_tables(seq_len, rotated, 1e4, device)
        out = _poisoned((*idx.shape, channels), pool)
        triton_slots.launch_select_rope(triton_slots.select_rope_forward, pool, idx, cos, sin, heads, out)
        exact = pool.double().requires_grad_()
        expected = twins.select_rope_twin(exact, idx, (cos.double(), sin.double()))
        grad = random_normal(tuple(out.shape), device, dtype, 2)
        expected.backward(grad.double())
        back = _poisoned(tuple(pool.shape), pool)
        triton_slots.launch_select_rope(triton_slots.select_rope_backward, grad, idx, cos, sin, heads, back)
        assert exact.grad is not None
        found[f"{name}: slots"] = relative(out, expected.detach()), TOLERANCES[dtype]
        found[f"{name}: d pool"] = relative(back, exact.grad), TOLERANCES[dtype]
    return found


def expand(device: torch.device, dtype: torch.dtype) -> Errors:
    """Gated scatter and the way back, of slots of their own and of one row for all slots."""
    found: Errors = {}
    for name, (batch, seq_len, groups, heads, k, channels, _) in _cases():
        rows = batch * seq_len * groups
        idx = random_choice((rows, heads), k, device)
        gate = random_normal((rows, k), device, torch.float32, 3)
        grad = random_normal((rows, heads, channels), device, dtype, 4)
        for kind, slots in (
            ("own", random_normal((rows, k, channels), device, dtype, 5)),
            ("one", random_normal((rows, 1, channels), device, dtype, 5).expand(rows, k, channels)),
        ):
            out, grad_slots = (_poisoned(shape, slots) for shape in ((rows, heads, channels), (rows, k, channels)))
            grad_gate = _poisoned((rows, k), gate)
            triton_slots.launch_expand(slots, idx, gate, heads, out)
            triton_slots.launch_expand_backward(grad, slots, idx, gate, heads, grad_slots, grad_gate)
            exact, factor = slots.double().requires_grad_(), gate.double().requires_grad_()
            expected = twins.expand_twin(exact, idx, factor, heads)
            expected.backward(grad.double())
            assert exact.grad is not None and factor.grad is not None
            found[f"{name} {kind}: pool"] = relative(out, expected.detach()), TOLERANCES[dtype]
            found[f"{name} {kind}: d slots"] = relative(grad_slots, exact.grad), TOLERANCES[dtype]
            # In fp32, of operands that are what they are: no rounding but the sum's.
            found[f"{name} {kind}: d gate"] = relative(grad_gate, factor.grad), TOLERANCES[torch.float32]
    return found


def top_k(device: torch.device, dtype: torch.dtype) -> Errors:
    """The twin's choice exactly, with ties, infinities and NaN among the scores; always in fp32, as routers are."""
    found: Errors = {}
    for rows, experts, k in ((70, 5, 2), (64, 4, 1), (1, 8, 8), (129, 3, 3), (65, 20, 4)):
        scores = random_normal((rows, experts), device, torch.float32, 8)
        tied = scores.round()
        strange = scores.clone()
        strange[::3, experts - 1] = float("inf")
        strange[1::3, 0] = float("nan")
        strange[2::3, 0] = -float("inf")
        alone = torch.full_like(scores, -float("inf"))  # more experts are chosen than have a finite score
        alone[::2, experts // 2] = 1.0
        both = strange.clone()
        both[::2, 0], both[::2, experts - 1] = float("inf"), float("nan")
        both[1::2, 0], both[1::2, experts - 1] = float("nan"), float("inf")
        kinds = {
            "random": scores,
            "tied": tied,
            "equal": torch.zeros_like(scores),
            "odd": strange,
            "alone": alone,
            "both": both,
        }
        for kind, values in kinds.items():
            idx = torch.full((rows, k), -1, dtype=torch.int64, device=device)
            triton_routing.launch_top_k(values, idx)
            expected = values.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=-float("inf"))
            expected = expected.sort(dim=-1, descending=True, stable=True).indices[:, :k]
            found[f"{rows} {experts} {k} {kind}"] = float((idx != expected).sum()), 0.0
            found[f"{rows} {experts} {k} {kind}: twin"] = float((twins.top_k_twin(values, k) != expected).sum()), 0.0
    return found


def gates(device: torch.device, dtype: torch.dtype) -> Errors:
    """Every gate and its gradient, also at logits so far apart that a softmax over all of them is 0 at the chosen."""
    found: Errors = {}
    for rows, experts, k in ((70, 5, 2), (64, 4, 1), (129, 8, 3)):
        idx = random_choice((rows, experts), k, device)
        logits, grad = (random_normal((rows, n), device, torch.float32, n) for n in (experts, k))
        for name in triton_routing.GATES:
            if name == "hard" or (name == "renorm" and k == 1):  # constant: no gradient to compare
                continue
            out, back = _poisoned((rows, k), logits), _poisoned((rows, experts), logits)
            triton_routing.launch_gates(logits, idx, name, out)
            triton_routing.launch_gates_backward(logits, idx, name, grad, back)
            exact = logits.double().requires_grad_()
            expected = twins.gates_twin(exact, idx, name)
            expected.backward(grad.double())
            assert exact.grad is not None
            found[f"{rows} {experts} {k} {name}"] = relative(out, expected.detach()), TOLERANCES[torch.float32]
            found[f"{rows} {experts} {k} {name}: d logits"] = relative(back, exact.grad), TOLERANCES[torch.float32]
    far = torch.tensor([[0.0, 400.0, 1.0]], device=device)
    out, idx = _poisoned((1, 2), far), torch.tensor([[0, 2]], device=device)
    triton_routing.launch_gates(far, idx, "renorm", out)
    found["renorm of chosen far below the rest"] = relative(out, torch.softmax(far[:, [0, 2]].double(), -1)), 2e-6
    return found


def balance_sums(device: torch.device, dtype: torch.dtype) -> Errors:
    """Counts exactly, shares and their gradient; sequences of parts of a chunk, and of more than one."""
    found: Errors = {}
    for batch, seq_len, groups, experts, k in ((2, 37, 3, 5, 2), (1, 1100, 1, 4, 1), (3, 1, 2, 8, 3)):
        logits = random_normal((batch, seq_len, groups, experts), device, torch.float32, 10)
        idx = random_choice((batch, seq_len, groups, experts), k, device)
        grad = random_normal((batch, groups, experts), device, torch.float32, 11)
        for sigmoid in (False, True):
            out, back = _poisoned((2, batch, groups, experts), logits), _poisoned(tuple(logits.shape), logits)
            triton_balance.launch_sums(logits, idx, sigmoid, out)
            triton_balance.launch_sums_backward(logits, grad, sigmoid, back)
            exact = logits.double().requires_grad_()
            expected = twins.balance_sums_twin(exact, idx, sigmoid)
            expected[1].backward(grad.double())
            assert exact.grad is not None
            name = f"{batch} {seq_len} {groups} {experts} {k} {'sigmoid' if sigmoid else 'softmax'}"
            found[f"{name}: counts"] = float((out[0] != expected[0]).sum()), 0.0
            found[f"{name}: shares"] = relative(out[1], expected[1].detach()), TOLERANCES[torch.float32]
            found[f"{name}: d logits"] = relative(back, exact.grad), TOLERANCES[torch.float32]
    return found


CHECKS: dict[str, Callable[[torch.device, torch.dtype], Errors]] = {
    "select_rope": select_rope,
    "expand": expand,
    "top_k": top_k,
    "gates": gates,
    "balance_sums": balance_sums,
}
