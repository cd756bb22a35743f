"""`python -m headway.launcher.cli` is the `headway` command."""

import sys

from headway.launcher.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
