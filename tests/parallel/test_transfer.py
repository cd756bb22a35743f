"""Inputs that are copied to a GPU ahead of their step, with stand-ins for streams; on a CPU nothing happens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch

from headway.data.loader import MicroBatch
from headway.parallel.layout import Layout
from headway.parallel.pipeline import PipelineEngine
from headway.parallel.transfer import InPlace, SideStream, transfer_to
from headway.parallel.zero_engine import ZeroEngine

CUDA = torch.device("cuda", 0)


class Cuda:
    """A stand-in for `torch.cuda`: streams run their work only when something waits for it, so that a missing wait
    shows as a copy that has not arrived.
    """

    def __init__(self) -> None:
        self.passes = Stream(self, "passes")
        self._current = self.passes
        self.made: list[Stream] = []

    def Stream(self, device: torch.device) -> "Stream":
        assert device == CUDA
        self.made.append(Stream(self, "side"))
        return self.made[-1]

    def Event(self) -> "Event":
        return Event()

    def current_stream(self, device: torch.device | None = None) -> "Stream":
        return self._current

    @contextmanager
    def stream(self, stream: "Stream") -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before


class Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name, self.queue = cuda, name, list[Any]()

    def wait_event(self, event: "Event") -> None:
        event.stream.run(event.place)

    def run(self, until: int) -> None:
        for work in self.queue[:until]:
            work()


class Event:
    stream: Stream
    place: int

    def record(self, stream: Stream) -> None:
        self.stream, self.place = stream, len(stream.queue)


class HostTensor:
    def __init__(self, cuda: Cuda, value: int, *, pinned: bool = False) -> None:
        self.cuda, self.value, self.pinned = cuda, value, pinned

    def chunk(self, parts: int, dim: int) -> list["HostTensor"]:
        return [self] * parts

    def pin_memory(self) -> "HostTensor":
        return HostTensor(self.cuda, self.value, pinned=True)

    def to(self, device: torch.device, *, non_blocking: bool) -> "DeviceTensor":
        assert self.pinned and non_blocking and device == CUDA
        copy = DeviceTensor(self.cuda.current_stream())
        copy.home.queue.append(lambda: copy.arrive(self.value))
        return copy


class DeviceTensor:
    """`used_in`: streams that keep its memory from being used again."""

    def __init__(self, home: Stream) -> None:
        self.home, self.value, self.used_in = home, cast(int | None, None), {home}

    def arrive(self, value: int) -> None:
        self.value = value

    def record_stream(self, stream: Stream) -> None:
        self.used_in.add(stream)


@pytest.fixture
def cuda() -> Cuda:
    return Cuda()


def batch(cuda: Cuda, number: int) -> Any:
    tokens, labels, segments = (HostTensor(cuda, 10 * number + i) for i in range(3))
    return MicroBatch(tokens=cast(Any, tokens), labels=cast(Any, labels), segments=cast(Any, segments))


def engine(transfer: Any, kind: type[ZeroEngine] = ZeroEngine) -> ZeroEngine:
    e = object.__new__(kind)
    e.layout, e._transfer, e._dropout = Layout(rank=0, local_rank=0, device=CUDA), transfer, None
    return e


def test_inputs_are_copied_in_the_side_stream_and_have_arrived_in_the_stream_that_takes_them(cuda):
    transfer = SideStream(CUDA, cuda)
    e, batches = engine(transfer), [batch(cuda, n) for n in range(3)]
    e.copy_ahead(batches)
    (side,) = cuda.made
    assert len(side.queue) == 6 and cuda.passes.queue == []
    assert cuda.current_stream() is cuda.passes
    for number, b in enumerate(batches):
        tokens, labels, segments = cast(Any, e._inputs(b))
        assert (tokens.value, labels.value) == (10 * number, 10 * number + 1)
        assert segments is b.segments  # the decoder reads them on the host
        assert tokens.home is side and tokens.used_in == labels.used_in == {side, cuda.passes}
    assert len(side.queue) == 6 and transfer._copies == {}  # each was copied once, and is not kept


def test_a_copy_that_is_not_waited_for_has_not_arrived(cuda, monkeypatch):
    """The stand-in would show a missing wait."""
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    e, b = engine(SideStream(CUDA, cuda)), batch(cuda, 1)
    e.copy_ahead([b])
    assert cast(Any, e._inputs(b))[0].value is None


def test_what_was_not_copied_ahead_is_copied_when_it_is_taken(cuda):
    e, first, other = engine(SideStream(CUDA, cuda)), batch(cuda, 1), batch(cuda, 2)
    e.copy_ahead([first])
    assert cast(Any, e._inputs(other))[0].value == 20
    assert cast(Any, e._inputs(first))[0].value == 10
    assert cast(Any, e._inputs(first))[0].value == 10  # taken again: copied again


def test_copies_that_no_stage_takes_do_not_pile_up(cuda):
    transfer = SideStream(CUDA, cuda)
    e = engine(transfer, PipelineEngine)
    for step in range(5):
        e.copy_ahead([batch(cuda, step), batch(cuda, step)])
    assert len(transfer._copies) == 2


def test_pipeline_stages_get_the_segments_on_the_device_too(cuda):
    e = cast(PipelineEngine, engine(SideStream(CUDA, cuda), PipelineEngine))
    b = batch(cuda, 3)
    e.copy_ahead([b])
    ((inputs, labels),) = e._iterator([b])
    assert [t.value for t in inputs] == [30, 31, 32] and labels is inputs[1]


def test_on_a_cpu_inputs_are_used_where_they_are():
    transfer = transfer_to(torch.device("cpu"))
    assert isinstance(transfer, InPlace) and not transfer.ahead
    tokens = torch.arange(4)
    transfer.begin(tokens, [tokens])
    (taken,) = transfer.take(tokens, [tokens])
    assert taken is tokens
