"""Checks that replicated parameters are equal on all ranks, with 64-bit hashes and one small collective.

The check covers the weights of the forward pass (in bf16 with `precision: bf16`) and persistent buffers such as router
biases. It compares them over data- and context-parallel ranks, and replicated ones also over tensor-parallel ranks.
Under ZeRO-3, data-parallel ranks hold different parts of a parameter. Compared are then the small parameters that
ZeRO-3 keeps in full on every rank, the buffers, and, over tensor-parallel ranks, the parts of replicated parameters.

Two things are not covered. fp32 masters and moments exist once each, and an error in them reaches all ranks equally.
The tied embedding is not compared between the first and the last stage: its offset in the optimizer's flat buffers
differs, and AdamW on the CPU rounds the last few elements of a buffer differently.

The hash of 64-bit words w_i is the sum of k_i w_i modulo 2^64. Each k_i is odd and thus invertible, so every change of
a single word, for example a flipped bit, changes the sum. Integer sums do not depend on the order of summation.
"""

from __future__ import annotations

import hashlib
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.layout import Layout
from headway.parallel.logical import LogicalBuffer, LogicalParameter

_BLOCK = 1 << 14  # words per block; a block and its multipliers fit into a core's cache
_BLOCKS = 32  # blocks hashed at once, which limits the memory to 4 MiB (64 MiB on a GPU)


class Held(Protocol):
    """The part of the engine's interface that the check uses."""

    @property
    def logical(self) -> Sequence[LogicalParameter]: ...
    def buffers(self) -> Mapping[str, LogicalBuffer]: ...


class _Place(NamedTuple):
    """A rank in the grid; `data` counts data and context parallel ranks."""

    tensor: int
    data: int
    stage: int


# Scope -> key function. Ranks with the same key must have equal values.
_SCOPES: dict[str, Callable[[_Place], tuple[int, ...]]] = {
    "cut": lambda at: (at.tensor, at.stage),
    "whole": lambda at: (at.stage,),
    "part": lambda at: (at.data, at.stage),
}


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """A difference between ranks that should have equal values.

    name: The first parameter or buffer that differs.
    odd: Ranks that differ from the majority, or all ranks if there is no majority.
    hosts: Host of each rank in `odd`.
    replicas: All ranks that should be equal.
    """

    name: str
    odd: list[int]
    hosts: list[str]
    replicas: list[int]

    def __str__(self) -> str:
        ranks = ", ".join(f"rank {rank} on {host}" for rank, host in zip(self.odd, self.hosts, strict=True))
        if len(self.odd) < len(self.replicas):
            agreeing = len(self.replicas) - len(self.odd)
            return f"{self.name} of {ranks} differs from that of {agreeing} ranks that agree"
        return f"{self.name} differs between {ranks}, and no majority says which is right"


