"""Reading a hostile corpus takes less than 200 MB and 2 seconds: limits are checked while reading."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

LIMIT_BYTES, LIMIT_S = 200 << 20, 2.0

READ = """
import json, resource, sys, time
from headway.data.config import DataError
from headway.data.corpus.config import CorpusConfig
from headway.data.corpus.read import documents
import pyarrow.parquet, zstandard
corpus = CorpusConfig.model_validate({
    "name": "x",
    "corpus": {"type": sys.argv[1], "paths": [sys.argv[2]]},
    "tokenizer": {"type": "train_bpe", "vocab_size": 300},
}).corpus
def peak():
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) << 10 for line in stream if line.startswith("VmHWM"))
before, begin, count, error = peak(), time.process_time(), 0, ""
try:
    for _ in documents(corpus):
        count += 1
except DataError as caught:
    error = str(caught)
print(json.dumps([count, error, peak() - before, time.process_time() - begin]))
"""


def read(type: str, path: Path) -> tuple[int, str]:
    """Documents before the error, and the error. Fails if reading takes too much."""
    done = subprocess.run([sys.executable, "-c", READ, type, str(path)], capture_output=True, text=True, check=True)
    count, error, grown, seconds = json.loads(done.stdout)
    print(f"{type} {path.name}: {grown / 2**20:.0f} MiB, {seconds:.2f} s; {error}")
    assert grown < LIMIT_BYTES
    assert seconds < LIMIT_S
    return count, error


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lambda data: lzma.compress(data, preset=0),
    "zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


@pytest.mark.parametrize("type", ["jsonl", "text"])
@pytest.mark.parametrize("ending", list(PACK))
def test_a_compressed_document_of_gigabytes_is_refused_while_it_is_read(type: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(PACK[ending](b'{"text": "') + PACK[ending](b"a" * (16 << 20)) * 64)
    assert path.stat().st_size < 2 << 20
    count, error = read(type, path)
    assert count == 0
    if type == "text":
        assert error.startswith(f"{path}: a document of 33,")
    else:
        assert error.startswith(f"{path}:1: a line of more than 6")


def test_one_zstd_frame_of_gigabytes_is_refused_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    packer = zstandard.ZstdCompressor().compressobj()
    with path.open("wb") as stream:
        stream.write(packer.compress(b'{"text": "good"}\n{"text": "'))
        for _ in range(1 << 6):
            stream.write(packer.compress(b"a" * (16 << 20)))
        stream.write(packer.compress(b'"}\n') + packer.flush())
    assert path.stat().st_size < 1 << 20
    count, error = read("jsonl", path)
    assert count == 1 and error.startswith(f"{path}:2: a line of more than")


@pytest.mark.parametrize("type", ["jsonl", "text"])
def test_a_file_of_one_endless_line_is_not_read_to_its_end(type: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.truncate(3 << 30)  # takes no space
    count, error = read(type, path)
    assert count == 0
    assert error.startswith(f"{path}:1: a line of" if type == "jsonl" else f"{path}: a document of")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "x", "more": [' + b"[]," * 13_000_000 + b"0]}", "1,000,000 JSON values"),
        (b'{"text": "x", "more": [' + b'"a",' * 13_000_000 + b"0]}", "1,000,000 JSON values"),
        (b'{"text": "' + "🙂".encode() * (10 << 20) + b'"}', "a line of more than 37,"),
        (b'{"text": "' + b"a" * (40 << 20) + b'"}', "a document of 41,943,040 bytes"),
        (b'{"text": "' + b"\\n" * (31 << 20), "1: not JSON"),
        (b"9" * (40 << 20), "1: not JSON"),
    ],
)
def test_a_long_line_never_takes_much_more_than_its_own_size(line: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(line))
    count, error = read("jsonl", path)
    assert count == 0 and says in error and f"{path}:1: " in error


def test_documents_up_to_the_limit_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": '"' * (16 << 20) + "a" * (16 << 20)}))
    assert read("jsonl", path) == (1, "")


def test_large_parquet_cells_are_refused_or_read_one_by_one(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"

    def write(array: object, **options: object) -> None:
        pq.write_table(pa.table({"text": array}), path, compression="zstd", **options)
        assert path.stat().st_size < 1 << 20

    write(pa.array(["good", "a" * (100 << 20)]))
    count, error = read("parquet", path)
    assert count == 0 and "in row group 1; data that expands more than 250 times is refused" in error
    write(pa.array(["good", "a" * (36 << 20)]))
    count, error = read("parquet", path)
    assert count == 1 and error.startswith(f"{path}: row 2: a document of 37,748,736 bytes")
    # A dictionary repeats its value without taking space.
    write(pa.DictionaryArray.from_arrays(pa.array([0] * 40, pa.int32()), pa.array(["a" * (12 << 20)])))
    assert read("parquet", path) == (40, "")
