"""The dispatch to kernels or twins is process-wide: equal in backward passes, in compiled code and in plain calls."""

import threading

import pytest
import torch

from headway.kernels import device


def in_another_thread(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))  # as autograd's, which has no context of the caller
    thread.start()
    thread.join()
    return found[0]


def test_threads_of_the_backward_pass_see_the_flags(monkeypatch):
    monkeypatch.setattr(device, "_TRITON", True)
    x = torch.zeros(1)
    assert not device.fused(x)
    with device.interpreted():
        assert device.fused(x) and in_another_thread(lambda: device.fused(x))
        with device.twins():
            assert not device.fused(x) and not in_another_thread(lambda: device.fused(x))
        assert device.fused(x)
    assert not device.fused(x)


def test_flags_are_restored_after_an_error():
    for context in (device.interpreted, device.twins):
        with pytest.raises(KeyError), context():
            raise KeyError
    assert not device._FORMS.interpreted and not device._FORMS.twins_alone


def test_a_compiled_function_reads_the_flags_without_a_graph_break_and_recompiles_when_they_change(monkeypatch):
    monkeypatch.setattr(device, "_TRITON", True)
    capability = torch.compiler.disable(lambda index: (9, 0))  # like the real one it cannot be traced
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    device._capability.cache_clear()

    def asked(x):
        gpu = device._capable(0) and device._architecture(0) == "sm_90"
        return x + (1 if device.fused(x) else 2) + (10 if gpu else 20)

    compiled = torch.compile(asked, fullgraph=True, backend="eager")
    try:
        assert compiled(torch.zeros(1)) == 12
        with device.interpreted():
            assert compiled(torch.zeros(1)) == 11
    finally:
        device._capability.cache_clear()
