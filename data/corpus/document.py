"""Documents, the common form of all corpora."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headway.data.config import DataError

# Encoding needs about 125 bytes of memory per byte of text (measured), and a document is encoded at once.
MAX_DOCUMENT_BYTES = 32 << 20

Problem = Literal["empty", "not_utf8", "binary", "empty_prompt", "empty_target", "one_line"]
"""binary: more than three NUL bytes and more than 1 %: UTF-16 without a byte order mark, or a file that was lost.
one_line: an article that has a first paragraph and nothing else.
"""


@dataclass(frozen=True, slots=True)
class Document:
    """One document.

    id: Does not depend on the location of the corpus.
    origin: Path (and line or row) that a user can open.
    text: UTF-8; empty if `problem` is set.
    problem: Why the document cannot be used, or None.
    prompt_bytes: Of a pair, whose text is prompt, separator and target: bytes of the prompt. None for other documents.
    """

    id: str
    origin: str
    text: bytes
    problem: Problem | None = None
    prompt_bytes: int | None = None

    @staticmethod
    def make(id: str, origin: str, text: bytes | str | None) -> Document:
        """Create a document and check that its text is UTF-8 and not blank. Raises DataError if it is too large."""
        if text is not None:
            check_size(len(text), origin)  # characters, before they are encoded
        try:
            data = b"" if text is None else text.encode("utf-8") if isinstance(text, str) else text
            if not isinstance(text, str):
                data.decode("utf-8")
        except UnicodeError:
            return Document(id, origin, b"", "not_utf8")
        if not data.strip():
            return Document(id, origin, b"", "empty")
        if (nuls := data.count(0)) > 3 and nuls * 100 > len(data):
            return Document(id, origin, b"", "binary")
        check_size(len(data), origin)
        return Document(id, origin, data)

    @staticmethod
    def pair(
        id: str, origin: str, prompt: bytes | str | None, target: bytes | str | None, *, separator: str
    ) -> Document:
        """Create the document of a pair. Raises DataError if it is too large."""
        parts = Document.make(id, origin, prompt), Document.make(id, origin, target)
        if problem := parts[0].problem or parts[1].problem:
            if problem == "empty":
                problem = "empty_prompt" if parts[0].problem else "empty_target"
            return Document(id, origin, b"", problem)
        text = b"".join([parts[0].text, separator.encode(), parts[1].text])
        check_size(len(text), origin)
        return Document(id, origin, text, prompt_bytes=len(parts[0].text))

    @staticmethod
    def article(id: str, origin: str, text: bytes | str | None, *, separator: str) -> Document:
        """Create the pair of an article: its first line that is not blank is the target, the rest is the prompt.

        Spaces around both are removed. Raises DataError if it is too large.
        """
        whole = Document.make(id, origin, text)
        if whole.problem is not None:
            return whole
        target, _, prompt = whole.text.strip().partition(b"\n")
        if not prompt.strip():
            return Document(id, origin, b"", "one_line")
        return Document.pair(id, origin, prompt.strip(), target.strip(), separator=separator)


def check_size(size: int, origin: str) -> None:
    """Raise DataError if a document of `size` bytes is too large."""
    if size > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{origin}: a document of {size:,} bytes; the limit is {MAX_DOCUMENT_BYTES:,}. "
            "Split it into several files, or into lines of a .jsonl file"
        )
