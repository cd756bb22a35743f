"""Selects the faster form of a matmul, dense or routed, by a table of measurements or a cost model.

The result depends only on shapes and architecture, so it is the same on every rank. Measured entries take precedence
over the cost model. The shipped table is empty, because nothing has been measured yet. The constants of the model are
assumptions for one H200.

Legend: T tokens, d width, D head size, G groups, N experts per group, k slots, s = G k slots of one token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Form = Literal["dense", "routed"]
Product = Literal["gather", "weight_grad"]
TABLE = Path(__file__).with_name("choice.json")


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Constants of the cost model. They are assumptions, not measurements."""

    dense_flops_per_s: float = 700e12  # from the roofline model at d = 2048
    routed_share: float = 0.67  # FLOP rate of routed matmuls divided by that of dense ones
    l2_bytes_per_s: float = 6e12
    lists_s: float = 12e-6  # time to build lists and schedule
    tile: int = 128  # rows per tile; on average, each list wastes half a tile


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one matmul."""

    tokens: int
    width: int
    head_dim: int
    groups: int
    experts: int
    k: int

    def key(self, arch: str, product: Product) -> str:
        """Key in the table. The number of tokens is rounded down to a power of two."""
        bucket = 1 << (self.tokens.bit_length() - 1)
        sizes = f"d{self.width}/D{self.head_dim}/G{self.groups}/N{self.experts}/k{self.k}/T{bucket}"
        return f"{arch}/{product}/{sizes}"


def seconds(form: Form, shape: Shape, constants: Constants) -> float:
    """Expected time of a matmul with one row per slot: gather (computes the rows) or weight_grad (sums over them).

    Matmuls that sum over slots into a row of width d are always dense, because a routed one would write its partial
    sums to memory, 4 d bytes per slot.
    """
    per_slot = 2 * shape.width * shape.head_dim  # FLOP
    if form == "dense":
        return shape.tokens * per_slot * shape.groups * shape.experts / constants.dense_flops_per_s
    pairs = shape.tokens * shape.groups * shape.k
    padded = pairs + shape.groups * shape.experts * constants.tile // 2
    product_s = padded * per_slot / (constants.routed_share * constants.dense_flops_per_s)
    return constants.lists_s + max(product_s, 2 * shape.width * pairs / constants.l2_bytes_per_s)


def measured() -> dict[str, Form]:
    """The table of measurements: key of a shape -> faster form.

    Raises ValueError for an entry other than "dense" and "routed".
    """
    return _read(TABLE)


@cache
def _read(path: Path) -> dict[str, Form]:
    entries: dict[str, Form] = json.loads(path.read_text())["entries"]
    for key, form in entries.items():
        if form not in ("dense", "routed"):
            raise ValueError(f'{path}: {key} is {form!r}; write "dense" or "routed"')
    return entries


def override(entries: Mapping[str, Form]) -> None:
    """Add measured entries to the table. Entries of other shapes and GPUs are kept."""
    content = json.loads(TABLE.read_text())
    content["entries"] = dict(sorted({**content["entries"], **entries}.items()))
    TABLE.write_text(json.dumps(content, indent=2) + "\n")
    _read.cache_clear()


def choose(
    product: Product, shape: Shape, arch: str, constants: Constants | None = None, table: dict[str, Form] | None = None
) -> Form:
    """The faster form; dense for equal times and always on the CPU. `arch`: "cpu" or the GPU's, such as "sm_90"."""
    if arch == "cpu":
        return "dense"
    entries = measured() if table is None else table
    found = entries.get(shape.key(arch, product))
    if found is not None:
        return found
    given = constants or Constants()
    routed = seconds("routed", shape, given)
    return "routed" if routed < seconds("dense", shape, given) else "dense"
