"""What is measured of a checkout: one class per subject, each with its preparation and one round.

A round returns numbers by name. `ROWS` says what the numbers mean.
"""

from __future__ import annotations

import json
import random
import statistics
import sysconfig
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tree import Tree

BASE = "yaml/base/quickstart.yaml"
SIZE_47M = ["model.width=512", "model.layers=16", "model.ffn_width=1408", "attention.head_dim=64"]
ALONE = ["launch.threads=1", "launch.processes=1", "launch.device=cpu"]
SHORT = [
    "train.tokens=20480",
    "schedule.warmup_tokens=2048",
    "train.validate_every_tokens=20480",
    "checkpoint.every_tokens=20480",
]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measured number. `row`: its row in the table of losses. `goal`: the largest value that is good enough."""

    key: str
    row: int
    what: str
    unit: str
    goal: float | None = None


def dataset(tree: Tree, folder: Path) -> Path:
    """The standard library's source as a dataset of this checkout."""
    out = folder / "stdlib"
    if not out.exists():
        tree.headway(["data", "build", str(tree.root / "yaml/data/stdlib.yaml"), f"out={out}"], cwd=folder)
    return out


def train_words(tree: Tree, folder: Path, run: Path) -> list[str]:
    return [str(tree.root / BASE), f"data.source.path={dataset(tree, folder)}", f"run_dir={run}", *ALONE]


def records(run: Path, kind: str) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


class Subject(ABC):
    """Something that is measured of a checkout."""

    rows: tuple[Row, ...] = ()

    def prepare(self, tree: Tree, folder: Path) -> None:
        """Done once for each checkout, in its own folder."""
        dataset(tree, folder)

    @abstractmethod
    def round(self, tree: Tree, folder: Path, number: int) -> dict[str, float]:
        """One measurement: a number for the key of each row."""


class Start(Subject):
    """`headway train` of 20 steps: seconds to the first step, and from the last record to the end of the command."""

    rows: tuple[Row, ...] = (
        Row(key="first_step_s", row=2, what="`headway train`: from the command to the first step", unit="s", goal=3.0),
        Row(key="end_s", row=2, what='`headway train`: from "done" to the end of the command', unit="s"),
    )

    def round(self, tree: Tree, folder: Path, number: int) -> dict[str, float]:
        run = folder / f"start-{number}"
        ran = tree.headway(["train", *train_words(tree, folder, run), *SHORT], cwd=folder)
        done = ran.first(lambda line: line.startswith("done"))
        return {"first_step_s": ran.first(lambda line: line.startswith("step")), "end_s": ran.wall_s - done}


class Cells(Subject):
    """A study of two variants and two seeds, one cell at a time.

    A cell: from the end of the one before to its own end, without its training and validation. The rest of the study's
    wall time is the start of the first cell and the report.
    """

    rows: tuple[Row, ...] = (
        Row(key="overhead_s", row=1, what="a further cell of a study beside training, validation", unit="s", goal=1.0),
        Row(key="study_s", row=1, what="a study of 4 cells beside training, validation", unit="s"),
    )
    SEEDS, VARIANTS = (1, 2), ("gqa", "rgqa-k1")

    def round(self, tree: Tree, folder: Path, number: int) -> dict[str, float]:
        out, file = folder / f"study-{number}", folder / f"study-{number}.yaml"
        text = {
            "study": "speed",
            "base": str(tree.root / BASE),
            "out": str(out),
            "baseline": "gqa",
            "seeds": list(self.SEEDS),
            "variants": {
                "gqa": {"attention.type": "gqa"},
                "rgqa-k1": {"attention.type": "rgqa", "attention.top_k": 1},
            },
        }
        file.write_text(json.dumps(text), encoding="utf-8")
        words = [f"data.source.path={dataset(tree, folder)}", *ALONE, *SHORT]
        help_text = tree.headway(["study", "run", "--help"], cwd=folder).text()
        jobs = ["--jobs", "1"] if "--jobs" in help_text else []
        ran = tree.headway(["study", "run", str(file), *words, *jobs], cwd=folder)
        runs = [path.parent for path in out.rglob("metrics.jsonl")]
        assert len(runs) == len(self.SEEDS) * len(self.VARIANTS)
        runs.sort(key=lambda run: (run / "summary.json").stat().st_mtime_ns)
        ends = [(run / "summary.json").stat().st_mtime_ns / 1e9 for run in runs]
        inside = [
            records(run, "train")[-1]["train_s"] + sum(r["seconds"] for r in records(run, "validation")) for run in runs
        ]
        gaps = [after - before - own for before, after, own in zip(ends, ends[1:], inside[1:], strict=False)]
        return {"overhead_s": statistics.mean(gaps), "study_s": ran.wall_s - sum(inside)}


