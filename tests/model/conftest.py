"""Small layers in float64, and the decoders around them."""

import importlib.util
import sys
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from headway.kernels.attention import core
from headway.kernels.documents import Documents
from headway.kernels.rope import rope_tables
from headway.launcher.study.config import load_study
from headway.launcher.study.plan import variant_spec
from headway.model.attention.block_sparse import BlockSparseConfig
from headway.model.attention.dynamic import DynamicGqaConfig
from headway.model.attention.gated_delta import GatedDeltaConfig
from headway.model.attention.gqa import GqaConfig, MqaConfig
from headway.model.attention.gqe import GqeConfig
from headway.model.attention.hybrid import HybridConfig
from headway.model.attention.mla import MlaConfig
from headway.model.attention.moa import MoaConfig
from headway.model.attention.moh import MohConfig
from headway.model.attention.namoh import NamohConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.sqa import SqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.attention.wgqa import WgqaConfig
from headway.model.balance import BalanceConfig
from headway.model.base import Attention, AttentionConfig, AttentionOutput, Context, Ranks, SequenceRanks
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder
from headway.model.init import initialise
from headway.model.router import QueryNormRouterConfig, RouterConfig

WIDTH = 20
VOCAB = 37

MECHANISMS: dict[str, AttentionConfig] = {
    "moa": MoaConfig(heads=5, head_dim=6, top_k=2),
    "moh": MohConfig(heads=6, kv_heads=2, head_dim=6, shared_heads=2, top_k=2, qk_norm=True),
    "moh-code": MohConfig(heads=4, kv_heads=4, head_dim=6, shared_heads=1, top_k=2, form="code"),
    "moh-llama": MohConfig(
        heads=6,
        kv_heads=2,
        head_dim=6,
        shared_heads=2,
        top_k=2,
        form="straight_through",
        router=QueryNormRouterConfig(),
    ),
    "namoh": NamohConfig(heads=4, head_dim=6, top_k=3, qk_norm=True),
    "namoh-shared": NamohConfig(
        heads=6, head_dim=6, top_k=2, shared_heads=2, window=9, balance=BalanceConfig(f_p=0.01, loss_free_rate=1e-3)
    ),
    "namoh-grouped": NamohConfig(
        heads=4, head_dim=6, top_k=3, projections="grouped", rank_positions=False, rope_fraction=2 / 3
    ),
    "block-sparse": BlockSparseConfig(heads=6, kv_heads=2, head_dim=6, block=3, blocks=2, qk_norm=True),
    "block-sparse-head": BlockSparseConfig(
        heads=4, kv_heads=2, head_dim=6, block=3, blocks=2, chosen_by="head", rope_fraction=2 / 3
    ),
    "sqa": SqaConfig(heads=12, kv_heads=2, kept=3, head_dim=6, rope_fraction=1 / 3),
    "dynamic-gqa": DynamicGqaConfig(heads=7, kv_heads=3, head_dim=6, qk_norm=True, freeze_after_tokens=0),
    "mqa-gated": MqaConfig(heads=4, head_dim=6, gate="headwise"),
    "gqa-local": GqaConfig(heads=4, kv_heads=2, head_dim=6, windows=9, gate="elementwise"),
    "gqa-local-global": GqaConfig(heads=8, kv_heads=4, head_dim=6, windows=[None, 9, None, 9], gate="headwise"),
    "gqa-asymmetric": GqaConfig(heads=12, kv_heads=4, head_dim=6, group_sizes=[1, 5, 1, 5], windows=[8, None, 8, None]),
    "gqa": GqaConfig(heads=6, kv_heads=2, head_dim=10, qk_norm=True, rope_fraction=0.6),
    "rgqa": RgqaConfig(heads=6, kv_heads=2, head_dim=10, top_k=2),
    "rgqa-grouped": RgqaConfig(heads=8, kv_heads=2, head_dim=6, top_k=2, always_on=1, projections="grouped"),
    "rgqa-k1": RgqaConfig(heads=8, kv_heads=2, head_dim=6, top_k=1, gate="detached_renorm", qk_norm=True),
    "rgqa-always-on": RgqaConfig(
        heads=6, kv_heads=2, head_dim=6, top_k=1, always_on=1, balance=BalanceConfig(loss_free_rate=1e-3)
    ),
    "gqe": GqeConfig(heads=6, kv_heads=2, head_dim=10, top_k=2, qk_norm=True),
    "gqe-k1-group0": GqeConfig(heads=6, kv_heads=2, head_dim=6, top_k=1, shared_head="group0", rope_fraction=2 / 3),
    "gqe-dedicated": GqeConfig(heads=4, kv_heads=2, head_dim=6, top_k=1, shared_head="dedicated"),
    "gqe-weighted-concat": GqeConfig(heads=6, kv_heads=2, head_dim=6, top_k=2, variant="weighted_concat"),
    "hybrid": HybridConfig(heads=6, kv_heads=2, head_dim=6, top_k=2, value_experts=3, value_top_k=2, qk_norm=True),
    "hybrid-always-on": HybridConfig(
        heads=6, kv_heads=2, head_dim=10, top_k=1, always_on=1, value_experts=2, value_top_k=1, value_gate="sigmoid"
    ),
    "hybrid-output-experts": HybridConfig(
        heads=4, kv_heads=2, head_dim=6, top_k=1, value_experts=3, value_top_k=1, output_experts=3, output_top_k=2
    ),
    "wgqa": WgqaConfig(heads=6, kv_heads=2, head_dim=10, qk_norm=True),
    "wgqa-column": WgqaConfig(heads=8, kv_heads=4, head_dim=6, weights="column", start="random"),
    "wgqa-row": WgqaConfig(heads=4, kv_heads=2, head_dim=6, weights="row", rope_fraction=2 / 3),
    "switchhead": SwitchHeadConfig(kv_heads=2, head_dim=10, experts=3, top_k=2, rope_fraction=0.4),
    "switchhead-grouped": SwitchHeadConfig(kv_heads=2, head_dim=6, experts=3, top_k=2, projections="grouped"),
    "rgqa-routed": RgqaConfig(heads=8, kv_heads=2, head_dim=6, top_k=2, always_on=1, projections="routed"),
    "switchhead-routed": SwitchHeadConfig(kv_heads=2, head_dim=6, experts=3, top_k=2, projections="routed"),
    "gqe-routed": GqeConfig(heads=8, kv_heads=2, head_dim=6, top_k=1, projections="routed"),
    "hybrid-routed": HybridConfig(
        heads=6, kv_heads=2, head_dim=6, top_k=2, value_experts=3, value_top_k=2, projections="routed"
    ),
    "gqe-grouped": GqeConfig(heads=8, kv_heads=2, head_dim=6, top_k=1, projections="grouped"),
    "mla": MlaConfig(heads=4, head_dim=6, latent=7, rope_dim=4),
    "gla": MlaConfig(heads=6, head_dim=5, latent=4, latents=2, query_latent=9, rope_dim=2),
    "gated-delta": GatedDeltaConfig(heads=2, value_heads=4, head_dim=6, value_dim=5, chunk=4),
    "gated-delta-wide": GatedDeltaConfig(heads=2, head_dim=5, conv=3),
}


