"""Hugging Face's Llama beside ours."""

import os
from typing import Any

import pytest
import torch

from headway.model.hidden import hidden


def transformers() -> Any:
    """The library, without what it imports besides."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with hidden("torchvision"):  # at the first import, where transformers looks for it
        transformers = pytest.importorskip("transformers")
        assert transformers.LlamaForCausalLM and transformers.AutoTokenizer
    return transformers


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[B, S, V] of a decoder of ours or a Llama of theirs."""
    with torch.no_grad():
        return model.logits(tokens) if hasattr(model, "attention_layers") else model(input_ids=tokens).logits


def some_tokens(vocab_size: int, length: int = 32) -> torch.Tensor:
    """[3, length], always the same."""
    return torch.randint(vocab_size, (3, length), generator=torch.Generator().manual_seed(2))
