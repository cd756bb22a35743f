"""How a layout splits a model: ranks, stages, and their parameters and work.

Legend: n tokens that a rank's attention sees in a forward pass, P stages, m micro-batches per step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from headway.launcher.spec.layouts import accumulation, vocabulary
from headway.model.activations import BlockParameters, Footprint, Sharing, block_parameters, footprint
from headway.model.base import AttentionConfig
from headway.model.cost import heaviest, layer_configs
from headway.parallel.partition import layer_costs, stage_bounds, stage_pieces

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pipeline stage on one rank; the whole model if there is no pipeline."""

    index: int
    blocks: tuple[AttentionConfig, ...]
    parameters: dict[str, int]  # numbers on one rank, by part: embedding, attention, mlp, norm, head
    replicated: int  # attention and MLP parameters that every tensor parallel rank holds in full
    first: bool
    last: bool

    @property
    def heaviest(self) -> tuple[AttentionConfig, ...]:
        """The blocks in the stage of their schedules that needs the most memory."""
        return tuple(heaviest(block) for block in self.blocks)

    @property
    def num_params(self) -> int:
        return sum(self.parameters.values())

    @property
    def largest(self) -> int:
        """Elements of the largest parameter: rows of the vocabulary, or one of an MLP's three matrices."""
        whole = max(self.parameters["embedding"], self.parameters["head"])
        return max(whole, self.parameters["mlp"] // (3 * max(1, len(self.blocks))))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Sizes of a spec's layout and batch."""

    spec: Spec
    vocab_size: int
    stages: tuple[Stage, ...]

    @property
    def data_parallel(self) -> int:
        return self.spec.data_parallel

    @property
    def data_ranks(self) -> int:
        """Ranks that hold the same parameters: data and context parallel."""
        return self.data_parallel * self.spec.parallel.context

    @property
    def accumulation(self) -> int:
        return accumulation(self.spec)

    @property
    def tokens(self) -> int:
        """n: tokens of a micro-batch on one rank."""
        return self.spec.train.micro_batch * self.spec.data.seq_len // self.spec.parallel.context

    @property
    def residual_tokens(self) -> int:
        """Tokens whose residual stream the rank keeps between layers."""
        parallel = self.spec.parallel
        return self.tokens // (parallel.tensor if parallel.sequence_parallel else 1)

    @property
    def element_bytes(self) -> int:
        return 2 if self.spec.parallel.precision == "bf16" else 4

    @property
    def vocab_rows(self) -> int:
        return self.vocab_size // self.spec.parallel.tensor

    def in_flight(self, stage: Stage) -> int:
        """Micro-batches whose activations stage p keeps at once.

        Under 1F1B it starts P - p forward passes before its first backward pass ends.
        """
        return min(self.spec.parallel.pipeline - stage.index, self.accumulation)

    def footprint(self, block: AttentionConfig) -> Footprint:
        return footprint(self.spec.model, block, self.sharing)

    def dropped(self, block: AttentionConfig) -> float:
        """Bytes of activations that the block recomputes instead of keeping, under selective recomputation."""
        everything = footprint(self.spec.model, block, replace(self.sharing, selective=False))
        return everything.kept(self.tokens) - self.footprint(block).kept(self.tokens)

    @property
    def single(self) -> bool:
        """Whether Headway's own engine trains, which is for one process, and not DeepSpeed's."""
        return self.spec.parallel.is_single(self.spec.launch.world_size)

    @property
    def overlaps(self) -> bool:
        """Whether the exchange of gradients, and under ZeRO-3 of parameters, overlaps with the passes."""
        return self.spec.parallel.overlaps(device=self.sharing.device, data_ranks=self.data_ranks)

    @property
    def sharing(self) -> Sharing:
        parallel, data = self.spec.parallel, self.spec.data
        return Sharing(
            tensor=parallel.tensor,
            context=parallel.context,
            sequence_parallel=parallel.sequence_parallel,
            bf16=parallel.precision == "bf16",
            device="cpu" if self.spec.launch.device == "cpu" else "cuda",
            masked=data.document_mask,
            selective=parallel.recompute == "selective",
            seq_len=data.seq_len,
        )


def grid_of(spec: Spec) -> Grid:
    """The grid of a legal spec whose vocabulary size is set."""
    vocab_size = vocabulary(spec)
    assert vocab_size is not None, "the vocabulary is filled in before a plan is made"
    model, parallel = spec.model, spec.parallel
    each = layer_configs(model, spec.attention, vocab_size=vocab_size)
    held = [block_parameters(model, config, tensor=parallel.tensor) for config in each]
    bounds = [0, len(each) + 3]
    if parallel.pipeline > 1:
        bounds = stage_bounds(layer_costs_of(spec, vocab_size), parallel.pipeline, stage_pieces(each))
    rows = vocab_size // parallel.tensor * model.width
    stages = []
    for p in range(parallel.pipeline):
        first, last = p == 0, p == parallel.pipeline - 1
        start, end = max(bounds[p] - 1, 0), min(bounds[p + 1] - 1, len(each))
        parts = _sum_parts(held[start:end])
        parts["norm"] += model.norm_params if last else 0
        # With tied embeddings the last stage has a copy of the embedding, unless it is also the first stage.
        head = last and not (model.tied_embeddings and first)
        positions = model.learned_positions * model.width
        bias = vocab_size // parallel.tensor if model.head_bias and last else 0
        parts = {"embedding": rows + positions if first else 0, **parts, "head": (rows if head else 0) + bias}
        replicated = sum(block.replicated for block in held[start:end])
        stages.append(
            Stage(
                index=p,
                blocks=tuple(each[start:end]),
                parameters=parts,
                replicated=replicated,
                first=first,
                last=last,
            )
        )
    return Grid(spec=spec, vocab_size=vocab_size, stages=tuple(stages))


def layer_costs_of(spec: Spec, vocab_size: int) -> list[float]:
    """Training FLOPs per token of [embedding, each block, norm, head], summed over all tensor parallel ranks."""
    return layer_costs(
        spec.model,
        spec.attention,
        vocab_size=vocab_size,
        seq_len=spec.data.seq_len,
        recompute=spec.parallel.recompute == "block",
    )


def _sum_parts(blocks: list[BlockParameters]) -> dict[str, int]:
    return {part: sum(block.by_part[part] for block in blocks) for part in ("attention", "mlp", "norm")}
