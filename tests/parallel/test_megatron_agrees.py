"""Sharded layers in real processes equal those of megatron-core and those of a single process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.loss import linear_cross_entropy_by_token
from headway.model.layers import SwiGLU

FILE = Path(__file__).parent / "megatron_cases.py"


def load_cases() -> Any:
    spec = importlib.util.spec_from_file_location("megatron_cases", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = load_cases()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    """What each rank got, by case."""
    root = tmp_path_factory.mktemp("megatron")
    started = [
        subprocess.Popen(
            [sys.executable, "-P", str(FILE), str(rank), str(root)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(cases.RANKS)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in started:
            process.kill()
    return [torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in range(cases.RANKS)]


@pytest.fixture
def p() -> dict[str, Tensor]:
    return cases.problem()


def whole(ranks: list[dict[str, dict[str, Tensor]]], case: str, dims: dict[str, int]) -> dict[str, Tensor]:
    """The case's result: slices joined along `dims`; what is not named must be the same on every rank."""
    joined = {}
    for name, mine in ranks[0][case].items():
        if name in dims:
            joined[name] = torch.cat([rank[case][name] for rank in ranks], dims[name])
        else:
            assert all(torch.equal(rank[case][name], mine) for rank in ranks), name
            joined[name] = mine
    return joined


def assert_all_close(got: dict[str, Tensor], want: dict[str, Tensor], *, to: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name].double(), want[name].double(), rtol=to, atol=to, msg=name)


def test_the_mlp_is_cut_into_columns_then_rows(ranks, p):
    mlp = SwiGLU(cases.WIDTH, cases.FFN, layers=1, init_std=1.0).double()
    weights = {name: getattr(mlp, name) for name in ("w_gate", "w_up", "w_down")}
    mlp.load_state_dict({name: p[name] for name in weights})
    want = cases.with_gradients(mlp, p["x"], p["grad_y"], weights)
    assert_all_close(whole(ranks, "swiglu", {"w_gate": 0, "w_up": 0, "w_down": 1}), want, to=1e-13)


def test_the_embedding_is_cut_into_rows(ranks, p):
    rows = p["rows"].requires_grad_()
    y = F.embedding(p["tokens"], rows)
    want = {"y": y.detach(), "rows": torch.autograd.grad(y, rows, p["grad_y"])[0]}
    assert_all_close(whole(ranks, "embedding", {"rows": 0}), want, to=1e-15)


def plain_loss(p: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = p["rows"].clone().requires_grad_()
    labels = p["labels"].flatten()

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(x.flatten(0, 1) @ rows.T, labels, ignore_index=-100, reduction="sum")

    return cases.with_gradients(loss, p["x"], torch.tensor(0.3, dtype=torch.float64), {"rows": rows})


def test_the_loss_over_cut_rows_is_that_of_megatron(ranks, p):
    ours = whole(ranks, "loss", {"rows": 0})
    theirs = whole(ranks, "megatron_loss", {"rows": 0})
    # float32: a dozen roundings to 24 bits
    assert_all_close({name: ours[name] for name in theirs}, theirs, to=1e-6)
    assert_all_close(theirs, plain_loss(p), to=1e-6)


def test_the_loss_over_cut_rows_is_that_of_the_whole(ranks, p):
    want = plain_loss(p)
    losses, hits = linear_cross_entropy_by_token(p["x"].flatten(0, 1), p["rows"], p["labels"].flatten())
    assert hits.sum() >= cases.SEQUENCE
    assert_all_close(whole(ranks, "loss64", {"rows": 0}), want | {"evaluated": losses, "hits": hits}, to=1e-14)
