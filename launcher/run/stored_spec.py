"""Load the resolved spec of a run folder."""

from __future__ import annotations

from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec


def stored_spec(run: RunDir) -> Spec:
    """Load the spec in `spec.json` with this installation.

    Raises NoInputError if the file does not exist, SpecError if it is damaged or invalid in this installation: the
    package of its mechanism may not be installed. The message names line and key.
    """
    try:
        return Spec.model_validate_json(run.spec.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return load_spec(run.spec, no_auto=None).spec  # slower, but its error locates the problem
