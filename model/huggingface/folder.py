"""Folders of exported weights: safetensors files and a config.json that describes the decoder.

    decoder = load_exported(Path("folder"))        # a Decoder in evaluation mode, of any mechanism
    logits = decoder.logits(tokens)                # tokens [B, S] int64 -> [B, S, V]

config.json holds `model` and `attention` as in a spec, and the size and sha256 of every other file. The reader executes
nothing from the folder, rejects unknown keys and tensors, and does not follow links.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, StringConstraints, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headway.model.attention.registry import RegisteredTypes
from headway.model.base import AttentionSection, StrictConfig
from headway.model.config import ModelConfig
from headway.model.cost import account
from headway.model.decoder import Decoder
from headway.model.mixed import AnyAttention
from headway.model.seq2seq.build import Model, build_model

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
FORMAT = "headway-weights"
OF_PAIRS = ("encoder_tokens", "target_start_ids")
"""Keys of config.json that only encoder-decoders have."""
MAX_SHARD_BYTES = 5_000_000_000
MAX_JSON_BYTES = 64 << 20
_MAX_VALUES = 20_000  # in a config.json; pydantic makes an error of a kilobyte for each that is wrong

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
SHARD = re.compile(rf"{_NAME}\.safetensors")
"""Names of tensor files."""


class WeightsError(Exception):
    """A folder of weights is invalid. The message says what to do next."""

    exit_code = 65


class FileEntry(StrictConfig):
    """Size and content hash of one file."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class ExportedConfig(StrictConfig):
    """config.json of a folder that `load_exported` reads."""

    format: Literal["headway-weights"] = FORMAT
    version: Literal[1] = 1
    source: str = Field(description="where the weights came from, for people")
    model: ModelConfig
    attention: AnyAttention
    vocab_size: int = Field(ge=2)
    seq_len: int = Field(ge=1, description="maximum sequence length in training, in tokens")
    tokens: int = Field(ge=0, description="training tokens so far; they set the schedules of the mechanism")
    bos_token_id: int | None = Field(description="prepended to every prompt; null: nothing is prepended")
    eos_token_id: int | None = Field(description="ends a document")
    encoder_tokens: int | None = Field(default=None, ge=1, description="of a training sequence, those of the encoder")
    target_start_ids: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None, min_length=1, max_length=4096, description="ids that start a target of an encoder-decoder"
    )
    files: dict[Annotated[str, StringConstraints(pattern=rf"^{_NAME}$")], FileEntry]


def load_exported(folder: Path | str) -> Decoder:
    """Load a folder written by `headway export --to safetensors` or `headway import`. Returns a decoder in eval mode.

    As `load_model`. Raises WeightsError for an encoder-decoder too.
    """
    return the_decoder(load_model(folder), folder)


def load_model(folder: Path | str) -> Model:
    """Load a folder written by `headway export --to safetensors` or `headway import`: a decoder, or an encoder-decoder.

    The model is in evaluation mode on the CPU, in the dtypes of the files (fp32). Raises WeightsError if a file is
    missing, was changed, or does not match config.json.
    """
    root = Path(folder)
    config = read_exported(root)
    verify_exported(root, config)
    tensors = TensorFiles(root)
    model = build_for(tensors, config.model, config.attention, vocab_size=config.vocab_size)
    state = model.state_dict()
    tensors.check({name: tuple(tensor.shape) for name, tensor in state.items()})
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(tensors[name])
    model.before_step(config.tokens)
    return model.eval()


def the_decoder(model: Model, folder: Path | str) -> Decoder:
    """`model`, which must be a decoder. Raises WeightsError."""
    if not isinstance(model, Decoder):
        raise WeightsError(
            f"{folder}: holds an encoder_decoder, which this reads no weights of; train from it with init.weights, or "
            "load it with headway.model.huggingface.folder.load_model"
        )
    return model


