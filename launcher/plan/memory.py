"""Memory of one rank, by part: computed, and tested against allocations of real engines and passes.

Bytes that the engines hold per parameter of the rank (D: ranks over which gradients are averaged; source: code of
DeepSpeed 0.19 and measurements). "single" is Headway's engine for one process, the others are DeepSpeed's:

                  parameters  master   moments  gradients       while gradients are exchanged
    fp32  single  4           0        8        4               0, and a buffer of at most 8 MiB on a CPU
    bf16  single  2           4        8        4 fp32          0
    fp32  ZeRO-1  4           4/D      8/D      4               4: gradients are copied into the bucket
    fp32  ZeRO-2  4           4/D      8/D      4/D             4, and a bucket of fixed size
    fp32  ZeRO-3  4/D         4/D      8/D      4/D             4, a bucket of fixed size, gathered parameters
    bf16  ZeRO-1  2           4/D      8/D      4 fp32, 2 bf16  2, and 4 if all fit into one bucket
    bf16  ZeRO-2  2           4/D      8/D      4/D             2, 4 for fp32 copies, and a bucket of fixed size
    bf16  ZeRO-3  2/D         4/D      8/D      4/D             2 or 6, a bucket of fixed size, gathered parameters

bf16 is listed with `parallel.gradient_reduction: fp32`, under which the bucket of ZeRO-3 is in fp32 too. At most one
bucket is copied at a time. "2 or 6": repeated measurements gave both values; the larger is counted. If exchanges
overlap with the passes, buckets are smaller, and ZeRO-1 and 2 have two of them.

With one micro-batch per step, the gradients of the single engine exist only from the backward pass to the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from headway.kernels.documents import BLOCK, MERGED
from headway.kernels.loss import CHUNK_ELEMENTS_ACCELERATOR, CHUNK_ELEMENTS_CPU
from headway.kernels.relative import ROWS
from headway.launcher.plan.stages import Grid, Stage
from headway.parallel.deepspeed_options import bucket_elements
from headway.parallel.single_engine import NORM_BLOCK

BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default reduce_bucket_size, which Headway uses unless exchanges overlap with the passes."""

LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance.

