"""Masks of dropout: those of the published generator, equal in every part of a tensor, of the right rate and mean."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from headway.kernels.dropout import Rate, dropout, kept, mix, signed, stream
from headway.kernels.operations import make_operations

SEEDS = mix(torch.arange(1, 6))


def test_a_stream_is_that_of_the_published_generator():
    """The first numbers of SplitMix64 with the seed 1234567, as its other implementations print them."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    found = stream(torch.tensor(1234567), 0, 5)
    assert found.tolist() == [signed(number) for number in known]
    assert stream(torch.tensor(1234567), 2, 3).tolist() == found[2:].tolist()


def masks(p: float, shape: tuple[int, int, int]) -> Tensor:
    batch, count, channels = shape
    seeds = stream(torch.tensor(7), 0, batch)
    return kept(seeds, Rate.of(p).dropped, position=0, count=count, channel=0, channels=channels)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_elements_are_dropped_at_the_rate(p):
    """Over the whole tensor, and over every sequence, position and channel alone; 5 standard deviations."""
    found = (~masks(p, (8, 200, 300))).double()
    for dims in [(0, 1, 2), (1, 2), (0, 2), (0, 1)]:
        mean = found.mean(dims)
        trials = found.numel() / mean.numel()
        assert (mean - p).abs().max() <= 5 * math.sqrt(p * (1 - p) / trials)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("distance", [1, 2, 7])
def test_neighbours_are_dropped_independently(dim, distance):
    p = 0.3
    found = (~masks(p, (16, 100, 100))).double() - p
    count = found.shape[dim] - distance
    products = found.narrow(dim, 0, count) * found.narrow(dim, distance, count)
    assert abs(float(products.mean())) <= 5 * p * (1 - p) / math.sqrt(products.numel())


@pytest.mark.parametrize("p", [1e-12, 0.1, 1 / 3, 0.5, 1 - 1e-12])
def test_the_mean_is_preserved_exactly(p):
    rate = Rate.of(p)
    assert abs(rate.dropped / 2**32 - p) <= 2**-32
    assert (1 - rate.dropped / 2**32) * rate.scale == pytest.approx(1, rel=1e-15)


def test_a_part_of_a_tensor_has_its_part_of_the_mask():
    dropped = Rate.of(0.4).dropped
    whole = kept(SEEDS, dropped, position=0, count=13, channel=0, channels=21)
    for position, channel in [(0, 0), (5, 4), (3, 7), (12, 20), (1, 1)]:
        count, channels = 13 - position, 21 - channel
        part = kept(SEEDS[2:], dropped, position=position, count=count, channel=channel, channels=channels)
        assert torch.equal(part, whole[2:, position:, channel:])
    assert torch.equal(kept(SEEDS, dropped, position=4, count=2, channel=3, channels=2), whole[:, 4:6, 3:5])


def test_the_gradient_is_that_of_an_explicit_mask():
    x = torch.randn(5, 4, 6, dtype=torch.float64, requires_grad=True)
    rate = Rate.of(0.25)
    mask = kept(SEEDS, rate.dropped, position=2, count=4, channel=1, channels=6)
    assert 0 < mask.sum() < mask.numel()
    got = dropout(x, SEEDS, *rate, 2, 1)
    expected = x * mask * (4 / 3)
    assert torch.allclose(got, expected, rtol=1e-9, atol=0)  # the scale is of p in steps of 2^-32
    weight = torch.randn_like(x)
    mine, theirs = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, expected))
    assert torch.allclose(mine, theirs, rtol=1e-9, atol=0)
    assert torch.autograd.gradcheck(lambda t: dropout(t, SEEDS, *rate, 2, 1), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dtype_is_kept_and_so_are_infinities(dtype):
    x = torch.full((5, 3, 8), math.inf, dtype=dtype)
    got = dropout(x, SEEDS, *Rate.of(0.5))
    assert got.dtype == dtype
    assert set(got.float().unique().tolist()) == {0.0, math.inf}  # not NaN: a dropped element is 0, whatever it was


def test_one_byte_for_each_element_is_kept():
    x = torch.randn(5, 32, 64, requires_grad=True)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        dropout(x, SEEDS, *Rate.of(0.5))
    assert sum(saved) == x.numel()


def test_masks_are_the_same_by_unsigned_arithmetic():
    """The whole tree of indices in numpy, whose unsigned products wrap around by definition."""
    gamma, factors = np.uint64(0x9E3779B97F4A7C15), (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)

    def number(seed: np.ndarray, index: np.ndarray) -> np.ndarray:
        z = seed + (index.astype(np.uint64) + np.uint64(1)) * gamma
        z = (z ^ (z >> np.uint64(30))) * np.uint64(factors[0])
        z = (z ^ (z >> np.uint64(27))) * np.uint64(factors[1])
        return z ^ (z >> np.uint64(31))

    rate = Rate.of(0.3)
    rows = number(SEEDS.numpy().view(np.uint64)[:, None], np.arange(9))
    numbers = number(rows[..., None], np.arange(11) // 2)
    halves = np.where(np.arange(11) % 2, numbers >> np.uint64(32), numbers & np.uint64(2**32 - 1)).astype(np.int64)
    signed_halves = np.where(halves >= 2**31, halves - 2**32, halves)
    expected = signed_halves >= rate.dropped - 2**31
    found = kept(SEEDS, rate.dropped, position=0, count=9, channel=0, channels=11)
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", ["none", "elementwise"])
def test_masks_on_a_gpu_are_those_of_the_cpu(compile):
    device = torch.device("cuda")
    operations = make_operations(compile=compile, device=device, dtype=torch.float32)
    x = torch.randn(5, 33, 70)
    found = operations.dropout(x.to(device), SEEDS.to(device), *Rate.of(0.1), 3, 5)
    assert torch.equal(found.cpu(), dropout(x, SEEDS, *Rate.of(0.1), 3, 5))
