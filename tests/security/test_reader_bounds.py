"""A hostile file of 1 MiB costs every reader less than 2 seconds and 200 MB, and ends in a value or our own error.

The memory is the peak of a process (VmHWM after a reset). One process reads a part of the files one after the other:
its peak is at least that of each file. In the slow tests, each of all files has a process of its own. Corpora:
test_reading_limits.py.
"""

from __future__ import annotations

import copy
import gc
import importlib
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard

from headway.data.config import DataError
from headway.data.fetch import unpack_shard
from headway.data.manifest import VERIFIED_NAME, VerifiedFiles
from headway.launcher.exchange.import_hf import read_llama, read_raw
from headway.launcher.exchange.import_t5 import read_t5
from headway.launcher.run.codec import token_of
from headway.launcher.run.record_check import check_records
from headway.launcher.run.run_dir import read_mapping

sys.path.insert(0, str(Path(__file__).resolve().parent))
fuzz = importlib.import_module("fuzz")
fuzz_targets = importlib.import_module("fuzz_targets")

MIB, LIMIT_S, LIMIT_BYTES = 1 << 20, 2.0, 200 << 20


def many(begin: bytes, unit: bytes, end: bytes = b"", between: bytes = b"") -> bytes:
    count = (MIB - len(begin) - len(end)) // (len(unit) + len(between))
    return begin + between.join([unit] * count) + end


