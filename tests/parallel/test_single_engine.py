"""The engine for one process against DeepSpeed's ZeRO-1: equal bit for bit, in both directions of a resume."""

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from headway.parallel import masters
from headway.parallel.config import ParallelConfig
from headway.parallel.masters import LANES, pieces_of

HERE = Path(__file__).parent
_SPEC = importlib.util.spec_from_file_location("single_cases", HERE / "single_cases.py")
assert _SPEC is not None and _SPEC.loader is not None
cases = sys.modules["single_cases"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cases)
RESUMES = ("deepspeed from auto", "auto from deepspeed", "auto from auto")
# Each precision, sizes of every kind, tied matrices, routers, recomputation. The others are in `make test-all`.
FAST = ["norms in blocks", "tied bf16", "odd sizes", "odd sizes bf16", "rgqa", "rgqa bf16", "mixed"]
NAMES = [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in cases.CASES]


class Results(dict[str, dict]):
    """What the process printed, by case. All cases of a group run in one process, on demand."""

    def __init__(self, folder: Path, run_ranks: Callable[..., str]) -> None:
        super().__init__()
        self._folder, self._run_ranks = folder, run_ranks

    def __missing__(self, name: str) -> dict:
        group = [other for other in cases.CASES if (other in FAST) == (name in FAST)]
        said = self._run_ranks(1, HERE / "single_cases.py", self._folder, *group)
        lines = [line.removeprefix("CASE ") for line in said.splitlines() if line.startswith("CASE ")]
        self.update({case["name"]: case for case in map(json.loads, lines)})
        return dict(self)[name]


@pytest.fixture(scope="module")
def results(tmp_path_factory, run_ranks) -> Results:
    return Results(tmp_path_factory.mktemp("single"), run_ranks)


@pytest.mark.parametrize("name", NAMES)
def test_losses_norms_skipped_steps_and_routers_equal_those_of_zero_1(results, name):
    found = results[name]
    assert found["classes"] == ["ZeroEngine", "SingleEngine"]
    theirs, ours = found["records"]
    assert ours == theirs and len(ours) == cases.STEPS
    skipped = {step for step, record in enumerate(ours) if record[3]}
    assert skipped == {*cases.NOT_FINITE, cases.REFUSED}
    assert all(math.isinf(ours[step][2]) for step in cases.NOT_FINITE)
    # Clipping acts in some steps: its threshold is 0.5.
    assert sum(record[2] > 0.5 for step, record in enumerate(ours) if step not in skipped) >= 3
    assert found["adam_steps"] == [[cases.STEPS - 3], [cases.STEPS - 3]]


@pytest.mark.parametrize("name", NAMES)
def test_weights_moments_and_buffers_equal_those_of_zero_1(results, name):
    assert results[name]["tensors"] > 40
    assert results[name]["differ"] == []


@pytest.mark.parametrize("name", NAMES)
def test_files_of_a_checkpoint_equal_those_of_zero_1(results, name):
    theirs, ours = results[name]["checkpoints"]
    assert ours and ours == theirs


@pytest.mark.parametrize("name", NAMES)
def test_each_engine_continues_a_checkpoint_of_the_other_bit_for_bit(results, name):
    assert results[name]["resumed"] == {
        "deepspeed from auto": True,
        "auto from deepspeed": True,
        "auto from auto": True,
    }


def test_one_process_uses_the_engine_unless_deepspeed_is_asked_for():
    assert ParallelConfig().is_single(1) and ParallelConfig(zero=3).is_single(1)
    assert not ParallelConfig().is_single(2)
    assert not ParallelConfig(engine="deepspeed").is_single(1)


SIZES = {
    "whole vectors": [64, 5008, 8192, 16],
    "a part of a vector at the end": [5008, 8192, 4097],
    "a part of a vector at the end, in small ones": [8192, 5008, 3, 4, 8192, 5],
    "large ones end the group": [5001, 7, 5008, 5008],
    "one odd number": [1],
    "odd sizes that add up to whole vectors": [4099, 8192, 4109],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_adamw_on_pieces_equals_adamw_on_one_flat_tensor(sizes):
    g = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.randn(n, generator=g)) for n in sizes]
    padding = torch.zeros(sum(sizes) % 2)
    whole = nn.Parameter(torch.cat([*(p.detach() for p in parameters), padding]))
    pieces = pieces_of(parameters)
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
    ours = torch.optim.AdamW([piece.value for piece in pieces], **options)
    theirs = torch.optim.AdamW([whole], **options)
    for _ in range(20):
        gradients = {p: torch.randn(p.shape, generator=g) * 10 ** torch.randn((), generator=g) for p in parameters}
        whole.grad = torch.cat([*gradients.values(), padding])
        for piece in pieces:
            piece.value.grad = piece.gradient([gradients[p] for p in piece.parameters])
        theirs.step()
        ours.step()
    assert torch.equal(torch.cat([*(p.detach() for p in parameters), padding]), whole.detach())


def test_large_parameters_of_whole_vectors_are_updated_where_they_are():
    parameters = [nn.Parameter(torch.ones(n)) for n in (masters.SMALL, masters.SMALL + LANES, 48, 5)]
    pieces = pieces_of(parameters[:3])
    assert [piece.is_flat for piece in pieces] == [False, False, True]
    assert [piece.value is p for piece, p in zip(pieces, parameters, strict=False)] == [True, True, False]
    # An element that fills no vector ends the group: all that lie behind the last whole vector are joined.
    assert [piece.parameters for piece in pieces_of([*parameters[:2], parameters[3]])][-1] == (parameters[3],)


def test_bf16_parameters_keep_their_storage_and_have_fp32_copies():
    parameters = [nn.Parameter(torch.randn(n).bfloat16()) for n in (8192, 7)]
    pieces = pieces_of(parameters)
    assert [piece.value.dtype for piece in pieces] == [torch.float32] * 2
    for piece in pieces:
        for part, parameter in zip(piece.parts(piece.value), piece.parameters, strict=True):
            assert parameter.dtype == torch.bfloat16 and torch.equal(part, parameter.detach().float())
