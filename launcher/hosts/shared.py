"""Prove that a host sees the same run folder as the first host."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
from pathlib import Path

from headway.launcher.run.run_dir import RunDir

_APPEARS_S = 15.0  # a new file may take this long to appear on another host of a network file system


class Secret:
    """A secret number in the run folder, known to every host that sees the folder.

    `sign` is a hash of the number. It identifies the number without revealing it.
    """

    def __init__(self, path: Path, number: str) -> None:
        self.path, self._number = path, number.encode()
        self.sign = hashlib.sha256(self._number).hexdigest()

    @classmethod
    def written(cls, run: RunDir) -> Secret:
        """Write a new secret into the run folder. The `with` statement deletes it at its end."""
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
        """Wait for the secret with this `sign` to appear in the run folder. None if it does not appear in time."""
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
        """HMAC that proves knowledge of the number without revealing it."""
        return hmac.new(self._number, f"{challenge} {host}".encode(), hashlib.sha256).hexdigest()

    def __enter__(self) -> Secret:
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)


def _secret_file(run: RunDir) -> Path:
    return run.logs / "hosts.key"
