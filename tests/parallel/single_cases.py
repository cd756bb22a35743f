"""Run by test_single_engine.py in one process: the same training with Headway's engine and with DeepSpeed's ZeRO-1.

`single_cases.py FOLDER CASE ...` prints one JSON object per case. Not a test module itself.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from headway.launcher.train.router import RouterMonitor
from headway.model.attention.block_sparse import BlockSparseConfig
from headway.model.attention.gated_delta import GatedDeltaConfig
from headway.model.attention.gqa import GqaConfig
from headway.model.attention.hybrid import HybridConfig
from headway.model.attention.mla import MlaConfig
from headway.model.attention.namoh import NamohConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.attention.wgqa import WgqaConfig
from headway.model.balance import BalanceConfig
from headway.model.base import AttentionSection
from headway.model.config import ModelConfig
from headway.model.mixed import MixedConfig
from headway.parallel import checkpoint, single_engine
from headway.parallel.build import make_engine
from headway.parallel.config import OptimizerConfig, ParallelConfig
from headway.parallel.engine import Engine
from headway.parallel.layout import Layout, init_layout

S, MICRO, STEPS, SAVED = 16, 2, 16, 9
NOT_FINITE, REFUSED = (5, 12), 8
ENGINES = ("deepspeed", "auto")
HEADS: dict[str, Any] = {"heads": 8, "kv_heads": 4, "head_dim": 8}


@dataclass(frozen=True, kw_only=True)
class Case:
    attention: AttentionSection
    precision: str = "fp32"
    zero: int = 1
    accumulation: int = 3
    vocab: int = 509
    model: dict[str, Any] = field(default_factory=dict)
    recompute: str = "none"
    norm_block: int = single_engine.NORM_BLOCK


ROUTED = RgqaConfig(**HEADS, top_k=1, qk_norm=True, balance=BalanceConfig(f_p=0.05, loss_free_rate=1e-3))
NAMOH = NamohConfig(heads=8, head_dim=8, top_k=2, shared_heads=2, window=7, balance=ROUTED.balance)
DELTA = GatedDeltaConfig(heads=4, head_dim=8, chunk=7)
LATENT = MlaConfig(heads=8, head_dim=8, latent=24, query_latent=20, rope_dim=4)
BLOCKS = BlockSparseConfig(**HEADS, block=4, blocks=1)
ODD: dict[str, Any] = {"width": 36, "ffn_width": 301}  # sizes that fill no whole vectors
CASES = {
    "gqa": Case(attention=GqaConfig(**HEADS)),
    "gqa bf16": Case(attention=GqaConfig(**HEADS), precision="bf16"),
    "norms in blocks": Case(attention=GqaConfig(**HEADS), norm_block=1000, accumulation=1),
    "tied": Case(attention=GqaConfig(**HEADS), model={"tied_embeddings": True}, accumulation=1),
    "tied bf16": Case(attention=GqaConfig(**HEADS), precision="bf16", model={"tied_embeddings": True}),
    "odd sizes": Case(attention=GqaConfig(**HEADS), vocab=1031, model=ODD),
    "odd sizes bf16": Case(attention=GqaConfig(**HEADS), vocab=1031, model=ODD, precision="bf16"),
    "rgqa": Case(attention=ROUTED, recompute="block"),
    "rgqa bf16": Case(attention=ROUTED, precision="bf16", recompute="selective", accumulation=1),
    "wgqa": Case(attention=WgqaConfig(**HEADS)),
    "switchhead bf16": Case(
        attention=SwitchHeadConfig(kv_heads=4, head_dim=8, experts=3, top_k=2, balance=BalanceConfig(entropy=0.01)),
        precision="bf16",
    ),
    "hybrid": Case(attention=HybridConfig(**HEADS, top_k=1, value_experts=3, value_top_k=2)),
    "mixed": Case(attention=MixedConfig(kinds={"linear": DELTA, "routed": NAMOH}, pattern=["linear", "routed"])),
    "mixed bf16": Case(
        attention=MixedConfig(kinds={"blocks": BLOCKS, "latent": LATENT}, pattern=["blocks", "latent"]),
        precision="bf16",
    ),
    "gated_delta bf16": Case(attention=DELTA, precision="bf16", recompute="selective"),
    "namoh bf16": Case(attention=NAMOH, precision="bf16", recompute="block"),
    "value residual": Case(attention=GqaConfig(**HEADS, value_residual="learned")),
    "shared bf16": Case(attention=GqaConfig(**HEADS, share_kv=2, qk_norm=True), precision="bf16"),
}


class Micro(NamedTuple):
    tokens: torch.Tensor
    labels: torch.Tensor
    segments: torch.Tensor | None
    source: torch.Tensor | None = None
    source_segments: torch.Tensor | None = None


class Run:
    """One engine and what it has recorded: loss, auxiliary loss, norm, skipped, and router figures of each step."""

    def __init__(self, case: Case, engine: str, layout: Layout) -> None:
        self.case = case
        self.engine: Engine = make_engine(
            ModelConfig(**{"width": 64, "layers": 2, "ffn_width": 160, "init_std": 0.1, **case.model}),
            case.attention,
            vocab_size=case.vocab,
            seed=3,
            seq_len=S,
            parallel=ParallelConfig.model_validate(
                {"engine": engine, "precision": case.precision, "zero": case.zero, "recompute": case.recompute}
            ),
            optimizer=OptimizerConfig(lr=1e-2, clip_norm=0.5),
            layout=layout,
            micro_batch=MICRO,
            accumulation=case.accumulation,
        )
        self._factor = 1.0
        self.engine.logical[3].parameter.register_hook(lambda gradient: gradient * self._factor)
        self._monitor = RouterMonitor(
            self.engine.attention_layers, layout, every_steps=1, total_steps=STEPS, tokens_per_step=MICRO * S
        )
        self.records: list[Any] = []

    def train(self, first: int, last: int) -> None:
        """Steps `first` to `last` - 1. Some have a gradient that is not finite, and the guard refuses one."""
        for step in range(first, last):
            g = torch.Generator().manual_seed(step)
            tokens = torch.randint(0, self.case.vocab, (self.case.accumulation, MICRO, S), generator=g)
            labels = tokens.roll(-1, 2)
            labels[0, 0, 3:] = -100
            self.engine.before_step(step * MICRO * S)
            self._monitor.before_step(step + 1)
            self._factor = float("nan") if step in NOT_FINITE else 1.0
            stats = self.engine.train_step(
                [Micro(t, n, None) for t, n in zip(tokens, labels, strict=True)],
                targets=int((labels != -100).sum()),
                lr=1e-2 * (1 - step / 100),
                allows=lambda loss, step=step: step != REFUSED,
            )
            routers = self._monitor.after_step(step + 1, applied=not stats.skipped)
            self.records.append([stats.loss, stats.aux_loss, stats.grad_norm, stats.skipped, str(routers)])

    def save(self, root: Path, layout: Layout) -> None:
        state = {"applied_steps": self.engine.applied_steps}
        error = checkpoint.save(root, self.engine, layout, step=SAVED, state=state, keep=1)
        assert error is None, error

    def load(self, root: Path, layout: Layout) -> None:
        found = checkpoint.newest_valid(root, layout, warn=print)
        assert found is not None
        checkpoint.load(found, self.engine, layout)


def tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """fp32 weights and moments, buffers, and the parameters that the passes use."""
    found = {name: tensor.view(span.shape).clone() for name, span, tensor in engine.read_spans()}
    found |= {f"buffer/{name}": buffer.tensor.clone() for name, buffer in engine.buffers().items()}
    return found | {f"used/{p.name}": p.parameter.detach().clone() for p in engine.logical}


def hashes(root: Path) -> dict[str, str]:
    """Hash of every file of tensors of the checkpoint in `root`."""
    folder = checkpoint.steps_on_disk(root)[0]
    return {name: entry.xxh3_128 for name, entry in checkpoint.read_manifest(folder).files.items()}


def compared(name: str, case: Case, layout: Layout, root: Path) -> dict[str, Any]:
    runs, ends = {}, {}
    single_engine.NORM_BLOCK = case.norm_block
    for engine in ENGINES:
        run = runs[engine] = Run(case, engine, layout)
        run.train(0, SAVED)
        run.save(root / name / engine, layout)
        run.train(SAVED, STEPS)
        ends[engine] = tensors(run.engine)
    resumed = {}
    for engine, source in (("deepspeed", "auto"), ("auto", "deepspeed"), ("auto", "auto")):
        run = Run(case, engine, layout)
        run.load(root / name / source, layout)
        run.train(SAVED, STEPS)
        same = all(torch.equal(tensor, ends[source][key]) for key, tensor in tensors(run.engine).items())
        resumed[f"{engine} from {source}"] = same and run.records == runs[source].records[SAVED:]
    ours, theirs = ends["auto"], ends["deepspeed"]
    return {
        "name": name,
        "classes": [type(runs[engine].engine).__name__ for engine in ENGINES],
        "records": [runs[engine].records for engine in ENGINES],
        "tensors": len(ours),
        "differ": sorted(key for key in ours.keys() | theirs.keys() if not torch.equal(ours[key], theirs[key])),
        "checkpoints": [hashes(root / name / engine) for engine in ENGINES],
        "resumed": resumed,
        "adam_steps": [sorted(runs[engine].engine.adam_steps()) for engine in ENGINES],
    }


def main() -> None:
    torch.set_num_threads(1)
    layout = init_layout(device="cpu", timeout_s=60)
    root, *names = sys.argv[1:]
    for name in names:
        print("CASE", json.dumps(compared(name, CASES[name], layout, Path(root))), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Skip the interpreter's teardown: on a loaded machine a thread of gloo has aborted a rank there, after all results.
    sys.stdout.flush()
    os._exit(0)
