"""A server on this machine only, without any file access but the report of the study."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from headway.launcher.base.errors import HeadwayError
from headway.launcher.study.watch.page import Pages

LOOPBACK = "127.0.0.1"


def serve(pages: Pages, report: Path, port: int, ready: Callable[[int], None]) -> None:
    """Serve until SIGINT or SIGTERM. `ready` is told the port. Raises HeadwayError as `make_server` does."""
    server = make_server(pages, report, port)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ready(server.server_port)
    stop.wait()
    server.shutdown()


def make_server(pages: Pages, report: Path, port: int) -> ThreadingHTTPServer:
    """A server of the page and of the file `report`, once it is written. `port` 0: any free one. Raises HeadwayError if
    the port is taken.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of another site can make a browser send requests here under a name of its own.
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in (LOOPBACK, "localhost"):
                self._answer(403, "text/plain", f"open the page as http://{LOOPBACK}, with its port\n")
                return
            with lock:
                if self.path == "/":
                    self._answer(200, "text/html", pages.html())
                elif self.path == "/state":
                    self._answer(200, "text/plain", pages.state())
                elif self.path == "/report.html" and report.is_file():
                    self._answer(200, "text/html", report.read_text(encoding="utf-8"))
                else:
                    self._answer(404, "text/plain", "there is / and, once it is written, /report.html\n")

        def _answer(self, status: int, kind: str, text: str) -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """No line for each request."""

    try:
        server = ThreadingHTTPServer((LOOPBACK, port), Handler)
    except OSError as e:
        raise HeadwayError(f"--port: {port} cannot be used ({e.strerror}); use another, or 0 for any free port") from e
    server.daemon_threads = True
    return server
