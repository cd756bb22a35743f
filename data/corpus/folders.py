"""The files that the paths of a corpus stand for, and those that are left out.

Linked folders are followed, each folder once. What cannot be read is an error: a folder without permission, a link
whose target is missing. What is not taken is counted, so that no file is left out without a word.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from headway.data.config import DataError
from headway.data.places import looked_for

_PACKED = r"(?:\.(?:gz|gzip|bz2|xz|zst|zstd))?"
ENDINGS = {
    "text": r".*",
    "jsonl": rf".*(?:\.(?:jsonl|ndjson){_PACKED}|\.json\.(?:gz|gzip|bz2|xz|zst|zstd))",
    "parquet": r".*\.(?:parquet|parq|pq)",
}
ENDINGS["pairs"] = f"(?:{ENDINGS['jsonl']})|(?:{ENDINGS['parquet']})"
"""Pattern of the names that a folder stands for, by type of corpus, in any case."""

_USUAL = {"text": "txt", "pairs": "jsonl"}
_EXAMPLES = 5


@dataclass
class Found:
    """Files of a corpus. taken: path -> id. left_out: reason -> count. examples: reason -> the first few paths."""

    taken: dict[Path, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Path]] = field(default_factory=dict)

    def leave_out(self, path: Path, reason: str) -> None:
        self.left_out[reason] += 1
        if len(examples := self.examples.setdefault(reason, [])) < _EXAMPLES:
            examples.append(path)


def find(paths: list[str], type: str) -> Found:
    """The files that `paths` (files, folders or patterns) stand for, sorted within each path.

    Raises DataError if a path stands for no file, for a link whose target is missing, and for what cannot be listed.
    """
    found = Found()
    for given in paths:
        before = sum(found.left_out.values())
        matches = list(_matches(given, type, found))
        if not matches:
            raise DataError(_nothing(given, type, found, sum(found.left_out.values()) - before))
        for id, path in matches:
            found.taken.setdefault(path, id)
    return found


def summary(found: Found) -> list[str]:
    """Lines for the user about what was left out; none if everything was taken."""
    total = sum(found.left_out.values())
    if not total:
        return []
    files = "file" if len(found.taken) == 1 else "files"
    lines = [f"corpus.paths: {len(found.taken):,} {files} taken, {total:,} left out:"]
    if total > len(found.taken):
        lines = [f"WARNING: corpus.paths: most files are left out: {len(found.taken):,} {files} taken, {total:,} not:"]
    for reason, count in sorted(found.left_out.items()):
        names = ", ".join(str(path) for path in found.examples[reason])
        lines.append(f"  {count:,} {reason}: {names}{', ...' if count > _EXAMPLES else ''}")
    if any(reason.startswith("with the ending") for reason in found.left_out):
        lines.append("  To read some of them too, give them by name or pattern, as in 'folder/**/*.json'")
    return lines


def _nothing(given: str, type: str, found: Found, left_out: int) -> str:
    path = Path(given).expanduser()
    if path.is_symlink() and not path.exists():
        return _broken(path)
    if left_out:
        names = ", ".join(str(path) for paths in found.examples.values() for path in paths)
        return (
            f"corpus.paths: none of the {left_out:,} files in {given!r} has an ending of the corpus type {type!r} "
            f"({names}); name them by a pattern if they have its format, or set another corpus.type"
        )
    return (
        f"corpus.paths: {given!r} matches no file; give an existing file or folder, or a pattern such as "
        f"'folder/**/*.{_USUAL.get(type, type)}'{looked_for(given)}"
    )


def _broken(path: Path) -> str:
    return (
        f"{path}: a link to {path.readlink()}, which does not exist; restore the target (a dataset that was fetched "
        "in part, a disk that is not mounted), or remove the link"
    )


def _matches(given: str, type: str, found: Found) -> Iterator[tuple[str, Path]]:
    path = Path(given).expanduser()
    if path.is_file():
        yield path.name, path.absolute()
        return
    if path.is_dir():
        base, names = path, []
        for name in _walk(path):
            fits = re.fullmatch(ENDINGS[type], name.name, re.IGNORECASE | re.DOTALL)
            if fits or (name.is_symlink() and not name.exists()):
                names.append(name)
            else:
                found.leave_out(name, f"with the ending {''.join(name.suffixes[-2:]) or '(none)'}")
    else:
        wild = next((place for place, part in enumerate(path.parts) if set(part) & set("*?[")), None)
        if wild is None:
            return
        base = Path(*path.parts[:wild])
        names = list(_globbed(given, base, path.parts[wild:]))
    for name in sorted(names, key=lambda p: p.as_posix()):
        relative = name.relative_to(base)
        if any(part.startswith(".") for part in relative.parts):
            continue
        if name.is_symlink() and not name.exists():
            raise DataError(_broken(name))
        if name.is_file():
            yield relative.as_posix(), name.absolute()
        elif name.is_dir():
            found.leave_out(name, "a folder, which a pattern enters only with **")
        else:
            found.leave_out(name, "not a regular file")


def _globbed(given: str, base: Path, pattern: tuple[str, ...]) -> Iterator[Path]:
    if any("**" in part and part != "**" for part in pattern):
        raise DataError(
            f"corpus.paths: {given!r} is not a valid pattern; use `**` only as a whole path component, as in "
            "'folder/**/*.txt'"
        )
    if "**" in pattern:  # that of pathlib does not follow links
        return (path for path in _walk(base) if _fits(path.relative_to(base).parts, pattern))
    return base.glob(str(Path(*pattern)))


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a relative path fits a pattern, whose `**` stands for any number of folders."""
    reached = {0}  # numbers of parts that the pattern so far may stand for
    for step in pattern:
        if step == "**":
            reached = set(range(min(reached, default=len(parts) + 1), len(parts) + 1))
        else:
            reached = {n + 1 for n in reached if n < len(parts) and fnmatch.fnmatchcase(parts[n], step)}
    return len(parts) in reached


def _walk(base: Path) -> Iterator[Path]:
    """All files below a folder that are not hidden, also through linked folders; each folder once.

    Links come after real folders, so that a file keeps the name that it has without them.
    """
    seen = {base.resolve()}
    waiting = [base]
    links: list[Path] = []
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        if folder is not base and folder.is_symlink():
            target = folder.resolve()
            if target in seen:
                continue
            seen.add(target)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"{folder}: cannot be listed ({error.strerror}); fix its permissions, or give the files by name"
            ) from error
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                yield path
            elif entry.is_symlink():
                links.append(path)
            elif (real := path.resolve()) not in seen:
                seen.add(real)
                waiting.append(path)
