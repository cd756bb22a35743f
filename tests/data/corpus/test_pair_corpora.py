"""Corpora of pairs: files, the hub, articles and functions become datasets whose targets decode to their text."""

from __future__ import annotations

import bisect
import gzip
import json
import lzma
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zstandard
from pydantic import ValidationError

from headway.data import tokenizer
from headway.data.build import build
from headway.data.config import DataError, MdsSource
from headway.data.corpus.config import CorpusConfig, PairsCorpus, StdlibFunctionsCorpus
from headway.data.corpus.pairs import first_sentence, function_pairs
from headway.data.corpus.read import documents
from headway.data.manifest import MANIFEST_NAME, PROMPTS_NAME, SPLITS, hash_file, read_manifest, write_manifest
from headway.data.mds import MdsSplit
from headway.data.verify import verify, verify_contents, verify_source

PAIRS = [(f"{n} apples and {n % 7} pears, äöü\n" * (1 + n % 5), f"Fruit {n}: {n + n % 7}.") for n in range(60)]
FIELDS = {"type": "pairs", "prompt": "article", "target": "highlights"}


def jsonl_bytes(pairs: list[tuple[str, str]]) -> bytes:
    return "".join(json.dumps({"article": a, "highlights": b, "id": 1}) + "\n" for a, b in pairs).encode()


def written(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_bytes(jsonl_bytes(pairs))
    return path


def config(corpus: dict[str, Any], **changes: Any) -> CorpusConfig:
    settings = {"name": "pairs", "corpus": corpus, "tokenizer": {"type": "train_bpe", "vocab_size": 300}}
    return CorpusConfig.model_validate({**settings, "validation_fraction": 0.2, **changes})


def pairs_of(root: Path) -> dict[str, list[tuple[str, str, str]]]:
    """(prompt, separator, target) of every document of each split, decoded; the end token is checked."""
    manifest = read_manifest(root)
    assert manifest.pairs is not None
    codec = tokenizer.load(root / "tokenizer.json", eos_token="<|endoftext|>")
    found: dict[str, list[tuple[str, str, str]]] = {}
    between = len(manifest.pairs.separator_ids)
    for split in SPLITS:
        documents = MdsSplit(root, split)
        assert documents.prompts is not None
        for number, end in enumerate(documents.prompts.tolist()):
            ids = documents.tokens(number).tolist()
            assert ids[-1] == manifest.eos_id and manifest.eos_id not in ids[:-1]
            parts = ids[: end - between], ids[end - between : end], ids[end:-1]
            assert parts[1] == manifest.pairs.separator_ids
            prompt, separator, target = map(codec.decode, parts)
            found.setdefault(split, []).append((prompt, separator, target))
    return found


@pytest.fixture(scope="module")
def pairs_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    corpus = {**FIELDS, "paths": [str(written(folder / "pairs.jsonl", PAIRS))]}
    build(config(corpus, shard_bytes=4096), out=folder / "dataset")
    return folder / "dataset"


def test_prompts_and_targets_decode_to_their_text(pairs_dataset: Path) -> None:
    found = pairs_of(pairs_dataset)
    assert sorted((a, b) for part in found.values() for a, _, b in part) == sorted(PAIRS)
    assert {between for part in found.values() for _, between, _ in part} == {"\n\nSummary:\n"}
    manifest = read_manifest(pairs_dataset)
    assert manifest.pairs is not None and len(MdsSplit(pairs_dataset, "train").shards) > 1
    assert manifest.pairs.validation_target_bytes == sum(len(b.encode()) for _, _, b in found["validation"])
    info = verify(MdsSource(type="mds", path=str(pairs_dataset)))
    per_token = manifest.pairs.validation_target_bytes / manifest.pairs.validation_target_tokens
    assert info.validation_bytes_per_token == per_token and info.unigram_entropy_nats is None
    verify_contents(MdsSource(type="mds", path=str(pairs_dataset)))


def test_the_same_files_give_the_same_dataset_and_a_second_build_does_nothing(
    pairs_dataset: Path, tmp_path: Path
) -> None:
    cfg = config({**FIELDS, "paths": [str(pairs_dataset.parent / "pairs.jsonl")]}, shard_bytes=4096)
    assert build(cfg, out=tmp_path / "again").fingerprint == read_manifest(pairs_dataset).fingerprint
    said: list[str] = []
    build(cfg, out=tmp_path / "again", say=said.append)
    assert "nothing to do" in said[0]
    changed = config({**FIELDS, "paths": cfg.corpus.model_dump()["paths"], "separator": " ->"}, shard_bytes=4096)
    assert build(changed, out=tmp_path / "again").fingerprint != read_manifest(pairs_dataset).fingerprint


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet"])
def test_every_format_gives_the_same_pairs(ending: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain, other = written(tmp_path / "plain.jsonl", PAIRS), tmp_path / "folder" / f"pairs{ending}"
    other.parent.mkdir()
    if ending == ".parquet":
        columns = {"id": list(range(60)), "highlights": [b for _, b in PAIRS], "article": [a for a, _ in PAIRS]}
        pq.write_table(pa.table(columns), other, row_group_size=7)
    else:
        compress = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.ZstdCompressor().compress}
        other.write_bytes(compress[ending.rsplit(".")[-1]](plain.read_bytes()))
    texts = []
    for paths in (plain, other.parent):  # a folder stands for both formats
        found = [*documents(PairsCorpus.model_validate({**FIELDS, "paths": [str(paths)]}))]
        texts.append([(document.text, document.prompt_bytes) for document in found])
    assert texts[0] == texts[1] and len(texts[0]) == 60


def test_pairs_of_the_hub_are_those_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, subset: str | None, **kwargs: Any) -> list[dict[str, Any]]:
        asked.append((name, subset, kwargs["split"]))
        return [{"article": a, "highlights": b} for a, b in PAIRS]

    module = ModuleType("datasets")
    module.__dict__.update(load_dataset=load_dataset, config=SimpleNamespace(HF_DATASETS_OFFLINE=True))
    monkeypatch.setitem(sys.modules, "datasets", module)
    corpus = {**FIELDS, "dataset": "abisee/cnn_dailymail", "subset": "3.0.0"}
    found = [*documents(PairsCorpus.model_validate(corpus))]
    assert [d.text.decode() for d in found] == [f"{a}\n\nSummary:\n{b}" for a, b in PAIRS]
    assert asked == [("abisee/cnn_dailymail", "3.0.0", "train")]


