"""All that is measured of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headway.launcher.base import console
from headway.launcher.exchange.opened import Opened
from headway.launcher.inspect.crossing import CrossHead, cross_heads
from headway.launcher.inspect.patterns import HALF, HeadScores, head_scores, pair_scores
from headway.launcher.inspect.places import Place, places_of
from headway.launcher.inspect.sample import Sample, repeated
from headway.launcher.inspect.specialise import Expert, experts_of
from headway.launcher.inspect.switched import Worth, switches, worths

REPEATED = 32
"""Sequences of random tokens."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """`places`: of each attention of the model. `heads`: of each; None where attention is not known. `cross`: heads of
    cross attention on the sample; of a decoder none. `likeness`: number of the attention -> `HeadDiversity` as a dict.
    `unit`: what the `sequences` are.
    """

    title: str
    identity: dict[str, Any]
    loss: float
    targets: int
    sequences: int
    unit: str
    places: Sequence[Place]
    heads: Sequence[HeadScores | None]
    worths: Sequence[Worth]
    experts: Sequence[Expert]
    cross: Sequence[CrossHead]
    likeness: dict[int, dict[str, Any]]


def inspect_model(model: Opened, sample: Sample) -> Inspection:
    """Measure a model on a sample."""
    with console.progress("heads switched off", len(switches(model, sample))) as shown:
        loss, found = worths(model, sample, lambda: shown.update(1))
    return Inspection(
        title=model.title,
        identity=model.identity,
        loss=loss,
        targets=sample.targets,
        sequences=len(sample.tokens),
        unit=sample.unit,
        places=places_of(model.model),
        heads=_scores(model),
        worths=found,
        experts=experts_of(model, sample),
        cross=cross_heads(model, sample) if model.is_encoder_decoder else [],
        likeness=_likeness(model, sample),
    )


def _scores(model: Opened) -> list[HeadScores | None]:
    """On random tokens, of the lengths that encoder and decoder read in training at most."""
    from headway.model.seq2seq.model import EncoderDecoder

    if not isinstance(model.model, EncoderDecoder):
        return head_scores(model, repeated(model, sequences=REPEATED, half=min(HALF, model.seq_len // 2)))
    limits = model.source_limit, model.target_limit
    halves = [max(1, min(HALF, limit // 2)) for limit in limits]
    source, target = (repeated(model, sequences=REPEATED, half=half, seed=i) for i, half in enumerate(halves))
    once = max(1, min(HALF, *limits))
    return pair_scores(model.model, source, target, repeated(model, sequences=REPEATED, half=once, seed=2)[:, :once])


def _likeness(model: Opened, sample: Sample) -> dict[int, dict[str, Any]]:
    import torch

    from headway.model.measure.diversity import measured

    with torch.no_grad(), measured(dict(enumerate(model.model.attention_layers()))) as found:
        sample.passes()[0].read(model.model)
    return {layer: asdict(one) for layer, one in found.items()}
