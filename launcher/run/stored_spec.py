"""The resolved spec that a run folder holds."""

from __future__ import annotations

from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec


def stored_spec(run: RunDir) -> Spec:
    """The spec in `spec.json`, as this installation reads it.

    Raises NoInputError where there is none, SpecError where it is damaged or not a spec here: its mechanism may be that
    of a package which is not installed. The message names line and key.
    """
    try:
        return Spec.model_validate_json(run.spec.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return load_spec(run.spec, no_auto=None).spec  # slower, and it says what is wrong
