"""Folders of ladders as `headway study run` leaves them: one study folder for each size, with made-up losses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from study_folders import StudyFolder, cell_key

PARAMS = (100_000, 300_000, 900_000, 2_700_000)
NAMES = ("tiny", "small", "medium", "large")
GAIN = {"gqa": 0.0, "rgqa-k1": -0.02, "rgqa-k2": 0.03, "switchhead": 0.0}
"""Reducible loss over the baseline's, minus 1."""


def law(variant: str, params: float) -> float:
    return 2.0 + 1.5 * (1 + GAIN[variant]) * (params / PARAMS[0]) ** -0.3


def noise(variant: str, size: int, seed: int) -> float:
    """Of a seed (shared by all variants) and of one run; without a pattern over sizes."""
    return 0.02 * math.sin(7 * seed + 3 * size) + 0.004 * math.sin(
        31 * seed + 17 * size + 5 * len(variant) + ord(variant[-1])
    )


class LadderFolder:
    """Writes ladder.json and the study folders of all sizes. `seeds`: their number at each size.

    `loss`: (variant, parameters) -> expected loss. `variants_at`: size -> its variants, if not all.
    """

    def __init__(
        self,
        out: Path,
        seeds: Sequence[int] = (3, 2, 2),
        *,
        loss: Callable[[str, float], float] = law,
        variants: Sequence[str] = ("gqa", "rgqa-k1", "rgqa-k2"),
        variants_at: Mapping[str, Sequence[str]] | None = None,
        budgets: tuple[float, ...] | None = None,
    ) -> None:
        self.out, self.seeds, self.loss, self.variants = out, seeds, loss, list(variants)
        self.names = NAMES[: len(seeds)]
        self.variants_at, self.budgets = dict(variants_at or {}), budgets

    def folder(self, size: str) -> Path:
        return self.out / "sizes" / size

    def run_dir(self, size: str, variant: str, seed: int) -> Path:
        return self.folder(size) / "cells" / cell_key(variant, seed)

    def write(self, **record: Any) -> Path:
        """`record`: keys of ladder.json."""
        for i, size in enumerate(self.names):
            self.write_size(i, size)
        found: dict[str, Any] = {"format": 1, "study": "steps", "path": "steps.yaml", "arguments": []}
        found |= {"baseline": "gqa", "variants": self.variants, "tokens_per_param": 10, "extrapolate": None}
        found |= {
            "sizes": [{"name": n, "folder": f"sizes/{n}"} for n in self.names],
            "command": "headway study run steps.yaml",
        }
        (self.out / "ladder.json").write_text(json.dumps(found | record))
        return self.out

    def write_size(self, index: int, size: str) -> None:
        variants = list(self.variants_at.get(size, self.variants))
        study = StudyFolder(self.folder(size), variants, list(range(1, self.seeds[index] + 1)), self.budgets)
        study.write()
        record = json.loads((study.out / "study.json").read_text())
        for variant in record["variants"]:
            variant["cost"]["num_params"] = PARAMS[index]
            variant["cost"]["flops_per_token_useful"] = 2.0 * PARAMS[index]
        (study.out / "study.json").write_text(json.dumps(record))
        for variant in variants:
            for seed in study.seeds:
                end = self.loss(variant, PARAMS[index]) + noise(variant, index, seed)
                self.change_loss(study.run_dir(variant, seed), end)

    @staticmethod
    def change_loss(run_dir: Path, loss: float) -> None:
        """Shift all validation losses of a run so that the last one is `loss`."""
        file = run_dir / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        shift = loss - [line["loss"] for line in lines if line["kind"] == "validation"][-1]
        for line in lines:
            if line["kind"] == "validation":
                line["loss"] += shift
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = json.loads((run_dir / "summary.json").read_text())
        (run_dir / "summary.json").write_text(json.dumps(summary | {"final_validation_loss": loss}))


def tuning(chosen: Mapping[str, float], grid: Sequence[float] = (0.001, 0.002, 0.004)) -> dict[str, Any]:
    """Content of tuning.json of one size: parabolas around the chosen value of each variant.

    The last trial of the first variant diverged.
    """
    variants = {}
    for variant, best in chosen.items():
        trials = [
            {"value": v, "seed": s, "loss": 3.0 + 0.05 * math.log(v / best) ** 2 + 0.001 * s, "done": True}
            for v in grid
            for s in (101, 102)
        ]
        variants[variant] = {"chosen": best, "how": "parabola through the best three", "edge": False, "trials": trials}
    last = next(iter(variants.values()))["trials"][-1]
    last["loss"], last["done"] = None, False
    return {"format": 1, "keys": {"optimizer.lr": {"grid": list(grid), "extended": 1, "variants": variants}}}
