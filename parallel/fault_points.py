"""Fault injection for tests: named points at which the environment variable HEADWAY_FAULT makes a process fail.

    HEADWAY_FAULT="save:after_file@1#2:kill"     rank 1 is killed when it passes the point for the second time

Syntax: POINT[@RANK][#N]:ACTION, several separated by `;`. Without @RANK, the fault applies to every rank; without #N,
to the first pass. Actions:

    kill, stop (SIGSTOP), exit, sleep=SECONDS     at any point
    enospc, eio                                   raise OSError
    nan, inf, times=FACTOR                        multiply the number at the point (`passing`)
    flip                                          flip one bit of the weights (`memory`)

Without the variable, the points do nothing and cost almost nothing.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "HEADWAY_FAULT"
POINTS = (
    *("save:begin", "save:after_file", "save:before_manifest", "save:after_manifest", "save:after_rename"),
    *("retention:after_manifest", "retention:before_delete", "load:after_verify"),
    *("step:loss", "step:gradient", "step:weights"),
)
_FAULT = re.compile(
    r"(?P<point>[a-z_]+:[a-z_]+)(@(?P<rank>\d+))?(#(?P<nth>\d+))?:(?P<act>kill|stop|exit|enospc|eio|nan|inf|flip|"
    r"(sleep|times)=[0-9.]+)"
)
_passed: Counter[tuple[str, str]] = Counter()


def point(name: str) -> None:
    """Trigger the faults of HEADWAY_FAULT for the point `name`, one of POINTS."""
    for act in _due(name):
        _happen(act)


def passing(name: str, number: Tensor) -> Tensor:
    """Return `number`, multiplied by the factor of HEADWAY_FAULT for this point if there is one."""
    for act in _due(name):
        number = number * float(act.removeprefix("times="))
    return number


def memory(name: str, tensor: Tensor) -> None:
    """Flip a bit of `tensor` in place if HEADWAY_FAULT says so for this point."""
    for act in _due(name):
        import torch

        assert act == "flip", act
        tensor.view(-1).view(torch.uint8)[1] ^= 1


def watch(name: str, parameter: Tensor) -> None:
    """Apply the faults of HEADWAY_FAULT to the gradient of this parameter in each backward pass."""
    if name in os.environ.get(VARIABLE, ""):
        parameter.register_hook(lambda gradient: passing(name, gradient))


def _due(name: str) -> list[str]:
    """Actions due at this pass of the point on this rank."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return []
    assert name in POINTS, name
    _passed[text, name] += 1
    own = (None, os.environ.get("RANK"))
    here = [fault for fault in _faults(text) if fault["point"] == name and fault["rank"] in own]
    return [fault["act"] for fault in here if _passed[text, name] == int(fault["nth"] or 1)]


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
