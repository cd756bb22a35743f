"""The planner's constants of GPUs that were measured, and how they are made of a file of `headway bench gpu`.

measured.json holds one entry per GPU; where a GPU has none, `hardware.ASSUMPTIONS` serve. Matrix products of
inner width K run at rate * K / (K + half_inner): what a product needs besides its K steps is like `half_inner` more of
them. `headway bench report DIR --refit` writes an entry.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from headway.launcher.plan.hardware import ASSUMPTIONS, Assumptions, Gpu

FILE = Path(__file__).with_name("measured.json")
MARGIN = 0.05
"""What a run may lose, low, against the best of single operations: assumed."""


@dataclass(frozen=True, kw_only=True)
class Core:
    """The causal attention core, forward and backward, of one shape; 3.5 times the forward FLOPs per second."""

    head_dim: int
    seq_len: int
    flops_per_s: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Constants of one GPU. `passes_over_kept`: low and high, over the shapes measured."""

    source: str
    matmul_flops_per_s: float
    half_inner: float
    memory_bytes_per_s: float
    cores: tuple[Core, ...]
    passes_over_kept: tuple[float, float]

    def matmul(self, width: int) -> float:
        """FLOP/s of products whose inner width is a model's."""
        return self.matmul_flops_per_s * width / (width + self.half_inner)

    def core(self, head_dim: int, seq_len: int) -> float:
        """FLOP/s of the measured shape nearest in head size, then in length."""
        nearest = min(
            self.cores,
            key=lambda c: (abs(math.log(c.head_dim / head_dim)), abs(math.log(c.seq_len / seq_len))),
        )
        return nearest.flops_per_s


def measured() -> dict[str, Measured]:
    """Entries by the GPU's name. Raises ValueError for a file that does not hold them."""
    return _read(FILE)


@cache
def _read(file: Path) -> dict[str, Measured]:
    try:
        entries = json.loads(file.read_text())["gpus"]
        return {name: _entry(entry) for name, entry in entries.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{file}: {error}; make it anew with `headway bench report DIR --refit`, or write {{"gpus": {{}}}}'
        ) from None


def _entry(entry: Mapping[str, Any]) -> Measured:
    low, high = entry["passes_over_kept"]
    cores = tuple(Core(**core) for core in entry["cores"])
    return Measured(**{**entry, "cores": cores, "passes_over_kept": (low, high)})


def assumptions(gpu: Gpu, *, width: int, head_dim: int, seq_len: int) -> tuple[Assumptions, Assumptions]:
    """Low and high for a model's shape: measured where the GPU was, else `ASSUMPTIONS`.

    Not measured and thus assumed on every GPU: document masks, exchanges between ranks, launches. fp32 runs have the
    shares of the bf16 ones.
    """
    entry = measured().get(gpu.name)
    if entry is None:
        return ASSUMPTIONS
    shares = {
        "matmul": entry.matmul(width) / gpu.bf16_flops,
        "core": entry.core(head_dim, seq_len) / gpu.bf16_flops,
        "memory": entry.memory_bytes_per_s / gpu.memory_bytes_per_s,
    }
    fewest, most = entry.passes_over_kept
    low, high = ASSUMPTIONS
    slower = {name: share * (1 - MARGIN) for name, share in shares.items()}
    return replace(low, **slower, passes_over_kept=most), replace(high, **shares, passes_over_kept=fewest)


# ---------------------------------------------------------------- from a result


def fit(rows: Sequence[Mapping[str, Any]], *, source: str) -> Measured:
    """Constants from rows of `headway bench gpu`. Raises ValueError naming the rows that are missing."""
    found = {row["key"]: row["data"] for row in rows if row["status"] == "measured"}
    cores = [key for key in found if key.startswith("ceilings/core ")]
    profiles = [key for key in found if key.startswith("steps/profile ")]
    missing = [key for key in ("ceilings/copy", "ceilings/matmul") if key not in found]
    missing += [f"{what} ..." for what, keys in (("ceilings/core", cores), ("steps/profile", profiles)) if not keys]
    if missing:
        raise ValueError(f"not measured: {', '.join(missing)}; measure them with `headway bench gpu`")
    rate, half = fit_products(found["ceilings/matmul"]["products"])
    memory = found["ceilings/copy"]["bytes_per_s"]
    passes = [p for key in profiles if (p := _passes(found[key], memory)) is not None]
    if not passes:
        raise ValueError("steps/profile: element-wise work took no time there; measure it again")
    return Measured(
        source=source,
        matmul_flops_per_s=rate,
        half_inner=half,
        memory_bytes_per_s=memory,
        cores=_best_cores([found[key] for key in cores]),
        passes_over_kept=(min(passes), max(passes)),
    )


def fit_products(products: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """(rate, half_inner) by least squares on 1/rate(K) = 1/rate + (half/rate) / K, over the products of equal rows.

    Raises ValueError where rates do not grow with K.
    """
    rows = max({p["rows"] for p in products}, key=lambda n: sum(p["rows"] == n for p in products))
    xs = [1 / p["inner"] for p in products if p["rows"] == rows]
    ys = [1 / p["flops_per_s"] for p in products if p["rows"] == rows]
    if len(xs) < 2:
        raise ValueError("ceilings/matmul: one inner width alone; measure several")
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    variance = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / variance
    offset = mean_y - slope * mean_x
    if offset <= 0:
        raise ValueError("ceilings/matmul: rates that do not level off with the inner width; measure them again")
    return 1 / offset, max(0.0, slope / offset)


def _best_cores(backends: Sequence[Mapping[str, Any]]) -> tuple[Core, ...]:
    """The faster backend of each shape with four query heads per KV head."""
    best: dict[tuple[int, int], float] = {}
    for backend in backends:
        for shape in backend["shapes"]:
            if "both_flops_per_s" in shape and shape["heads"] == 4 * shape["kv_heads"]:
                key = shape["head_dim"], shape["seq_len"]
                best[key] = max(best.get(key, 0.0), shape["both_flops_per_s"])
    if not best:
        raise ValueError("ceilings/core: no backend took any shape; measure them again")
    return tuple(Core(head_dim=d, seq_len=s, flops_per_s=rate) for (d, s), rate in sorted(best.items()))


def _passes(profile: Mapping[str, Any], bytes_per_s: float) -> float | None:
    """How often each byte that is kept for the backward pass crosses the memory, by the time that products and core
    leave of a dense pass.
    """
    parts = profile["parts_s"]
    products = sum(parts[name] for name in ("queries", "keys and values", "core", "output", "loss"))
    left = profile["whole_s"]["median"] - products - profile["within_mlp_s"]
    return left * bytes_per_s / profile["kept_bytes"] if left > 0 else None


def write(name: str, entry: Measured) -> None:
    """Put an entry into measured.json, beside those of other GPUs."""
    content = json.loads(FILE.read_text())
    content["gpus"][name] = asdict(entry)
    FILE.write_text(json.dumps(content, indent=1) + "\n")
    _read.cache_clear()