def test_a_hub_dataset_gives_its_own_validation_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = ModuleType("datasets")
    splits = {"train": PAIRS[:40], "validation": PAIRS[38:]}

    def load_dataset(*_: Any, split: str, **__: Any) -> list[dict[str, Any]]:
        return [{"article": a, "highlights": b} for a, b in splits[split]]

    module.__dict__.update(load_dataset=load_dataset, config=SimpleNamespace(HF_DATASETS_OFFLINE=True))
    monkeypatch.setitem(sys.modules, "datasets", module)
    settings = config({**FIELDS, "dataset": "cnn"}).model_dump(exclude={"validation_fraction"})
    made = build(CorpusConfig.model_validate({**settings, "validation": {"split": "validation"}}), out=tmp_path / "cnn")
    assert (made.train.documents, made.validation.documents) == (38, 22) and made.left_out.in_validation == 2


def test_a_prompt_is_in_one_split_only(tmp_path: Path) -> None:
    pairs = [(f"Say something about {n}.", f"{n} is {word}.") for n in range(40) for word in ("odd", "big", "red")]
    corpus = {**FIELDS, "paths": [str(written(tmp_path / "a.jsonl", [*pairs, pairs[7]]))]}
    made = build(config(corpus), out=tmp_path / "out")
    prompts = {split: {a for a, _, _ in found} for split, found in pairs_of(tmp_path / "out").items()}
    assert not prompts["train"] & prompts["validation"] and len(prompts["validation"]) > 1
    assert made.train.documents + made.validation.documents == 120 and made.left_out.duplicate == 1


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_a_prompt_is_in_one_split_only_where_a_split_would_be_empty(fraction: float, tmp_path: Path) -> None:
    """The split that gets no prompt by its hash takes one, with all of its targets."""
    pairs = [(f"Question {n}", f"Answer {m}.") for n in range(3) for m in range(4)]
    corpus = {**FIELDS, "paths": [str(written(tmp_path / "pairs.jsonl", pairs))]}
    build(config(corpus, validation_fraction=fraction), out=tmp_path / "out")
    prompts = {split: [prompt for prompt, _, _ in found] for split, found in pairs_of(tmp_path / "out").items()}
    assert not set(prompts["train"]) & set(prompts["validation"])
    assert sorted(map(len, prompts.values())) == [4, 8]
    alone = {**FIELDS, "paths": [str(written(tmp_path / "alone.jsonl", pairs[:4]))]}
    with pytest.raises(DataError, match="4 usable documents"):
        build(config(alone, validation_fraction=fraction), out=tmp_path / "alone")


