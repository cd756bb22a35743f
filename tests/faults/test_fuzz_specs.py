"""F25, F26: any content of a file or a message gives a value or one of Headway's own errors.

Long version: `python tests/security/fuzz.py --inputs 100000`.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "security"))
fuzz = importlib.import_module("fuzz")
fuzz_targets = importlib.import_module("fuzz_targets")

INPUTS, SEED = 500, 1


@pytest.fixture(scope="module")
def readers():
    with fuzz.own_folder() as folder:
        found = {target.name: target for target in fuzz_targets.targets(folder)}
        assert tuple(found) == fuzz_targets.NAMES
        yield folder, found


@pytest.fixture
def reader(readers, monkeypatch):
    """Returns a reader by name, with its folder as working directory. A reader that starts a process fails."""
    folder, found = readers
    monkeypatch.chdir(folder)

    def no_process(*args, **named):
        raise AssertionError(f"a reader starts a process: {args}")

    for place, name in ((subprocess, "Popen"), (os, "fork"), (os, "posix_spawn"), (os, "system")):
        monkeypatch.setattr(place, name, no_process)
    return found.__getitem__


@pytest.mark.filterwarnings("ignore:Reading `.npy`")
@pytest.mark.parametrize("name", fuzz_targets.NAMES)
def test_broken_inputs_give_a_value_or_a_headway_error_soon(name, reader):  # F25, F26
    target = reader(name)
    for data in target.good:
        assert fuzz_targets.outcome(target, data) in ("accepted", "nothing in it"), data
    tally = fuzz.fuzz(target, SEED, range(INPUTS))
    assert not tally.failures, "\n".join(tally.failures[:5])
    # Both accepted and refused inputs must occur.
    if name in ("spec", "study", "corpus spec", "overrides"):
        assert set(tally.classes) <= {"accepted", "exit 64", "exit 66"}, tally.classes  # 66: a `base` that is not there
    assert tally.classes["accepted"] >= 4 and tally.classes.total() - tally.classes["accepted"] >= 20, tally.classes


BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))]
)
HOSTILE = {
    "nested lists": b"[" * 50_000,
    "nested lists, closed": b"[" * 100_000 + b"]" * 100_000,
    "nested mappings": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "nested by dots": b"a" + b".b" * 100_000 + b": 1",
    "alias bomb": BOMB.encode(),
    "many keys": "".join(f"k{n}: {n}\n" for n in range(25_000)).encode(),
    "many JSON keys": ("{" + ", ".join(f'"k{n}": {{}}' for n in range(50_000)) + "}").encode(),
    "many values": b"a: [" + b"1, " * 50_000 + b"1]",
    "one long number": b"9" * 300_000,
    "one long word": b"a" * 300_000,
    "many lines": b"\n" * 50_000,
    "a tag": b"a: !!python/object/apply:os.system [id]",
    "nothing": b"",
}


@pytest.mark.parametrize("name", fuzz_targets.NAMES)
def test_the_most_hostile_inputs_take_little_time_and_memory(name, reader):  # F25, F26
    target = reader(name)
    for what, data in HOSTILE.items():
        begin, memory = time.process_time(), fuzz.peak_bytes()
        fuzz_targets.outcome(target, data)  # raises exceptions that are not Headway's errors
        assert time.process_time() - begin < fuzz.LIMIT_S and fuzz.peak_bytes() - memory < fuzz.LIMIT_BYTES, what


@pytest.mark.parametrize(
    "key", ["model.layers", "attention.heads", "attention.kv_heads", "data.seq_len", "launch.hosts"]
)
@pytest.mark.parametrize("value", [10**9, 2**53 + 1, 2**63])
def test_huge_numbers_are_refused_at_once(key, value, reader):  # F25
    begin = time.process_time()
    assert fuzz_targets.outcome(reader("overrides"), f"{key}={value}".encode()) == "exit 64"
    assert time.process_time() - begin < fuzz.LIMIT_S


NAMES_OF_SHARDS = [
    "../x.mds",
    "/etc/passwd",
    "a/b.mds",
    "x\0.mds",
    "",
    ".",
    "..",
    "x" * 300,
    "-x",
    "a\nb",
    "é.mds",
    7,
    None,
]


@pytest.mark.parametrize("shard", NAMES_OF_SHARDS, ids=repr)
def test_an_index_may_only_name_plain_files(shard, reader):  # F26
    target = reader("MDS index")
    index = copy.deepcopy(target.trees[0])
    index["shards"][0]["raw_data"]["basename"] = shard
    assert fuzz_targets.outcome(target, json.dumps(index).encode()) == "exit 65"


def test_an_index_may_name_a_file_only_once(reader):  # F26
    target = reader("MDS index")
    index = copy.deepcopy(target.trees[0])
    index["shards"] = [index["shards"][0], {**index["shards"][0], "samples": 2}]
    assert fuzz_targets.outcome(target, json.dumps(index).encode()) == "exit 65"


def test_an_input_is_reproducible_from_seed_and_number(reader):
    target = reader("spec")
    first = [fuzz.broken_input(target, SEED, number) for number in range(50)]
    assert first == [fuzz.broken_input(target, SEED, number) for number in range(50)]
    assert first != [fuzz.broken_input(target, SEED + 1, number) for number in range(50)]
    assert len(set(first)) > 40


@pytest.mark.parametrize("bad", ["traceback", "time"])
def test_the_fuzzer_detects_a_faulty_reader(bad, reader, monkeypatch):
    good = reader("wire")

    def read(data: bytes) -> str:
        if bad == "traceback" and b"host" not in data:
            raise IndexError("a defect")
        while bad == "time" and b"host" not in data:
            pass
        return "accepted"

    monkeypatch.setattr(fuzz, "LIMIT_S", 0.01)
    target = fuzz.Target("broken", read, good.good, text=False)
    tally = fuzz.fuzz(target, SEED, range(40))
    assert tally.failures and ("IndexError: a defect" if bad == "traceback" else "TooLong") in tally.failures[0]
    assert f"--seed {SEED} --at " in tally.failures[0]
