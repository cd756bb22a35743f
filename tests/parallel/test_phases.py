"""Times of the phases of a step: the order of events on a GPU, and the host's clock on a CPU."""

import time
from types import SimpleNamespace

import pytest
import torch

from headway.data.loader import MicroBatch
from headway.parallel.layout import Layout
from headway.parallel.phases import BACKWARD, FORWARD, OPTIMIZER, EventClock, HostClock, clock_of
from headway.parallel.zero_engine import ZeroEngine

BATCH = MicroBatch(tokens=torch.zeros(1, 1), labels=torch.zeros(1, 1), segments=None)


class Stream:
    """A stand-in for a GPU: queued work takes device time, which events in the queue read when they complete."""

    def __init__(self) -> None:
        self.queued_s = 0.0  # device time at which all queued work ends
        self.done_s = 0.0  # device time that the host has waited for
        self.log: list[str] = []

    def work(self, seconds: float) -> None:
        self.queued_s += seconds

    def wait(self, until_s: float) -> None:
        self.done_s = max(self.done_s, until_s)

    def synchronize(self) -> None:
        self.log.append("sums")
        self.wait(self.queued_s)

    def event(self) -> "Event":
        return Event(self)


class Event:
    made = 0

    def __init__(self, stream: Stream) -> None:
        self.stream, self.name, self.at_s = stream, Event.made, None
        Event.made += 1

    def record(self) -> None:
        self.at_s = self.stream.queued_s
        self.stream.log.append(f"record {self.name}")

    def synchronize(self) -> None:
        assert self.at_s is not None
        self.stream.log.append(f"wait {self.name}" if self.at_s > self.stream.done_s else f"done {self.name}")
        self.stream.wait(self.at_s)

    def elapsed_time(self, other: "Event") -> float:
        assert self.at_s is not None and other.at_s is not None
        if max(self.at_s, other.at_s) > self.stream.done_s:
            raise RuntimeError("the event has not completed")  # as torch.cuda.Event does
        self.stream.log.append(f"read {self.name} {other.name}")
        return 1e3 * (other.at_s - self.at_s)


@pytest.fixture
def stream(monkeypatch) -> Stream:
    monkeypatch.setattr(Event, "made", 0)
    return Stream()


class FakeDeepSpeed:
    """Passes with known device times: 1 s forward, 2 s backward, and 4 s for an update after the last micro-batch."""

    skipped_steps = 0

    def __init__(self, stream: Stream, accumulation: int) -> None:
        self.stream, self.accumulation, self.passes = stream, accumulation, 0

    def train(self) -> None:
        pass

    def __call__(self, *_):
        self.stream.work(1.0)
        zero = torch.zeros(())
        return SimpleNamespace(loss_sum=zero, aux_loss=zero)

    def backward(self, _) -> None:
        self.stream.work(2.0)

    def step(self) -> None:
        self.passes += 1
        if self.passes % self.accumulation == 0:
            self.stream.work(4.0)

    def get_global_grad_norm(self) -> float:
        return 1.0


def engine_on(stream: Stream, clock, accumulation: int) -> ZeroEngine:
    """An engine without a model: only what `train_step` calls."""
    e = object.__new__(ZeroEngine)
    e.layout = Layout(rank=0, local_rank=0, device=torch.device("cpu"))
    e.accumulation, e.applied_steps, e._dropout = accumulation, 0, None
    gate = SimpleNamespace(close=lambda _: None, refused=False)
    optimizer = SimpleNamespace(param_groups=[])
    vars(e).update(_engine=FakeDeepSpeed(stream, accumulation), _optimizer=optimizer, _gate=gate)
    vars(e).update(_clock=clock, _inputs=lambda _: ())
    sums = e._sum_losses

    def sum_losses() -> tuple[float, float]:
        stream.synchronize()
        return sums()

    e._sum_losses = sum_losses
    return e


@pytest.mark.parametrize("accumulation", [1, 3])
def test_events_are_recorded_in_order_and_read_once_after_the_step_has_waited_for_its_sums(stream, accumulation):
    e = engine_on(stream, EventClock(stream.event), accumulation)
    last = 3 * accumulation
    for _ in range(2):  # events are used again
        stream.log.clear()
        stats = e.train_step([BATCH] * accumulation, targets=1, lr=0.0)
        assert (stats.forward_s, stats.backward_s, stats.optimizer_s) == (accumulation, 2 * accumulation, 4.0)
        assert stream.log == [
            *(f"record {i}" for i in range(last + 1)),
            "sums",
            f"done {last}",  # no further wait
            *(f"read {i} {i + 1}" for i in range(last)),
        ]
    assert Event.made == last + 1


def test_what_is_done_meanwhile_comes_after_the_passes_and_before_the_host_waits(stream):
    e = engine_on(stream, EventClock(stream.event), 1)
    e.train_step([BATCH], targets=1, lr=0.0, meanwhile=lambda: stream.log.append("meanwhile"))
    assert stream.log[3:6] == ["record 3", "meanwhile", "sums"]


def test_work_that_is_still_queued_is_waited_for_once(stream):
    clock = EventClock(stream.event)
    clock.start()
    for phase, seconds in ((FORWARD, 0.5), (BACKWARD, 0.25), (OPTIMIZER, 0.125)):
        stream.work(seconds)
        clock.end(phase)
    with pytest.raises(RuntimeError):
        clock._events[0].elapsed_time(clock._events[1])
    assert clock.read() == (0.5, 0.25, 0.125)
    assert [entry for entry in stream.log if entry.startswith("wait")] == ["wait 3"]


def test_on_a_cpu_the_phases_are_the_hosts_seconds_and_the_rest_of_the_step_is_not_counted(stream, monkeypatch):
    now = iter([10.0, 11.0, 13.0, 17.0, 18.0, 20.0, 24.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    e = engine_on(stream, clock_of(torch.device("cpu")), 2)
    stats = e.train_step([BATCH, BATCH], targets=1, lr=0.0)
    assert (stats.forward_s, stats.backward_s, stats.optimizer_s) == (2.0, 4.0, 8.5)
    assert isinstance(e._clock, HostClock)
    assert not [entry for entry in stream.log if entry.startswith("record")]


def test_a_gpu_gets_events(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: made.append(options) or Event(Stream()))
    clock = clock_of(torch.device("cuda", 0))
    clock.start()
    assert made == [{"enable_timing": True}]
