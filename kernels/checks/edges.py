"""Kernels against their twins on values and sizes at the edge: NaN, infinities, ties, no tokens, one token.

`CHECKS[name](device, dtype)` -> what was compared -> (error, tolerance); form of `v0`. The error is infinite where one
form has NaN or an infinity and the other one does not; elsewhere it is that of the finite numbers. Twins run in the
same dtype, on the same device, and those of routed products on the CPU. One operand at a time holds odd values, so that
none hides another.

Legend: T tokens, d width, G groups, N experts per group, k chosen ones, D channels, R rotated channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from headway.kernels import ops, twins
from headway.kernels.checks.v0 import Errors, random_choice, random_normal, relative
from headway.kernels.checks.v1 import kernels_on
from headway.kernels.rope import rope_tables
from headway.kernels.routed import make_slot_grad, make_weight_grad, pair_lists, project
from headway.kernels.triton import balance as triton_balance
from headway.kernels.triton import routing as triton_routing
from headway.kernels.triton import slots as triton_slots

TOKENS, WIDTH, GROUPS, EXPERTS, K, CHANNELS, ROTATED = 37, 40, 2, 5, 2, 24, 12
NAN, INF = float("nan"), float("inf")
ODD = {"NaN": (NAN,), "inf": (INF,), "-inf": (-INF,), "all of them": (NAN, INF, -INF)}
SIZES = {"no token": 0, "one token": 1}
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}
Inputs = dict[str, Tensor]


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative error of the finite numbers; infinite if NaN or infinities stand at different places."""
    if found.shape != expected.shape:
        return INF
    found, expected = found.double(), expected.double()
    if not torch.equal(_odd_of(found), _odd_of(expected)):
        return INF
    finite = expected.isfinite()
    return relative(torch.where(finite, found, 0.0), torch.where(finite, expected, 0.0))


def _odd_of(values: Tensor) -> Tensor:
    """0 at finite numbers, 7 at NaN, and the largest numbers of either sign at infinities."""
    return torch.where(values.isfinite(), 0.0, values).nan_to_num(nan=7.0)


