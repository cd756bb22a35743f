"""Compare the logits of a Hugging Face transformers Llama with those of Headway's decoder."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.launcher.base.errors import HeadwayError
from headway.model.decoder import Decoder

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


def differences(folder: Path, decoder: Decoder, tokens: Mapping[str, Tensor]) -> dict[str, Difference] | None:
    """Name -> difference on `tokens[name]` [B, S], computed in fp32 on CPU. None if transformers is not installed.

    Raises HeadwayError if a difference exceeds `TOLERANCE`, or if transformers cannot read the folder.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    llama = _loaded(folder)
    found = {}
    for name, ids in tokens.items():
        with torch.no_grad():
            ours, theirs = decoder.logits(ids), llama(input_ids=ids, use_cache=False).logits
        found[name] = Difference(largest=float((ours - theirs).abs().max()), scale=float(ours.abs().max()))
        if not found[name].largest <= TOLERANCE * max(1.0, found[name].scale):  # also true for NaN
            raise HeadwayError(
                f"{folder}: logits of {name} tokens differ by {found[name]} between transformers and Headway, more "
                f"than {TOLERANCE:g} of the largest logit; nothing was written. Please report this with the spec"
            )
    return found


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Make a package look as if it were not installed, unless it is already imported.

    transformers imports torchvision if it is installed. A torchvision built for another torch would make that fail.
    """
    if name in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    modules[name] = None
    try:
        yield
    finally:
        del modules[name]


def _loaded(folder: Path) -> Any:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # before the first import, which reads them
        os.environ.setdefault(name, "1")
    try:
        with _hidden("torchvision"):
            transformers: Any = importlib.import_module("transformers")
            llama_class = transformers.LlamaForCausalLM
    except (ImportError, RuntimeError) as e:
        raise HeadwayError(
            f"transformers is installed but cannot be imported ({str(e)[:300]}), so logits cannot be compared; fix the "
            f"installation, or uninstall transformers to skip the comparison"
        ) from e
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        # Do not run code from the checkpoint, read a pickle, or access the network.
        llama, report = llama_class.from_pretrained(
            folder,
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
    return llama.float().eval()
