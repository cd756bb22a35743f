"""The planner's constants of measured GPUs, and their fit to a file of `headway bench gpu`.

measured.json holds one entry per GPU. GPUs without an entry use `hardware.ASSUMPTIONS`. Matrix products of inner
width K run at rate * K / (K + half_inner): the fixed cost of a product equals that of `half_inner` more steps along K.
`headway bench report DIR --refit` writes an entry.
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
"""Loss of speed of a whole run against single operations, in the low estimate: assumed."""


@dataclass(frozen=True, kw_only=True)
class Core:
    """Measured rate of the causal attention core of one shape, forward and backward (3.5 times the forward FLOPs)."""

    head_dim: int
    seq_len: int
    flops_per_s: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Constants of one GPU. `passes_over_kept`: smallest and largest value over the measured shapes."""

    source: str
    matmul_flops_per_s: float
    half_inner: float
    memory_bytes_per_s: float
    cores: tuple[Core, ...]
    passes_over_kept: tuple[float, float]

    def matmul(self, width: int) -> float:
        """FLOP/s of matrix products of inner width `width`."""
        return self.matmul_flops_per_s * width / (width + self.half_inner)

    def core(self, head_dim: int, seq_len: int) -> float:
        """FLOP/s of the measured shape that is nearest in head size, then in sequence length."""
        nearest = min(
            self.cores,
            key=lambda c: (abs(math.log(c.head_dim / head_dim)), abs(math.log(c.seq_len / seq_len))),
        )
        return nearest.flops_per_s


def measured() -> dict[str, Measured]:
    """GPU name -> entry of measured.json. Raises ValueError if the file is invalid."""
    return _read(FILE)


@cache
def _read(file: Path) -> dict[str, Measured]:
    try:
        entries = json.loads(file.read_text())["gpus"]
        return {name: _entry(entry) for name, entry in entries.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{file}: {error}; write it again with `headway bench report DIR --refit`, or write {{"gpus": {{}}}}'
        ) from None


def _entry(entry: Mapping[str, Any]) -> Measured:
    low, high = entry["passes_over_kept"]
    cores = tuple(Core(**core) for core in entry["cores"])
    return Measured(**{**entry, "cores": cores, "passes_over_kept": (low, high)})


def assumptions(gpu: Gpu, *, width: int, head_dim: int, seq_len: int) -> tuple[Assumptions, Assumptions]:
    """Low and high assumptions for a model's shape: from measurements if the GPU was measured, else `ASSUMPTIONS`.

    The core within documents, exchanges between ranks and kernel launches are assumed on every GPU. fp32 runs use the
    shares that were measured in bf16.
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
    """Fit constants to rows of `headway bench gpu`. Raises ValueError with the missing rows."""
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
        raise ValueError("steps/profile: the time of element-wise work is zero or negative; measure it again")
    return Measured(
        source=source,
        matmul_flops_per_s=rate,
        half_inner=half,
        memory_bytes_per_s=memory,
        cores=_best_cores([found[key] for key in cores]),
        passes_over_kept=(min(passes), max(passes)),
    )


def fit_products(products: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """(rate, half_inner) by least squares on 1/rate(K) = 1/rate + (half/rate) / K.

    Uses the products of the most frequent number of rows. Raises ValueError if the fit gives no finite positive rate.
    """
    rows = max({p["rows"] for p in products}, key=lambda n: sum(p["rows"] == n for p in products))
    xs = [1 / p["inner"] for p in products if p["rows"] == rows]
    ys = [1 / p["flops_per_s"] for p in products if p["rows"] == rows]
    if len(xs) < 2:
        raise ValueError("ceilings/matmul: only one inner width was measured; measure several")
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    variance = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / variance
    offset = mean_y - slope * mean_x
    if offset <= 0:
        raise ValueError("ceilings/matmul: the rate does not level off as the inner width grows; measure it again")
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
        raise ValueError("ceilings/core: no backend ran any shape; measure them again")
    return tuple(Core(head_dim=d, seq_len=s, flops_per_s=rate) for (d, s), rate in sorted(best.items()))


def _passes(profile: Mapping[str, Any], bytes_per_s: float) -> float | None:
    """Number of reads and writes of each byte kept for the backward pass; None if no time is left for them.

    Computed from the time of a dense pass minus that of matrix products and attention core.
    """
    parts = profile["parts_s"]
    products = sum(parts[name] for name in ("queries", "keys and values", "core", "output", "loss"))
    left = profile["whole_s"]["median"] - products - profile["within_mlp_s"]
    return left * bytes_per_s / profile["kept_bytes"] if left > 0 else None


def write(name: str, entry: Measured) -> None:
    """Add or replace the entry of GPU `name` in measured.json."""
    content = json.loads(FILE.read_text())
    content["gpus"][name] = asdict(entry)
    FILE.write_text(json.dumps(content, indent=1) + "\n")
    _read.cache_clear()
