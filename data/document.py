"""What every corpus is read as: documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headway.data.config import DataError

# Encoding takes about 125 bytes of memory a byte of text (measured), and a document is encoded in one piece.
MAX_DOCUMENT_BYTES = 32 << 20

Problem = Literal["empty", "not_utf8"]


@dataclass(frozen=True, slots=True)
class Document:
    """One document: `id` does not depend on where the corpus lies; `origin` is what a user can open.

    `text` is UTF-8. When `problem` is set, `text` is empty and the document cannot be used.
    """

    id: str
    origin: str
    text: bytes
    problem: Problem | None = None

    @staticmethod
    def make(id: str, origin: str, text: bytes | str | None) -> Document:
        """A checked document: UTF-8, not blank."""
        try:
            data = b"" if text is None else text.encode("utf-8") if isinstance(text, str) else text
            if not isinstance(text, str):
                data.decode("utf-8")
        except UnicodeError:
            return Document(id, origin, b"", "not_utf8")
        if not data.strip():
            return Document(id, origin, b"", "empty")
        if len(data) > MAX_DOCUMENT_BYTES:
            raise DataError(
                f"{origin}: a document of {len(data):,} bytes; the limit is {MAX_DOCUMENT_BYTES:,}. "
                "Split it into several files, or into lines of a .jsonl file"
            )
        return Document(id, origin, data)
