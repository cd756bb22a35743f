"""Run by test_layout_changes.py in 2, 4 and 1 processes: saves in some layouts, and continues each save in others.

`span_cases.py FOLDER SAVERS WHICH`, with this folder on PYTHONPATH. SAVERS: the number of processes whose checkpoints
are continued. WHICH: "saved" saves them, if it is the number of this group; "fast" and "more" continue them in these
layouts. Prints one JSON object per case on rank 0. Not a test module.

Each state is written twice: by Headway, and in format 2, in which each file holds whole tensors, as DeepSpeed puts them
together.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_cases import GLOBAL, Micro, S, global_batch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from whole_tensors import whole_tensors

from headway.model.attention.rgqa import RgqaConfig
from headway.model.balance import BalanceConfig
from headway.model.config import ModelConfig
from headway.parallel import checkpoint, manifest
from headway.parallel.build import make_engine
from headway.parallel.config import CheckpointConfig, OptimizerConfig, ParallelConfig
from headway.parallel.engine import Engine
from headway.parallel.layout import Layout, arrange, init_layout
from headway.parallel.saver import Saver

VOCAB, SAVED, STEPS = 60, 2, 4
# 30 and 46: no multiples of 4, so that ZeRO pads and its ranges end within parameters.
MODEL = ModelConfig(width=30, layers=2, ffn_width=46, init_std=0.1)
ATTENTION = RgqaConfig(
    type="rgqa", heads=4, kv_heads=2, head_dim=8, top_k=1, balance=BalanceConfig(f_p=0.05, loss_free_rate=1e-3)
)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> (processes, section `parallel`)
    "single": (1, {}),
    "dp2": (2, {}),
    "dp2-z2": (2, {"zero": 2}),
    "dp2-z3": (2, {"zero": 3}),
    "cp2": (2, {"context": 2}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "dp4": (4, {}),
    "dp4-z3": (4, {"zero": 3}),
    "tp2·dp2": (4, {"tensor": 2}),
    "tp2·dp2-z3": (4, {"tensor": 2, "zero": 3}),
    "pp2·dp2": (4, {"pipeline": 2}),
}
SAVERS = {
    "fp32": ("dp2", "dp2-z3", "tp2", "pp2", "tp2·dp2", "tp2·dp2-z3"),
    "bf16": ("dp2", "dp2-z2", "dp2-z3", "pp2·dp2"),
}
MOVES = {  # saver -> layouts that continue it
    "fp32": {
        "dp2": ("dp2", "dp2-z3", "cp2", "tp2", "pp2", "dp4", "dp4-z3", "tp2·dp2", "single"),
        "dp2-z3": ("dp2-z3", "dp2", "tp2·dp2-z3"),
        "tp2": ("dp2", "pp2", "dp4", "single"),
        "pp2": ("dp2", "tp2"),
        "tp2·dp2": ("pp2·dp2", "single"),
        "tp2·dp2-z3": ("tp2·dp2-z3", "tp2·dp2", "single"),
    },
    "bf16": {
        "dp2": ("dp2", "dp2-z2", "dp2-z3", "tp2", "pp2", "dp4", "single"),
        "dp2-z2": ("dp2",),
        "dp2-z3": ("dp2-z3", "dp2", "dp4"),
        "pp2·dp2": ("pp2·dp2", "tp2·dp2-z3", "single"),
    },
}


FAST = {
    "fp32": {
        "dp2": ("dp2", "dp2-z3", "tp2", "pp2", "single"),
        "dp2-z3": ("dp2",),
        "tp2": ("pp2", "single"),
        "pp2": ("tp2",),
    },
    "bf16": {"dp2": ("dp2-z2", "single"), "dp2-z2": ("dp2",), "dp2-z3": ("dp2",)},
}
"""Part of `MOVES`: every saver of two processes, and every layout of two and one that has tensors of its own form."""


class Traffic(TorchDispatchMode):
    """Counts the bytes of the tensors that this rank gives to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::")
            self.bytes[name] += sum(t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


def engine_of(name: str, precision: str, layout: Layout) -> Engine:
    return make_engine(
        MODEL,
        ATTENTION,
        vocab_size=VOCAB,
        seed=3,
        seq_len=S,
        parallel=ParallelConfig.model_validate({"precision": precision, **LAYOUTS[name][1]}),
        optimizer=OptimizerConfig(lr=1e-2, clip_norm=0.5),
        layout=layout,
        micro_batch=1,
        accumulation=GLOBAL // layout.dp_size,
    )


def train(e: Engine, layout: Layout, first: int, last: int) -> list[list[float]]:
    """Loss, auxiliary loss and gradient norm of the steps `first` to `last` - 1."""
    figures = []
    per_rank = GLOBAL // layout.dp_size
    for step in range(first, last):
        b = global_batch(step)
        tokens, labels = b.tokens % VOCAB, torch.where(b.labels < 0, b.labels, b.labels % VOCAB)
        assert b.segments is not None
        rows = [slice(i, i + 1) for i in range(layout.dp_rank * per_rank, (layout.dp_rank + 1) * per_rank)]
        parts = [Micro(tokens[r], labels[r], b.segments[r]) for r in rows]
        e.before_step(step * GLOBAL * S)
        stats = e.train_step(parts, targets=int((labels != -100).sum()), lr=1e-2)
        figures.append([stats.loss, stats.aux_loss, stats.grad_norm])
    return figures


def digests(e: Engine, layout: Layout) -> dict[str, str]:
    """Hash of each whole tensor, as DeepSpeed puts it together, over all stages."""
    mine = {key: _hash(tensor) for key, tensor in whole_tensors(e)}
    mine |= {f"buffer/{name}": _hash(tensor) for name, tensor in whole_buffers(e, layout)}
    return {key: value for part in layout.gather_json(mine) for key, value in part.items()}


def _hash(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()[:16]


def whole_buffers(e: Engine, layout: Layout) -> list[tuple[str, torch.Tensor]]:
    found = []
    for name, (buffer, dim) in e.buffers().items():
        if dim is not None and layout.tp_size > 1:
            parts = [torch.empty_like(buffer) for _ in range(layout.tp_size)]
            dist.all_gather(parts, buffer.contiguous(), group=layout.tensor_group)
            buffer = torch.cat(parts, dim)
        found.append((name, buffer.detach()))
    return found


def save(e: Engine, layout: Layout, root: Path) -> dict[str, Any]:
    """Save with Headway; bytes that this rank exchanged for it, and those that the sums of DeepSpeed exchange."""
    saver = Saver(root, e, layout, CheckpointConfig(), about={})
    with Traffic() as ours:
        saver.start(SAVED, {"applied_steps": e.applied_steps})
        outcome = saver.commit()
    assert outcome.error is None, outcome.error
    with Traffic() as theirs:
        digests(e, layout)
    return {"ours": dict(ours.bytes), "theirs": dict(theirs.bytes), "state": checkpoint_bytes(root)}


def checkpoint_bytes(root: Path) -> int:
    return sum(entry.bytes for entry in checkpoint.read_manifest(root / f"step-{SAVED:010d}").files.values())


def save_format_2(e: Engine, layout: Layout, root: Path) -> None:
    """Write the same state as releases before format 3 did: one rank of each stage writes whole tensors."""
    folder = root / f"step-{SAVED:010d}"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.clone() for key, tensor in whole_tensors(e)}
    tensors |= {f"buffer/{name}": tensor.clone() for name, tensor in whole_buffers(e, layout)}
    files = {}
    if layout.tp_rank == 0 and layout.data_index == 0:
        path = folder / f"tensors-{layout.rank:05d}-of-{layout.world_size:05d}.safetensors"
        save_file(tensors, path)
        files[path.name] = {
            "bytes": path.stat().st_size,
            "xxh3_128": manifest.file_hash(path),
            "tensors": sorted(tensors),
        }
    everyones = {name: entry for part in layout.gather_json(files) for name, entry in part.items()}
    if layout.is_main:
        state = {"applied_steps": e.applied_steps}
        value = {"format": 2, "step": SAVED, "layout": {}, "state": state, "files": everyones, "about": {}}
        sealed = {"xxh3_128": manifest.own_hash(value), "manifest": value}
        (folder / manifest.MANIFEST).write_text(json.dumps(sealed))
    layout.barrier()


def continued(e: Engine, layout: Layout, root: Path) -> dict[str, Any]:
    """The state that an engine loads, and the steps after it."""
    found = checkpoint.newest_valid(root, layout, warn=print)
    assert found is not None
    checkpoint.load(found, e, layout)
    return {"digests": digests(e, layout), "figures": train(e, layout, SAVED, STEPS)}


def is_fast(precision: str, name: str, target: str) -> bool:
    return target in FAST[precision].get(name, ())


def main() -> None:
    torch.set_num_threads(1)
    folder, savers_size, which = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    base = init_layout(device="cpu", timeout_s=120)
    layouts: dict[Any, Layout] = {}

    def layout_of(name: str) -> Layout:
        p = ParallelConfig.model_validate(LAYOUTS[name][1])
        sizes = (p.tensor, p.context, p.pipeline)
        if sizes not in layouts:
            layouts[sizes] = arrange(p, local_rank=base.local_rank, device=base.device)
        return layouts[sizes]

    def tell(kind: str, **facts: Any) -> None:
        if base.is_main:
            print("CASE", json.dumps({"kind": kind, **facts}), flush=True)

    for precision, savers in SAVERS.items():
        for name in savers:
            if which != "saved" or not LAYOUTS[name][0] == savers_size == base.world_size:
                continue
            layout = layout_of(name)
            e = engine_of(name, precision, layout)
            train(e, layout, 0, SAVED)
            traffic = save(e, layout, folder / precision / name)
            save_format_2(e, layout, folder / f"{precision}-format-2" / name)
            state = digests(e, layout)
            figures = train(e, layout, SAVED, STEPS)
            tell("saved", precision=precision, name=name, digests=state, figures=figures, traffic=traffic)
    for precision, moves in MOVES.items():
        for name, targets in moves.items():
            for target in targets:
                if (LAYOUTS[name][0], LAYOUTS[target][0]) != (savers_size, base.world_size):
                    continue
                if which != ("fast" if is_fast(precision, name, target) else "more"):
                    continue
                layout = layout_of(target)
                ways = {}
                for way in (precision, f"{precision}-format-2"):
                    e = engine_of(target, precision, layout)
                    ways[way.removeprefix(precision) or "now"] = continued(e, layout, folder / way / name)
                tell("moved", precision=precision, name=name, target=target, ways=ways)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Skip the interpreter's teardown, in which a thread of gloo may abort a rank on a loaded machine.
    sys.stdout.flush()
    os._exit(0)
