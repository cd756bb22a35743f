"""How Headway starts itself in a process of its own."""

from __future__ import annotations

import sys

COMMAND = (sys.executable, "-P", "-m", "headway.launcher")
"""The `headway` command. -P: the folder the user stands in must not be able to shadow a module."""
