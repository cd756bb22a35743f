"""A damaged, foreign or missing checkpoint is one message that names the file, and an older one is used."""

import gc
import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import ALONE, Model, newest, write

from headway.parallel import checkpoint, manifest, saver
from headway.parallel.config import CheckpointConfig, CheckpointError
from headway.parallel.layout import Layout


def test_no_checkpoint_is_no_error(tmp_path):
    for root in (tmp_path, tmp_path / "absent"):
        assert checkpoint.newest_valid(root, ALONE, warn=print) is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "no manifest", "renamed"])
def test_a_damaged_checkpoint_is_reported_and_the_older_one_used(tmp_path, damage):
    write(tmp_path, 1)
    write(tmp_path, 2)
    folder = tmp_path / "step-0000000002"
    tensors = next(folder.glob("*.safetensors"))
    if damage == "flip":
        data = bytearray(tensors.read_bytes())
        data[-5] ^= 1
        tensors.write_bytes(data)
    elif damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif damage == "remove":
        tensors.unlink()
    elif damage == "manifest":
        path = folder / "MANIFEST.json"
        path.write_text(path.read_text().replace('"applied_steps": 2', '"applied_steps": 3'))
    elif damage == "no manifest":
        (folder / "MANIFEST.json").unlink()
    else:
        folder.rename(tmp_path / "step-0000000009")
    said: list[str] = []
    assert newest(tmp_path, said).step == 1
    assert len(said) == 1 and "step-000000000" in said[0]
    assert newest(tmp_path, said).step == 1 and len(said) == 1  # set aside: not looked at again


def test_training_does_not_silently_start_over_when_every_checkpoint_is_damaged(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "step-0000000001" / "MANIFEST.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is valid"):
        newest(tmp_path)


def test_a_manifest_that_names_a_file_outside_the_folder_is_refused(tmp_path):
    write(tmp_path, 1)
    path = tmp_path / "step-0000000001" / "MANIFEST.json"
    outer = json.loads(path.read_text())
    name, entry = next(iter(outer["manifest"]["files"].items()))
    outer["manifest"]["files"] = {f"../{name}": entry}
    outer["xxh3_128"] = manifest.own_hash(outer["manifest"])
    path.write_text(json.dumps(outer, indent=1, sort_keys=True))
    with pytest.raises(CheckpointError, match="should match pattern"):
        checkpoint.read_manifest(path.parent)


def test_a_checkpoint_the_disk_cannot_read_is_skipped(tmp_path, monkeypatch):
    write(tmp_path, 1)
    write(tmp_path, 2)
    hash_of = manifest.file_hash

    def failing(path: Path) -> str:
        if "step-0000000002" in str(path):
            raise OSError(5, "Input/output error")
        return hash_of(path)

    monkeypatch.setattr(manifest, "file_hash", failing)
    said: list[str] = []
    assert newest(tmp_path, said).step == 1
    assert "Input/output error" in said[0]


@dataclass(frozen=True, kw_only=True)
class SecondOfTwo(Layout):
    """It sees its own folder; the first rank sees what `first` makes of its answer."""

    first: Callable[[Any], Any]
    exchanges: list[Any] = field(default_factory=list)

    def gather_json(self, value: Any) -> list[Any]:
        self.exchanges.append(value)
        return [self.first(value), value]


def second_of_two(first: Callable[[Any], Any]) -> SecondOfTwo:
    return SecondOfTwo(rank=1, local_rank=1, dp_rank=1, dp_size=2, device=torch.device("cpu"), first=first)


def test_ranks_that_see_different_folders_check_the_same_checkpoints(tmp_path):
    write(tmp_path, 1)

    def sees_two(value):
        return {**value, "names": ["step-0000000002", "step-0000000001"]} if "names" in value else value

    ranks, said = second_of_two(sees_two), []
    found = checkpoint.newest_valid(tmp_path, ranks, warn=said.append)
    assert found is not None and found.step == 1
    assert len(ranks.exchanges) == 3  # the folders, then a vote on each: as many as the other rank takes part in
    assert "step-0000000002" in said[0]


def test_when_one_rank_cannot_list_the_folder_all_stop(tmp_path):
    write(tmp_path, 1)
    ranks = second_of_two(lambda value: {"names": [], "error": "rank 0 cannot list it"})
    with pytest.raises(CheckpointError, match="rank 0 cannot list"):
        checkpoint.newest_valid(tmp_path, ranks, warn=print)


def test_ranks_with_different_manifests_do_not_resume_from_them(tmp_path):
    write(tmp_path, 1)
    ranks = second_of_two(lambda value: {**value, "manifest": "another"} if "manifest" in value else value)
    with pytest.raises(CheckpointError, match="none of 1"):
        checkpoint.newest_valid(tmp_path, ranks, warn=print)


