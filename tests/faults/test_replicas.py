"""A flipped bit on one rank is found at the next comparison and named. Equal ranks raise no false alarm."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from headway.launcher.train.guard import NumericError
from headway.launcher.train.hooks import CompareReplicas
from headway.parallel import replicas
from headway.parallel.replicas import Mismatch, hashed

SCRIPT = Path(__file__).with_name("replica_cases.py")


@pytest.fixture(scope="module")
def cases(run_ranks):
    """Results of replica_cases.py, from one start of 4 ranks."""
    return [json.loads(line[5:]) for line in run_ranks(4, SCRIPT).splitlines() if line.startswith("CASE ")]


def test_no_layout_raises_a_false_alarm(cases):
    assert len(cases) == 12
    for case in cases:
        assert case["normal"] == ["None"] * 4, case["sizes"]
        assert all(found["after"] == "None" for found in case["found"]), case["sizes"]  # flipped back


def test_every_flipped_bit_is_found_and_named_equally_on_all_ranks(cases):
    # F19
    found = [(case["sizes"], one) for case in cases for one in case["found"]]
    assert len(found) == 20
    for sizes, one in found:
        rank = int(one["case"].split("@")[1])
        said = one["ranks"][rank]["said"]
        assert said is not None, (sizes, one["case"])
        assert all(report["said"] == said for report in one["ranks"])
        name, odd, replicas = said
        assert name == one["ranks"][rank]["name"] and rank in replicas
        assert odd == ([rank] if len(replicas) >= 3 else replicas), (sizes, one["case"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("begin", [0, 1])
def test_any_flipped_bit_changes_the_hash(dtype, begin):
    words = torch.int16 if dtype == torch.bfloat16 else torch.int32
    tensor = torch.randn(1003).to(dtype)[begin:]
    before, bits, width = int(hashed(tensor)), tensor.view(words), 8 * tensor.element_size()
    for place in range(0, len(tensor), 97):
        for bit in range(width):
            mask = 1 << bit if bit < width - 1 else -(1 << bit)
            bits[place] ^= mask
            assert int(hashed(tensor)) != before
            bits[place] ^= mask
    assert int(hashed(tensor)) == int(hashed(tensor.clone())) == before


def test_the_position_of_a_value_changes_the_hash_across_pieces_of_a_tensor():
    tensor = torch.zeros(3_000_001)
    tensor[5] = 1.0
    seen = {int(hashed(tensor))}
    for place in (7, 40_005, 1_100_005, 2_999_999, 3_000_000):
        other = torch.zeros_like(tensor)
        other[place] = 1.0
        seen.add(int(hashed(other)))
    assert len(seen) == 6


def test_a_run_ends_with_exit_70_and_says_which_checkpoint_is_good(monkeypatch):
    settled = []
    guard, saving = SimpleNamespace(replicas_every_steps=10), SimpleNamespace(saved_step=15, settle=settled.append)
    session = SimpleNamespace(
        spec=SimpleNamespace(guard=guard), saving=saving, step=15, engine=None, layout=None, tracker="tracker"
    )
    comparison = CompareReplicas()
    monkeypatch.setattr(replicas, "compare", lambda engine, layout: None)
    comparison.before_save(cast(Any, session))
    session.step = 20
    mismatch = Mismatch(name="blocks.0.attn.w_q", odd=[2], hosts=["c"], replicas=[0, 1, 2])
    monkeypatch.setattr(replicas, "compare", lambda engine, layout: mismatch)
    with pytest.raises(NumericError) as caught:
        comparison.before_save(cast(Any, session))
    text = str(caught.value)
    assert "blocks.0.attn.w_q of rank 2 on c differs from that of 2 ranks that agree" in text
    assert "after step 15" in text and "checkpoint of step 15" in text and caught.value.exit_code == 70
    assert settled == ["tracker"]
    guard.replicas_every_steps = 0
    comparison.before_save(cast(Any, session))  # off


def test_a_bit_that_flips_in_a_run_ends_it_at_the_next_comparison_with_the_rank_named(headway):
    # F19: comparisons after steps 5 and 10; on rank 2 a bit flips after step 10
    settings = ("launch.processes=4", "guard.replicas_every_steps=5", "checkpoint.every_tokens=null", "run_dir=run")
    fault = {"HEADWAY_FAULT": "step:weights@2#10:flip"}
    done = headway.train(*settings, "train.micro_batch=1", env={**headway.environment(), **fault})
    assert done.returncode == 70, done.stderr
    assert "step 10: " in done.stderr and "rank 2" in done.stderr and "after step 5" in done.stderr
    checkpoints = headway.folder / "run" / "checkpoints"
    assert not checkpoints.exists() or not list(checkpoints.iterdir())


def test_no_checkpoint_is_made_of_weights_that_differ(headway):
    # F19: no periodic comparison is due, but there is one before every save
    settings = ("launch.processes=4", "train.micro_batch=1", "guard.replicas_every_steps=1000", "run_dir=run")
    fault = {"HEADWAY_FAULT": "step:weights@1#10:flip"}
    done = headway.train(*settings, env={**headway.environment(), **fault})
    assert done.returncode == 70 and "step 10: " in done.stderr and "rank 1" in done.stderr, done.stderr
    assert [p.name for p in (headway.folder / "run" / "checkpoints").iterdir()] == ["step-0000000005"]
