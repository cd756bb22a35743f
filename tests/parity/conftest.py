"""Lets the tests here import the modules beside them, which are no package: a run starts them as scripts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