def test_a_checkpoint_with_other_shapes_is_refused_even_where_the_sizes_agree(tmp_path):
    write(tmp_path, 1)
    other = Model()
    other.module.weight = torch.nn.Parameter(other.module.weight.detach().t().contiguous())
    with pytest.raises(CheckpointError, match=r"weight is \[2, 3\], not \[3, 2\]"):
        checkpoint.load(newest(tmp_path), other, ALONE)


def test_the_checkpoint_of_another_model_is_refused(tmp_path):
    write(tmp_path, 1)
    other = Model()
    other.module = torch.nn.Linear(3, 2, bias=False)
    other.values = {n: p.detach() for n, p in other.module.named_parameters()}
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.load(newest(tmp_path), other, ALONE)


def test_a_checkpoint_of_another_run_or_with_an_unknown_file_is_skipped(tmp_path):
    # F9

    def save(step: int, run: str) -> None:
        saving = saver.Saver(tmp_path, Model(), ALONE, CheckpointConfig(keep=9), about={"run": run})
        saving.start(step, {"applied_steps": step})
        assert saving.commit().error is None

    for step, run in ((1, "mine"), (2, "other"), (3, "mine")):
        save(step, run)
    (tmp_path / "step-0000000003" / "notes.txt").write_text("?")
    said: list[str] = []
    found = checkpoint.newest_valid(tmp_path, ALONE, warn=said.append, run="mine")
    assert found is not None and found.step == 1
    assert "notes.txt" in said[0] and "another run ('other'" in said[1]
    save(2, "other")
    assert checkpoint.newest_valid(tmp_path, ALONE, warn=said.append, run="mine") is not None
    save(2, "mine")  # deletes the damaged one, and none of another run
    kept = ["foreign-step-0000000002", "foreign-step-0000000002.1", "step-0000000001", "step-0000000002"]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept
    assert all((tmp_path / name / "MANIFEST.json").exists() for name in kept)


@pytest.mark.parametrize("foreign", ["tensors", "manifest"])
def test_files_of_two_attempts_are_no_checkpoint(tmp_path, foreign):
    # F9: the same step of two attempts, the tensors or the manifest of the second in the folder of the first
    for value, attempt in enumerate(("first", "second")):
        for step in (1, 2):
            about = {"run": attempt}
            saving = saver.Saver(tmp_path / attempt, Model(value), ALONE, CheckpointConfig(keep=9), about=about)
            saving.start(step, {"applied_steps": step})
            assert saving.commit().error is None
    mixed, other = (tmp_path / attempt / "step-0000000002" for attempt in ("first", "second"))
    name = "MANIFEST.json" if foreign == "manifest" else next(other.glob("*.safetensors")).name
    assert (mixed / name).read_bytes() != (other / name).read_bytes()
    shutil.copy(other / name, mixed / name)
    said: list[str] = []
    found = checkpoint.newest_valid(tmp_path / "first", ALONE, warn=said.append, run="first")
    assert found is not None and found.step == 1 and "step-0000000002" in said[0]


@pytest.mark.parametrize("kind", ["truncate", "flip"])
@pytest.mark.parametrize("file", ["tensors", "manifest"])
def test_every_changed_byte_of_a_checkpoint_is_noticed(tmp_path, kind, file):
    # F7: 30 lengths, F8: 100 flipped bits, of each kind of file
    write(tmp_path, 1)
    folder, chance = tmp_path / "step-0000000001", random.Random(1)
    path = folder / "MANIFEST.json" if file == "manifest" else next(folder.glob("*.safetensors"))
    whole = path.read_bytes()
    for trial in range(30 if kind == "truncate" else 100):
        body = bytearray(whole)
        if kind == "truncate":
            body = body[: trial if trial < 2 else chance.randrange(len(body))]
        else:
            body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        path.write_bytes(body)
        with pytest.raises(CheckpointError, match=path.name if file == "tensors" else "step-0000000001"):
            checkpoint.verify_hashes(folder, checkpoint.read_manifest(folder))


@pytest.mark.parametrize(
    "text", [b"", b"step-0000000001", b"../x", b"/etc", b"\xff\xfe", b"a\nb", b"0" * 1_000_000, None]
)
def test_a_file_named_latest_is_ignored(tmp_path, text):
    # F10
    write(tmp_path, 1)
    write(tmp_path, 2)
    if text is None:
        (tmp_path / "latest").mkdir()
    else:
        (tmp_path / "latest").write_bytes(text)
    assert newest(tmp_path).step == 2


@pytest.mark.parametrize("times", [(9, 1), (5, 5), (0, 1 << 40)])
def test_the_newest_is_the_one_of_the_latest_step_whatever_clocks_say(tmp_path, times):
    # F12
    for step, when in zip((1, 2), times, strict=True):
        write(tmp_path, step)
        for path in (tmp_path / f"step-{step:010d}", *(tmp_path / f"step-{step:010d}").iterdir()):
            os.utime(path, (when, when))
    assert newest(tmp_path).step == 2


