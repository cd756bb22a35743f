"""Download one file over http(s): resumed after interruptions, with bounded redirects, sizes and times.

Messages name the reason and never an address that a server or the environment gave: these may contain credentials
(signed addresses, proxies with a password).
"""

from __future__ import annotations

import time
from http import HTTPStatus
from http.client import IncompleteRead, RemoteDisconnected
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urljoin, urlsplit

ATTEMPTS = 3
"""Attempts in a row that get no further."""
MAX_REDIRECTS = 5
CONNECT_S, READ_S = 10.0, 30.0
"""Seconds until a connection, and from one piece of the answer to the next."""
_PIECE_BYTES = 1 << 16
_MOVED = (301, 302, 303, 307, 308)
_PASSING = (408, 425, 429)
"""Status codes below 500 that another attempt may not get."""
_PHRASES = {status.value: status.phrase for status in HTTPStatus}  # not the server's own text
_SAID = {
    401: "access is denied: give a login for this host in ~/.netrc",
    403: "access is denied: the server wants another login, or does not serve this folder",
    404: "the file is not there: data.source.remote is the address of the folder with MANIFEST.json",
}


class HttpError(Exception):
    """A file cannot be fetched; the message gives the reason. `passing`: later attempts may succeed."""

    passing = False


class _Passing(HttpError):
    """Another attempt may succeed."""

    passing = True


def download(url: str, path: Path, *, limit: int, size: int | None = None, timeout_s: float = 300.0) -> None:
    """Write the file at `url` to `path`.

    An interrupted transfer goes on where it ended, if the server identifies the version of the file and serves ranges;
    otherwise it begins anew. The login for the host is taken from `~/.netrc`, proxies and certificates from the usual
    variables.

    limit: bytes that are accepted at most. size: exact number of bytes, if it is known; then a server that announces
    another number is refused before the transfer. timeout_s: for all attempts together.

    Raises HttpError after `ATTEMPTS` attempts without progress, or at once if another attempt would not help.
    """
    import requests

    end = time.monotonic() + timeout_s
    attempts, failures, furthest = 0, 0, 0
    with requests.Session() as session, path.open("w+b") as file:
        session.get_redirect_target = lambda resp: None  # else it reads the whole body of a redirect that we follow
        transfer = _Transfer(session, url, file, limit=limit, size=size, end=end)
        while True:
            attempts += 1
            try:
                transfer.attempt()
                return
            except _Passing as error:
                failures = 1 if transfer.have > furthest else failures + 1
                furthest = max(furthest, transfer.have)
                pause_s = 0.5 * failures
                if failures == ATTEMPTS or time.monotonic() + pause_s >= end:
                    at = f", at {furthest:,} bytes" if furthest else ""
                    raise _Passing(f"{error}; gave up after {attempts} attempts{at}") from error
            time.sleep(pause_s)


