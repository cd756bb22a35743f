"""launch.timeout_s applies to every process group, including those that DeepSpeed creates."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("group_timeouts.py")


def test_every_group_of_every_engine_has_the_timeout_of_the_spec():
    # F4: DeepSpeed passes no timeout to the groups it creates, and torch's default is half an hour.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-P", str(SCRIPT)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("GROUPS "))
    found = json.loads(line.removeprefix("GROUPS "))
    for layout, groups in found.items():
        assert groups[0][0] == [], "the first one is that of all ranks"
        assert [timeout for _, timeout in groups] == [77.0] * len(groups), (layout, groups)
    # Headway creates eight of the pipeline's groups, DeepSpeed the rest.
    assert {layout: len(groups) for layout, groups in found.items()}["tp2 pp2 dp2"] > 9
