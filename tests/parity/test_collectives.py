"""Number of collectives per micro-batch: those of dense attention, and the additional ones of each mechanism.

Counted in a decoder of 4 layers, forward and backward, gradients of whole parameters included.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LAYERS = 4
SUM, GATHER, SCATTER, EXCHANGE = "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single"

CUT_AS_DENSE = ["rgqa", "rgqa-no-loss", "switchhead", "wgqa", "hybrid", "hash", "cv2", "windows", "blocks", "mixed"]

SUMS_OF_GQE = {
    # in a layer's forward pass: sums of chosen p; K and V of the shared head. Backward: theirs; W_O of the mix; W_Q of
    # the shared head.
    "gqe-alone": (1, 1 + 1),
    "gqe": (1 + 2, 3 + 1 + 1),
}

WHOLE_GRADIENTS = {
    "gqa-qk-norm": 2,  # the gains of queries and keys
    "namoh": 3,  # the router's rows, and the gains of queries and keys
    "gated": 1,  # the gain of the norm of outputs
    "moh": 3,  # the router's rows, those of the shared heads and of the two stages: every rank chooses among all heads
    "mla": 5,  # W_DQ, W_DKV, W_KR, and the gains of both latents
    "gla": 2,  # W_KR and the gain of the latents, which belong to ranks
    "gated-mixed": 3 / 4,  # as `gated`, in three of four layers
}


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, tuple[Counter[str], Counter[str]]]]:
    """Layout -> mechanism -> forward, backward."""
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore"}
    script = str(HERE / "collective_counts.py")
    done = subprocess.run([*torchrun, script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("COUNTS "))
    return {
        layout: {name: (Counter(forward), Counter(backward)) for name, (forward, backward) in mechanisms.items()}
        for layout, mechanisms in json.loads(line.removeprefix("COUNTS ")).items()
    }


def test_tensor_parallel_dense_attention_sums_once_after_each_attention_mlp_and_embedding(counts):
    forward, backward = counts["tp2"]["gqa"]
    # and twice for the loss: the largest logit; the sums of exponentials with the labels' logits
    assert forward == {SUM: 2 * LAYERS + 1 + 2}
    # before each attention, each MLP and the head
    assert backward == {SUM: 2 * LAYERS + 1}


@pytest.mark.parametrize("layout", ["tp2", "sp2"])
@pytest.mark.parametrize("mechanism", CUT_AS_DENSE)
def test_routing_is_local_to_a_rank(counts, layout, mechanism):
    assert counts[layout][mechanism] == counts[layout]["gqa"]


@pytest.mark.parametrize("layout", ["tp2", "sp2"])
@pytest.mark.parametrize(("mechanism", "extra"), SUMS_OF_GQE.items())
def test_gqe_adds_the_sums_that_mix_groups_and_no_more(counts, layout, mechanism, extra):
    for mine, dense, per_layer in zip(counts[layout][mechanism], counts[layout]["gqa"], extra, strict=True):
        assert mine == dense + Counter({SUM: per_layer * LAYERS})


@pytest.mark.parametrize("layout", ["tp2", "sp2"])
@pytest.mark.parametrize(("mechanism", "whole"), WHOLE_GRADIENTS.items())
def test_replicated_parameters_cost_one_all_reduce_of_their_gradient(counts, layout, mechanism, whole):
    forward, backward = counts[layout]["gqa"]
    assert counts[layout][mechanism] == (forward, backward + Counter({SUM: int(whole * LAYERS)}))


def test_sequence_parallel_gathers_and_scatters_where_tensor_parallel_sums(counts):
    forward, backward = counts["sp2"]["gqa"]
    borders = 2 * LAYERS + 1
    assert forward == {GATHER: borders, SCATTER: borders, SUM: 2}  # the loss is as it was
    # Norms see a part of the tokens: the gains of two in each block and of the last one are added up.
    assert backward == {GATHER: borders, SCATTER: borders, SUM: 2 * LAYERS + 1}


@pytest.mark.parametrize(
    "mechanism",
    ["gqa", "gqa-qk-norm", "wgqa", "rgqa-no-loss", "gqe-alone", "value-residual", "shared-kv", "mla", "gla"],
)
def test_context_parallel_exchanges_queries_keys_values_and_outputs_once_per_layer(counts, mechanism):
    assert counts["cp2"][mechanism] == ({EXCHANGE: 4 * LAYERS}, {EXCHANGE: 4 * LAYERS})


def test_context_parallel_exchanges_as_often_as_the_core_is_called(counts):
    # full heads and windows
    assert counts["cp2"]["windows"] == ({EXCHANGE: 8 * LAYERS}, {EXCHANGE: 8 * LAYERS})


def test_under_context_parallel_a_single_shared_head_is_gathered(counts):
    forward, backward = counts["cp2"]["gqe"]
    assert forward == {EXCHANGE: 4 * LAYERS, GATHER: 2 * LAYERS}
    assert backward == {EXCHANGE: 4 * LAYERS, SCATTER: 2 * LAYERS}


@pytest.mark.parametrize(
    ("mechanism", "routers"),
    [("rgqa", 1), ("cv2", 1), ("moh", 1), ("switchhead", 2), ("hybrid", 2), ("mixed", 2 / 4)],  # in two of four layers
)
def test_under_context_parallel_a_balancing_loss_takes_one_mean_per_router(counts, mechanism, routers):
    forward, backward = counts["cp2"][mechanism]
    assert forward == backward == {EXCHANGE: 4 * LAYERS, SUM: int(routers * LAYERS)}
