"""Cases of the parity table: mechanisms, layouts, and the training that they run."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from headway.data.loader import MicroBatch, split
from headway.model.attention.block_sparse import BlockSparseConfig
from headway.model.attention.gated_delta import GatedDeltaConfig
from headway.model.attention.gqa import GqaConfig
from headway.model.attention.gqe import GqeConfig
from headway.model.attention.hybrid import HybridConfig
from headway.model.attention.mla import MlaConfig
from headway.model.attention.moh import MohConfig
from headway.model.attention.namoh import NamohConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.attention.wgqa import WgqaConfig
from headway.model.balance import BalanceConfig
from headway.model.base import AttentionConfig, AttentionSection
from headway.model.config import ModelConfig
from headway.model.mixed import MixedConfig
from headway.model.router import TokenHashRouterConfig
from headway.parallel.config import OptimizerConfig, ParallelConfig

VOCAB, SEQ_LEN, GLOBAL_BATCH, STEPS, SAVED_STEP, SEED = 60, 24, 8, 5, 3, 3
OPTIMIZER = OptimizerConfig(lr=3e-3, clip_norm=0.5)  # the gradient norm is above this in every step: clipping acts
MODEL = ModelConfig(width=32, layers=4, ffn_width=48, init_std=0.1)

LOSS_FREE = BalanceConfig(f_p=0.05, z=0.01, loss_free_rate=1e-3)
TABLE: dict[str, AttentionConfig] = {
    "gqa": GqaConfig(heads=8, kv_heads=4, head_dim=8, qk_norm=True),
    "rgqa": RgqaConfig(heads=8, kv_heads=4, head_dim=8, top_k=1, qk_norm=True, balance=LOSS_FREE),
    "gqe": GqeConfig(heads=8, kv_heads=4, head_dim=8, top_k=1),
    "switchhead": SwitchHeadConfig(kv_heads=4, head_dim=8, experts=3, top_k=2, balance=BalanceConfig(entropy=0.01)),
    "wgqa": WgqaConfig(heads=8, kv_heads=4, head_dim=8),
    "hybrid": HybridConfig(heads=8, kv_heads=4, head_dim=8, top_k=1, value_experts=3, value_top_k=2),
}
"""Mechanisms that are run on every layout."""

TWO_STACKS = ("t5-wgqa", "t5-dropout", "two-rope")
ENCODER_TOKENS = 8

GATED = GatedDeltaConfig(heads=4, value_heads=8, head_dim=8, value_dim=6, chunk=7)
WITH_STATE = ("gated", "gated-mixed")

DENSE = {"gqa", "wgqa", "mla", "gla", "windows", "gpt2-block", "xl-block", "dropout", *TWO_STACKS, *WITH_STATE}
DENSE |= {"value-residual", "shared-kv"}
"""Mechanisms without routers: rounding changes their results slightly, and cannot change a selection of experts."""

MECHANISMS: dict[str, AttentionSection] = {
    **TABLE,
    "moh": MohConfig(heads=8, kv_heads=4, head_dim=8, shared_heads=2, top_k=3),
    "namoh": NamohConfig(heads=8, head_dim=8, top_k=3, shared_heads=4, window=7, qk_norm=True, balance=LOSS_FREE),
    "hash": RgqaConfig(heads=8, kv_heads=4, head_dim=8, top_k=1, router=TokenHashRouterConfig()),
    "cv2": RgqaConfig(heads=16, kv_heads=4, head_dim=8, top_k=2, gate="renorm", balance=BalanceConfig(cv2=0.05)),
    "windows": GqaConfig(heads=8, kv_heads=4, head_dim=8, windows=[None, 7, None, 7]),
    "value-residual": GqaConfig(heads=8, kv_heads=4, head_dim=8, value_residual="learned"),
    "shared-kv": GqaConfig(heads=8, kv_heads=4, head_dim=8, share_kv=2, qk_norm=True),
    "gpt2-block": GqaConfig(heads=8, kv_heads=4, head_dim=8, biases=True),
    "relu-block": SwitchHeadConfig(kv_heads=4, head_dim=8, experts=3, top_k=2),
    "xl-block": GqaConfig(heads=8, kv_heads=4, head_dim=8),
    "xl-switchhead": SwitchHeadConfig(kv_heads=4, head_dim=8, experts=3, top_k=2),
    "dropout": GqaConfig(heads=8, kv_heads=4, head_dim=8, biases=True),
    "dropout-xl": SwitchHeadConfig(kv_heads=4, head_dim=8, experts=3, top_k=2),
    "t5-wgqa": WgqaConfig(heads=8, kv_heads=4, head_dim=8),
    "t5-dropout": GqaConfig(heads=8, kv_heads=4, head_dim=8, biases=True),
    "two-rope": GqaConfig(heads=8, kv_heads=4, head_dim=8, qk_norm=True),
    "gqe-first": GqeConfig(heads=8, kv_heads=4, head_dim=8, top_k=2, shared_head="group0", qk_norm=True),
    "blocks": BlockSparseConfig(heads=8, kv_heads=4, head_dim=8, block=4, blocks=1),
    "mla": MlaConfig(heads=4, head_dim=8, latent=12, query_latent=10, rope_dim=4),
    "gla": MlaConfig(heads=8, head_dim=8, latent=12, latents=4, rope_dim=4),
    "gated": GATED,
    "gated-mixed": MixedConfig(
        kinds={"linear": GATED, "full": GqaConfig(heads=8, kv_heads=4, head_dim=8)},
        pattern=["linear", "linear", "linear", "full"],
    ),
    "mixed": MixedConfig(
        kinds={
            "local": GqaConfig(heads=8, kv_heads=4, head_dim=8, windows=7),
            "routed": RgqaConfig(heads=8, kv_heads=4, head_dim=8, top_k=1, rope_base=500.0, balance=LOSS_FREE),
            "values": SwitchHeadConfig(kv_heads=4, head_dim=6, experts=3, top_k=2, rope_fraction=0.0),
        },
        pattern=["local", "routed", "values", "routed"],
    ),
}

DROPOUT: dict[str, Any] = {"dropout": 0.05, "dropout_places": ("embedding", "branches", "hidden", "head")}

GPT2: dict[str, Any] = {
    "mlp": "gelu_tanh",
    "mlp_biases": True,
    "norm": "layernorm",
    "positions": "learned",
    "max_positions": SEQ_LEN,
    "head_bias": True,
}

TWO: dict[str, Any] = {"type": "encoder_decoder", "layers": 2, "encoder_layers": 2}

FORMS: dict[str, dict[str, Any]] = {
    "t5-wgqa": TWO | {"positions": "relative_t5", "mlp": "geglu"},
    "t5-dropout": TWO | DROPOUT | {"positions": "relative_t5", "mlp": "relu", "mlp_biases": True},
    "two-rope": TWO,
    "gpt2-block": GPT2,
    "dropout": GPT2 | DROPOUT,
    "relu-block": {"mlp": "relu", "mlp_biases": True, "norm": "layernorm", "positions": "none"},
    "xl-block": {"positions": "relative_xl"},
    "xl-switchhead": {"mlp": "relu", "mlp_biases": True, "positions": "relative_xl", "head_bias": True},
    "dropout-xl": {"mlp": "relu", "norm": "layernorm", "positions": "relative_xl", **DROPOUT},
}
"""Options of the block, by the name of the case's mechanism; the others have the defaults."""

