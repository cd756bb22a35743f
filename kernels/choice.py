"""Dense or routed: which form of a product is expected to be faster, by a cost model and a table of measurements.

The answer depends on shapes and on the architecture alone, so every rank gives the same. A measured entry wins over the
model; none is shipped, for nothing is measured yet. The model's constants are assumptions for one H200.

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
    """Rates of a machine; assumed, not measured."""

    dense_flops_per_s: float = 700e12  # the roofline model's at d = 2048
    routed_share: float = 0.67  # rate of a routed product, as a share of the dense one's
    l2_bytes_per_s: float = 6e12
    lists_s: float = 12e-6  # building lists and schedule
    tile: int = 128  # rows; every list wastes half a tile


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one product."""

    tokens: int
    width: int
    head_dim: int
    groups: int
    experts: int
    k: int

    def key(self, arch: str, product: Product) -> str:
        """Name in the table; tokens count by the power of two at or below them."""
        bucket = 1 << (self.tokens.bit_length() - 1)
        sizes = f"d{self.width}/D{self.head_dim}/G{self.groups}/N{self.experts}/k{self.k}/T{bucket}"
        return f"{arch}/{product}/{sizes}"


def seconds(form: Form, shape: Shape, constants: Constants) -> float:
    """Expected time of a product with one row per slot: gather, which makes the rows, or weight_grad, which sums them.

    Products that sum over slots into a d-wide row are dense always: a routed one would spill its partial sums, 4 d
    bytes per slot.
    """
    per_slot = 2 * shape.width * shape.head_dim  # FLOP
    if form == "dense":
        return shape.tokens * per_slot * shape.groups * shape.experts / constants.dense_flops_per_s
    pairs = shape.tokens * shape.groups * shape.k
    padded = pairs + shape.groups * shape.experts * constants.tile // 2
    product_s = padded * per_slot / (constants.routed_share * constants.dense_flops_per_s)
    return constants.lists_s + max(product_s, 2 * shape.width * pairs / constants.l2_bytes_per_s)


def measured() -> dict[str, Form]:
    """The override table: key of a shape -> the form that was faster there.

    Raises ValueError for an entry that is neither "dense" nor "routed".
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
    """Put measured entries into the table, beside those of other shapes and GPUs."""
    content = json.loads(TABLE.read_text())
    content["entries"] = dict(sorted({**content["entries"], **entries}.items()))
    TABLE.write_text(json.dumps(content, indent=2) + "\n")
    _read.cache_clear()


def choose(
    product: Product, shape: Shape, arch: str, constants: Constants | None = None, table: dict[str, Form] | None = None
) -> Form:
    """The faster form; `arch` is "cpu" or the GPU's ("sm_90"). Equal times are dense; the CPU is dense always."""
    if arch == "cpu":
        return "dense"
    entries = measured() if table is None else table
    found = entries.get(shape.key(arch, product))
    if found is not None:
        return found
    given = constants or Constants()
    routed = seconds("routed", shape, given)
    return "routed" if routed < seconds("dense", shape, given) else "dense"
