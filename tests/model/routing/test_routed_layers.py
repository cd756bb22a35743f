"""Layers with routed projections, in Triton's interpreter: equal to dense references, one graph, reproducible."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headway.kernels.rope import rope_tables
from headway.model.attention.gqa import GqaConfig
from headway.model.attention.gqe import GqeConfig
from headway.model.attention.hybrid import HybridConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.balance import BalanceConfig
from headway.model.base import Context
from headway.model.init import initialise
from headway.model.recompute import recomputed

SCRIPT = Path(__file__).with_name("interpreted_layers.py")
FP32 = 2e-6
RUNS = 20
PER_HEAD = {"lists": 1, "project": 1, "slot_grad": 1, "weight_grad": 2}  # queries and W_O: one choice, one list
PER_SLOT = {"lists": 1, "project": 1, "weight_grad": 1}  # W_O belongs to slots: a dense product
LAUNCHES = {
    "rgqa": PER_HEAD,
    "rgqa, half rotated, odd heads": PER_HEAD,
    "rgqa, normed, one always on": PER_HEAD,
    "rgqa, output slices of slots": PER_SLOT,
    "gqe": PER_SLOT,
    "moa": PER_HEAD,
    "switchhead": PER_HEAD | {"lists": 2},  # values and outputs are chosen apart
    "switchhead, one router": PER_HEAD,
    "hybrid": {"lists": 2, "project": 2, "slot_grad": 1, "weight_grad": 3},  # queries and W_O, and values
}
POOL = {"heads": 8, "kv_heads": 2, "head_dim": 6}
MECHANISMS = {
    "rgqa": RgqaConfig.model_validate({**POOL, "top_k": 2, "projections": "routed"}),
    "gqe": GqeConfig.model_validate({**POOL, "top_k": 2, "projections": "routed"}),
    "switchhead": SwitchHeadConfig(kv_heads=3, head_dim=6, experts=4, top_k=2, projections="routed"),
    "hybrid": HybridConfig.model_validate(
        {**POOL, "top_k": 1, "value_experts": 3, "value_top_k": 2, "projections": "routed"}
    ),
}


def interpreted(*arguments):
    command = [sys.executable, "-P", str(SCRIPT), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {(line["name"], line["form"]): line for line in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def found():
    return interpreted()


@pytest.mark.parametrize("form", ["kernels", "twins"])
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_layer_equals_its_dense_reference_and_launches_what_it_needs_once(found, name, form):
    layer = found[name, form]
    assert {"y", "d x", "d w_o"} < set(layer["errors"])
    for what, error in layer["errors"].items():
        assert error <= FP32, (what, error)  # false for NaN too
    assert layer["launches"] == (LAUNCHES[name] if form == "kernels" else {})


@pytest.mark.parametrize("name", LAUNCHES)
def test_later_tokens_change_nothing_before_them_though_they_change_lists_and_tiles(found, name):
    layer = found[name, "kernels"]
    assert layer["earlier"] == 0 and layer["later"] > 0


def test_one_wrong_element_of_a_kernel_changes_the_layer():
    gather, weights = "headway.kernels.triton.gather", "headway.kernels.triton.weight_grad"
    launches = (f"{gather}.gather_project", f"{gather}.gather_slot_grad", f"{weights}.weight_grad")
    found = interpreted(*(f"rgqa={launch}" for launch in launches))
    assert len(found) == len(launches)
    for layer in found.values():
        assert any(not error <= FP32 for error in layer["errors"].values())


# ---------------------------------------------------------------- without kernels


def single(config):
    """One layer in fp32, its input and context."""
    module = config.build(width=20, layers=1, init_std=0.4, norm_eps=1e-5)
    initialise(module, seed=1)
    rope = rope_tables(11, config.rotated, config.rope_base, torch.device("cpu"))
    return module, torch.randn(3, 11, 20, requires_grad=True), Context(rope=rope, documents=None)


def trained(run, module, x):
    y = run(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("form", ["auto", "routed"])
@pytest.mark.parametrize("name", ["rgqa", "gqe", "switchhead"])
def test_a_layer_compiles_into_one_graph_that_is_the_layer(name, form):
    """In fp32, the precision in which kernels and twins are told apart."""
    module, x, context = single(MECHANISMS[name].model_copy(update={"projections": form}))
    module.eval()  # statistics are counted in training alone, in Python
    compiled = torch.compile(lambda x: module(x, context).y, fullgraph=True, backend="aot_eager")
    eager = trained(lambda x: module(x, context).y, module, x)
    for a, b in zip(trained(compiled, module, x), eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", MECHANISMS)
def test_equal_runs_and_recomputed_ones_are_equal_bit_for_bit(name):
    module, x, context = single(MECHANISMS[name])
    first = trained(lambda x: module(x, context).y, module, x)
    for run in range(RUNS):
        again = recomputed if run % 2 else torch.nn.Module.__call__
        for a, b in zip(trained(lambda x, go=again: go(module, x, context)[0], module, x), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_all_heads_with_hard_gates_are_gqa(decoder, tokens, qk_norm):
    shape = {**POOL, "qk_norm": qk_norm}
    routed = RgqaConfig.model_validate(
        {**shape, "top_k": 4, "gate": "hard", "balance": BalanceConfig(), "projections": "routed"}
    )
    gqa = decoder(GqaConfig.model_validate(shape)).logits(tokens)
    torch.testing.assert_close(decoder(routed).logits(tokens), gqa, rtol=0, atol=1e-12)
    assert (decoder(routed.model_copy(update={"top_k": 3})).logits(tokens) - gqa).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["auto", "routed"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_stated_costs_are_those_of_dense_products(name, form):
    costs = (
        MECHANISMS[name].model_copy(update={"projections": projections}).flops_per_token(width=20, seq_len=16)
        for projections in (form, "dense")
    )
    stated, dense = costs
    assert stated == dense and stated.useful < stated.executed