XL = ("xl-block", "xl-switchhead")

LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "tp2": {"tensor": 2},
    "tp4": {"tensor": 4},
    "pp2": {"pipeline": 2},
    "pp4": {"pipeline": 4},
    "dp2": {"data": 2},
    "dp4": {"data": 4},
    "tp2·pp2": {"tensor": 2, "pipeline": 2},
    "tp2·dp2": {"tensor": 2, "data": 2},
    "pp2·dp2": {"pipeline": 2, "data": 2},
    "tp2·pp2·dp2": {"tensor": 2, "pipeline": 2, "data": 2},
    "sp2": {"tensor": 2, "sequence_parallel": True},
    "cp2": {"context": 2},
    "cp2·pp2": {"context": 2, "pipeline": 2},
    "cp2·dp2": {"context": 2, "data": 2},
    "tp2·cp2": {"tensor": 2, "context": 2},
    "sp2·pp2": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
    "sp2·cp2·pp2": {"tensor": 2, "context": 2, "pipeline": 2, "sequence_parallel": True},
}
COLUMNS = ("tp2", "tp4", "pp2", "pp4", "dp2", "tp2·pp2", "tp2·dp2", "pp2·dp2", "tp2·pp2·dp2", "sp2", "cp2")
"""Layouts on which every mechanism of the table is run."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training of `STEPS` steps. `save`: also a checkpoint after `SAVED_STEP`; `load`: begins with that of this name.
    `overlap`: exchanges overlap with the passes, in buckets so small that each backward pass has several.

    `sabotage`: the name of a fault in `parity_faults`, which must be noticed.
    """

    mechanism: str
    layout: str = "single"
    zero: int = 1
    precision: str = "fp32"
    recompute: bool = False
    tied: bool = True
    packed: bool = True
    micro_batch: int = 2
    overlap: bool = False
    save: str = ""
    load: str = ""
    sabotage: str = ""

    @property
    def name(self) -> str:
        """Unique one-line description for reports."""
        words = [self.mechanism, self.layout, f"zero {self.zero}", self.precision]
        words += ["recompute"] * self.recompute + ["untied"] * (not self.tied) + ["unmasked"] * (not self.packed)
        words += [f"micro-batch {self.micro_batch}"] * (self.micro_batch != 2)
        words += ["overlap"] * self.overlap
        for what in ("save", "load", "sabotage"):
            words += [f"{what} {getattr(self, what)}"] if getattr(self, what) else []
        return " ".join(words)

    @property
    def reference(self) -> Case:
        """The same training in one process."""
        return Case(mechanism=self.mechanism, precision=self.precision, tied=self.tied, packed=self.packed)

    @property
    def world_size(self) -> int:
        sizes = LAYOUTS[self.layout]
        return self.parallel.model_ranks * sizes.get("data", 1)

    @property
    def parallel(self) -> ParallelConfig:
        sizes = {key: value for key, value in LAYOUTS[self.layout].items() if key != "data"}
        recompute = "block" if self.recompute else "none"
        common = {"recompute": recompute, "zero": self.zero, "precision": self.precision, "overlap": self.overlap}
        return ParallelConfig.model_validate({**sizes, **common})

    @property
    def model(self) -> ModelConfig:
        return MODEL.model_copy(update={"tied_embeddings": self.tied, **FORMS.get(self.mechanism, {})})

    @property
    def refused(self) -> bool:
        """Whether the spec check refuses the layout: of an encoder-decoder, pipelines and context parallelism."""
        return self.model.is_encoder_decoder and self.parallel.context * self.parallel.pipeline > 1

    @property
    def first_step(self) -> int:
        return SAVED_STEP if self.load else 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def global_batch(step: int, *, packed: bool) -> MicroBatch:
    """A task that is learned within the steps; where `packed`, with two documents in each sequence. Sequences have very
    different numbers of targets: averaging by micro-batch would show.
    """
    g = torch.Generator().manual_seed(100 + step)
    first = torch.randint(0, VOCAB, (GLOBAL_BATCH, 1), generator=g)
    tokens = (first + 7 * torch.arange(SEQ_LEN + 1)) % VOCAB
    labels = tokens[:, 1:].clone()
    labels[0, 3:] = -100
    labels[5, :9] = -100
    segments = (torch.arange(SEQ_LEN) >= 11).int().expand(GLOBAL_BATCH, SEQ_LEN).contiguous() if packed else None
    return MicroBatch(tokens=tokens[:, :-1].contiguous(), labels=labels, segments=segments)


