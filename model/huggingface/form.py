"""Headway's own form of a Hugging Face folder, for every mechanism: config.json and the names of tensors.

config.json has the `model` and `attention` of a spec beside the keys that transformers reads. `headway.hf` registers
the classes that it names. This module does not import transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from headway.model.decoder import Decoder
from headway.model.huggingface.folder import (
    CONFIG,
    OF_PAIRS,
    ExportedConfig,
    TensorFiles,
    WeightsError,
    as_fp32,
    build_for,
    invalid_config,
    the_decoder,
)

MODEL_TYPE, ARCHITECTURE = "headway", "HeadwayForCausalLM"
PREFIX = "decoder."
"""The model of transformers holds the decoder under this name."""

_KEYS = {"seq_len": "max_position_embeddings"}
"""Names of fields of `ExportedConfig` that transformers knows under other names."""
_ABSENT = ("format", "version", "files", *OF_PAIRS)


def tensor_name(name: str) -> str:
    """Name in model.safetensors of the decoder's tensor `name`."""
    return PREFIX + name


def form_config(exported: ExportedConfig) -> dict[str, Any]:
    """config.json of the folder. `exported.files` is left out, because transformers rewrites files."""
    values = exported.model_dump(mode="json", exclude=set(_ABSENT))
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{_KEYS.get(key, key): value for key, value in values.items()},
        "pad_token_id": None,
        "tie_word_embeddings": False,  # of transformers, which ties nothing: `model.tied_embeddings` has effect
        "torch_dtype": "float32",
        "use_cache": True,
    }


def is_form(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this form."""
    return config.get("model_type") == MODEL_TYPE


def read_form(config: Mapping[str, Any], where: Path | str) -> ExportedConfig:
    """The decoder of a config.json of this form; keys that only transformers reads are ignored.

    `where`: the file, for messages. Raises WeightsError if a key is missing or invalid, or if the mechanism is that of
    a package which is not installed.
    """
    names = {name: _KEYS.get(name, name) for name in ExportedConfig.model_fields if name not in _ABSENT}
    # transformers leaves out what is null.
    values = {name: config.get(key) for name, key in names.items() if key in config or name.endswith("token_id")}
    try:
        return ExportedConfig.model_validate_json(json.dumps({**values, "files": {}}))
    except ValidationError as e:
        raise invalid_config(where, e, "written by `headway export RUN --to hf`") from None


def load_form(folder: Path, config: Mapping[str, Any]) -> tuple[Decoder, ExportedConfig]:
    """The decoder of a folder of this form, on the CPU, in fp32 and evaluation mode; and its config.

    `config`: the contents of config.json. Raises WeightsError if a file is missing or does not match it. No code from
    the folder is executed.
    """
    exported = read_form(config, folder / CONFIG)
    tensors = TensorFiles(folder)
    found = build_for(tensors, exported.model, exported.attention, vocab_size=exported.vocab_size)
    decoder = the_decoder(found, folder)
    state = decoder.state_dict()
    tensors.check({tensor_name(name): tuple(tensor.shape) for name, tensor in state.items()})
    with torch.no_grad():
        for name, tensor in state.items():
            found = tensors[tensor_name(name)]
            if tensor.is_floating_point():
                found = as_fp32(found, tensor_name(name), folder)
            elif found.dtype != tensor.dtype:
                raise WeightsError(
                    f"{folder}: {tensor_name(name)} is {found.dtype} instead of {tensor.dtype}; restore the folder, or "
                    "use another one"
                )
            tensor.copy_(found)
    decoder.before_step(exported.tokens)
    return decoder.eval().requires_grad_(False), exported
