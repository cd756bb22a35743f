"""Pairs of a prompt and a target: rows of files and of the hub, and functions of the standard library."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from headway.data.corpus import folders, parquet, rows
from headway.data.corpus.config import PairsCorpus, StdlibFunctionsCorpus
from headway.data.corpus.document import Document
from headway.data.progress import Say, quiet

_SENTENCE = re.compile(r".+?[.!?](?=\s|$)", re.DOTALL)
_IS_PARQUET = re.compile(folders.ENDINGS["parquet"], re.IGNORECASE | re.DOTALL)


def row_pairs(
    corpus: PairsCorpus, files: folders.Found | None, *, say: Say = quiet, keys: Sequence[str] = ()
) -> Iterator[Document]:
    """Yield the pair of every row, including unusable ones (with `problem` set). `files`: None for a hub dataset.

    keys: What messages call the settings that name the fields, if not the keys of the corpus.

    Raises DataError if a file cannot be read or a field is missing.
    """
    keys = keys or (["corpus.article"] if corpus.article is not None else ["corpus.prompt", "corpus.target"])
    fields = [rows.Field(name, key) for name, key in zip(corpus.fields, keys, strict=True)]
    if files is None:
        yield from (_pair(row, corpus.separator) for row in rows.hub_rows(corpus, fields))
        return
    for path, id in files.taken.items():
        if _IS_PARQUET.fullmatch(path.name):
            found = parquet.parquet_rows(path, id, fields)
        else:
            found = rows.jsonl_rows(path, id, fields, say=say)
        yield from (_pair(row, corpus.separator) for row in found)


def _pair(row: rows.FieldRow, separator: str) -> Document:
    if row.values is None:
        return Document(row.id, row.origin, b"", "not_utf8")
    if len(row.values) == 1:
        return Document.article(row.id, row.origin, row.values[0], separator=separator)
    prompt, target = row.values
    return Document.pair(row.id, row.origin, prompt, target, separator=separator)


def function_pairs(corpus: StdlibFunctionsCorpus, id: str, path: Path, source: bytes) -> Iterator[Document]:
    """Yield a pair for each function of a Python file that has a docstring and another statement.

    The prompt is the function without its decorators and its docstring, not indented. The target is the first sentence
    of the docstring: up to the first `.`, `!` or `?` before a space, or its first paragraph if that has none. Files of
    the standard library that do not parse (they are templates) have no pair.
    """
    try:
        text = source.decode("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in old modules
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring, first = node.body[0], node.body[1]
        target = first_sentence(ast.get_docstring(node, clean=False) or "")
        # On one line with other code, the docstring cannot be cut out by lines.
        if not target or docstring.lineno == node.lineno or first.lineno == docstring.end_lineno:
            continue
        assert docstring.end_lineno is not None and node.end_lineno is not None
        kept = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
        name = f"{id}:{node.lineno}"
        prompt = textwrap.dedent("\n".join(kept))
        yield Document.pair(name, f"{path}:{node.lineno}", prompt, target, separator=corpus.separator)


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring on one line; empty if it begins with an example (`>>>`)."""
    paragraph = inspect.cleandoc(docstring).split("\n\n", 1)[0]
    if paragraph.startswith(">>>"):
        return ""
    found = _SENTENCE.match(paragraph)
    return " ".join((found[0] if found else paragraph).split())
