"""Decoding step by step with a cache, alike for decoders and encoder-decoders.

A decoder reads the prompt, then new tokens. Of an encoder-decoder, the encoder reads the sources once; the decoder
reads the tokens that start a target, then new tokens, with the keys and values of the sources computed once per layer.

Legend: R rows, n tokens, s source tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from headway.model.decoder import DecoderCache
    from headway.model.seq2seq.build import Model
    from headway.model.seq2seq.model import SequenceCache

PREFILL_CHUNK = 512
"""Tokens of a decoder per forward pass. It limits the memory for a long prompt and does not change the result."""


class Steps:
    """Rows that are decoded together. Call its methods without gradients.

    sources: Of an encoder-decoder, the ids that the encoder reads of each row, at least one; None for a decoder.
    tokens: The most tokens that a row of the decoder will read.
    """

    def __init__(self, model: Model, sources: Sequence[Sequence[int]] | None, *, tokens: int) -> None:
        from headway.model.decoder import Decoder

        self.device = next(model.parameters()).device
        self._cache: DecoderCache | SequenceCache
        self._next: Callable[[torch.Tensor], torch.Tensor]
        if isinstance(model, Decoder):
            assert sources is None, "a decoder has no encoder"
            self._cache = cache = model.new_cache(tokens)
            self._next = lambda ids: model.logits(ids, cache=cache, last=True)
        else:
            assert sources is not None, "an encoder needs something to read"
            ids, segments = padded(sources)
            self._cache = across = model.new_cache(ids.to(self.device), segments, tokens=tokens)
            self._next = lambda ids: model.next_logits(ids, across)

    @property
    def tokens(self) -> int:
        """Tokens that each row of the decoder has read."""
        return self._cache.tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the cached keys, values and states, over layers and rows."""
        return self._cache.nbytes

    def read(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits [R, V] after the next tokens of each row, ids [R, n]."""
        import torch

        logits: torch.Tensor | None = None
        for chunk in torch.tensor(ids, device=self.device).split(PREFILL_CHUNK, 1):
            logits = self._next(chunk)[:, -1]
        assert logits is not None, "there is at least one token"
        return logits

    def select(self, rows: Sequence[int]) -> None:
        """Continue with these rows, in this order; a row may be named several times."""
        import torch

        self._cache.select(torch.tensor(rows, device=self.device))


def padded(sources: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(ids [R, s] with zeros after the shorter sources, their segments: 0, and -1 of padding), on the CPU.

    Sources of one length have no segments.
    """
    import torch

    lengths = torch.tensor([len(source) for source in sources])
    longest = int(lengths.max())
    ids = torch.tensor([[*source, *[0] * (longest - len(source))] for source in sources])
    if bool((lengths == longest).all()):
        return ids, None
    return ids, torch.where(torch.arange(longest) < lengths[:, None], 0, -1)