def batch_of(case: Case, step: int) -> MicroBatch:
    """The global batch of a case. In an encoder-decoder the source has a part of the first document, so that the tokens
    of the second have no source.
    """
    batch = global_batch(step, packed=case.packed)
    return split(batch, ENCODER_TOKENS) if case.model.is_encoder_decoder else batch


def micro_batches(batch: MicroBatch, case: Case, dp_rank: int, dp_size: int) -> list[MicroBatch]:
    """Those of one data-parallel rank."""
    per_rank, size = GLOBAL_BATCH // dp_size, case.micro_batch
    starts = list(range(dp_rank * per_rank, (dp_rank + 1) * per_rank, size))
    return [
        MicroBatch(
            tokens=batch.tokens[i : i + size],
            labels=batch.labels[i : i + size],
            segments=None if batch.segments is None else batch.segments[i : i + size],
            source=None if batch.source is None else batch.source[i : i + size],
            source_segments=None if batch.source_segments is None else batch.source_segments[i : i + size],
        )
        for i in starts
    ]


def legal_zero(layout: str) -> tuple[int, ...]:
    return (1,) if "pipeline" in LAYOUTS[layout] else (1, 2, 3)


def table_cases(precision: str) -> list[Case]:
    """Every mechanism of the table on every layout and legal ZeRO stage."""
    return [
        Case(mechanism=mechanism, layout=layout, zero=zero, precision=precision)
        for mechanism, layout in itertools.product(TABLE, COLUMNS)
        for zero in legal_zero(layout)
    ]


