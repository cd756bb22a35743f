"""The model of a spec in other libraries, with equal weights: Hugging Face transformers, litgpt, a bare PyTorch loop.

Each peer computes its loss as its own training code does: transformers with the loss function of its model, litgpt with
its chunked cross entropy, the bare loop with PyTorch's cross entropy of the whole logits.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headway.launcher.base.errors import SpecError
from headway.model.hidden import hidden

if TYPE_CHECKING:
    from torch import Tensor, nn

    from headway.launcher.spec.spec import Spec

HEADWAY = "headway"
PEERS = ("transformers", "litgpt", "bare")
INSTALL = {"transformers": "pip install transformers", "litgpt": "pip install litgpt"}
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A model of another library.

    logits: tokens [B, S] -> logits [B, S, V].
    loss: (tokens [B, S], labels [B, S], targets) -> sum of the cross entropy over labels other than -100, divided by
        `targets`, the labels of the whole batch.
    """

    module: nn.Module
    logits: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor, int], Tensor]


def why_missing(name: str) -> str | None:
    """Why the peer `name` cannot be measured here, with what to do; None if it can. Imports its library."""
    if name not in INSTALL:
        return None
    try:
        _library(name)
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] == name:
            return f"not installed: {INSTALL[name]}"
        return f"installed, but {e.name} is missing, which it imports; install that, or `{INSTALL[name]}` again"
    except Exception as e:  # whatever a broken library raises
        return f"installed but cannot be imported ({type(e).__name__}: {str(e)[:200]}); repair the installation"
    return None


def _library(name: str) -> Any:
    """The package `name`, offline."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # before the first import, which reads them
        os.environ.setdefault(variable, "1")
    # Hidden only where it is broken: torchmetrics, which litgpt imports, looks for it among the installed packages.
    with contextlib.nullcontext() if _works("torchvision") else hidden("torchvision"):
        library: Any = importlib.import_module(name)
        if name == "transformers":
            _ = library.LlamaForCausalLM  # the package imports its modules when they are used
        else:
            importlib.import_module("litgpt.utils")
    return library


def _works(name: str) -> bool:
    """Whether a package can be imported. One that was built for another torch raises other errors than ImportError."""
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True


_NOT_COMPARED = "is not trained by the other libraries; use a plain Llama, such as attention.type=gqa"


def llama_of(spec: Spec) -> dict[str, Any]:
    """config.json of the Llama that equals the spec's model. Raises SpecError, with the key, if there is none."""
    from headway.model.huggingface.llama import folded, llama_config

    assert spec.model.vocab_size is not None, "`resolve` sets the vocabulary"
    if folded(spec.attention) is not spec.attention:
        raise SpecError(f"attention.type: {spec.attention.type} {_NOT_COMPARED}")
    try:
        return llama_config(
            spec.model, spec.attention, vocab_size=spec.model.vocab_size, seq_len=spec.data.seq_len, eos_token_id=None
        )
    except ValueError as e:
        reason, *_ = str(e).split("; use the format safetensors")
        raise SpecError(f"{reason}; this model {_NOT_COMPARED}") from e


def make_peer(name: str, spec: Spec, weights: Mapping[str, Tensor]) -> Peer:
    """The model of `spec` in the library `name`, in fp32 on the CPU. `weights`: the state_dict of Headway's decoder."""
    return {"transformers": _transformers, "litgpt": _litgpt, "bare": _bare}[name](llama_of(spec), weights)


def parameters(module: nn.Module) -> int:
    """Number of parameters; shared ones are counted once."""
    return sum(p.numel() for p in module.parameters())


def _load(module: nn.Module, tensors: Mapping[str, Tensor], *, tied: str | None) -> None:
    """Copy the weights into a module. tied: name of the head, which has no tensor because it is the embedding."""
    report = module.load_state_dict(dict(tensors), strict=False)
    assert not report.unexpected_keys and set(report.missing_keys) <= {tied}, report
    module.train()


