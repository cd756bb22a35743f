"""A token id beyond the vocabulary is an error that names the shard and the sample, in every layout."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from headway.data.build import build
from headway.data.config import DataConfig, DataError, MdsSource
from headway.data.corpus.config import CorpusConfig
from headway.data.loader import Loader, validation_batches
from headway.data.manifest import Split, canonical_json, hash_file, read_manifest
from headway.data.mds import MdsSplit
from headway.data.verify import verify


def reseal(root: Path, **changes: Any) -> None:
    """Make the index and the manifest agree with the shards again, as another program that writes datasets would."""
    for split in ("train", "validation"):
        index = json.loads((root / split / "index.json").read_text())
        for entry in index["shards"]:
            data = (root / split / entry["raw_data"]["basename"]).read_bytes()
            entry["raw_data"]["hashes"] = {
                "sha1": hashlib.sha1(data).hexdigest(),
                "xxh64": xxhash.xxh64(data).hexdigest(),
            }
        (root / split / "index.json").write_text(json.dumps(index))
    content = json.loads((root / "MANIFEST.json").read_text()) | changes
    content["files"] = {name: hash_file(root / name).model_dump() for name in content["files"]}
    keys = ("schema_version", "train", "validation", "tokenizer_sha256", "vocab_size", "eos_id", "dtype", "files")
    content["fingerprint"] = hashlib.sha256(canonical_json({key: content[key] for key in keys})).hexdigest()
    (root / "MANIFEST.json").write_text(json.dumps(content))


def put_token(root: Path, split: Split, value: int) -> str:
    """Replace the first token of the last document of the second shard. Returns the message's beginning."""
    documents = MdsSplit(root, split)
    document = int(documents.first_document[2]) - 1
    row = document - int(documents.first_document[1])
    id, length = documents.id(document), int(documents.lengths[document])
    path = root / split / documents.shards[1].raw_name
    data = bytearray(path.read_bytes())
    at = len(data) - length * 2
    data[at : at + 2] = np.array([value], dtype="<u2").tobytes()
    path.write_bytes(data)
    reseal(root)
    return f"{path}: sample {row} ({id}) has the token id {value:,}, but the vocabulary has 300 tokens"


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def reading(root: Path, **changes: Any) -> DataConfig:
    return DataConfig.model_validate(
        {"source": {"type": "mds", "path": str(root)}, "seq_len": 32, "workers": 0, "shuffle_window": 2} | changes
    )


def test_the_manifest_has_the_largest_id_and_it_must_be_in_the_vocabulary(copy: Path) -> None:
    manifest = read_manifest(copy)
    largest = max(
        int(split.tokens(n).max())
        for split in (MdsSplit(copy, "train"), MdsSplit(copy, "validation"))
        for n in range(len(split))
    )
    assert manifest.max_token_id == largest < manifest.vocab_size
    for changes in ({"max_token_id": 300}, {"eos_id": 300}):
        reseal(copy, **changes)
        with pytest.raises(DataError, match="token ids go up to 300, beyond its vocabulary of 300"):
            verify(MdsSource(type="mds", path=str(copy)))
        reseal(copy, max_token_id=largest, eos_id=0)
    reseal(copy, max_token_id=None)  # an older manifest
    verify(MdsSource(type="mds", path=str(copy)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("value", [300, 65_535])
def test_a_batch_with_an_id_beyond_the_vocabulary_names_shard_and_sample(value: int, workers: int, copy: Path) -> None:
    says = put_token(copy, "train", value)
    verify(MdsSource(type="mds", path=str(copy)))  # every hash agrees
    with (
        Loader(reading(copy, workers=workers), split="train", global_batch=8, micro_batch=2, dp_rank=0, dp_size=1) as (
            batches
        ),
        pytest.raises(DataError) as caught,
    ):
        for _ in range(400):
            next(batches)
    assert str(caught.value).startswith(says)


def test_validation_is_checked_too(copy: Path) -> None:
    says = put_token(copy, "validation", 299)
    validation_batches(reading(copy), tokens=10**6, micro_batch=2, dp_rank=0, dp_size=1)
    says = put_token(copy, "validation", 301)
    with pytest.raises(DataError) as caught:
        validation_batches(reading(copy), tokens=10**6, micro_batch=2, dp_rank=0, dp_size=1)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("tensor", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_on_such_a_dataset_ends_with_65_in_every_layout(
    tensor: int, headway: Any, config: CorpusConfig
) -> None:
    build(config, out=headway.folder / "ds", progress=False)
    assert headway.folder.is_absolute()
    says = put_token(headway.folder / "ds", "train", 301)
    done = headway.train(
        "data.source={type: mds, path: ds}", f"launch.processes={tensor}", f"parallel.tensor={tensor}",
        "train.tokens=1e6", "train.validation_tokens=64",
    )  # fmt: skip
    assert done.returncode == 65, done.stderr
    assert says.split(": ", 1)[1] in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
