"""The next batch is taken early only on a GPU and only if it is ready, and comes in order with its errors."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from headway.data.config import DataError
from headway.data.prefetch import Prefetch
from headway.launcher.train.ahead import Ahead

HERE = Path(__file__).parent


class Source:
    """A loader of the numbers 0, 1, ... as batches. `fails`: the number that cannot be read."""

    def __init__(self, fails: int | None = None) -> None:
        self.is_ready, self.number, self.fails = True, -1, fails

    def __next__(self) -> Any:
        self.number += 1
        if self.number == self.fails:
            raise DataError("a damaged file")
        return SimpleNamespace(micro=[self.number])


def batches(source: Source, *, ahead: bool = True) -> tuple[Ahead, list[Any]]:
    copied: list[Any] = []
    engine = SimpleNamespace(copies_ahead=ahead, copy_ahead=copied.append)
    return Ahead(cast(Any, source), cast(Any, engine)), copied


def test_batches_come_in_order_whether_they_were_ready_or_not():
    source = Source()
    found, copied = batches(source)
    taken = []
    for step in range(6):
        taken.append(found.take().micro)
        source.is_ready = step % 2 == 0
        found.fetch()
        found.fetch()  # at most one ahead
        assert source.number == step + (step % 2 == 0)
    assert taken == [[n] for n in range(6)]
    assert copied == [[1], [3], [5]]


def test_on_a_cpu_nothing_is_taken_early():
    source = Source()
    found, copied = batches(source, ahead=False)
    found.take()
    found.fetch()
    assert (source.number, copied) == (0, [])


def test_an_error_comes_with_the_step_that_needs_the_batch():
    found, copied = batches(Source(fails=1))
    found.take()
    found.fetch()  # during step 0, which is recorded
    with pytest.raises(DataError, match="damaged"):
        found.take()
    assert copied == []


def test_an_item_is_ready_when_get_would_not_wait():
    may_end = threading.Event()

    def prepare(number: int) -> int:
        assert number == 0 or may_end.wait(30)
        return 10 * number

    prefetch = Prefetch(prepare, first=0, end=2, ahead=1, workers=1)
    try:
        assert prefetch.get(0, timeout_s=30) == 0
        assert not prefetch.has(1)
        may_end.set()
        end = time.monotonic() + 30
        while not prefetch.has(1):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert prefetch.get(1, timeout_s=0) == 10
        assert not prefetch.has(1)
    finally:
        prefetch.close()


def test_a_run_whose_batches_are_copied_ahead_is_the_same_run(tmp_path):
    spec = HERE.parents[2] / "yaml/base/tiny.yaml"
    command = [sys.executable, "-P", str(HERE / "ahead_cases.py"), str(spec), str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("CASE ")]
    case = json.loads(line.removeprefix("CASE "))
    assert case["ahead"] == case["plain"]
    plain, ahead = case["early"]
    assert not any(plain) and any(ahead)
    assert case["left"] == (4 if ahead[-1] else 0)  # the four micro-batches of the next step
