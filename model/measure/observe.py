"""Observe the heads and routers of a model during a pass, and switch one of them off.

Nothing here is used in training. The mechanisms are not changed: the context that a layer gets reports its calls of the
attention core, and hooks of its routers report and edit what they choose.

Legend: B batch, S sequence, K keys (S, but in cross attention the source), H query heads in a call of the core (or
slots, which hold another head at each token), G groups, k choices per group and token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway.model.attention.gqa import DenseAttention
from headway.model.attention.gqe import GroupedQueryExperts
from headway.model.attention.rgqa import RoutedGroupedQueryAttention
from headway.model.base import Attention, Context
from headway.model.blocks import Blocks
from headway.model.decoder import Decoder
from headway.model.router import RoutedAttention, Router, Routing
from headway.model.segments import Past, Segments
from headway.model.seq2seq.model import EncoderDecoder


class Off(NamedTuple):
    """What is switched off in `layer`: a query head (`router` empty), or an expert of a group of a router.

    `layer` counts the modules of `attention_layers()`, of which a block of an encoder-decoder may have two. The output
    of a head is 0 before gates and W_O. The gate of an expert is 0 where the router chose it: its tokens lose it and
    get no other one.
    """

    layer: int
    member: int
    router: str = ""
    group: int = 0


@dataclass
class Layer:
    """What one layer did in a pass.

    heads: Number of query heads, which are numbered group by group, as in W_Q and W_O; a shared head that is computed
        apart is the last one.
    maps: For each call of the core its attention [B, H, S, K], rows of queries; empty if not asked for, if positions
        are relative, or if heads keep a state.
    rows: For each call, the query head of each row [B, S, H].
    routings: Router -> its choice; indices [B, S, G, k] are within the group. experts: Router -> experts of a group.
    """

    heads: int = 0
    maps: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    routings: dict[str, Routing] = field(default_factory=dict)
    experts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Observed(Context):
    """A context whose calls of the core are reported."""

    report: _Report

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None) -> Tensor:
        return self.report.core(self, q, k, super().attend(q, k, v, window=window), window)

    def attend_segments(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, past: Past | None) -> Tensor:
        return self.report.packed(q, k, super().attend_segments(q, k, v, segments, past), segments)

    def attend_blocks(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, blocks: Blocks) -> Tensor:
        seen = blocks.seen(chosen) if self.report.maps else None
        return self.report.core(self, q, k, super().attend_blocks(q, k, v, chosen, blocks), None, seen)

    def head_outputs(self, o: Tensor) -> Tensor:
        return self.report.without_map(o)


class _Report:
    """Collects what a layer does. `off`: a query head whose output is 0."""

    def __init__(self, module: Attention, segments: Tensor | None, *, maps: bool, off: int | None) -> None:
        self.layer, self._module = Layer(), module
        self._segments, self.maps, self._off = segments, maps, off

    def core(
        self, context: Context, q: Tensor, k: Tensor, o: Tensor, window: int | None, seen: Tensor | None = None
    ) -> Tensor:
        rows = self._rows(q)
        self.layer.rows.append(rows)
        if self.maps and context.relative is None:
            known = context.core is None
            found = attention_map(q, k, self._segments, window, seen) if known else core_map(context, q, k)
            self.layer.maps.append(found)
        if self._off is not None:
            o = o.masked_fill((rows == self._off).unsqueeze(-1), 0)
        return o

    def packed(self, q: Tensor, k: Tensor, o: Tensor, segments: Segments) -> Tensor:
        """Heads that see their own tokens alone: packed q, k, o [P, D]. Each slot of a token holds another head."""
        rows = self.layer.routings["router"].idx.squeeze(2)  # [B, S, k]
        self.layer.heads = segments.heads
        self.layer.rows.append(rows)
        if self.maps:
            self.layer.maps.append(segment_map(q, k, segments, rows, self._segments))
        if self._off is not None:
            o = o.masked_fill((segments.head == self._off).unsqueeze(1), 0)
        return o

    def without_map(self, o: Tensor) -> Tensor:
        """Heads that keep a state and attend to no single token: outputs o [B, S, H, E]."""
        first, self.layer.heads = self.layer.heads, self.layer.heads + o.shape[2]
        if self._off is not None:
            of_head = torch.arange(first, self.layer.heads, device=o.device) == self._off
            o = o.masked_fill(of_head.unsqueeze(1), 0)
        return o

    def _rows(self, q: Tensor) -> Tensor:
        """The query head of each row of a call [B, S, H]; its first call of routed heads is that of the slots.

        A layer with several windows has a call for each of them, whose heads need not be consecutive.
        """
        batch, length, count = q.shape[:3]
        module, before = self._module, self.layer.heads
        if isinstance(module, RoutedGroupedQueryAttention | GroupedQueryExperts) and not before:
            idx, always_on = self.layer.routings["router"].idx, 0  # [B, S, G, k]
            if isinstance(module, RoutedGroupedQueryAttention) and (always_on := module.config.always_on):
                fixed = torch.arange(always_on, device=idx.device).expand(*idx.shape[:3], always_on)
                idx = torch.cat([fixed, idx + always_on], -1)
            groups = idx.shape[2]
            assert groups * idx.shape[3] == count, "the first call of the core is that of the slots"
            self.layer.heads = groups * module.members
            return (idx + module.members * torch.arange(groups, device=idx.device)[:, None]).flatten(2)
        self.layer.heads += count
        heads = range(before, before + count)
        if isinstance(module, DenseAttention):
            each, number = module.heads_of_calls(), len(self.layer.rows)
            if [len(own) for own in each[number : number + 1]] == [count]:  # else an `attend` of its own
                heads = each[number]
        return torch.tensor(heads, device=q.device).expand(batch, length, count)


def attention_map(
    q: Tensor, k: Tensor, segments: Tensor | None, window: int | None, seen: Tensor | None = None
) -> Tensor:
    """Attention of the core [B, H, S, S], fp32 or float64; q [B, S, H, D], k [B, S, G, D], segments [B, S] or None.

    seen: bool [B, C, S, S], keys that the queries of each H/C heads attend to; None: all within window and document.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2).to(wide)
    scores = torch.einsum("bshd,bthd->bhst", q.to(wide), keys) / q.shape[-1] ** 0.5
    place = torch.arange(q.shape[1], device=q.device)
    distance = place[:, None] - place
    hidden = distance < 0
    if window is not None:
        hidden = hidden | (distance >= window)
    if segments is not None:
        hidden = hidden | (segments[:, :, None] != segments[:, None, :]).to(q.device)[:, None]
    if seen is not None:
        hidden = hidden | ~seen.repeat_interleave(q.shape[2] // seen.shape[1], 1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)


def core_map(context: Context, q: Tensor, k: Tensor) -> Tensor:
    """Attention of the core of an encoder-decoder [B, H, S, K], fp32 or float64; q [B, S, H, D], k [B, K, G, D].

    It is what the core makes of values that are the unit vectors of the keys. Queries without keys have 0.
    """
    assert context.core is not None
    batch, keys, groups = k.shape[:3]
    unit = torch.eye(keys, dtype=k.dtype, device=k.device)[:, None].expand(batch, keys, groups, keys)
    return context.core(q, k, unit).to(torch.promote_types(q.dtype, torch.float32)).transpose(1, 2)


def segment_map(q: Tensor, k: Tensor, segments: Segments, rows: Tensor, documents: Tensor | None) -> Tensor:
    """Attention of each slot [B, k, S, S] within the tokens of its head, 0 elsewhere.

    q, k: packed [P, D]. rows [B, S, k]: heads of the slots. documents [B, S]: numbers, or None.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys = (segments.expand(t.to(wide)) for t in (q, k))  # [B, S, H, D]
    scores = torch.einsum("bshd,bthd->bsht", queries, keys) / q.shape[-1] ** 0.5
    routed = torch.zeros(keys.shape[:3], dtype=torch.bool, device=q.device).scatter(2, rows, True)
    place = torch.arange(rows.shape[1], device=q.device)
    seen = (place[:, None] >= place)[:, None] & routed.transpose(1, 2).unsqueeze(1)  # [B, S, H, S]
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :]).to(q.device).unsqueeze(2)
    index = rows.unsqueeze(-1).expand(*rows.shape, rows.shape[1])
    of_slots = scores.masked_fill(~seen, float("-inf")).gather(2, index)  # [B, S, k, S]: each query sees itself
    return of_slots.softmax(-1).transpose(1, 2)


def _after(change: Callable[[Routing], Routing], module: Router, inputs: tuple[Any, ...], output: Routing) -> Routing:
    """A forward hook."""
    return change(output)


@contextlib.contextmanager
def observed(
    model: Decoder | EncoderDecoder, segments: Tensor | None = None, *, maps: bool = True, off: Off | None = None
) -> Iterator[list[Layer]]:
    """Observe the passes in this context: yields the layers, which hold what the last pass did.

    There is one for each of `attention_layers()`. segments: Those that the pass gets (of an encoder-decoder: the
    target's). maps: Whether attention is kept. off: What is switched off.
    """
    layers = [Layer() for _ in model.attention_layers()]

    def begin(number: int, module: Attention, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        head = off.member if off is not None and off.layer == number and not off.router else None
        report = _Report(module, segments, maps=maps, off=head)
        layers[number] = report.layer
        x, context = inputs
        values = {f.name: getattr(context, f.name) for f in fields(Context)}
        return (x, _Observed(**values, report=report))

    def routed(number: int, name: str, router: Router, routing: Routing) -> Routing:
        if off is not None and (off.layer, off.router) == (number, name):
            gate = routing.gate.clone()
            of_group = gate[:, :, off.group]
            of_group[routing.idx[:, :, off.group] == off.member] = 0
            routing = routing._replace(gate=gate)
        layers[number].routings[name], layers[number].experts[name] = routing, router.experts
        return routing

    with contextlib.ExitStack() as stack:
        for number, module in enumerate(model.attention_layers()):
            stack.callback(module.register_forward_pre_hook(partial(begin, number)).remove)
            routers: dict[str, Router] = module.routers if isinstance(module, RoutedAttention) else {}
            for name, router in routers.items():
                after = partial(_after, partial(routed, number, name, router))
                stack.callback(router.register_forward_hook(after).remove)
        yield layers
