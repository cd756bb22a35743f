"""Study folders as `headway study run` and `headway train` leave them, with made-up curves; and tables of reports."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from headway.launcher.report.study import report
from headway.launcher.run.chain import Chain
from headway.launcher.run.run_dir import RunDir


class Values(dict[str, float]):
    """Values of four variants. Any other variant has a value made from its name, between `low` and `high`."""

    def __init__(self, values: dict[str, float], low: float, high: float) -> None:
        super().__init__(values)
        self.low, self.high = low, high

    def __missing__(self, variant: str) -> float:
        return self.low + (self.high - self.low) * (zlib.crc32(variant.encode()) % 1000) / 1000


STEPS, TOKENS_PER_STEP, LAYERS, GROUPS = 40, 1000, 2, 2
CLIPPED = 6
"""The first steps of a run, whose gradients are clipped."""
NOISE = {"standard_error": 0.02, "documents": 8}
GAIN = Values({"gqa": 0.0, "rgqa-k1": 0.02, "rgqa-k2": -0.03, "switchhead": 0.015}, -0.05, 0.05)
STEP_S = Values({"gqa": 0.10, "rgqa-k1": 0.08, "rgqa-k2": 0.09, "switchhead": 0.16}, 0.08, 0.18)
FLOPS = Values({"gqa": 2.0e6, "rgqa-k1": 1.5e6, "rgqa-k2": 1.7e6, "switchhead": 2.0e6}, 1.4e6, 2.2e6)
EXPERTS: dict[str, dict[str, int]] = {"rgqa-k1": {"q": 4}, "rgqa-k2": {"q": 4}, "switchhead": {"o": 4, "v": 4}}


def cell_key(variant: str, seed: int, budget: float = 1.0) -> str:
    return f"{variant}/seed-{seed}" + ("" if budget == 1.0 else f".budget-{budget:g}")


def spec_of(variant: str, seed: int, budget: float = 1.0) -> dict[str, Any]:
    attention: dict[str, Any] = {"type": variant.split("-")[0], "kv_heads": GROUPS, "head_dim": 16}
    if variant != "switchhead":
        attention["heads"] = 8
    if variant != "gqa":
        attention |= {"top_k": 2 if variant != "rgqa-k1" else 1, "balance_coef": 0.01}
    return {
        "name": f"demo.{variant}.seed-{seed}",
        "run_dir": f"cells/{cell_key(variant, seed, budget)}",
        "seed": seed,
        "model": {"width": 64, "ffn_width": 256 if variant == "gqa" else 240, "vocab_size": 512},
        "attention": attention,
        "data": {"seed": seed, "seq_len": 100},
        "optimizer": {"lr": 0.003, "clip_norm": 1.0},
        "guard": {"spike": "warn"},
        "train": {"tokens": int(budget * STEPS) * TOKENS_PER_STEP},
    }


def loss_at(variant: str, seed: int, share: float) -> float:
    """A curve with a final value of 3.5 + gain + noise of the seed; part of the noise is common to all variants."""
    own = 0.004 * math.sin(7 * seed + len(variant))
    return 3.5 + GAIN[variant] + 0.05 * math.cos(seed) + own + 2.5 * math.exp(-6 * share)


def end_loss(variant: str, seed: int, budget: float) -> float:
    """Loss at the annealed end of a budget: a power law with an offset, plus the gain and noise of the full budget."""
    noise = 0.0 if budget == 1.0 else 0.002 * math.sin(31 * budget + 3 * seed + len(variant))
    return loss_at(variant, seed, 1.0) + 0.2 * (budget**-0.5 - 1) + noise


class StudyFolder:
    """Writes a study folder as `headway study run` and `headway train` leave it."""

    def __init__(
        self, out: Path, variants: list[str], seeds: list[int], budgets: tuple[float, ...] | None = None
    ) -> None:
        self.out, self.variants, self.seeds, self.budgets = out, variants, seeds, budgets
        self.keys: dict[str, dict[str, Any]] = {v: {"attention.type": v.split("-")[0]} for v in variants}
        for v in variants:
            if v != "gqa":
                self.keys[v]["attention.top_k"] = 1 if v == "rgqa-k1" else 2

    def run_dir(self, variant: str, seed: int, budget: float = 1.0) -> Path:
        return self.out / "cells" / cell_key(variant, seed, budget)

    def write(self) -> Path:
        for variant in self.variants:
            for seed in self.seeds:
                for budget in self.budgets or (1.0,):
                    self.write_run(variant, seed, budget=budget)
        self.write_study()
        return self.out

    def write_study(self) -> None:
        def variant(name: str) -> dict[str, Any]:
            params = 100_000 if name == "gqa" else 100_250
            matched = {"free": "model.ffn_width", "value": 240, "cost": params, "target": 100_000, "residual": 0.0025}
            return {
                "name": name,
                "keys": self.keys[name],
                "matched": None if name == "gqa" else matched,
                "free_value": 256 if name == "gqa" else 240,
                "notes": [],
                "cost": {
                    "num_params": params,
                    "params_by_part": {},
                    "flops_per_token_useful": FLOPS[name],
                    "flops_per_token_executed": FLOPS[name] * 1.1,
                    "kv_bytes_per_token": 512,
                },
            }

        def cell(v: str, s: int, b: float) -> dict[str, Any]:
            found = {"variant": v, "seed": s, "run_dir": f"cells/{cell_key(v, s, b)}", "overrides": []}
            return found | {"spec": spec_of(v, s, b)} | ({"budget": b} if self.budgets else {})

        cells = [cell(v, s, b) for s in self.seeds for v in self.variants for b in self.budgets or (1.0,)]
        match = {"quantity": "params", "free": "model.ffn_width", "multiple": 16, "tolerance": 0.01}
        record = {"format": 1, "study": "demo", "path": "demo.yaml", "base": "base.yaml", "arguments": []}
        record |= {"baseline": "gqa", "seeds": self.seeds, "match": match, "cells": cells}
        record |= {"variants": [variant(v) for v in self.variants], "command": "headway study run demo.yaml"}
        record |= {"budgets": list(self.budgets)} if self.budgets else {}
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "study.json").write_text(json.dumps(record))

    def write_run(
        self,
        variant: str,
        seed: int,
        *,
        budget: float = 1.0,
        steps: int | None = None,
        hash_of=lambda seed, step: seed * 1000 + step,
    ) -> None:
        """`steps`: those that are done; default: all. The records of a budget begin with those of the full one."""
        last = int(budget * STEPS)
        steps = last if steps is None else steps
        folder = self.run_dir(variant, seed, budget)
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text(json.dumps(spec_of(variant, seed, budget)))
        run = {
            "format": 1,
            "spec_hash": "0" * 16,
            "git_commit": "abc123",
            "versions": {"headway": "0.1.0", "torch": "2"},
        }
        run |= {
            "machine": {"cpu": "Test CPU", "cores": 2, "gpu": None},
            "data_fingerprint": "f" * 64,
            "vocab_size": 512,
            "train_tokens_of_data": 16_000,
        }
        run |= {"unigram_entropy_nats": 5.2, "validation_bytes_per_token": 3.0, "tokens_per_step": TOKENS_PER_STEP}
        run |= {"steps": last, "started_at": "2025-01-02T03:04:05Z"}
        (folder / "run.json").write_text(json.dumps(run))
        lines = []
        for step in range(1, steps + 1):
            common = {"step": step, "tokens": step * TOKENS_PER_STEP, "train_s": step * STEP_S[variant]}
            annealed = step == last and budget != 1.0
            loss = end_loss(variant, seed, budget) if annealed else loss_at(variant, seed, step / STEPS)
            step_s = STEP_S[variant] * (1 + 0.1 * math.sin(step))
            train: dict[str, Any] = {
                "loss": loss + 0.05 * math.sin(3 * step),
                "step_s": step_s,
                "data_s": 0.001 * step_s,
                "grad_norm": 1.5 if step <= CLIPPED else 0.5,
                "skipped": False,
            }
            train["batch_hash"] = f"{hash_of(seed, step):016x}"
            if variant in EXPERTS:
                train["router"] = {f"layer_{i:02d}": self.routers(variant, i) for i in range(LAYERS)}
            lines.append({"kind": "train", **common, **train})
            if step % 4 == 0 or step == last:
                lines.append({"kind": "heads", **common, "layers": self.heads(step)})
                lines.append({"kind": "validation", **common, "loss": loss, "targets": 5000, **NOISE})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if steps == last:
            summary = {
                "complete": True,
                "steps": last,
                "tokens": last * TOKENS_PER_STEP,
                "resumes": 0,
                "exit": "complete",
            }
            summary |= {"final_validation_loss": end_loss(variant, seed, budget), "train_s": last * STEP_S[variant]}
            (folder / "summary.json").write_text(json.dumps(summary))

    @staticmethod
    def routers(variant: str, layer: int) -> dict[str, Any]:
        generator = np.random.default_rng(layer)
        found = {}
        for name, m in EXPERTS[variant].items():
            load = generator.dirichlet(8 * np.ones(m), size=GROUPS)
            found[name] = {"load": load.tolist(), "entropy": [0.9 * math.log(m)] * 2}
            found[name] |= {"dead": [0, 1], "top1_margin": [0.4, 0.5], "close": [0.2, 0.3], "gate": [1.0] * 2}
            found[name] |= {"switch_rate": [0.6] * 2, "mutual_information": [0.25] * 2, "information_share": [0.5] * 2}
        return found

    @staticmethod
    def heads(step: int) -> dict[str, Any]:
        values = {"member": "query head", "members": 4, "c_w": 0.01, "c_q": 0.1, "effective_rank": 3.9, "cka": 0.3}
        return {f"layer_{i:02d}": values | {"c_o": 0.2 + 0.01 * step + 0.1 * i} for i in range(LAYERS)}


def bind(run_dir: Path) -> None:
    """Give a run folder an id, its records the chain of checksums, and its summary the end of the records."""
    run = RunDir(run_dir)
    run.id.write_text(json.dumps(f"{zlib.crc32(str(run_dir).encode()):016x}"))
    chain = Chain.start(run.tag)
    lines = [chain.line(json.loads(line)) for line in run.metrics.read_text().splitlines()]
    run.metrics.write_text("".join(line + "\n" for line in lines))
    if run.summary.exists():
        run.summary.write_text(json.dumps(json.loads(run.summary.read_text()) | {"records": chain.state()}))


def text(out: Path) -> str:
    """Write the report of a study folder and return its Markdown."""
    report(out)
    return (out / "report.md").read_text()


def lead(page: str) -> str:
    """The finding: the first paragraph in bold that is not a warning."""
    return next(line for line in page.splitlines() if line.startswith("**"))


def table(page: str, heading: str) -> dict[str, list[str]]:
    """First column -> other columns of the first table below a heading."""
    lines = page.split(f"## {heading}\n")[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        rows[first] = rest
    return rows


def first_table(page: str) -> dict[str, list[str]]:
    """Variant -> other columns of the table of verdicts."""
    rows = page.split("| variant | verdict |")[1].split("\n\n")[0].splitlines()[2:]
    return {cells[0]: cells[1:] for cells in ([c.strip() for c in row.strip("|").split("|")] for row in rows)}


def with_start(folder: StudyFolder, variant: str, ratio: float) -> None:
    """Add records of the start of attention, as a ratio to the stream, to every run of a variant."""
    for seed in folder.seeds:
        file = folder.run_dir(variant, seed) / "metrics.jsonl"
        layers = {f"layer_{i:02d}": {"attention": ratio, "mlp": 0.3} for i in range(LAYERS)}
        record = {"kind": "start", "step": 0, "tokens": 0, "layers": layers}
        file.write_text(json.dumps(record) + "\n" + file.read_text())


def change_record(folder: StudyFolder, **keys: Any) -> None:
    """Change keys of study.json."""
    file = folder.out / "study.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def change_summary(run_dir: Path, **keys: Any) -> None:
    """Change keys of the summary.json of a run."""
    file = run_dir / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
