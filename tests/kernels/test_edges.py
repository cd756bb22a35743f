"""Every kernel equals its twin on NaN, infinities, ties, no tokens and one token; so do the forms of the loss."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from headway.kernels.checks.edges import CHECKS, INF, NAN, ODD, distance
from headway.kernels.loss import (
    IGNORED,
    VocabularyPart,
    linear_cross_entropy_by_token,
    linear_cross_entropy_sum,
)

SCRIPT = Path(__file__).with_name("interpreted.py")
SLOTS, GATHER = "headway.kernels.triton.slots", "headway.kernels.triton.gather"


def interpreted(*arguments):
    """Errors of the checks by name and by the launch function that was broken, in a process of their own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::RuntimeWarning"}
    command = [sys.executable, "-P", str(SCRIPT), "headway.kernels.checks.edges", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {(r["check"], r["broken"]): r["errors"] for r in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def kernels():
    return interpreted()


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_equal_their_twins(kernels, name):
    assert len(kernels[name, ""]) >= 7
    wrong = {what: error for what, (error, tolerance) in kernels[name, ""].items() if not error <= tolerance}
    assert not wrong


@pytest.mark.slow
def test_one_wrong_element_is_detected_at_every_edge():
    """Except without tokens, where there is no element."""
    broken = [f"edges: expand={SLOTS}.launch_expand", f"edges: products={GATHER}.gather_project"]
    for errors in interpreted(*broken).values():
        edges = {what: pair for what, pair in errors.items() if "no token" not in what}
        wrong = [what for what, (error, tolerance) in edges.items() if not error <= tolerance]
        assert len(wrong) >= len(edges) // 6  # one result of five or six, in every case


def test_odd_numbers_at_different_places_are_infinitely_far():
    for value in (NAN, INF, -INF):
        assert distance(torch.tensor([value, 1.0]), torch.tensor([value, 1.0])) == 0
        assert distance(torch.tensor([1.0, value]), torch.tensor([value, 1.0])) == INF
    assert distance(torch.tensor([INF]), torch.tensor([-INF])) == INF
    assert distance(torch.tensor([NAN]), torch.tensor([INF])) == INF


# ---------------------------------------------------------------- the loss

TOKENS, WIDTH, VOCAB = 9, 6, 7
ALONE = VocabularyPart(start=0, sum=torch.clone, largest=torch.clone)  # the form of several ranks, on one
FORMS = {"plain": {}, "chunked": {"chunk_tokens": 4}, "of a part": {"chunk_tokens": 4, "part": ALONE}}


def loss_cases():
    """(name, hidden, weight, labels); row 0 of hidden is ignored, row 3 counts."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, WIDTH), torch.randn(VOCAB, WIDTH)
    labels = torch.randint(VOCAB, (TOKENS,))
    labels[0] = IGNORED
    yield "no token", hidden[:0], weight, labels[:0]
    yield "one token", hidden[3:4], weight, labels[3:4]
    yield "one ignored token", hidden[:1], weight, labels[:1]
    yield "all ignored", hidden, weight, torch.full_like(labels, IGNORED)
    yield "equal logits", torch.zeros_like(hidden), weight, labels
    for odd, values in ODD.items():
        for where, row in (("an ignored token", 0), ("a token", 3)):
            spoiled = hidden.clone()
            spoiled[row, : len(values)] = torch.tensor(values)
            yield f"{odd} in {where}", spoiled, weight, labels
        spoiled = weight.clone()
        spoiled[2, : len(values)] = torch.tensor(values)
        yield f"{odd} in the weight", hidden, spoiled, labels


LOSSES = {name: given for name, *given in loss_cases()}


def reference(hidden, weight, labels):
    """Row by row, without ignored ones: loss, gradients and hits."""
    kept = [leaf.clone().requires_grad_() for leaf in (hidden, weight)]
    keep = labels != IGNORED
    logits = kept[0][keep] @ kept[1].T
    loss = torch.nn.functional.cross_entropy(logits, labels[keep], reduction="sum")
    predicted = logits.isfinite().any(-1) & ~logits.isnan().any(-1) & ~(logits == INF).any(-1)
    hits = ((logits.argmax(-1) == labels[keep]) & predicted).sum()
    return loss.detach(), torch.autograd.grad(loss, kept), hits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_form_of_the_loss_equals_the_reference(name, form):
    hidden, weight, labels = LOSSES[name]
    loss, gradients, hits = reference(hidden, weight, labels)
    leaves = [leaf.clone().requires_grad_() for leaf in (hidden, weight)]
    made = partial(linear_cross_entropy_sum, **FORMS[form])(*leaves, labels)
    assert distance(made.detach(), loss) <= 2e-6
    for found, wanted in zip(torch.autograd.grad(made, leaves), gradients, strict=True):
        assert distance(found, wanted) <= 2e-6
    found_loss, found_hits = linear_cross_entropy_by_token(hidden, weight, labels, **FORMS[form])
    assert distance(found_loss.sum(), loss) <= 2e-6
    assert found_hits.sum() == hits