ROOT = Path(__file__).parents[2]


def of_study(covered: Collection[str]) -> dict[str, AttentionConfig]:
    """One config of each type in yaml/studies/all-mechanisms.yaml that is not `covered`.

    So a mechanism that has no entry of its own above goes through every generic test nevertheless.
    """
    study, found = load_study(ROOT / "yaml" / "studies" / "all-mechanisms.yaml"), dict[str, AttentionConfig]()
    for name, keys in study.config.variants.items():
        if (kind := keys["attention.type"]) not in covered:
            (_, mechanism), *_ = variant_spec(study, (), name).attention.mechanisms()
            found.setdefault(f"study: {kind}", mechanism)
    return found


def example_config(**fields: Any) -> AttentionConfig:
    """The mechanism of docs/examples, whose package need not be installed."""
    name = "headway_example_mechanism"
    if name not in sys.modules:
        path = ROOT / "docs" / "examples" / "headway-example-mechanism" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].TemperatureGqaConfig(**fields)


MECHANISMS |= of_study({config.type for config in MECHANISMS.values()})
MECHANISMS["example package"] = example_config(heads=6, kv_heads=2, head_dim=6, qk_norm=True)

WHOLE = {n for n, config in MECHANISMS.items() if {shard.units for shard in config.shards().values()} == {1}}


@pytest.fixture
def mechanisms() -> dict[str, AttentionConfig]:
    return MECHANISMS


@pytest.fixture
def study_mechanisms() -> Callable[[Collection[str]], dict[str, AttentionConfig]]:
    """`study_mechanisms(covered)`: see `of_study`."""
    return of_study


@pytest.fixture
def whole_mechanisms() -> set[str]:
    """Those that declare every parameter as one piece, which no two tensor-parallel ranks can share."""
    return WHOLE


@pytest.fixture(params=[name for name in MECHANISMS if name not in WHOLE])
def cut_mechanism(request: pytest.FixtureRequest) -> AttentionConfig:
    return MECHANISMS[request.param]


@pytest.fixture(params=[name for name, config in MECHANISMS.items() if config.no_context_parallel is None])
def shared_mechanism(request: pytest.FixtureRequest) -> AttentionConfig:
    """One whose sequences context-parallel ranks can share."""
    return MECHANISMS[request.param]


@pytest.fixture(params=[name for name, config in MECHANISMS.items() if config.no_compiled_blocks is None])
def compilable_mechanism(request: pytest.FixtureRequest) -> AttentionConfig:
    """One whose blocks the spec check lets `speed.compile: block` compile."""
    return MECHANISMS[request.param]


@pytest.fixture(params=[n for n, config in MECHANISMS.items() if n not in WHOLE and config.no_context_parallel is None])
def cut_shared_mechanism(request: pytest.FixtureRequest) -> AttentionConfig:
    return MECHANISMS[request.param]


