"""Measure rows in order of importance until the time is up, and write each row when it is done.

OUT/machine.json describes code and device; OUT/rows.jsonl has one line per row. The same command continues where it
stopped: rows that exist for the same code and device are not measured again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.errors import SpecError
from headway.launcher.bench.gpu.rows import GPU, REDUCED, Absent, Failed, Machine, Row
from headway.launcher.run.identity import code_hash
from headway.launcher.run.machine import git_commit, machine, versions

PARTS = ("ceilings", "correctness", "steps", "levers", "layers", "forms", "products", "prefill")
FIRST_LIMITS = ("ceilings/copy", "ceilings/matmul")
MARGIN_S = 5.0
WRONG_RESULT = 70
"""Exit status if a kernel's result is wrong. The other rows are still measured."""
_WRONG = ("wrong", "crashed")


def bench_gpu(*, minutes: float, out: Path, device: str = "cuda", parts: Sequence[str] = PARTS) -> int:
    """Measure the rows that fit into `minutes`. Returns 0, or 70 if a kernel gave a wrong result or broke the device,
    now or in an existing row of `out`.

    `device` "cpu" runs every row in a reduced form, whose numbers do not apply to a GPU. Raises SpecError for a missing
    device, unknown parts, or no time.
    """
    deadline = time.monotonic() + 60 * minutes - MARGIN_S
    if minutes <= 0:
        raise SpecError(f"--minutes: {minutes:g} leaves no time; use 8, or 2 for the first rows")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise SpecError(f"--parts: {unknown[0]!r} is not one of {', '.join(PARTS)}; use one of them, or omit --parts")
    here = _machine(device)
    card = _card(here)
    out.mkdir(parents=True, exist_ok=True)
    (out / "machine.json").write_text(json.dumps(card, indent=1) + "\n")
    done = {row["key"]: row["status"] for row in read_rows(out) if _same(row, card) and row["status"] != "failed"}
    rows = [row for row in all_rows(here) if row.part in parts]
    late, wrong = [], []
    for i, row in enumerate(rows, 1):
        if row.key in done:
            console.note(f"{i}/{len(rows)} {row.key}: already measured")
            wrong += [row.key] if done[row.key] in _WRONG else []
            continue
        left = deadline - time.monotonic()
        if left < (row.seconds if here.is_gpu else 0.0):
            late.append(row.key)
            continue
        console.note(f"{i}/{len(rows)} {row.key}: {row.what} ({max(0.0, left):.0f} s left)")
        line = _measured(row, here)
        _append(out / "rows.jsonl", line | {"id": card["id"], "reduced": not here.is_gpu})
        console.note(f"    {line['status']} in {line['took_s']:.1f} s {line.get('why', '')}".rstrip())
        wrong += [row.key] if line["status"] in _WRONG else []
        if line["status"] == "crashed":
            console.warn(
                f"THE DEVICE IS LOST after {row.key}; run the same command again to continue with the next rows"
            )
            break
    if late:
        console.note(f"not measured, no time: {', '.join(late)}; run the same command again to measure them")
    if wrong:
        console.warn(f"WRONG RESULTS: {', '.join(wrong)}; do not train with these kernels")
    console.result(f"written to {out / 'rows.jsonl'}; tables: headway bench report {out}")
    return WRONG_RESULT if wrong else 0


def all_rows(here: Machine) -> list[Row]:
    """All rows, the most important first.

    The headline (gqa and rgqa at the first size, every length) comes before everything that it does not need: two
    limits of the machine, correctness of what it uses, its own rows. Then the other limits and checks, the other rows
    of the first size, and the other sizes.
    """
    from headway.launcher.bench.gpu.ceilings import ceilings
    from headway.launcher.bench.gpu.correctness import correctness, headline_correctness
    from headway.launcher.bench.gpu.forms import forms
    from headway.launcher.bench.gpu.layers import layers
    from headway.launcher.bench.gpu.levers import levers
    from headway.launcher.bench.gpu.prefill import prefill
    from headway.launcher.bench.gpu.products import products
    from headway.launcher.bench.gpu.steps import headline, steps

    limits = ceilings()
    rows = [row for row in limits if row.key in FIRST_LIMITS]
    rows += [*headline_correctness(here), *headline(here), *limits, *correctness()]
    for size in here.scale.sizes:
        of_size = Machine(device=here.device, scale=dataclasses.replace(here.scale, sizes=(size,)))
        for part in (steps, levers, layers, forms, products, prefill):
            rows += part(of_size)
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row.key, row)
    return list(found.values())


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows written so far, in order; truncated lines are skipped."""
    try:
        lines = (folder / "rows.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and {"key", "status", "id"} <= row.keys():
            rows.append(row)
    return rows


def _machine(device: str) -> Machine:
    import torch

    if device == "cpu":
        return Machine(device=torch.device("cpu"), scale=REDUCED)
    if not torch.cuda.is_available():
        raise SpecError(
            "bench gpu: no GPU found (`headway doctor` shows details); run it on a machine with a GPU, or use "
            "--device cpu, which runs every row in a reduced form"
        )
    return Machine(device=torch.device("cuda", 0), scale=GPU)


def _card(here: Machine) -> dict[str, Any]:
    """The setting of the measurements. `id` identifies code, device and versions."""
    import torch

    card: dict[str, Any] = {
        "code": code_hash(("kernels", "model", "launcher/bench/gpu")),
        "git_commit": git_commit(),
        "device": torch.cuda.get_device_name(here.device) if here.is_gpu else "cpu",
        "scale": here.scale.name,
        "machine": machine(),
        "versions": versions() | {"triton": _triton_version(), "cuda": torch.version.cuda},
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if here.is_gpu:
        found = torch.cuda.get_device_properties(here.device)
        card["gpu"] = {
            "memory_bytes": found.total_memory,
            "multiprocessors": found.multi_processor_count,
            "capability": [found.major, found.minor],
            "l2_bytes": getattr(found, "L2_cache_size", None),
        }
    card["id"] = f"{card['code']} {card['device']} torch {torch.__version__} triton {card['versions']['triton']}"
    return card


def _triton_version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _same(row: dict[str, Any], card: dict[str, Any]) -> bool:
    return row["id"] == card["id"]


def _measured(row: Row, here: Machine) -> dict[str, Any]:
    """The row's line, with its status.

    measured; absent: something is missing here; wrong: a kernel's result is wrong; failed: an exception was raised;
    crashed: the device is lost.
    """
    import torch

    line: dict[str, Any] = {"key": row.key, "what": row.what, "status": "measured"}
    t0 = time.monotonic()
    try:
        line["data"] = row.run(here)
    except Absent as why:
        line |= {"status": "absent", "why": str(why)}
    except Failed as found:
        line |= {"status": "wrong", "why": str(found), "data": found.data}
    except torch.OutOfMemoryError as error:
        line |= {"status": "failed", "why": f"out of memory: {str(error).splitlines()[0][:300]}"}
    except Exception as error:  # a failed row must not prevent later rows
        line |= {"status": "failed", "why": f"{type(error).__name__}: {error}"[:600]}
    if line["status"] == "failed" and here.lost():
        line["status"] = "crashed"
    else:
        here.free()
    return line | {"took_s": time.monotonic() - t0}


def _append(file: Path, line: dict[str, Any]) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps(line, default=_plain) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)
