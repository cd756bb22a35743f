"""All readers in Headway of bytes that others may have written, each with valid examples."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import save_file

from headway.data import tokenizer as tokenizers
from headway.data.corpus.config import CorpusConfig, TrainTokenizer
from headway.data.manifest import Manifest, PairCounts, canonical_json, read_manifest
from headway.data.mds import read_index, read_lengths, read_prompts
from headway.launcher.base.errors import exit_code
from headway.launcher.compare.batch_hashes import compare_hashes
from headway.launcher.compare.cell_record import CellRecord, content_hash, read_record, record_of, record_text
from headway.launcher.compare.fairness import run_differences
from headway.launcher.hosts.faults import explain, read_pid, tail
from headway.launcher.hosts.place import Place, read_hostfile
from headway.launcher.hosts.processes import live_pid
from headway.launcher.hosts.wire import Wire
from headway.launcher.run.heartbeat import read_beat
from headway.launcher.run.records import last_progress, read_run
from headway.launcher.run.resolve import check_same_data
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.load import format_config, load_spec
from headway.launcher.spec.yamlio import load_yaml
from headway.launcher.study.config import load_study
from headway.model.huggingface import folder as hf
from headway.parallel import checkpoint
from headway.parallel import manifest as manifests
from headway.parallel.tensors.image import SPANS

ROOT = Path(__file__).resolve().parents[2]

NAMES = (
    *("spec", "study", "corpus spec", "overrides", "hostfile"),
    *("data manifest", "MDS index", "document lengths", "prompt lengths", "tokenizer"),
    *("checkpoint manifest", "checkpoint tensors", "checkpoint spans", "exported config", "exported tensors"),
    *("metrics", "metrics record", "heartbeat", "run card", "resolved spec", "cell record", "wire"),
)
"""Names of `targets`, in order."""

SPEC = """name: tiny
run_dir: runs/tiny
model: {width: 32, layers: 2, ffn_width: 48, init_std: 0.05}
attention:
  type: rgqa
  heads: 4
  kv_heads: 2
  head_dim: 8
  top_k: 1
  balance: {f_p: 0, loss_free_rate: 1e-3}
data:
  seq_len: 32
  source: {type: synthetic, task: mqar, vocab_size: 32, pairs: 4, queries: 4}
optimizer: {lr: 3.0e-3, betas: [0.9, 0.95]}
schedule: {warmup_tokens: 512}
train: {tokens: 10_240, global_batch: 8, micro_batch: 2}
checkpoint: {every_tokens: 1280}
launch: {processes: 1, threads: 1, env: {HF_HOME: null}}
"""
STUDY = """study: small
base: base.yaml
baseline: gqa
match: {quantity: params, free: model.ffn_width, multiple: 4, tolerance: 0.25%}
seeds: [1, 2]
variants:
  gqa: {attention: {type: gqa, heads: 4, kv_heads: 2, head_dim: 8}}
  mha: {attention.type: mha, attention.heads: 4, attention.head_dim: 8}
