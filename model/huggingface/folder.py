"""Folders of exported weights: safetensors, a config.json that says which decoder they are, and the reader of both.

    decoder = load_exported(Path("folder"))        # a Decoder in evaluation mode, of any mechanism
    logits = decoder.logits(tokens)                # tokens [B, S] int64 -> [B, S, V]

config.json holds `model` and `attention` as a spec does, and the size and sha256 of every other file. Nothing in a
folder is executed, nothing unknown is passed over, no link is followed.
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

from headway.model.attention.registry import AnyAttention, RegisteredTypes
from headway.model.base import AttentionConfig, StrictConfig
from headway.model.config import ModelConfig
from headway.model.cost import account
from headway.model.decoder import Decoder

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
FORMAT = "headway-weights"
MAX_SHARD_BYTES = 5_000_000_000
MAX_JSON_BYTES = 64 << 20

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_SHARD = re.compile(rf"{_NAME}\.safetensors")


class WeightsError(Exception):
    """A folder of weights is not what it should be. The message says what to do next."""

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
    seq_len: int = Field(ge=1, description="tokens of the sequences it was trained on, at most")
    tokens: int = Field(ge=0, description="training tokens done: where schedules of the mechanism stand")
    bos_token_id: int | None = Field(description="put before every prompt; null: nothing is")
    eos_token_id: int | None = Field(description="ends a document")
    files: dict[Annotated[str, StringConstraints(pattern=rf"^{_NAME}$")], FileEntry]


def load_exported(folder: Path | str) -> Decoder:
    """The decoder of a folder written by `headway export --to safetensors` or `headway import`, in evaluation mode.

    On CPU, in the dtypes of the files (fp32). Raises WeightsError where a file is missing, changed, or not that of the
    decoder which config.json describes.
    """
    root = Path(folder)
    config = read_exported(root)
    verify_exported(root, config)
    tensors = TensorFiles(root)
    decoder = build_for(tensors, config.model, config.attention, vocab_size=config.vocab_size)
    state = decoder.state_dict()
    tensors.check({name: tuple(tensor.shape) for name, tensor in state.items()})
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(tensors[name])
    decoder.before_step(config.tokens)
    return decoder.eval()


def build_for(tensors: TensorFiles, model: ModelConfig, attention: AttentionConfig, *, vocab_size: int) -> Decoder:
    """A decoder that these tensors will be put into. Raises WeightsError where they are too few for its config, before
    memory is taken for what a wrong number there asks for.
    """
    numbers = sum(math.prod(tensors.shape(name)) for name in tensors)
    try:
        # The layers first: each of them is looked at to count the parameters.
        if model.layers <= len(tensors):
            expected = account(model, attention, vocab_size=vocab_size, seq_len=1, bytes_per_element=4).num_params
            if expected <= numbers:
                return Decoder(model, attention, vocab_size=vocab_size, seed=0)
    except ValueError as e:
        raise WeightsError(f"{tensors.folder / CONFIG}: {e}") from None
    raise WeightsError(
        f"{tensors.folder}: {len(tensors)} tensors of {numbers} numbers are too few for the {model.layers} layers of "
        f"width {model.width} in its config.json; restore the folder, or name another"
    )


def read_exported(folder: Path) -> ExportedConfig:
    """config.json of such a folder. Raises WeightsError; the files it names are not looked at yet."""
    path = folder / CONFIG
    text = read_small(path)
    try:
        return ExportedConfig.model_validate_json(text)
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
        where = ".".join(map(str, error["loc"])) or "the file"
        if error["type"] == "union_tag_invalid":
            raise WeightsError(
                f"{path}: attention.type {error.get('ctx', {}).get('tag')} is no mechanism of this installation; "
                f"install the package that has it, or update Headway: {RegisteredTypes.hint}"
            ) from None
        raise WeightsError(
            f"{path}: not the config.json of exported weights ({where}: {error['msg']}); name a folder written by "
            f"`headway export RUN --to safetensors` or `headway import`"
        ) from None


def verify_exported(folder: Path, config: ExportedConfig) -> None:
    """Raises WeightsError unless every file of config.json is there with its size and hash."""
    for name, entry in config.files.items():
        path = folder / name
        if (size := regular_size(path)) != entry.bytes:
            raise WeightsError(f"{path}: {size} bytes, config.json says {entry.bytes}; export or import it anew")
        if sha256_of(path) != entry.sha256:
            raise WeightsError(f"{path}: its contents changed (sha256 differs); export or import it anew")


def sha256_of(path: Path) -> str:
    """Hexadecimal, of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def regular_size(path: Path) -> int:
    """Bytes of a file. Raises WeightsError where it is missing, a link, or no regular file."""
    try:
        found = path.lstat()
    except OSError as e:
        raise WeightsError(f"{path}: {e.strerror}; restore it, or name another folder") from None
    if stat.S_ISLNK(found.st_mode):
        raise WeightsError(
            f"{path}: is a link, and links are not followed; copy the folder with `cp -rL FOLDER COPY` and name "
            f"the copy, or put the file itself there"
        )
    if not stat.S_ISREG(found.st_mode):
        raise WeightsError(f"{path}: is no file; restore it, or name another folder")
    return found.st_size


