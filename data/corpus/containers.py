"""The bytes of corpus files: gzip, bzip2, xz, zstd or uncompressed.

The first bytes of a file decide about its format, not its name. A compressed file is a sequence of members (streams or
frames), and all of them are read. Damage in any member, a truncated member and bytes that belong to no member are
errors, which name the file, the member and its position. Output comes in pieces of at most about 1 MiB, so memory does
not depend on how much a file expands.

Formats: RFC 1952 (gzip), RFC 8878 (zstd), https://tukaani.org/xz/xz-file-format.txt (xz).
"""

from __future__ import annotations

import bz2
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from headway.data.config import DataError

COMPRESSED_ENDINGS = {".gz": "gzip", ".gzip": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}

# A file that expands beyond both limits is refused. Text rarely shrinks to a tenth; a text that shrinks to 1/250 has
# almost no content. Without a limit, a file of some kilobytes can fill the disk. The second limit is beyond the longest
# line, so that a line that is too long is called so.
MAX_EXPANSION = 250
FREE_EXPANSION_BYTES = 72 << 20

_CHUNK_BYTES = 256 << 10
_OUTPUT_BYTES = 1 << 20
_HEAD_BYTES = 64 << 10
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_WINDOW = 1 << 31
_XZ_MEMORY = 2 << 30  # reserved for the dictionary that a file asks for; used only as far as the file expands

_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "bzip2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}
_UNREADABLE = {
    "lz4": re.compile(rb"\x04\x22\x4d\x18|\x02\x21\x4c\x18"),
    "zip": re.compile(rb"PK(?:\x03\x04|\x05\x06)"),
    "7z": re.compile(rb"7z\xbc\xaf\x27\x1c"),
    "rar": re.compile(rb"Rar!\x1a\x07"),
    "Parquet": re.compile(rb"PAR1"),
    "Arrow": re.compile(rb"ARROW1\x00\x00"),
    "LZMA": re.compile(rb"\x5d\x00\x00[\x00-\xff]{2}"),
    "compress": re.compile(rb"\x1f\x9d"),
    "tar": re.compile(rb"(?s).{257}ustar(?:\x00|  \x00)"),
}
_POINTER_BYTES = 1024
_POINTERS = (
    (
        re.compile(rb"version https://(?:git-lfs|hawser)\.github\.com/spec/v1\r?\n(?s:.*)oid sha256:"),
        "a pointer of Git LFS, not the file itself; fetch the files with `git lfs pull` in that repository",
    ),
    (
        re.compile(rb"/?(?:\.git)?/annex/objects/\S+\s*\Z"),
        "a pointer of git-annex, not the file itself; fetch the files with `git annex get` in that repository",
    ),
    (re.compile(rb"# xet version [0-9]+\r?\n"), "a pointer of Xet, not the file itself; download the files again"),
)

_LINK = re.compile(rb"(?:\.{1,2}/)+[^\x00-\x1f]+")
"""A relative path and nothing else, without a line break: the content of a link."""


class Damage(Exception):
    """A container that cannot be read, without the name of the file."""


@dataclass(frozen=True)
class Head:
    """How a file begins. format: gzip, bzip2, xz, zstd, or None for an uncompressed file."""

    format: str | None
    note: str | None  # for the user, if the name says something else


def check_pointer(path: Path, data: bytes) -> None:
    """Raise DataError if `data`, the first 1024 bytes of a file or more, is a pointer to a file stored elsewhere."""
    if len(data) < _POINTER_BYTES:
        for pattern, says in _POINTERS:
            if pattern.match(data):
                raise DataError(f"{path}: {says}")
        if _LINK.fullmatch(data) and (path.parent / os.fsdecode(data)).exists():
            raise DataError(
                f"{path}: holds the path {os.fsdecode(data)!r}, which exists: git stores a link so where links are "
                "switched off; put a link in its place (`git config core.symlinks true`, then check it out again), or "
                "remove it"
            )


