"""Write records to TensorBoard: scalars, scalars of routers and heads per layer, and images of expert loads."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

CELL_PX = 12
"""Edge length of one expert's square in pixels. Viewers blur enlarged single pixels."""

NONE, EVEN, TWICE = (230, 97, 1), (247, 247, 247), (94, 60, 153)
"""Colours of a load of 0, of an even share, and of twice an even share or more: orange, white, violet."""

ABSENT = (160, 160, 160)
"""Colour of cells without an expert, in layers with fewer experts than others."""

ROUTER_MEANS = {
    "entropy": "entropy",
    "effective": "effective_experts",
    "gate": "gate",
    "top1_margin": "top1_margin",
    "close": "close_share",
    "switch_rate": "switch_rate",
    "mutual_information": "mutual_information",
    "information_share": "mutual_information_share",
}
"""Key of `headway.model.router_meter.RouterFigures` -> name of its mean over groups."""

HEAD_MEASURES = ("c_w", "c_q", "c_o", "effective_rank", "cka")
"""Measures of `headway.model.diversity.HeadDiversity`."""


class Board(Protocol):
    """What points are written to: `SummaryWriter` or `headway.launcher.board.event_file.EventFile`."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: Any = None, walltime: Any = None) -> Any: ...

    def add_image(
        self, tag: str, img_tensor: Any, global_step: Any = None, walltime: Any = None, dataformats: str = "CHW"
    ) -> Any: ...


def board_train(board: Board, record: dict[str, Any], wall_s: float | None = None) -> None:
    """One optimizer step: a record of kind "train". `wall_s`: wall-clock time in seconds (None: now)."""
    scalars = {
        "train/loss": record["loss"],
        "train/perplexity": _perplexity(record["loss"]),
        "train/aux_loss": record["aux_loss"],
        "train/grad_norm": record["grad_norm"],
        "train/lr": record["lr"],
        "train/tokens": record["tokens"],
        "perf/tokens_per_s": record["tokens_per_s"],
        "perf/data_wait_share": record["data_s"] / max(1e-9, record["step_s"]),
    }
    for tag, value in scalars.items():
        board.add_scalar(tag, value, record["step"], wall_s)
    if "router" in record:
        board_routers(board, record["router"], record["step"], wall_s)


def board_validation(board: Board, record: dict[str, Any], wall_s: float | None = None) -> None:
    """One validation: a record of kind "validation"."""
    scalars = {
        "val/loss": record["loss"],
        "val/perplexity": _perplexity(record["loss"]),
        "val/accuracy": record["accuracy"],
    }
    for name, found in record.get("sets", {}).items():
        scalars[f"val_sets/{name}"] = found["loss"]
    for tag, value in scalars.items():
        board.add_scalar(tag, value, record["step"], wall_s)


def board_diversity(board: Board, record: dict[str, Any], wall_s: float | None = None) -> None:
    """Diversity of heads: a record of kind "heads"."""
    board_heads(board, record["layers"], record["step"], wall_s)


def board_saved(board: Board, record: dict[str, Any], wall_s: float | None = None) -> None:
    """A save that was committed: a record of kind "checkpoint"."""
    scalars = {"stall_s": record["stall_s"], "write_s": record["write_s"], "failed_in_a_row": 0}
    for name, value in scalars.items():
        board.add_scalar(f"checkpoint/{name}", value, record["step"], wall_s)


def board_not_saved(board: Board, record: dict[str, Any], wall_s: float | None = None) -> None:
    """A save that failed: a record of kind "checkpoint_failed"."""
    board.add_scalar("checkpoint/failed_in_a_row", record.get("in_a_row", 1), record["step"], wall_s)


def board_skipped(board: Board, record: dict[str, Any], wall_s: float | None = None) -> None:
    """A step that was not applied: a record of kind "skipped"."""
    board.add_scalar("guard/skipped_steps", record["total"], record["step"], wall_s)


DRAW = {
    "train": board_train,
    "validation": board_validation,
    "heads": board_diversity,
    "checkpoint": board_saved,
    "checkpoint_failed": board_not_saved,
    "skipped": board_skipped,
}
"""Kind of a record -> function that writes it. The event files contain nothing else."""


def board_routers(board: Board, record: dict[str, Any], step: int, wall_s: float | None = None) -> None:
    """Scalars `router/LAYER/ROUTER_NAME`, and one image `router/load_ROUTER` of layers by experts of all groups.

    `record`: {layer: {router: figures}}, as returned by `headway.launcher.train.router.RouterMonitor`.
    """
    loads: dict[str, list[list[float]]] = {}
    for layer, routers in record.items():
        for name, figures in routers.items():
            groups = figures["load"]
            values = {short: _mean(figures[key]) for key, short in ROUTER_MEANS.items()}
            values |= {"dead": float(sum(figures["dead"])), "peak": max(max(group) for group in groups)}
            for key, value in values.items():
                if value is not None:
                    board.add_scalar(f"router/{layer}/{name}_{key}", value, step, wall_s)
            loads.setdefault(name, []).append([len(group) * share for group in groups for share in group])
    for name, rows in loads.items():
        board.add_image(f"router/load_{name}", load_map(rows), step, wall_s, dataformats="HWC")


def board_heads(board: Board, layers: dict[str, dict[str, Any]], step: int, wall_s: float | None = None) -> None:
    """Scalars `heads/LAYER/MEASURE` of each layer, and their means `heads/mean/MEASURE`."""
    for key in HEAD_MEASURES:
        for layer, measures in layers.items():
            board.add_scalar(f"heads/{layer}/{key}", measures[key], step, wall_s)
        mean = float(np.mean([m[key] for m in layers.values()]))
        board.add_scalar(f"heads/mean/{key}", mean, step, wall_s)


def load_map(rows: list[list[float]]) -> NDArray[np.uint8]:
    """Loads relative to an even share, one row per layer, of any lengths -> image [height, width, RGB]."""
    loads = np.full((len(rows), max(len(row) for row in rows)), np.nan)
    for i, row in enumerate(rows):
        loads[i, : len(row)] = row
    points = np.array([NONE, EVEN, TWICE], dtype=np.float64)
    channels = [np.interp(np.clip(loads, 0, 2), [0, 1, 2], points[:, c]) for c in range(3)]
    picture = np.where(np.isnan(loads)[..., None], ABSENT, np.stack(channels, -1)).round().astype(np.uint8)
    return picture.repeat(CELL_PX, 0).repeat(CELL_PX, 1)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 50.0))


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
