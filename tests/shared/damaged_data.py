"""A small dataset, what reads it, and how to damage it."""

import contextlib
import hashlib
import json
import os
import random
from pathlib import Path

from headway.data.config import DataConfig, MdsSource
from headway.data.corpus.config import CorpusConfig
from headway.data.loader import Loader
from headway.data.manifest import canonical_json, hash_file
from headway.launcher.spec.load import load_spec

GLOBAL_BATCH, SEQ_LEN, EPOCH = 8, 32, 140


def corpus(folder: Path, documents: int, **tokenizer) -> CorpusConfig:
    chance = random.Random(0)
    words = ["the", "of", "and", "to", "in", "was", "that", "they", "from", "heat"]
    texts = [" ".join(chance.choices(words, k=chance.choice([5, 40, 300, 1500]))) + f" {n}." for n in range(documents)]
    path = folder / f"{documents}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {
        "name": "tiny",
        "corpus": {"type": "jsonl", "paths": [str(path)]},
        "tokenizer": {"type": "train_bpe", "vocab_size": 300, **tokenizer},
        "validation_fraction": 0.2,
        "shard_bytes": 4096,
    }
    return CorpusConfig.model_validate(settings)


def config(root: Path, **changes) -> DataConfig:
    remote = changes.pop("remote", None)
    source = MdsSource(type="mds", path=str(root), remote=None if remote is None else str(remote))
    settings = {"seq_len": SEQ_LEN, "workers": 0, "shuffle_window": 2, "retry_s": 0.2, "timeout_s": 20}
    return DataConfig(source=source, **(settings | changes))


def loader(cfg: DataConfig, rank: int = 0, ranks: int = 1, **kwargs) -> Loader:
    settings = {"split": "train", "global_batch": GLOBAL_BATCH, "micro_batch": 2}
    return Loader(cfg, **settings, dp_rank=rank, dp_size=ranks, **kwargs)


def digests(cfg: DataConfig, steps: int = 40, start: int = 0) -> list[int]:
    with loader(cfg, start_step=start) as batches:
        return [next(batches).digest for _ in range(steps)]


def spec_of(root: Path, folder: Path, *overrides: str):
    path = folder / "spec.yaml"
    path.write_text(
        f"""
model: {{width: 32, layers: 2, ffn_width: 48}}
attention: {{type: gqa, heads: 4, kv_heads: 2, head_dim: 8}}
data: {{seq_len: {SEQ_LEN}, source: {{type: mds, path: {root}}}}}
optimizer: {{lr: 1e-3}}
train: {{tokens: 10240, global_batch: {GLOBAL_BATCH}, micro_batch: 2, validation_tokens: 512}}
run_dir: {folder / "run"}
"""
    )
    return load_spec(path, overrides).spec


def reseal(root: Path) -> None:
    """Update the manifest to match the files, as a careful attacker would."""
    content = json.loads((root / "MANIFEST.json").read_text())
    content["files"] = {name: hash_file(root / name).model_dump() for name in content["files"]}
    keys = ("schema_version", "train", "validation", "tokenizer_sha256", "vocab_size", "eos_id", "dtype", "files")
    content["fingerprint"] = hashlib.sha256(canonical_json({key: content[key] for key in keys})).hexdigest()
    (root / "MANIFEST.json").write_text(json.dumps(content))


def flip_a_bit(path: Path, at: float = 0.5) -> None:
    """Flip a bit in place, without changing size and modification time."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(int(before.st_size * at))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(path: Path, left: int | None = None) -> None:
    os.truncate(path, path.stat().st_size - 7 if left is None else left)


def edit_index(path: Path, change) -> None:
    index = json.loads(path.read_text())
    change(index["shards"])
    path.write_text(json.dumps(index))


def link_out(path: Path) -> None:
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


@contextlib.contextmanager
def somebody_else(folder: Path):
    """Run as an unprivileged user, because root can read all files."""
    if os.geteuid() != 0:
        yield
        return
    for path in [*folder.rglob("*"), folder]:
        os.chown(path, 65534, 65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