"""
CORPUS = """name: mine
corpus: {type: jsonl, paths: [a.jsonl, "b/*.gz"], field: text}
tokenizer: {type: train_bpe, vocab_size: 4096}
validation_fraction: 0.05
"""
OVERRIDES = """train.tokens=1e6
attention={type: gqa, heads: 4, kv_heads: 2, head_dim: 8}
launch.env={A: b}
optimizer.betas=[0.9, 0.99]
"""


@dataclass(frozen=True)
class Target:
    """One reader. `read` takes an input and returns the outcome, or raises. `seal`: see `fuzz_mutate.mutated`."""

    name: str
    read: Callable[[bytes], str]
    good: list[bytes]
    tree: Callable[[bytes], Any] | None = None
    seal: Callable[[Any], None] | None = None
    text: bool = True
    trees: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trees.extend(self.tree(data) if self.tree is not None else None for data in self.good)


def targets(folder: Path) -> list[Target]:
    """All targets. They write into `folder`, which must be the working directory, because specs name files in it."""
    return [*_yaml(folder), *_data(folder), *_weights(folder), *_run(folder)]


# ---------------------------------------------------------------- files of users


def _yaml(folder: Path) -> list[Target]:
    file = folder / "input.yaml"
    (folder / "base.yaml").write_text(SPEC)
    (folder / "tree.yaml").write_text("")

    def plain(data: bytes) -> Any:
        (folder / "tree.yaml").write_bytes(data)
        return load_yaml(folder / "tree.yaml").plain()

    def spec(data: bytes) -> str:
        file.write_bytes(data)
        format_config(load_spec("input.yaml"))
        return "accepted"

    def study(data: bytes) -> str:
        file.write_bytes(data)
        load_study(Path("input.yaml"))
        return "accepted"

    def corpus(data: bytes) -> str:
        file.write_bytes(data)
        load_spec("input.yaml", root=CorpusConfig)
        return "accepted"

    def overrides(data: bytes) -> str:
        load_spec("base.yaml", data.decode("utf-8", "surrogateescape").split("\n"))
        return "accepted"

    hosts = load_spec(
        "base.yaml",
        ["launch={method: deepspeed, hosts: 2, processes: 2, address: a, hostfile: input.txt}", "train.global_batch=8"],
    ).spec

    def hostfile(data: bytes) -> str:
        (folder / "input.txt").write_bytes(data)
        read_hostfile(hosts)
        return "accepted"

    based = b"base: base.yaml\nname: other\nattention: {type: mha, heads: 4, head_dim: 8}\ntrain.tokens: 2048\n"
    return [
        Target("spec", spec, [SPEC.encode(), based], plain),
        Target("study", study, [STUDY.encode()], plain),
        Target("corpus spec", corpus, [CORPUS.encode()], plain),
        Target("overrides", overrides, [OVERRIDES.strip().encode()]),
        Target("hostfile", hostfile, [b"# rack 1\na slots=2\nb.example slots=2  # spare\n"]),
    ]


# ---------------------------------------------------------------- files of a dataset


def _data(folder: Path) -> list[Target]:
    root = folder / "dataset"
    (root / "train").mkdir(parents=True)
    raw = {"basename": "shard.00000.mds", "bytes": 4096, "hashes": {"xxh64": "0" * 16}}
    entry = {
        **{"version": 2, "format": "mds", "column_names": ["id", "tokens"], "column_sizes": [None, None]},
        **{"column_encodings": ["str", "ndarray:uint16"], "compression": None, "zip_data": None, "hashes": ["xxh64"]},
        **{"raw_data": raw, "samples": 3, "size_limit": 4096},
    }
    packed = {**entry, "compression": "zstd", "zip_data": {**raw, "basename": "shard.00000.mds.zstd"}}
    index = {"version": 2, "shards": [entry, {**packed, "samples": 2}]}
    names = ["tokenizer.json", "train/shard.00000.mds", "train/shard.00000.mds.zstd", "train/index.json"]
    manifest = {
        **{
            "schema_version": 1,
            "name": "tiny",
            "settings": {"name": "tiny"},
            "source_fingerprint": "x",
            "python": None,
        },
        **{"train": {"documents": 5, "tokens": 15, "text_bytes": 60}, "left_out": {}},
        **{"validation": {"documents": 1, "tokens": 3, "text_bytes": 12}, "tokenizer_sha256": "0" * 64},
        **{"vocab_size": 300, "eos_id": 0, "dtype": "uint16", "unigram_entropy_nats": 4.0},
        **{"validation_bytes_per_token": 4.0, "files": {n: {"bytes": 9, "xxh3_64": "0" * 16} for n in names}},
    }

    def seal(tree: Any) -> None:
        keys = ("schema_version", "train", "validation", "tokenizer_sha256", "vocab_size", "eos_id", "dtype", "files")
        tree["fingerprint"] = hashlib.sha256(canonical_json({key: tree[key] for key in keys})).hexdigest()

    seal(manifest)
    known = Manifest.model_validate(manifest)
    lengths = io.BytesIO()
    np.save(lengths, np.arange(1, 6, dtype="<u4"))
    sizes, prompts = np.arange(4, 9), io.BytesIO()
    np.save(prompts, np.arange(2, 7, dtype="<u4"))
    counts = {"train_target_tokens": 10, "validation_target_tokens": 1, "validation_target_bytes": 1}
    of_pairs = known.model_copy(update={"pairs": PairCounts(separator="|", separator_ids=[7], **counts)})
    vocabulary = folder / "tokenizer.json"
    tokenizers.train(TrainTokenizer(type="train_bpe", vocab_size=270), ["the heat"] * 9, out=vocabulary, progress=False)

    def read(name: str, parse: Callable[[], Any]) -> Callable[[bytes], str]:
        def run(data: bytes) -> str:
            (root / name).write_bytes(data)
            parse()
            return "accepted"

        return run

    def tokenizer() -> None:
        tokenizers.vocab_size_of(root / "tokenizer.json")
        tokenizers.load(root / "tokenizer.json").encode(["the heat <|endoftext|>"])

    return [
        Target(
            "data manifest",
            read("MANIFEST.json", lambda: read_manifest(root)),
            [json.dumps(manifest, indent=1).encode()],
            json.loads,
            seal,
        ),
        Target(
            "MDS index",
            read("train/index.json", lambda: read_index(root, "train", known)),
            [json.dumps(index, indent=1).encode()],
            json.loads,
        ),
        Target(
            "document lengths",
            read("train/lengths.npy", lambda: read_lengths(root, "train", known)),
            [lengths.getvalue()],
            text=False,
        ),
        Target(
            "prompt lengths",
            read("train/prompts.npy", lambda: read_prompts(root, "train", of_pairs, sizes)),
            [prompts.getvalue()],
            text=False,
        ),
        Target("tokenizer", read("tokenizer.json", tokenizer), [vocabulary.read_bytes()], json.loads),
    ]


# ---------------------------------------------------------------- weights


def _weights(folder: Path) -> list[Target]:
    root = folder / "checkpoints"
    step = root / "step-0000000007"
    step.mkdir(parents=True)
    module = torch.nn.Linear(2, 2)
    tensors = {f"param/{name}": value.detach() for name, value in module.named_parameters()}
    name = "tensors-00000-of-00001.safetensors"
    save_file(tensors, step / name)
    whole = (step / name).read_bytes()

    def entry(data: bytes) -> dict[str, Any]:
        return {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data), "tensors": sorted(tensors)}

    def seal(outer: Any) -> None:
        outer["xxh3_128"] = manifests.own_hash(outer["manifest"])

    def outer(data: bytes) -> dict[str, Any]:
        layout = {"tensor": 1, "context": 1, "data": 1, "pipeline": 1}
        state = {"tokens": 7, "applied_steps": 7}
        manifest = {
            "format": manifests.FORMAT,
            "step": 7,
            "layout": layout,
            "state": state,
            "files": {name: entry(data)},
            "about": {"run": "ab"},
        }
        made = {"manifest": manifest}
        seal(made)
        return made

    def manifest(data: bytes) -> str:
        (step / manifests.MANIFEST).write_bytes(data)
        (step / name).write_bytes(whole)
        return load()

    def tensor_file(data: bytes) -> str:
        (step / name).write_bytes(data)
        (step / manifests.MANIFEST).write_text(json.dumps(outer(data)))
        return load()

    def load() -> str:
        found = checkpoint.newest_readable(root, warn=lambda text: None, run=None)
        checkpoint.load_weights(found, module)
        return "accepted"

    exported = folder / "exported"
    exported.mkdir()
    save_file({"a": torch.zeros(2), "b": torch.ones(2, 2)}, exported / hf.WEIGHTS)
    good = (exported / hf.WEIGHTS).read_bytes()

    def config(data: bytes) -> str:
        (exported / hf.CONFIG).write_bytes(data)
        hf.read_exported(exported)
        return "accepted"

    def files(data: bytes) -> str:
        (exported / hf.WEIGHTS).write_bytes(data)
        found = hf.TensorFiles(exported)
        for key in found:
            found[key]
        return "accepted"

    written = load_spec("base.yaml").spec
    said = {
        **{"format": hf.FORMAT, "version": 1, "source": "a run", "vocab_size": 32, "seq_len": 32, "tokens": 7},
        **{"model": written.model.model_dump(mode="json"), "attention": written.attention.model_dump(mode="json")},
        **{"bos_token_id": None, "eos_token_id": None, "files": {hf.WEIGHTS: {"bytes": 9, "sha256": "0" * 64}}},
    }
    return [
        Target("checkpoint manifest", manifest, [json.dumps(outer(whole), indent=1).encode()], json.loads, seal),
        Target("checkpoint tensors", tensor_file, [whole], text=False),
        _spans(folder / "parts"),
        Target("exported config", config, [json.dumps(said, indent=1).encode()], json.loads),
        Target("exported tensors", files, [good], text=False),
    ]


def _spans(root: Path) -> Target:
    """A checkpoint of two files that share a matrix, and the description of the part in the first one."""
    step, module = root / "step-0000000007", torch.nn.Linear(2, 2, bias=False)
    step.mkdir(parents=True)

    def spans(data: bytes) -> str:
        files = {}
        for name, said in (("a", data.decode(errors="replace")), ("b", json.dumps(said_of(2)))):
            save_file({"param/weight": torch.zeros(2)}, step / name, metadata={SPANS: said})
            size, digest = (step / name).stat().st_size, manifests.file_hash(step / name)
            files[name] = {"bytes": size, "xxh3_128": digest, "tensors": [], "spans": 1}
        manifest = {"format": manifests.FORMAT, "step": 7, "layout": {}, "state": {}, "files": files, "about": {}}
        sealed = {"manifest": manifest, "xxh3_128": manifests.own_hash(manifest)}
        (step / manifests.MANIFEST).write_text(json.dumps(sealed))
        found = checkpoint.newest_readable(root, warn=lambda text: None, run=None)
        checkpoint.load_weights(found, module)
        return "accepted"

    def said_of(start: int) -> dict[str, Any]:
        return {"param/weight": {"shape": [2, 2], "dim": 0, "ranks": 1, "rank": 0, "start": start}}

    return Target("checkpoint spans", spans, [json.dumps(said_of(0)).encode()], json.loads)


# ---------------------------------------------------------------- files of a run folder, and messages of other hosts


def _run(folder: Path) -> list[Target]:
    spec = load_spec("base.yaml").spec
    run = RunDir(folder / "run")
    run.logs.mkdir(parents=True)
    run.adopt(spec)
    place = Place(host=0, hosts=1, processes=1, name="here")
    saved = run.spec.read_bytes()

    def metrics(data: bytes) -> str:
        run.metrics.write_bytes(data)
        found = sum(1 for _ in run.read_metrics())
        read_run(run.path)
        last_progress(run.path)
        run.cut_metrics(last_step=2)
        return "accepted" if found else "nothing in it"

    def beat(data: bytes) -> str:
        for name in ("rank-0.beat", "rank-0.pid", "rank-0.error.json", "rank-0.log", "host-0.log"):
            (run.logs / name).write_bytes(data)
        found = read_beat(run.logs / "rank-0.beat")
        assert live_pid(run, 0) is None
        assert len(read_pid(run, 0)) <= 20 and len(tail(run.logs / "rank-0.log")) <= 12
        explain(run, place, 1, signalled=False, died={0: 1})
        return "accepted" if found else "nothing in it"

    def card(data: bytes) -> str:
        for path in (run.card, run.summary):
            path.write_bytes(data)
        run.is_complete()
        read_run(run.path)
        check_same_data(run, {"fingerprint": None})
        return "accepted"

    def resolved(data: bytes) -> str:
        run.spec.write_bytes(data)
        try:
            run.adopt(spec)
        finally:
            run.spec.write_bytes(saved)
        return "accepted"

    kept = folder / "record.json"

    def cell(data: bytes) -> str:
        kept.write_bytes(data)
        found = read_record(kept)
        if not isinstance(found, CellRecord):
            return "nothing in it"
        int(found.run.tokens)
        compare_hashes(found.steps.hashes, {1: "ab"})
        run_differences({found.key: found.run})
        return "accepted"

    def sealed(tree: Any) -> None:
        tree["sha256"] = content_hash(tree)

    def wire(data: bytes) -> str:
        ours, theirs = socket.socketpair()
        end, count = Wire(ours), 0
        for at in range(0, len(data), 1 << 16):
            if end.closed:  # it closed the connection after an invalid message
                break
            theirs.sendall(data[at : at + (1 << 16)])
            while end.take() is not None:
                count += 1
        theirs.close()
        while end.take() is not None:
            count += 1
        end.close()
        return "accepted" if count else "nothing in it"

    record = {"kind": "train", "step": 1, "tokens": 256, "loss": 3.4, "train_s": 0.5, "step_s": 0.1, "data_s": 0.01}
    records = [record, {**record, "step": 2, "batch_hash": "ab"}, {"kind": "validation", "step": 2, "loss": 3.1}]
    lines = "".join(json.dumps(r) + "\n" for r in records).encode()
    beats = json.dumps({"rank": 0, "host": "here", "section": "step", "step": 3, "time_s": 1.5}).ljust(512).encode()
    error = json.dumps({"rank": 0, "exit_code": 74, "type": "OSError", "message": "full"}).encode()
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    run.metrics.write_bytes(lines)
    run.card.write_text(json.dumps({"tokens_per_step": 256, "versions": {"torch": "2"}, "attempts": [{}]}))
    run.summary.write_text(json.dumps({"complete": True, "final_validation_loss": 3.1}))
    record_file = record_text(record_of(run.path, key="gqa/seed-1", variant="gqa", seed=1, budget=1.0)).encode()
    for path in (run.metrics, run.card, run.summary):
        path.unlink()
    return [
        Target("metrics", metrics, [lines]),
        Target("metrics record", metrics, [json.dumps(r).encode() for r in records], json.loads),
        Target("heartbeat", beat, [beats, error, b"12345"], json.loads),
        Target("run card", card, [json.dumps({"data_fingerprint": None, "complete": False}).encode()], json.loads),
        Target("resolved spec", resolved, [saved], json.loads),
        Target("cell record", cell, [record_file], json.loads, sealed),
        Target("wire", wire, [b'{"host": 1, "name": "b"}\n{"try": [[1, "10.0.0.1", 3]], "limit_s": 2}\n']),
    ]


def outcome(target: Target, data: bytes) -> str:
    """Outcome of an input: `accepted`, `exit 64`, ... Raises exceptions that are not Headway's errors."""
    try:
        return target.read(data)
    except Exception as error:
        if exit_code(error) not in (64, 65, 66, 74):
            raise
        return f"exit {exit_code(error)}"
