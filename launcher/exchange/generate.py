"""`headway generate`: continue a prompt with a run's newest checkpoint, token by token, with a KV cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.launcher.base import console
from headway.launcher.base.errors import SpecError
from headway.launcher.exchange.opened import open_model
from headway.launcher.run.codec import Codec

if TYPE_CHECKING:
    import torch

    from headway.model.decoder import Decoder

PREFILL_CHUNK = 512
"""Prompt tokens per forward pass. It limits the memory for a long prompt and does not change the result."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is selected.

    `temperature` 0: always the most likely token. `top_p`: sample from the smallest set of tokens with this total
    probability. `seed`: equal seeds give equal samples.
    """

    tokens: int
    temperature: float
    top_p: float
    seed: int

    def check(self) -> None:
        """Raises SpecError if a value is out of range."""
        if self.tokens < 1:
            raise SpecError(f"--tokens: {self.tokens} is too small; use at least 1, such as --tokens 100")
        if self.temperature != 0 and not 1e-3 <= self.temperature <= 100:
            raise SpecError(
                f"--temperature: {self.temperature} is out of range; use 0 (the most likely token) or 0.001 to 100, "
                "such as 0.8"
            )
        if not 0 < self.top_p <= 1:
            raise SpecError(f"--top-p: {self.top_p} is out of range; use more than 0 and at most 1, such as 0.95")


def generate(path: Path, prompt: str, sampling: Sampling) -> int:
    """Print the prompt and its continuation to stdout, and times and cache size to stderr.

    `path`: a run, a folder of exported or imported weights, also in Hugging Face's format. For a model of
    synthetic data, prompt and output are token ids. Raises NoInputError if `path` is none of these, CheckpointError if
    the run has no complete checkpoint of its own, WeightsError if the folder is incomplete, DataError if the tokenizer
    is missing or differs.
    """
    sampling.check()
    opened = open_model(path)
    model, codec, seq_len = opened.decoder, opened.codec, opened.seq_len
    ids = codec.encode(prompt)
    known = opened.positions
    if known is not None and len(ids) + sampling.tokens - 1 > known:  # the last new token is not fed back
        raise SpecError(
            f"--tokens: {len(ids)} prompt tokens and {sampling.tokens} new tokens are more than the {known} positions "
            f"of this model (model.positions learned); use "
            + (f"--tokens {known + 1 - len(ids)} at most" if len(ids) <= known else "a shorter prompt")
        )
    if len(ids) + sampling.tokens > seq_len:
        console.note(
            f"note: {len(ids)} prompt tokens and {sampling.tokens} new tokens are more than the {seq_len} tokens per "
            "sequence of the training; the text may degrade beyond that length"
        )
    console.note(f"{opened.title}, {len(ids)} prompt tokens")
    printer = _Printer(codec)
    printer.put(ids)
    stats: dict[str, Any] = {}
    for token in continuation(model, ids, sampling, eos_id=codec.eos_id, stats=stats):
        printer.put([token])
    printer.close()
    new = stats["new_tokens"]
    decode_s = stats["decode_s"]
    console.note(
        f"prefill {len(ids)} tokens in {1e3 * stats['prefill_s']:.0f} ms; {new} new tokens"
        + (f", {(new - 1) / decode_s:,.0f} per second" if new > 1 and decode_s > 0 else "")
        + f"; KV cache {stats['cache_bytes'] / 1024:,.1f} KiB for {stats['cached_tokens']} tokens"
    )
    return 0


def continuation(
    model: Decoder, ids: list[int], sampling: Sampling, *, eos_id: int | None, stats: dict[str, Any]
) -> Iterator[int]:
    """Yield new token ids until `sampling.tokens` or the end of the document. Updates `stats` with times and sizes."""
    import torch

    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(sampling.seed)
    cache = model.new_cache(len(ids) + sampling.tokens - 1)  # the last new token is not fed back

    def logits_of(tokens: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():  # not around `yield`: the caller's code would run in it too
            return model.logits(tokens, cache=cache, last=True)[0, -1]

    t0 = time.perf_counter()
    logits = None
    for chunk in torch.tensor([ids], device=device).split(PREFILL_CHUNK, 1):
        logits = logits_of(chunk)
    assert logits is not None
    stats |= {"prefill_s": time.perf_counter() - t0, "new_tokens": 0, "decode_s": 0.0}
    element = next(model.parameters()).element_size()
    t0 = time.perf_counter()
    for i in range(sampling.tokens):
        token = _choose(logits, sampling, generator)
        stats |= {"new_tokens": i + 1, "decode_s": time.perf_counter() - t0}
        stats |= {"cache_bytes": cache.numbers * element, "cached_tokens": cache.tokens}
        if token == eos_id:
            return
        yield token
        if i + 1 < sampling.tokens:
            logits = logits_of(torch.tensor([[token]], device=device))


def _choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token id from logits [V]."""
    import torch

    if sampling.temperature == 0:
        return int(logits.argmax())
    p, order = torch.softmax(logits.float() / sampling.temperature, -1).sort(descending=True)
    p = torch.where(p.cumsum(-1) - p < sampling.top_p, p, 0.0)  # includes the token that crosses top_p
    return int(order[torch.multinomial(p, 1, generator=generator)])


class _Printer:
    """Prints text as soon as its last character is complete. One character may be split over several tokens."""

    def __init__(self, codec: Codec) -> None:
        from headway.data.tokenizer import StreamDecoder

        self._stream = StreamDecoder(codec.decode)

    def put(self, ids: list[int]) -> None:
        print(self._stream.put(ids), end="", flush=True)

    def close(self) -> None:
        print(self._stream.close(), flush=True)
