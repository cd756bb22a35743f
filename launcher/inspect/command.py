"""`headway inspect`: measure a model, and write a page, a figure and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.errors import SpecError
from headway.launcher.evaluate.texts import TextSource
from headway.launcher.exchange.opened import open_model
from headway.launcher.inspect.inspection import inspect_model
from headway.launcher.inspect.page import blocks_of, draw, json_of
from headway.launcher.inspect.sample import own_sample
from headway.launcher.report.page import to_html, to_markdown
from headway.launcher.run.run_dir import RunDir, write_json, write_text


def inspect(
    path: Path,
    *,
    text: TextSource | None,
    sequences: int,
    length: int,
    step: int | None,
    out: Path | None,
    as_json: bool,
) -> int:
    """Inspect a run or weights, and write the folder `out`; RUN/inspection by default."""
    model = open_model(path, step)
    if out is None and not RunDir(path).spec.is_file():
        raise SpecError(f"--out: {path} is no run folder, which would get the page; name a folder for it")
    folder = out or path / "inspection"
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"--out: {folder} is a file; name a folder for the page, or remove the file")
    found = inspect_model(model, own_sample(model, text, sequences=sequences, length=length))
    folder.mkdir(parents=True, exist_ok=True)
    blocks = list(blocks_of(found, draw(found, folder)))
    write_text(folder / "inspection.md", to_markdown(blocks))
    write_text(folder / "inspection.html", to_html(blocks, title=f"Inspection of {path.name}", folder=folder))
    write_json(folder / "inspection.json", json_of(found))
    if as_json:
        console.emit(json_of(found))
    console.say(to_lead(blocks))
    console.say(f"page: {folder / 'inspection.html'}")
    return 0


def to_lead(blocks: Sequence[Any]) -> str:
    """The paragraph that a page begins with."""
    return next(block.text for block in blocks if getattr(block, "tone", "") == "lead")
