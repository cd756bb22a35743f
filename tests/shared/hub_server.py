"""A stand-in for the Hugging Face hub on this host: repositories of models in memory, for one accepted token."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_" + "accepted" * 4
READ_ONLY = "hf_" + "readonly" * 4


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1("/".join(self.commits).encode()).hexdigest()


class StandIn:
    """The state of the hub. `refuse`: path prefix -> status that requests below it get."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.refuse: dict[str, int] = {}
        self.url = ""


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """Serve on a free port of the loopback interface."""
    hub = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        return

    def _answer(self, value: Any = None, *, status: int = 200, body: bytes | None = None, **headers: str) -> None:
        content = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _serve(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        for prefix, status in self.hub.refuse.items():
            if path.startswith(prefix):
                return self._answer({"error": f"refused {token}"}, status=status)
        if path == "/api/whoami-v2":
            known = token in (TOKEN, READ_ONLY)
            return self._answer({"name": "someone", "type": "user"} if known else {}, status=200 if known else 401)
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            return self._api(f"{owner}/{name}", rest, body, token)
        owner, name, *rest = path.strip("/").split("/")
        return self._file(f"{owner}/{name}", rest, token)

    do_GET = do_HEAD = do_POST = _serve

    def _found(self, name: str, token: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and token not in (TOKEN, READ_ONLY)):
            self._answer({"error": "Repository not found"}, status=401, X_Error_Code="RepoNotFound")
            return None
        return repo

    def _create(self, asked: dict[str, Any], token: str) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if token != TOKEN:
            return self._answer({"error": "no write access"}, status=403)
        if name in self.hub.repos:
            return self._answer({"url": f"{self.hub.url}/{name}"}, status=409)
        self.hub.repos[name] = Repo(private=asked["private"])
        return self._answer({"url": f"{self.hub.url}/{name}", "name": name})

    def _api(self, name: str, rest: list[str], body: bytes, token: str) -> None:
        repo = self._found(name, token)
        if repo is None:
            return None
        if rest[:1] == ["preupload"]:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if rest[:1] == ["commit"]:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repo.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del repo.files[value["path"]]
                elif line["key"] == "header":
                    repo.commits.append(value["summary"])
            return self._answer({"commitUrl": f"{self.hub.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha})
        if rest[:1] == ["tree"]:
            entries = [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in repo.files.items()]
            return self._answer(entries)
        if rest[:1] == ["revision"] and not fnmatch.fnmatch(repo.sha, rest[1]) and rest[1] != "main":
            return self._answer({"error": "no revision"}, status=404, X_Error_Code="RevisionNotFound")
        siblings = [{"rfilename": path} for path in repo.files]
        return self._answer({"id": name, "sha": repo.sha, "private": repo.private, "siblings": siblings})

    def _file(self, name: str, rest: list[str], token: str) -> None:
        repo = self._found(name, token)
        if repo is None:
            return None
        content = repo.files["/".join(rest[2:])]
        tag = hashlib.sha1(content).hexdigest()
        return self._answer(body=content, ETag=f'"{tag}"', X_Repo_Commit=repo.sha)
