"""The tables of a study report as CSV files, and functions that write the files of a report."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headway.launcher.compare.analyse import CellResult, StudyResult, VariantResult
from headway.launcher.compare.cell_results import FULL
from headway.launcher.compare.findings import bits_per_byte
from headway.launcher.compare.training_flops import training_flops


def cell_rows(result: StudyResult) -> Iterator[dict[str, Any]]:
    """One row per cell of the study, in any state. Values that a cell lacks are empty."""
    variants = {v.name: v for v in result.variants}
    for c in (*result.cells, *result.short_cells):
        v, run = variants[c.variant], c.record.run
        per_byte = run.get("validation_bytes_per_token")
        yield {
            "variant": c.variant,
            "seed": c.seed,
            "budget": c.budget,
            "state": c.state,
            "detail": c.detail,
            "tokens": c.record.tokens,
            "steps": c.steps.count,
            "compared_tokens": (
                result.tokens_of(c.variant) if c.budget == FULL else result.effective.tokens.get(c.budget)
            )
            if c.done
            else None,
            "validation_loss_nats": c.loss,
            "bits_per_byte": bits_per_byte(c.loss, per_byte) if c.loss is not None and per_byte else None,
            "final_validation_loss_nats": None if c.damaged else c.record.summary.get("final_validation_loss"),
            "train_s": None if c.damaged else c.record.train_s,
            **_speed_columns(c),
            "cells_beside": c.beside,
            **_size_columns(v),
            "resumes": c.record.summary.get("resumes"),
            "spec_hash": run.get("spec_hash"),
            "data_fingerprint": run.get("data_fingerprint"),
            "git_commit": run.get("git_commit"),
            "run_dir": str(c.record.path),
        }


def _speed_columns(cell: CellResult) -> dict[str, Any]:
    speed = cell.speed
    return {
        "tokens_per_s_median": speed and speed.tokens_per_s,
        "tokens_per_s_low_quartile": speed and speed.low,
        "tokens_per_s_high_quartile": speed and speed.high,
        "data_wait_share": _data_wait_share(cell),
    }


def _size_columns(variant: VariantResult) -> dict[str, Any]:
    matched = variant.planned["matched"]
    return {
        "num_params": variant.cost["num_params"],
        "match_residual": matched["residual"] if matched else None,
        "flops_per_token_useful": variant.cost["flops_per_token_useful"],
        "flops_per_token_executed": variant.cost["flops_per_token_executed"],
        "kv_bytes_per_token": variant.cost["kv_bytes_per_token"],
    }


def _data_wait_share(cell: CellResult) -> float | None:
    total = 0.0 if cell.damaged else cell.steps.step_s
    return cell.steps.data_s / total if total > 0 else None


def curve_rows(result: StudyResult) -> Iterator[dict[str, Any]]:
    """One row per recorded training or validation loss of every cell that is not damaged.

    Cells that are read from their records have rows of kind `train-mean` instead: the running mean of the loss.
    """
    costs = {v.name: v.cost for v in result.variants}
    for c in (*result.cells, *result.short_cells):
        train = "train-mean" if c.from_record else "train"
        for kind, curve in () if c.damaged else ((train, c.record.train), ("validation", c.record.validation)):
            for step, tokens, loss, seconds in zip(curve.step, curve.tokens, curve.loss, curve.train_s, strict=True):
                yield {
                    "variant": c.variant,
                    "seed": c.seed,
                    "budget": c.budget,
                    "kind": kind,
                    "step": int(step),
                    "tokens": int(tokens),
                    "train_flops_useful": float(training_flops(costs[c.variant], tokens)),
                    "train_s": seconds,
                    "loss_nats": loss,
                }


def p_text(value: float) -> str:
    """A p-value with three digits; never 0."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def write_csv(path: Path, found: Iterator[dict[str, Any]]) -> None:
    """Write the rows to a CSV file. Writes no file without rows."""
    rows = list(found)
    if not rows:
        path.unlink(missing_ok=True)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write the text atomically: on failure the old file is unchanged."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
