"""Check that all ranks of a run agree on spec, data, code and versions before a model is built."""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from headway.data.config import DataError
from headway.launcher.base.errors import HeadwayError, SpecError, printable
from headway.launcher.run.machine import versions
from headway.launcher.run.run_dir import difference, flatten
from headway.launcher.spec.spec import Spec
from headway.model.attention.external import provenance


class Gathers(Protocol):
    """The part of a layout that `check_identity` uses."""

    def gather_json(self, value: Any) -> list[Any]: ...


@cache
def code_hash(folders: tuple[str, ...] = ("launcher", "parallel", "model", "data", "kernels")) -> str:
    """sha256 of Headway's sources, 16 hex digits. Ranks with different sources compute different results.

    It is computed once in a process: sources that change later are not those that run.
    """
    folder, found = Path(__file__).resolve().parents[2], hashlib.sha256()
    for name in folders:
        for path in sorted((folder / name).rglob("*.py")):
            found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


def run_identity(spec: Spec, fingerprint: str | None) -> dict[str, str]:
    """The card of a rank: name -> value of each property that must be equal on all ranks. The spec contains the seeds.

    `fingerprint`: fingerprint of the data; None for synthetic data.
    """
    resolved = json.dumps(spec.model_dump(mode="json"), sort_keys=True)
    return {
        "spec": hashlib.sha256(resolved.encode()).hexdigest(),
        "data fingerprint": str(fingerprint),
        "code": code_hash(),
        **mechanism_identity(spec),
        **versions(),
    }


def mechanism_identity(spec: Spec) -> dict[str, str]:
    """Version and source hash of the package of an external mechanism; empty for a built-in one."""
    found = provenance(spec.attention)
    return {"mechanism package": found["package"], "mechanism sources": found["sources"]} if found else {}


def identity_hash(card: dict[str, str]) -> str:
    """sha256 of a card, 16 hex digits."""
    return hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()[:16]


def check_identity(spec: Spec, fingerprint: str | None, layout: Gathers) -> None:
    """Compare the cards of all ranks. Collective; all ranks return or raise the same error.

    Raises SpecError (64) if specs or seeds differ, DataError (65) if the data differs, HeadwayError (70) if the code or
    a version differs. The message names the rank, its host, the property that differs and both values.
    """
    mine = run_identity(spec, fingerprint)
    reports = layout.gather_json({"host": socket.gethostname(), "card": mine})
    cards = [report["card"] for report in reports]
    if all(card == cards[0] for card in cards):
        return
    specs = [card.get("spec") for card in cards]
    flat = flatten(spec.model_dump(mode="json"))
    # Gather specs only if their hashes differ: a spec is thousands of times as long as its hash.
    details = layout.gather_json(flat) if len(set(specs)) > 1 else None
    usual = _usual(cards)
    lines: list[str] = []
    kinds: set[str] = set()
    for rank, (report, card) in enumerate(zip(reports, cards, strict=True)):
        if card == cards[usual]:
            continue
        where = f"rank {rank} on {report['host']}"
        other = f"rank {usual} on {reports[usual]['host']}"
        found = difference(card, cards[usual])
        kinds |= {key for key, *_ in found}
        if details is not None:
            found = [f for f in found if f[0] != "spec"] + difference(details[rank], details[usual])
        lines += [f"{where} has {key} {_shown(a)}, {other} has {_shown(b)}" for key, a, b in found]
    text = "\n".join(["the ranks of this run are not of one kind:", *lines])
    if "spec" in kinds:
        raise SpecError(f"{text}\nuse one spec file, in one run folder that all hosts see")
    if "data fingerprint" in kinds:
        raise DataError(f"{text}\nevery host must see the same dataset (data.source), whole and of one version")
    raise HeadwayError(f"{text}\ninstall the same Headway and the same packages on all hosts")


def _usual(cards: list[dict[str, str]]) -> int:
    """The first rank that has the most common card."""
    texts = [json.dumps(card, sort_keys=True) for card in cards]
    return texts.index(Counter(texts).most_common(1)[0][0])


def _shown(value: Any) -> str:
    return printable(str(value))
