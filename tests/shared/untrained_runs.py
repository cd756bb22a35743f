"""Folders of runs that were not trained: the spec, and a checkpoint with the initial weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from headway.launcher.run.resolve import resolve
from headway.launcher.run.run_dir import RunDir, write_json
from headway.launcher.run.weights import find_checkpoint, load_decoder
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec
from headway.model.decoder import Decoder
from headway.model.seq2seq.build import Model, build_model
from headway.parallel import checkpoint
from headway.parallel.layout import Layout
from headway.parallel.logical import LogicalBuffer
from headway.parallel.tensors.spans import Span, whole

ALONE = Layout(rank=0, local_rank=0, dp_rank=0, dp_size=1, device=torch.device("cpu"))

SPEC: dict[str, Any] = {
    "name": "untrained",
    # Large enough that gates, routers and positions matter.
    "model": {"width": 24, "layers": 2, "ffn_width": 32, "init_std": 0.3},
    "data": {
        "seq_len": 48,
        "source": {"type": "synthetic", "task": "mqar", "vocab_size": 40, "pairs": 4, "queries": 4},
    },
    "optimizer": {"lr": 3e-3},
    "train": {"tokens": 3840, "global_batch": 8, "micro_batch": 8, "validation_tokens": 384},
    "launch": {"threads": 1, "device": "cpu"},
}


class _Saved:
    """What a checkpoint saves of a model that no optimizer has changed."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def buffers(self) -> Mapping[str, LogicalBuffer]:
        return {name: LogicalBuffer(buffer, None) for name, buffer in checkpoint.persistent_buffers(self._model)}

    def read_spans(self) -> Iterator[tuple[str, Span, Tensor]]:
        for name, value in self._model.named_parameters():
            span = whole(tuple(value.shape))
            yield f"param/{name}", span, value.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                yield f"{moment}/{name}", span, torch.zeros_like(value)


def untrained_run(folder: Path, *, step: int = 1, tokens: int = 384, **sections: dict[str, Any]) -> Path:
    """Write the run `folder` with a checkpoint of `step`. `sections`: keys that differ from `SPEC`, by section."""
    tree = {key: SPEC.get(key) for key in [*SPEC, *sections]}
    for section, keys in sections.items():
        tree[section] = {**(tree[section] or {}), **keys}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "untrained.yaml"
    file.write_text(yaml.safe_dump(tree))
    spec, _ = resolve(load_spec(file).spec)
    file.unlink()
    assert spec.model.vocab_size is not None
    model = build_model(spec.model, spec.attention, vocab_size=spec.model.vocab_size, seed=spec.seed)
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # as if balancing had acted
            if name.endswith("router.bias"):
                buffer += torch.linspace(-0.2, 0.2, buffer.numel()).view_as(buffer)
    run = RunDir(folder)
    write_json(run.spec, spec.model_dump(mode="json"))
    state = {"tokens": tokens, "applied_steps": 0}
    assert checkpoint.save(run.checkpoints, _Saved(model), ALONE, step=step, state=state, keep=1) is None
    return folder


def decoder_of(folder: Path) -> Decoder:
    """The decoder of the run in `folder`, with the weights of its newest checkpoint."""
    run = RunDir(folder)
    return load_decoder(Spec.model_validate_json(run.spec.read_text()), find_checkpoint(run))
