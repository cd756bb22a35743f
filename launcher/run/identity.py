"""What all ranks of a run must have in common, compared before a model is built."""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from headway.data.config import DataError
from headway.launcher.base.errors import HeadwayError, SpecError, printable
from headway.launcher.run.machine import versions
from headway.launcher.run.run_dir import difference, flatten
from headway.launcher.spec.spec import Spec
from headway.model.attention.external import provenance


class Gathers(Protocol):
    """What is asked of a layout."""

    def gather_json(self, value: Any) -> list[Any]: ...


def code_hash(folders: Sequence[str] = ("launcher", "parallel", "model", "data", "kernels")) -> str:
    """Of Headway's own sources: ranks with different ones do not compute the same. sha256, 16 hex digits."""
    folder, found = Path(__file__).resolve().parents[2], hashlib.sha256()
    for name in folders:
        for path in sorted((folder / name).rglob("*.py")):
            found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


def run_identity(spec: Spec, fingerprint: str | None) -> dict[str, str]:
    """The card of a rank: name of a thing that must be equal -> its value. Seeds are in the spec.

    `fingerprint`: of the data, None where it is synthetic.
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
    """Version and sources of the package that an external mechanism comes from; empty for a built-in one."""
    found = provenance(spec.attention)
    return {"mechanism package": found["package"], "mechanism sources": found["sources"]} if found else {}


def identity_hash(card: dict[str, str]) -> str:
    """sha256 of a card, 16 hex digits."""
    return hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()[:16]


def check_identity(spec: Spec, fingerprint: str | None, layout: Gathers) -> None:
    """Compare the cards of all ranks; collective, and every rank ends alike.

    Raises SpecError (64) where specs or seeds differ, DataError (65) where the data does, HeadwayError (70) where the
    code or a version does; each names the rank, its host, what differs and both values.
    """
    mine = run_identity(spec, fingerprint)
    reports = layout.gather_json({"host": socket.gethostname(), "card": mine})
    cards = [report["card"] for report in reports]
    if all(card == cards[0] for card in cards):
        return
    specs = [card.get("spec") for card in cards]
    flat = flatten(spec.model_dump(mode="json"))
    # Only where they differ: a spec is thousands of times as long as its hash.
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
    """The first rank that has the commonest card."""
    texts = [json.dumps(card, sort_keys=True) for card in cards]
    return texts.index(Counter(texts).most_common(1)[0][0])


def _shown(value: Any) -> str:
    return printable(str(value))
