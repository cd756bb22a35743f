"""Rows of `headway bench gpu`, and the sizes at which they are measured: full on a GPU, reduced on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from headway.kernels.operations import Compile, Operations, make_operations
from headway.launcher.bench.gpu.shapes import GPU_SIZES, TINY, Size, decoder
from headway.model.base import AttentionConfig
from headway.model.decoder import Decoder


class Absent(Exception):
    """A row cannot be measured because something is missing here; the text says what."""


class Failed(Exception):
    """A row found a wrong result. The text describes it, and `data` is the result."""

    def __init__(self, text: str, data: dict[str, Any]) -> None:
        super().__init__(text)
        self.data = data


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of all rows. Reduced sizes let every row run without a GPU; their numbers do not apply to a GPU."""

    name: str
    dtype: torch.dtype
    rounds: int
    step_rounds: int
    copied_bytes: int
    cached_bytes: int  # of a tensor that stays in L2
    rows: int  # of matrix products
    inner: tuple[int, ...]  # K of matrix products
    square: int  # side of the product that gives the highest rate
    head_dims: tuple[int, ...]
    lengths: tuple[int, ...]
    prefill_lengths: tuple[int, ...]
    tokens: int  # of a micro-batch; a longer sequence is a micro-batch by itself
    product_tokens: tuple[int, ...]
    document_tokens: int  # median length of the packed documents
    compile: Compile  # `speed.compile` of both sides of every ratio
    sizes: tuple[Size, ...]


GPU = Scale(
    name="gpu",
    dtype=torch.bfloat16,
    rounds=15,
    step_rounds=7,
    copied_bytes=1 << 30,
    cached_bytes=16 << 20,
    rows=32_768,
    inner=(768, 1024, 2048, 3072, 5760),
    square=8192,
    head_dims=(64, 96, 128),
    lengths=(2048, 8192, 32_768),
    prefill_lengths=(2048, 8192, 32_768, 131_072),
    tokens=16_384,
    product_tokens=(4096, 32_768),
    document_tokens=500,
    compile="elementwise",
    sizes=GPU_SIZES,
)
REDUCED = Scale(
    name="cpu, reduced",
    dtype=torch.float32,
    rounds=2,
    step_rounds=2,
    copied_bytes=1 << 16,
    cached_bytes=1 << 12,
    rows=64,
    inner=(16, 32),
    square=32,
    head_dims=(8,),
    lengths=(16, 32),
    prefill_lengths=(16, 32),
    tokens=32,
    product_tokens=(32,),
    document_tokens=6,
    compile="none",  # a CPU's compiler takes half a minute per model; tests cover compiled functions
    sizes=(TINY,),
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The device and scale of the rows."""

    device: torch.device
    scale: Scale

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def operations(self) -> Operations:
        """Operations of a layer that is timed outside of a model: compiled as the scale says."""
        return make_operations(device=self.device, dtype=self.scale.dtype, compile=self.scale.compile)

    def decoder(self, size: Size, attention: AttentionConfig, /, **levers: Any) -> Decoder:
        """A model on the device, compiled as the scale says unless `levers` says otherwise; see `shapes.decoder`."""
        levers = {"compile": self.scale.compile} | levers
        return decoder(size, attention, self.device, self.scale.dtype, **levers)

    def lost(self) -> bool:
        """Whether the device no longer works, for example after a kernel with an illegal memory access."""
        if not self.is_gpu:
            return False
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return True
        return False

    def free(self) -> None:
        """Free cached memory, so that the next row does not suffer from fragmentation, and forget compiled functions:
        the shapes of all rows together exceed the limit of one function."""
        if self.scale.compile != "none":
            torch._dynamo.reset()
        if self.is_gpu:
            torch.cuda.empty_cache()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement. `key`: its name, `part/...`. `seconds`: its expected duration on a GPU."""

    key: str
    what: str
    seconds: float
    run: Callable[[Machine], dict[str, Any]]

    @property
    def part(self) -> str:
        return self.key.split("/", 1)[0]


def product_rows(
    machine: Machine,
    part: str,
    what: str,
    compare: Callable[[Size, int, int, Machine], dict[str, Any]],
    *,
    seconds: float,
) -> list[Row]:
    """Rows that call `compare(size, k, tokens, machine)` for each size, number of tokens, and k heads per group."""
    return [
        Row(
            key=f"{part}/{size.name} k={k} {tokens}",
            what=f"{what}, {tokens} tokens, {size.name}, {k} of {size.heads // size.kv_heads} heads",
            seconds=seconds,
            run=functools.partial(compare, size, k, tokens),
        )
        for size in machine.scale.sizes
        for tokens in machine.scale.product_tokens
        for k in (1, 2)
    ]
