"""Which attention of a model is meant: a layer of a decoder, or of one of the attentions of an encoder-decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from headway.model.seq2seq.build import Model

STACKS = {
    "encoder": "the encoder's self-attention",
    "decoder": "the decoder's self-attention",
    "cross": "cross attention",
}
"""The attentions of an encoder-decoder, by their names in tables and JSON."""


class Place(NamedTuple):
    """`layer` of a stack, from 0; `stack` is one of `STACKS`, or empty in a decoder."""

    stack: str
    layer: int

    @property
    def title(self) -> str:
        return f"{self.stack} {self.layer}".strip()

    @property
    def keys(self) -> dict[str, Any]:
        """For JSON."""
        return {"attention": self.stack, "layer": self.layer} if self.stack else {"layer": self.layer}


def places_of(model: Model) -> list[Place]:
    """The place of each of `attention_layers()`."""
    from headway.model.decoder import Decoder

    if isinstance(model, Decoder):
        return [Place("", layer) for layer, _ in enumerate(model.attention_layers())]
    encoder = [Place("encoder", layer) for layer, _ in enumerate(model.encoder)]
    return encoder + [Place(stack, layer) for layer, _ in enumerate(model.blocks) for stack in ("decoder", "cross")]