def read_small(path: Path) -> str:
    """Text of a JSON file. Raises WeightsError, also for one of more than `MAX_JSON_BYTES`."""
    size = regular_size(path)
    if size > MAX_JSON_BYTES:
        raise WeightsError(f"{path}: {size} bytes, more than {MAX_JSON_BYTES}; is it the right file?")
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
        raise WeightsError(f"{path}: holds no JSON object; restore it, or name another folder")
    return value


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a folder by name, from model.safetensors or the shards its index names, read when asked for.

    Raises WeightsError where files are missing, cut off, links, or differ from the index.
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
                f"{folder / INDEX}: does not agree with {name} about the tensor {key[:200]!r}; restore both"
            )

    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX
        where = read_mapping(path).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise WeightsError(f"{path}: has no weight_map; restore it, or name another folder")
        for name in where.values():
            if not isinstance(name, str) or _SHARD.fullmatch(name) is None:
                raise WeightsError(f"{path}: {str(name)[:200]!r} names no safetensors file beside it; restore it")
        return where

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            regular_size(path)
            try:
                self._open[name] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError, ValueError) as e:
                raise WeightsError(f"{path}: not a whole safetensors file ({e}); restore it") from None
        return self._open[name]

    def _keys(self, name: str) -> list[str]:
        return list(self._file(name).keys())

    def __getitem__(self, key: str) -> Tensor:
        try:
            return self._file(self._where[key]).get_tensor(key)
        except (SafetensorError, OSError) as e:
            raise WeightsError(f"{self.folder / self._where[key]}: {key} cannot be read ({e}); restore it") from None

    def shape(self, key: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return tuple(self._file(self._where[key]).get_slice(key).get_shape())

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises WeightsError unless these, and no others, are the tensors and their shapes."""
        missing, extra = sorted(set(shapes) - set(self)), sorted(set(self) - set(shapes))
        if missing or extra:
            raise WeightsError(
                f"{self.folder}: not the tensors of its config.json (missing {missing[:3]}, unknown {extra[:3]}); "
                f"restore the folder, or name another"
            )
        for name, shape in shapes.items():
            if self.shape(name) != tuple(shape):
                raise WeightsError(
                    f"{self.folder}: {name} is {list(self.shape(name))}, its config.json makes it {list(shape)}; "
                    f"restore the folder, or name another"
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], *, max_shard_bytes: int) -> list[str]:
    """Write model.safetensors, or shards of at most `max_shard_bytes` and their index; returns the files' names.

    A tensor that is larger than that has a shard of its own.
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
        except SafetensorError as e:  # a full disk reaches us as this
            raise OSError(None, str(e), os.fspath(folder / name)) from None
        (folder / name).chmod(folder.stat().st_mode & 0o666)  # the library leaves it to its owner alone
    if len(shards) == 1:
        return names
    where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    return [*names, INDEX]


def write_exported(folder: Path, config: ExportedConfig, files: list[str]) -> None:
    """config.json with size and hash of `files`, which stand in the folder already."""
    entries = {
        name: FileEntry(bytes=regular_size(folder / name), sha256=sha256_of(folder / name)) for name in sorted(files)
    }
    write_json(folder / CONFIG, config.model_copy(update={"files": entries}).model_dump(mode="json"))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