def build_for(tensors: TensorFiles, model: ModelConfig, attention: AttentionSection, *, vocab_size: int) -> Model:
    """Build a model that `tensors` fit into. Raises WeightsError if its config needs more parameters than they have.

    The check comes before the allocation, so that a wrong number in config.json does not exhaust the memory.
    """
    numbers = sum(math.prod(tensors.shape(name)) for name in tensors)
    try:
        # Check the number of layers first, because counting the parameters visits each of them.
        if model.layers + model.encoder_blocks <= len(tensors):
            source = 1 if model.is_encoder_decoder else None
            cost = account(
                model, attention, vocab_size=vocab_size, seq_len=2, bytes_per_element=4, encoder_tokens=source
            )
            if cost.num_params <= numbers:
                return build_model(model, attention, vocab_size=vocab_size, seed=0)
    except ValueError as e:
        raise WeightsError(f"{tensors.folder / CONFIG}: {e}") from None
    raise WeightsError(
        f"{tensors.folder}: {len(tensors)} tensors with {numbers} elements are too few for the "
        f"{model.layers + model.encoder_blocks} layers "
        f"of width {model.width} in its config.json; restore the folder, or name another"
    )


def is_huggingface(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a Hugging Face model, and not of weights in Headway's format."""
    return config.get("format") != FORMAT and bool({"model_type", "architectures"} & set(config))


def read_exported(folder: Path) -> ExportedConfig:
    """Read config.json. Raises WeightsError if it is invalid. Does not check the files it lists."""
    path = folder / CONFIG
    text = read_small(path)
    if is_huggingface(read_config(folder)):
        raise WeightsError(
            f"{path}: is a Hugging Face model; convert it with `headway import {folder} --to DIR` and name DIR"
        )
    try:
        return ExportedConfig.model_validate_json(text)
    except ValidationError as e:
        raise invalid_config(path, e, "written by `headway export RUN --to safetensors` or `headway import`") from None


def invalid_config(path: Path | str, error: ValidationError, written: str) -> WeightsError:
    """The error for an invalid config.json. `written`: how folders of its kind are written."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"])) or "the file"
    if first["type"] == "union_tag_invalid":
        return WeightsError(
            f"{path}: attention.type {first.get('ctx', {}).get('tag')} is no mechanism of this installation; "
            f"install the package that has it, or update Headway: {RegisteredTypes.hint}"
        )
    return WeightsError(
        f"{path}: not the config.json of exported weights ({where}: {first['msg']}); name a folder {written}"
    )


def as_fp32(tensor: Tensor, name: str, folder: Path) -> Tensor:
    """A tensor of a folder in fp32. Raises WeightsError unless it is in fp32, bf16 or fp16, without NaN and Inf."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise WeightsError(
            f"{folder}: {name} is {tensor.dtype}; use a checkpoint in float32, or one in bfloat16 or float16"
        )
    if not bool(tensor.isfinite().all()):
        raise WeightsError(f"{folder}: {name} has NaN or Inf values; restore the folder, or use another one")
    return tensor.to(torch.float32)


def verify_exported(folder: Path, config: ExportedConfig) -> None:
    """Raise WeightsError unless every file listed in config.json exists with its size and hash."""
    for name, entry in config.files.items():
        path = folder / name
        if (size := regular_size(path)) != entry.bytes:
            raise WeightsError(f"{path}: {size} bytes, config.json says {entry.bytes}; export or import it again")
        if sha256_of(path) != entry.sha256:
            raise WeightsError(f"{path}: its contents changed (sha256 differs); export or import it again")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's contents, as a hexadecimal string."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def regular_size(path: Path) -> int:
    """Size of a file in bytes. Raises WeightsError if it is missing, a link, or not a regular file."""
    try:
        found = path.lstat()
    except OSError as e:
        raise WeightsError(f"{path}: {e.strerror}; restore it, or name another folder") from None
    if stat.S_ISLNK(found.st_mode):
        raise WeightsError(
            f"{path}: is a link, and links are not followed; copy the folder with `cp -rL FOLDER COPY` and name "
            f"the copy, or replace the link with the file"
        )
    if not stat.S_ISREG(found.st_mode):
        raise WeightsError(f"{path}: is not a regular file; restore it, or name another folder")
    return found.st_size


