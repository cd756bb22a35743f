"""Whether a Llama of Hugging Face transformers computes what our decoder does, on random and on real tokens."""

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
"""Of the largest difference, as a share of the largest logit (or of 1).

transformers takes the angles of RoPE in fp32 and we in fp64: measured on 256 positions up to 4e-6, on 2048 up to 2e-5
(4 layers of width 128, initial std 0.02 and 0.1). Another norm_eps (1e-6 for 1e-5) makes 3e-3 and more, a rope base
that is off by one percent 1.2e-4 and more.
"""

SEQUENCES, LENGTH = 2, 256


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The largest one over all logits of some tokens, and the largest logit."""

    largest: float
    scale: float

    def __str__(self) -> str:
        return f"{self.largest:.2e} (largest logit {self.scale:.3g})"


def random_tokens(vocab_size: int, seq_len: int) -> Tensor:
    """[SEQUENCES, LENGTH at most] int64, always the same."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab_size, (SEQUENCES, min(seq_len, LENGTH)), generator=generator)


def differences(folder: Path, decoder: Decoder, tokens: Mapping[str, Tensor]) -> dict[str, Difference] | None:
    """By the name of the tokens [B, S]; both in fp32 on CPU. None where transformers is not installed.

    Raises HeadwayError where one is beyond `TOLERANCE`, or where transformers does not read the folder.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    llama = _loaded(folder)
    found = {}
    for name, ids in tokens.items():
        with torch.no_grad():
            ours, theirs = decoder.logits(ids), llama(input_ids=ids, use_cache=False).logits
        found[name] = Difference(largest=float((ours - theirs).abs().max()), scale=float(ours.abs().max()))
        if not found[name].largest <= TOLERANCE * max(1.0, found[name].scale):  # also where it is no number
            raise HeadwayError(
                f"{folder}: logits of {name} tokens differ by {found[name]} between transformers and Headway, more "
                f"than {TOLERANCE:g} of the largest; nothing was written. Please report this with the spec"
            )
    return found


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """A package that is not imported yet seems not to be installed.

    transformers takes what it finds, for pictures too, and a torchvision of another build than torch's ends the import.
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
            f"transformers is installed and cannot be imported ({str(e)[:300]}), so nothing was compared; mend it, or "
            f"uninstall it to go without the comparison"
        ) from e
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        # Never code of the checkpoint, never a pickle, never the network.
        llama, report = llama_class.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as e:  # whatever the library raises
        raise HeadwayError(f"{folder}: transformers cannot read it ({type(e).__name__}: {str(e)[:300]})") from e
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise HeadwayError(f"{folder}: transformers does not know what to do with {wrong[:3]}")
    return llama.float().eval()
