"""Restart the ranks of a run after one has died or hung, within a budget of restarts without a new checkpoint."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace

from headway.launcher.base import console
from headway.launcher.hosts.faults import Fault
from headway.launcher.run.run_dir import RunDir
from headway.parallel.manifest import step_of, steps_on_disk

_LONGEST_S = 60.0


class Restarts:
    """The restart budget of a run, held by its first host: `limit` restarts in a row without a new checkpoint."""

    def __init__(self, run: RunDir, limit: int) -> None:
        self._run, self._limit = run, limit
        self._in_vain, self._reached = 0, self._newest()

    def grant(self, fault: Fault | None) -> Fault | None:
        """Decide whether the ranks are restarted after `fault`. Returns the fault with `again` set accordingly."""
        if fault is None:
            return None
        newest = self._newest()
        if newest > self._reached:
            self._in_vain, self._reached = 0, newest
        again = fault.again and self._in_vain < self._limit
        text = fault.text
        if fault.again and not again and self._limit:
            text += (
                f"\nrestarted {self._in_vain} time(s) without a new checkpoint (limit: launch.restarts); remove the "
                "cause before you start the command again"
            )
        self._in_vain += again
        self._note(fault, newest, again)
        return replace(fault, again=again, text=text)

    def pause(self, fault: Fault) -> None:
        """Print the fault and wait before the restart; the pause doubles with each restart without a new checkpoint."""
        seconds = min(_LONGEST_S, 0.5 * 2**self._in_vain) if self._in_vain else 0.0
        console.alert(
            f"{fault.text}\nrestarting the ranks from the newest checkpoint in {seconds:g} s "
            f"(restart {max(1, self._in_vain)} of {self._limit} without a new checkpoint)",
            "yellow",
        )
        time.sleep(seconds)

    def _newest(self) -> int:
        with contextlib.suppress(OSError):
            return max((step_of(p) for p in steps_on_disk(self._run.checkpoints)), default=0)
        return 0

    def _note(self, fault: Fault, newest: int, again: bool) -> None:
        """Append the fault as one line to logs/attempts.jsonl, the history of the run's attempts."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "cause": fault.text.splitlines()[0]}
        line |= {"exit": fault.code, "newest_checkpoint": newest, "started_again": again}
        with contextlib.suppress(OSError), (self._run.logs / "attempts.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
