"""Run the checks of kernels on the CPU, in Triton's interpreter.

    python -P tests/kernels/interpreted.py headway.kernels.checks.v0 [CHECK=MODULE.FUNCTION ...]

Prints one JSON object a line for each check, or for each of those named, with the launch function broken. In a process
of its own: Triton decides at its import whether it interprets, and PyTorch may have imported it before.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import contextlib
import importlib
import itertools
import json
import sys

import torch


@contextlib.contextmanager
def broken(name):
    """Let a launch function write a wrong first number, another one each time."""
    module, _, function = name.rpartition(".")
    module = importlib.import_module(module)
    right, number = getattr(module, function), itertools.count()

    def wrong(*args):
        right(*args)
        args[-1].view(-1)[:1] = -7 - next(number)  # nothing where the result is empty

    setattr(module, function, wrong)
    yield
    setattr(module, function, right)


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills new memory too: what is not written stays NaN
    assert torch.empty(1).isnan().all()
    checks = importlib.import_module(sys.argv[1]).CHECKS
    for check, _, launch in (argument.partition("=") for argument in sys.argv[2:] or checks):
        with broken(launch) if launch else contextlib.nullcontext():
            errors = checks[check](torch.device("cpu"), torch.float32)
        print(json.dumps({"check": check, "broken": launch, "errors": errors}), flush=True)


if __name__ == "__main__":
    main()
