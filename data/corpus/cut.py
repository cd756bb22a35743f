"""Documents cut from a text: its paragraphs, its lines, or pieces of equal size.

The text is read in pieces, so memory holds one document. Line ends become those of Unix.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from headway.data.corpus.config import BytePieces
from headway.data.corpus.document import Document, check_size

# UTF-32 first: its little-endian mark begins with that of UTF-16.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def encoding_of(head: bytes) -> str:
    """Encoding of a text by its byte order mark; UTF-8 without one."""
    return next((name for mark, name in BYTE_ORDER_MARKS if head.startswith(mark)), "utf-8")


def cut(pieces: Iterable[bytes], how: BytePieces | str, id: str, origin: str) -> Iterator[Document]:
    """Yield the documents of a text, which is given in pieces of any size. Blank documents are left out.

    how: "line", "blank_line" (a document ends at one or more blank lines) or a number of bytes.

    A text in UTF-16 or UTF-32 that is damaged ends with a document whose `problem` is set. Raises DataError for a
    document beyond the size limit.
    """
    text = _unix_lines(_utf8(pieces))
    try:
        if isinstance(how, BytePieces):
            yield from _by_size(text, how.bytes, id, origin)
        else:
            yield from _by_lines(text, id, origin, paragraphs=how == "blank_line")
    except UnicodeError:
        yield Document(id, origin, b"", "not_utf8")


def _utf8(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The text as UTF-8, without its byte order mark. Text in UTF-8 is not checked here."""
    decoder: codecs.IncrementalDecoder | None = None
    begun = False
    for piece in pieces:
        if not begun:
            begun = True
            if (encoding := encoding_of(piece)) != "utf-8":
                decoder = codecs.getincrementaldecoder(encoding)()
            piece = piece.removeprefix(codecs.BOM_UTF8) if decoder is None else piece
        yield piece if decoder is None else decoder.decode(piece).encode("utf-8")
    if decoder is not None:
        yield decoder.decode(b"", final=True).encode("utf-8")


def _unix_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    held = b""
    for piece in pieces:
        piece, held = held + piece, b""
        if piece.endswith(b"\r"):  # perhaps the first half of a line end
            piece, held = piece[:-1], b"\r"
        yield piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if held:
        yield b"\n"


def _by_lines(text: Iterable[bytes], id: str, origin: str, *, paragraphs: bool) -> Iterator[Document]:
    lines: list[bytes] = []
    first = size = 0
    for number, line in _lines(text, origin):
        blank = not line.strip()
        if lines and (blank or not paragraphs):
            yield _document(lines, first, id, origin)
            lines, size = [], 0
        if blank:
            continue
        first = first if lines else number
        lines.append(line)
        size += len(line) + 1
        check_size(size - 1, f"{origin}:{first}")
    if lines:
        yield _document(lines, first, id, origin)


def _document(lines: list[bytes], first: int, id: str, origin: str) -> Document:
    return Document.make(f"{id}:{first}", f"{origin}:{first}", b"\n".join(lines))


def _lines(text: Iterable[bytes], origin: str) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line without its end)."""
    rest, number = bytearray(), 1
    for piece in text:
        *whole, end = piece.split(b"\n")
        for line in whole:
            yield number, bytes(rest) + line
            rest.clear()
            number += 1
        rest += end
        check_size(len(rest), f"{origin}:{number}")
    if rest:
        yield number, bytes(rest)


def _by_size(text: Iterable[bytes], size: int, id: str, origin: str) -> Iterator[Document]:
    rest, offset = bytearray(), 0
    for piece in text:
        rest += piece
        begin = 0
        while len(rest) - begin > size:
            end = character_start(rest, begin + size)
            yield from _piece(bytes(rest[begin:end]), offset + begin, id, origin)
            begin = end
        del rest[:begin]
        offset += begin
    yield from _piece(bytes(rest), offset, id, origin)


def _piece(text: bytes, offset: int, id: str, origin: str) -> Iterator[Document]:
    if text.strip():
        yield Document.make(f"{id}@{offset}", f"{origin}, byte {offset:,}", text)


def character_start(text: bytes | bytearray, at: int) -> int:
    """The last position <= `at` at which a character of UTF-8 begins; `at` itself in text that is not UTF-8."""
    for start in range(at, max(at - 4, 0), -1):
        if text[start] & 0xC0 != 0x80:
            return start
    return at
