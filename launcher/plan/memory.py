"""Memory of one rank, by part: computed, and tested against allocations of real engines and passes.

What DeepSpeed's ZeRO engines hold per parameter of the rank (D: ranks over which gradients are averaged; read in
DeepSpeed 0.19 and measured):

                  parameters  master   moments  gradients       while gradients are exchanged
    fp32  ZeRO-1  4           4/D      8/D      4               4: the bucket is put together in a copy
    fp32  ZeRO-2  4           4/D      8/D      4/D             4, and a bucket of fixed size
    fp32  ZeRO-3  4/D         4/D      8/D      4/D             4, a bucket of fixed size, gathered parameters
    bf16  ZeRO-1  2           4/D      8/D      4 fp32, 2 bf16  2, and 4 where all fit into one bucket
    bf16  ZeRO-2  2           4/D      8/D      4/D             2, and a bucket of fixed size
    bf16  ZeRO-3  2/D         4/D      8/D      4/D             2 or 6, a bucket of fixed size, gathered parameters

The copies are of what is in one bucket at most. "2 or 6": both were measured, from run to run; the larger is counted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from headway.kernels.loss import CHUNK_ELEMENTS_ACCELERATOR, CHUNK_ELEMENTS_CPU
from headway.launcher.plan.stages import Grid, Stage

BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size, which Headway leaves at its default."""

LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance: nearer to their next use, parameters stay."""


@dataclass(frozen=True, kw_only=True)
class States:
    """What exists whether or not a pass runs, and gradients; bytes of one rank."""

    parameters: float
    master: float
    moments: float
    gradients: float
    late: float  # of them, those that one micro-batch a step forms in its backward pass and that are gone before it
    bucket: float  # of fixed size, for the exchange of gradients
    exchange: float  # copies made while gradients are exchanged
    gathered: float  # ZeRO-3: parameters of other ranks


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank, by part. Not all parts are there at the same time: `peak` is less than their sum."""

    parameters: float
    master: float
    moments: float
    gradients: float
    late_gradients: float  # of the gradients, those that are not there during the forward pass
    bucket: float
    gathered: float
    activations: float  # all blocks, micro-batches in flight; between stages; norm before the head
    routing: float  # routers' choices under recomputation
    mask: float  # which token sees which: one [S, S] per sequence of the micro-batch
    logits: float  # chunk of logits, gradients of head and hidden states
    recomputed: float  # what the block, or its norms and SwiGLU's product, keep that is computed again
    backward: float  # gradients inside the block whose backward pass runs
    exchange: float

    @property
    def passes(self) -> float:
        """What forward and backward passes add at their fullest: in the loss, or in the backward pass of a block."""
        return self.activations + self.routing + self.mask + max(self.logits, self.recomputed + self.backward)

    def peak_with(self, passes: float) -> float:
        """The larger of the passes' fullest moment, were they to add `passes`, and the exchange of gradients."""
        held = self.parameters + self.master + self.moments + self.gradients + self.bucket + self.gathered
        return held + max(passes - self.late_gradients, self.exchange)

    @property
    def peak(self) -> float:
        """At the fullest moment of a step."""
        return self.peak_with(self.passes)

    def by_part(self) -> dict[str, float]:
        return asdict(self)


def states(grid: Grid, stage: Stage) -> States:
    """Of the parameters, gradients and optimizer of one stage."""
    parallel, n, ranks = grid.spec.parallel, float(stage.num_params), grid.data_ranks
    width = grid.element_bytes
    bf16, zero = parallel.precision == "bf16", parallel.zero
    in_bucket = min(n, BUCKET_ELEMENTS)
    gradients = 4 * n if zero == 1 else 4 * n / ranks
    late = 0.0 if zero == 3 else gradients
    if bf16 and zero == 1:
        gradients, late = 6 * n, 2 * n
    if zero == 1:
        # The bf16 optimizer keeps all matrices' gradients in one tensor; beyond a bucket's size it goes out as it is.
        exchange = (2 * n + (4 * n if n <= BUCKET_ELEMENTS else 0)) if bf16 else 4 * in_bucket
    else:
        exchange = width * in_bucket + (4 * in_bucket if bf16 and zero == 3 else 0)
    return States(
        parameters=width * n / (ranks if zero == 3 else 1),
        master=4 * n / ranks,
        moments=8 * n / ranks,
        gradients=gradients,
        late=late if grid.accumulation == 1 else 0.0,
        bucket=0.0 if zero == 1 else float(width * BUCKET_ELEMENTS),
        exchange=exchange,
        gathered=width * min(n, LIVE_ELEMENTS) if zero == 3 and ranks > 1 else 0.0,
    )


