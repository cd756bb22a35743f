"""Shards are written byte for byte as by mosaicml-streaming, without its import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from headway.data.corpus.config import CorpusConfig
from headway.data.mds import _shard_info
from headway.data.shard import ShardWriter
from headway.data.streaming_import import import_streaming


def documents(dtype: str, lengths: list[int]) -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    top = int(np.iinfo(dtype).max) + 1
    return [(f"straße/{n}", rng.integers(0, top, length).astype(dtype)) for n, length in enumerate(lengths)]


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize(
    "lengths",
    [
        [],
        [1, 255, 256, 65_535, 65_536, 3],
        [20_000, 1, 1],  # the first is larger than a shard
        [400] * 100 + [9_000] * 3,
    ],
    ids=["empty", "widths", "huge", "many"],
)
def test_files_are_those_of_the_library(
    lengths: list[int], dtype: str, compression: str | None, tmp_path: Path
) -> None:
    columns = {"id": "str", "tokens": f"ndarray:{dtype}"}
    theirs = import_streaming().MDSWriter(
        columns=columns,
        out=str(tmp_path / "theirs"),
        compression=compression,
        hashes=["sha1", "xxh64"],
        size_limit=20_000,
    )
    ours = ShardWriter(tmp_path / "ours", dtype=np.dtype(dtype), compression=compression, shard_bytes=20_000)
    with theirs, ours:
        for name, tokens in documents(dtype, lengths):
            theirs.write({"id": name, "tokens": tokens})
            ours.write(name, tokens)
    found = [{path.name: path.read_bytes() for path in (tmp_path / who).iterdir()} for who in ("theirs", "ours")]
    assert "index.json" in found[0]
    assert found[0] == found[1]


def test_a_failed_split_has_no_index(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "split", dtype=np.dtype("uint16"), compression=None, shard_bytes=1000)
    with pytest.raises(KeyError), writer:
        writer.write("a", np.ones(3, dtype="uint16"))
        raise KeyError
    assert not (tmp_path / "split" / "index.json").exists()


BUILD = """
import sys
from headway.launcher.cli.main import main
assert main(["data", "build", sys.argv[1]]) == 0
slow = {"torch", "streaming", "torchvision", "boto3", "deepspeed", "transformers", "matplotlib", "scipy", "pyarrow"}
print("imported:", sorted(slow & set(sys.modules)))
"""


@pytest.mark.parametrize("size", [1 << 32, 5_000_000_000])
def test_a_shard_is_never_larger_than_its_offsets_can_count(size: int) -> None:
    """They are uint32. The reader refuses a larger shard, after a build of hours."""
    index = {"version": 2, "format": "mds", "column_names": ["id", "tokens"], "column_sizes": [None, None]}
    raw = {"basename": "shard.00000.mds", "bytes": size, "hashes": {"xxh64": ""}}
    entry = {**index, "column_encodings": ["str", "ndarray:uint16"], "compression": None, "raw_data": raw, "samples": 1}
    with pytest.raises(ValueError, match=f"1 samples in {size} bytes"):
        _shard_info(entry, ["str", "ndarray:uint16"])
    settings = {"name": "large", "corpus": {"type": "stdlib"}, "tokenizer": {"type": "train_bpe", "vocab_size": 300}}
    with pytest.raises(ValidationError, match=r"shard_bytes\n.* less than 4294967296"):
        CorpusConfig.model_validate({**settings, "shard_bytes": size})
    most = CorpusConfig.model_validate({**settings, "shard_bytes": (1 << 32) - 1}).shard_bytes
    raw["bytes"] = most
    assert _shard_info(entry, ["str", "ndarray:uint16"]).raw_bytes == most


def test_data_build_imports_nothing_slow(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for n in range(40):
        (tmp_path / "text" / f"{n}.txt").write_text(f"Text number {n} of a small corpus.\n" * 5, encoding="utf-8")
    spec = tmp_path / "tiny.yaml"
    spec.write_text(
        f"name: tiny\ncorpus: {{type: text, paths: ['{tmp_path / 'text'}']}}\n"
        "tokenizer: {type: train_bpe, vocab_size: 300}\nvalidation_fraction: 0.2\n"
        f"out: {tmp_path / 'out'}\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, "-P", "-c", BUILD, str(spec)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported: []"
