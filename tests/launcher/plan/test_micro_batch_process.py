"""The process that measures passes for `train.micro_batch: auto`, and the launcher's reaction to its failures."""

import os
import signal
import sys

import pytest
import torch

from headway.launcher.base.errors import HeadwayError
from headway.launcher.hosts.commands import full_environment
from headway.launcher.plan.micro_batch import child as micro_batch_child
from headway.launcher.plan.micro_batch.plan import memory_of
from headway.launcher.plan.micro_batch.rank import Rank
from headway.launcher.plan.micro_batch.search import search
from headway.launcher.spec.load import load_spec
from headway.model.attention.rgqa import RoutedGroupedQueryAttention
from headway.model.decoder import Block
from headway.model.mixed import MixedConfig


def spec_of(path, *overrides):
    return load_spec(path, overrides, no_auto=None).spec


DEAD_AT_FOUR = """
import json, os, signal, sys
sys.stdin.readline()
print(json.dumps({"device": "cpu", "free_bytes": None, "total_bytes": None}), flush=True)
for line in sys.stdin:
    size = json.loads(line)["micro_batch"]
    if size == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    print(json.dumps({"seconds": [0.1] * 5, "passes_bytes": None}), flush=True)
"""


def test_a_size_whose_process_is_killed_does_not_fit(auto_spec):
    with Rank(spec_of(auto_spec), os.environ, command=[sys.executable, "-S", "-c", DEAD_AT_FOUR]) as rank:
        found = search(
            [1, 2, 4, 8],
            rank,
            tokens_per_sequence=32,
            limit_bytes=rank.limit_bytes,
            seconds_left=lambda: 60.0,
            say=lambda trial: None,
        )
    assert found.micro_batch == 2 and [t.micro_batch for t in found.trials] == [1, 2, 4]
    assert "SIGKILL" in str(found.trials[-1].why_not)


@pytest.mark.parametrize("program", ["raise SystemExit('no such model')", "import sys; sys.exit('no such model')"])
def test_another_failure_of_the_process_is_an_error_with_its_output(auto_spec, program):
    with pytest.raises(HeadwayError, match=r"(?s)status 1.*write a number.*no such model"):
        Rank(spec_of(auto_spec), os.environ, command=[sys.executable, "-S", "-c", program])


GPU = """
import json, sys
sys.stdin.readline()
print(json.dumps({"device": "a GPU", "free_bytes": 30 * 2**30, "total_bytes": 80 * 2**30}), flush=True)
for line in sys.stdin:
    fits = json.loads(line)["micro_batch"] <= 8
    done = {"seconds": [0.1] * 5, "passes_bytes": 2**30}
    print(json.dumps(done if fits else {"out_of_memory": "CUDA out of memory"}), flush=True)
"""


def test_on_a_gpu_memory_of_passes_is_measured_and_the_rest_planned(auto_spec):
    with Rank(spec_of(auto_spec), os.environ, command=[sys.executable, "-S", "-c", GPU]) as rank:
        assert rank.planned_bytes(8) is None  # the plan does not decide whether it is tried
        timed = rank.run(8)
        assert rank.run(16) == "CUDA out of memory"
        assert 0.9 * 30 * 2**30 < rank.limit_bytes < 30 * 2**30  # without memory in use by other processes
        memory = memory_of(rank.spec, 8)
    assert not isinstance(timed, str)
    states = memory.parameters + memory.master + memory.moments + memory.gradients - memory.late_gradients
    assert timed.memory_bytes == states + 2**30 != memory.peak


def test_the_real_process_measures_passes_of_every_size(auto_spec):
    spec = spec_of(auto_spec, "parallel.recompute=block", "data.document_mask=true")
    with Rank(spec, full_environment(spec, {})) as rank:
        assert rank.on_cpu and rank.device == "cpu" and rank.spec.launch.device == "cpu"
        for size in (1, 2):
            timed = rank.run(size)
            assert not isinstance(timed, str)
            assert len(timed.seconds) >= 3 and min(timed.seconds) > 0
            assert timed.memory_bytes == rank.planned_bytes(size) == memory_of(rank.spec, size).peak
        process = rank._process
    assert process.poll() == -signal.SIGKILL  # it does not outlive the search


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_measured_model_follows_the_spec(auto_spec, recompute, precision, dtype):
    spec = spec_of(auto_spec, f"parallel.recompute={recompute}", f"parallel.precision={precision}")
    model = micro_batch_child.model_of(spec, torch.device("cpu"))
    blocks = [block for block in model.modules() if isinstance(block, Block)]
    assert {block.placement.recompute for block in blocks} == {recompute} and len(blocks) == 2
    assert all(p.dtype == dtype and p.grad is not None for p in model.parameters())


def test_each_layer_is_measured_in_its_most_expensive_stage(auto_spec):
    """Schedules of layers that differ: k falls in one kind and has no stages in the other."""
    routed = {"type": "rgqa", "heads": 8, "kv_heads": 2, "head_dim": 8, "top_k": 1}
    stages = {"k_schedule": [{"until_tokens": 64, "top_k": 2}, {"until_tokens": 128, "top_k": 4}]}
    spec = spec_of(auto_spec)
    kinds = {"plain": routed, "falls": routed | stages}
    mixed = MixedConfig.model_validate({"kinds": kinds, "pattern": ["plain", "falls"]})
    model = micro_batch_child.model_of(spec.model_copy(update={"attention": mixed}), torch.device("cpu"))
    layers = model.attention_layers()
    assert all(isinstance(layer, RoutedGroupedQueryAttention) for layer in layers)
    assert [getattr(layer, "top_k", None) for layer in layers] == [1, 4]


def test_out_of_memory_is_distinguished_from_other_errors():
    with pytest.raises(RuntimeError) as short:
        torch.empty(1 << 56, dtype=torch.uint8)
    assert micro_batch_child.is_out_of_memory(short.value)
    with pytest.raises(RuntimeError) as other:
        torch.zeros(2).add_(torch.zeros(3))
    assert not micro_batch_child.is_out_of_memory(other.value)


@pytest.mark.parametrize(("pass_s", "warm_up", "timed"), [(0.001, 2, 25), (0.3, 2, 5), (6.0, 2, 2), (30.0, 1, 2)])
def test_long_passes_are_repeated_less_often(pass_s, warm_up, timed):
    calls = []

    def run():
        calls.append(pass_s)
        return pass_s

    micro_batch_child.warm_up(run)
    assert len(calls) == warm_up
    assert micro_batch_child.times(run) == [pass_s] * timed
