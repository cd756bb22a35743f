"""`headway data build`: converts a corpus to a tokenizer, MDS shards and a manifest.

The corpus is read once. Its text is spooled to a temporary file while the tokenizer is trained and applied, so memory
holds one batch of documents and a few bytes per document. The dataset is built in a folder next to the target and
renamed when it is complete, so an interrupted build changes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import platform
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headway.data import tokenizer
from headway.data.config import DataError, MdsSource
from headway.data.corpus import folders, read
from headway.data.corpus.config import CorpusConfig, TextCorpus, TokenizerFile, TrainTokenizer, is_stdlib
from headway.data.corpus.scan import Scan, scan
from headway.data.manifest import (
    LENGTHS_NAME,
    MANIFEST_NAME,
    PROMPTS_NAME,
    SCHEMA_VERSION,
    SPLITS,
    TOKENIZER_NAME,
    CorpusFiles,
    LeftOut,
    Lossy,
    Manifest,
    PairCounts,
    Split,
    SplitCounts,
    hash_file,
    read_manifest,
    write_manifest,
)
from headway.data.mds import unigram_entropy
from headway.data.progress import Reporter, Shown, progress_of, to_stderr
from headway.data.shard import ShardWriter
from headway.data.verify import verify

# Encoding needs about 125 bytes of memory per byte of text, so the batch size limits the memory. Longer documents are
# encoded in pieces if the tokenizer allows it.
_BATCH_BYTES = 2 << 20


def build(
    cfg: CorpusConfig, *, out: Path | None = None, progress: Shown = False, say: Callable[[str], None] = to_stderr
) -> Manifest:
    """Build the dataset of `cfg` in `out` (default: `cfg.out_dir()`), unless it is there, valid and up to date.

    `progress` shows the progress; `say` is called with whole lines that report each step and its result.
    Raises DataError if the corpus is not usable, if the folder contains something else, if the disk is full, or if
    another process is building the same dataset.
    """
    reporter = Reporter(progress=progress_of(progress), say=say)
    target = (Path(out) if out is not None else cfg.out_dir()).expanduser().resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            _tidy_up(target)
            source = read.source_fingerprint(cfg)
            current = _current(cfg, target, source, reporter)
            if current is not None:
                say(f"{target}: up to date, fingerprint {current.fingerprint[:12]}; nothing to do")
                return current
            manifest = _build_beside(cfg, target, source, reporter)
    except OSError as error:
        raise DataError(
            f"{error.filename or target}: {error.strerror or error}; nothing was changed. Free space or fix the "
            "permissions and run the same command again, or give another `out`"
        ) from error
    of_targets = ""
    if (pairs := manifest.pairs) is not None:
        of_targets = f" (of targets: {pairs.train_target_tokens:,} and {pairs.validation_target_tokens:,})"
    say(
        f"{target}: {manifest.train.tokens:,} training and {manifest.validation.tokens:,} validation tokens"
        f"{of_targets}, vocabulary {manifest.vocab_size:,}, fingerprint {manifest.fingerprint[:12]}"
    )
    return manifest


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Hold TARGET.lock, and remove it at the end. Raises DataError if another process holds it."""
    path = Path(f"{target}.lock")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A holder may remove the file between the two calls above: then another process can lock a new one.
            ours = path.exists() and path.stat().st_ino == os.fstat(fd).st_ino
        except BlockingIOError:
            ours = False
        if not ours:
            raise DataError(f"{target}: another process is building it; wait for it, or give this build another `out`")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _tidy_up(target: Path) -> None:
    """Remove the folders of an interrupted build. If it stopped between its two renames, undo the first one."""
    left = re.compile(re.escape(target.name) + r"\.(replaced|building)-[0-9]+")
    for path in sorted(target.parent.iterdir()):
        match = left.fullmatch(path.name)
        if match is None:
            continue
        if match[1] == "replaced" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path)


def _settings(cfg: CorpusConfig) -> dict[str, Any]:
    """What decides about the dataset, as older datasets have it: newer keys only where they are not the default."""
    settings = cfg.model_dump(mode="json", exclude={"out"})
    if cfg.validation is None:
        del settings["validation"]
    else:
        settings["validation"] = cfg.validation.model_dump(mode="json", exclude_none=True)
        del settings["validation_fraction"]
    if isinstance(cfg.corpus, TextCorpus) and cfg.corpus.document == "file":
        del settings["corpus"]["document"]
    return settings