MOVES: tuple[tuple[tuple[str, int], tuple[str, int]], ...] = (
    (("tp2", 1), ("single", 1)),
    (("single", 1), ("tp2", 2)),
    (("pp2", 1), ("tp2", 1)),
    (("tp2·pp2", 1), ("dp2", 3)),
    (("tp2", 3), ("pp2", 1)),
    (("pp2·dp2", 1), ("single", 1)),
    (("cp2", 2), ("tp2·pp2", 1)),
)
"""(layout, ZeRO stage) that saves -> one that goes on; with a loss-free bias and tied embeddings."""


MOVED = ("t5-dropout", "namoh", "gated", "mla", "gla", "blocks", "mixed", "value-residual", "shared-kv")
"""Mechanisms that go on under ZeRO-3 from what tensor parallel ranks saved: their parameters are cut in other ways."""


def saved_name(layout: str, zero: int, precision: str = "fp32") -> str:
    return f"rgqa-{layout.replace('·', '-')}-z{zero}-{precision}"


def move_cases() -> list[Case]:
    """Savers, each of which also resumes itself, then loaders."""
    savers, loaders = {}, []
    for layout in ("dp2", "pp2"):
        savers[f"dropout-{layout}"] = Case(mechanism="dropout", layout=layout, save=f"dropout-{layout}")
    for mechanism in MOVED:
        name = f"{mechanism}-tp2"
        savers[name] = Case(mechanism=mechanism, layout="tp2", save=name)
        loaders.append(Case(mechanism=mechanism, layout="dp2", zero=3, load=name))
    for (layout, zero), (to, to_zero) in MOVES:
        name = saved_name(layout, zero)
        savers[name] = Case(mechanism="rgqa", layout=layout, zero=zero, save=name)
        loaders.append(Case(mechanism="rgqa", layout=to, zero=to_zero, load=name))
    for layout, zero in (("single", 1), ("tp2·pp2", 1), ("tp2·dp2", 3)):
        name = saved_name(layout, zero, "bf16")
        savers[name] = Case(mechanism="rgqa", layout=layout, zero=zero, precision="bf16", save=name)
    return [*savers.values(), *loaders]


def other_cases() -> list[Case]:
    """What the table leaves out: other mechanisms, recomputation, untied matrices, no masks, routers that are not cut,
    fixed routers, layouts of three kinds of ranks.
    """
    rgqa = Case(mechanism="rgqa")
    cases = [replace(rgqa, layout=x, zero=z, recompute=True) for x, z in (("single", 1), ("tp2", 1), ("pp2", 1))]
    cases += [replace(rgqa, layout=x, zero=3, recompute=True) for x in ("dp2", "sp2", "cp2")]
    cases += [replace(rgqa, layout=x, recompute=True, precision="bf16") for x in ("single", "pp2")]
    cases += [replace(rgqa, layout=x, tied=False) for x in ("pp2", "tp2·pp2", "pp4")]
    cases += [replace(rgqa, layout="tp2·pp2", tied=False, precision="bf16")]
    cases += [replace(rgqa, layout=x, packed=False) for x in ("tp2", "pp2", "cp2", "sp2", "tp2·pp2")]
    cases += [Case(mechanism="moh", layout=x, zero=z) for x, z in (("tp2", 1), ("cp2", 2), ("pp2", 1), ("sp2", 3))]
    cases += [Case(mechanism="namoh", layout=x) for x in ("tp2", "tp4", "pp2", "dp2", "sp2", "tp2·pp2")]
    cases += [Case(mechanism="namoh", layout=x, zero=3, recompute=True) for x in ("single", "dp2", "sp2")]
    cases += [Case(mechanism=x, layout=y) for x in WITH_STATE for y in ("tp2", "tp4", "pp2", "dp2", "sp2", "tp2·pp2")]
    cases += [Case(mechanism="gated", layout=x, zero=3, recompute=True) for x in ("single", "dp2", "sp2")]
    cases += [Case(mechanism="blocks", layout=x, zero=z) for x, z in (("tp2", 1), ("sp2", 3))]
    cases += [Case(mechanism="mla", layout=x) for x in ("tp2", "sp2", "cp2")]
    cases += [Case(mechanism="mla", layout="pp2", precision="bf16")]
    cases += [Case(mechanism="gla", layout=x) for x in ("tp2", "tp2·pp2")]
    cases += [Case(mechanism="mixed", layout=x, zero=z) for x, z in (("sp2", 1), ("pp2", 1), ("cp2", 1), ("dp2", 3))]
    cases += [Case(mechanism="mixed", layout="tp2·pp2", recompute=True)]
    cases += [Case(mechanism="hash", layout=x) for x in ("tp2", "pp2", "cp2", "dp2", "tp2·pp2")]
    cases += [Case(mechanism="cv2", layout=x) for x in ("tp2", "cp2", "sp2", "pp2·dp2")]
    cases += [Case(mechanism="windows", layout=x) for x in ("tp2", "cp2", "sp2", "pp2")]
    within = ("tp2", "tp4", "dp2", "sp2", "cp2", "tp2·cp2")  # layers of one stage
    cases += [Case(mechanism="value-residual", layout=x) for x in within]
    cases += [Case(mechanism="shared-kv", layout=x) for x in (*within, "pp2", "tp2·pp2", "sp2·cp2·pp2")]
    for mechanism in ("value-residual", "shared-kv"):
        cases += [Case(mechanism=mechanism, layout=x, zero=3, recompute=True) for x in ("single", "dp2", "sp2", "cp2")]
        cases += [Case(mechanism=mechanism, layout=x, precision="bf16") for x in ("tp2", "dp2")]
    cases += [Case(mechanism="gqe-first", layout=x) for x in ("tp2", "sp2", "cp2", "tp2·pp2")]
    layouts = ("tp2", "sp2", "cp2", "pp2", "dp2", "sp2·cp2·pp2")
    forms = [Case(mechanism=x, layout=y) for x, y in itertools.product(FORMS, layouts)]
    cases += [case for case in forms if not (case.model.relative and case.parallel.context > 1) and not case.refused]
    cases += [Case(mechanism=x, layout=y, precision="bf16") for x in XL for y in ("tp2", "pp2", "dp2")]
    cases += [Case(mechanism="dropout", micro_batch=size) for size in (1, 4, 8)]
    cases += [Case(mechanism="dropout", layout=x, recompute=True) for x in ("single", "pp2", "sp2")]
    for layout in ("cp2·pp2", "cp2·dp2", "tp2·cp2", "sp2·pp2", "sp2·cp2·pp2"):
        cases += [Case(mechanism=x, layout=layout) for x in ("rgqa", "gqe", "switchhead")]
    return cases


