"""Brings files of a dataset to where they can be mapped: from a remote, or out of zstd.

Downloading and unpacking are mosaicml-streaming's (imported only when there is something to do). What arrives is
checked against the manifest before it gets its name, so a file that has its name is whole.
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
    """`remote` as mosaicml-streaming wants it: `file://` and `~` become a plain path."""
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
    """Fetch everything but the shards of a remote dataset into `root`; the manifest first, each time.

    Raises DataError when it cannot be fetched, or when `root` already holds another dataset.
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
    """`root/name`, fetched if it is not there yet. Safe for several processes that share `root`.

    Raises DataError when it cannot be fetched or what arrives is not what the manifest says.
    """
    path = root / name
    expected = manifest.files.get(name)
    if expected is None:
        raise DataError(f"{remote}: {name} is not in the dataset's manifest; build the dataset again")
    with contextlib.suppress(PermissionError):  # a folder that may not be entered; said below
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
    """Raise DataError unless the file has the size and hash of the manifest."""
    found = hash_file(path)
    if found != expected:
        raise DataError(
            f"{what}: {found.bytes:,} bytes with hash {found.xxh3_64}, but the manifest says {expected.bytes:,} bytes "
            f"with hash {expected.xxh3_64}; restore it, or build the dataset again with `headway data build SPEC`"
        )


def unpack_shard(packed: Path, raw: Path, *, bytes: int, xxh64: str) -> Path:
    """Unpack a zstd shard beside itself, checked against the size and hash of the shards' index."""
    with _holding(raw):
        if raw.exists() and raw.stat().st_size == bytes and xxhash.xxh64_hexdigest(raw.read_bytes()) == xxh64:
            return raw
        decompress = import_streaming("base.compression").decompress
        try:
            data = decompress("zstd", packed.read_bytes())
        except Exception as error:  # the zstd binding raises its own Error
            raise DataError(f"{packed}: cannot be unpacked ({error}); restore it or build the dataset again") from error
        if len(data) != bytes or xxhash.xxh64_hexdigest(data) != xxh64:
            raise DataError(f"{packed}: does not unpack to the shard in the index; build the dataset again")
        try:
            replace_bytes(raw, data)
        except OSError as error:
            raise DataError(
                f"{raw}: cannot be written ({error.strerror}). Shards compressed with zstd are unpacked beside "
                "themselves: make the folder writable, set data.source.remote to it and data.source.path to a "
                "writable cache, or build without compression"
            ) from error
    return raw


@contextlib.contextmanager
def _holding(path: Path) -> Iterator[None]:
    """Be the only one who fetches or unpacks `path`, in a folder without what killed processes left of it.

    The kernel frees the lock of a process that ends, however it ends; the lock's file stays and says nothing. Raises
    DataError when the folder or the lock's file cannot be used, or a live process does not let go.
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
            f"{lock.lock_file}: cannot be written ({error.strerror}); make the folder and this file writable for you, "
            "or fetch into a folder of your own: data.source.path, with the dataset as data.source.remote"
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
                os.fsync(stream.fileno())  # before it gets its name, which says that it is whole
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
