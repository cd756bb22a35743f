"""The timing part of a study: variants take turns, for a bounded time, and it is done once for each spec."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from played_study import Folder

from headway.launcher.base.errors import SpecError
from headway.launcher.compare.timing import first_specs, speed_key
from headway.launcher.run.run_dir import read_mapping, write_json
from headway.launcher.study.plan import study_record
from headway.launcher.study.timing import ENOUGH_S, LEAST, MOST, WARM_UP, in_turns, needs_timing, time_study


class Clock:
    """Steps of `seconds` each; the order in which they are done."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, ""

    def step(self, name: str, seconds: float) -> Callable[[], float]:
        def run() -> float:
            self.now += seconds
            self.order += name
            return seconds

        return run

    def measured(self, **seconds: float) -> dict[str, list[float]]:
        return in_turns({name: self.step(name, s) for name, s in seconds.items()}, clock=lambda: self.now)


def test_variants_take_turns_and_none_is_always_the_first():
    clock = Clock()
    found = clock.measured(a=0.1, b=0.2, c=0.3)
    assert clock.order.startswith("abcbcacababcbca")
    assert found["b"] == [0.2] * len(found["a"])


@pytest.mark.parametrize(("seconds", "rounds"), [(1e-4, MOST), (60.0, LEAST), (ENOUGH_S / (2 * 20), 20 - WARM_UP)])
def test_rounds_are_few_for_slow_steps_and_many_for_fast_ones(seconds, rounds):
    found = Clock().measured(a=seconds, b=seconds)
    assert {len(times) for times in found.values()} == {rounds}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Folder(tmp_path)


def planned(folder: Folder, *arguments: str) -> dict:
    folder.out.mkdir(parents=True, exist_ok=True)
    write_json(folder.out / "study.json", study_record(folder.plan(*arguments)))
    return read_mapping(folder.out / "study.json")


def timed(folder: Folder, record: dict) -> None:
    found = {
        name: {"spec": speed_key(spec), "tokens_per_step": 256, "step_s": [0.1, 0.1]}
        for name, spec in first_specs(record).items()
    }
    (folder.out / "timing.json").write_text(json.dumps({"format": 1, "variants": found}))


def test_variants_are_timed_once_and_again_when_a_spec_changes(folder):
    record = planned(folder)
    assert needs_timing(folder.out, beside=True) and not needs_timing(folder.out, beside=False)
    timed(folder, record)
    assert not needs_timing(folder.out, beside=True)
    folder.rewrite("seeds: [1, 2]", "seeds: [7]")
    planned(folder)
    assert not needs_timing(folder.out, beside=True), "a step does not depend on the seed"
    planned(folder, "launch.threads=2")
    assert needs_timing(folder.out, beside=True)
    planned(folder, "train.global_batch=16")
    assert needs_timing(folder.out, beside=True)


def test_runs_of_several_processes_are_not_timed(folder):
    planned(folder, "launch.processes=2", "train.micro_batch=4")
    assert not needs_timing(folder.out, beside=True)


def test_a_folder_without_study_is_one_message(tmp_path):
    with pytest.raises(SpecError, match=r"has no readable study\.json"):
        time_study(tmp_path)