def head(path: Path, *, any_text: bool = False) -> Head:
    """Look at the first bytes of a file.

    any_text: Accept every text, also one that begins with the letters of a format that is not read here.

    Raises DataError for pointers of Git LFS, for formats that cannot be read, and if the name promises a compressed
    file and the content is neither that nor text.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(_HEAD_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error
    check_pointer(path, data)
    promised = COMPRESSED_ENDINGS.get(path.suffix.lower())
    for format, magic in _MAGIC.items():
        if magic.match(data):
            note = None if promised == format else f"{path}: {format}, whatever its name says; it is decompressed"
            return Head(format, note)
    if (format := _unreadable_format(data)) and not (any_text and _is_text(data)):
        raise DataError(
            f"{path}: begins like a file of the format {format}, which is not read here; unpack it, or "
            "compress its content with gzip, bzip2, xz or zstd"
        )
    if promised is None:
        return Head(None, None)
    if not data or not _is_text(data):
        what = "empty" if not data else "damaged at its beginning, or of another format"
        raise DataError(f"{path}: not {promised} ({what}); fetch or compress it again")
    return Head(None, f"{path}: not {promised} but uncompressed text, whatever its name says; it is read as it is")


def chunks(path: Path, format: str | None) -> Iterator[bytes]:
    """Yield the contents of a file, decompressed, in pieces of at most 1 MiB.

    Raises DataError if a member is damaged or truncated, if other bytes follow a member, or if the file expands more
    than `MAX_EXPANSION` times.
    """
    try:
        with path.open("rb") as stream:
            source, total = _Input(stream), 0
            for piece in _pieces(source, format):
                if format and not total and (inner := _inner_format(piece)):
                    raise DataError(
                        f"{path}: its {format} data are themselves a file of the format {inner}; unpack it, so that "
                        "the corpus has its files"
                    )
                total += len(piece)
                if format and total > max(FREE_EXPANSION_BYTES, MAX_EXPANSION * source.fetched):
                    raise DataError(
                        f"{path}: {source.fetched:,} compressed bytes become more than {total:,}; a file that expands "
                        f"more than {MAX_EXPANSION} times is refused. Remove it, or decompress it first if it is meant"
                    )
                yield piece
    except Damage as damage:
        raise DataError(f"{path}: {damage}; fetch or compress it again") from None
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable_format(data: bytes) -> str | None:
    return next((format for format, magic in _UNREADABLE.items() if magic.match(data)), None)


def _inner_format(data: bytes) -> str | None:
    """The format of decompressed data that are an archive or compressed once more, or None."""
    if _is_text(data[:_HEAD_BYTES]):
        return None
    return next((format for format, magic in _MAGIC.items() if magic.match(data)), None) or _unreadable_format(data)


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror or error}); check the file and its permissions")


def _is_text(data: bytes) -> bool:
    if b"\0" in data:
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(data) - 4 and len(data) == _HEAD_BYTES  # a character that the limit cuts
    return True


class _Input:
    """A file that takes back bytes that were read too early. `position` is that of the next byte."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._ahead = stream, b""
        self.position = self.fetched = 0

    def take(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end of the file."""
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        if len(data) < size:
            more = self._stream.read(size - len(data))
            self.fetched += len(more)
            data += more
        self.position += len(data)
        return data

    def give_back(self, data: bytes) -> None:
        self._ahead = data + self._ahead
        self.position -= len(data)


def _pieces(source: _Input, format: str | None) -> Iterator[bytes]:
    if format is None:
        while data := source.take(_OUTPUT_BYTES):
            yield data
    elif format == "zstd":
        yield from _zstd_frames(source)
    else:
        yield from _members(source, format)


class _Gzip:
    """zlib behind the interface of the decompressors for bzip2 and xz."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, limit: int) -> bytes:
        piece = self._inner.decompress(self._inner.unconsumed_tail + data, limit)
        self.needs_input = len(piece) < limit and not self._inner.unconsumed_tail
        return piece


_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gzip": _Gzip,
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY),
}


