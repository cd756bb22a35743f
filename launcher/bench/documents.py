"""`headway bench documents`: time the attention core within documents against the same core with a dense mask.

Sequences come from the spec's data, so their documents have its lengths. One measurement is what a pass of the model
asks of the core: reading the boundaries (or building the mask) once, then forward and backward of every layer. Both
forms take turns in one process.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.launcher.base import console
from headway.launcher.base.errors import SpecError
from headway.launcher.base.spread import spread
from headway.launcher.hosts.commands import worker_environment
from headway.launcher.run.machine import git_commit, machine, versions
from headway.launcher.spec.encoder_decoder import decoders_only
from headway.launcher.spec.load import load_spec

if TYPE_CHECKING:
    from torch import Tensor

    from headway.launcher.spec.spec import Spec

WARMUP = 2


def bench_documents(
    path: Path, overrides: Sequence[str], *, lengths: Sequence[int], rounds: int, tokens: int, out: Path | None
) -> int:
    """Measure the core at the shapes of the spec's first layer, on the CPU in fp32.

    tokens: Most tokens per pass; the micro-batch of the spec is reduced to this, to one sequence at least.

    Raises SpecError for invalid lengths or too few rounds.
    """
    if rounds < 2:
        raise SpecError(f"--rounds: {rounds} round(s) have no spread; use at least 2")
    if not lengths or min(lengths) < 2 or len(set(lengths)) != len(lengths):
        raise SpecError(
            f"--lengths: {list(lengths)} is invalid; use different lengths of at least 2 tokens, such as 256,2048"
        )
    spec = load_spec(path, overrides).spec
    decoders_only(spec, "headway bench documents")
    layer = spec.attention.layer(0, spec.model.layers)
    if layer.no_context_parallel is not None:
        raise SpecError(
            f"attention.type: headway bench documents times a core over whole sequences, and {layer.type} has none; "
            "use type gqa"
        )
    os.environ.update(worker_environment(spec))
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    result: dict[str, Any] = {
        "kind": "documents",
        "command": shlex.join(
            [
                *["headway", "bench", "documents", str(path), *overrides],
                *["--lengths", ",".join(map(str, lengths)), "--rounds", str(rounds), "--tokens", str(tokens)],
            ]
        ),
        "device": "cpu",
        "layers": spec.model.layers,
        "rounds": rounds,
        "git_commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "spec": spec.model_dump(mode="json"),
        "rows": [],
    }
    for length in lengths:
        console.note(f"{length} tokens: {rounds} rounds of {spec.model.layers} layers")
        result["rows"].append(_measure(spec, length, rounds=rounds, tokens=tokens))
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")
    console.result(_table(result))
    if out is not None:
        console.say(f"written to {out}")
    return 0


def _segments(spec: Spec, length: int, sequences: int) -> Tensor:
    """Document numbers of the first training sequences of the spec's data, [sequences, length] int32."""
    import numpy as np
    import torch

    from headway.data.loader import open_source

    source = open_source(spec.data.model_copy(update={"seq_len": length}), split="train")
    try:
        rows = [source.sample(source.index(i)).segments[:-1] for i in range(sequences)]
    finally:
        source.close()
    return torch.from_numpy(np.stack(rows))


def _measure(spec: Spec, length: int, *, rounds: int, tokens: int) -> dict[str, Any]:
    import torch

    from headway.kernels.attention import core
    from headway.kernels.documents import Documents
    from headway.kernels.masked import document_mask, masked_core

    sequences = min(spec.train.micro_batch, max(1, tokens // length))
    segments = _segments(spec, length, sequences)
    layer = spec.attention.layer(0, spec.model.layers)
    heads, kv_heads = layer.score_maps, layer.attended_heads()[0]
    generator = torch.Generator().manual_seed(1)
    shapes = [(sequences, length, n, layer.core_channels) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    upstream = torch.randn(q.shape, generator=generator)

    def passes(attend: Callable[[], Tensor]) -> None:
        for _ in range(spec.model.layers):
            torch.autograd.grad(attend(), (q, k, v), upstream)

    def dense() -> None:
        mask = document_mask(segments, q.dtype)
        passes(lambda: masked_core(q, k, v, mask))

    def documents() -> None:
        found = Documents.of(segments)
        passes(lambda: core(q, k, v, found))

    forms = {"dense": dense, "documents": documents}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for i in range(WARMUP + rounds):
        for name in list(forms) if i % 2 else list(forms)[::-1]:
            begin = time.perf_counter()
            forms[name]()
            if i >= WARMUP:
                seconds[name].append(time.perf_counter() - begin)
    return {
        "seq_len": length,
        "sequences": sequences,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": layer.core_channels,
        "document_tokens": [list(row) for row in Documents.of(segments).lengths],
        "mask_bytes": 4 * sequences * length**2,
        "dense_s": spread(seconds["dense"]),
        "documents_s": spread(seconds["documents"]),
        "ratio": spread([a / b for a, b in zip(seconds["documents"], seconds["dense"], strict=True)]),
        "raw_dense_s": seconds["dense"],
        "raw_documents_s": seconds["documents"],
    }


def _table(result: dict[str, Any]) -> str:
    lines = [
        "| tokens | sequences | documents | dense mask | documents one by one | ratio (quartiles) |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        ratio, count = row["ratio"], sum(map(len, row["document_tokens"]))
        times = (f"{1e3 * row[name]['median']:.1f} ms" for name in ("dense_s", "documents_s"))
        lines.append(
            f"| {row['seq_len']} | {row['sequences']} | {count} | {' | '.join(times)} | "
            f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f}) |"
        )
    return "\n".join(lines)
