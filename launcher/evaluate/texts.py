"""Losses of texts: of files, or of the validation split of a dataset, document by document.

Each document is predicted from its beginning on, after the end-of-document token, with as much context as a training
sequence has. Its own end is not predicted. Of a pair of a prompt and a target, the target and its end are predicted, as
in training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from headway.data.config import DataConfig, DataError, MixSource, SyntheticSource, datasets_of
from headway.data.corpus.folders import Found
from headway.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from headway.data.packed_pairs import shortened
from headway.launcher.base import console
from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.base.loss_unit import PER_TARGET, PER_TOKEN
from headway.launcher.evaluate.measure import Measure, ratio
from headway.launcher.evaluate.scorer import Row, Scorer
from headway.launcher.exchange.opened import Opened

NO_BYTES = "the tokenizer loses text; bits per byte, which would count text that the model never sees, are left out"

_AT_ONCE = 64
"""Documents that are scored together."""


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A text to evaluate: a dataset (its validation split), or files (.jsonl, .parquet, others are plain text).

    `remote`, `cache_bytes`: of a dataset whose shards `path` caches.
    """

    name: str
    path: Path
    remote: str | None = None
    cache_bytes: int | None = None

    @classmethod
    def parse(cls, text: str, option: str = "--text") -> TextSource:
        """`PATH` or `NAME=PATH`, the value of `option`. Raises SpecError if a part is empty."""
        name, given, path = text.rpartition("=")
        source = cls(name=name if given else Path(path).name.split(".")[0], path=Path(path).expanduser())
        if not source.name or not path or "/" in source.name:
            raise SpecError(f"{option} {text!r}: give PATH or NAME=PATH, such as books=texts/books.jsonl")
        return source


def own_sources(data: DataConfig) -> list[TextSource]:
    """The validation of a run: that of each of its datasets and of each of its further sets."""
    if isinstance(data.source, SyntheticSource):
        return []
    parts = datasets_of(data.source)
    names = [part.title() for part in data.source.sources] if isinstance(data.source, MixSource) else ["validation"]
    sources = [
        TextSource(name=n, path=Path(part.path).expanduser(), remote=part.remote, cache_bytes=part.cache_bytes)
        for n, part in zip(names, parts, strict=True)
    ]
    return sources + [TextSource(name=name, path=Path(path).expanduser()) for name, path in data.validation.items()]


def evaluate_text(
    model: Opened,
    source: TextSource,
    *,
    limit: int | None,
    done: Callable[[int], None],
) -> list[Measure]:
    """Nats per token (of pairs: per target token) and bits per byte of the first `limit` documents, with intervals. No
    bits per byte if the tokenizer loses text of them.

    Raises DataError if a dataset has another tokenizer than the model or there is no document, NoInputError if there
    is no such file.
    """
    scorer = Scorer(model)
    losses: list[float] = []
    tokens: list[float] = []
    size: list[float | None] = []
    rows: list[Row] = []

    def flush() -> None:
        for predicted in scorer.score(rows, done):
            losses.append(-predicted.total)
            tokens.append(len(predicted.log_p))
        rows.clear()

    for row, text_bytes in islice(documents_of(model, source), limit):
        rows.append(row)
        size.append(text_bytes)
        if len(rows) == _AT_ONCE:
            flush()
    flush()
    if not losses:
        raise DataError(f"{source.path}: has no document with text; name another file or folder")
    measures = [ratio(f"{source.name}/loss", losses, tokens, unit=_unit(source.path))]
    known = [each for each in size if each is not None]
    if len(known) == len(size):
        per_byte = ratio(f"{source.name}/bits_per_byte", losses, known, unit="nats per byte")
        measures.append(per_byte.scaled(per_byte.name, 1 / math.log(2), "bits per byte"))
    else:
        console.note(f"note: {source.name}: {NO_BYTES}")
    return [replace(measure, digest=scorer.digest) for measure in measures]


def _unit(path: Path) -> str:
    """Unit of the loss of a text or dataset: of pairs, targets alone are predicted."""
    is_dataset = (path / MANIFEST_NAME).is_file()
    return PER_TARGET if is_dataset and read_manifest(path).pairs is not None else PER_TOKEN


def documents_of(model: Opened, source: TextSource) -> Iterator[tuple[Row, int | None]]:
    """(tokens of a document and those that are predicted, bytes of their text) of the documents that have text.

    The bytes are None if the tokenizer loses text.
    """
    is_dataset = (source.path / MANIFEST_NAME).is_file()
    return _of_dataset(model, source) if is_dataset else _of_files(model, source.path)


