"""The kernel of flash-linear-attention: when it is used, how it is called, and that a wrong one ends the run.

No GPU runs it here: a stand-in with its documented signature takes its place.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from headway.kernels.delta import library
from headway.kernels.delta.library import Library, delta_of, delta_on
from headway.kernels.delta.rule import chunked_delta
from headway.kernels.documents import Documents
from headway.kernels.levers import LeverError
from headway.kernels.operations import make_operations

BF16, FP32 = torch.bfloat16, torch.float32


class Kernel:
    """`chunk_gated_delta_rule` as its documentation describes it, by our own form; `wrong` changes what it computes."""

    def __init__(self, wrong: str = "") -> None:
        self.wrong, self.calls = wrong, 0

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        self.calls += 1
        assert q.dtype == k.dtype == v.dtype == beta.dtype == BF16 and g.dtype == FP32
        assert q.shape == k.shape and q.shape[:3] == v.shape[:3] == g.shape == beta.shape
        assert use_qk_l2norm_in_kernel and scale == pytest.approx(q.shape[-1] ** -0.5)
        documents = None
        if cu_seqlens is not None:
            assert len(q) == 1 and cu_seqlens.dtype == torch.int64
            documents = Documents((tuple(cu_seqlens.diff().tolist()),))
        if self.wrong == "documents":
            documents = None
        if self.wrong == "decay":
            g = g * 0
        if self.wrong == "order":
            g = torch.cat([g[:, 1:], g[:, :1]], 1)
        if self.wrong == "gradient":
            v = v.detach() + (v - v.detach()) * 1.2
        o, last = chunked_delta(q, k, v, g, beta, documents=documents, state=initial_state)
        if self.wrong == "nan":
            o = o * float("nan")
        return o, last if output_final_state else None


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`installed(wrong)`: a library with this kernel."""

    def install(wrong: str = "") -> Kernel:
        kernel = Kernel(wrong)
        monkeypatch.setattr(library, "importable", lambda name: name == "fla")
        module = ModuleType(library.PLACE)
        vars(module)["chunk_gated_delta_rule"] = kernel
        for name in ("fla", "fla.ops"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, library.PLACE, module)
        return kernel

    return install


def problem(heads: int = 2, values: int = 4) -> list[Tensor]:
    g = torch.Generator().manual_seed(4)
    sizes = [(heads, 8), (heads, 8), (values, 6), (values,), (values,)]
    q, k, v, decay, beta = (torch.randn(2, 70, *size, generator=g) for size in sizes)
    return [q.to(BF16), k.to(BF16), v.to(BF16), -decay.exp(), beta.sigmoid()]


@pytest.mark.parametrize("documents", [None, Documents(((30, 40), (70,))), Documents(((70,), (70,)))])
@pytest.mark.parametrize("values", [2, 4])
def test_the_kernel_gets_the_documents_and_as_many_keys_as_values(
    installed: Any, documents: Documents | None, values: int
) -> None:
    kernel, inputs = installed(), problem(values=values)
    delta = delta_of("fla", device_type="cuda", dtype=BF16)
    found, none = delta(*inputs, documents=documents)
    expected, _ = chunked_delta(*inputs, documents=documents)
    assert none is None and found.shape == expected.shape
    assert (found.float() - expected.float()).norm() <= 2**-7 * expected.float().norm()  # beta is rounded too
    assert kernel.calls == 2  # the comparison, and the call
    delta(*inputs, documents=documents)
    assert kernel.calls == 3


def test_a_state_goes_in_and_comes_out(installed: Any) -> None:
    installed()
    inputs = problem()
    state = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(5))
    (o, last), (expected, after) = (
        form(*inputs, state=state) for form in (delta_of("fla", device_type="cuda", dtype=BF16), chunked_delta)
    )
    assert last is not None and after is not None and last.dtype == FP32
    for mine, theirs in ((o, expected), (last, after)):
        assert (mine.float() - theirs.float()).norm() <= 2**-7 * theirs.float().norm()


@pytest.mark.parametrize("wrong", ["documents", "decay", "order", "gradient", "nan"])
def test_a_kernel_that_computes_something_else_ends_the_run(installed: Any, wrong: str) -> None:
    installed(wrong)
    with pytest.raises(LeverError, match=r"speed\.delta: .* differ from Headway's own form .*use speed\.delta: torch"):
        delta_of("auto", device_type="cuda", dtype=BF16)(*problem())


def test_without_the_library_or_a_gpu_our_own_form_is_used(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "importable", lambda name: False)
    for device, dtype in (("cpu", FP32), ("cuda", BF16), ("cuda", FP32)):
        assert delta_of("auto", device_type=device, dtype=dtype) is chunked_delta
    with pytest.raises(LeverError, match=r"speed\.delta: fla needs flash-linear-attention, .* use speed\.delta: auto"):
        delta_of("fla", device_type="cuda", dtype=BF16)
    installed()
    assert isinstance(delta_of("auto", device_type="cuda", dtype=BF16), Library)
    assert delta_of("torch", device_type="cuda", dtype=BF16) is chunked_delta
    assert delta_of("auto", device_type="cuda", dtype=FP32) is delta_of("auto", device_type="cpu", dtype=BF16)
    for device, dtype, why in (("cpu", BF16, "GPUs alone, and this run is on cpu"), ("cuda", FP32, "takes no fp32")):
        with pytest.raises(LeverError, match=rf"speed\.delta: fla .*{why}"):
            delta_of("fla", device_type=device, dtype=dtype)


def test_another_release_without_the_kernel_is_an_error_of_runs_that_need_it(
    installed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of other mechanisms import nothing of it."""
    installed()
    monkeypatch.setitem(sys.modules, library.PLACE, ModuleType(library.PLACE))
    delta = delta_of("auto", device_type="cuda", dtype=BF16)
    with pytest.raises(LeverError, match=r"installed without fla\.ops\.gated_delta_rule\.chunk_gated_delta_rule"):
        delta(*problem())


def test_the_key_of_a_spec_reaches_the_operations() -> None:
    assert delta_on("cpu", "auto", FP32) == "torch"
    assert make_operations(device=torch.device("cpu"), dtype=FP32).delta is chunked_delta
    with pytest.raises(LeverError, match=r"speed\.delta: fla"):
        make_operations(device=torch.device("cpu"), dtype=FP32, delta="fla")
