"""`headway study merge` of studies with sizes or trials: every study that they consist of is merged on its own."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.errors import SpecError, printable
from headway.launcher.run.run_dir import read_mapping, write_json
from headway.launcher.study.config import load_study
from headway.launcher.study.keeping import STUDY
from headway.launcher.study.ladder.run import LADDER
from headway.launcher.study.ladder.trials import TUNING
from headway.launcher.study.merge import (
    Joint,
    as_record,
    check_alike,
    fill,
    join,
    made_whole,
    merge_command,
    merge_studies,
    nothing_finished,
    refusal,
    refuse_full,
    say_cells,
)

PARTS = ("", "tune/*/*", "sizes/*", "sizes/*/tune/*/*")
"""Where the studies are that a study with sizes or trials consists of."""

_ALIKE = ("study", "baseline", "variants", "tokens_per_param", "scale", "tune")
"""Keys of ladder.json that must be equal in all sources."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder of a study and, where its file was named, that of its records. `ladder`: the content of ladder.json."""

    name: str
    roots: tuple[Path, ...]
    ladder: dict[str, Any]

    def parts(self) -> list[str]:
        """Places of all studies below the folders, relative to them. Trials come after the study of their size."""
        found = {
            file.parent.relative_to(root).as_posix()
            for root in self.roots
            for part in PARTS
            for file in root.glob(f"{part}/{STUDY}" if part else STUDY)
        }
        return sorted("" if part == "." else part for part in found)

    def folder(self, part: str, name: str) -> Path | None:
        """The first folder of a part that contains the file `name`."""
        return next((root / part for root in self.roots if (root / part / name).is_file()), None)


def merge_folders(paths: Sequence[Path], to: Path) -> int:
    """Join the finished cells of the sources into the folder `to`: plain studies, or studies with sizes or trials.

    Arguments and errors as for `merge_studies`. Sources with sizes must agree in their rules, and in the tuned values
    of each size. Parts without a finished cell are named and left out.
    """
    sources = [_source(path) for path in paths]
    whole = [bool(source.ladder or any(source.parts())) for source in sources]
    if not any(whole):
        return merge_studies(paths, to)
    if not all(whole):
        one, other = sources[whole.index(True)].name, sources[whole.index(False)].name
        raise SpecError(
            f"{one} has sizes or trials and {other} has not, so they are not one study; merge folders of the same "
            f"kind: that of a single size is {one}/sizes/NAME"
        )
    refuse_full(to)
    ladder = _joint_ladder(sources)
    joints: dict[str, Joint] = {}
    for part in sorted({part for source in sources for part in source.parts()}):
        folders = [folder for source in sources if (folder := source.folder(part, STUDY)) is not None]
        joints[part] = join(folders)
    tunings = {part: found for part in joints if (found := _joint_tuning(sources, part))}
    found = [cell for joint in joints.values() for cell in joint.found]
    if not found:
        raise nothing_finished(paths, [one for joint in joints.values() for one in joint.left_out])
    check_alike(found)
    kept = {part: joint for part, joint in joints.items() if joint.chosen}
    with made_whole(to) as making:
        for part, joint in kept.items():
            fill(making / part, joint, command=merge_command(paths, to), records=making / "records" / part)
        for part, tuning in tunings.items():
            if part in kept:
                write_json(making / part / TUNING, tuning)
        if ladder:
            write_json(making / LADDER, {**ladder, "command": merge_command(paths, to)})
    _say(to, joints, kept)
    return 0


def _source(path: Path) -> Source:
    name, roots = printable(str(path), 300), (path,)
    if path.is_file():
        study = load_study(path)
        roots = tuple(root for root in (study.out, study.records) if root is not None and root.is_dir())
    ladder = next((found for root in roots if (found := read_mapping(root / LADDER))), {})
    return Source(name=name, roots=roots, ladder=ladder)


def _joint_ladder(sources: Sequence[Source]) -> dict[str, Any]:
    """ladder.json with the sizes of all sources; empty for studies without sizes. Raises SpecError if they differ."""
    first, sizes, wrong = sources[0], dict[str, tuple[str, dict[str, Any]]](), list[str]()
    for source in sources:
        wrong += [
            f"{key}: {first.ladder.get(key)!r} in {first.name}, {source.ladder.get(key)!r} in {source.name}"
            for key in _ALIKE
            if first.ladder.get(key) != source.ladder.get(key)
        ]
        for size in source.ladder.get("sizes", []):
            where, known = sizes.setdefault(size["name"], (source.name, size))
            wrong += [
                f"size {size['name']}: {key}: {known.get(key)!r} in {where}, {size.get(key)!r} in {source.name}"
                for key in ("params", "tokens", "keys")
                if known.get(key) != size.get(key)
            ]
    if wrong:
        raise refusal(wrong)
    if not first.ladder:
        return {}
    left = {key: value for key, value in first.ladder.items() if key != "written_at"}
    return {**left, "sizes": sorted((size for _, size in sizes.values()), key=lambda size: size.get("params", 0))}


def _joint_tuning(sources: Sequence[Source], part: str) -> dict[str, Any]:
    """tuning.json of a study, the one with most of it; empty if none has it.

    Raises SpecError if chosen values differ.
    """
    folders = [(source.name, source.folder(part, TUNING)) for source in sources]
    found = [(name, read_mapping(folder / TUNING)) for name, folder in folders if folder is not None]
    chosen: dict[tuple[str, str], tuple[str, Any]] = {}
    wrong: list[str] = []
    for name, tuning in found:
        for key, search in tuning.get("keys", {}).items():
            for variant, choice in search.get("variants", {}).items():
                own = choice.get("chosen")
                where, value = chosen.setdefault((key, variant), (name, own))
                if value != own:
                    wrong.append(
                        f"{part or 'study'}: tuned {key} of {variant}: {value!r} in {where}, {own!r} in {name}"
                    )
    if wrong:
        raise refusal(wrong)

    def length(tuning: dict[str, Any]) -> tuple[int, int]:
        searches = tuning.get("keys", {}).values()
        return len(searches), sum("check" in search for search in searches)

    return max((tuning for _, tuning in found), key=length, default={})


def _say(to: Path, joints: dict[str, Joint], kept: dict[str, Joint]) -> None:
    for part, joint in joints.items():
        console.say(f"{part or 'study'}: {len(joint.chosen)} of {len(joint.design['cells'])} cells")
        say_cells(joint)
    if console.wants_json():
        console.emit({"out": str(to), "parts": {part or ".": as_record(joint) for part, joint in kept.items()}})
        return
    cells = sum(len(joint.chosen) for joint in kept.values())
    every = sum(len(joint.design["cells"]) for joint in joints.values())
    console.result(
        f"{cells} of {every} cells merged into {to}; their report: headway study report {shlex.quote(str(to))}"
    )
