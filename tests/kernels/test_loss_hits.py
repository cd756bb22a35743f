"""Loss and hits of the chunked evaluation equal those computed from all logits."""

import pytest
import torch

from headway.kernels.loss import linear_cross_entropy_by_token, linear_cross_entropy_sum


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(23, 5, dtype=dtype, generator=generator)
    weight = torch.randn(11, 5, dtype=dtype, generator=generator)
    labels = (hidden @ weight.T).argmax(-1)
    labels[::3] = (labels[::3] + 1) % 11  # wrong guesses
    labels[::4] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 22, 23, 100])
def test_loss_and_hits_do_not_depend_on_the_chunks(chunk_tokens):
    hidden, weight, labels = problem()
    losses, hits = linear_cross_entropy_by_token(hidden, weight, labels, chunk_tokens=chunk_tokens)
    one_by_one = [linear_cross_entropy_sum(hidden[i : i + 1], weight, labels[i : i + 1]) for i in range(23)]
    torch.testing.assert_close(losses, torch.stack(one_by_one), rtol=1e-13, atol=0)
    assert hits.tolist() == [i % 3 != 0 and i % 4 != 0 for i in range(23)]


def test_ignored_labels_are_neither_hits_nor_loss():
    hidden, weight, labels = problem()
    losses, hits = linear_cross_entropy_by_token(hidden, weight, torch.full_like(labels, -100), chunk_tokens=4)
    assert not losses.any() and not hits.any()


def test_of_equal_logits_the_first_is_the_guess():
    # A model that says the same of every token must not be right about all of them.
    hits = [
        linear_cross_entropy_by_token(torch.ones(1, 2), torch.ones(7, 2), torch.tensor([label]))[1].item()
        for label in range(7)
    ]
    assert hits == [1, 0, 0, 0, 0, 0, 0]


def test_bf16_sums_its_loss_in_fp32():
    hidden, weight, labels = problem(torch.bfloat16)
    losses, _ = linear_cross_entropy_by_token(hidden, weight, labels, chunk_tokens=4)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.sum(), linear_cross_entropy_sum(hidden, weight, labels), rtol=1e-6, atol=0)