def _current(cfg: CorpusConfig, target: Path, source: str, reporter: Reporter) -> Manifest | None:
    """Manifest of the dataset in `target` if it is valid and up to date; None if it must be built."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    if not (target / MANIFEST_NAME).is_file():
        raise DataError(
            f"{target}: exists and is not a dataset (no {MANIFEST_NAME}); give another `out`, or remove it by hand"
        )
    try:
        manifest = read_manifest(target)
    except DataError as error:
        reporter.say(f"{error}\n{target}: rebuilding it")
        return None
    if manifest.name != cfg.name:
        raise DataError(
            f"{target}: contains the dataset {manifest.name!r}, not {cfg.name!r}; give another `out`, or remove it by "
            "hand"
        )
    try:
        if manifest.settings != _settings(cfg) or manifest.source_fingerprint != source:
            reporter.say(f"{target}: settings or corpus changed; rebuilding it")
            return None
        verify(MdsSource(type="mds", path=str(target)), progress=reporter.progress)
    except DataError as error:
        reporter.say(f"{error}\n{target}: rebuilding it")
        return None
    return manifest


def _build_beside(cfg: CorpusConfig, target: Path, source: str, reporter: Reporter) -> Manifest:
    staging = target.with_name(f"{target.name}.building-{os.getpid()}")
    replaced = target.with_name(f"{target.name}.replaced-{os.getpid()}")
    staging.mkdir()
    try:
        manifest = _fill(cfg, staging, source, reporter)
        if target.exists():
            target.rename(replaced)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    return manifest


def _fill(cfg: CorpusConfig, folder: Path, source: str, reporter: Reporter) -> Manifest:
    spool = folder / "text.spool"
    files, own = read.corpus_and_validation_files(cfg)
    for line in [line for part in (files, own) if part is not None for line in folders.summary(part)]:
        reporter.say(line)
    found = scan(cfg, spool, files=files, own=own, progress=reporter.progress, say=reporter.say)
    reporter.say(f"corpus: {_number_of_files(files, own)}{found.summary()}")
    with spool.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
        chosen = _tokenizer(cfg, found, text, folder / TOKENIZER_NAME, reporter)
        written = {split: _write_split(cfg, split, found, text, chosen, folder, reporter) for split in SPLITS}
    spool.unlink()
    train, validation = written["train"], written["validation"]
    lossy = _lossy(train, validation, reporter)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=cfg.name,
        settings=_settings(cfg),
        source_fingerprint=source,
        python=platform.python_version() if is_stdlib(cfg.corpus) else None,
        train=train.counts,
        validation=validation.counts,
        left_out=LeftOut(**found.left_out),
        corpus_files=None if files is None else _corpus_files(files, own),
        tokenizer_sha256=tokenizer.sha256_of(folder / TOKENIZER_NAME),
        vocab_size=chosen.vocab_size,
        eos_id=chosen.eos_id,
        max_token_id=max(int(np.flatnonzero(part.token_counts)[-1]) for part in written.values()),
        dtype=_dtype(chosen.vocab_size),
        unigram_entropy_nats=unigram_entropy(train.token_counts, validation.token_counts),
        validation_bytes_per_token=None if lossy else validation.counts.text_bytes / validation.counts.tokens,
        pairs=_pair_counts(cfg, chosen, train, validation),
        lossy=lossy,
        files={name: hash_file(folder / name) for name in names},
        fingerprint="0" * 64,
    )
    manifest = manifest.sealed()
    write_manifest(folder, manifest)
    return manifest


def _pair_counts(
    cfg: CorpusConfig, chosen: tokenizer.CorpusTokenizer, train: _Written, validation: _Written
) -> PairCounts | None:
    if cfg.separator is None:
        return None
    return PairCounts(
        separator=cfg.separator,
        separator_ids=[*chosen.encode([cfg.separator])[0]],
        train_target_tokens=train.target_tokens,
        validation_target_tokens=validation.target_tokens,
        validation_target_bytes=validation.target_bytes,
    )


def _number_of_files(files: folders.Found | None, own: folders.Found | None) -> str:
    if files is None:
        return ""
    beside = "" if own is None else f" and {len(own.taken):,} for validation"
    return f"{len(files.taken):,} file{'s' * (len(files.taken) != 1)}{beside}, "


def _corpus_files(files: folders.Found, own: folders.Found | None) -> CorpusFiles:
    parts = [files] if own is None else [files, own]
    examples = [str(path) for part in parts for paths in part.examples.values() for path in paths]
    left_out = sum((part.left_out for part in parts), Counter[str]())
    return CorpusFiles(taken=sum(len(part.taken) for part in parts), left_out=dict(left_out), examples=examples[:100])


def _dtype(vocab_size: int) -> Any:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _tokenizer(
    cfg: CorpusConfig, found: Scan, text: mmap.mmap, out: Path, reporter: Reporter
) -> tokenizer.CorpusTokenizer:
    if not isinstance(cfg.tokenizer, TrainTokenizer):
        return tokenizer.take_file(cfg.tokenizer, out=out)
    limit = cfg.tokenizer.max_train_bytes

    def training_texts() -> Iterator[str]:
        # In hash order, so that a limit takes a random sample of the corpus instead of its beginning.
        taken = 0
        for document in found.order["train"]:
            if taken >= limit:
                return
            data = found.text(text, document)
            taken += len(data)
            yield data.decode("utf-8")

    chosen = tokenizer.train(cfg.tokenizer, training_texts(), out=out, progress=reporter.progress)
    if chosen.vocab_size < cfg.tokenizer.vocab_size:
        reporter.say(
            f"tokenizer: the corpus gives only {chosen.vocab_size:,} tokens, fewer than vocab_size "
            f"{cfg.tokenizer.vocab_size:,}; the dataset has a vocabulary of {chosen.vocab_size:,}"
        )
    return chosen


@dataclass(frozen=True, kw_only=True)
class _Written:
    counts: SplitCounts
    token_counts: np.ndarray  # [vocabulary] occurrences of each token
    lost: int  # documents that their tokens do not give back
    example: str
    spaced: int  # documents that come back with a space in front
    target_tokens: int = 0  # of pairs
    target_bytes: int = 0


def _lossy(train: _Written, validation: _Written, reporter: Reporter) -> Lossy | None:
    lost, spaced = train.lost + validation.lost, train.spaced + validation.spaced
    documents = train.counts.documents + validation.counts.documents
    if spaced:
        reporter.say(
            f"tokenizer: puts a space before the text (add_prefix_space) of {spaced:,} of {documents:,} documents, so "
            "a text with and one without it have the same tokens; no text is lost"
        )
    if not lost:
        return None
    example = train.example or validation.example
    reporter.say(
        f"WARNING: the tokenizer loses text: the tokens of {lost:,} of {documents:,} documents do not give the "
        f"document back ({example}); recorded in {MANIFEST_NAME}, without bytes per token"
    )
    return Lossy(documents=lost, example=example)


def _check_loss(
    cfg: CorpusConfig,
    chosen: tokenizer.CorpusTokenizer,
    names: list[str],
    texts: list[str],
    ids: Sequence[Sequence[int]],
) -> tuple[int, int, str]:
    """Documents of a batch that come back with a space in front, that do not come back, and the first of these.

    A space in front is how many tokenizers mark the beginning of a word. It loses no text, and a loss per byte counts
    a byte too few. Raises DataError for other losses unless the corpus spec allows them.
    """
    changed = chosen.lost(texts, ids)
    lost = [(number, back) for number, back in changed if back != f" {texts[number]}"]
    spaced = len(changed) - len(lost)
    if not lost:
        return spaced, 0, ""
    number, back = lost[0]
    text = texts[number]
    back = back[1:] if back[:1] == " " != text[:1] else back  # show what is lost, not a space that is put in front
    at = next((n for n, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    begin = max(0, at - 10)
    example = f"{names[number]}: {text[begin : at + 20]!r} comes back as {back[begin : at + 20]!r}"
    if isinstance(cfg.tokenizer, TokenizerFile) and cfg.tokenizer.lossy == "allow":
        return spaced, len(lost), example
    raise DataError(
        f"{chosen.name}: loses text: the tokens of {len(lost):,} of the first {len(texts):,} documents do not give the "
        f"document back ({example}). A loss per byte would count text that the model never sees. Use a byte-level "
        "tokenizer, or tokenizer.type: train_bpe; tokenizer.lossy: allow accepts it and records it"
    )


def _write_split(
    cfg: CorpusConfig,
    split: Split,
    found: Scan,
    text: mmap.mmap,
    chosen: tokenizer.CorpusTokenizer,
    folder: Path,
    reporter: Reporter,
) -> _Written:
    """Encode a split and write its shards: one sample per document, in hash order."""
    order = found.order[split]
    dtype = np.dtype(_dtype(chosen.vocab_size))
    lengths = np.empty(len(order), dtype="<u4")
    token_counts = np.zeros(chosen.vocab_size, dtype=np.int64)
    text_bytes = int(found.lengths[order].sum())
    writer = ShardWriter(folder / split, dtype=dtype, compression=cfg.compression, shard_bytes=cfg.shard_bytes)
    prompts = None if found.prompts is None else np.empty(len(order), dtype="<u4")
    row = lost = spaced = 0
    first_lost = ""
    with writer, reporter.progress(f"encode {split}", text_bytes, "B") as bar:
        for batch in _batches(found, order):
            encoded, (more_spaced, more_lost, example) = _encoded(cfg, found, text, chosen, batch)
            spaced, lost, first_lost = spaced + more_spaced, lost + more_lost, first_lost or example
            if prompts is not None:
                prompts[row : row + len(batch)] = [before for _, before in encoded]
            for document, (ids, _) in zip(batch, encoded, strict=True):
                if ids and max(ids) >= chosen.vocab_size:
                    raise DataError(
                        f"{found.ids[document]}: the tokenizer gives the token id {max(ids)}, beyond its vocabulary of "
                        f"{chosen.vocab_size}; its tokenizer.json contradicts itself, so use another one"
                    )
                chosen.check_ends(ids, found.ids[document])
                tokens = np.empty(len(ids) + 1, dtype=dtype)
                tokens[:-1], tokens[-1] = ids, chosen.eos_id
                token_counts += np.bincount(tokens, minlength=chosen.vocab_size)
                writer.write(found.ids[document], tokens)
                lengths[row] = len(tokens)
                row += 1
            bar.update(int(found.lengths[batch].sum()))
    np.save(folder / split / LENGTHS_NAME, lengths, allow_pickle=False)
    of_targets = {}
    if prompts is not None and found.prompts is not None and cfg.separator is not None:
        np.save(folder / split / PROMPTS_NAME, prompts, allow_pickle=False)
        before = int(found.prompts[order].sum()) + len(order) * len(cfg.separator.encode())
        of_targets["target_tokens"] = int(lengths.sum(dtype=np.int64)) - int(prompts.sum(dtype=np.int64))
        of_targets["target_bytes"] = text_bytes - before
    counts = SplitCounts(documents=len(order), tokens=int(lengths.sum(dtype=np.int64)), text_bytes=text_bytes)
    found_losses = {"lost": lost, "example": first_lost, "spaced": spaced}
    return _Written(counts=counts, token_counts=token_counts, **found_losses, **of_targets)


def _encoded(
    cfg: CorpusConfig, found: Scan, text: mmap.mmap, chosen: tokenizer.CorpusTokenizer, batch: np.ndarray
) -> tuple[list[tuple[Sequence[int], int]], tuple[int, int, str]]:
    """([(ids of a document, how many of them belong to a prompt)], what `_check_loss` says about the batch).

    Prompt, separator and target of a pair are encoded apart, so that a prompt has the ids that it has without a target.
    """
    names = [found.ids[document] for document in batch]
    if found.prompts is None or cfg.separator is None:
        texts = [found.text(text, document).decode("utf-8") for document in batch]
        encoded = chosen.encode(texts, names)
        return [(ids, 0) for ids in encoded], _check_loss(cfg, chosen, names, texts, encoded)
    between, (separator,) = len(cfg.separator.encode()), chosen.encode([cfg.separator])
    whole = [(found.text(text, document), int(found.prompts[document])) for document in batch]
    parts = [data[:end].decode() for data, end in whole], [data[end + between :].decode() for data, end in whole]
    of_prompts, of_targets = (chosen.encode(texts, names) for texts in parts)
    for name, prompt, target in zip(names, of_prompts, of_targets, strict=True):
        if not len(prompt) or not len(target):
            raise DataError(
                f"{name}: the tokenizer gives no token for its {'target' if len(prompt) else 'prompt'}; use another "
                "tokenizer, or remove the pair"
            )
    spaced, lost, examples = zip(
        *(_check_loss(cfg, chosen, names, *part) for part in zip(parts, (of_prompts, of_targets), strict=True)),
        strict=True,
    )
    ids: list[tuple[Sequence[int], int]] = [
        ([*prompt, *separator, *target], len(prompt) + len(separator))
        for prompt, target in zip(of_prompts, of_targets, strict=True)
    ]
    return ids, (max(spaced), min(len(batch), sum(lost)), examples[0] or examples[1])


def _batches(found: Scan, order: np.ndarray) -> Iterator[np.ndarray]:
    """Yield batches of documents with at most _BATCH_BYTES of text, or a single longer document."""
    begin = size = 0
    for place, length in enumerate(found.lengths[order]):
        if place > begin and size + length > _BATCH_BYTES:
            yield order[begin:place]
            begin, size = place, 0
        size += int(length)
    if begin < len(order):
        yield order[begin:]
