"""Every launch of a kernel happens on the device of its tensors, whatever the current device is."""

import contextlib
import importlib
import inspect
import pkgutil

import pytest
import torch

import headway.kernels.triton
from headway.kernels import launch
from headway.kernels.launch import on_device_of_first

MODULES = [
    importlib.import_module(f"headway.kernels.triton.{found.name}")
    for found in pkgutil.iter_modules(headway.kernels.triton.__path__)
]
TOKENS, GROUPS, EXPERTS, K, D, WIDTH = 70, 2, 4, 2, 16, 32


class Recorder:
    """Stands in for the current device and for every kernel: notes on which device each kernel is launched."""

    def __init__(self):
        self.current, self.launches, self.replaced = torch.device("cuda:0"), [], set()

    @contextlib.contextmanager
    def device(self, wanted):
        before, self.current = self.current, torch.device(wanted)
        try:
            yield
        finally:
            self.current = before

    def kernel(self, name):
        recorder = self
        recorder.replaced.add(name)

        class Kernel:
            def __getitem__(self, grid):
                return lambda *args, **kwargs: recorder.launches.append((name, recorder.current))

        return Kernel()


@pytest.fixture
def recorder(monkeypatch):
    """The kernels of all modules are replaced, and tensors of the device "meta" count as those of a GPU."""
    found = Recorder()
    monkeypatch.setattr(torch.cuda, "device", found.device)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.device.type == "meta"))
    for shipped in [shipped for module in MODULES for shipped in module.shipped()]:
        name = shipped.kernel.fn.__name__
        for module in MODULES:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, found.kernel(name))
    return found


def launch_everything(device):
    """Call every launch function of the package."""
    from headway.kernels.triton import balance, gather, lists, routing, slots, weight_grad

    rows = TOKENS * GROUPS

    def given(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=device)

    idx, gate = given(TOKENS, GROUPS, K, dtype=torch.int64), given(TOKENS, GROUPS, K)
    logits, flat_idx, flat_gate = given(rows, EXPERTS), given(rows, K, dtype=torch.int64), given(rows, K)
    routing.launch_top_k(logits, flat_idx)
    routing.launch_gates(logits, flat_idx, "softmax", flat_gate)
    routing.launch_gates_backward(logits, flat_idx, "softmax", flat_gate, logits)
    together = given(1, TOKENS, GROUPS, EXPERTS)
    balance.launch_sums(together, idx[None], False, given(2, 1, GROUPS, EXPERTS))
    balance.launch_sums_backward(together, given(1, GROUPS, EXPERTS), False, together)
    pool, table, chosen = given(1, TOKENS, GROUPS, EXPERTS, D), given(TOKENS, D), given(1, TOKENS, GROUPS, K, D)
    slots.launch_select_rope(slots.select_rope_forward, pool, idx[None], table, table, EXPERTS, chosen)
    slots.launch_select_rope(slots.select_rope_backward, chosen, idx[None], table, table, EXPERTS, pool)
    flat_slots, flat_pool = given(rows, K, D), given(rows, EXPERTS, D)
    slots.launch_expand(flat_slots, flat_idx, flat_gate, EXPERTS, flat_pool)
    slots.launch_expand_backward(flat_pool, flat_slots, flat_idx, flat_gate, EXPERTS, flat_slots, flat_gate)
    made = lists.pair_lists(idx, EXPERTS)
    x, w, out = given(TOKENS, WIDTH), given(GROUPS * EXPERTS * D, WIDTH), given(TOKENS, GROUPS, K, D)
    gather.gather_project(x, w, made, (table, table), out)
    gather.gather_slot_grad(x, w.t(), out, gate, made, out, gate)
    weight_grad.weight_grad(x, out, None, made, True, w)


def test_every_kernel_is_launched_on_the_device_of_its_tensors(recorder):
    launch_everything("meta")
    names = [name for name, _ in recorder.launches]
    assert set(names) == recorder.replaced
    assert names.count("schedule") == 1 < names.count("gather_gemm")  # all products read one schedule
    assert {device for _, device in recorder.launches} == {torch.device("meta")}
    assert recorder.current == torch.device("cuda:0")


def test_a_launch_without_the_guard_is_seen(recorder):
    from headway.kernels.triton import routing

    scores, idx = (torch.empty(3, n, dtype=t, device="meta") for n, t in ((4, torch.float32), (1, torch.int64)))
    inspect.unwrap(routing.launch_top_k)(scores, idx)
    assert recorder.launches == [("top_k_forward", torch.device("cuda:0"))]


def test_on_a_cpu_no_device_is_set(monkeypatch):
    def refuse(device):
        raise AssertionError(device)

    monkeypatch.setattr(launch.torch.cuda, "device", refuse)
    assert on_device_of_first(lambda name, x, y: (name, x + y))("sum", torch.ones(1), torch.ones(1)) == ("sum", 2)
