"""Specs that are shipped with Headway, found by name from any working folder: `headway train quickstart`.

They are the files of `yaml/` in a checkout, and the same files in `headway/yaml/` of an installation.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from headway.launcher.base.errors import NoInputError, printable

FOLDER = Path(__file__).resolve().parents[2] / "yaml"
"""The shipped files. `launcher/` and `yaml/` have the same parent folder in a checkout and in an installation."""

KINDS = {
    "spec": "headway train",
    "study": "headway study run",
    "probe": "headway probe run",
    "corpus": "headway data build",
}
"""Kind of a file -> a verb that accepts it."""

TEMPLATES = FOLDER / "project"
"""Templates that `headway init` writes. They are not found by name."""

_KEY_OF_KIND = re.compile(r"^(tasks|variants|corpus)\s*:", re.MULTILINE)
_SUFFIXES = (".yaml", ".yml")


def find_spec(given: Path, kind: str) -> Path:
    """Find the file for the argument `given`: the path itself, the path with `.yaml`, or a shipped file of `kind`.

    The name of a shipped file is its path below the shipped folder without `.yaml` (`base/quickstart`), or the last
    part of that path. A file in the working folder has precedence. Raises NoInputError with the available names if
    nothing matches.
    """
    try:
        if given.is_file():
            return given
        if given.name and given.suffix not in _SUFFIXES:
            beside = [given.with_name(given.name + suffix) for suffix in _SUFFIXES]
            if own := next((file for file in beside if file.is_file()), None):
                return own
            if found := _named(given.as_posix(), kind):
                return _short(found)
        if given.exists():
            return given
    except OSError:  # name too long, or folder not accessible: the reader of the file reports it
        return given
    raise NoInputError(_unknown(given, kind))


def shipped_names(kind: str) -> dict[str, Path]:
    """Short name -> file, for all shipped files of one kind. Files that share a short name have their longer name."""
    files = _files(kind)
    stems = [Path(name).name for name in files]
    return {name if stems.count(Path(name).name) > 1 else Path(name).name: file for name, file in files.items()}


def _files(kind: str) -> dict[str, Path]:
    found = {}
    for file in sorted(FOLDER.rglob("*.yaml")):
        name = file.relative_to(FOLDER).with_suffix("").as_posix()
        if not file.is_relative_to(TEMPLATES) and _kind_of(file) == kind:
            found[name] = file
    return found


def _kind_of(file: Path) -> str:
    keys = set(_KEY_OF_KIND.findall(file.read_text(encoding="utf-8")))
    return "probe" if "tasks" in keys else "study" if "variants" in keys else "corpus" if keys else "spec"


def _named(name: str, kind: str) -> Path | None:
    return _files(kind).get(name) or shipped_names(kind).get(name)


def _short(file: Path) -> Path:
    """The path relative to the working folder if `file` is below it, as in a checkout."""
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


def _unknown(given: Path, kind: str) -> str:
    name = given.with_suffix("").as_posix() if given.suffix in _SUFFIXES else given.as_posix()
    name = name.removeprefix("yaml/")
    text = f"{printable(str(given), 300)}: no such file (looked for {printable(str(given.absolute()), 300)})"
    for other in sorted(KINDS, key=lambda other: other != kind):
        if _named(name, other) is not None:
            use = f"use `{name}`" if other == kind else f"it is for `{KINDS[other]} {name}`"
            return f"{text}; Headway comes with a file of this name: {use}"
    if "/" in name or given.suffix in _SUFFIXES:
        return f"{text}; name a YAML file that is there, or a shipped one, such as {next(iter(shipped_names(kind)))}"
    names = list(shipped_names(kind))
    close = difflib.get_close_matches(Path(name).name, names, n=1)
    return (
        f"{text}{f'. Did you mean {close[0]}?' if close else ''}\n"
        f"name a YAML file, or one that Headway comes with: {', '.join(names)}"
    )