def _transformers(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Peer:
    from headway.model.huggingface.llama import llama_name

    library = _library("transformers")
    module = library.LlamaForCausalLM(library.LlamaConfig.from_dict(dict(config), attn_implementation="sdpa"))
    tied = config["tie_word_embeddings"]
    _load(module, {llama_name(name): t for name, t in weights.items()}, tied="lm_head.weight" if tied else None)
    module.tie_weights()

    def logits(tokens: Tensor) -> Tensor:
        return module(input_ids=tokens, use_cache=False).logits

    def loss(tokens: Tensor, labels: Tensor, targets: int) -> Tensor:
        return module.loss_function(
            logits=logits(tokens),
            labels=labels,
            vocab_size=config["vocab_size"],
            shift_labels=labels,  # they are the next tokens already
            num_items_in_batch=targets,
        )

    return Peer(module=module, logits=logits, loss=loss)


_LITGPT = {
    "attn_norm.gain": "norm_1.weight",
    "attn.w_o": "attn.proj.weight",
    "mlp_norm.gain": "norm_2.weight",
    "mlp.w_gate": "mlp.fc_1.weight",
    "mlp.w_up": "mlp.fc_2.weight",
    "mlp.w_down": "mlp.proj.weight",
}


def _litgpt(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Peer:
    import torch

    library = _library("litgpt")
    cross_entropy = library.utils.chunked_cross_entropy
    module = library.GPT(
        library.Config(
            name="headway-bench",
            block_size=config["max_position_embeddings"],
            n_layer=config["num_hidden_layers"],
            n_embd=config["hidden_size"],
            vocab_size=config["vocab_size"],
            padded_vocab_size=config["vocab_size"],
            n_head=config["num_attention_heads"],
            n_query_groups=config["num_key_value_heads"],
            head_size=config["head_dim"],
            intermediate_size=config["intermediate_size"],
            norm_class_name="RMSNorm",
            norm_eps=config["rms_norm_eps"],
            mlp_class_name="LLaMAMLP",
            rotary_percentage=1.0,
            rope_base=config["rope_theta"],
            parallel_residual=False,
            bias=False,
        )
    )
    tensors = {"transformer.wte.weight": weights["embedding"], "transformer.ln_f.weight": weights["norm.gain"]}
    for i in range(config["num_hidden_layers"]):
        block = f"blocks.{i}."
        tensors |= {f"transformer.h.{i}.{theirs}": weights[block + ours] for ours, theirs in _LITGPT.items()}
        joined = torch.cat([weights[f"{block}attn.{matrix}"] for matrix in ("w_q", "w_k", "w_v")])
        tensors[f"transformer.h.{i}.attn.qkv.weight"] = joined
    if config["tie_word_embeddings"]:
        module.transformer.wte.weight = module.lm_head.weight  # as litgpt's pretraining does
    else:
        tensors["lm_head.weight"] = weights["head"]
    _load(module, tensors, tied="lm_head.weight" if config["tie_word_embeddings"] else None)

    def loss(tokens: Tensor, labels: Tensor, targets: int) -> Tensor:
        mean = cross_entropy(module(tokens), labels)  # over the labels of the micro-batch that are not ignored
        return mean * ((labels != IGNORED).sum() / targets)

    return Peer(module=module, logits=module, loss=loss)


_BARE = {
    "attn_norm.gain": "attn_norm.weight",
    "attn.w_q": "q.weight",
    "attn.w_k": "k.weight",
    "attn.w_v": "v.weight",
    "attn.w_o": "o.weight",
    "mlp_norm.gain": "mlp_norm.weight",
    "mlp.w_gate": "gate.weight",
    "mlp.w_up": "up.weight",
    "mlp.w_down": "down.weight",
}


def _bare(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Peer:
    import torch.nn.functional as F

    from headway.launcher.bench.peers.llama import Llama, LlamaSize

    module = Llama(
        LlamaSize(
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            ffn_width=config["intermediate_size"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            vocab_size=config["vocab_size"],
            seq_len=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            rope_base=config["rope_theta"],
            tied=config["tie_word_embeddings"],
        )
    )
    tensors = {"embedding.weight": weights["embedding"], "norm.weight": weights["norm.gain"]}
    for i in range(config["num_hidden_layers"]):
        tensors |= {f"blocks.{i}.{theirs}": weights[f"blocks.{i}.{ours}"] for ours, theirs in _BARE.items()}
    if not config["tie_word_embeddings"]:
        tensors["head.weight"] = weights["head"]
    _load(module, tensors, tied="head.weight" if config["tie_word_embeddings"] else None)

    def loss(tokens: Tensor, labels: Tensor, targets: int) -> Tensor:
        logits = module(tokens).flatten(0, 1).float()
        return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum") / targets

    return Peer(module=module, logits=module, loss=loss)