Gathered parameters stay in memory if their next use is within this distance.
"""


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes of one rank for model and optimizer states, gradients, and their exchange."""

    parameters: float
    master: float
    moments: float
    gradients: float
    late: float  # part of `gradients` that exists only from the backward pass on, with one micro-batch per step
    bucket: float  # buffer of fixed size for the exchange of gradients
    exchange: float  # copies made while gradients are exchanged
    gathered: float  # ZeRO-3: parameters of other ranks


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank, by part. Not all parts exist at the same time, so `peak` is less than their sum."""

    parameters: float
    master: float
    moments: float
    gradients: float
    late_gradients: float  # part of `gradients` that does not exist during the forward pass
    bucket: float
    gathered: float
    activations: float  # of all blocks for the micro-batches in flight; sent between stages
    routing: float  # choices of the routers, kept under recomputation
    mask: float  # document masks, per micro-batch in flight: one [S, S] per short sequence, else small ones
    logits: float  # norm before the head, chunk of logits, gradients of head and hidden states
    recomputed: float  # recomputed activations of one block, or of its norms and SwiGLU product
    backward: float  # gradients inside the block whose backward pass runs
    exchange: float

    @property
    def passes(self) -> float:
        """Peak of what the passes add to the states, reached in the loss or in the backward pass of a block."""
        return self.activations + self.routing + self.mask + max(self.logits, self.recomputed + self.backward)

    def peak_with(self, passes: float) -> float:
        """Peak memory if the passes add `passes` bytes: the larger of their peak and that of the gradient exchange."""
        held = self.parameters + self.master + self.moments + self.gradients + self.bucket + self.gathered
        return held + max(passes - self.late_gradients, self.exchange)

    @property
    def peak(self) -> float:
        """Peak memory of a step."""
        return self.peak_with(self.passes)

    def by_part(self) -> dict[str, float]:
        return asdict(self)


def states(grid: Grid, stage: Stage) -> States:
    """Memory of the parameters, gradients and optimizer states of one stage."""
    if grid.single:
        return _single_states(grid, stage)
    parallel, n, ranks = grid.spec.parallel, float(stage.num_params), grid.data_ranks
    width = grid.element_bytes
    bf16, zero = parallel.precision == "bf16", parallel.zero
    bucket = bucket_elements(stage.largest) if grid.overlaps else BUCKET_ELEMENTS
    in_bucket = min(n, bucket)
    gradients = 4 * n if zero == 1 else 4 * n / ranks
    late = 0.0 if zero == 3 else gradients
    if bf16 and zero == 1:
        gradients, late = 6 * n, 2 * n
    if zero == 1:
        # The bf16 optimizer keeps the gradients of all matrices in one tensor. If the tensor is larger than a bucket,
        # it is reduced without a copy.
        exchange = (2 * n + (4 * n if n <= BUCKET_ELEMENTS else 0)) if bf16 else 4 * in_bucket
    else:
        widened = zero == 2 and bf16 and parallel.gradient_reduction == "fp32"
        exchange = width * in_bucket + (4 * in_bucket if widened or (bf16 and zero == 3) else 0)
    reduced = 4 if zero == 3 and parallel.gradient_reduction == "fp32" else width
    buffers = 2 if grid.overlaps and zero < 3 else int(zero > 1)
    return States(
        parameters=width * n / (ranks if zero == 3 else 1),
        master=4 * n / ranks,
        moments=8 * n / ranks,
        gradients=gradients,
        late=late if grid.accumulation == 1 else 0.0,
        bucket=float(buffers * reduced * bucket),
        exchange=exchange,
        gathered=width * min(n, LIVE_ELEMENTS) if zero == 3 and ranks > 1 else 0.0,
    )


def _single_states(grid: Grid, stage: Stage) -> States:
    """Memory of the states of Headway's engine for one process."""
    n, bf16 = float(stage.num_params), grid.element_bytes == 2
    buffer = 8.0 * min(stage.largest, NORM_BLOCK) if grid.sharing.device == "cpu" and not bf16 else 0.0
    return States(
        parameters=grid.element_bytes * n,
        master=4 * n if bf16 else 0.0,
        moments=8 * n,
        gradients=4 * n,
        late=4 * n if grid.accumulation == 1 else 0.0,
        bucket=0.0,
        exchange=buffer,
        gathered=0.0,
    )


def memory(grid: Grid, stage: Stage) -> Memory:
    """Memory of a rank of one stage."""
    spec, held = grid.spec, states(grid, stage)
    row = grid.element_bytes * spec.model.width  # bytes of one token's residual stream
    prints = [grid.footprint(block) for block in stage.heaviest]
    kept = [footprint.kept(grid.tokens) for footprint in prints]
    between = grid.residual_tokens * row
    routing = largest = 0.0
    if spec.parallel.recompute == "block":
        handed = grid.tokens * sum(footprint.handed_per_token for footprint in prints)
        blocks, largest = between * len(prints) + handed, max(kept) - between  # its input is kept in any case
        held_by = [between] * len(kept)
        routing = grid.in_flight(stage) * grid.tokens * sum(footprint.routing_per_token for footprint in prints)
    else:
        blocks, largest = sum(kept), max(grid.dropped(block) for block in stage.heaviest)
        held_by = kept
    if spec.parallel.pipeline > 1:
        blocks += between  # the tensor sent to the next stage is kept until its gradient arrives
    activations = grid.in_flight(stage) * blocks
    activations += grid.in_flight(stage) * _masks_of_dropout(grid, stage)
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
        mask=_mask(grid, stage),
        # With the input and the output of the norm before the head. All are released before the last block's backward.
        logits=_logits(grid) + between + grid.tokens * row if stage.last else 0.0,
        recomputed=largest,
        # Each kept tensor's gradient is computed once, and at most half of them exist at the same time. Under sequence
        # parallelism, gathered tensors are in the order of the ranks and are copied into the order of the tokens.
        backward=max(
            max(max(kept) / 2, _cores(grid, stage, kept, held_by))
            + 2 * grid.tokens * row * spec.parallel.sequence_parallel
            + _scores(grid),
            _numbers(grid),
        ),
        exchange=held.exchange,
    )


