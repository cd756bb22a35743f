"""Places where a test can let a process fail, by the environment variable HEADWAY_FAULT alone.

    HEADWAY_FAULT="save:after_file@1#2:kill"     rank 1 is killed when it passes the point for the second time

After the point's name: `@RANK` (any), `#N` (the first time), then what happens: kill, stop (SIGSTOP), exit, enospc, eio
(both raise OSError), sleep=SECONDS. Several are divided by `;`. Nothing is done, and next to nothing costs, without it.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections import Counter
from functools import cache

VARIABLE = "HEADWAY_FAULT"
POINTS = (
    *("save:begin", "save:after_file", "save:before_manifest", "save:after_manifest", "save:after_rename"),
    *("retention:after_manifest", "retention:before_delete", "load:after_verify"),
)
_FAULT = re.compile(
    r"(?P<point>[a-z_]+:[a-z_]+)(@(?P<rank>\d+))?(#(?P<nth>\d+))?:(?P<act>kill|stop|exit|enospc|eio|sleep=[0-9.]+)"
)
_passed: Counter[tuple[str, str]] = Counter()


def point(name: str) -> None:
    """Let what HEADWAY_FAULT says of this place happen; `name` is one of POINTS."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return
    assert name in POINTS, name
    _passed[text, name] += 1
    for fault in _faults(text):
        rank = fault["rank"]
        here = fault["point"] == name and (rank is None or rank == os.environ.get("RANK"))
        if here and _passed[text, name] == int(fault["nth"] or 1):
            _happen(fault["act"] or "")


@cache
def _faults(text: str) -> list[re.Match[str]]:
    found = [_FAULT.fullmatch(part) for part in text.split(";")]
    assert all(match is not None and match["point"] in POINTS for match in found), f"{VARIABLE}={text}"
    return [match for match in found if match is not None]


def _happen(act: str) -> None:
    if act in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if act == "kill" else signal.SIGSTOP)
    elif act == "exit":
        os._exit(1)
    elif act in ("enospc", "eio"):
        code = errno.ENOSPC if act == "enospc" else errno.EIO
        raise OSError(code, os.strerror(code))
    else:
        time.sleep(float(act.removeprefix("sleep=")))