def test_the_end_of_the_corpus_is_cut_separatorpairs(tmp_path: Path) -> None:
    long = [("short\nprompt", "one."), ("line\n" * 2000, "two."), ("line\n" * 30, "three.")]
    for pairs, counts in ((long, (2, 1)), (long[:2], (1, 1))):
        corpus = {**FIELDS, "paths": [str(written(tmp_path / "a.jsonl", pairs))]}
        settings = config(corpus).model_dump(exclude={"validation_fraction"})
        made = build(CorpusConfig.model_validate({**settings, "validation": "last 50%"}), out=tmp_path / "out")
        assert (made.train.documents, made.validation.documents) == counts
        assert sorted(t for part in pairs_of(tmp_path / "out").values() for _, _, t in part) == sorted(
            t for _, t in pairs
        )


def test_the_first_line_of_an_article_is_its_target(tmp_path: Path) -> None:
    texts = [
        "\n A cat is an animal. \n\nIt eats mice.\nIt sleeps.\n",
        "One line only.",
        *(f"T{n}\nP{n}" for n in range(9)),
    ]
    file = tmp_path / "wiki.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    said: list[str] = []
    cfg = config({"type": "pairs", "paths": [str(file)], "article": "text"})
    made = build(cfg, out=tmp_path / "out", say=said.append)
    found = {(a, b) for part in pairs_of(tmp_path / "out").values() for a, _, b in part}
    assert ("It eats mice.\nIt sleeps.", "A cat is an animal.") in found and ("P3", "T3") in found and len(found) == 10
    assert made.left_out.one_line == 1 and any("1 articles of one line" in line for line in said)


SOURCE = '''
def cube(x):
    """Return the cube. It is
    exact."""
    return x ** 3


class A:
    async def wait(self):
        # before
        \'\'\'
        Wait for v1.2 of it
        without an end

        Not this.
        \'\'\'
        await self.it()

        def inner():
            "Inner! Yes."
            return 1

    def only(self):
        """Nothing but this."""

    def without(self):
        return 2

    def example(self):
        """>>> 1 + 1"""
        return 2

    def one(self): """Same line."""; return 3
'''


def test_functions_lose_their_docstring_and_give_its_first_sentence() -> None:
    corpus = StdlibFunctionsCorpus(type="stdlib_functions", separator="|")
    found = [document.text.decode() for document in function_pairs(corpus, "a.py", Path("a.py"), SOURCE.encode())]
    assert found == [
        "def cube(x):\n    return x ** 3|Return the cube.",
        "async def wait(self):\n    # before\n    await self.it()\n\n    def inner():\n"
        '        "Inner! Yes."\n        return 1|Wait for v1.2 of it without an end',
        "def inner():\n    return 1|Inner!",
    ]
    assert [*function_pairs(corpus, "b.py", Path("b.py"), b"def broken(")] == []
    assert first_sentence("  One\n  two?  Three.") == "One two?"


