"""Measure the passes of one rank in a child process, for the search for a micro-batch."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from headway.launcher.base.errors import HeadwayError
from headway.launcher.hosts.faults import quoted
from headway.launcher.hosts.processes import become_child
from headway.launcher.plan.free_memory import available_bytes
from headway.launcher.plan.hardware import GIB, RESERVED_BYTES, USABLE
from headway.launcher.plan.micro_batch.plan import memory_of
from headway.launcher.plan.micro_batch.search import Timed
from headway.launcher.spec.spec import Spec

# -P: a file in the working directory must not shadow a module
COMMAND = (sys.executable, "-P", "-m", "headway.launcher.plan.micro_batch.child")

PROCESS_BYTES = 0.5 * GIB
"""Host memory that Python, PyTorch and DeepSpeed use in each rank: assumed, not measured."""

SILENT_S = 600.0
"""Timeout for an answer of the child process."""


class Rank:
    """One rank of a spec whose layout has one rank per model; use it in a `with` statement.

    The vocabulary size of `spec` must be set. The attribute `spec` also has the device set. `limit_bytes`: memory
    available to a rank of this host. Raises HeadwayError if the child ends for another reason than lack of memory.
    """

    def __init__(self, spec: Spec, environment: Mapping[str, str], *, command: Sequence[str] = COMMAND) -> None:
        with contextlib.ExitStack() as stack:
            self._words = stack.enter_context(tempfile.TemporaryFile())
            self._process = subprocess.Popen(
                list(command),
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words,
                start_new_session=True,
                preexec_fn=become_child,
            )
            stack.callback(self._end)
            self._rest = b""
            self._send(spec.model_dump_json())
            told = self._answer()
            if isinstance(told, str):
                raise HeadwayError(
                    f"train.micro_batch: auto: {told}, before any size was tried; write a number for "
                    "train.micro_batch, or free memory on this host"
                )
            self.device: str = told["device"]
            self.on_cpu = told["total_bytes"] is None
            launch = spec.launch.model_copy(update={"device": "cpu" if self.on_cpu else "cuda"})
            self.spec = spec.model_copy(update={"launch": launch})
            if self.on_cpu:
                self.limit_bytes = USABLE * available_bytes() / launch.processes - PROCESS_BYTES
            else:
                self.limit_bytes = USABLE * min(told["free_bytes"], told["total_bytes"] - RESERVED_BYTES)
            self._open = stack.pop_all()

    def planned_bytes(self, micro_batch: int) -> float | None:
        """Memory by the plan on a CPU, where lack of memory could end other processes, so the plan must exclude it."""
        return memory_of(self.spec, micro_batch).peak if self.on_cpu else None

    def run(self, micro_batch: int) -> Timed | str:
        """Time passes. On a GPU their memory is measured; all other memory is computed by the plan."""
        self._send(json.dumps({"micro_batch": micro_batch}))
        told = self._answer()
        if isinstance(told, str):
            return told
        if "out_of_memory" in told:
            return str(told["out_of_memory"])
        memory = memory_of(self.spec, micro_batch)
        passes = memory.passes if told["passes_bytes"] is None else float(told["passes_bytes"])
        return Timed(seconds=told["seconds"], memory_bytes=memory.peak_with(passes))

    def close(self) -> None:
        """Kill the child."""
        self._open.close()

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # unsent data to a process that has ended
                    pipe.close()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended; `_answer` finds out why
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def _answer(self) -> dict[str, Any] | str:
        """The child's next answer; a text if it was killed by SIGKILL."""
        assert self._process.stdout is not None
        source, end = self._process.stdout.fileno(), time.monotonic() + SILENT_S
        while b"\n" not in self._rest:
            if not select.select([source], [], [], max(0.0, end - time.monotonic()))[0]:
                raise HeadwayError(
                    f"train.micro_batch: auto: no answer for {SILENT_S:.0f} s; write a number for train.micro_batch"
                )
            part = os.read(source, 1 << 16)
            if not part:
                return self._ended()
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def _ended(self) -> str:
        status = self._process.wait()
        if status == -signal.SIGKILL:
            return "the child process was killed by SIGKILL, probably because memory ran out"
        self._words.seek(0)
        last = self._words.read()[-4000:].decode(errors="replace").splitlines()[-8:]
        raise HeadwayError(
            "\n".join(
                [
                    f"train.micro_batch: auto: the passes could not be measured (status {status}); write a number for "
                    "train.micro_batch to start without a measurement. Output of the process:",
                    *quoted(last),
                ]
            )
        )
