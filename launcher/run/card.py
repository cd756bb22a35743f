"""Description of a run before it starts: the card in its folder and the banner on the console."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from headway.launcher.run.identity import code_hash, identity_hash, run_identity
from headway.launcher.run.machine import git_commit, machine, versions
from headway.launcher.run.run_dir import RunDir, brief, flatten, spec_hash
from headway.launcher.spec.spec import Spec
from headway.model.attention.external import provenance


def run_card(spec: Spec, info: dict[str, Any]) -> dict[str, Any]:
    """Data about a run that the report needs in addition to its metrics."""
    from headway.model.cost import account

    assert spec.model.vocab_size is not None
    cost = account(
        spec.model,
        spec.attention,
        vocab_size=spec.model.vocab_size,
        seq_len=spec.data.seq_len,
        bytes_per_element=2 if spec.parallel.precision == "bf16" else 4,
        encoder_tokens=spec.data.encoder_tokens,
    )
    return {
        "format": 1,
        "name": spec.name,
        "spec_hash": spec_hash(spec.model_dump(mode="json")),
        "identity": identity_hash(run_identity(spec, info["fingerprint"])),
        "git_commit": git_commit(),
        "versions": versions(),
        **_mechanism(spec),
        "machine": machine(),
        "speed": _speed(spec),
        "data_fingerprint": info["fingerprint"],
        "working_dir": str(Path.cwd()),  # relative paths of the spec are relative to it
        "vocab_size": spec.model.vocab_size,
        "train_tokens_of_data": info.get("train_tokens"),
        "unigram_entropy_nats": info.get("unigram_entropy_nats"),
        "validation_bytes_per_token": info.get("validation_bytes_per_token"),
        "lossy_documents": info.get("lossy_documents", 0),
        **({"pairs": pairs} if (pairs := info.get("pairs")) else {}),
        **({"validation_sets": sets} if (sets := info.get("validation_sets")) else {}),
        **({"validation_overlap": shared} if (shared := info.get("validation_overlap")) else {}),
        "cost": {
            "num_params": cost.num_params,
            "params_by_part": cost.params_by_part,
            "flops_per_token_useful": cost.flops_per_token.useful,
            "flops_per_token_executed": cost.flops_per_token.executed,
            "flops_per_token_attention_core": cost.attention_core_flops.useful,
            "kv_bytes_per_token": cost.kv_bytes_per_token,
        },
        "steps": spec.steps,
        "tokens_per_step": spec.tokens_per_step,
        **{key: info[key] for key in _BEGIN if info.get(key)},
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def with_attempts(card: dict[str, Any], before: dict[str, Any], spec: Spec, *, from_step: int) -> dict[str, Any]:
    """Add a list of all starts of the run to the card: the starts in the previous card `before`, and this one.

    `from_step`: step of the newest checkpoint. The first start and the newest 199 are kept. A card of an earlier
    version, which has no list, counts as one start.
    """
    earlier = before.get("attempts")
    if not isinstance(earlier, list):
        earlier = [{key: before.get(key) for key in _OF_A_START}] if before.get("started_at") else []
    this = {key: card[key] for key in _OF_A_START} | {
        "code": code_hash(),
        **_mechanism(spec),
        "layout": _layout(spec),
        "zero": spec.parallel.zero,
        "engine": "single" if spec.parallel.is_single(spec.launch.world_size) else "deepspeed",
        "speed": card.get("speed"),
        "from_step": from_step,
    }
    attempts = [*earlier, this]
    # A run that continues does not read its parent or its initial weights again.
    begin = {"branch": spec.init.run, "weights": spec.init.weights, "conversion": spec.init.convert}
    card = {**{key: before[key] for key in _BEGIN if begin[key] is not None and key in before}, **card}
    return {**card, "attempts": attempts[:1] + attempts[1:][-199:]}


_BEGIN = ("branch", "weights", "conversion")
"""Keys of a card about what a run began from, if not from random weights: with init.convert, what was converted."""

_OF_A_START = ("started_at", "git_commit", "versions", "machine")
"""Keys of a card that may differ between the starts of one run."""


def banner(spec: Spec, run: RunDir, card: dict[str, Any]) -> str:
    """Summary of the training that is about to start, in terms of the spec."""
    cost = card["cost"]
    fingerprint = (card["data_fingerprint"] or f"synthetic {getattr(spec.data.source, 'task', '')}")[:24]
    attention = flatten(brief(spec.attention))
    branch = card.get("branch") if spec.init.run is not None else None
    weights = card.get("weights") if spec.init.weights is not None else None
    return "\n".join(
        [
            f"run        {run.path}  ({spec.name}, spec {card['spec_hash']})",
            f"attention  {spec.attention.type}  " + " ".join(f"{k}={v}" for k, v in attention.items() if k != "type"),
            f"parameters {cost['num_params']:,}  "
            + " ".join(f"{part} {n:,}" for part, n in cost["params_by_part"].items()),
            f"cost       {cost['flops_per_token_useful'] / 1e6:.2f} MFLOP/token forward (executed "
            f"{cost['flops_per_token_executed'] / 1e6:.2f}), KV {cost['kv_bytes_per_token']:,.0f} bytes/token",
            f"tokens     {spec.steps:,} steps x {spec.tokens_per_step:,} = {spec.steps * spec.tokens_per_step:,} "
            f"(sequences of {spec.data.seq_len}, {spec.train.global_batch} a step, {spec.train.micro_batch} a pass)",
            f"layout     {_layout(spec)}, {_engine(spec)}, {spec.parallel.precision}",
            f"speed      {' '.join(f'{key}={value}' for key, value in card['speed'].items())}",
            *(_branch(spec, branch) if branch else ()),
            *([_weights(weights)] if weights else ()),
            f"data       {fingerprint}, order seed {spec.data.seed}, initial seed {spec.seed}",
        ]
    )


def _branch(spec: Spec, branch: dict[str, Any]) -> list[str]:
    left = (spec.steps - branch["step"]) * spec.tokens_per_step
    lines = [f"branch     of {branch['path']} after step {branch['step']:,}; {left:,} tokens of its own"]
    return lines + ([f"note       {branch['note']}"] if branch.get("note") else [])


def _weights(weights: dict[str, Any]) -> str:
    step = f" after step {weights['step']:,} (run {weights['run']})" if "run" in weights else ""
    how = f", converted by {weights['convert']}" if "convert" in weights else ""
    return f"weights    of {weights['path']}{step}, sha256 {weights['sha256'][:16]}{how}"


def _mechanism(spec: Spec) -> dict[str, Any]:
    """Name, package and source hash of an external mechanism; empty for a built-in one."""
    found = provenance(spec.attention)
    return {"mechanism": found} if found else {}


def _speed(spec: Spec) -> dict[str, Any]:
    """The options of `speed` as they apply on this machine, and the device they apply to."""
    import torch

    from headway.parallel.operations import settled

    device = spec.launch.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"device": device, **settled(spec.speed, spec.parallel, device)}


def _engine(spec: Spec) -> str:
    parallel = spec.parallel
    return "engine for one process" if parallel.is_single(spec.launch.world_size) else f"ZeRO-{parallel.zero}"


def _layout(spec: Spec) -> str:
    launch, parallel = spec.launch, spec.parallel
    hosts = f"{launch.hosts} hosts x " if launch.hosts > 1 else ""
    sizes = {"tensor": parallel.tensor, "context": parallel.context, "pipeline": parallel.pipeline}
    shared = "".join(f", {name} {size}" for name, size in sizes.items() if size > 1)
    return f"{hosts}{launch.processes} process(es) by {launch.method}{shared}"
