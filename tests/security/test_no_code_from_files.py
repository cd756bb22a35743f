"""Headway executes no file that it reads, such as pickles or foreign modules: the canary file is not created. (F26)"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import save_file

from headway.data import tokenizer
from headway.data.config import DataError
from headway.launcher.base.errors import exit_code
from headway.launcher.exchange.import_hf import import_hf
from headway.launcher.run.codec import token_of
from headway.launcher.run.records import read_run
from headway.launcher.run.resolve import check_same_data
from headway.launcher.run.run_dir import RunDir, read_json
from headway.model.huggingface import folder as hf
from headway.parallel import checkpoint, manifest
from headway.parallel.config import CheckpointError
from headway.parallel.manifest import own_hash

NAME = "tensors-00000-of-00001.safetensors"


class Evil:
    """An object that creates a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "a file was executed"


@pytest.fixture
def evil(canary):
    """Pickles that create the canary file when loaded: plain, by torch.save, and by numpy."""
    return pickle.dumps(Evil(canary))


def test_unpickling_the_evil_file_touches_the_canary(tmp_path):
    torch.save(Evil(tmp_path / "bird"), tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "bird").exists()


# ---------------------------------------------------------------- checkpoints


@pytest.fixture
def step(tmp_path):
    """A complete checkpoint of a small module, and a function that updates the hash of its manifest."""
    folder = tmp_path / "checkpoints" / "step-0000000003"
    folder.mkdir(parents=True)
    save_file({f"param/{n}": p.detach() for n, p in torch.nn.Linear(2, 2).named_parameters()}, folder / NAME)
    seal(folder)
    return folder


def seal(folder: Path, **changes) -> None:
    data = (folder / NAME).read_bytes()
    files = {
        NAME: {
            "bytes": len(data),
            "xxh3_128": xxhash.xxh3_128_hexdigest(data),
            "tensors": ["param/bias", "param/weight"],
        }
    }
    value = {"format": manifest.FORMAT, "step": 3, "layout": {}, "state": {}, "files": files, "about": {}} | changes
    outer = {"xxh3_128": own_hash(value), "manifest": value}
    (folder / manifest.MANIFEST).write_text(json.dumps(outer))


def read(step: Path) -> None:
    found = checkpoint.newest_readable(step.parent, warn=lambda text: None, run=None)
    checkpoint.load_weights(found, torch.nn.Linear(2, 2))


def test_the_checkpoint_of_these_tests_is_valid(step):
    read(step)


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
@pytest.mark.parametrize("place", [NAME, manifest.MANIFEST])
def test_a_pickle_in_place_of_a_checkpoint_file_is_refused(kind, place, step, evil, canary):  # vectors 1, 3
    if kind == "pickle":
        (step / place).write_bytes(evil)
    else:
        torch.save({"param/bias": Evil(canary)}, step / place)
    if place == NAME:
        seal(step)
    with pytest.raises(CheckpointError) as caught:
        read(step)
    assert caught.value.exit_code == 74


@pytest.mark.parametrize(
    "name", ["evil.pt", "optimizer.bin", ".metadata", "__0_0.distcp", "zero_pp_rank_0_optim_states.pt"]
)
def test_a_pickle_beside_the_files_of_a_checkpoint_is_not_opened(name, step, evil, canary):  # vectors 1, 2
    (step / name).write_bytes(evil)
    with pytest.raises(CheckpointError):
        read(step)


@pytest.mark.parametrize("name", ["evil.pt", ".metadata", "latest", "latest_checkpointed_iteration.txt"])
def test_a_pickle_or_a_pointer_beside_checkpoints_is_not_opened(name, step, evil, canary):  # vectors 1, 2, 5
    (step.parent / name).write_bytes(evil)
    read(step)


@pytest.mark.parametrize(
    "text", ["../elsewhere", "/etc", "step-0000000003\nstep-0000000009", "", "x" * (1 << 20), "step-0000000009"]
)
def test_no_file_selects_the_newest_checkpoint(text, step):  # vector 5
    (step.parent / "latest").write_text(text)
    assert checkpoint.newest_readable(step.parent, warn=lambda text: None, run=None).path == step