class _Transfer:
    """One file over several attempts. `have`: bytes of it that are written."""

    def __init__(self, session: Any, url: str, file: BinaryIO, *, limit: int, size: int | None, end: float) -> None:
        self._session, self._url, self._file = session, url, file
        self._limit, self._size, self._end = limit, size, end
        self.have = 0
        self._version: str | None = None  # ETag or date, with which the server can tell whether the file is the same

    def attempt(self) -> None:
        """Read the rest of the file. Raises _Passing if the transfer breaks off."""
        import urllib3

        try:
            with self._answer() as answer:
                self._begin(answer)
                self._read(answer)
        except (urllib3.exceptions.HTTPError, OSError) as error:  # those of requests are OSErrors
            raise _Passing(_reason(error)) from None

    def _answer(self) -> Any:
        """The answer to the request, after redirects."""
        if self._version is None:
            self._restart()
        headers = {"Accept-Encoding": "identity", "User-Agent": "headway"}
        if self.have:
            headers |= {"Range": f"bytes={self.have}-", "If-Range": str(self._version)}
        url = self._url
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._session.get(
                url, headers=headers, stream=True, allow_redirects=False, timeout=(CONNECT_S, READ_S)
            )
            if answer.status_code not in _MOVED:
                return answer
            answer.close()
            url = _redirected(url, answer.headers.get("Location"))
        raise HttpError(f"the server redirects more than {MAX_REDIRECTS} times")

    def _begin(self, answer: Any) -> None:
        """Check the head of the answer, and go back to the start of the file if the answer does."""
        code = answer.status_code
        if code == 416:  # the file became shorter, or it ends where we are
            self._restart()
            raise _Passing("the server refuses the rest of the file")
        if code not in (200, 206):
            said = _SAID.get(code, "")
            text = f"the server answers {code} {_PHRASES.get(code, '')}".rstrip() + (f": {said}" if said else "")
            raise (_Passing if code >= 500 or code in _PASSING else HttpError)(text)
        if (coding := answer.headers.get("Content-Encoding", "identity")) != "identity":
            raise HttpError(
                f"the server sends the file in the encoding {coding[:20]!a}; switch that off for the dataset"
            )
        if code == 200:
            self._restart()
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {self.have}-"):
            self._restart()
            raise _Passing("the server sends another part of the file than the one asked for")
        tag = answer.headers.get("ETag", "")
        self._version = tag if tag.startswith('"') else answer.headers.get("Last-Modified")
        length = answer.headers.get("Content-Length", "")
        if length.isascii() and length.isdecimal() and len(length) < 19:
            self._refuse_size(self.have + int(length), announced=True)

    def _read(self, answer: Any) -> None:
        # `read1` returns what has arrived: a server that sends a byte now and then cannot hold it beyond the deadline.
        while piece := answer.raw.read1(_PIECE_BYTES, decode_content=False):
            self._file.write(piece)
            self.have += len(piece)
            if self.have > self._limit:
                raise HttpError(f"the server sends more than the {self._limit:,} bytes that the file may have")
            if time.monotonic() > self._end:
                raise HttpError(f"the transfer is too slow: {self.have:,} bytes until the deadline")
        self._refuse_size(self.have, announced=False)
        self._file.flush()

    def _refuse_size(self, total: int, *, announced: bool) -> None:
        if self._size is not None and total != self._size:
            text = f"the server has {total:,} bytes, but the manifest says {self._size:,}: another version of the file"
            raise (HttpError if announced or total > self._size else _Passing)(text)
        if total > self._limit:
            raise HttpError(f"the server has {total:,} bytes, more than the {self._limit:,} that the file may have")

    def _restart(self) -> None:
        self.have, self._version = 0, None
        self._file.seek(0)
        self._file.truncate()


def _redirected(url: str, location: str | None) -> str:
    """The address that a redirect leads to. Raises HttpError unless it is a web address that is as safe."""
    try:
        there = urlsplit(urljoin(url, location or ""))
        host = there.hostname
    except ValueError:
        host, there = None, urlsplit("")
    if location is None or there.scheme not in ("http", "https") or not host:
        raise HttpError("the server redirects to no web address")
    if there.username or there.password:
        raise HttpError("the server redirects to an address with a login in it")
    if url.startswith("https:") and there.scheme == "http":
        raise HttpError(f"the server redirects from https to http ({host[:100]!a})")
    return there.geturl()


def _reason(error: BaseException) -> str:
    """What went wrong, in the words of the system: those of the libraries repeat addresses."""
    import requests
    import urllib3

    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            break
        refused = isinstance(seen, urllib3.exceptions.NewConnectionError)  # counts as a timeout there
        if isinstance(seen, TimeoutError | requests.Timeout | urllib3.exceptions.TimeoutError) and not refused:
            late = isinstance(seen, requests.ConnectTimeout | urllib3.exceptions.ConnectTimeoutError)
            return f"no {'connection' if late else 'answer'} within {CONNECT_S if late else READ_S:.0f} s"
        if isinstance(seen, urllib3.exceptions.IncompleteRead | IncompleteRead):
            return "the transfer broke off"
        if isinstance(seen, RemoteDisconnected):
            return "the server closed the connection without an answer"
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        inner = [seen.__cause__, getattr(seen, "reason", None), *seen.args, seen.__context__]
        seen = next((other for other in inner if isinstance(other, BaseException)), None)
    return f"the connection failed ({type(error).__name__})"