class Faults(Subject):
    """Training of 47M parameters: memory that goes back to the system and is faulted in again at every step."""

    rows: tuple[Row, ...] = (
        Row(key="faults", row=3, what="47M: page faults of a step", unit=""),
        Row(key="system_s", row=3, what="47M: system time of a step", unit="s"),
        Row(key="step_s", row=3, what="47M: a step of 1,024 tokens, one thread (rows 3, 4 and 13 together)", unit="s"),
    )
    FEW, MANY = 3, 9

    def round(self, tree: Tree, folder: Path, number: int) -> dict[str, float]:
        ran = []
        for steps in (self.FEW, self.MANY):
            run = folder / f"faults-{number}-{steps}"
            tokens = [f"train.tokens={steps * 1024}", "train.validate_every_tokens=1e9", "checkpoint.every_tokens=1e9"]
            words = [*train_words(tree, folder, run), *SIZE_47M, *tokens, "schedule.warmup_tokens=1024"]
            ran.append(tree.headway(["train", *words], cwd=folder))
        more = self.MANY - self.FEW
        return {
            "faults": (ran[1].minor_faults - ran[0].minor_faults) / more,
            "system_s": (ran[1].system_s - ran[0].system_s) / more,
            "step_s": statistics.median(record["step_s"] for record in records(run, "train")[2:]),
        }


class Step(Subject):
    """A step of 1,024 tokens at one size, with `words`: for pairs that differ in one key of the same checkout."""

    SIZES: ClassVar = {
        "1.2M": ([], 60),
        "11M": (["model.width=256", "model.layers=14", "model.ffn_width=704", "attention.head_dim=32"], 16),
        "47M": (SIZE_47M, 9),
    }

    def __init__(self, row: int, what: str, words: list[str], *, size: str) -> None:
        self.rows = (Row(key="step_s", row=row, what=f"{size}: a step of 1,024 tokens, one thread, {what}", unit="s"),)
        self._words, self._size = words, size

    def round(self, tree: Tree, folder: Path, number: int) -> dict[str, float]:
        run, (shape, steps) = folder / f"step-{number}", self.SIZES[self._size]
        tokens = [f"train.tokens={steps * 1024}", "train.validate_every_tokens=1e9", "checkpoint.every_tokens=1e9"]
        words = [*train_words(tree, folder, run), *shape, *tokens, "schedule.warmup_tokens=1024", *self._words]
        tree.headway(["train", *words], cwd=folder)
        return {"step_s": statistics.median(record["step_s"] for record in records(run, "train")[3:])}


