"""Run by processes that a fork server starts as ranks: a script with arguments, as Python and torchrun run it.

The worker is `rank_script SCRIPT ARGUMENTS ...`; the folder of SCRIPT is the first of sys.path.
"""

import runpy
import sys
from pathlib import Path


def main() -> int:
    """Returns the exit status of the script."""
    sys.argv = sys.argv[1:]
    script = Path(sys.argv[0]).resolve()
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
