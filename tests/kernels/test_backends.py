"""Selection and priority of the attention backends, and the messages for unavailable ones."""

import inspect
import sys
from contextlib import nullcontext
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, varlen

from headway.kernels import backends, levers
from headway.kernels.attention import core
from headway.kernels.backends import attention_core, order, ordered_scores
from headway.kernels.documents import Documents
from headway.kernels.levers import LeverError
from headway.kernels.varlen import supports

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def qkv() -> Heads:
    g = torch.Generator().manual_seed(1)
    shapes = ((2, 5, 4, 6), (2, 5, 2, 6), (2, 5, 2, 6))
    q, k, v = (torch.randn(*shape, generator=g, requires_grad=True) for shape in shapes)
    return q, k, v


class Fa3:
    """FlashAttention-3's function by PyTorch: the same arguments, causality of the last positions, GQA native."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, with_sums: bool = False) -> None:
        self.calls: list[dict[str, Any]] = []
        self.with_sums = with_sums
        module = ModuleType(backends.FA3_MODULE)
        vars(module)["flash_attn_func"] = self
        vars(module)["flash_attn_varlen_func"] = self.varlen
        monkeypatch.setitem(sys.modules, backends.FA3_MODULE, module)
        monkeypatch.setattr(backends, "importable", lambda name: name == backends.FA3_MODULE)

    def __call__(self, q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False):
        self.calls.append({"causal": causal, "window_size": window_size, "deterministic": deterministic})
        queries, keys = q.shape[1], k.shape[1]
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        near = (distance >= 0) if causal else torch.ones_like(distance, dtype=torch.bool)
        if window_size[0] >= 0:
            near &= distance <= window_size[0]
        heads = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(*heads, attn_mask=near, scale=softmax_scale, enable_gqa=True)
        out = out.transpose(1, 2)
        return (out, torch.zeros(())) if self.with_sums else out

    def varlen(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        *,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        deterministic=False,
    ):
        self.calls.append({"causal": causal, "window_size": window_size, "deterministic": deterministic})
        assert causal
        window = None if window_size[0] < 0 else window_size[0] + 1
        starts = (cu_seqlens_q, cu_seqlens_k)
        out = each_document(q, k, v, starts, (max_seqlen_q, max_seqlen_k), scale=softmax_scale, window=window)
        return (out, torch.zeros(())) if self.with_sums else out


def each_document(q, k, v, starts, longest, *, scale, window):
    """`Varlen` written out, one document after the other."""
    (of_q, of_k), outs = (each.tolist() for each in starts), []
    assert (of_q[0], of_q[-1], of_k[0], of_k[-1]) == (0, len(q), 0, len(k))
    assert longest == (max(b - a for a, b in pairwise(of_q)), max(b - a for a, b in pairwise(of_k)))
    for (first, last), (begin, end) in zip(pairwise(of_q), pairwise(of_k), strict=True):
        distance = torch.arange(end - begin - (last - first), end - begin)[:, None] - torch.arange(end - begin)
        near = (distance >= 0) & (distance < (window or len(k)))
        heads = [t.transpose(0, 1) for t in (q[first:last], k[begin:end], v[begin:end])]
        out = F.scaled_dot_product_attention(*heads, attn_mask=near, scale=scale, enable_gqa=True)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
    """`torch.nn.attention.varlen.varlen_attn` on the CPU: its arguments, with its checks."""
    signature = inspect.signature(varlen.varlen_attn)
    signature.bind(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)
    left, right = options["window_size"]
    assert right == 0 and options["enable_gqa"] == (query.shape[1] != key.shape[1])
    assert query.shape[-1] % 8 == 0 and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    window = None if left < 0 else left + 1
    return each_document(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale=options["scale"], window=window)


SEGMENTS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 3]])


def test_the_cpu_uses_the_default_core():
    assert attention_core("auto", device_type="cpu", dtype=FP32) is core
    assert attention_core("math", device_type="cpu", dtype=BF16) is core


@pytest.mark.parametrize("name", ["cudnn", "flash", "fa3"])
def test_gpu_backends_are_refused_on_the_cpu(name):
    with pytest.raises(LeverError, match=rf"speed\.attention: {name} runs on NVIDIA GPUs.* auto or math") as caught:
        attention_core(name, device_type="cpu", dtype=BF16)
    assert caught.value.exit_code == 64


@pytest.mark.parametrize("name", ["cudnn", "flash", "fa3"])
def test_fp32_is_refused_by_backends_without_fp32_kernels(name):
    with pytest.raises(LeverError, match=r"takes no fp32; use speed\.attention: auto or math"):
        attention_core(name, device_type="cuda", dtype=FP32)


def test_auto_prefers_cudnn():
    assert order("auto")[:2] == [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    assert order("auto")[-1] == SDPBackend.MATH


def test_where_algorithms_must_be_deterministic_flash_comes_first_and_cudnn_alone_is_refused(deterministic):
    assert order("auto")[:2] == [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    assert sorted(map(str, order("auto"))) == sorted(map(str, backends._ORDER["auto"]))
    with pytest.raises(LeverError, match="no deterministic backward"):
        attention_core("cudnn", device_type="cuda", dtype=BF16)


def test_the_order_reaches_pytorch_with_priority(monkeypatch, qkv: Heads):
    asked = []
    real = backends.sdpa_kernel

    def spy(chosen, *, set_priority):
        asked.append((chosen, set_priority))
        return real([SDPBackend.MATH])

    monkeypatch.setattr(backends, "sdpa_kernel", spy)
    run = attention_core("auto", device_type="cuda", dtype=BF16)
    torch.testing.assert_close(run(*qkv, None), core(*qkv, None), rtol=0, atol=1e-6)
    assert asked == [(order("auto"), True)]
    windowed = run(*qkv, None, window=2)
    torch.testing.assert_close(windowed, core(*qkv, None, window=2), rtol=0, atol=1e-6)


def test_a_named_backend_is_the_only_one_and_math_has_the_same_gradients(qkv: Heads):
    assert [order(name) for name in ("cudnn", "flash", "math")] == [
        [SDPBackend.CUDNN_ATTENTION],
        [SDPBackend.FLASH_ATTENTION],
        [SDPBackend.MATH],
    ]
    run = attention_core("math", device_type="cuda", dtype=FP32)
    both = [torch.autograd.grad(f(*qkv, None).square().sum(), qkv) for f in (run, core)]
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_flash_refuses_a_mask(qkv: Heads):
    q, k, v = (t.transpose(1, 2) for t in qkv)
    with pytest.raises(LeverError, match=r"speed\.attention: flash .* auto or cudnn"):
        ordered_scores("flash", q, k, v, attn_mask=torch.ones(5, 5, dtype=torch.bool))


def test_flash_attention_3_is_used_only_by_name_and_must_be_installed(monkeypatch):
    monkeypatch.setattr(backends, "importable", lambda name: False)
    with pytest.raises(LeverError, match=r"fa3 needs FlashAttention-3 .*not installed; use speed\.attention: auto or"):
        attention_core("fa3", device_type="cuda", dtype=BF16)


@pytest.mark.parametrize("with_sums", [False, True])
def test_flash_attention_3_gets_causality_windows_and_fewer_kv_heads(monkeypatch, qkv: Heads, with_sums):
    fake = Fa3(monkeypatch, with_sums=with_sums)
    run = attention_core("fa3", device_type="cuda", dtype=BF16)
    q, k, v = qkv
    for args, window in ((qkv, None), (qkv, 2), ((q[:, -1:], k, v), None)):
        torch.testing.assert_close(run(*args, None, window=window), core(*args, None, window=window))
    assert [call["window_size"] for call in fake.calls] == [(-1, -1), (1, 0), (-1, -1)]
    assert all(call["causal"] and not call["deterministic"] for call in fake.calls)


@pytest.mark.parametrize("with_sums", [False, True])
def test_flash_attention_3_attends_within_documents_in_one_call(monkeypatch, qkv: Heads, with_sums):
    fake = Fa3(monkeypatch, with_sums=with_sums)
    run = attention_core("fa3", device_type="cuda", dtype=BF16)
    documents = Documents.of(SEGMENTS)
    for window in (None, 2):
        expected = core(*qkv, documents, window=window)
        torch.testing.assert_close(run(*qkv, documents, window=window), expected, rtol=0, atol=1e-6)
    assert [call["window_size"] for call in fake.calls] == [(-1, -1), (1, 0)]


@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("name", ["auto", "flash"])
def test_documents_are_one_call_of_varlen_attention(monkeypatch, qkv: Heads, name, window):
    """Six channels are padded to eight; KV heads are not repeated; no mask is made."""
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    run = attention_core(name, device_type="cuda", dtype=BF16)
    both = [f(*qkv, Documents.of(SEGMENTS), window=window) for f in (run, core)]
    torch.testing.assert_close(*both, rtol=0, atol=1e-6)
    grads = [torch.autograd.grad(out.square().sum(), qkv) for out in both]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_varlen_attention_takes_queries_of_a_part_of_the_sequences(monkeypatch, rank):
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    q, k, v = (torch.randn(2, 6, heads, 8) for heads in (4, 1, 1))
    whole = Documents.of(torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 2, 2, 2, 2]]))
    first, last = 2 * rank, 2 * rank + 2
    run = attention_core("auto", device_type="cuda", dtype=BF16)
    mine = run(q[:, first:last], k[:, :last], v[:, :last], whole.part(first, last))
    torch.testing.assert_close(mine, core(q, k, v, whole)[:, first:last], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype", "segments", "size", "varlen_calls"),
    [
        ("auto", BF16, SEGMENTS, 6, 1),
        ("auto", BF16, None, 6, 0),
        ("auto", BF16, torch.zeros(2, 5), 6, 0),  # one document per sequence: plain causal attention
        ("auto", BF16, SEGMENTS, 264, 0),
        ("auto", FP32, SEGMENTS, 6, 0),
        ("math", BF16, SEGMENTS, 6, 0),
        ("cudnn", BF16, SEGMENTS, 6, 0),
    ],
)
def test_varlen_attention_is_used_where_it_applies(monkeypatch, name, dtype, segments, size, varlen_calls):
    calls = []
    monkeypatch.setattr(
        varlen, "varlen_attn", lambda *args, **options: calls.append(1) or varlen_attn(*args, **options)
    )
    monkeypatch.setattr(backends, "sdpa_kernel", lambda *args, **options: nullcontext())
    q, k, v = (torch.randn(2, 5, heads, size) for heads in (4, 2, 2))
    documents = None if segments is None else Documents.of(segments)
    out = attention_core(name, device_type="cuda", dtype=dtype)(q, k, v, documents)
    torch.testing.assert_close(out, core(q, k, v, documents), rtol=0, atol=1e-6)
    assert len(calls) == varlen_calls


def test_varlen_attention_needs_half_precision_and_an_ampere_gpu():
    assert supports(BF16, (9, 0)) and supports(torch.float16, (8, 0)) and supports(BF16, None)
    assert not supports(BF16, (7, 5)) and not supports(FP32, (9, 0))


def test_flash_attention_3_is_deterministic_if_required(monkeypatch, qkv: Heads, deterministic):
    fake = Fa3(monkeypatch)
    attention_core("fa3", device_type="cuda", dtype=BF16)(*qkv, None)
    assert fake.calls[0]["deterministic"] is True


def test_an_incomplete_module_is_not_importable(monkeypatch):
    def broken(name):
        raise ValueError(f"{name}.__spec__ is None")

    assert levers.importable("torch") and not levers.importable("no_such_module_of_ours")
    monkeypatch.setattr(levers.importlib.util, "find_spec", broken)
    assert not levers.importable("torch")