def _spoiled(tensor: Tensor, values: tuple[float, ...]) -> Tensor:
    """A copy with an odd value in every eleventh place, the next one of `values` each time."""
    flat = tensor.clone().flatten()
    places = torch.arange(0, flat.numel(), 11, device=flat.device)
    flat[places] = torch.tensor(values, dtype=flat.dtype, device=flat.device)[(places // 11) % len(values)]
    return flat.view(tensor.shape)


def _cases(make: Callable[[int], tuple[Inputs, Tensor]]) -> Iterator[tuple[str, Inputs, Tensor]]:
    """(what is odd, operands, idx): each operand of `make(tokens)` with each odd value, equal values, and odd sizes."""
    for name, tokens in SIZES.items():
        yield name, *make(tokens)
    given, idx = make(TOKENS)
    yield "equal values", {name: torch.full_like(value, 0.5) for name, value in given.items()}, idx
    for name in given:
        for odd, values in ODD.items():
            yield f"{odd} in {name}", {**given, name: _spoiled(given[name], values)}, idx


def _new(shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
    """Not NaN, which is an expected value here."""
    return torch.full(tuple(shape), -7.0, dtype=like.dtype, device=like.device)


def _gradients(function: Callable[..., Tensor], given: list[Tensor], d_out: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output of a twin and the gradients that autograd finds for it."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    out = function(*leaves)
    return out.detach(), list(torch.autograd.grad(out, leaves, d_out))


# ---------------------------------------------------------------- choice, gates and balancing


def gates(device: torch.device, dtype: torch.dtype) -> Errors:
    """Every gate and the gradient of the logits; always in fp32, as routers are."""

    def make(tokens: int) -> tuple[Inputs, Tensor]:
        logits, grad = (random_normal((tokens, n), device, torch.float32, n) for n in (EXPERTS, K))
        return {"logits": logits, "grad": grad}, random_choice((tokens, EXPERTS), K, device)

    found: Errors = {}
    for what, given, idx in _cases(make):
        logits, grad = given["logits"], given["grad"]
        for name in triton_routing.GATES:
            if name == "hard":
                continue
            out, back = _new(idx.shape, logits), _new(logits.shape, logits)
            triton_routing.launch_gates(logits, idx, name, out)
            triton_routing.launch_gates_backward(logits, idx, name, grad, back)
            wanted, (d_logits,) = _gradients(
                lambda r, idx=idx, name=name: twins.gates_twin(r, idx, name), [logits], grad
            )
            found[f"{name}, {what}"] = distance(out, wanted), TOLERANCES[torch.float32]
            found[f"{name}, {what}: d logits"] = distance(back, d_logits), TOLERANCES[torch.float32]
            registered = ops.gates_backward(grad, logits, idx, name)
            found[f"{name}, {what}: d logits of the operator"] = distance(registered, d_logits), 2e-6
    return found


def top_k(device: torch.device, dtype: torch.dtype) -> Errors:
    """Indices that differ. The check of `v0` compares more kinds of rows; here are all sizes."""

    def make(tokens: int) -> tuple[Inputs, Tensor]:
        scores = random_normal((tokens, EXPERTS), device, torch.float32, 3)
        return {"scores": scores}, scores.new_empty((tokens, K), dtype=torch.int64)

    found: Errors = {}
    for what, given, idx in _cases(make):
        triton_routing.launch_top_k(given["scores"], idx)
        found[what] = float((idx != twins.top_k_twin(given["scores"], K)).sum()), 0.0
    return found


def balance_sums(device: torch.device, dtype: torch.dtype) -> Errors:
    """Counts and shares of sequences, and the gradient of the logits; always in fp32."""

    def make(tokens: int) -> tuple[Inputs, Tensor]:
        logits = random_normal((2, tokens, GROUPS, EXPERTS), device, torch.float32, 1)
        grad = random_normal((2, GROUPS, EXPERTS), device, torch.float32, 2)
        return {"logits": logits, "grad": grad}, random_choice((2, tokens, GROUPS, EXPERTS), K, device)

    found: Errors = {}
    for what, given, idx in _cases(make):
        logits, grad = given["logits"], given["grad"]
        for sigmoid in (False, True):
            name = f"{'sigmoid' if sigmoid else 'softmax'}, {what}"
            out, back = _new((2, 2, GROUPS, EXPERTS), logits), _new(logits.shape, logits)
            triton_balance.launch_sums(logits, idx, sigmoid, out)
            triton_balance.launch_sums_backward(logits, grad, sigmoid, back)
            wanted, (d_logits,) = _gradients(
                lambda r, idx=idx, sigmoid=sigmoid: twins.balance_sums_twin(r, idx, sigmoid),
                [logits],
                torch.stack([torch.zeros_like(grad), grad]),
            )
            found[name] = distance(out, wanted), TOLERANCES[torch.float32]
            found[f"{name}: d logits"] = distance(back, d_logits), TOLERANCES[torch.float32]
            registered = ops.balance_sums_backward(grad, logits, sigmoid)
            found[f"{name}: d logits of the operator"] = distance(registered, d_logits), TOLERANCES[torch.float32]
    return found


# ---------------------------------------------------------------- pool and slots


def select_rope(device: torch.device, dtype: torch.dtype) -> Errors:
    """Gather and rotation of part of the channels, and the way back."""

    def make(tokens: int) -> tuple[Inputs, Tensor]:
        pool = random_normal((1, tokens, GROUPS, EXPERTS, CHANNELS), device, dtype, 1)
        grad = random_normal((1, tokens, GROUPS, K, CHANNELS), device, dtype, 2)
        return {"pool": pool, "grad": grad}, random_choice((1, tokens, GROUPS, EXPERTS), K, device)

    found: Errors = {}
    for what, given, idx in _cases(make):
        pool, grad = given["pool"], given["grad"]
        rope = rope_tables(pool.shape[1], ROTATED, 1e4, device)
        out, back = _new(grad.shape, pool), _new(pool.shape, pool)
        triton_slots.launch_select_rope(triton_slots.select_rope_forward, pool, idx, *rope, EXPERTS, out)
        triton_slots.launch_select_rope(triton_slots.select_rope_backward, grad, idx, *rope, EXPERTS, back)
        wanted, (d_pool,) = _gradients(lambda p, idx=idx, rope=rope: twins.select_rope_twin(p, idx, rope), [pool], grad)
        found[what] = distance(out, wanted), TOLERANCES[dtype]
        found[f"{what}: d pool"] = distance(back, d_pool), TOLERANCES[dtype]
        registered = ops.select_rope_backward(grad, idx, *rope, EXPERTS)
        found[f"{what}: d pool of the operator"] = distance(registered, d_pool), TOLERANCES[dtype]
    return found


def expand(device: torch.device, dtype: torch.dtype) -> Errors:
    """Gated scatter and the way back."""

    def make(tokens: int) -> tuple[Inputs, Tensor]:
        rows = (1, tokens, GROUPS)
        slots, pool = (random_normal((*rows, n, CHANNELS), device, dtype, n) for n in (K, EXPERTS))
        gate = random_normal((*rows, K), device, torch.float32, 3)
        return {"slots": slots, "gate": gate, "grad": pool}, random_choice((*rows, EXPERTS), K, device)

    found: Errors = {}
    for what, given, idx in _cases(make):
        slots, gate, grad = given.values()
        out, d_slots, d_gate = _new(grad.shape, grad), _new(slots.shape, slots), _new(gate.shape, gate)
        flat_slots, flat_idx, flat_gate, flat_grad = (t.flatten(0, 2) for t in (slots, idx, gate, grad))
        triton_slots.launch_expand(flat_slots, flat_idx, flat_gate, EXPERTS, out)
        triton_slots.launch_expand_backward(flat_grad, flat_slots, flat_idx, flat_gate, EXPERTS, d_slots, d_gate)
        wanted, gradients = _gradients(lambda s, g, idx=idx: twins.expand_twin(s, idx, g, EXPERTS), [slots, gate], grad)
        found[what] = distance(out, wanted), TOLERANCES[dtype]
        registered = ops.expand_backward(grad, slots, idx, gate)
        for kind, pair in (("", (d_slots, d_gate)), (" of the operator", registered)):
            for name, made, exact in zip(("d slots", "d gate"), pair, gradients, strict=True):
                found[f"{what}: {name}{kind}"] = distance(made, exact), TOLERANCES[dtype]
    return found


# ---------------------------------------------------------------- routed products


def lists(device: torch.device, dtype: torch.dtype) -> Errors:
    """Numbers that differ, for no token, one token, and all tokens on the last expert."""
    found: Errors = {}
    chosen = {name: random_choice((tokens, GROUPS, EXPERTS), K, device) for name, tokens in SIZES.items()}
    chosen["all on one"] = torch.full((TOKENS, GROUPS, 1), EXPERTS - 1, device=device)
    for what, idx in chosen.items():
        with kernels_on(device):
            made = pair_lists(idx, EXPERTS)
        wanted = pair_lists(idx.cpu(), EXPERTS)
        for name, a, b in zip(made._fields, made, wanted, strict=True):
            found[f"{what}: {name}"] = float((a.cpu() != b).sum()) if a.shape == b.shape else INF, 0.0
    return found


def products(device: torch.device, dtype: torch.dtype) -> Errors:
    """Projection with rotation of part of the channels, gradients of the slots, of the gate and of both weights."""
    columns = GROUPS * EXPERTS * CHANNELS

    def make(tokens: int) -> tuple[Inputs, Tensor]:
        x, w = random_normal((tokens, WIDTH), device, dtype, 1), random_normal((columns, WIDTH), device, dtype, 2)
        slots = random_normal((tokens, GROUPS, K, CHANNELS), device, dtype, 3)
        gate = random_normal((tokens, GROUPS, K), device, torch.float32, 4)
        return {"x": x, "w": w, "slots": slots, "gate": gate}, random_choice((tokens, GROUPS, EXPERTS), K, device)

    def results(given: Inputs, idx: Tensor) -> dict[str, Tensor]:
        x, w, slots, gate = given.values()
        made = pair_lists(idx, EXPERTS)
        rope = rope_tables(max(len(x), 1), ROTATED, 1e4, x.device)
        d_slots, d_gate = make_slot_grad(x, w.t().contiguous(), slots, gate, *made, True)
        return {
            "projection": project(x, w, *rope, *made, True, True),
            "d slots": d_slots,
            "d gate": d_gate,
            "d w": make_weight_grad(x, slots, None, *made, True, True),
            "d w_o": make_weight_grad(x, slots, gate, *made, False, True),
        }

    found: Errors = {}
    for what, given, idx in _cases(make):
        with kernels_on(device):
            made = results(given, idx)
        wanted = results({name: value.cpu() for name, value in given.items()}, idx.cpu())
        found |= {f"{name}, {what}": (distance(made[name].cpu(), wanted[name]), TOLERANCES[dtype]) for name in made}
    return found


CHECKS: dict[str, Callable[[torch.device, torch.dtype], Errors]] = {
    f"edges: {check.__name__}": check for check in (top_k, gates, balance_sums, select_rope, expand, lists, products)
}