def overlap_cases() -> list[Case]:
    """Exchanges that overlap with the passes, wherever the spec allows it: ZeRO-2 and 3, and ZeRO-1 in fp32; with and
    without accumulation.
    """
    kinds = [
        (zero, precision) for precision in ("fp32", "bf16") for zero in (1, 2, 3) if (zero, precision) != (1, "bf16")
    ]
    cases = [
        Case(mechanism=mechanism, layout=layout, zero=zero, precision=precision, overlap=True)
        for mechanism, layout in itertools.product(("gqa", "rgqa"), ("dp2", "tp2·dp2", "cp2"))
        for zero, precision in kinds
    ]
    rgqa = [Case(mechanism="rgqa", zero=zero, precision=precision, overlap=True) for zero, precision in kinds]
    cases += [replace(case, layout=layout) for layout in ("single", "dp4", "sp2", "cp2·dp2") for case in rgqa]
    cases += [replace(case, layout="dp2", micro_batch=4) for case in rgqa]  # one micro-batch per step
    cases += [replace(case, layout="dp2", recompute=True) for case in rgqa]
    cases += [replace(case, layout="dp2", tied=False) for case in rgqa if case.precision == "fp32"]
    cases += [Case(mechanism=x, layout="dp2", zero=2, overlap=True) for x in ("gqe", "switchhead", "wgqa", "hybrid")]
    return cases


def noise_cases() -> list[Case]:
    """One process in bf16 with another order of summation: measures bf16 noise without a change of layout."""
    return [Case(mechanism=x, precision="bf16", micro_batch=size) for x in TABLE for size in (1, 4, 8)]


def every_case() -> list[Case]:
    """All of them, with the references they are compared to; savers come before loaders."""
    tables = [*table_cases("fp32"), *table_cases("bf16"), *other_cases(), *overlap_cases()]
    cases = [*tables, *noise_cases(), *move_cases()]
    return with_references(cases)


def with_references(cases: list[Case]) -> list[Case]:
    """The cases, after what they need: references, and savers of what they load."""
    savers = {case.save: case for case in move_cases() if case.save}
    needed = [savers[case.load] for case in cases if case.load]
    return list(dict.fromkeys([*(case.reference for case in cases), *needed, *cases]))


def groups(cases: list[Case]) -> list[tuple[int, list[Case]]]:
    """(processes, cases) in the order to be run: small groups first, then those that load what a larger one saves."""
    savers = {case.save: case.world_size for case in cases if case.save}
    found: dict[tuple[bool, int], list[Case]] = {}
    for case in cases:
        later = savers.get(case.load, 0) > case.world_size
        found.setdefault((later, case.world_size), []).append(case)
    return [(size, found[later, size]) for later, size in sorted(found)]