@pytest.mark.parametrize(
    "damage",
    [
        {"files": {"a" * 200: {}}},
        {"files": {"../../x": {"bytes": 1, "xxh3_128": "0" * 32, "tensors": []}}},
        {"files": {"x": {"bytes": -1, "xxh3_128": "0" * 32, "tensors": []}}},
        {"files": []},
        {"step": "1"},
        {"step": True},
        {"state": None},
        {"format": 99},
        {"surprise": 1},
    ],
    ids=str,
)
def test_an_invalid_manifest_is_one_message(tmp_path, damage):
    write(tmp_path, 1)
    path = tmp_path / "step-0000000001" / "MANIFEST.json"
    value = json.loads(path.read_text())["manifest"] | damage
    path.write_text(json.dumps({"xxh3_128": manifest.own_hash(value), "manifest": value}))
    with pytest.raises(CheckpointError, match="step-0000000001"):
        checkpoint.read_manifest(path.parent)


@pytest.mark.parametrize("unit", ["[],", "1,"])
def test_a_manifest_of_the_maximum_size_costs_little(tmp_path, unit):
    folder = tmp_path / "step-0000000001"
    folder.mkdir()
    body = unit * ((8 << 20) // len(unit) - 64)
    (folder / "MANIFEST.json").write_text('{"xxh3_128": "0", "manifest": [' + body + "1]}")
    # Python's collector is not what is asked about: it walks through all that lives in the process, here that of
    # thousands of tests (1 s of 1.4 in an empty one, once more than 4 in a worker of the whole run).
    gc.disable()
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        with pytest.raises(CheckpointError, match="own hash"):
            checkpoint.read_manifest(folder)
        took_s = time.process_time() - begin
    finally:
        gc.enable()
    # Measured: 0.3 to 0.4 s and 40 to 210 MB; processors differ.
    assert took_s < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB


def test_a_reader_finds_checkpoints_that_training_saved_meanwhile(tmp_path, monkeypatch):
    write(tmp_path, 1, keep=1)
    read = checkpoint.read_manifest

    def late(path, **kwargs):
        if path.name == "step-0000000001":
            write(tmp_path, 2, keep=1)
        return read(path, **kwargs)

    monkeypatch.setattr(checkpoint, "read_manifest", late)
    said: list[str] = []
    assert checkpoint.newest_readable(tmp_path, warn=said.append, run=None).step == 2
    assert len(said) == 1
    (tmp_path / "step-0000000002" / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match="none of 1"):
        checkpoint.newest_readable(tmp_path, warn=said.append, run=None)


def test_a_pipe_in_the_place_of_a_manifest_is_not_waited_for(tmp_path):
    write(tmp_path, 1)
    path = tmp_path / "step-0000000001" / "MANIFEST.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        checkpoint.read_manifest(path.parent)


def test_a_folder_without_any_checkpoint_is_a_new_run_and_one_of_damaged_ones_is_not(tmp_path):
    # F11
    for root in (tmp_path, tmp_path / "absent"):
        assert checkpoint.newest_valid(root, ALONE, warn=print) is None
    (tmp_path / "step-0000000001").mkdir()
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is valid"):
        checkpoint.newest_valid(tmp_path, ALONE, warn=print)


def test_a_link_in_the_place_of_a_file_is_refused(tmp_path):
    write(tmp_path, 1)
    path = next((tmp_path / "step-0000000001").glob("*.safetensors"))
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=path.name):
        checkpoint.read_manifest(path.parent)


def test_every_flipped_byte_of_a_manifest_is_a_message_that_names_the_file(tmp_path):
    assert write(tmp_path, 1) is None
    path = tmp_path / "step-0000000001" / "MANIFEST.json"
    text, chance = path.read_bytes(), random.Random(1)
    for place in range(len(text)):
        changed = bytearray(text)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        try:
            found = manifest.read_manifest(path.parent, run="mine")
        except CheckpointError as e:
            assert str(path) in str(e)
        else:  # a change of white space or of an escaped letter, which leaves the manifest as it is
            assert json.loads(changed)["manifest"] == json.loads(text)["manifest"] == found.model_dump(mode="json")


@pytest.mark.parametrize("change", ["format", "step", "run", "list", "empty"])
def test_every_refusal_of_a_manifest_names_the_file(tmp_path, change):
    assert write(tmp_path, 1) is None
    path = tmp_path / "step-0000000001" / "MANIFEST.json"
    value = json.loads(path.read_text())["manifest"]
    value |= {"format": {"format": 9}, "step": {"step": 2}, "run": {"about": {"run": "other"}}}.get(change, {})
    text = json.dumps({"xxh3_128": manifest.own_hash(value), "manifest": value})
    path.write_text({"list": "[]", "empty": ""}.get(change, text))
    with pytest.raises(CheckpointError) as caught:
        manifest.read_manifest(path.parent, run="mine")
    assert str(caught.value).startswith(f"{path}: ")
