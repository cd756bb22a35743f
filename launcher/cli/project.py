"""`headway init`: create the files of a first project."""

from __future__ import annotations

import shlex
from pathlib import Path

from headway.launcher.base.errors import SpecError
from headway.launcher.spec.shipped import TEMPLATES

FILES = ("README.md", "corpus.yaml", "model.yaml", "study.yaml")


def init_project(folder: Path) -> int:
    """Write a corpus, a model, a study and a README into `folder`. Creates the folder if it does not exist. Returns 0.

    Raises SpecError before writing if `folder` is a file or already contains one of the files.
    """
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"{folder}: is a file; name a folder, or a new one")
    if there := [name for name in FILES if (folder / name).is_symlink() or (folder / name).exists()]:
        raise SpecError(
            f"{folder}: {', '.join(there)} {'is' if len(there) == 1 else 'are'} there already, and nothing is "
            "overwritten; name another folder: `headway init DIR`"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        with (folder / name).open("x", encoding="utf-8") as file:  # x: never overwrite a file created in the meantime
            file.write((TEMPLATES / name).read_text(encoding="utf-8"))
        print(f"written: {folder / name}")
    steps = [] if folder.samefile(Path()) else [f"cd {shlex.quote(str(folder))}"]
    steps += ["headway data build corpus.yaml", "headway train model.yaml", "headway study run study.yaml"]
    print("\n".join(["next:", *(f"  {step}" for step in steps)]))
    return 0
