"""Initial scale of the residual branches: factors for `model.branch_start`, and measured ratios.

Rank 0 computes the factors once and stores them in the run folder, so that all ranks and all later starts of the run
use the same factors in every layout. The factors affect only the initial parameters.
"""

from __future__ import annotations

from typing import Any

import torch

from headway.data.loader import MicroBatch
from headway.launcher.base.errors import SpecError
from headway.launcher.run.run_dir import RunDir, read_mapping, write_json
from headway.launcher.spec.spec import Spec
from headway.model.decoder import BranchScale
from headway.model.measure.branch import branch_ratios, branch_scales, measured_branches
from headway.parallel.engine import Engine
from headway.parallel.layout import Layout


def start_scales(run: RunDir, spec: Spec, layout: Layout, batch: MicroBatch) -> list[BranchScale] | None:
    """The factors of each block; None if `model.branch_start` does not change the random parameters. Collective.

    `batch`: the probe batch with whole sequences. Raises SpecError if a branch cannot be scaled to the ratio.
    """
    if spec.model.branch_target is None or spec.init.weights is not None or spec.init.run is not None:
        return None
    mine: dict[str, Any] = {}
    if layout.is_main:
        mine = read_mapping(run.branch_start)
        if not mine:
            mine = _computed(spec, batch)
            if "problem" not in mine:
                write_json(run.branch_start, mine)
    found = next(part for part in layout.gather_json(mine) if part)
    if "problem" in found:
        raise SpecError(found["problem"])
    return [BranchScale(**scale) for scale in found["scales"]]


def measure_start(engine: Engine, layout: Layout, batch: MicroBatch) -> dict[str, dict[str, float]]:
    """Layer -> {"attention", "mlp"}: rms of the branch output divided by rms of the residual stream. Collective."""
    with measured_branches(engine.blocks) as sums:
        engine.evaluate([batch])
    whole: dict[str, dict[str, float]] = {}
    for layers in layout.gather_json({f"layer_{index:02d}": values for index, values in sums.items()}):
        for name, values in layers.items():
            have = whole.setdefault(name, {})
            for key, value in values.items():
                have[key] = have.get(key, 0.0) + value
    return {name: branch_ratios(whole[name]) for name in sorted(whole)}


def _computed(spec: Spec, batch: MicroBatch) -> dict[str, Any]:
    target, vocab_size = spec.model.branch_target, spec.model.vocab_size
    assert target is not None and vocab_size is not None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of sums must not depend on the number of cores
    try:
        scales = branch_scales(
            spec.model,
            spec.attention,
            vocab_size=vocab_size,
            seed=spec.seed,
            tokens=batch.tokens,
            segments=batch.segments,
            target=target,
        )
    except ValueError as e:
        return {"problem": f"model.branch_start: {e}; use as_drawn, zero or other initial values"}
    finally:
        torch.set_num_threads(threads)
    return {"format": 1, "target": target, "seed": spec.seed, "scales": [scale._asdict() for scale in scales]}