class Build(Subject):
    """`data build` of 10 MB of JSON lines with a given tokenizer, and of one document of 20 MB."""

    rows: tuple[Row, ...] = (
        Row(key="import_s", row=6, what="`data build` of one document: wall time", unit="s"),
        Row(key="import_bytes", row=6, what="`data build` of one document: peak memory", unit="bytes"),
        Row(key="build_s", row=7, what="`data build`, 10 MB of JSON lines: wall time", unit="s"),
        Row(
            key="over_tokenizer",
            row=7,
            what="`data build`, 10 MB: CPU time / the tokenizer's alone",
            unit="x",
            goal=1.1,
        ),
        Row(key="long_s", row=7, what="`data build`, one document of 20 MB: wall time", unit="s"),
        Row(key="long_bytes", row=7, what="`data build`, one document of 20 MB: peak memory", unit="bytes"),
    )
    ENCODE = """
import json, sys, time
from tokenizers import Tokenizer
texts = [json.loads(line)["text"] for line in open(sys.argv[2], encoding="utf-8")]
tokenizer = Tokenizer.from_file(sys.argv[1])
cpu = time.process_time()
for i in range(0, len(texts), 256):
    [encoding.ids for encoding in tokenizer.encode_batch_fast(texts[i : i + 256], add_special_tokens=False)]
print(time.process_time() - cpu)
"""

    def prepare(self, tree: Tree, folder: Path) -> None:
        documents = list(_documents())
        short, size = [], 0
        for text in documents:
            if size < 10e6:
                short.append(text)
                size += len(text.encode())
        (folder / "short.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in short), encoding="utf-8")
        long, size = [], 0
        while size < 20e6:
            for text in documents:
                if size < 20e6:
                    long.append(text)
                    size += len(text.encode())
        # each split needs one document; the split is chosen by hash, so a few short ones stand beside the long one
        others = [f"{i}: a short document beside the long one." for i in range(64)]
        texts = ["\n".join(long), *others]
        (folder / "long.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
        (folder / "one.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in others), encoding="utf-8")
        dataset(tree, folder)

    def round(self, tree: Tree, folder: Path, number: int) -> dict[str, float]:
        tokenizer = dataset(tree, folder) / "tokenizer.json"
        ran = {}
        for name in ("one", "short", "long"):
            spec = {
                "name": name,
                "corpus": {"type": "jsonl", "paths": [str(folder / f"{name}.jsonl")]},
                "tokenizer": {"type": "file", "path": str(tokenizer)},
                "validation_fraction": 0.2 if name != "short" else 0.05,
                "out": str(folder / f"build-{name}-{number}"),
            }
            file = folder / f"build-{name}.yaml"
            file.write_text(json.dumps(spec), encoding="utf-8")
            ran[name] = tree.headway(["data", "build", str(file)], cwd=folder)
        encode = tree.python(self.ENCODE, [str(tokenizer), str(folder / "short.jsonl")], cwd=folder)
        return {
            "import_s": ran["one"].wall_s,
            "import_bytes": ran["one"].peak_bytes,
            "build_s": ran["short"].wall_s,
            "over_tokenizer": (ran["short"].cpu_s - ran["one"].cpu_s) / float(encode.lines[-1][1]),
            "long_s": ran["long"].wall_s,
            "long_bytes": ran["long"].peak_bytes,
        }


class Verify(Subject):
    """The start of a rank on an unchanged dataset of many small shards."""

    rows: tuple[Row, ...] = (
        Row(key="verify_s", row=9, what="verification of an unchanged dataset, per 10,000 shards", unit="s"),
        Row(key="open_s", row=9, what="opening the training split, per 10,000 shards", unit="s"),
    )
    DOCUMENTS = 5000
    OPEN = """
import sys, time
from headway.data.config import DataConfig
from headway.data.loader import open_source
from headway.data.verify import verify
config = DataConfig.model_validate({"seq_len": 64, "source": {"type": "mds", "path": sys.argv[1]}})
start = time.perf_counter()
verify(config.source, seq_len=64)
middle = time.perf_counter()
open_source(config, split="train")
print(middle - start, time.perf_counter() - middle)
"""

    def prepare(self, tree: Tree, folder: Path) -> None:
        numbers = random.Random(1)
        with (folder / "numbers.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(self.DOCUMENTS):  # each fills a shard
                file.write(json.dumps({"text": " ".join(str(numbers.randrange(10)) for _ in range(1900))}) + "\n")
        spec = {
            "name": "shards",
            "corpus": {"type": "jsonl", "paths": [str(folder / "numbers.jsonl")]},
            "tokenizer": {"type": "file", "path": str(dataset(tree, folder) / "tokenizer.json")},
            "shard_bytes": 4096,
            "out": str(folder / "shards"),
        }
        (folder / "shards.yaml").write_text(json.dumps(spec), encoding="utf-8")
        tree.headway(["data", "build", str(folder / "shards.yaml")], cwd=folder)
        self.round(tree, folder, -1)

    def round(self, tree: Tree, folder: Path, number: int) -> dict[str, float]:
        out = folder / "shards"
        shards = len(list(out.rglob("shard.*")))
        verify, opened = map(float, tree.python(self.OPEN, [str(out)], cwd=folder).lines[-1][1].split())
        return {"verify_s": verify * 1e4 / shards, "open_s": opened * 1e4 / shards}


class Saves(Subject):
    """Three saves of the 82M model with its optimizer, by `headway bench checkpoint` of each checkout."""

    rows: tuple[Row, ...] = (
        Row(key="stall_s", row=10, what="a save of the 82M model: training waits, per GB", unit="s", goal=0.15),
        Row(key="write_s", row=10, what="a save of the 82M model: until it is written, per GB", unit="s"),
    )

    def prepare(self, tree: Tree, folder: Path) -> None:
        """Nothing: the model reads synthetic data."""

    def round(self, tree: Tree, folder: Path, number: int) -> dict[str, float]:
        spec, out = tree.root / "yaml/bench/checkpoint-82m.yaml", folder / f"saves-{number}.json"
        words = ["bench", "checkpoint", str(spec), "launch.threads=1", "--rounds", "3", "--out", str(out)]
        tree.headway(words, cwd=folder)
        found = json.loads(out.read_text(encoding="utf-8"))
        return {key: found[key]["median"] / (found["bytes"] / 1e9) for key in ("stall_s", "write_s")}


class Decode(Subject):
    """`headway generate` of 2,000 and 8,000 tokens from an untrained model of 1.2M parameters."""

    rows: tuple[Row, ...] = (
        Row(key="token_2k_s", row=11, what="`generate`, 1.2M parameters, 2,000 tokens: time per token", unit="s"),
        Row(key="token_8k_s", row=11, what="`generate`, 1.2M parameters, 8,000 tokens: time per token", unit="s"),
        Row(key="whole_8k_s", row=11, what="`generate`, 8,000 tokens with printed text: wall time", unit="s"),
    )
    DECODE = """
import sys, time, torch
from pathlib import Path
try:
    from headway.launcher.exchange import generate as g
except ImportError:
    from headway.launcher import generate as g
torch.set_num_threads(1)
try:
    from headway.launcher.exchange.opened import open_model
    opened = open_model(Path(sys.argv[1]))
    model, codec, ids = opened.decoder, opened.codec, opened.codec.encode("import os")
except ImportError:
    model, codec, ids = g._of_run(g.RunDir(Path(sys.argv[1])), "import os")[:3]
for tokens in (2000, 8000):
    sampling, stats = g.Sampling(tokens=tokens, temperature=1.0, top_p=1.0, seed=1), {}
    start, seen = time.perf_counter(), 0
    printer = g._Printer(codec)
    for token in g.continuation(model, ids, sampling, eos_id=-1, stats=stats):
        if tokens == 8000:
            printer.put([token])
    printer.close()
    print()
    print("seconds", stats["decode_s"], time.perf_counter() - start)
"""

    def prepare(self, tree: Tree, folder: Path) -> None:
        words = [*train_words(tree, folder, folder / "decode"), *SHORT]
        tree.headway(["train", *words], cwd=folder)

    def round(self, tree: Tree, folder: Path, number: int) -> dict[str, float]:
        ran = tree.python(self.DECODE, [str(folder / "decode")], cwd=folder)
        said = [line.split() for _, line in ran.lines if line.startswith("seconds")]
        return {
            "token_2k_s": float(said[0][1]) / 2000,
            "token_8k_s": float(said[1][1]) / 8000,
            "whole_8k_s": float(said[1][2]),
        }


class HuggingFace(Subject):
    """Greedy tokens of one model, by transformers (`before`) and by Headway, alternately in one process."""

    rows: tuple[Row, ...] = (
        Row(key="token_s", row=11, what="1.2M parameters, greedy: time per token, transformers -> Headway", unit="s"),
    )
    DECODE = """
import sys, time, torch
from pathlib import Path
from headway.model.hidden import hidden
from headway.launcher.exchange import generate as g
from headway.launcher.exchange.opened import open_model
with hidden("torchvision"):
    from transformers import LlamaForCausalLM
torch.set_num_threads(1)
opened = open_model(Path(sys.argv[1]))
model, ids = opened.decoder, opened.codec.encode("import os")
theirs = LlamaForCausalLM.from_pretrained(sys.argv[2]).eval()
greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
def ours(tokens):
    sampling = g.Sampling(tokens=tokens, temperature=0, top_p=1, seed=1)
    return list(g.continuation(model, ids, sampling, eos_id=-1, stats={}))
def others(tokens):
    with torch.no_grad():
        out = theirs.generate(torch.tensor([ids]), max_new_tokens=tokens, **greedy)
    return out[0, len(ids):].tolist()
assert ours(64) == others(64)
for turn in range(5):
    for name, run in (("theirs", others), ("ours", ours)):
        start = time.perf_counter()
        assert len(run(1000)) == 1000
        print(name, (time.perf_counter() - start) / 1000)
"""

    def __init__(self, name: str) -> None:
        self._name = name

    def prepare(self, tree: Tree, folder: Path) -> None:
        words = [*train_words(tree, folder, folder / "decode"), *SHORT]
        tree.headway(["train", *words], cwd=folder)
        tree.headway(["export", str(folder / "decode"), str(folder / "hf"), "--to", "hf"], cwd=folder)

    def round(self, tree: Tree, folder: Path, number: int) -> dict[str, float]:
        ran = tree.python(self.DECODE, [str(folder / "decode"), str(folder / "hf")], cwd=folder)
        said = [line.split() for _, line in ran.lines if line.startswith(self._name)]
        return {"token_s": statistics.median(float(words[1]) for words in said)}


def _documents() -> list[str]:
    """Sources of the standard library, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    found = []
    for path in files:
        try:
            found.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    return [text for text in found if len(text) > 512]
