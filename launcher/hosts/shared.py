"""Proof that a host sees the run folder that the first host sees."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
from pathlib import Path

from headway.launcher.run.run_dir import RunDir

_APPEARS_S = 15.0  # what a file may take to appear on another host of a network file system


class Secret:
    """A number in the run folder, known to whom sees the folder. `sign` tells numbers apart and shows none."""

    def __init__(self, path: Path, number: str) -> None:
        self.path, self._number = path, number.encode()
        self.sign = hashlib.sha256(self._number).hexdigest()

    @classmethod
    def written(cls, run: RunDir) -> Secret:
        """A new one, in the run folder until the context ends."""
        path = _secret_file(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        number = secrets.token_hex(32)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(json.dumps(number))
            file.flush()
            os.fsync(file.fileno())
        return cls(path, number)

    @classmethod
    def read(cls, run: RunDir, sign: str, deadline: float) -> Secret | None:
        """The one with this sign, once this host sees it; None if it does not come to see it."""
        end = min(deadline, time.monotonic() + _APPEARS_S)
        while True:
            try:
                found = cls(_secret_file(run), str(json.loads(_secret_file(run).read_text())))
                if found.sign == sign:
                    return found
            except (OSError, ValueError):
                pass
            if time.monotonic() > end:
                return None
            time.sleep(0.1)

    def proof(self, challenge: str, host: int) -> str:
        """Shows that the host knows the number, without showing the number."""
        return hmac.new(self._number, f"{challenge} {host}".encode(), hashlib.sha256).hexdigest()

    def __enter__(self) -> Secret:
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)


def _secret_file(run: RunDir) -> Path:
    return run.logs / "hosts.key"