@torch.no_grad()
def hashed(tensor: Tensor) -> Tensor:
    """Hash of the bits of a tensor of any shape and dtype, computed on its device: int64 []."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    columns = _odd(0, _BLOCK, flat.device)
    blocks = _BLOCKS * (16 if flat.is_cuda else 1)
    step = 8 * _BLOCK * blocks
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step]
        short = -piece.numel() % 8
        if short:
            piece = torch.nn.functional.pad(piece, (0, short))
        elif piece.data_ptr() % 8 or piece.storage_offset() % 8:
            piece = piece.clone()  # a view into a flat buffer may be unaligned
        words, first = piece.view(torch.int64), start // (8 * _BLOCK)
        whole = words.numel() // _BLOCK
        if whole:
            sums = (words[: whole * _BLOCK].view(whole, _BLOCK) * columns).sum(1)
            total += (sums * _mixed(first, whole, flat.device)).sum()
        rest = words[whole * _BLOCK :]
        if rest.numel():
            total += (rest * columns[: rest.numel()]).sum() * _mixed(first + whole, 1, flat.device)[0]
    return total


@cache
def _odd(first: int, count: int, device: torch.device) -> Tensor:
    return _mixed(first, count, device)


def _mixed(first: int, count: int, device: torch.device) -> Tensor:
    """Pseudo-random odd numbers for the indices first, first + 1, ...: int64 [count].

    The steps are those of SplitMix64 (Steele, Lea and Flood, 2014), with arithmetic instead of logical shifts.
    """
    z = torch.arange(first + 1, first + count + 1, device=device) * -0x61C8864680B583EB
    z = (z ^ (z >> 30)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27)) * -0x6B2FB644ECCEEE15
    return (z ^ (z >> 31)) | 1


def compare(engine: Held, layout: Layout) -> Mismatch | None:
    """The first mismatch, or None if all replicas are equal. Collective; every rank returns the same result."""
    if layout.world_size == 1:
        return None
    held: dict[str, dict[str, Tensor]] = {scope: {} for scope in _SCOPES}
    for scope, name, tensor in _replicated(engine):
        held[scope][name] = hashed(tensor)
    mine = torch.stack([_total(found, layout.device) for found in held.values()])
    table = _gathered(mine, layout)
    for index, (scope, key) in enumerate(_SCOPES.items()):
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for rank in range(layout.world_size):
            if table[rank][index][1]:
                groups[key(_place(rank, layout))].append(rank)
        for ranks in groups.values():
            if len({tuple(table[rank][index]) for rank in ranks}) > 1:
                return _detailed(held[scope], ranks, layout)
    return None


def _replicated(engine: Held) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (scope, name, tensor) of every tensor that other ranks should have as well."""
    for p in engine.logical:
        parameter: Any = p.parameter
        scope = "whole" if p.dim is None else "cut"
        shape = getattr(parameter, "ds_shape", None)
        if shape is None or parameter.shape == shape:
            yield scope, p.name, parameter.data
        elif p.dim is None:  # this rank's ZeRO-3 part
            yield "part", p.name, parameter.ds_tensor.data
    for name, buffer in engine.buffers().items():
        yield "whole" if buffer.dim is None else "cut", name, buffer.tensor


def _total(found: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """Combined hash of all hashes, and their number: int64 [2]."""
    if not found:
        return torch.zeros(2, dtype=torch.int64, device=device)
    factors = torch.tensor([_of_name(name) for name in found], dtype=torch.int64, device=device)
    total = (torch.stack([h.to(device) for h in found.values()]) * factors).sum()
    return torch.stack([total, torch.full_like(total, len(found))])


def _of_name(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True) | 1


def _gathered(mine: Tensor, layout: Layout) -> list[list[list[int]]]:
    """`mine` of every rank, by rank."""
    parts = [torch.zeros_like(mine) for _ in range(layout.world_size)]
    dist.all_gather(parts, mine)
    return torch.stack(parts).tolist()


def _place(rank: int, layout: Layout) -> _Place:
    t, d = layout.tp_size, layout.data_ranks
    return _Place(tensor=rank % t, data=rank // t % d, stage=rank // (t * d))


def _detailed(found: Mapping[str, Tensor], ranks: Sequence[int], layout: Layout) -> Mismatch:
    """Find the parameter and the ranks that differ. Collective over all ranks."""
    values = {name: int(h) for name, h in found.items()} if layout.rank in ranks else {}
    reports = layout.gather_json({"host": socket.gethostname(), "values": values})
    every = {rank: reports[rank]["values"] for rank in ranks}
    names = list(dict.fromkeys(name for values in every.values() for name in values))
    name = next(name for name in names if len({values.get(name) for values in every.values()}) > 1)
    counts = Counter(values.get(name) for values in every.values())
    value, count = counts.most_common(1)[0]
    majority = 2 * count > len(ranks)
    odd = [rank for rank in ranks if not majority or every[rank].get(name) != value]
    return Mismatch(name=name, odd=odd, hosts=[reports[rank]["host"] for rank in odd], replicas=list(ranks))
