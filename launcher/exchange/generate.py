"""`headway generate`: continue a prompt with a run's newest checkpoint, token by token, with a KV cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.launcher.base import console
from headway.launcher.base.errors import SpecError
from headway.launcher.exchange.opened import Opened, open_model
from headway.launcher.exchange.steps import Steps
from headway.launcher.run.codec import Codec

if TYPE_CHECKING:
    import torch

    from headway.model.seq2seq.build import Model


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
    """Print the prompt and its continuation to stdout, and times and cache size to stderr. Of an encoder-decoder that
    was trained on pairs, the target alone is printed.

    `path`: a run, a folder of exported or imported weights, also in Hugging Face's format. For a model of
    synthetic data, prompt and output are token ids. Raises NoInputError if `path` is none of these, CheckpointError if
    the run has no complete checkpoint of its own, WeightsError if the folder is incomplete, DataError if the tokenizer
    is missing or differs.
    """
    sampling.check()
    opened = open_model(path)
    codec, seq_len = opened.codec, opened.seq_len
    ids = codec.encode(prompt)
    if opened.is_encoder_decoder:
        return _of_encoder_decoder(opened, ids, sampling)
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
    _print(opened, ids, None, sampling, shown=ids, read=f"prefill {len(ids)} tokens")
    return 0


def _of_encoder_decoder(opened: Opened, ids: list[int], sampling: Sampling) -> int:
    """The encoder reads the prompt, and the decoder writes a target. Raises SpecError if no token starts one.

    A model that was not trained on pairs reads the prompt as it reads sequences in training: the encoder the first
    tokens, the decoder the others, at least the last one.
    """
    start, shown = opened.start_ids, []
    if start is None:
        if len(ids) < 2:
            raise SpecError("prompt: an encoder_decoder needs at least 2 tokens, one for each part; give a longer one")
        shown, cut = ids, min(opened.source_limit, len(ids) - 1)
        ids, start = ids[:cut], tuple(ids[cut:])
    for tokens, limit, what in (
        (len(ids), opened.source_limit, "tokens of the encoder"),
        (len(start) + sampling.tokens - 1, opened.target_limit, "tokens of the decoder"),
    ):
        if tokens > limit:
            console.note(
                f"note: {tokens} {what} are more than the {limit} of a training sequence; the text may degrade beyond "
                "that length"
            )
    console.note(f"{opened.title}, {len(ids)} tokens for the encoder, {len(start)} start the target")
    _print(opened, [*start], [ids], sampling, shown=shown, read=f"encoding {len(ids)} tokens and prefill {len(start)}")
    return 0


def _print(
    opened: Opened,
    ids: list[int],
    sources: list[list[int]] | None,
    sampling: Sampling,
    *,
    shown: list[int],
    read: str,
) -> None:
    """Print the tokens `shown` and the continuation, with its costs. `read`: what is timed before the first token."""
    printer = _Printer(opened.codec)
    printer.put(shown)
    stats: dict[str, Any] = {}
    eos_id = opened.codec.eos_id
    for token in continuation(opened.model, ids, sampling, eos_id=eos_id, stats=stats, sources=sources):
        printer.put([token])
    printer.close()
    new = stats["new_tokens"]
    decode_s = stats["decode_s"]
    console.note(
        f"{read} in {1e3 * stats['prefill_s']:.0f} ms; {new} new tokens"
        + (f", {(new - 1) / decode_s:,.0f} per second" if new > 1 and decode_s > 0 else "")
        + f"; KV cache {stats['cache_bytes'] / 1024:,.1f} KiB for {stats['cached_tokens']} tokens"
    )


def continuation(
    model: Model,
    ids: list[int],
    sampling: Sampling,
    *,
    eos_id: int | None,
    stats: dict[str, Any],
    sources: list[list[int]] | None = None,
) -> Iterator[int]:
    """Yield new token ids until `sampling.tokens` or the end of the document. Updates `stats` with times and sizes.

    sources: Of an encoder-decoder, one list with the ids that its encoder reads; its decoder continues `ids`.
    """
    import torch

    t0 = time.perf_counter()
    with torch.inference_mode():  # not around `yield`: the caller's code would run in it too
        steps = Steps(model, sources, tokens=len(ids) + sampling.tokens - 1)  # the last new token is not fed back
        logits = steps.read([ids])[0]
    generator = torch.Generator(device=steps.device).manual_seed(sampling.seed)
    stats |= {"prefill_s": time.perf_counter() - t0, "new_tokens": 0, "decode_s": 0.0}
    cached = 0 if sources is None else len(sources[0])  # by cross attention
    t0 = time.perf_counter()
    for i in range(sampling.tokens):
        token = _choose(logits, sampling, generator)
        stats |= {"new_tokens": i + 1, "decode_s": time.perf_counter() - t0}
        stats |= {"cache_bytes": steps.nbytes, "cached_tokens": cached + steps.tokens}
        if token == eos_id:
            return
        yield token
        if i + 1 < sampling.tokens:
            with torch.inference_mode():
                logits = steps.read([[token]])[0]


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
