"""`headway study plan`: the seeds that decide, from the spread of a pilot."""

import json

import numpy as np
import pytest

from headway.launcher.base.errors import SpecError
from headway.launcher.cli.main import main
from headway.launcher.compare.simultaneous import compare_paired
from headway.launcher.compare.verdicts import verdict
from headway.launcher.study.seeds import pilot_plan

SPREAD = 0.02


def pilot(folder, losses):
    """A study's folder as far as `analyse` reads it: one validation per run. losses: variant -> seed -> loss."""
    cells, names = [], list(losses)
    for name, by_seed in losses.items():
        for seed, loss in by_seed.items():
            run = folder / "cells" / name / f"seed-{seed}"
            run.mkdir(parents=True)
            common = {"step": 1, "tokens": 100, "train_s": 1.0, "loss": loss}
            lines = [{"kind": "train", **common, "batch_hash": f"{seed:016x}"}, {"kind": "validation", **common}]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (run / "summary.json").write_text(json.dumps({"complete": True, "steps": 1, "tokens": 100}))
            cells.append({"variant": name, "seed": seed, "run_dir": f"cells/{name}/seed-{seed}", "spec": {}})
    variants = [{"name": n, "keys": {}, "matched": None, "cost": {"num_params": 1}} for n in names]
    record = {"format": 1, "study": "pilot", "baseline": names[0], "seeds": sorted(losses[names[0]]), "match": None}
    (folder / "study.json").write_text(json.dumps(record | {"variants": variants, "cells": cells}))
    return folder


def table(rng, variants, seeds):
    y = rng.normal(0, SPREAD, (variants, seeds)) + rng.normal(0, 0.05, seeds) + 3
    return {f"v{i}": dict(enumerate(y[i])) for i in range(variants)}


def test_the_needed_seeds_are_the_fewest_with_the_power_for_both_outcomes(tmp_path):
    plan = pilot_plan(pilot(tmp_path, table(np.random.default_rng(1), 5, 6)), power=0.8, margin=0.03, again="x")
    row = next(r for r in plan.rows if r.seeds == plan.needed)
    assert row.difference >= 0.8 and row.equivalence >= 0.8
    fewer = [r for r in plan.rows if r.seeds < (plan.needed or 0)]
    assert fewer and all(r.difference < 0.8 or r.equivalence < 0.8 for r in fewer)
    assert plan.cautious is not None and plan.needed is not None and plan.cautious > plan.needed
    widths = [r.half_width for r in plan.rows]
    assert widths == sorted(widths, reverse=True)


def test_studies_with_the_planned_seeds_do_decide(tmp_path):
    plan = pilot_plan(pilot(tmp_path, table(np.random.default_rng(2), 5, 20)), power=0.8, margin=0.03, again="x")
    assert plan.needed is not None and plan.spread == pytest.approx(SPREAD, rel=0.2)
    rng, decided = np.random.default_rng(3), 0
    for _ in range(500):
        found = compare_paired(table(rng, 5, plan.needed), "v0").differences["v1"]
        decided += verdict(found, 0.03) == "equivalent"
    assert decided / 500 == pytest.approx(0.8, abs=0.12)


def test_the_command_prints_the_plan_as_text_and_json(tmp_path, capsys):
    study = tmp_path / "pilot.yaml"
    out = tmp_path / "out"
    out.mkdir()
    pilot(out, table(np.random.default_rng(4), 3, 3))
    (tmp_path / "base.yaml").write_text("name: base\n")
    study.write_text(f"study: pilot\nbase: base.yaml\nout: {out}\nseeds: [0, 1, 2]\nvariants: {{v0: {{}}, v1: {{}}}}\n")
    assert main(["study", "plan", str(study), "--margin", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "needed for power 0.8 at a margin of 0.1 nats per token" in printed and "<- needed" in printed
    assert main(["study", "plan", str(study), "--margin", "0.1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["margin"] == 0.1
    for wrong in (["--power", "1.5"], ["--margin", "-1"], ["--power", "0"]):
        assert main(["study", "plan", str(study), *wrong]) == 64
        assert wrong[0] in capsys.readouterr().err


def test_without_a_pilot_the_message_says_what_to_train(tmp_path):
    with pytest.raises(SpecError, match=r"no study was started here.*train a pilot: headway study run x"):
        pilot_plan(tmp_path, power=0.8, margin=0.01, again="headway study run x")
    pilot(tmp_path, {"v0": {1: 3.0}, "v1": {1: 2.9}})
    with pytest.raises(SpecError, match="at least two finished seeds"):
        pilot_plan(tmp_path, power=0.8, margin=0.01, again="headway study run x")