@pytest.fixture(params=[name for name, config in MECHANISMS.items() if hasattr(config, "router")])
def routed_mechanism(request: pytest.FixtureRequest) -> AttentionConfig:
    return MECHANISMS[request.param]


@pytest.fixture(params=list(MECHANISMS))
def mechanism(request: pytest.FixtureRequest) -> AttentionConfig:
    return MECHANISMS[request.param]


@pytest.fixture
def layer() -> Callable[..., Attention]:
    """One layer's attention in float64, with weights large enough that gates and scores matter."""

    def make(config: AttentionConfig, *, seed: int = 1, std: float = 0.4) -> Attention:
        for name in type(config).model_fields:
            router = getattr(config, name)
            if isinstance(router, RouterConfig) and hasattr(router, "init_std"):
                config = config.model_copy(update={name: router.model_copy(update={"init_std": std})})
        module = config.build(width=WIDTH, layers=1, init_std=std, norm_eps=1e-5)
        initialise(module, seed=seed, prefix="blocks.0.attn.")
        return module.double()

    return make


@pytest.fixture
def decoder() -> Callable[..., Decoder]:
    """Two blocks, float64."""

    def make(config: AttentionConfig, *, seed: int = 1, tied: bool = True, init_std: float = 0.3) -> Decoder:
        model = ModelConfig(width=WIDTH, layers=2, ffn_width=28, tied_embeddings=tied, init_std=init_std)
        return Decoder(model, config, vocab_size=VOCAB, seed=seed).double()

    return make


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 11, WIDTH, dtype=torch.float64)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (3, 11))


@pytest.fixture
def context(tokens: Tensor) -> Callable[..., Context]:
    """`context(config, seq_len=11, documents=None)`: positions 0 .. seq_len - 1."""

    def make(config: AttentionConfig, seq_len: int = 11, documents: Documents | None = None) -> Context:
        rope = rope_tables(seq_len, config.rotated, config.rope_base, torch.device("cpu"))
        return Context(rope=rope, documents=documents, tokens=tokens[:, :seq_len])

    return make


class Exchange:
    """Ranks that run as threads, and what they give each other."""

    def __init__(self, ranks: int) -> None:
        self._barrier, self._given = Barrier(ranks, timeout=30), [None] * ranks

    def all(self, rank: int, given: Any) -> list[Any]:
        """All-gather: the values of all ranks, in rank order."""
        self._given[rank] = given
        self._barrier.wait()
        everyones = list(self._given)
        self._barrier.wait()  # wait until all ranks have read the values, before one replaces its own
        return everyones

    def run(self, works: list[Callable[[], Any]]) -> list[Any]:
        """Run one function per rank in threads, at the same time. Returns their results."""

        def guarded(work: Callable[[], Any]) -> Any:
            try:
                return work()
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(len(works)) as pool:
            return list(pool.map(guarded, works))


@pytest.fixture
def lockstep() -> Callable[..., list[AttentionOutput]]:
    """`lockstep(parts, run)`: run(part) of every tensor-parallel rank's part, at once; sums over ranks are theirs."""

    def start(parts: list[Attention], run: Callable[[Attention], AttentionOutput]) -> list[AttentionOutput]:
        exchange = Exchange(len(parts))

        def total(rank: int, partial_sum: Tensor) -> Tensor:
            return torch.stack(exchange.all(rank, partial_sum)).sum(0)

        for rank, part in enumerate(parts):
            part.ranks = Ranks(index=rank, count=len(parts), sum=partial(total, rank))
        return exchange.run([partial(run, part) for part in parts])

    return start


@pytest.fixture
def share_sequences() -> Callable[..., list[Any]]:
    """`share_sequences(ranks, x, context, run)`: run(rank, part of x, its context) of context-parallel ranks, at once.

    They share one graph, in which gradients cross ranks by themselves.
    """

    def start(ranks: int, x: Tensor, context: Context, run: Callable[[int, Tensor, Context], Any]) -> list[Any]:
        exchange = Exchange(ranks)

        def mean(rank: int, tensor: Tensor) -> Tensor:
            return torch.stack(exchange.all(rank, tensor)).mean(0)

        def attend(rank: int, *parts: Any, window: int | None = None) -> Tensor:
            q, k, v = (torch.cat(each, 1) for each in zip(*exchange.all(rank, parts[:3]), strict=True))
            return core(q, k, v, parts[3], window=window).chunk(ranks, 1)[rank]

        def work(rank: int) -> Any:
            cos, sin = (table.chunk(ranks)[rank] for table in context.rope)
            tokens = None if context.tokens is None else context.tokens.chunk(ranks, 1)[rank]
            sequence = SequenceRanks(index=rank, count=ranks, mean=partial(mean, rank), attend=partial(attend, rank))
            own = replace(context, rope=(cos, sin), tokens=tokens, sequence=sequence)
            return run(rank, x.chunk(ranks, 1)[rank], own)

        return exchange.run([partial(work, rank) for rank in range(ranks)])

    return start
