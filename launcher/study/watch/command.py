"""Start the page of a study file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headway.launcher.base import console
from headway.launcher.study.config import load_study
from headway.launcher.study.ladder.run import parts_of
from headway.launcher.study.watch.page import Pages, Part
from headway.launcher.study.watch.server import LOOPBACK, serve


def watch(path: Path, overrides: Sequence[str], *, port: int) -> int:
    """Serve the page until a signal arrives. Returns 0. The study may begin, continue and end meanwhile."""
    study = load_study(path)

    def parts() -> list[Part]:
        if study.config.is_ladder:
            return [Part(label=label, study=part) for label, part in parts_of(study)]
        return [Part(label="", study=study)]

    def ready(at: int) -> None:
        console.result(f"http://{LOOPBACK}:{at}/")
        console.note("stop with Ctrl-C; from another machine: ssh -N -L " + f"{at}:{LOOPBACK}:{at} USER@HOST")

    serve(Pages(study.config.study, parts), study.out / "report.html", port, ready)
    return 0
