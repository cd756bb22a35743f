"""`headway import` of a T5, T5 v1.1 or FLAN-T5 of Hugging Face's format: its weights, and the comparison of logits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from headway.launcher.base import console
from headway.launcher.base.errors import HeadwayError, printable
from headway.launcher.exchange.hf_check import TOLERANCE, Difference, load_t5, random_tokens
from headway.model.huggingface import folder as hf
from headway.model.huggingface.folder import TensorFiles, WeightsError, as_fp32
from headway.model.huggingface.t5 import (
    ARCHITECTURE,
    TOP,
    T5Shape,
    is_copy,
    is_surplus,
    ours,
    read_t5_config,
    t5_name,
)
from headway.model.huggingface.values import first_problem
from headway.model.seq2seq.model import EncoderDecoder


def read_t5(source: Path, raw: Mapping[str, Any]) -> tuple[EncoderDecoder, hf.ExportedConfig]:
    """(model in fp32 and evaluation mode, its config) of a folder. `raw`: contents of its config.json.

    Raises WeightsError if it is another model or incomplete.
    """
    try:
        shape = read_t5_config(raw)
    except ValueError as e:
        raise WeightsError(f"{source / hf.CONFIG}: {first_problem(e)}") from None
    tensors = TensorFiles(source)
    model = hf.build_for(tensors, shape.model, shape.attention, vocab_size=shape.vocab_size)
    assert isinstance(model, EncoderDecoder)
    _fill(model.eval().requires_grad_(False), tensors, shape)
    return model, hf.ExportedConfig(
        source=f"{ARCHITECTURE} in {printable(str(source), 300)}",
        model=shape.model,
        attention=shape.attention,
        vocab_size=shape.vocab_size,
        seq_len=shape.seq_len,
        tokens=0,
        bos_token_id=None,
        eos_token_id=shape.eos_token_id,
        files={},
    )


def _fill(model: EncoderDecoder, files: TensorFiles, shape: T5Shape) -> None:
    """Copy a T5's tensors into the model. Raises WeightsError for missing or unknown tensors and wrong shapes."""
    state, tied = model.state_dict(), shape.model.tied_embeddings
    names = {name: t5_name(name, shape.model) for name in state}
    surplus = {name for name in set(files) - set(names.values()) if is_surplus(name, tied)}
    wanted = {names[name]: tuple(ours(name, tensor).shape) for name, tensor in state.items()}
    files.check(wanted | {name: files.shape(name) for name in surplus})
    with console.progress("read tensors", len(state), "tensors") as bar:
        for name, tensor in state.items():
            tensor.copy_(ours(name, as_fp32(files[names[name]], names[name], files.folder)))
            bar.update()
    for name in sorted(surplus):
        if is_copy(name, tied) and not as_fp32(files[name], name, files.folder).equal(state["embedding"]):
            raise WeightsError(
                f"{files.folder}: {name} differs from {TOP['embedding']}, but T5 has one embedding for both stacks"
                f"{' and, by tie_word_embeddings in config.json, for its head' if tied else ''}; use a complete "
                "checkpoint, or correct config.json"
            )


def compare_t5(source: Path, model: EncoderDecoder, config: hf.ExportedConfig, library: Any) -> dict[str, Difference]:
    """Compare logits with those of transformers, on random tokens, with padding of the source in one sequence.

    Raises HeadwayError if they differ by more than `TOLERANCE`.
    """
    theirs = load_t5(source, library)
    both = random_tokens(config.vocab_size, 2 * config.seq_len)
    tokens, target = both.chunk(2, 1)
    there = torch.ones_like(tokens)
    there[-1, tokens.shape[1] // 2 :] = 0
    with torch.no_grad():
        logits = model.logits(tokens, target, there - 1)
        other = theirs(input_ids=tokens, attention_mask=there, decoder_input_ids=target, use_cache=False).logits
    found = Difference(largest=float((logits - other).abs().max()), scale=float(logits.abs().max()))
    if not found.largest <= TOLERANCE * max(1.0, found.scale):  # also true for NaN
        raise HeadwayError(
            f"{source}: logits of random tokens differ by {found} between transformers and Headway, more than "
            f"{TOLERANCE:g} of the largest logit; nothing was written. Please report this with config.json"
        )
    return {"random": found}
