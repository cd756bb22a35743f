"""Test each side's checkpoint reader on hundreds of damaged files, without training."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

from headway.launcher.chaos.options import damaged
from headway.launcher.chaos.sides import Side, Stock
from headway.launcher.chaos.verdict import Readings
from headway.launcher.hosts.forked import Forked
from headway.parallel.config import CheckpointError
from headway.parallel.manifest import MANIFEST, read_manifest, verify_hashes

DAMAGES = 300


def readings(side: Side, fault: str, folder: Path, chance: random.Random) -> Readings:
    """Read `DAMAGES` damaged files, spread over all files of a checkpoint.

    F7: files are truncated to random lengths. F8: one random bit is flipped.
    """
    checkpoint = folder / side.saved(side.folder / "half")[0].name
    shutil.copytree(side.saved(side.folder / "half")[0], checkpoint)
    files, found = sorted(checkpoint.iterdir()), Counter[str]()
    for i, path in enumerate(files):
        count = DAMAGES // len(files) + (i < DAMAGES % len(files))
        size = path.stat().st_size
        cuts = [
            (chance.randrange(size), -1) if fault == "F7" else (size, chance.randrange(8 * size)) for _ in range(count)
        ]
        found += _stock(side, path, cuts) if isinstance(side, Stock) else _headway(path, cuts)
    shutil.rmtree(checkpoint)
    return Readings(
        fault=fault, side=side.name, refused=found["refused"], changed=found["changed"], equal=found["equal"]
    )


def _stock(side: Stock, path: Path, cuts: list[tuple[int, int]]) -> Counter[str]:
    """Read in a separate process, because a damaged pickle may crash it or execute code."""
    out, log = path.with_name("results"), path.with_name("log")
    lines: list[str] = []
    while len(lines) < len(cuts):
        worker = ["headway.launcher.chaos.stock", "read", str(path), json.dumps(cuts[len(lines) :]), str(out)]
        with log.open("wb") as said:
            request = {"worker": worker, "processes": 1, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
            process = Forked(side.server.path, request, said.fileno(), said.fileno())
            before, status = len(lines), side.ended(process)
        lines = out.read_text().splitlines() if out.exists() else []
        if len(lines) < len(cuts):
            if len(lines) == before and status == 1 and "Traceback" in log.read_text(errors="replace"):
                raise RuntimeError(f"DeepSpeed's reader could not be started: {log.read_text()[-2000:]}")
            with out.open("a") as f:  # the process died at the next file, which counts as refused
                f.write("refused\n")
            lines.append("refused")
    for extra in (out, log):
        extra.unlink()
    return Counter(lines)


def _headway(path: Path, cuts: list[tuple[int, int]]) -> Counter[str]:
    found, body = Counter[str](), path.read_bytes()
    for length, bit in cuts:
        path.write_bytes(damaged(body, length, bit))
        try:
            verify_hashes(path.parent, read_manifest(path.parent))
        except (CheckpointError, OSError):
            found["refused"] += 1
        else:
            found["equal" if path.name == MANIFEST and _value(path.read_bytes()) == _value(body) else "changed"] += 1
    path.write_bytes(body)
    return found


def _value(manifest: bytes) -> str:
    return json.dumps(json.loads(manifest), sort_keys=True)
