"""Verification of a dataset against its manifest.

It runs before the process group is created, so that a damaged shard is reported within seconds. A missing or damaged
shard is an error; it never shortens the epoch.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from headway.data import fetch
from headway.data.config import DataError, Datasets, MdsSource, MixSource, PairsSource, datasets_of
from headway.data.manifest import (
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_NAME,
    Manifest,
    Split,
    VerifiedFiles,
    check_file,
    read_manifest,
    rebuild_hint,
)
from headway.data.mds import (
    MdsSplit,
    ShardInfo,
    read_index,
    read_lengths,
    read_prompts,
    sizes_of,
    unigram_entropy,
)
from headway.data.mixture import mixed_fingerprint
from headway.data.progress import Progress, Shown, progress_of
from headway.data.remotes.cache import check_limit
from headway.data.tokenizer import sha256_of, vocab_size_of


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Properties of a dataset that a run records. Entropy is in nats per token."""

    path: Path
    fingerprint: str
    vocab_size: int
    eos_id: int
    train_tokens: int
    validation_tokens: int
    tokenizer_sha256: str
    unigram_entropy_nats: float | None  # None for a mixture, and for pairs, of which only targets have a loss
    validation_bytes_per_token: float | None  # of targets only for pairs; None if the tokenizer loses text
    lossy_documents: int
    manifest: dict[str, Any]


def verify(
    source: MdsSource,
    *,
    seq_len: int | None = None,
    shuffle_window: int | None = None,
    loss: Literal["targets", "all"] = "targets",
    progress: Shown = False,
) -> DatasetInfo:
    """Check the files of a dataset (presence, size, hash, no extra shards), its tokenizer, and that `seq_len` fits.

    `shuffle_window`: shards that a limited cache (`cache_bytes`) must hold. `loss`: what is predicted of pairs.

    With `remote`, the manifest is fetched first; shards that are not fetched yet are checked when they arrive. Files
    that did not change since they were hashed are not hashed again. Raises DataError with the file and the next step.
    """
    root = Path(source.path).expanduser()
    if source.remote is not None:
        if source.cache_bytes is not None:
            fetch.open_cache(root, source.remote, source.cache_bytes)
        manifest = fetch.fetch_metadata(root, source.remote)
    else:
        manifest = read_manifest(root)
    _check_files(root, manifest, source.remote, progress_of(progress))
    for split in SPLITS:
        shards = read_index(root, split, manifest)
        _check_nothing_else(root, split, manifest, shards)
        lengths = read_lengths(root, split, manifest)
        if manifest.pairs is not None:
            read_prompts(root, split, manifest, lengths)
        if source.cache_bytes is not None:
            window = 1 if split == "validation" else shuffle_window or 1
            check_limit(source.cache_bytes, root, *sizes_of(shards, split, manifest), window)
    _check_tokenizer(root, manifest)
    if seq_len is not None and manifest.pairs is None:
        _check_length(root, manifest, seq_len)
    bytes_per_token, only_targets = manifest.validation_bytes_per_token, loss == "targets"
    if manifest.pairs is not None and bytes_per_token is not None and only_targets:
        bytes_per_token = manifest.pairs.validation_target_bytes / manifest.pairs.validation_target_tokens
    return DatasetInfo(
        path=root,
        fingerprint=manifest.fingerprint,
        vocab_size=manifest.vocab_size,
        eos_id=manifest.eos_id,
        train_tokens=manifest.train.tokens,
        validation_tokens=manifest.validation.tokens,
        tokenizer_sha256=manifest.tokenizer_sha256,
        unigram_entropy_nats=None if manifest.pairs is not None and only_targets else manifest.unigram_entropy_nats,
        validation_bytes_per_token=bytes_per_token,
        lossy_documents=manifest.lossy.documents if manifest.lossy else 0,
        manifest=manifest.content(),
    )


def verify_source(
    source: Datasets,
    *,
    seq_len: int | None = None,
    shuffle_window: int | None = None,
    progress: Shown = False,
) -> tuple[DatasetInfo, list[DatasetInfo]]:
    """(what a run records of its data, the same of each dataset). Verifies all datasets, as `verify` does.

    Of a mixture: the fingerprint of all; sums of tokens; bytes per token by the weights; no unigram entropy. Raises
    DataError if the datasets were made with different tokenizers.
    """
    loss = source.loss if isinstance(source, PairsSource) else "targets"
    found = [
        verify(part, seq_len=seq_len, shuffle_window=shuffle_window, loss=loss, progress=progress)
        for part in datasets_of(source)
    ]
    for info in found:
        check_kind("pairs" in info.manifest, info.path, source)
    if not isinstance(source, MixSource):
        return found[0], found
    for info in found[1:]:
        check_same_tokenizer(found[0], info, "data.source.sources")
    bytes_per_token = [info.validation_bytes_per_token for info in found]
    total = sum(source.weights)
    mean = sum((size or 0) * weight / total for size, weight in zip(bytes_per_token, source.weights, strict=True))
    return replace(
        found[0],
        fingerprint=mixed_fingerprint([info.fingerprint for info in found]),
        train_tokens=sum(info.train_tokens for info in found),
        validation_tokens=sum(info.validation_tokens for info in found),
        unigram_entropy_nats=None,
        validation_bytes_per_token=None if None in bytes_per_token else mean,
        lossy_documents=sum(info.lossy_documents for info in found),
    ), found


