"""Loss and accuracy of an evaluation are exact means over the targets of all ranks, under every ZeRO stage."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from headway.parallel.engine import evaluation_of


def test_accuracy_and_loss_are_sums_over_ranks_with_different_numbers_of_targets(run_ranks):
    said = run_ranks(2, Path(__file__).with_name("evaluate_cases.py"))
    lines = [line.split(" ", 1) for line in said.splitlines()]
    cases = [json.loads(body) for kind, body in lines if kind == "CASE"]
    plain = next(json.loads(body) for kind, body in lines if kind == "PLAIN")
    assert [case["zero"] for case in cases] == [1, 3]
    for case in cases:
        expected = case["expected"]
        assert case["targets"] == expected["targets"] and case["mine"] != expected["targets"] / 2
        assert case["accuracy"] == expected["hits"] / expected["targets"]
        assert 0 < case["accuracy"] < 1
        assert case["loss"] == pytest.approx(plain["loss"], rel=1e-6)  # fp32 sums in another order
        # The micro-batches of both ranks count.
        _, error, count = of_groups(plain["each"])
        assert case["groups"] == count == 4
        assert case["standard_error"] == pytest.approx(error, rel=1e-4)
        # Groups may be cut in any way, here by rows. One row has no target and does not count.
        for found, rows in zip(case["of_rows"], (plain["rows"], plain["rows"][-3:]), strict=True):
            assert found == pytest.approx(of_groups(rows), rel=1e-4)
        assert [count for *_, count in case["of_rows"]] == [7, 2]


def of_groups(sums):
    """(loss, standard error, groups) of sums of loss and targets."""
    losses, targets = np.array([one for one in sums if one[1]]).T
    loss, count = losses.sum() / targets.sum(), len(targets)
    error = math.sqrt(count / (count - 1) * ((losses - loss * targets) ** 2).sum()) / targets.sum()
    return [loss, error, count]


def test_the_standard_error_is_the_spread_of_repeated_evaluations():
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(400):
        targets = torch.randint(20, 60, (12,), generator=generator).double()
        losses = targets * (3 + 0.2 * torch.randn(12, generator=generator).double())
        found.append(evaluation_of(torch.stack([losses, torch.zeros(12).double(), targets], 1)))
    spread = np.std([e.loss for e in found])
    assert np.mean([e.standard_error for e in found if e.standard_error is not None]) == pytest.approx(spread, rel=0.1)
    assert evaluation_of(torch.tensor([[6.0, 1.0, 2.0]]).double()).standard_error is None