def test_a_manifest_cannot_name_files_outside_its_folder(step, tmp_path):  # vector 6
    data = (step / NAME).read_bytes()
    entry = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data), "tensors": ["param/bias"]}
    (tmp_path / "outside").write_bytes(data)
    for name in ("../../outside", str(tmp_path / "outside"), "a/../../../outside", "", ".", "x\0y", "x" * 300):
        seal(step, files={name: entry})
        with pytest.raises(CheckpointError):
            read(step)
    (step / NAME).unlink()
    (step / NAME).symlink_to(tmp_path / "outside")
    seal(step)
    with pytest.raises(CheckpointError):
        read(step)


def test_a_manifest_of_very_many_files_or_bytes_is_refused_soon(step):  # vector 6
    entry = {"bytes": 1, "xxh3_128": "0" * 32, "tensors": []}
    seal(step, files={f"f{n}": entry for n in range(20_000)})
    with pytest.raises(CheckpointError):
        read(step)
    with (step / manifest.MANIFEST).open("ab") as f:
        f.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(CheckpointError):
        read(step)


# ---------------------------------------------------------------- datasets, run folders, weights of others


def test_a_tokenizer_that_is_a_pickle_or_code_is_refused(tmp_path, evil, canary):
    file = tmp_path / "tokenizer.json"
    for content in (evil, b"import os\nos.mkdir('canary')\n", b'{"auto_map": {"AutoTokenizer": "evil.Evil"}}'):
        file.write_bytes(content)
        (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
        with pytest.raises(DataError):
            tokenizer.load(file)


def test_a_tokenizer_that_makes_the_library_panic_is_refused(tmp_path):
    file = tmp_path / "tokenizer.json"
    vocabulary = {"e": 0, "x": 1, "ex": 2}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [["e", "x"]], "continuing_subword_prefix": "long"}
    file.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    for reader in (lambda: tokenizer.load(file), lambda: token_of(file, 0)):
        with pytest.raises(DataError):
            reader()


def test_a_tokenizer_of_absurd_size_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "tokenizer.json"
    with file.open("wb") as f:
        f.truncate((256 << 20) + 1)  # takes no room on the disk
    for reader in (tokenizer.load, tokenizer.vocab_size_of):
        with pytest.raises(DataError, match="larger than"):
            reader(file)


@pytest.mark.parametrize("highest", ["1e400", "1.5", '"1"', "null", "[1]"])
def test_a_vocabulary_with_ids_that_are_not_integers_is_refused(highest, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(f'{{"model": {{"vocab": {{"a": 0, "b": {highest}}}}}}}')
    with pytest.raises(DataError):
        tokenizer.vocab_size_of(file)


def test_pickles_in_a_run_folder_are_treated_as_missing_files(tmp_path, evil, canary):
    run = RunDir(tmp_path)
    for path in (run.spec, run.card, run.metrics, run.summary):
        path.write_bytes(evil)
    assert read_json(run.spec, None) is None and not run.is_complete() and list(run.read_metrics()) == []
    assert len(read_run(tmp_path).train) == 0
    check_same_data(run, {"fingerprint": None})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickled_foreign_weights_are_not_opened(name, tmp_path, evil, canary):
    source = tmp_path / "llama"
    source.mkdir()
    (source / name).write_bytes(evil)
    (source / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')")
    config = {"architectures": ["LlamaForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception) as caught:
        import_hf(source, tmp_path / "out")
    assert exit_code(caught.value) == 65 and name in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_a_pickle_are_refused(tmp_path, evil, canary):
    for name in (hf.WEIGHTS, hf.INDEX):
        (tmp_path / name).write_bytes(evil)
        with pytest.raises(hf.WeightsError):
            hf.TensorFiles(tmp_path)
        (tmp_path / name).unlink()


def test_arrays_of_objects_are_not_read(tmp_path, canary):  # vector 3
    file = tmp_path / "lengths.npy"
    np.save(file, np.array([Evil(canary)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(file, allow_pickle=False)
