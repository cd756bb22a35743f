"""`headway generate`: continue a prompt with a run's newest checkpoint, token by token, from a KV cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.launcher.base import console
from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.run.codec import Codec
from headway.launcher.run.folders import not_a_run
from headway.launcher.run.run_dir import RunDir
from headway.launcher.run.stored_spec import stored_spec
from headway.launcher.spec.spec import Spec

if TYPE_CHECKING:
    import torch

    from headway.model.config import ModelConfig
    from headway.model.decoder import Decoder

PREFILL_CHUNK = 512
"""Prompt tokens per forward pass: bounds the memory of a long prompt; the result does not depend on it."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. `temperature` 0: always the likeliest; `top_p`: of the smallest set of tokens that
    holds this probability; `seed` makes a sample repeatable.
    """

    tokens: int
    temperature: float
    top_p: float
    seed: int

    def check(self) -> None:
        """Raises SpecError where a value makes no sense."""
        if self.tokens < 1:
            raise SpecError(f"--tokens: {self.tokens} new tokens; give at least 1, such as --tokens 100")
        if self.temperature != 0 and not 1e-3 <= self.temperature <= 100:
            raise SpecError(f"--temperature: {self.temperature}; give 0 (the likeliest token) or 0.001 to 100, say 0.8")
        if not 0 < self.top_p <= 1:
            raise SpecError(f"--top-p: {self.top_p} is no probability; give more than 0 and at most 1, such as 0.95")


def generate(path: Path, prompt: str, sampling: Sampling) -> int:
    """Print the prompt and its continuation to stdout, what it cost to stderr.

    `path`: a run, or a folder of exported or imported weights. A model of synthetic data has no text: its prompt and
    its output are token ids. Raises NoInputError where `path` is neither, CheckpointError where a run has no whole
    checkpoint, WeightsError where such a folder is not whole, DataError where the tokenizer is gone or another.
    """
    sampling.check()
    run = RunDir(path)
    if run.spec.is_file():
        model, codec, ids, seq_len, title = _of_run(run, prompt)
    elif (path / "config.json").is_file():
        model, codec, ids, seq_len, title = _of_weights(path, prompt)
    else:
        raise NoInputError(not_a_run(path))
    if len(ids) + sampling.tokens > seq_len:
        console.note(
            f"note: {len(ids)} prompt and {sampling.tokens} new tokens are more than the {seq_len} the run "
            "was trained on; what lies beyond was never practised"
        )
    console.note(f"{title}, {len(ids)} prompt tokens")
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


def _of_run(run: RunDir, prompt: str) -> tuple[Decoder, Codec, list[int], int, str]:
    """(model, codec, ids of the prompt, tokens of a training sequence, what it is)."""
    spec = stored_spec(run)
    codec = Codec.of(spec, run)
    ids = codec.encode(prompt)
    model, step = load_model(run, spec)
    return model, codec, ids, spec.data.seq_len, f"{spec.attention.type}, checkpoint of step {step}"


def _of_weights(folder: Path, prompt: str) -> tuple[Decoder, Codec, list[int], int, str]:
    """The same of a folder of weights."""
    from headway.model.huggingface import folder as hf

    config = hf.read_exported(folder)
    model = hf.load_exported(folder)
    codec = Codec.of_exported(folder, config)
    return _ready(model, config.model), codec, codec.encode(prompt), config.seq_len, f"weights of {config.source}"


def load_model(run: RunDir, spec: Spec, step: int | None = None) -> tuple[Decoder, int]:
    """(the run's model in evaluation mode with its newest whole checkpoint or that of `step`, the step of that).

    Needs no DeepSpeed.
    """
    from headway.launcher.run.weights import find_checkpoint, load_decoder

    found = find_checkpoint(run, step)
    return _ready(load_decoder(spec, found), spec.model, cpu=spec.launch.device == "cpu"), found.step


def _ready(model: Decoder, shape: ModelConfig, *, cpu: bool = False) -> Decoder:
    """On the GPU where there is one and `cpu` is false; weighted GQA folded."""
    import torch

    from headway.model.attention.wgqa import WgqaConfig
    from headway.model.convert import fold_decoder

    if isinstance(model.attention, WgqaConfig):  # else every token would merge all heads' keys and values anew
        model = fold_decoder(model, shape)
    return model.eval().requires_grad_(False).to("cuda" if not cpu and torch.cuda.is_available() else "cpu")


def continuation(
    model: Decoder, ids: list[int], sampling: Sampling, *, eos_id: int | None, stats: dict[str, Any]
) -> Iterator[int]:
    """New token ids, one by one, until `sampling.tokens` or the end of the document; `stats` is filled on the way."""
    import torch

    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(sampling.seed)
    cache = model.new_cache()
    t0 = time.perf_counter()
    with torch.no_grad():
        logits = None
        for chunk in torch.tensor([ids], device=device).split(PREFILL_CHUNK, 1):
            logits = model.logits(chunk, cache=cache, last=True)[0, -1]
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
                logits = model.logits(torch.tensor([[token]], device=device), cache=cache)[0, -1]


def _choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token id from logits [V]."""
    import torch

    if sampling.temperature == 0:
        return int(logits.argmax())
    p, order = torch.softmax(logits.float() / sampling.temperature, -1).sort(descending=True)
    p = torch.where(p.cumsum(-1) - p < sampling.top_p, p, 0.0)  # the first token past the border still belongs
    return int(order[torch.multinomial(p, 1, generator=generator)])


class _Printer:
    """Prints text as soon as it is whole: a letter may be spread over several tokens."""

    def __init__(self, codec: Codec) -> None:
        self._codec, self._ids, self._shown = codec, [], ""

    def put(self, ids: list[int]) -> None:
        self._ids += ids
        text = self._codec.decode(self._ids)
        if not text.endswith("\ufffd"):
            self._show(text)

    def close(self) -> None:
        self._show(self._codec.decode(self._ids))
        print(flush=True)

    def _show(self, text: str) -> None:
        print(text[len(self._shown) :], end="", flush=True)
        self._shown = text