def pair_row(model: Opened, prompt: Sequence[int], target: Sequence[int], separator: int, limit: int) -> Row:
    """The tokens of a pair, of which those of the target are predicted, as in training.

    prompt: With the `separator` tokens at its end; it loses tokens before them, so that a pass of `limit` tokens reads
    the pair. Of an encoder-decoder, it loses tokens so that the encoder reads it in a sequence of its training.
    """
    if not model.is_encoder_decoder:
        kept = shortened(prompt, separator, max(separator + 1, limit + 1 - len(target)))
        return Row([*kept, *target], len(kept))
    start, source = start_and_source(model, prompt, separator)
    return Row([*start, *target], len(start), source)


def start_and_source(model: Opened, prompt: Sequence[int], separator: int) -> tuple[list[int], list[int]]:
    """(ids that start a target, ids that the encoder reads) of a prompt with the `separator` tokens at its end.

    A model that was not trained on pairs starts as one that was trained on these. Raises SpecError for weights that do
    not say how they start.
    """
    end = len(prompt) - separator
    eos_id = model.codec.eos_id
    assert eos_id is not None, "the model knows text"
    start = model.start_ids or (*prompt[end:],) or (eos_id,)
    return [*start], [*prompt[: min(end, model.source_limit)]]


def _begin(model: Opened, path: Path) -> int:
    if model.codec.tokenizer is None or model.codec.eos_id is None:
        raise SpecError(
            f"--text {path}: this model knows token ids, not text (synthetic data, or weights without a tokenizer); "
            "use --recall for a model of synthetic data"
        )
    return model.codec.eos_id if model.codec.bos_id is None else model.codec.bos_id


def check_tokenizer(model: Opened, root: Path, manifest: Manifest) -> None:
    """Raise DataError if a dataset has another tokenizer than the model."""
    from headway.data import tokenizer

    if model.codec.file is None or tokenizer.sha256_of(model.codec.file) != manifest.tokenizer_sha256:
        raise DataError(
            f"{root}: was built with another tokenizer than the model's {model.codec.file}, so its token ids mean "
            "other text; name the text files themselves, or build the dataset with `tokenizer: {type: file, path: ...}`"
        )


def _of_dataset(model: Opened, source: TextSource) -> Iterator[tuple[Row, int | None]]:
    from headway.data.mds import MdsSplit

    root = source.path
    begin, manifest = _begin(model, root), read_manifest(root)
    check_tokenizer(model, root, manifest)
    if manifest.pairs is None:
        model.decoder_for(f"the loss of a text, such as {root},")
    split = MdsSplit(root, "validation", remote=source.remote, cache_bytes=source.cache_bytes)
    for number in range(len(split)):
        ids = split.tokens(number).tolist()
        first = 0 if split.prompts is None else int(split.prompts[number])
        text = ids[first:-1]  # without the end of the document
        size = None if manifest.lossy is not None else model.codec.text_bytes(text)
        if manifest.pairs is not None:
            separator, limit = len(manifest.pairs.separator_ids), Scorer(model).limit
            yield pair_row(model, ids[:first], ids[first:], separator, limit), size
        elif text:
            yield Row([begin, *text], 1), size


def _of_files(model: Opened, path: Path) -> Iterator[tuple[Row, int | None]]:
    from headway.data.corpus import folders
    from headway.data.corpus.config import JsonlCorpus, ParquetCorpus, TextCorpus
    from headway.data.corpus.read import documents, find_files

    begin = _begin(model, path)
    assert model.codec.tokenizer is not None
    model.decoder_for(f"the loss of a text, such as {path},")
    if not path.exists():
        raise NoInputError(f"{path}: no such file or folder; name a text, a .jsonl or .parquet file, or a dataset")
    there = folders.find([str(path)], "text").taken
    names = [file.name for file in there]

    def has(kind: str) -> bool:
        return any(re.fullmatch(folders.ENDINGS[kind], name, re.IGNORECASE | re.DOTALL) for name in names)

    if has("jsonl"):
        corpus = JsonlCorpus(type="jsonl", paths=[str(path)])
    elif has("parquet"):
        corpus = ParquetCorpus(type="parquet", paths=[str(path)])
    else:
        corpus = TextCorpus(type="text", paths=[str(path)])
    files = find_files(corpus)
    note_left_out(path, corpus.type, files)
    for document in documents(corpus, files):
        if document.problem == "empty":
            continue
        if document.problem is not None:
            raise DataError(f"{document.origin}: is no text ({document.problem}); remove it from {path}")
        text = document.text.decode("utf-8")
        ids = model.codec.tokenizer.encode([text])[0]
        if len(ids):
            yield Row([begin, *ids], 1), None if model.codec.loses(text, ids) else len(document.text)


def note_left_out(path: Path, kind: str, files: Found) -> None:
    """Name the files of a folder that are not read, because others have an ending of `kind`."""
    if count := files.left_out.total():
        names = [str(file) for examples in files.examples.values() for file in examples]
        console.note(
            f"note: {path}: {len(files.taken):,} files of the type {kind} are read, {count:,} others left out: "
            f"{', '.join(names)}{', ...' if count > len(names) else ''}"
        )
