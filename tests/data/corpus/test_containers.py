"""Compressed corpus files: every member is read, and every kind of damage is an error that names file and member."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from small_corpora import corpus_config

from headway.data.build import build
from headway.data.config import DataError
from headway.data.corpus import containers
from headway.data.corpus.config import JsonlCorpus, TextCorpus
from headway.data.corpus.read import documents


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


FORMATS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": (".gz", gzip.compress),
    "bzip2": (".bz2", bz2.compress),
    "xz": (".xz", lzma.compress),
    "zstd": (".zst", zst),
}
every_format = pytest.mark.parametrize("format", list(FORMATS))


def rows(begin: int, end: int) -> bytes:
    return "".join(json.dumps({"text": f"row {n}, {n * n}"}) + "\n" for n in range(begin, end)).encode()


def texts(path: Path, say: Callable[[str], None] = print) -> list[str]:
    return [d.text.decode() for d in documents(JsonlCorpus(type="jsonl", paths=[str(path)]), say=say)]


def expected(end: int) -> list[str]:
    return [f"row {n}, {n * n}" for n in range(end)]


def write(tmp_path: Path, format: str, data: bytes) -> Path:
    path = tmp_path / f"a.jsonl{FORMATS[format][0]}"
    path.write_bytes(data)
    return path


@every_format
def test_all_members_are_read_also_empty_ones_and_a_line_that_spans_two(tmp_path: Path, format: str) -> None:
    pack, data = FORMATS[format][1], rows(0, 300)
    path = write(tmp_path, format, pack(data[:1001]) + pack(b"") + pack(data[1001:5000]) + pack(data[5000:]))
    assert texts(path) == expected(300)


@every_format
@pytest.mark.parametrize("member", [0, 1, 2])
def test_damage_in_any_member_is_an_error_that_names_it(tmp_path: Path, format: str, member: int) -> None:
    # The magic number, the middle, and the checksum of a member.
    members = [FORMATS[format][1](rows(n * 100, n * 100 + 100)) for n in range(3)]
    for place in (0, len(members[member]) // 2, -3):
        damaged = [bytearray(m) for m in members]
        damaged[member][place] ^= 0x20
        path = write(tmp_path, format, b"".join(damaged))
        with pytest.raises(DataError, match=rf"a\.jsonl\{FORMATS[format][0]}: ") as caught:
            texts(path)
        if (member, place) != (0, 0):
            names = [f"member {member + 1}", f"frame {member + 1}", f"after member {member}", f"after {member} zstd"]
            assert any(name in str(caught.value) for name in names)


@every_format
def test_a_file_cut_anywhere_is_an_error(tmp_path: Path, format: str) -> None:
    pack = FORMATS[format][1]
    first, second = pack(rows(0, 100)), pack(rows(100, 200))
    whole = first + second
    for end in [*range(len(first) + 1, len(whole)), *range(1, len(first), 7)]:
        path = write(tmp_path, format, whole[:end])
        with pytest.raises(DataError, match=r"a\.jsonl"):
            texts(path)


@every_format
@pytest.mark.parametrize("junk", [b"x", b"PK\x03\x04", b"\0\0\0x", b"\n"])
def test_bytes_after_the_last_member_are_an_error_with_their_position(tmp_path: Path, format: str, junk: bytes) -> None:
    packed = FORMATS[format][1](rows(0, 10))
    path = write(tmp_path, format, packed + junk)
    at = len(packed) + (3 if format == "gzip" and junk[0] == 0 else 0)  # zeros are padding
    with pytest.raises(DataError, match=f"at byte {at:,}"):
        texts(path)


@pytest.mark.parametrize(("format", "zeros"), [("gzip", 1), ("gzip", 600_001), ("xz", 4), ("xz", 600_000)])
def test_padding_between_and_after_members_is_no_content(tmp_path: Path, format: str, zeros: int) -> None:
    pack = FORMATS[format][1]
    path = write(tmp_path, format, pack(rows(0, 50)) + bytes(zeros) + pack(rows(50, 99)) + bytes(zeros))
    assert texts(path) == expected(99)


def test_xz_padding_that_is_no_multiple_of_four_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path, "xz", lzma.compress(rows(0, 5)) + bytes(6))
    with pytest.raises(DataError, match=r"6 zero bytes after member 1 at byte .* not a multiple of 4"):
        texts(path)


def test_skippable_zstd_frames_are_skipped_wherever_they_are(tmp_path: Path) -> None:
    skip = [struct.pack("<II", 0x184D2A50 + n, size) + b"z" * size for n, size in enumerate((0, 7, 600_000))]
    data = skip[2] + zst(rows(0, 20)) + skip[0] + skip[1] + zst(rows(20, 40)) + skip[2]
    assert texts(write(tmp_path, "zstd", data)) == expected(40)
    with pytest.raises(DataError, match="truncated: ends inside zstd frame 6"):
        texts(write(tmp_path, "zstd", data[:-1]))


@pytest.mark.parametrize("level", [-5, 1, 19])
@pytest.mark.parametrize("flags", [{"write_content_size": False}, {"write_checksum": True}, {"threads": 2}])
def test_zstd_frames_of_every_kind_are_read(tmp_path: Path, level: int, flags: dict[str, Any]) -> None:
    rng = random.Random(level)
    noise = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=700_000))
    wanted = [noise, "x" * 500_000, "short"]
    data = "".join(json.dumps({"text": text}) + "\n" for text in wanted).encode()
    packed = zstandard.ZstdCompressor(level=level, **flags).compress(data)
    assert texts(write(tmp_path, "zstd", packed)) == wanted


def test_a_large_zstd_window_is_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True, write_content_size=False)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compress(rows(0, 99))
    assert texts(write(tmp_path, "zstd", packed)) == expected(99)


@every_format
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.txt"])
def test_the_first_bytes_decide_about_the_format_and_a_note_says_so(tmp_path: Path, format: str, name: str) -> None:
    path, notes = tmp_path / name, []
    path.write_bytes(FORMATS[format][1](rows(0, 9)))
    assert texts(path, notes.append) == expected(9)
    if Path(name).suffix == FORMATS[format][0]:
        assert not notes
    else:
        assert notes == [f"{path}: {format}, whatever its name says; it is decompressed"]


def test_plain_text_under_a_compressed_name_is_read_with_a_note_but_damage_is_not(tmp_path: Path) -> None:
    path, notes = tmp_path / "a.jsonl.gz", []
    path.write_bytes(rows(0, 9))
    assert texts(path, notes.append) == expected(9)
    assert "not gzip but uncompressed text" in notes[0]
    for data, says in [(b"", "empty"), (bytes(100), "damaged"), (b"\x1e" + gzip.compress(rows(0, 9))[1:], "damaged")]:
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"a\.jsonl\.gz: not gzip \({says}"):
            texts(path)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x04\x22\x4d\x18abc", "format lz4"),
        (b"PK\x03\x04abc", "format zip"),
        (b"7z\xbc\xaf\x27\x1c", "format 7z"),
        (b"PAR1abc", "format Parquet"),
        (b"name" + bytes(253) + b"ustar\0", "format tar"),
    ],
)
def test_formats_that_are_not_read_are_refused_by_name(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=says):
        texts(path)


@pytest.mark.parametrize("bad_documents", ["error", "skip"])
def test_archives_are_no_documents_of_a_text_corpus_but_every_text_is(bad_documents: str, tmp_path: Path) -> None:
    path, archive = tmp_path / "a.txt", io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        content = b"some words\n" * 100_000  # so long that the NUL bytes around it are no sign
        entry = tarfile.TarInfo("b.txt")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    cfg = corpus_config(path, corpus={"type": "text", "paths": [str(path)]}, bad_documents=bad_documents)
    for data, says in (
        (archive.getvalue(), "format tar"),
        (b"PK\x03\x04\xff", "zip"),
        (b"\x04\x22\x4d\x18\xff", "lz4"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=says):
            build(cfg, out=tmp_path / "out", progress=False)
    text = b"PAR1 is how a Parquet file begins"
    path.write_bytes(text)
    assert [d.text for d in documents(TextCorpus(type="text", paths=[str(path)]))] == [text]


@every_format
@pytest.mark.parametrize("inner", ["tar", "gzip", "zstd", "zip"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_an_archive_inside_compressed_data_is_refused_by_name(
    tmp_path: Path, format: str, inner: str, name: str
) -> None:
    line = b'{"text": "some words"}\n' * 100
    begins = {"tar": b"name" + bytes(253) + b"ustar\x0000" + bytes(247) + line, "zip": b"PK\x03\x04\0\0\0" + line}
    content = begins[inner] if inner in begins else FORMATS[inner][1](line)
    path = tmp_path / name
    path.write_bytes(FORMATS[format][1](content))
    corpus = (
        TextCorpus(type="text", paths=[str(path)]) if name == "a.txt" else JsonlCorpus(type="jsonl", paths=[str(path)])
    )
    with pytest.raises(DataError, match=rf"{name}: its {format} data are themselves a file of the format {inner};"):
        list(documents(corpus))


@every_format
def test_text_files_may_be_compressed(tmp_path: Path, format: str) -> None:
    path = tmp_path / "a.txt.packed"
    path.write_bytes(FORMATS[format][1]("zweites: äöü\n".encode()) * 2)
    found = list(documents(TextCorpus(type="text", paths=[str(path)])))
    assert [d.text.decode() for d in found] == ["zweites: äöü\n" * 2]


@every_format
def test_a_file_that_expands_beyond_reason_is_refused(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "FREE_EXPANSION_BYTES", 2 << 20)
    path = write(tmp_path, format, FORMATS[format][1](b"\n" * (9 << 20)))
    with pytest.raises(DataError, match="expands more than 250 times"):
        texts(path)
    path = write(tmp_path, format, FORMATS[format][1](b"\n" * (1 << 20)))
    assert texts(path) == []
