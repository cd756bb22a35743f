"""The compared models: shapes of yaml/models, with each mechanism matched to the parameters of gqa at its size.

Legend: d width, L layers, H query heads, G KV heads, D head size, F FFN width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from headway.kernels.operations import make_operations
from headway.model.attention.gqa import GqaConfig
from headway.model.attention.gqe import GqeConfig
from headway.model.attention.hybrid import HybridConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.base import AttentionConfig, SequenceRanks
from headway.model.config import ModelConfig
from headway.model.cost import account
from headway.model.decoder import Decoder, Placement, Recompute
from headway.model.init import initialise

FFN_STEP = 32


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model size: the shape of gqa, whose parameters all mechanisms match, and the heads of SwitchHead."""

    name: str
    width: int
    layers: int
    ffn_width: int
    heads: int
    kv_heads: int
    head_dim: int
    switch_heads: int
    switch_head_dim: int
    vocab_size: int = 32_000
    tied: bool = True


GPU_SIZES = (
    Size(
        name="940M",
        width=2048,
        layers=20,
        ffn_width=5408,
        heads=16,
        kv_heads=4,
        head_dim=128,
        switch_heads=4,
        switch_head_dim=128,
    ),
    Size(
        name="940M, head size 64",
        width=2048,
        layers=20,
        ffn_width=5408,
        heads=32,
        kv_heads=8,
        head_dim=64,
        switch_heads=8,
        switch_head_dim=96,
    ),
    Size(
        name="250M",
        width=1024,
        layers=20,
        ffn_width=2688,
        heads=16,
        kv_heads=4,
        head_dim=64,
        switch_heads=4,
        switch_head_dim=112,
    ),
    Size(
        name="162M",
        width=1024,
        layers=12,
        ffn_width=2656,
        heads=16,
        kv_heads=4,
        head_dim=64,
        switch_heads=4,
        switch_head_dim=112,
    ),
)
TINY = Size(
    name="tiny",
    width=32,
    layers=2,
    ffn_width=96,
    heads=8,
    kv_heads=2,
    head_dim=8,
    switch_heads=2,
    switch_head_dim=8,
    vocab_size=64,
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A mechanism at a size. `active`: (active, all) query heads of the core; None if it does not route query heads,
    so that no bound is known.
    """

    name: str
    attention: AttentionConfig
    baseline: str = "gqa"
    active: tuple[int, int] | None = None

    @property
    def routed(self) -> bool:
        """Whether it has routers, and therefore uses Headway's kernels."""
        return not isinstance(self.attention, GqaConfig)


def variants(size: Size) -> list[Variant]:
    """All variants of a size: gqa first, every other one after its baseline."""
    heads, groups, head_dim = size.heads, size.kv_heads, size.head_dim
    members = heads // groups
    pool: dict[str, Any] = {"heads": heads, "kv_heads": groups, "head_dim": head_dim}
    experts: dict[str, Any] = {"heads": heads, "kv_heads": heads // 2, "head_dim": head_dim}
    switch: dict[str, Any] = {"kv_heads": size.switch_heads, "head_dim": size.switch_head_dim}
    found = [Variant(name="gqa", attention=GqaConfig(**pool))]
    for k in (1, 2):
        attention = RgqaConfig(**pool, top_k=k, projections="auto")
        found.append(Variant(name=f"rgqa k={k}/{members}", attention=attention, active=(k, members)))
    return [
        *found,
        Variant(name="switchhead", attention=SwitchHeadConfig(**switch, experts=4, top_k=2, projections="auto")),
        Variant(
            name="hybrid",
            attention=HybridConfig(**pool, top_k=1, value_experts=4, value_top_k=2, projections="auto"),
        ),
        Variant(name="gqa, half as many KV heads as heads", attention=GqaConfig(**experts), baseline="gqa"),
        Variant(
            name="gqe",
            attention=GqeConfig(**experts, top_k=1, projections="auto"),
            baseline="gqa, half as many KV heads as heads",
            active=(heads // 2 + 1, heads),
        ),
    ]


def model_config(size: Size, attention: AttentionConfig) -> ModelConfig:
    """The FFN width, a multiple of 32, for which the parameters are nearest to those of gqa at this size."""

    def made(ffn_width: int) -> ModelConfig:
        return ModelConfig(
            width=size.width,
            layers=size.layers,
            ffn_width=ffn_width,
            vocab_size=size.vocab_size,
            tied_embeddings=size.tied,
        )

    def params(attention: AttentionConfig, ffn_width: int) -> int:
        return account(made(ffn_width), attention, vocab_size=size.vocab_size, seq_len=1024).num_params

    target = params(variants(size)[0].attention, size.ffn_width)
    without = params(attention, FFN_STEP) - 3 * size.width * size.layers * FFN_STEP
    steps = round((target - without) / (3 * size.width * size.layers * FFN_STEP))
    return made(FFN_STEP * max(1, steps))


def decoder(
    size: Size,
    attention: AttentionConfig,
    device: torch.device,
    dtype: torch.dtype,
    /,
    *,
    recompute: Recompute = "none",
    **levers: Any,
) -> Decoder:
    """A model with random parameters of the usual standard deviations, drawn on the device, because that is faster.

    `levers`: options of `headway.kernels.operations.make_operations`, as in `speed` of a spec.
    """
    operations = make_operations(device=device, dtype=dtype, **levers)
    placement = Placement(recompute=recompute, operations=operations, sequence=SequenceRanks(attend=operations.core))
    config = model_config(size, attention)
    with torch.device("meta"):
        model = Decoder(config, attention, vocab_size=size.vocab_size, seed=1, placement=placement)
    model = model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()
    initialise(model, seed=1, draw=draw_on(device))
    model.before_step(0)
    for layer in model.attention_layers():
        layer.watch_routers(closely=False)  # training computes router details only in some steps
    return model.to(dtype)


def draw_on(device: torch.device) -> Callable[..., torch.Tensor]:
    """A `draw` function for `initialise` that draws on the device."""
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(1)

    def draw(name: str, shape: torch.Size, *, std: float, seed: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device).normal_(0.0, std, generator=generator)

    return draw
