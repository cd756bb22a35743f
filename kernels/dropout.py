"""Dropout (Srivastava et al., 2014) in the inverted form, with masks that are a function of indices.

    y = x m / (1 - p),    m = 1 with probability 1 - p, else 0

Numbers come from SplitMix64 (Steele, Lea and Flood, 2014, doi 10.1145/2660193.2660195): the i-th one of a stream with
seed s is mix(s + i c) with a constant c, so that each can be computed alone. A number of one stream is the seed of
another one, which makes a tree of indices: sequence, then position, then channel. Only integers are used, so a mask
depends neither on the device nor on the parallel layout, and there is no state to save.

Legend: B batch, S sequence, C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORDS = 1 << 32
"""A mask has 32 bits for each element."""


def signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return (word & (2**64 - 1)) - ((word & 2**63) << 1)


def mix(z: Tensor) -> Tensor:
    """The output function of SplitMix64; int64, of which the bits are taken as unsigned. Products wrap around."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        z = (z ^ _right(z, shift)) * signed(factor)
    return z ^ _right(z, 31)


def stream(seeds: Tensor, first: int, count: int) -> Tensor:
    """Numbers first .. first + count - 1 (from 0) of the streams with these seeds, int64 [...]: int64 [..., count]."""
    index = torch.arange(first + 1, first + count + 1, device=seeds.device)
    return mix(seeds.unsqueeze(-1) + index * signed(GAMMA))


class Rate(NamedTuple):
    """A probability in steps of 2^-32, and the factor on what is kept, which preserves the mean exactly."""

    dropped: int  # of 2^32 numbers
    scale: float

    @classmethod
    def of(cls, p: float) -> Rate:
        """0 < p < 1."""
        dropped = min(max(1, round(p * _WORDS)), _WORDS - 1)
        return cls(dropped, _WORDS / (_WORDS - dropped))


def kept(seeds: Tensor, dropped: int, *, position: int, count: int, channel: int, channels: int) -> Tensor:
    """The mask: bool [B, count, channels], for the positions and channels from these on.

    seeds: int64 [B], one for each sequence. dropped: see `Rate`. Each number of a position's stream has the bits of two
    channels, the lower half those of the even one.
    """
    first, last = channel // 2, (channel + channels + 1) // 2
    numbers = stream(stream(seeds, position, count), first, last - first)
    least = signed((dropped - _WORDS // 2) << 32)  # of the upper half, as a signed number
    pairs = torch.stack([numbers << 32 >= least, numbers >= least], -1)
    return pairs.flatten(-2)[..., channel % 2 :][..., :channels]


def dropout(x: Tensor, seeds: Tensor, dropped: int, scale: float, position: int = 0, channel: int = 0) -> Tensor:
    """x [B, S, C] with elements set to 0 and the others multiplied by `scale`.

    seeds [B] int64. position, channel: of x[:, 0, 0], where x is a part of a larger tensor. The mask (one byte for each
    element) is kept for the backward pass.
    """
    mask = kept(seeds, dropped, position=position, count=x.shape[1], channel=channel, channels=x.shape[2])
    return torch.where(mask, x * scale, 0.0)


def _right(z: Tensor, shift: int) -> Tensor:
    """Logical shift: torch's shift of an int64 copies the sign."""
    return (z >> shift) & ((1 << (64 - shift)) - 1)