def read_small(path: Path) -> str:
    """Text of a JSON file. Raises WeightsError if it cannot be read or is larger than `MAX_JSON_BYTES`."""
    size = regular_size(path)
    if size > MAX_JSON_BYTES:
        raise WeightsError(
            f"{path}: {size} bytes, more than the limit of {MAX_JSON_BYTES}; restore it, or name another folder"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise WeightsError(f"{path}: cannot be read ({e}); restore it, or name another folder") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises WeightsError."""
    try:
        value = json.loads(read_small(path))
    except (ValueError, RecursionError) as e:
        raise WeightsError(f"{path}: not JSON ({type(e).__name__}: {str(e)[:200]}); restore it") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: is not a JSON object; restore it, or name another folder")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The object in config.json of a folder of weights. Raises WeightsError, also if it has too many values."""
    config = read_mapping(folder / CONFIG)
    waiting, count = [{key: value for key, value in config.items() if key != "files"}], 0
    while waiting:
        inner = waiting.pop()
        count += len(inner)
        if count > _MAX_VALUES:
            raise WeightsError(
                f"{folder / CONFIG}: has more than {_MAX_VALUES:,} values, so it is not the config of a model; restore "
                "it, or name another folder"
            )
        waiting += [v for v in (inner.values() if isinstance(inner, dict) else inner) if isinstance(v, dict | list)]
    return config


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a folder by name, from model.safetensors or from the shards in its index. Tensors load lazily.

    Raises WeightsError if files are missing, truncated, links, or do not match the index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._where = self._index() if (folder / INDEX).exists() else dict.fromkeys(self._keys(WEIGHTS), WEIGHTS)
        there = [(name, key) for name in sorted(set(self._where.values())) for key in self._keys(name)]
        wrong = {(name, key) for key, name in self._where.items()} ^ set(there)
        if wrong:
            name, key = min(wrong)
            raise WeightsError(
                f"{folder / INDEX}: does not match {name} for the tensor {key[:200]!r}; restore both files"
            )

    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX
        where = read_mapping(path).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise WeightsError(f"{path}: has no weight_map; restore it, or name another folder")
        for name in where.values():
            if not isinstance(name, str) or SHARD.fullmatch(name) is None:
                raise WeightsError(f"{path}: {str(name)[:200]!r} is not a safetensors file name; restore the index")
        return where

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            regular_size(path)
            try:
                self._open[name] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError, ValueError) as e:
                raise WeightsError(f"{path}: not a complete safetensors file ({e}); restore it") from None
        return self._open[name]

    def _keys(self, name: str) -> list[str]:
        return list(self._file(name).keys())

    def __getitem__(self, key: str) -> Tensor:
        try:
            return self._file(self._where[key]).get_tensor(key)
        except (SafetensorError, OSError) as e:
            raise WeightsError(f"{self.folder / self._where[key]}: {key} cannot be read ({e}); restore it") from None

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without loading it."""
        return tuple(self._file(self._where[key]).get_slice(key).get_shape())

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise WeightsError unless the folder's tensor names and shapes are exactly `shapes`."""
        missing, extra = sorted(set(shapes) - set(self)), sorted(set(self) - set(shapes))
        if missing or extra:
            raise WeightsError(
                f"{self.folder}: tensors do not match its config.json (missing {missing[:3]}, unknown {extra[:3]}); "
                f"restore the folder, or name another"
            )
        for name, shape in shapes.items():
            if self.shape(name) != tuple(shape):
                raise WeightsError(
                    f"{self.folder}: {name} has shape {list(self.shape(name))}, config.json implies {list(shape)}; "
                    f"restore the folder, or name another"
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], *, max_shard_bytes: int) -> list[str]:
    """Write model.safetensors, or shards of at most `max_shard_bytes` and their index. Returns the file names.

    A tensor larger than `max_shard_bytes` gets its own shard.
    """
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and used + size > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor.detach().contiguous()
        used += size
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS]
    for name, shard in zip(names, shards, strict=True):
        try:
            save_file(shard, folder / name, metadata={"format": "pt"})
        except SafetensorError as e:  # raised for a full disk, among others
            raise OSError(None, str(e), os.fspath(folder / name)) from None
        (folder / name).chmod(folder.stat().st_mode & 0o666)  # the library creates it readable by the owner only
    if len(shards) == 1:
        return names
    where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    return [*names, INDEX]


def write_exported(folder: Path, config: ExportedConfig, files: list[str]) -> None:
    """Write config.json with the size and hash of `files`, which must be in the folder already."""
    entries = {
        name: FileEntry(bytes=regular_size(folder / name), sha256=sha256_of(folder / name)) for name in sorted(files)
    }
    absent = {name for name in OF_PAIRS if getattr(config, name) is None}  # earlier versions refuse unknown keys
    write_json(folder / CONFIG, config.model_copy(update={"files": entries}).model_dump(mode="json", exclude=absent))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
