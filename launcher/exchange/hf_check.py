"""Compare what Hugging Face transformers computes with a written folder with Headway's decoder."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.launcher.base.errors import HeadwayError
from headway.model.decoder import Decoder
from headway.model.hidden import hidden

TOLERANCE = 5e-5
"""Largest allowed difference, relative to the largest logit (or to 1).

transformers computes the angles of RoPE in fp32, Headway in fp64. Measured differences: up to 4e-6 with 256 positions,
up to 2e-5 with 2048 (4 layers of width 128, initial std 0.02 and 0.1). A wrong norm_eps (1e-6 for 1e-5) gives 3e-3 and
more, a rope base that is wrong by one percent 1.2e-4 and more.
"""

SEQUENCES, LENGTH = 2, 256


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Largest absolute difference over all logits, and the largest absolute logit."""

    largest: float
    scale: float

    def __str__(self) -> str:
        return f"{self.largest:.2e} (largest logit {self.scale:.3g})"


def random_tokens(vocab_size: int, seq_len: int) -> Tensor:
    """Random tokens with a fixed seed, int64 of shape [SEQUENCES, at most LENGTH]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab_size, (SEQUENCES, min(seq_len, LENGTH)), generator=generator)


def is_installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def differences(
    folder: Path, model: Any, decoder: Decoder, tokens: Mapping[str, Tensor], *, tolerance: float = TOLERANCE
) -> dict[str, Difference]:
    """Name -> difference of the logits on `tokens[name]` [B, S], computed in fp32 on CPU.

    model: That of `folder`, from `load_llama` or `load_ours`. Raises HeadwayError if a difference exceeds `tolerance`.
    """
    found = {}
    for name, ids in tokens.items():
        with torch.no_grad():
            ours, theirs = decoder.logits(ids), model(input_ids=ids, use_cache=False).logits
        found[name] = Difference(largest=float((ours - theirs).abs().max()), scale=float(ours.abs().max()))
        if not found[name].largest <= tolerance * max(1.0, found[name].scale):  # also true for NaN
            raise HeadwayError(
                f"{folder}: logits of {name} tokens differ by {found[name]} between transformers and Headway, more "
                f"than {tolerance:g} of the largest logit; nothing was written. Please report this with the spec"
            )
    return found


def compare_continuation(
    folder: Path, model: Any, decoder: Decoder, inputs: Mapping[str, Tensor], *, eos_id: int | None, tokens: int
) -> int:
    """Continue a prompt with `model.generate` and its generation_config.json, at most `tokens` tokens.

    inputs: Arguments of `generate`: `input_ids` [1, S] and what else the tokenizer gives. Returns the number of new
    tokens. Raises HeadwayError unless each is the most likely one of Headway's decoder (except for ties within
    `TOLERANCE`), and the continuation ends at `eos_id` and nowhere else.
    """
    prompt = inputs["input_ids"]
    try:
        with torch.no_grad():
            whole = model.generate(**inputs, max_new_tokens=tokens)
    except Exception as e:  # whatever the library raises
        raise HeadwayError(
            f"{folder}: transformers cannot continue a prompt ({type(e).__name__}: {str(e)[:300]}); nothing was "
            "written. Please report this with the spec"
        ) from e
    new = whole[0, prompt.shape[1] :]  # [N]
    with torch.no_grad():
        logits = decoder.logits(whole[:, :-1])[0, prompt.shape[1] - 1 :]  # [N, V]
    missing = logits.max(-1).values - logits.gather(-1, new[:, None])[:, 0]  # [N], 0 for the most likely token
    allowed = 2 * TOLERANCE * max(1.0, float(logits.abs().max()))
    wrong = (missing > allowed).nonzero()
    if len(wrong):
        place = int(wrong[0])
        raise HeadwayError(
            f"{folder}: greedy continuations differ from new token {place + 1} on: transformers takes "
            f"{int(new[place])}, Headway {int(logits[place].argmax())}; nothing was written. "
            "Please report this with the spec"
        )
    ends = [] if eos_id is None else (new == eos_id).nonzero()[:, 0].tolist()
    if (ends[0] + 1 if ends else tokens) != len(new):
        raise HeadwayError(
            f"{folder}: transformers ends a continuation after {len(new)} of {tokens} tokens, but the end-of-document "
            f"token {eos_id} is {f'new token {ends[0] + 1}' if ends else 'not among them'}; nothing was written. "
            "Please report this with the spec"
        )
    return len(new)


def load_library() -> Any:
    """The package transformers, offline and quiet. Raises HeadwayError if it cannot be imported."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # before the first import, which reads them
        os.environ.setdefault(name, "1")
    try:
        with hidden("torchvision"):
            transformers: Any = importlib.import_module("transformers")
            _ = transformers.LlamaForCausalLM, transformers.AutoTokenizer, transformers.AutoModelForCausalLM
    except (ImportError, RuntimeError) as e:
        raise HeadwayError(
            f"transformers is installed but cannot be imported ({str(e)[:300]}), so logits cannot be compared; fix the "
            f"installation, or uninstall transformers to skip the comparison"
        ) from e
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_llama(folder: Path, transformers: Any, *, config: Mapping[str, Any] | None = None) -> Any:
    """LlamaForCausalLM of `folder`, in fp32 on the CPU. Raises HeadwayError if transformers cannot read it.

    config: Contents of its config.json in another form; by default, transformers reads the file.
    """
    given = None if config is None else transformers.LlamaConfig.from_dict(dict(config))
    return _load(folder, transformers.LlamaForCausalLM, config=given)


def load_t5(folder: Path, transformers: Any) -> Any:
    """T5ForConditionalGeneration of `folder`, otherwise as `load_llama`."""
    return _load(folder, transformers.T5ForConditionalGeneration)


def load_ours(folder: Path, transformers: Any) -> Any:
    """HeadwayForCausalLM of `folder` as users get it, by `AutoModelForCausalLM`; otherwise as `load_llama`."""
    importlib.import_module("headway.model.huggingface.auto")  # registers it
    return _load(folder, transformers.AutoModelForCausalLM)


def _load(folder: Path, kind: Any, **config: Any) -> Any:
    try:
        # Do not run code from the checkpoint, read a pickle, or access the network.
        model, report = kind.from_pretrained(
            folder,
            **config,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as e:  # whatever the library raises
        raise HeadwayError(
            f"{folder}: transformers cannot read it ({type(e).__name__}: {str(e)[:300]}); use another version of "
            "transformers, or uninstall it to skip the comparison"
        ) from e
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise HeadwayError(
            f"{folder}: transformers finds missing, unknown or misshapen tensors: {wrong[:3]}; use another version of "
            "transformers, or uninstall it to skip the comparison"
        )
    return model.float().eval()
