"""Documents of a corpus, in an order that depends only on the corpus.

Only the current document is held in memory. Rows of JSONL, Parquet and hub datasets: `headway.data.corpus.rows`.
"""

from __future__ import annotations

import codecs
import hashlib
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from headway.data import tokenizer
from headway.data.config import DataError
from headway.data.corpus import containers, cut, folders, pairs, parquet, rows
from headway.data.corpus.config import (
    AnyCorpus,
    CorpusConfig,
    FileCorpus,
    HuggingFaceCorpus,
    JsonlCorpus,
    PairsCorpus,
    ParquetCorpus,
    StdlibCorpus,
    StdlibFunctionsCorpus,
    TextCorpus,
    is_of_hub,
    is_stdlib,
)
from headway.data.corpus.document import MAX_DOCUMENT_BYTES, Document, check_size
from headway.data.manifest import canonical_json
from headway.data.progress import Say, quiet

# Tests are excluded because slim installations do not have them, so the corpus would differ between machines.
_STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_READERS = 2  # raised when readers give other documents for the same files, so that datasets are built again


def documents(corpus: AnyCorpus, files: folders.Found | None = None, *, say: Say = quiet) -> Iterator[Document]:
    """Yield all documents of `corpus`, including unusable ones (with `problem` set). `say` is told what is unusual.

    files: What `find_files` returned, if it was called before.

    Raises DataError if a path matches nothing, a file cannot be read, or a field is missing.
    """
    if isinstance(corpus, HuggingFaceCorpus):
        yield from rows.hub_documents(corpus)
        return
    if isinstance(corpus, PairsCorpus):
        found = None if is_of_hub(corpus) else files or find_files(corpus)
        yield from pairs.row_pairs(corpus, found, say=say)
        return
    taken = [(id, path) for path, id in (files or find_files(corpus)).taken.items()]
    match corpus:
        case StdlibFunctionsCorpus():
            for id, path in taken:
                yield from pairs.function_pairs(corpus, id, path, _unix_lines(_read(path)))
        case StdlibCorpus():
            for id, path in taken:
                yield Document.make(id, str(path), _unix_lines(_read(path)))
        case TextCorpus():
            for id, path in taken:
                yield from _text_documents(corpus, id, path, say)
        case JsonlCorpus():
            for id, path in taken:
                yield from rows.jsonl_documents(path, id, corpus.field, say=say)
        case ParquetCorpus():
            for id, path in taken:
                yield from parquet.parquet_documents(path, id, corpus.field)


def find_files(corpus: FileCorpus) -> folders.Found:
    """Every file of a corpus, sorted within each given path, without duplicates; and those that are left out.

    A folder stands for all files in it, recursively, except hidden ones (for JSONL, Parquet and pairs: those with the
    usual endings, `folders.ENDINGS`).
    """
    if isinstance(corpus, StdlibCorpus | StdlibFunctionsCorpus):
        return folders.Found(taken={path: id for id, path in _stdlib_files()})
    assert corpus.paths is not None, "a dataset of the hub has no files"
    return folders.find(corpus.paths, corpus.type)


def corpus_and_validation_files(cfg: CorpusConfig) -> tuple[folders.Found | None, folders.Found | None]:
    """Files of the corpus without those of the validation, and files of the validation; None where there are none.

    Raises DataError if no file is left for training.
    """
    if isinstance(cfg.corpus, HuggingFaceCorpus) or is_of_hub(cfg.corpus):
        return None, None
    files, corpus = find_files(cfg.corpus), cfg.validation_corpus()
    if corpus is None or isinstance(corpus, HuggingFaceCorpus):
        return files, None
    own = find_files(corpus)
    for path in [path for path in files.taken if path in own.taken]:
        del files.taken[path]
        files.leave_out(path, "for validation")
    if not files.taken:
        raise DataError("validation.paths: all files of the corpus are validation files; name fewer of them")
    return files, own


def corpus_files(corpus: FileCorpus) -> list[tuple[str, Path]]:
    """(id, path) of every file that `find_files` takes."""
    return [(id, path) for path, id in find_files(corpus).taken.items()]


def source_fingerprint(cfg: CorpusConfig) -> str:
    """Fingerprint that changes if the corpus may have changed: file names, sizes and mtimes, Python, tokenizer.

    For a hub dataset it does not change; only the settings identify it (set `revision` to pin it).
    """
    facts: list[object] = []
    if not isinstance(cfg.corpus, HuggingFaceCorpus) and not is_of_hub(cfg.corpus):
        facts += _states(cfg.corpus)
        if (own := cfg.validation_corpus()) is not None and not isinstance(own, HuggingFaceCorpus):
            facts.append(["validation", *_states(own)])
        if not isinstance(cfg.corpus, StdlibCorpus):
            facts.append(f"readers {_READERS}")
    if is_stdlib(cfg.corpus):
        facts.append(platform.python_version())
    if cfg.tokenizer.type == "file":
        facts.append(hashlib.sha256(tokenizer.read_file(cfg.tokenizer)).hexdigest())
    return hashlib.sha256(canonical_json(facts)).hexdigest()


def _states(corpus: FileCorpus) -> list[object]:
    """Path, size and modification time of every file."""
    found: list[object] = []
    for _id, path in corpus_files(corpus):
        stat = path.stat()
        found.append([str(path), stat.st_size, stat.st_mtime_ns])
    return found


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        # _sysconfigdata is written by the machine that built Python.
        skipped = _STDLIB_SKIPPED.intersection(relative.parts) or path.name.startswith("_sysconfigdata")
        if not skipped and path.is_file():
            found.append((relative.as_posix(), path))
    if not found:
        raise DataError(f"{root}: no Python source here; use a Python with its library, or a `text` corpus")
    return found


def _text_documents(corpus: TextCorpus, id: str, path: Path, say: Say) -> Iterator[Document]:
    """Documents of a text file, compressed or not, without its byte order mark and with the line ends of Unix."""
    found = containers.head(path, any_text=True)
    if found.note:
        say(found.note)
    pieces = containers.chunks(path, found.format)
    if corpus.document == "file":
        yield _whole(pieces, id, path)
    else:
        yield from cut.cut(pieces, corpus.document, id, str(path))


def _whole(pieces: Iterable[bytes], id: str, path: Path) -> Document:
    data, encoding = bytearray(), "utf-8"
    for piece in pieces:
        if not data:
            encoding = cut.encoding_of(piece)
        data += piece
        if len(data) > MAX_DOCUMENT_BYTES * (1 if encoding == "utf-8" else 2) + 4:
            check_size(len(data), str(path))
    text: bytes | str = bytes(data)
    if encoding == "utf-8":
        text = text.removeprefix(codecs.BOM_UTF8)
    else:
        try:
            text = text.decode(encoding).encode("utf-8")
        except UnicodeError:
            return Document(id, str(path), b"", "not_utf8")
    return Document.make(id, str(path), _unix_lines(text))


def _unix_lines(text: bytes) -> bytes:
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in text else text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