def memory(grid: Grid, stage: Stage) -> Memory:
    """Of a rank of one stage, at its fullest."""
    spec, held = grid.spec, states(grid, stage)
    row = grid.element_bytes * spec.model.width  # bytes of one token's residual stream
    prints = [grid.footprint(block) for block in stage.blocks]
    kept = [footprint.kept(grid.tokens) for footprint in prints]
    between = grid.residual_tokens * row
    routing = largest = 0.0
    if spec.parallel.recompute == "block":
        blocks, largest = between * len(prints), max(kept)
        routing = grid.in_flight(stage) * grid.tokens * sum(footprint.routing_per_token for footprint in prints)
    else:
        blocks, largest = sum(kept), max(grid.dropped(block) for block in stage.blocks)
    if spec.parallel.pipeline > 1:
        blocks += between  # what went to the next stage stays until its gradient is back
    activations = grid.in_flight(stage) * blocks
    if stage.last:
        activations += between + grid.tokens * row  # the norm's input and its output
    return Memory(
        parameters=held.parameters,
        master=held.master,
        moments=held.moments,
        gradients=held.gradients,
        late_gradients=held.late,
        bucket=held.bucket,
        gathered=held.gathered,
        activations=activations,
        routing=routing,
        mask=_mask(grid),
        logits=_logits(grid) if stage.last else 0.0,
        recomputed=largest,
        # Each kept tensor's gradient is formed once, and few are there at a time: half of them at most. What is
        # gathered from parts of the sequence comes in the order of the ranks, and is copied into that of the tokens.
        backward=max(kept) / 2 + 2 * grid.tokens * row * spec.parallel.sequence_parallel,
        exchange=held.exchange,
    )


def _mask(grid: Grid) -> float:
    """The additive mask, and while it is made two of bool."""
    spec = grid.spec
    return float(spec.train.micro_batch * spec.data.seq_len**2 * (grid.element_bytes + 1)) * spec.data.document_mask


def _logits(grid: Grid) -> float:
    """The larger of what the loss holds while it goes through the chunks, and what its backward pass does.

    Per logit of a chunk: in fp32 the logits and their softmax, and where they are bf16 the gradient in bf16. Where all
    tokens fit into one chunk of the whole vocabulary the loss is PyTorch's own, with one fp32 more for its gradient.
    """
    width, tokens, rows = grid.element_bytes, grid.tokens, grid.vocab_rows
    size = CHUNK_ELEMENTS_CPU if grid.sharing.device == "cpu" else CHUNK_ELEMENTS_ACCELERATOR
    chunk = min(tokens, max(1, size // rows))
    weight = rows * grid.spec.model.width
    if chunk == tokens and grid.spec.parallel.tensor == 1:
        return 12.0 * tokens * rows
    hidden = 2 * tokens * grid.spec.model.width * width
    product = 0 if width == 4 else 2 * weight  # one chunk's part of the head's gradient, before it is added up
    return hidden + 4.0 * weight + max(8.0 * chunk * rows + product, (4.0 + width) * weight)


def worst(grid: Grid) -> tuple[Stage, Memory]:
    """The stage whose ranks hold most, and what they hold."""
    return max(((stage, memory(grid, stage)) for stage in grid.stages), key=lambda pair: pair[1].peak)
