"""`headway bench gpu`: the headline comes first, both sides are compiled alike, and passes run within documents."""

import dataclasses
import types

import pytest
import torch

from headway.kernels import operations
from headway.kernels.device import has_triton
from headway.kernels.documents import Documents
from headway.launcher.bench.gpu import correctness, steps
from headway.launcher.bench.gpu import run as gpu_run
from headway.launcher.bench.gpu.layers import layer_of
from headway.launcher.bench.gpu.rows import GPU, REDUCED, Absent, Failed, Machine
from headway.launcher.bench.gpu.shapes import variants
from headway.launcher.bench.gpu.tables import bound
from headway.model.attention.grouped import QkNorm
from headway.model.layers import AddNorm, RMSNorm, SwiGLU

CPU = torch.device("cpu")
LENGTHS = (2048, 8192, 32_768)
HEADLINE = [f"steps/headline 940M {n}" for n in LENGTHS]
PROFILES = [f"steps/profile 940M {n}{kind}" for n in LENGTHS for kind in ("", " documents")]


class Clock:
    """Stands in for `time`: rows advance it by their expected duration times `factor`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.module = types.SimpleNamespace(
            monotonic=lambda: self.now, strftime=lambda *_: "2026-01-01T00:00:00Z", gmtime=lambda: None
        )


@pytest.fixture
def gpu_rows(monkeypatch):
    """The rows of a GPU with a clock in place of measurements: (clock, factor of their durations, keys that ran)."""
    clock, factor, ran = Clock(), [1.0], []
    here = Machine(device=CPU, scale=GPU)

    def timed(row):
        def run(_):
            clock.now += factor[0] * row.seconds
            ran.append(row.key)
            return {}

        return dataclasses.replace(row, run=run)

    rows = [timed(row) for row in gpu_run.all_rows(here)]
    monkeypatch.setattr(gpu_run, "time", clock.module)
    monkeypatch.setattr(gpu_run, "all_rows", lambda here: rows)
    monkeypatch.setattr(gpu_run, "_card", lambda here: {"id": "x"})
    monkeypatch.setattr(Machine, "is_gpu", property(lambda self: True))
    monkeypatch.setattr(Machine, "free", lambda self: None)
    return clock, factor, ran, [row.key for row in rows]


@pytest.mark.parametrize("slower", [1.0, 1.4])
def test_the_first_eight_minutes_reach_the_headline(gpu_rows, tmp_path, slower):
    clock, factor, ran, keys = gpu_rows
    factor[0] = slower
    begin = clock.now
    assert gpu_run.bench_gpu(minutes=8, out=tmp_path, device="cpu") == 0
    assert {*HEADLINE, *PROFILES} <= set(ran)
    assert len(ran) < len(keys), "the time of all rows does not fit, or this test shows nothing"
    assert clock.now - begin <= 8 * 60 * slower
    assert ran[: len(ran) // 2] == keys[: len(ran) // 2]  # in order, from the first


def test_correctness_of_the_headline_comes_before_it_and_the_rest_after(gpu_rows):
    *_, keys = gpu_rows
    first, last = keys.index(HEADLINE[0]), keys.index(HEADLINE[-1])
    before = [key for key in keys[:first] if key.startswith("correctness/")]
    after = [key for key in keys[last:] if key.startswith("correctness/")]
    assert before[0] == "correctness/core 940M"
    if has_triton():
        named = ["top_k", "gates", "balance_sums", "select_rope", "expand"]
        named += ["routed products 940M k=1", "routed products 940M k=2"]
        assert before[1:] == [f"correctness/{name} bf16" for name in named]
        assert len(after) > 20 and {"correctness/top_k fp32", "correctness/replays bf16"} <= set(after)
    assert len(set(keys)) == len(keys)


def test_a_second_command_goes_on_where_the_first_stopped(gpu_rows, tmp_path):
    _, _, ran, keys = gpu_rows
    commands = 0
    while len(ran) < len(keys) and commands < 30:
        commands += 1
        before = len(ran)
        assert gpu_run.bench_gpu(minutes=8, out=tmp_path, device="cpu") == 0
        assert len(set(ran)) == len(ran), "a row was measured twice"
        left = [key for key in keys if key not in ran[:before]]
        assert ran[before] == left[0]
    assert set(ran) == set(keys) and 3 <= commands < 30


# ---------------------------------------------------------------- compiled alike


class Compiled:
    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)


def pieces(module):
    for part in module.modules():
        if isinstance(part, QkNorm):
            yield part._rope
        elif isinstance(part, RMSNorm):
            yield part._norm
        elif isinstance(part, AddNorm):
            yield part._add_norm
        elif isinstance(part, SwiGLU):
            yield part._function


def test_both_sides_of_every_ratio_are_compiled(monkeypatch):
    assert GPU.compile == "elementwise"
    monkeypatch.setattr(operations, "_compile", Compiled)
    here = Machine(device=CPU, scale=dataclasses.replace(REDUCED, compile="elementwise"))
    size = here.scale.sizes[0]
    segments = steps.segments_of(here, 2, 16)
    contestants = list(steps._contestants(size, here, "none", segments, False))
    assert {"gqa", "rgqa k=1/4", "rgqa k=2/4", "switchhead", "hybrid", "gqe"} <= {c.name for c in contestants}
    for c in contestants:
        found = list(pieces(c.model))
        assert len(found) >= 10 and all(isinstance(each, Compiled) for each in found), c.name
    for variant in variants(size):
        found = list(pieces(layer_of(size, variant, here)))
        assert found and all(isinstance(each, Compiled) for each in found), variant.name
    assert steps.compare(size, 16, True, here)["compile"] == "elementwise"


# ---------------------------------------------------------------- documents


def test_a_headline_row_has_both_forms_of_the_mask_in_the_same_run():
    here = Machine(device=CPU, scale=REDUCED)
    row = steps.compare(here.scale.sizes[0], 32, True, here)
    baselines = {c["name"]: (c["baseline"], c["documents"]) for c in row["contestants"]}
    assert baselines == {
        "gqa": ("gqa", False),
        "gqa, the same again": ("gqa", False),
        "rgqa k=1/4": ("gqa", False),
        "rgqa k=2/4": ("gqa", False),
        "gqa, within documents": ("gqa, within documents", True),
        "rgqa k=1/4, within documents": ("gqa, within documents", True),
    }
    cost = {c["name"]: c["core_flops_per_token"] for c in row["contestants"]}
    assert 0 < cost["gqa, within documents"] < cost["gqa"]


def test_a_pass_within_documents_gets_the_documents(monkeypatch):
    here = Machine(device=CPU, scale=REDUCED)
    size, seen = here.scale.sizes[0], []
    original = steps.train_pass

    def watched(model, tokens, labels, how, segments):
        seen.append(None if segments is None else tuple(segments.shape))
        original(model, tokens, labels, how, segments)

    monkeypatch.setattr(steps, "train_pass", watched)
    steps.compare(size, 16, True, here)
    assert seen.count((2, 16)) == 2 * (1 + 2 + REDUCED.step_rounds)  # two passes: memory, warm-up, rounds
    assert seen.count(None) == 4 * (1 + 2 + REDUCED.step_rounds)


def test_packed_documents_have_lengths_of_text():
    segments = steps.segments_of(Machine(device=CPU, scale=GPU), 64, 8192)
    assert segments.shape == (64, 8192) and segments.dtype == torch.int32
    lengths = [n for row in Documents.of(segments).lengths for n in row[:-1]]  # the last of a sequence is cut
    middle = sorted(lengths)[len(lengths) // 2]
    assert 350 <= middle <= 550 and max(lengths) > 4000 and min(lengths) < 60
    assert torch.equal(segments, steps.segments_of(Machine(device=CPU, scale=GPU), 64, 8192))


def test_the_share_of_visible_scores():
    segments = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    assert steps._visible_share(segments) == pytest.approx((3 + 3 + 10) / 20)


def test_the_bound_has_the_rotation_and_the_profile_of_its_own_mask():
    here = Machine(device=CPU, scale=REDUCED)
    size = here.scale.sizes[0]
    profiles = {kind: steps.profile(size, 16, kind, here) for kind in (False, True)}
    for found in profiles.values():
        parts, whole = found["parts_s"], found["whole_s"]["median"]
        routed = parts["queries"] + parts["query rotation"] + parts["core"] + parts["output"]
        assert found["routed_share"] == pytest.approx(routed / whole)
        assert set(found["slot_rotation_s"]) == {"1", "2"} and all(s > 0 for s in found["slot_rotation_s"].values())
        assert "slot rotation 1" not in parts
    data = {
        "steps/profile tiny 16": {"routed_share": 0.3},
        "steps/profile tiny 16 documents": {"routed_share": 0.2},
    }
    whole = {"active": [1, 4], "baseline": "gqa", "documents": False}
    within = {"active": [1, 4], "baseline": "gqa, within documents", "documents": True}
    assert bound(data, "tiny", 16, whole) == pytest.approx(1 / (1 - 0.75 * 0.3))
    assert bound(data, "tiny", 16, within) == pytest.approx(1 / (1 - 0.75 * 0.2))
    assert bound({"steps/profile tiny 16": data["steps/profile tiny 16"]}, "tiny", 16, within) is None


# ---------------------------------------------------------------- correctness of the headline


def test_the_core_is_compared_with_a_dense_mask(monkeypatch):
    here = Machine(device=CPU, scale=REDUCED)
    size = here.scale.sizes[0]
    found = correctness.compare_core(size, here)
    assert len(found["comparisons"]) == 2 * 2 * 4 and 0 < found["worst"] <= 1
    right = correctness.attention_core

    def without_documents(*args, **options):
        core = right(*args, **options)
        return lambda q, k, v, documents: core(q, k, v, None)

    monkeypatch.setattr(correctness, "attention_core", without_documents)
    with pytest.raises(Failed, match="documents: output") as caught:
        correctness.compare_core(size, here)
    assert "whole: output" not in str(caught.value)


def test_routed_products_are_checked_at_the_sizes_of_the_model():
    if not has_triton():
        pytest.skip("the checks import Triton")
    size = REDUCED.sizes[0]
    for k in (1, 2):
        found = correctness.routed_products(size, k, CPU, torch.float32)
        assert {"order", "project", "combine, gradient 2"} <= set(found)
        assert all(error <= tolerance for error, tolerance in found.values())
    rows = correctness.headline_correctness(Machine(device=CPU, scale=REDUCED))
    with pytest.raises(Absent):
        rows[-1].run(Machine(device=CPU, scale=REDUCED))
