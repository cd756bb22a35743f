"""Fetches files of a dataset from a remote, and decompresses zstd shards.

`headway.data.remotes.http` downloads over http(s), mosaicml-streaming, which is imported lazily, from everything else.
A file is checked against the manifest before it is renamed to its final name, so a file with its final name is
complete.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from urllib.parse import quote, urlparse

import xxhash
from filelock import FileLock, Timeout

from headway.data.config import DataError, UnreachableError
from headway.data.corpus import containers
from headway.data.manifest import (
    MANIFEST_NAME,
    SPLITS,
    FileEntry,
    Manifest,
    clear_staging,
    hash_file,
    read_manifest,
    replace_bytes,
)
from headway.data.remotes import http
from headway.data.remotes.cache import Cache, lock_path
from headway.data.streaming_import import import_streaming

# Schemes that mosaicml-streaming can read; a plain path has none.
_SCHEMES = ("", "file", "s3", "gs", "oci", "hf", "azure", "azure-dl", "dbfs", "sftp")
_WEB = ("http", "https")
_MAX_MANIFEST_BYTES = 64 << 20
_ATTEMPTS = 3
_TIMEOUT_S = 300.0


def remote_prefix(remote: str) -> str:
    """The remote without a slash at its end; `file://` and `~` become plain paths."""
    scheme = urlparse(remote).scheme
    if scheme not in (*_SCHEMES, *_WEB):
        known = ", ".join(f"{name}://" for name in (*_WEB, *_SCHEMES) if name)
        raise DataError(f"data.source.remote: {remote!r} has an unknown scheme; use a folder or one of {known}")
    if scheme == "file":
        remote = urlparse(remote).path
    elif not scheme:
        remote = str(Path(remote).expanduser().absolute())
    return remote.rstrip("/")


def open_cache(root: Path, remote: str, limit: int) -> Cache:
    """The cache of `remote` in `root` with a limit in bytes.

    Raises DataError if both are one folder, whose shards would be deleted for good.
    """
    prefix = remote_prefix(remote)
    if not urlparse(prefix).scheme:
        for part in ("", *SPLITS):
            if (root / part).resolve() == (Path(prefix) / part).resolve():
                raise DataError(
                    f"data.source.cache_bytes: {root / part} is a folder of data.source.remote itself, from which no "
                    "shard may be deleted; use another data.source.path for the cache, or leave cache_bytes out"
                )
    return Cache(root, limit)


def fetch_metadata(root: Path, remote: str) -> Manifest:
    """Fetch all files of a remote dataset except its shards into `root`. The manifest is fetched first, every time.

    Raises DataError if the files cannot be fetched, or if `root` already contains another dataset.
    """
    with _holding(root / MANIFEST_NAME):
        arrived = root / f".{MANIFEST_NAME}.{os.getpid()}"
        try:
            _download(remote, MANIFEST_NAME, arrived, None)
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
    for name in manifest.metadata():
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
        if not path.exists():
            _fetch(remote, name, path, expected)
    return path


def fetch_shard(
    cache: Cache,
    remote: str,
    packed: str,
    raw: Path,
    manifest: Manifest,
    *,
    bytes: int,
    xxh64: str,
    keep: Collection[Path] = (),
    wait_s: float | None = None,
) -> Path | None:
    """Path of the uncompressed shard `raw`, for which `cache` makes room if it is missing.

    packed: name of the file in the manifest; another one than that of `raw` is unpacked and not kept. keep, wait_s: see
    `Cache.room`. None if there is no room. Raises DataError as `fetch_file` and `unpack_shard` do.
    """
    expected, stored = manifest.files[packed], cache.root / packed
    with contextlib.suppress(PermissionError):
        if raw.exists():
            return raw
    with _holding(raw):
        if raw.exists():
            return raw
        size = expected.bytes if stored == raw else expected.bytes + bytes
        with cache.room(size, keep=keep, wait_s=wait_s) as found:
            if not found:
                return None
            if stored == raw:
                _fetch(remote, packed, raw, expected)
            else:
                # The second lock keeps other processes from taking the temporary file for that of a killed one.
                with _holding(stored), _arrived(remote, packed, stored, expected) as arrived:
                    _unpack(arrived, raw, bytes=bytes, xxh64=xxh64)
        cache.used(raw)
    return raw


def _fetch(remote: str, name: str, path: Path, expected: FileEntry) -> None:
    """Download a file, check it, and give it its final name. The caller holds the lock."""
    with _arrived(remote, name, path, expected) as arrived:
        arrived.replace(path)


@contextlib.contextmanager
def _arrived(remote: str, name: str, path: Path, expected: FileEntry) -> Iterator[Path]:
    """A temporary file beside `path` with the downloaded and checked content."""
    arrived = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _download(remote, name, arrived, expected)
        check_content(arrived, expected, what=f"{remote}/{name}")
        yield arrived
    finally:
        arrived.unlink(missing_ok=True)


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
        _unpack(packed, raw, bytes=bytes, xxh64=xxh64)
    return raw


def _unpack(packed: Path, raw: Path, *, bytes: int, xxh64: str) -> None:
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


@contextlib.contextmanager
def _holding(path: Path) -> Iterator[None]:
    """Hold the lock to fetch or unpack `path`, and delete temporary files of killed processes.

    The kernel releases the lock when its process ends for any reason. The lock file remains and has no meaning. Raises
    DataError if the folder or the lock file cannot be written, or if another process holds the lock too long.
    """
    lock = FileLock(str(lock_path(path)), timeout=_TIMEOUT_S)
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


def _download(remote: str, name: str, destination: Path, expected: FileEntry | None) -> None:
    """Download a file. `expected`: its size is that of the manifest; None for the manifest itself."""
    prefix = remote_prefix(remote)
    if urlparse(prefix).scheme in _WEB:
        limit, size = (_MAX_MANIFEST_BYTES, None) if expected is None else (expected.bytes, expected.bytes)
        try:
            http.download(f"{prefix}/{quote(name)}", destination, limit=limit, size=size, timeout_s=_TIMEOUT_S)
            _sync(destination)
        except (http.HttpError, OSError) as error:
            kind = UnreachableError if isinstance(error, http.HttpError) and error.passing else DataError
            raise kind(_unfetched(remote, name, str(error))) from error
        return
    downloaders = import_streaming("base.storage").CloudDownloader
    for attempt in range(1, _ATTEMPTS + 1):
        destination.unlink(missing_ok=True)
        try:
            downloader = downloaders.get(prefix)
            downloader.download(f"{prefix}/{name}", str(destination), _TIMEOUT_S)
            downloader.clean_up()
            _sync(destination)
            return
        except FileNotFoundError as error:
            raise DataError(_unfetched(remote, name, f"{type(error).__name__}: {error}")) from error
        except Exception as error:  # each storage library has its own errors
            if attempt == _ATTEMPTS:
                raise UnreachableError(_unfetched(remote, name, f"{type(error).__name__}: {error}")) from error
            time.sleep(0.5 * attempt)


def _sync(path: Path) -> None:
    """Flush a file to disk, before the rename that marks it as complete."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _unfetched(remote: str, name: str, why: str) -> str:
    return (
        f"{remote}/{name}: cannot be fetched ({why}); check data.source.remote, the network "
        "and the credentials, or copy the dataset to a local folder and drop data.source.remote"
    )