def keys(value: bytes) -> bytes:
    entries = [b'"%x":%s' % (n, value) for n in range(MIB // (8 + len(value)))]
    return b"{" + b",".join(entries) + b"}"


@cache
def general() -> dict[str, bytes]:
    """About 20 MiB, not made where tests are only collected."""
    return {
        "lists in lists": many(b"", b"["),
        "maps in maps": many(b"", b'{"a":'),
        "closed lists": b"[" * (MIB // 2) + b"]" * (MIB // 2),
        "numbers": many(b"[", b"0", b"]", b","),
        "empty maps": many(b"[", b"{}", b"]", b","),
        "keys": keys(b"0"),
        "keys of maps": keys(b"{}"),
        "keys of lists": keys(b"[]"),
        "one text": b'"' + b"a" * (MIB - 2) + b'"',
        "one wide text": b'"' + b"a" * (MIB - 6) + "🙂".encode() + b'"',
        "digits": b"9" * MIB,
        "line breaks": b"\n" * MIB,
        "short lines": many(b"", b"a\n"),
        "list lines": many(b"", b"- a\n"),
        "key lines": b"".join(b"k%d: 0\n" % n for n in range(90_000)),
        "indented lines": b"".join(b" " * n + b"a:\n" for n in range(1400)),
        "empty records": many(b"", b"{}\n"),
        "records": many(b"", b'{"kind":"train"}\n'),
        "NUL bytes": bytes(MIB),
        "no UTF-8": b"\xff" * MIB,
        "array header": b"\x93NUMPY\x01\x00\xf0\xff" + b"{'descr': '<u4', 'shape': (" + b"9" * 65000 + b",)}",
        "array of 16 GB": b"\x93NUMPY\x01\x00\x76\x00"
        + b"{'descr': '<u4', 'fortran_order': False, 'shape': (4000000000,), }".ljust(117)
        + b"\n",
        "tensor header": (MIB - 8).to_bytes(8, "little")
        + many(b'{"a":{"dtype":"F32","shape":[', b"0", b'],"data_offsets":[0,0]}}', b",").ljust(MIB - 8),
        "header beyond the file": (1 << 40).to_bytes(8, "little") + b"{",
    }


# Left to the slow tests, as others of `general` are alike (closed lists, keys of maps, one wide text, short lines).
ALIKE = {"lists in lists", "keys", "keys of lists", "one text", "line breaks", "empty records"}


@cache
def large_values() -> dict[str, bytes]:
    return {
        "maps": b"[" + b"{}," * (MIB // 3 - 3000) + b"0]",
        "keys": keys(b"0"),
        "text": b'"' + b"a" * (MIB - 9000) + b'"',
    }


EACH = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["part", "every"])


def payloads_for(good: bytes, *, every: bool) -> dict[str, bytes]:
    plain = {about: data for about, data in general().items() if every or about not in ALIKE}
    return {**plain, **dict(inside(good, every=every))}


def inside(good: bytes, *, every: bool) -> Iterator[tuple[str, bytes]]:
    """Valid JSON with something large in each of its first places, down to three levels. Everything large in each of
    them, or the next one in the next place.
    """
    try:
        tree = json.loads(good)
    except ValueError:
        return
    for number, path in enumerate(list(paths(tree, 3))[:8]):
        values = list(large_values().items())
        for name, large in values if every else [values[number % len(values)]]:
            changed = copy.deepcopy(tree)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = "LARGE"
            yield f"{name} at {path}", json.dumps(changed).encode().replace(b'"LARGE"', large)


def paths(node: Any, depth: int) -> Iterator[list[Any]]:
    places: list[tuple[Any, Any]] = []
    if isinstance(node, dict):
        places = list(node.items())[-4:]
    elif isinstance(node, list):
        places = list(enumerate(node))[:1]
    for key, value in places:
        yield [key]
        if depth > 1:
            yield from ([key, *rest] for rest in paths(value, depth - 1))


def peak_bytes() -> int:
    with Path("/proc/self/status").open() as stream:
        return next(int(line.split()[1]) << 10 for line in stream if line.startswith("VmHWM"))


def measured(*reads: Callable[[], str]) -> list[tuple[str, int, float]]:
    """(outcome, bytes of memory so far, seconds of CPU time) of each call. One process of their own makes them all. One
    in which it was killed is the last.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        gc.freeze()  # collections of garbage leave out what the tests have, which is much
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = peak_bytes()
        for read in reads:
            begin = sum(os.times()[:2])
            resource.setrlimit(resource.RLIMIT_CPU, (int(begin) + 15, hard))
            try:
                what = read()
            except BaseException as error:  # a Rust panic is no Exception
                what = f"{type(error).__name__}: {str(error)[:200]}"
            answer = [what, peak_bytes() - before, sum(os.times()[:2]) - begin]
            os.write(send, json.dumps(answer).encode() + b"\n")
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as stream:
        found = [tuple(json.loads(line)) for line in stream]
    os.waitpid(child, 0)
    return found if len(found) == len(reads) else [*found, ("killed after 15 s", 0, 15.0)]


def check_all(reads: dict[str, Callable[[], str]], outcomes: tuple[str, ...], *, together: bool) -> None:
    """`together`: a process of its own only for those that are not within the limits after others in one process."""
    rest = list(reads.items())
    while rest:
        for what, grown, seconds in measured(*(read for _, read in rest)) if together else []:
            if what not in outcomes or grown >= LIMIT_BYTES or seconds >= LIMIT_S:
                break
            rest.pop(0)
        if rest:
            check(*rest.pop(0), outcomes)


def check(name: str, read: Callable[[], str], outcomes: tuple[str, ...]) -> None:
    ((what, grown, seconds),) = measured(read)
    for _ in range(2):  # load on a shared core adds to CPU time and never takes from it: the least of three counts
        if LIMIT_S <= seconds < LIMIT_S * 3:
            seconds = min(seconds, measured(read)[0][2])
    shown = f"{name}: {what}, {grown / MIB:.0f} MiB, {seconds:.2f} s"
    assert what in outcomes, shown
    assert grown < LIMIT_BYTES and seconds < LIMIT_S, shown


@pytest.fixture(scope="module")
def readers() -> Iterator[dict[str, Any]]:
    with fuzz.own_folder() as folder:
        yield {target.name: target for target in fuzz_targets.targets(folder)}


@pytest.mark.filterwarnings("ignore:Reading `.npy`")
@EACH
@pytest.mark.parametrize("name", fuzz_targets.NAMES)
def test_a_hostile_file_costs_little_time_and_memory(name: str, every: bool, readers: dict[str, Any]) -> None:
    target = readers[name]
    fine = ("accepted", "nothing in it", "exit 64", "exit 65", "exit 66", "exit 74")
    payloads = payloads_for(target.good[0], every=every)
    reads = {about: partial(fuzz_targets.outcome, target, data) for about, data in payloads.items()}
    check_all(reads, fine, together=not every)


def other_readers(folder: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Readers of whole folders or of files that the fuzzer leaves out: the file, and the call that reads it."""
    run, llama, t5 = folder / "run", folder / "llama", folder / "t5"
    for path in (run, llama, t5):
        path.mkdir()
    (run / "summary.json").write_text('{"complete": true, "steps": 3, "final_validation_loss": 3.5}')
    return {
        "hash cache": (folder / VERIFIED_NAME, lambda: VerifiedFiles(folder)),
        "records": (run / "metrics.jsonl", lambda: check_records(run)),
        "study outcomes": (folder / "outcomes.json", lambda: read_mapping(folder / "outcomes.json")),
        "config of a Llama": (llama / "config.json", lambda: read_llama(llama, read_raw(llama))),
        "config of a T5": (t5 / "config.json", lambda: read_t5(t5, read_raw(t5))),
        "tokenizer of weights": (llama / "tokenizer.json", lambda: token_of(llama / "tokenizer.json", 0)),
    }


LLAMA = json.dumps(
    {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "vocab_size": 16},
        **{"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "rope_scaling": None},
    }
).encode()

T5 = json.dumps(
    {
        **{"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 8, "vocab_size": 16},
        **{"d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "relu", "dropout_rate": 0.1},
    }
).encode()
OTHERS = {"config of a Llama": LLAMA, "config of a T5": T5}


@EACH
@pytest.mark.parametrize(
    "name", ["hash cache", "records", "study outcomes", "config of a Llama", "config of a T5", "tokenizer of weights"]
)
def test_files_around_a_run_cost_little_time_and_memory(name: str, every: bool, tmp_path: Path) -> None:
    path, read = other_readers(tmp_path)[name]

    def outcome(data: bytes) -> str:
        path.write_bytes(data)
        try:
            read()
        except Exception as error:
            if getattr(error, "exit_code", None) not in (64, 65, 66, 74):
                raise
            return "refused"
        return "read"

    payloads = payloads_for(OTHERS.get(name, b""), every=every)
    reads = {about: partial(outcome, data) for about, data in payloads.items()}
    check_all(reads, ("read", "refused"), together=not every)


def test_a_reader_beyond_a_limit_is_found_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "LIMIT_S", 0.3)

    def large() -> str:
        return "read" if b"x" * (LIMIT_BYTES + MIB) else ""

    def slow() -> str:
        begun = sum(os.times()[:2])
        while sum(os.times()[:2]) < begun + 1:
            pass
        return "read"

    def wrong() -> str:
        raise IndexError("a defect")

    def dies() -> str:
        os._exit(1)

    cases = (
        (large, r"20\d MiB"),
        (slow, r"read, \d MiB"),
        (wrong, "IndexError: a defect"),
        (dies, "killed after 15 s"),
    )
    for bad, words in cases:
        reads = {"before": lambda: "read", "bad one": bad, "after": lambda: "read"}
        with pytest.raises(AssertionError, match=f"bad one: .*{words}"):
            check_all(reads, ("read",), together=True)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_long_added_token_is_refused_before_the_library_takes_minutes(
    normalized: bool, readers: dict[str, Any]
) -> None:
    target = readers["tokenizer"]
    content = json.loads(target.good[0])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    token = {"id": len(content["model"]["vocab"]), "content": "a" * (MIB - 9000), "normalized": normalized, **flags}
    content["added_tokens"].append(token | {"special": False})
    data = json.dumps(content).encode()
    assert len(data) <= MIB
    check("one token", lambda: fuzz_targets.outcome(target, data), ("exit 65",))
    content["added_tokens"][-1]["content"] = "a" * 256
    assert fuzz_targets.outcome(target, json.dumps(content).encode()) == "accepted"


def test_a_compressed_shard_is_not_unpacked_beyond_its_size(tmp_path: Path) -> None:
    packed, raw = tmp_path / "shard.00000.mds.zstd", tmp_path / "shard.00000.mds"
    packer = zstandard.ZstdCompressor(level=19).compressobj()
    with packed.open("wb") as stream:
        for _ in range(64):
            stream.write(packer.compress(bytes(16 * MIB)))
        stream.write(packer.flush())
    assert packed.stat().st_size < MIB

    def unpack(size: int) -> str:
        try:
            unpack_shard(packed, raw, bytes=size, xxh64="0" * 16)
        except DataError as error:
            return "too large" if "does not unpack to the shard in the index" in str(error) else str(error)[-99:]
        return "unpacked"

    check("1 GiB for 4 KiB", lambda: unpack(4096), ("too large",))
    ((what, grown, _),) = measured(lambda: unpack(1 << 30))
    assert "more than 250 times is refused" in what or "decompress it first if it is meant" in what
    assert grown < LIMIT_BYTES
    assert not raw.exists()
    packed.write_bytes(zstandard.ZstdCompressor().compress(bytes(np.arange(1024, dtype="<u4"))))
    data = np.arange(1024, dtype="<u4").tobytes()
    assert unpack_shard(packed, raw, bytes=4096, xxh64=xxhash.xxh64_hexdigest(data)).read_bytes() == data