def _members(source: _Input, format: str) -> Iterator[bytes]:
    number = 0
    while True:
        number += 1
        begin, unpacker = source.position, _DECOMPRESSORS[format]()
        while not unpacker.eof:
            data = b""
            if unpacker.needs_input and not (data := source.take(_CHUNK_BYTES)):
                raise Damage(f"truncated: ends inside member {number} of its {format} data, begun at byte {begin:,}")
            try:
                piece = unpacker.decompress(data, _OUTPUT_BYTES)
            except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, MemoryError) as error:
                raise Damage(
                    f"damaged {format} data in member {number}, which begins at byte {begin:,} ({error})"
                ) from None
            if piece:
                yield piece
        source.give_back(unpacker.unused_data)
        if not _another(source, format, number):
            return


def _another(source: _Input, format: str, number: int) -> bool:
    """Skip padding after member `number`. Returns False at the end of the file; raises Damage before junk."""
    begin, zeros = source.position, 0
    while data := source.take(_CHUNK_BYTES):
        rest = data.lstrip(b"\0") if format in ("gzip", "xz") else data
        zeros += len(data) - len(rest)
        if rest:
            source.give_back(rest)
            break
    if format == "xz" and zeros % 4:
        raise Damage(f"{zeros} zero bytes after member {number} at byte {begin:,}, not a multiple of 4: damaged")
    following = source.take(16)
    source.give_back(following)
    if following and not _MAGIC[format].match(following):
        raise Damage(
            f"after member {number} of its {format} data, at byte {source.position:,}, follows something that is not "
            f"{format}: a damaged member, or bytes that do not belong to the file"
        )
    return bool(following)


def _zstd_frames(source: _Input) -> Iterator[bytes]:
    """Decompress block by block: a block has at most 128 KiB of output, however few bytes it takes."""
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    number = 0
    while magic := source.take(4):
        number += 1
        begin = source.position - len(magic)
        where = f"frame {number}, which begins at byte {begin:,}"
        if len(magic) == 4 and _MAGIC["zstd"].match(magic) and magic != _ZSTD_MAGIC:
            _skip(source, int.from_bytes(_exactly(source, 4, where), "little"), where)
            continue
        if magic != _ZSTD_MAGIC:
            raise Damage(
                f"at byte {begin:,}, after {number - 1} zstd frames, follows something that is not zstd: a damaged "
                "frame, or bytes that do not belong to the file"
            )
        frame = unpacker.decompressobj()
        try:
            for part in _zstd_parts(source, where):
                if piece := frame.decompress(part):
                    yield piece
        except (zstandard.ZstdError, MemoryError) as error:
            raise Damage(f"damaged zstd data in {where} ({error})") from None
        if not frame.eof or frame.unused_data:
            raise Damage(f"damaged zstd data in {where} (its blocks and its header contradict each other)")


def _zstd_parts(source: _Input, where: str) -> Iterator[bytes]:
    """The bytes of a frame whose magic number was read: its header, each block, its checksum."""
    descriptor = _exactly(source, 1, where)
    flags = descriptor[0]
    single, checksum = flags >> 5 & 1, flags >> 2 & 1
    length = (1 - single) + (0, 1, 2, 4)[flags & 3] + (single, 2, 4, 8)[flags >> 6]
    yield _ZSTD_MAGIC + descriptor + _exactly(source, length, where)
    last = 0
    while not last:
        header = _exactly(source, 3, where)
        value = int.from_bytes(header, "little")
        last, kind, size = value & 1, value >> 1 & 3, value >> 3
        if kind == 3 or size > 128 << 10:
            raise Damage(f"damaged zstd data in {where} (a block that cannot be, before byte {source.position:,})")
        yield header + _exactly(source, 1 if kind == 1 else size, where)
    if checksum:
        yield _exactly(source, 4, where)


def _exactly(source: _Input, size: int, where: str) -> bytes:
    data = source.take(size)
    if len(data) < size:
        raise Damage(f"truncated: ends inside zstd {where}")
    return data


def _skip(source: _Input, size: int, where: str) -> None:
    while size:
        size -= len(_exactly(source, min(size, _CHUNK_BYTES), where))
