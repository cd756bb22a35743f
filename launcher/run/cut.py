"""Cut the records of a run to the step that it resumes from."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headway.launcher.run.chain import Chain, begins_as
from headway.launcher.run.columns.form import Forms, kind_and_step
from headway.launcher.run.lines import Damage, Found, Lost, gaps, lines_of, relinked


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Records that are lost for good, and the end of the file that the run continues."""

    lost: Lost
    chain: Chain


def cut_tail(metrics: Path, anchor: Chain, *, last_step: int) -> Chain | None:
    """Cut the file in place after the `anchor` of a checkpoint of `last_step`. None if the file does not begin so.

    Events of earlier steps that were written after the anchor are appended again; only a crash in between loses them.
    Raises OSError.
    """
    try:
        file = metrics.open("r+b")
    except FileNotFoundError:
        return None
    with file:
        if not begins_as(file, anchor):
            return None
        chain, kept, end = replace(anchor), b"", os.fstat(file.fileno()).st_size
        for found in lines_of(file, Damage(), tag=anchor.run, before=int(anchor.crc, 16)):
            step = found.record.get("step", 0)
            if isinstance(step, int | float) and step <= last_step:
                kept += chain.line(found.record).encode() + b"\n"
        if end > anchor.bytes:
            file.truncate(anchor.bytes)
            file.seek(anchor.bytes)
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        return chain


def rewrite(metrics: Path, new: Path, chain: Chain, *, tag: str, last_step: int, partly: bool) -> Lost:
    """Write the undamaged records of `metrics` up to `last_step` into the file `new`, in the chain of the run.

    `tag`: that of the run of `metrics`. Lines of the format before chains stay as they are, since nothing is known
    about the lines between them. `partly`: later records are those of steps that the run does not have, so damage among
    them is not counted. Raises OSError.
    """
    damage, trained, at_end = Damage(), set[int](), None
    with new.open("wb") as target:
        try:
            source = metrics.open("rb")
        except FileNotFoundError:
            source = None
        if source is not None:
            with source:
                for found in lines_of(source, damage, tag=tag, parse=Forms().read):
                    kind, step = kind_and_step(found)
                    if not isinstance(step, int | float) or not step <= last_step:
                        if partly and at_end is None and kind == "train":
                            at_end = Lost.of(damage, ())
                        continue
                    target.write(_continued(found, step, chain) + b"\n")
                    if kind == "train" and isinstance(step, int) and step > 0:
                        trained.add(step)
        target.flush()
        os.fsync(target.fileno())
    lost = at_end or Lost.of(damage, ())
    return Lost(lines=lost.lines, foreign=lost.foreign, missing=lost.missing, gaps=gaps(trained, last_step))


def _continued(found: Found, step: Any, chain: Chain) -> bytes:
    """The bytes of a line as the next one of `chain`, which counts it."""
    if found.chain is None or found.chain == chain.link:
        raw = found.raw
    elif found.row is not None:
        raw = relinked(found.raw, chain.link)
    else:
        return chain.line(found.record).encode()
    chain.add(raw, step)
    return raw
