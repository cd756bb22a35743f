"""The matching table of a study, from its record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headway.launcher.match.matching import quantity_words


def matching_rows(record: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of the matching table of a `study_record`, header first: sizes in parameters, FLOPs per token and bytes."""
    match = record["match"]
    measured = any(v["matched"] and v["matched"].get("spread") for v in record["variants"])
    residual = "residual [quartiles]" if measured else "residual"
    residual += f" in {quantity_words(match)}" if match else ""
    free = match["free"] if match else "size"
    yield ("variant", free, "params", residual, "useful FLOPs/token", "executed", "KV bytes/token")
    for v in record["variants"]:
        if v["matched"]:
            residual = _residual(v["matched"])
        else:
            residual = "baseline" if v["name"] == record["baseline"] else "not matched"
        cost = v["cost"]
        yield (
            v["name"],
            "as written" if v["free_value"] is None else str(v["free_value"]),
            f"{cost['num_params']:,}",
            residual,
            f"{cost['flops_per_token_useful']:,.0f}",
            f"{cost['flops_per_token_executed']:,.0f}",
            f"{round(cost['kv_bytes_per_token'], 1):,.12g}",
        )


def _residual(matched: dict[str, Any]) -> str:
    """`+0.250%` if counted; `+0.2% [-1.0%, +1.3%]` with quartiles if measured."""
    spread = matched.get("spread")
    if spread is None:
        return f"{matched['residual']:+.3%}"
    return f"{matched['residual']:+.1%} [{spread['low']:+.1%}, {spread['high']:+.1%}]"
