"""Damaged compressed files end in all of their documents or in one of our errors, never in some of the documents."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import struct
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from headway.data.config import DataError
from headway.data.corpus.rows import jsonl_documents

INPUTS = 250  # of each format, about a second


def pack(format: str, data: bytes, rng: random.Random) -> bytes:
    """One member with settings drawn at random. Each has a checksum, without which damage cannot be seen."""
    match format:
        case "gzip":
            return gzip.compress(data, rng.choice([0, 1, 9]))
        case "bzip2":
            return bz2.compress(data, rng.choice([1, 9]))
        case "xz":
            check = rng.choice([lzma.CHECK_CRC32, lzma.CHECK_CRC64, lzma.CHECK_SHA256])
            return lzma.compress(data, check=check, preset=0)
    compressor = zstandard.ZstdCompressor(
        level=rng.choice([-3, 1, 9]), write_checksum=True, write_content_size=rng.random() < 0.5
    )
    return compressor.compress(data)


def between(format: str, rng: random.Random) -> bytes:
    """What may stand after a member and is no content."""
    if rng.random() < 0.6:
        return b""
    if format == "zstd":
        size = rng.randrange(40)
        return struct.pack("<II", 0x184D2A50 + rng.randrange(16), size) + rng.randbytes(size)
    return {"gzip": bytes(rng.randrange(9)), "xz": bytes(4 * rng.randrange(4)), "bzip2": b""}[format]


def container(format: str, rng: random.Random) -> tuple[bytes, list[str], set[int]]:
    """A valid file, its texts, and where it may be cut without damage."""
    data, texts, ends = b"", [], {0}
    for _ in range(rng.choice([1, 2, 5])):
        chosen = [f"{rng.random()} " * rng.choice([1, 1, 30]) for _ in range(rng.randrange(6))]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in chosen)
        data += pack(format, lines.encode(), rng)
        ends.add(len(data))
        padding = between(format, rng)
        step = {"gzip": 1, "xz": 4}.get(format, max(1, len(padding)))
        ends.update(range(len(data), len(data) + len(padding) + 1, step))
        data += padding
        texts += chosen
    return data, texts, ends


def damaged(data: bytes, ends: set[int], rng: random.Random) -> bytes:
    out = bytearray(data)
    match rng.randrange(4):
        case 0:
            return data[: rng.choice([n for n in range(len(data)) if n not in ends])]
        case 1:
            for _ in range(rng.choice([1, 1, 3])):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        case 2:
            begin = rng.randrange(len(out))
            del out[begin : begin + rng.randrange(1, 9)]
        case 3:
            begin = rng.randrange(len(out) + 1)
            out[begin:begin] = rng.randbytes(rng.randrange(1, 9))
    return bytes(out)


def fuzz(format: str, seed: int, inputs: int, path: Path) -> Counter[str]:
    rng, ends_in = random.Random(f"{format} {seed}"), Counter[str]()
    for number in range(inputs):
        data, texts, ends = container(format, rng)
        whole = number % 4 == 0
        if not whole:
            data = damaged(data, ends, rng)
        path.write_bytes(data)
        try:
            found = [document.text.decode() for document in jsonl_documents(path, "x", "text")]
        except DataError as error:
            assert not whole, f"seed {seed}, input {number}: a valid file is refused: {error}"
            assert str(error).startswith(str(path))
            ends_in["error"] += 1
            continue
        assert found == texts, f"seed {seed}, input {number}: {len(found)} of {len(texts)} documents without an error"
        ends_in["documents"] += 1
    return ends_in


@pytest.mark.parametrize("format", ["gzip", "bzip2", "xz", "zstd"])
def test_a_container_gives_all_documents_or_an_error(format: str, tmp_path: Path) -> None:
    ends_in = fuzz(format, 0, INPUTS, tmp_path / "a.jsonl.gz")
    assert ends_in["error"] > INPUTS // 2 and ends_in["documents"] >= INPUTS // 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
@pytest.mark.parametrize("format", ["gzip", "bzip2", "xz", "zstd"])
def test_many_containers_give_all_documents_or_an_error(format: str, seed: int, tmp_path: Path) -> None:
    fuzz(format, seed, 2500, tmp_path / "a.jsonl")
