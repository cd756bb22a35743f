"""Fetches files of a dataset from a remote, and decompresses zstd shards.

Download and decompression use mosaicml-streaming, which is imported lazily. A file is checked against the manifest
before it is renamed to its final name, so a file with its final name is complete.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import xxhash
from filelock import FileLock, Timeout

from headway.data.config import DataError
from headway.data.corpus import containers
from headway.data.manifest import (
    INDEX_NAME,
    LENGTHS_NAME,
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_NAME,
    FileEntry,
    Manifest,
    clear_staging,
    hash_file,
    read_manifest,
    replace_bytes,
)
from headway.data.streaming_import import import_streaming

# Schemes that mosaicml-streaming can read; a plain path has none.
_SCHEMES = ("", "file", "s3", "gs", "oci", "hf", "azure", "azure-dl", "dbfs", "sftp")
_ATTEMPTS = 3
_TIMEOUT_S = 300.0


def remote_prefix(remote: str) -> str:
    """Convert `remote` for mosaicml-streaming: `file://` and `~` become plain paths."""
    scheme = urlparse(remote).scheme
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in _SCHEMES if name)
        raise DataError(f"data.source.remote: {remote!r} has an unknown scheme; use a folder or one of {known}")
    if scheme == "file":
        remote = urlparse(remote).path
    elif not scheme:
        remote = str(Path(remote).expanduser().absolute())
    return remote.rstrip("/")


def fetch_metadata(root: Path, remote: str) -> Manifest:
    """Fetch all files of a remote dataset except its shards into `root`. The manifest is fetched first, every time.

    Raises DataError if the files cannot be fetched, or if `root` already contains another dataset.
    """
    with _holding(root / MANIFEST_NAME):
        arrived = root / f".{MANIFEST_NAME}.{os.getpid()}"
        try:
            _download(remote, MANIFEST_NAME, arrived)
            manifest = read_manifest(root, arrived.name)
            if (root / MANIFEST_NAME).exists():
                cached = read_manifest(root).fingerprint
                if cached != manifest.fingerprint:
                    raise DataError(
                        f"{root}: caches dataset {cached[:12]}, but {remote} now holds {manifest.fingerprint[:12]}; "
                        "use another data.source.path for the new one, or drop data.source.remote to keep the old one"
                    )
            arrived.replace(root / MANIFEST_NAME)
        finally:
            arrived.unlink(missing_ok=True)
    for name in (TOKENIZER_NAME, *(f"{split}/{file}" for split in SPLITS for file in (INDEX_NAME, LENGTHS_NAME))):
        fetch_file(root, remote, name, manifest)
    return manifest


def fetch_file(root: Path, remote: str, name: str, manifest: Manifest) -> Path:
    """Path of `root/name`, which is fetched if missing. Safe for several processes that share `root`.

    Raises DataError if the file cannot be fetched, or if its size or hash differs from the manifest.
    """
    path = root / name
    expected = manifest.files.get(name)
    if expected is None:
        raise DataError(f"{remote}: {name} is not in the dataset's manifest; build the dataset again")
    with contextlib.suppress(PermissionError):  # no access to the folder: `_holding` raises a DataError
        if path.exists():
            return path
    with _holding(path):
        if path.exists():
            return path
        arrived = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            _download(remote, name, arrived)
            check_content(arrived, expected, what=f"{remote}/{name}")
            arrived.replace(path)
        finally:
            arrived.unlink(missing_ok=True)
    return path


def check_content(path: Path, expected: FileEntry, *, what: str) -> None:
    """Raise DataError unless the file has the expected size and hash."""
    found = hash_file(path)
    if found != expected:
        raise DataError(
            f"{what}: {found.bytes:,} bytes with hash {found.xxh3_64}, but the manifest says {expected.bytes:,} bytes "
            f"with hash {expected.xxh3_64}; restore it, or build the dataset again with `headway data build SPEC`"
        )


def unpack_shard(packed: Path, raw: Path, *, bytes: int, xxh64: str) -> Path:
    """Decompress a zstd shard next to itself and check it against the size and hash of the index."""
    with _holding(raw):
        if raw.exists() and raw.stat().st_size == bytes and xxhash.xxh64_hexdigest(raw.read_bytes()) == xxh64:
            return raw
        data = bytearray()
        for piece in containers.chunks(packed, "zstd"):
            data += piece
            if len(data) > bytes:
                break
        if len(data) != bytes or xxhash.xxh64_hexdigest(data) != xxh64:
            raise DataError(f"{packed}: does not unpack to the shard in the index; build the dataset again")
        try:
            replace_bytes(raw, data)
        except OSError as error:
            raise DataError(
                f"{raw}: cannot be written ({error.strerror}). Shards compressed with zstd are unpacked in their "
                "folder: make it writable, set data.source.remote to it and data.source.path to a "
                "writable cache, or build without compression"
            ) from error
    return raw


@contextlib.contextmanager
def _holding(path: Path) -> Iterator[None]:
    """Hold the lock to fetch or unpack `path`, and delete temporary files of killed processes.

    The kernel releases the lock when its process ends for any reason. The lock file remains and has no meaning. Raises
    DataError if the folder or the lock file cannot be written, or if another process holds the lock too long.
    """
    lock = FileLock(str(path.with_name(f".{path.name}.lock")), timeout=_TIMEOUT_S)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise DataError(
            f"{lock.lock_file}: held for more than {_TIMEOUT_S:.0f} s by another process that fetches {path.name}; end "
            "that process, or use another data.source.path"
        ) from None
    except OSError as error:
        raise DataError(
            f"{lock.lock_file}: cannot be written ({error.strerror}); make the folder and this file writable, "
            "or set data.source.path to a folder of your own and data.source.remote to the dataset"
        ) from error
    try:
        clear_staging(path)
        yield
    finally:
        lock.release()


def _download(remote: str, name: str, destination: Path) -> None:
    prefix = remote_prefix(remote)
    downloaders = import_streaming("base.storage").CloudDownloader
    for attempt in range(1, _ATTEMPTS + 1):
        destination.unlink(missing_ok=True)
        try:
            downloader = downloaders.get(prefix)
            downloader.download(f"{prefix}/{name}", str(destination), _TIMEOUT_S)
            downloader.clean_up()
            with destination.open("rb") as stream:
                os.fsync(stream.fileno())  # before the rename, which marks the file as complete
            return
        except FileNotFoundError as error:
            raise DataError(_unfetched(remote, name, error)) from error
        except Exception as error:  # each storage library has its own errors
            if attempt == _ATTEMPTS:
                raise DataError(_unfetched(remote, name, error)) from error
            time.sleep(0.5 * attempt)


def _unfetched(remote: str, name: str, error: Exception) -> str:
    return (
        f"{remote}/{name}: cannot be fetched ({type(error).__name__}: {error}); check data.source.remote, the network "
        "and the credentials, or copy the dataset to a local folder and drop data.source.remote"
    )
