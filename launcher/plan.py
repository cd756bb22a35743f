"""`headway plan`: what a spec costs, computed, without training and without a GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headway.launcher.launch import resolve, run_card
from headway.launcher.load import load_spec
from headway.launcher.spec import Spec


def plan(path: Path, overrides: Sequence[str], *, as_json: bool = False) -> int:
    """Print parameters, forward FLOPs per token and KV cache of a spec, and the training FLOPs of the whole run."""
    spec, info = resolve(load_spec(path, overrides).spec)
    cost = run_card(spec, info)["cost"]
    tokens = spec.steps * spec.tokens_per_step
    cost["training_tokens"] = tokens
    cost["training_flops_useful"] = 3 * cost["flops_per_token_useful"] * tokens
    if as_json:
        print(json.dumps(cost, indent=1))
        return 0
    rows = [
        ("attention", spec.attention.type),
        ("parameters", f"{cost['num_params']:,}"),
        *((f"  {part}", f"{n:,}") for part, n in cost["params_by_part"].items()),
        ("forward FLOPs/token, useful", f"{cost['flops_per_token_useful']:,.0f} at {spec.data.seq_len} tokens"),
        *((f"  {part}", f"{n:,.0f}") for part, n in _parts(spec, cost).items()),
        ("forward FLOPs/token, executed", f"{cost['flops_per_token_executed']:,.0f}"),
        ("KV cache bytes/token", f"{cost['kv_bytes_per_token']:,.0f} ({spec.parallel.precision})"),
        ("training tokens", f"{tokens:,} in {spec.steps:,} steps"),
        ("training FLOPs, useful", f"{cost['training_flops_useful']:.3e}"),
    ]
    for name, value in rows:
        print(f"{name:<30} {value}")
    return 0


def _parts(spec: Spec, cost: dict[str, Any]) -> dict[str, float]:
    """Where the useful FLOPs go."""
    assert spec.model.vocab_size is not None
    core = cost["flops_per_token_attention_core"]
    mlp = 6.0 * spec.model.layers * spec.model.width * spec.model.ffn_width
    head = 2.0 * spec.model.vocab_size * spec.model.width
    projections = cost["flops_per_token_useful"] - core - mlp - head
    return {"attention projections, routers": projections, "attention core": core, "mlp": mlp, "head": head}
