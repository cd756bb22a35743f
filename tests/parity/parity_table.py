"""Writes the results of a parity run: parity.md for people, parity.json with the raw values."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parity_cases import (
    COLUMNS,
    GLOBAL_BATCH,
    LAYOUTS,
    MECHANISMS,
    MODEL,
    OPTIMIZER,
    SAVED_STEP,
    SEED,
    SEQ_LEN,
    STEPS,
    TABLE,
    VOCAB,
    Case,
    legal_zero,
    move_cases,
    noise_cases,
    other_cases,
    overlap_cases,
    table_cases,
)
from parity_compare import BF16_DENSE, BF16_ROUTED, FP32, Tolerance, relative
from parity_run import Outcome

from headway.launcher.run.machine import git_commit, machine, versions

Outcomes = dict[Case, Outcome]
COMMAND = "make parity"
KINDS = {
    "loss": "loss",
    "aux_loss": "router loss",
    "grad_norm": "gradient norm",
    "validation_loss": "validation loss",
    "routers": "router figures",
    "heads": "head figures",
}


def write(outcomes: Outcomes, folder: Path, *, seconds: float, commit: str | None) -> None:
    """`folder`/parity.md and `folder`/parity.json. `commit`: at the start; one that changed meanwhile is named too."""
    now = git_commit()
    about = {
        "kind": "parity",
        "command": COMMAND,
        "commit": commit if commit == now else f"{commit} to {now}",
        "versions": versions(),
        "machine": machine(),
        "seconds": round(seconds),
        "spec": _spec(),
        "tolerances": {
            "fp32": asdict(FP32),
            "bf16, nothing chosen": asdict(BF16_DENSE),
            "bf16, routed": asdict(BF16_ROUTED),
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(_row(outcome), ensure_ascii=False) for outcome in outcomes.values())
    head = json.dumps(about, indent=1, ensure_ascii=False).removesuffix("\n}")
    (folder / "parity.json").write_text(f'{head},\n "cases": [\n{rows}\n]}}\n')
    (folder / "parity.md").write_text("\n".join(_page(outcomes, about)) + "\n")


def _spec() -> dict[str, Any]:
    return {
        "model": MODEL.model_dump(mode="json") | {"vocab_size": VOCAB},
        "optimizer": OPTIMIZER.model_dump(mode="json"),
        "seed": SEED,
        "seq_len": SEQ_LEN,
        "global_batch": GLOBAL_BATCH,
        "steps": STEPS,
        "mechanisms": {name: config.model_dump(mode="json") for name, config in MECHANISMS.items()},
        "layouts": LAYOUTS,
    }


def _row(outcome: Outcome) -> dict[str, Any]:
    result = outcome.result or {}
    steps = [{k: v for k, v in step.items() if k != "routers"} for step in result.get("steps", [])]
    return {
        "case": outcome.case.to_json(),
        "passed": outcome.passed,
        "faults": list(outcome.verdict.faults),
        "largest_differences": outcome.verdict.differences,
        "steps": steps,
        "validation": result.get("validation"),
        "seconds": result.get("seconds"),
    }


def _page(outcomes: Outcomes, about: dict[str, Any]) -> list[str]:
    failed = [outcome for outcome in outcomes.values() if not outcome.passed]
    verdict = f"{len(failed)} FAIL" if failed else "all equal"
    version = about["versions"]
    took = f"{about['seconds'] / 60:.0f} minutes on {about['machine']['cores']} cores"
    return [
        "# Parity",
        "",
        f"{len(outcomes)} trainings, {verdict}; written by `{COMMAND}` in {took}.",
        f"Commit {about['commit']}, torch {version['torch']}, deepspeed {version['deepspeed']}.",
        "Raw values: [parity.json](parity.json).",
        "",
        f"Each training takes {STEPS} steps of {GLOBAL_BATCH} sequences with accumulation and clipping (the norm is",
        "above the clip in every step), and is compared step by step with one process under ZeRO-1: loss, router loss,",
        "gradient norm, then a validation; in fp32 figures of routers and heads too. A cell is the largest relative",
        "difference of a loss over the steps, `FAIL` where anything is beyond tolerance, empty where it is not legal.",
        "Layouts: tp tensor, pp pipeline, dp data, cp context, sp tensor with sequence parallel.",
        "",
        *_section(outcomes, "fp32", [f"Tolerance: {_limits(FP32)}: the same sums in another order."]),
        *_section(
            outcomes,
            "bf16",
            [
                f"Tolerance of `gqa` and `wgqa`, which choose nothing: {_limits(BF16_DENSE)}.",
                f"Of the others: {_limits(BF16_ROUTED)}. Two experts that are equal up to rounding are chosen",
                "one here and the other there, and the next steps carry that on. Measured on one process:",
                "",
                *_noise(outcomes),
            ],
        ),
        "## Beyond the table",
        "",
        *_list(outcomes, other_cases()),
        "## Exchanges that overlap with the passes",
        "",
        "`parallel.overlap: true`, in buckets so small that every backward pass has several.",
        "",
        *_list(outcomes, overlap_cases()),
        "## Checkpoints from one layout to another",
        "",
        f"Saved after step {SAVED_STEP}. What the second layout saves at once is what the first one had saved, bit for",
        "bit; and each that saves goes on bit for bit when it loads its own.",
        "",
        *_list(outcomes, move_cases()),
        *_failures(failed),
    ]


def _limits(tolerance: Tolerance) -> str:
    return (
        f"losses {tolerance.first_loss:g} in step 1 and {tolerance.loss:g} later, "
        f"gradient norms {tolerance.first_grad_norm:g} and {tolerance.grad_norm:g}"
    )


def _section(outcomes: Outcomes, precision: str, explanation: list[str]) -> list[str]:
    lines = [f"## {precision}", "", *explanation, "", f"| mechanism, ZeRO | {' | '.join(COLUMNS)} |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for mechanism in TABLE:
        for zero in (1, 2, 3):
            cells = [
                _cell(outcomes.get(Case(mechanism=mechanism, layout=layout, zero=zero, precision=precision)))
                if zero in legal_zero(layout)
                else ""
                for layout in COLUMNS
            ]
            lines.append(f"| {mechanism}, {zero} | {' | '.join(cells)} |")
    worst = _worst(outcomes[case] for case in table_cases(precision) if case in outcomes)
    return [*lines, "", f"Largest of all: {worst}.", ""]


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return "not run"
    return f"{outcome.verdict.differences['loss']:.0e}" if outcome.passed else "FAIL"


def _worst(outcomes: Iterable[Outcome]) -> str:
    largest: dict[str, float] = {}
    for outcome in outcomes:
        for kind, value in outcome.verdict.differences.items():
            largest[kind] = max(value, largest.get(kind, 0.0))
    return ", ".join(f"{words} {largest[kind]:.1e}" for kind, words in KINDS.items() if kind in largest)


def _noise(outcomes: Outcomes) -> list[str]:
    """Loss and norm of one bf16 process against fp32, and against itself with other micro-batches."""
    lines = [
        "| mechanism | against fp32: step 1 | later | other micro-batches: step 1 | later |",
        "|---|---|---|---|---|",
    ]
    for mechanism in TABLE:
        bf16 = _steps(outcomes, Case(mechanism=mechanism, precision="bf16"))
        others = [_steps(outcomes, case) for case in noise_cases() if case.mechanism == mechanism]
        fp32 = [_steps(outcomes, Case(mechanism=mechanism))]
        cells = [_spread(bf16, group, part) for group in (fp32, others) for part in (slice(0, 1), slice(1, None))]
        cells.append(_validation_spread(outcomes, mechanism))
        lines.append(f"| {mechanism} | {' | '.join(cells)} |")
    return [*lines, "", "Loss, then gradient norm; the largest relative difference."]


def _steps(outcomes: Outcomes, case: Case) -> list[dict[str, float]]:
    found = outcomes.get(case)
    return found.result["steps"] if found is not None and found.result is not None else []


def _spread(mine: list[dict[str, float]], others: list[list[dict[str, float]]], part: slice) -> str:
    pairs = [(a, b) for other in others for a, b in list(zip(mine, other, strict=False))[part]]
    if not pairs:
        return "not run"
    return ", ".join(f"{max(relative(b[key], a[key]) for a, b in pairs):.0e}" for key in ("loss", "grad_norm"))


def _validation_spread(outcomes: Outcomes, mechanism: str) -> str:
    mine = Case(mechanism=mechanism, precision="bf16")
    cases = [Case(mechanism=mechanism), *(case for case in noise_cases() if case.mechanism == mechanism)]
    results = [outcomes[case].result for case in (mine, *cases) if case in outcomes]
    losses = [result["validation"]["loss"] for result in results if result is not None]
    if len(losses) <= len(cases):
        return "not run"
    return f"{max(relative(other, losses[0]) for other in losses[1:]):.0e}"


def _list(outcomes: Outcomes, cases: list[Case]) -> list[str]:
    lines = ["| case | loss | router loss | gradient norm | validation loss |", "|---|---|---|---|---|"]
    for case in cases:
        outcome = outcomes.get(case)
        if outcome is None or not outcome.passed:
            lines.append(f"| {case.name} | {_cell(outcome)} | | | |")
            continue
        differences = outcome.verdict.differences
        cells = [f"{differences[kind]:.0e}" for kind in ("loss", "aux_loss", "grad_norm", "validation_loss")]
        lines.append(f"| {case.name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _failures(failed: list[Outcome]) -> list[str]:
    if not failed:
        return []
    faults = [f"- {outcome.case.name}: {'; '.join(outcome.verdict.faults)[:600]}" for outcome in failed]
    return ["## Failures", "", *faults, ""]