def _scores(grid: Grid) -> float:
    """Scores of a block of query rows with relative positions, an upper bound: eight fp32 values for each score.

    Without relative positions, the kernels of the attention core keep scores to themselves.
    """
    spec, heads = grid.spec, max(block.score_maps for stage in grid.stages for block in stage.heaviest)
    if not spec.model.relative:
        return 0.0
    length = spec.data.seq_len
    return 32.0 * spec.train.micro_batch * heads / spec.parallel.tensor * min(ROWS, length) * length


def _cores(grid: Grid, stage: Stage, kept: Sequence[float], held: Sequence[float]) -> float:
    """The most that the backward pass of a block's core computes again, beyond what is released by then: about half of
    the block's own tensors `kept`, and the tensors `held` of the blocks behind it. Tensor-parallel ranks share heads.
    """
    spec, most, released = grid.spec, 0.0, 0.0
    for block, own, after in zip(reversed(stage.heaviest), reversed(kept), reversed(held), strict=True):
        core = block.recomputed_core_bytes(seq_len=spec.data.seq_len) * spec.train.micro_batch / spec.parallel.tensor
        most = max(most, core - own / 2 - released)
        released += after
    return most


def _masks_of_dropout(grid: Grid, stage: Stage) -> float:
    """Masks that dropout keeps outside of blocks, one byte for each element; those of blocks are in their footprint."""
    model = grid.spec.model
    if not model.dropout:
        return 0.0
    at_ends = ("embedding" in model.dropout_places and stage.first) + ("head" in model.dropout_places and stage.last)
    return float(at_ends * grid.residual_tokens * model.width)


def _numbers(grid: Grid) -> float:
    """Random numbers while the largest mask of dropout is made: 4 bytes for each element, and a copy of them.

    They exist in the forward pass, at the end of which the gradients of a block do not exist yet.
    """
    model = grid.spec.model
    if not model.dropout:
        return 0.0
    hidden = grid.tokens * model.ffn_width / grid.spec.parallel.tensor if "hidden" in model.dropout_places else 0.0
    return 8.0 * max(hidden, grid.residual_tokens * model.width)


def _mask(grid: Grid, stage: Stage) -> float:
    """Masks of documents that layers share, an upper bound. None with a kernel for variable lengths (bf16 on a GPU),
    and none of layers that attend by a core of their own or have no softmax.

    Short sequences: the additive mask, and a boolean one that exists while it is built. Longer ones: the masks of calls
    that short documents share, if all documents are short. Each micro-batch in flight has masks of its own. What a
    window adds to them is kept by each layer, and is part of its footprint.
    """
    spec, width = grid.spec, grid.element_bytes
    if spec.model.relative or not spec.data.document_mask or (grid.sharing.device == "cuda" and grid.sharing.bf16):
        return 0.0
    if not any(block.attended_heads() and not block.own_core for block in stage.blocks):
        return 0.0
    length, passes = spec.data.seq_len, grid.in_flight(stage)
    per_row = length * (passes * width + 1) if length <= BLOCK else passes * MERGED * width
    return float(spec.train.micro_batch * length * per_row)


def _logits(grid: Grid) -> float:
    """Memory of the loss: the larger of its forward pass over the chunks and its backward pass.

    Per logit of a chunk: the logits and their softmax in fp32, and for bf16 logits the gradient in bf16. If all tokens
    fit into one chunk of the whole vocabulary, PyTorch's own loss is used, with one more fp32 value for its gradient.
    """
    width, tokens, rows = grid.element_bytes, grid.tokens, grid.vocab_rows
    size = CHUNK_ELEMENTS_CPU if grid.sharing.device == "cpu" else CHUNK_ELEMENTS_ACCELERATOR
    chunk = min(tokens, max(1, size // rows))
    weight = rows * grid.spec.model.width
    if chunk == tokens and grid.spec.parallel.tensor == 1:
        return 12.0 * tokens * rows
    hidden = 2 * tokens * grid.spec.model.width * width
    product = 0 if width == 4 else 2 * weight  # the head's gradient from one chunk, before it is accumulated
    return hidden + 4.0 * weight + max(8.0 * chunk * rows + product, (4.0 + width) * weight)


def worst(grid: Grid) -> tuple[Stage, Memory]:
    """The stage with the highest peak memory per rank, and that memory."""
    return max(((stage, memory(grid, stage)) for stage in grid.stages), key=lambda pair: pair[1].peak)
