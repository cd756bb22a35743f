"""All that is measured of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headway.launcher.base import console
from headway.launcher.exchange.opened import Opened
from headway.launcher.inspect.patterns import HALF, HeadScores, head_scores
from headway.launcher.inspect.sample import Sample, repeated
from headway.launcher.inspect.specialise import Expert, experts_of
from headway.launcher.inspect.switched import Worth, switches, worths

REPEATED = 32
"""Sequences of random tokens."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """`heads`: of each layer; None where attention is not known. `likeness`: layer -> `HeadDiversity` as a dict."""

    title: str
    identity: dict[str, Any]
    loss: float
    targets: int
    sequences: int
    heads: Sequence[HeadScores | None]
    worths: Sequence[Worth]
    experts: Sequence[Expert]
    likeness: dict[int, dict[str, Any]]


def inspect_model(model: Opened, sample: Sample) -> Inspection:
    """Measure a model on a sample."""
    half = min(HALF, model.seq_len // 2)
    with console.progress("heads switched off", len(switches(model, sample))) as shown:
        loss, found = worths(model, sample, lambda: shown.update(1))
    return Inspection(
        title=model.title,
        identity=model.identity,
        loss=loss,
        targets=sample.targets,
        sequences=len(sample.tokens),
        heads=head_scores(model, repeated(model, sequences=REPEATED, half=half)),
        worths=found,
        experts=experts_of(model, sample),
        likeness=_likeness(model, sample),
    )


def _likeness(model: Opened, sample: Sample) -> dict[int, dict[str, Any]]:
    import torch

    from headway.model.measure.diversity import measured

    part, decoder = sample.passes()[0], model.decoder
    with torch.no_grad(), measured(dict(enumerate(decoder.attention_layers()))) as found:
        decoder.hidden(part.tokens.to(decoder.embedding.device), part.segments)
    return {layer: asdict(one) for layer, one in found.items()}