def test_functions_of_the_standard_library_are_the_same_every_time() -> None:
    corpus = StdlibFunctionsCorpus(type="stdlib_functions")
    found, again = ([(d.id, d.text) for d in islice(documents(corpus), 300)] for _ in range(2))
    assert len(found) == 300 and found == again
    path = Path(bisect.__file__)
    shown = next(function_pairs(corpus, "bisect.py", path, path.read_bytes())).text.decode()
    assert shown.startswith("def insort_right(") and shown.endswith(
        "\n\n# Summary:\nInsert item x in list a, and keep it sorted assuming a is sorted."
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"article": "a", "highlights": "  "}, "has an empty target"),
        ({"article": "a", "highlights": None}, "has an empty target"),
        ({"article": "", "highlights": "b"}, "has an empty prompt"),
        ({"article": "a"}, "no field 'highlights'; set corpus.target to one of its fields: 'article'"),
        ({"highlights": "b"}, "no field 'article'; set corpus.prompt"),
        ({"article": ["a"], "highlights": "b"}, "field 'article' holds list, not text; set corpus.prompt"),
    ],
)
def test_a_row_without_a_pair_is_an_error_that_names_it(line: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", PAIRS)
    file.write_text(file.read_text() + json.dumps(line) + "\n")
    with pytest.raises(DataError) as error:
        build(config({**FIELDS, "paths": [str(file)]}), out=tmp_path / "out")
    assert said in str(error.value) and f"{file}:61" in str(error.value)


def test_rows_without_a_target_are_skipped_and_counted_if_asked(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", [*PAIRS, ("a", ""), ("", "b"), ("c", " ")])
    made = build(config({**FIELDS, "paths": [str(file)]}, bad_documents="skip"), out=tmp_path / "out")
    assert (made.left_out.empty_target, made.left_out.empty_prompt) == (2, 1)
    assert made.train.documents + made.validation.documents == 60
    assert read_manifest(tmp_path / "out").left_out == made.left_out


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "give the fields `prompt` and `target`"),
        ({"prompt": "a"}, "give the fields `prompt` and `target`"),
        ({"prompt": "a", "target": "b", "article": "c"}, "or the field `article` alone"),
        ({"prompt": "a", "target": "a"}, "'a' is the prompt too"),
        ({"article": "a", "dataset": "x"}, "one of them"),
        ({"article": "a", "split": "test"}, "leave them out beside `paths`"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PairsCorpus.model_validate({"type": "pairs", "paths": ["x"], **fields})


def test_a_source_of_the_wrong_type_is_refused(pairs_dataset: Path, source: MdsSource, tmp_path: Path) -> None:
    from headway.data.config import MixPart, MixSource, PairsSource

    with pytest.raises(DataError, match=r"dataset of pairs.*set data\.source\.type: pairs"):
        verify_source(MdsSource(type="mds", path=str(pairs_dataset)), seq_len=8)
    with pytest.raises(DataError, match=r"has texts; use type: mds"):
        verify_source(PairsSource(type="pairs", path=source.path), seq_len=8)
    parts = (MixPart(path=str(pairs_dataset), weight=1, name="a"), MixPart(path=str(pairs_dataset), weight=1, name="b"))
    with pytest.raises(DataError, match="a mixture cannot contain it"):
        verify_source(MixSource(type="mix", sources=parts), seq_len=8)


def test_prompts_that_do_not_fit_are_an_error(pairs_dataset: Path, tmp_path: Path) -> None:
    import shutil

    for change in ("one more", "whole", "missing"):
        root = shutil.copytree(pairs_dataset, tmp_path / change)
        path, manifest = root / "train" / PROMPTS_NAME, read_manifest(root)
        prompts = np.load(path)
        if change == "missing":
            path.unlink()
        else:
            prompts[0] += 1 if change == "one more" else 10_000
            np.save(path, prompts)
        with pytest.raises(DataError, match=PROMPTS_NAME):
            verify(MdsSource(type="mds", path=str(root)))
        if change != "missing":  # and if the manifest was made to fit
            files = {**manifest.files, f"train/{PROMPTS_NAME}": hash_file(path)}
            write_manifest(root, manifest.model_copy(update={"files": files}).sealed())
            with pytest.raises(DataError, match="does not divide"):
                verify(MdsSource(type="mds", path=str(root)))


def test_a_dataset_of_texts_has_the_manifest_that_it_had(pairs_dataset: Path, source: MdsSource) -> None:
    content = json.loads((Path(source.path) / MANIFEST_NAME).read_text())
    assert "pairs" not in content and set(content["left_out"]) == {
        "empty", "not_utf8", "binary", "too_short", "duplicate"
    }  # fmt: skip
    assert "pairs" in json.loads((pairs_dataset / MANIFEST_NAME).read_text())


def test_an_empty_separator_leaves_prompt_and_target_side_by_side(tmp_path: Path) -> None:
    corpus = {**FIELDS, "paths": [str(written(tmp_path / "a.jsonl", PAIRS))], "separator": ""}
    said: list[str] = []
    made = build(config(corpus), out=tmp_path / "out", say=said.append)
    found = [(a, b) for part in pairs_of(tmp_path / "out").values() for a, _, b in part]
    assert sorted(found) == sorted(PAIRS) and made.pairs is not None and made.pairs.separator_ids == []
    assert f"(of targets: {made.pairs.train_target_tokens:,} and" in said[-1]
