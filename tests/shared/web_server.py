"""A web server on the loopback interface that serves a folder, with faults that a test orders."""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
"""Variables that would lead requests to the loopback interface elsewhere, in either case."""


@dataclass
class Request:
    path: str
    range: str | None
    login: str | None
    status: int = 0
    sent: int = 0


Fault = Callable[["Handler", Path], bool]
"""Answers a request instead of the server; False: the server answers after all."""


@dataclass
class WebServer:
    """`faults`: name of a file -> what happens to its next requests, one after the other."""

    root: Path
    url: str = ""
    tags: bool = True
    ranges: bool = True
    requests: list[Request] = field(default_factory=list)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    always: Fault | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def fetched(self, name: str = "") -> list[Request]:
        """The requests for files whose path ends so."""
        return [request for request in self.requests if request.path.endswith(name)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: WebServer
    request_seen: Request

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.request_seen = Request(self.path, self.headers.get("Range"), self.headers.get("Authorization"))
        self.web.requests.append(self.request_seen)
        file = self.web.root / self.path.lstrip("/")
        orders = self.web.faults.get(file.name, [])
        fault = orders.pop(0) if orders else self.web.always
        with contextlib.suppress(ConnectionError):
            if fault is None or not fault(self, file):
                self.serve(file)

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.request_seen.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def body(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()
        self.request_seen.sent += len(data)

    def break_off(self) -> None:
        """Close the connection, whatever was announced."""
        self.close_connection = True

    def serve(self, file: Path, *, tag: str | None = None, stop: int | None = None) -> None:
        """The file or the rest of it; only `stop` bytes in all, if given."""
        if not file.is_file():
            return self.fail(404)
        data, tag = file.read_bytes(), tag or f'"{file.stat().st_mtime_ns}"'
        headers = {"ETag": tag} if self.web.tags else {}
        begin, wanted = 0, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted and self.web.ranges and self.headers.get("If-Range", tag) == tag:
            begin = int(wanted[1])
            if begin >= len(data):
                return self.fail(416)
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self.head(206 if begin else 200, {**headers, "Content-Length": str(len(data) - begin)})
        self.body(data[begin : stop if stop is not None else len(data)])
        if stop is not None:
            self.break_off()
        return None

    def fail(self, status: int) -> None:
        self.head(status, {"Content-Length": "0"})


def status(code: int) -> Fault:
    return lambda handler, _: handler.fail(code) is None


def truncated(stop: int) -> Fault:
    """The connection ends after `stop` bytes of the file."""
    return lambda handler, file: handler.serve(file, stop=stop) is None


def moved(location: str, code: int = 302) -> Fault:
    return lambda handler, _: handler.head(code, {"Location": location, "Content-Length": "0"}) is None


def stalled(handler: Handler, file: Path) -> bool:
    """Half of the file, then nothing until the test ends."""
    data = file.read_bytes()
    handler.head(200, {"Content-Length": str(len(data)), "ETag": '"1"'})
    handler.body(data[: len(data) // 2])
    handler.web.ended.wait(30)
    handler.break_off()
    return True


def silent(handler: Handler, _: Path) -> bool:
    """No answer at all."""
    handler.web.ended.wait(30)
    handler.break_off()
    return True


def dripping(handler: Handler, file: Path) -> bool:
    """A byte now and then."""
    data = file.read_bytes()
    handler.head(200, {"Content-Length": str(len(data))})
    for byte in data:
        if handler.web.ended.wait(0.05):
            break
        handler.body(bytes([byte]))
    handler.break_off()
    return True


def endless(handler: Handler, _: Path) -> bool:
    """A body of unknown size without an end."""
    handler.head(200, {"Transfer-Encoding": "chunked"})
    piece = bytes(1 << 16)
    while not handler.web.ended.is_set():
        handler.body(b"10000\r\n" + piece + b"\r\n")
    return True


def replaced(data: bytes, **headers: str) -> Fault:
    """Other bytes than those of the file."""

    def answer(handler: Handler, _: Path) -> bool:
        handler.head(200, {"Content-Length": str(len(data)), **{k.replace("_", "-"): v for k, v in headers.items()}})
        handler.body(data)
        return True

    return answer


@contextlib.contextmanager
def serving(root: Path) -> Iterator[WebServer]:
    web = WebServer(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"web": web}))
    server.daemon_threads = True
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