def check_kind(has_pairs: bool, path: Path, source: Datasets) -> None:
    """Raise DataError if a dataset has pairs and the source reads texts, or the other way round."""
    if has_pairs == (source.type == "pairs"):
        return
    if has_pairs:
        way = "a mixture cannot contain it" if isinstance(source, MixSource) else "set data.source.type: pairs"
        raise DataError(f"data.source: {path} is a dataset of pairs; {way}")
    raise DataError(
        f"data.source.type: pairs needs a dataset that was built from pairs, and {path} has texts; use type: mds, or "
        "build it from a corpus of `type: pairs` or `stdlib_functions`"
    )


def check_same_tokenizer(a: DatasetInfo, b: DatasetInfo, key: str) -> None:
    """Raise DataError, with the key of the spec, if the ids of two datasets mean different text."""
    if (a.tokenizer_sha256, a.eos_id) != (b.tokenizer_sha256, b.eos_id):
        raise DataError(
            f"{key}: {b.path} was made with another tokenizer than {a.path}, so its ids mean other text; build it with "
            f"`tokenizer: {{type: file, path: {a.path / TOKENIZER_NAME}, eos_token: ...}}`"
        )


def _check_files(root: Path, manifest: Manifest, remote: str | None, progress: Progress) -> None:
    metadata = set(manifest.metadata())
    if unnamed := sorted(metadata - manifest.files.keys()):
        raise DataError(f"{root}: the manifest does not name {unnamed[0]}; {rebuild_hint(root)}")
    verified = VerifiedFiles(root)
    hint = None if remote is None else f"delete it and start again: it is fetched again from {remote}"
    # Shards that are not fetched yet are checked when they arrive.
    optional = set() if remote is None else manifest.files.keys() - metadata
    names = [n for n in manifest.files if n not in optional or os.path.lexists(root / n)]
    with progress("verify dataset", sum(manifest.files[name].bytes for name in names), "B") as bar:
        for name in names:
            try:
                check_file(root, name, manifest, verified, hint=hint)
            except DataError:
                # Another run may delete shards from a cache with a limit.
                if name not in optional or os.path.lexists(root / name):
                    raise
            bar.update(manifest.files[name].bytes)
    verified.save()


def _check_nothing_else(root: Path, split: Split, manifest: Manifest, shards: list[ShardInfo]) -> None:
    """Raise DataError for a shard that is not in the manifest, which no run would read."""
    named = {name.removeprefix(f"{split}/") for name in manifest.files}
    named |= {shard.raw_name for shard in shards}  # decompressed shards
    try:
        found = sorted(path.name for path in (root / split).iterdir())  # names are quicker to sort than paths
    except OSError as error:
        raise DataError(
            f"{root / split}: cannot be listed ({error.strerror}); fix the disk or the permissions"
        ) from error
    for name in found:
        if ".mds" in name and name not in named and not name.startswith("."):
            raise DataError(
                f"{root / split / name}: a shard that {MANIFEST_NAME} does not name, so no run would read it; remove "
                "it, or build the dataset again from all its documents"
            )


def _check_tokenizer(root: Path, manifest: Manifest) -> None:
    path = root / TOKENIZER_NAME
    if (digest := sha256_of(path)) != manifest.tokenizer_sha256:
        raise DataError(
            f"{path}: not the tokenizer of the shards (sha256 {digest[:12]}, manifest "
            f"{manifest.tokenizer_sha256[:12]}); {rebuild_hint(root)}"
        )
    if (size := vocab_size_of(path)) != manifest.vocab_size:
        raise DataError(f"{path}: {size} tokens, but the shards have {manifest.vocab_size}; {rebuild_hint(root)}")


def _check_length(root: Path, manifest: Manifest, seq_len: int) -> None:
    for split in SPLITS:
        tokens = manifest.counts(split).tokens
        if tokens < seq_len + 1:
            raise DataError(
                f"data.seq_len: {seq_len:,} (and the next token) is longer than the {split} split of {root}, which "
                f"has {tokens:,} tokens; use seq_len <= {max(tokens - 1, 0):,}, or build a larger corpus"
            )


def verify_contents(source: MdsSource, *, progress: Shown = False) -> None:
    """Read every token of a dataset, after `verify`: lengths, token ids, and the entropy that the manifest tells.

    Raises DataError with the file and the next step.
    """
    root = Path(source.path).expanduser()
    manifest = read_manifest(root)
    counts: dict[Split, np.ndarray] = {}
    total = manifest.train.tokens + manifest.validation.tokens
    with progress_of(progress)("read dataset", total, "tokens") as bar:
        for split in SPLITS:
            documents = MdsSplit(root, split, remote=source.remote, cache_bytes=source.cache_bytes)
            found = np.zeros(manifest.vocab_size, dtype=np.int64)
            for document in range(len(documents)):
                tokens = documents.tokens(document)
                if (largest := int(tokens.max())) >= manifest.vocab_size:
                    raise DataError(documents.beyond_vocabulary(document, largest))
                found += np.bincount(tokens, minlength=manifest.vocab_size)
                bar.update(len(tokens))
            counts[split] = found
    entropy = unigram_entropy(counts["train"], counts["validation"])
    if not math.isclose(entropy, manifest.unigram_entropy_nats, rel_tol=1e-6):  # sums may be in another order
        raise DataError(
            f"{root / MANIFEST_NAME}: unigram_entropy_nats is {manifest.unigram_entropy_nats:.6g}, but the tokens have "
            f"{entropy:.6g}; {rebuild_hint(root)}"
        )
