"""Load the resolved spec of a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headway.data.config import DataError, SyntheticSource, datasets_of, with_paths
from headway.data.places import remember
from headway.launcher.run.run_dir import RunDir, read_mapping
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec


def stored_spec(run: RunDir) -> Spec:
    """Load the spec in `spec.json` with this installation. Its dataset is found from any working folder (`_placed`).

    Raises NoInputError if the file does not exist, SpecError if it is damaged or invalid in this installation: the
    package of its mechanism may not be installed. The message names line and key.
    """
    try:
        spec = Spec.model_validate_json(run.spec.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        spec = load_spec(run.spec, no_auto=None).spec  # slower, but its error locates the problem
    return _placed(spec, run)


def _placed(spec: Spec, run: RunDir) -> Spec:
    """The spec with the dataset's path made absolute if it is relative and not in the working folder.

    It is looked for in the folders that contain the run, the nearest first, and then in the folder in which the run was
    started. A dataset counts if it has the fingerprint that the run was trained on. So a project folder may be moved,
    and commands may be given anywhere.
    """
    source = spec.data.source
    if isinstance(source, SyntheticSource):
        return spec
    written = [Path(part.path) for part in datasets_of(source)]
    if all(path.expanduser().is_absolute() or path.exists() for path in written):
        return spec
    card = read_mapping(run.card)
    folders = [*run.path.resolve().parents, *([Path(start)] if (start := card.get("working_dir")) else [])]
    for folder in folders:
        if _fingerprint(paths := [folder / path.expanduser() for path in written]) == card.get("data_fingerprint"):
            placed = with_paths(source, [str(path) for path in paths])
            return spec.model_copy(update={"data": spec.data.model_copy(update={"source": placed})})
    for path in written:
        remember(str(path), folders)
    return spec


def _fingerprint(datasets: Sequence[Path]) -> str | None:
    from headway.data.manifest import read_manifest
    from headway.data.mixture import mixed_fingerprint

    try:
        found = [read_manifest(folder).fingerprint for folder in datasets]
    except DataError:
        return None
    return found[0] if len(found) == 1 else mixed_fingerprint(found)
