"""Check whether a layout can run. Problems are found before any process starts and are reported with legal choices.

A reason has the form `key: problem; use A or B`, so that a message can point at the key in the spec. Only the first
violated rule is reported. Values that a reason lists as legal are legal with the other settings of the spec unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import ValidationError

from headway.launcher.base.errors import SpecError
from headway.launcher.spec.encoder_decoder import why_not_encoder_decoder
from headway.launcher.spec.speed import why_not_speed
from headway.model.cost import layer_configs
from headway.parallel.partition import stage_pieces

if TYPE_CHECKING:
    from headway.launcher.spec.sections import Sections
    from headway.model.base import AttentionConfig

LARGEST = 1024
"""Maximum number of ranks per dimension, as in `ParallelConfig`."""


def check_layout(spec: Sections) -> None:
    """Raise ValueError if `why_not` returns a reason."""
    reason = why_not(spec)
    if reason is not None:
        raise ValueError(reason)


def why_not(spec: Sections) -> str | None:
    """Reason why the processes cannot train the model in the layout of the spec; None if they can.

    The vocabulary is checked if the spec contains it. The check is cheap enough for a search over many layouts. Such a
    search copies a spec (`model_copy`), because a spec that violates a rule cannot be constructed.
    """
    rules = (
        why_not_encoder_decoder,
        _overlap,
        _stages,
        _zero,
        _tensor,
        _vocabulary,
        _sequence_parallel,
        _context,
        _world,
        _batch,
        why_not_speed,
    )
    return next((reason for rule in rules if (reason := rule(spec)) is not None), None)


def check_vocabulary(spec: Sections) -> None:
    """Raise SpecError if the vocabulary, if known, cannot be sharded over the tensor-parallel ranks.

    This is for a spec whose vocabulary was read from the data after the spec was constructed.
    """
    reason = _vocabulary(spec)
    if reason is not None:
        raise SpecError(reason)


def accumulation(spec: Sections) -> int:
    """Number of micro-batches of a data-parallel rank per step."""
    return spec.train.global_batch // (spec.train.micro_batch * spec.data_parallel)


def vocabulary(spec: Sections) -> int | None:
    """Number of rows of the embedding, if the spec contains it; sharded data has its own vocabulary size."""
    return spec.model.vocab_size or getattr(spec.data.source, "vocab_size", None)


def legal_tensor(spec: Sections) -> list[int]:
    """Tensor-parallel sizes over which every layer, and the vocabulary if known, can be sharded."""
    pieces = [shard.units for config in _layers(spec).values() for shard in config.shards().values()]
    return _divisors(math.gcd(spec.model.ffn_width, vocabulary(spec) or 0, *pieces))


def legal_pipeline(spec: Sections) -> list[int]:
    """Legal numbers of pipeline stages: each stage has at least one layer, with all that take heads from it; one stage
    only for ZeRO-2, ZeRO-3 and encoder-decoders.
    """
    alone = spec.parallel.zero > 1 or spec.model.is_encoder_decoder
    return [1] if alone else list(range(1, min(len(_pieces(spec)), LARGEST) + 1))


def legal_context(spec: Sections) -> list[int]:
    """Legal context-parallel sizes with the tensor-parallel size of the spec, which must be legal."""
    tensor, seq_len = spec.parallel.tensor, spec.data.seq_len
    if spec.model.relative or spec.model.is_encoder_decoder or _not_shared(spec):
        return [1]
    heads = {n for config in _layers(spec).values() for n in config.attended_heads(tensor=tensor)}
    parts = tensor if spec.parallel.sequence_parallel else 1
    dealt = [c for c in _divisors(seq_len) if all(_can_be_dealt(n, c) for n in heads)]
    return [c for c in dealt if seq_len // c % parts == 0]


def why_not_cuttable(spec: Sections, ranks: int) -> str | None:
    """Reason why the layers cannot be sharded over `ranks` tensor-parallel ranks; None if they can.

    The width of the residual stream need not be divisible: no matrix is sharded along it.
    """
    if ranks == 1:
        return None
    if spec.model.ffn_width % ranks:
        return f"model.ffn_width {spec.model.ffn_width} does not divide over {ranks} tensor-parallel ranks"
    layers = _layers(spec)
    for index, config in layers.items():
        where = f" in layer {index}" if len(layers) > 1 else ""
        for name, shard in config.shards().items():
            if shard.units % ranks:
                return f"attention.{name}{where} {_why_not_shared(config, shard.units, ranks)}"
    return None


def warnings(spec: Sections) -> list[str]:
    """Legal but wasteful settings in the layout of a legal spec, each as `key: text`."""
    parallel, launch, found = spec.parallel, spec.launch, []
    stages, passes = parallel.pipeline, accumulation(spec)
    if passes < stages:
        idle = (stages - 1) / (passes + stages - 1)
        found.append(
            f"parallel.pipeline: {passes} micro-batches a step in {stages} stages leave each stage idle for {idle:.0%} "
            f"of the time; use train.global_batch {stages * spec.train.micro_batch * spec.data_parallel} or more, or "
            "fewer stages"
        )
    inner = 1
    for key, what in (("tensor", "four times in each layer"), ("context", "in each layer's attention")):
        size = getattr(parallel, key)
        inner *= size
        if size > 1 and launch.processes % inner:
            found.append(
                f"parallel.{key}: ranks that exchange activations {what} lie on several hosts, as {inner} do not "
                f"divide the {launch.processes} processes of a host; use sizes whose product does, or parallel.pipeline"
            )
    return found


def micro_batches(spec: Sections) -> list[int]:
    """Legal values of train.micro_batch: divisors of the number of sequences of a data-parallel rank per step."""
    return _divisors(spec.train.global_batch // spec.data_parallel)


def listed(values: Iterable[int]) -> str:
    """Format values as `4`, `1 or 2`, `1, 2 or 4`, or `1 to 24`."""
    numbers = list(values)
    if len(numbers) > 3 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


# ---------------------------------------------------------------- the rules, in the order in which they are checked


def _overlap(spec: Sections) -> str | None:
    """The rule of `ParallelConfig`, which does not check the copies that a search makes."""
    reason = spec.parallel.why_no_overlap()
    return None if reason is None else f"parallel.{reason}"


def _stages(spec: Sections) -> str | None:
    stages, layers = spec.parallel.pipeline, spec.model.layers
    if stages == 1:
        return None
    if stages <= layers:
        together = _pieces(spec)
        if stages <= len(together):
            return None
        keys = dict.fromkeys(key for config in _each(spec) if (key := getattr(config, "across", None)) is not None)
        return (
            f"parallel.pipeline: {stages} stages for {len(together)} pieces of the model: layers that use values, or "
            f"keys and values, of an earlier layer ({', '.join(keys)}) lie in one stage with it; use parallel.pipeline "
            f"{listed(legal_pipeline(spec))}, or attention without {' and '.join(keys)}"
        )
    return (
        f"parallel.pipeline: {stages} stages for {layers} layers, and each needs one at least; "
        f"use parallel.pipeline {listed(legal_pipeline(spec))}, or model.layers {stages}"
    )


def _zero(spec: Sections) -> str | None:
    zero, stages = spec.parallel.zero, spec.parallel.pipeline
    if zero == 1 or stages == 1:
        return None
    return (
        f"parallel.zero: stage {zero} hands each gradient to its owner after every backward pass, where {stages} "
        "pipeline stages add up those of a step's micro-batches first; use parallel.zero 1, or parallel.pipeline 1"
    )


def _tensor(spec: Sections) -> str | None:
    ranks, width = spec.parallel.tensor, spec.model.ffn_width
    reason = why_not_cuttable(spec, ranks)
    if reason is None:
        return None
    other = f"model.ffn_width {_up(width, ranks)}" if width % ranks else _other_attention(spec, ranks)
    return f"parallel.tensor: {reason}; use parallel.tensor {listed(legal_tensor(spec))}, or {other}"


def _vocabulary(spec: Sections) -> str | None:
    ranks, size = spec.parallel.tensor, vocabulary(spec)
    if size is None or size % ranks == 0:
        return None
    return (
        f"parallel.tensor: a vocabulary of {size} does not divide over {ranks} tensor-parallel ranks; "
        f"use parallel.tensor {listed(legal_tensor(spec))}, or model.vocab_size {_up(size, ranks)} (it may be larger "
        "than that of the data)"
    )


def _sequence_parallel(spec: Sections) -> str | None:
    parallel, seq_len = spec.parallel, spec.data.seq_len
    if not parallel.sequence_parallel:
        return None
    if parallel.tensor == 1:
        more = [t for t in legal_tensor(spec) if t > 1 and seq_len % (parallel.context * t) == 0]
        other = f"parallel.tensor {listed(more)}" if more else "a model and data.seq_len that two ranks can share"
        return (
            "parallel.sequence_parallel: norms and residuals are shared by the tensor-parallel ranks, of which there "
            f"is one; use parallel.sequence_parallel false, or {other}"
        )
    parts = parallel.tensor * parallel.context
    if seq_len % parts:
        return (
            f"parallel.sequence_parallel: sequences of {seq_len} tokens do not divide into tensor x context = "
            f"{parallel.tensor} x {parallel.context} parts; use parallel.sequence_parallel false, or data.seq_len "
            f"{_multiples_near(seq_len, parts)}"
        )
    return None


def _context(spec: Sections) -> str | None:
    ranks, tensor, seq_len = spec.parallel.context, spec.parallel.tensor, spec.data.seq_len
    if ranks == 1:
        return None
    if spec.model.relative:
        return (
            f"parallel.context: {ranks} ranks share heads out, and model.positions relative_xl has position keys per "
            "head, which are not shared out with them; use parallel.context 1, or model.positions rope"
        )
    if (why := _not_shared(spec)) is not None:
        return (
            f"parallel.context: {why}; use parallel.context 1, or parallel.tensor or parallel.pipeline for the {ranks} "
            "ranks"
        )
    choices = f"use parallel.context {listed(legal_context(spec))}"
    if seq_len % ranks:
        near = _multiples_near(seq_len, ranks)
        return (
            f"parallel.context: sequences of {seq_len} tokens do not divide into {ranks} parts; {choices}, or "
            f"data.seq_len {near}"
        )
    layers = _layers(spec)
    for index, config in layers.items():
        for heads in config.attended_heads(tensor=tensor):
            if _can_be_dealt(heads, ranks):
                continue
            where = f" in layer {index}" if len(layers) > 1 else ""
            return (
                f"parallel.context: attention{where} has {heads} KV heads on each tensor-parallel rank, which {ranks} "
                f"ranks cannot share out for whole sequences (a single one would be gathered); {choices}, or "
                f"{_other_tensor(spec, ranks)}"
            )
    return None


def _world(spec: Sections) -> str | None:
    launch, parallel = spec.launch, spec.parallel
    world, ranks = launch.world_size, parallel.model_ranks
    if world % ranks == 0:
        return None
    legal = {"tensor": legal_tensor, "pipeline": legal_pipeline, "context": legal_context}
    key = max(legal, key=lambda name: getattr(parallel, name))
    others = ranks // getattr(parallel, key)
    fits = [n for n in legal[key](spec) if world % (others * n) == 0]
    smaller = f"parallel.{key} {listed(fits)}, or " if fits else ""
    return (
        f"parallel.{key}: tensor x pipeline x context = {parallel.tensor} x {parallel.pipeline} x {parallel.context} = "
        f"{ranks} ranks do not divide launch.hosts x launch.processes = {launch.hosts} x {launch.processes} = {world}; "
        f"use {smaller}launch.processes "
        f"{_multiples_near(launch.processes, ranks // math.gcd(launch.hosts, ranks))}"
    )


def _batch(spec: Sections) -> str | None:
    batch, micro_batch, ranks = spec.train.global_batch, spec.train.micro_batch, spec.data_parallel
    if batch % (micro_batch * ranks) == 0:
        return None
    fits = "" if batch % ranks else f", or train.micro_batch {listed(_divisors(batch // ranks))}"
    return (
        f"train.global_batch: {batch} sequences do not divide into micro_batch x data-parallel ranks = {micro_batch} x "
        f"{ranks}; use train.global_batch {_multiples_near(batch, micro_batch * ranks)}{fits}"
    )


# ---------------------------------------------------------------- helpers of the rules


def _each(spec: Sections) -> list[AttentionConfig]:
    # A rule based on the model size sets the number of experts per token, but neither pieces nor KV heads.
    return layer_configs(spec.model, spec.attention, vocab_size=vocabulary(spec) or 1)


def _pieces(spec: Sections) -> list[int]:
    return stage_pieces(_each(spec))


def _layers(spec: Sections) -> dict[int, AttentionConfig]:
    """Layer -> its mechanism, for layers whose mechanism differs from all earlier layers."""
    each = _each(spec)
    first: dict[int, int] = {}
    for index, config in enumerate(each):
        first.setdefault(id(config), index)
    return {index: each[index] for index in first.values()}


def _not_shared(spec: Sections) -> str | None:
    """Why context-parallel ranks cannot share sequences in some layer, whatever their number; None if they can."""
    reasons = (config.no_context_parallel for config in _layers(spec).values())
    return next((reason for reason in reasons if reason is not None), None)


def _can_be_dealt(heads: int, ranks: int) -> bool:
    """Whether context-parallel ranks can share these KV heads: equal shares, or copies of one head."""
    return heads == 1 or heads % ranks == 0


def _why_not_shared(config: AttentionConfig, pieces: int, ranks: int) -> str:
    if pieces > ranks:
        return f"has {pieces} whole pieces, which do not divide over {ranks} ranks"
    if pieces > 1:
        return f"has {pieces} whole pieces for {ranks} ranks, and KV heads are not copied"
    if getattr(config, "groups", None) == 1 or getattr(config, "kv_heads", None) == 1:
        return "is one whole piece, as there is one KV head, and KV heads are not copied"
    return (
        f"is one whole piece: in this {config.type} heads are chosen or move across KV heads, or KV heads differ "
        "without a pattern that ranks could repeat"
    )


def _other_attention(spec: Sections, ranks: int) -> str:
    """A change of the attention that allows sharding over `ranks` tensor-parallel ranks."""
    values = spec.attention.model_dump()
    if "kv_heads" in values:
        nearest = sorted(range(ranks, 16 * ranks + 1, ranks), key=lambda heads: abs(heads - values["kv_heads"]))
        for heads in nearest:
            try:
                changed = type(spec.attention).model_validate({**values, "kv_heads": heads})
            except ValidationError:
                continue
            if why_not_cuttable(spec.model_copy(update={"attention": changed}), ranks) is None:
                return f"attention.kv_heads {heads}"
    return f"an attention whose KV heads stand alone and are a multiple of {ranks} (gqa, rgqa, switchhead, ...)"


def _other_tensor(spec: Sections, context: int) -> str:
    """Tensor-parallel sizes that allow `context` context-parallel ranks."""

    def shared(tensor: int) -> bool:
        changed = spec.parallel.model_copy(update={"tensor": tensor})
        return context in legal_context(spec.model_copy(update={"parallel": changed}))

    fits = [t for t in legal_tensor(spec) if shared(t)]
    return f"parallel.tensor {listed(fits)}" if fits else f"KV heads that {context} divides"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, min(number, LARGEST) + 1) if number % n == 0]


def _up(number: int, of: int) -> int:
    """The next multiple of `of`."""
    return -(-number // of) * of


def _multiples_near(number: int, of: int) -> str:
    """The two multiples of `of` around a number that is not a multiple; the first two if the number is smaller."""
    below = max(number // of, 1)
    return listed([below * of, (below + 1) * of])
