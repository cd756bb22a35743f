"""A checkpoint is whole, or it is not there; a changed byte is an error that names the file."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.parallel import checkpoint
from headway.parallel.config import CheckpointError
from headway.parallel.layout import Layout
from headway.parallel.logical import LogicalBuffer

ALONE = Layout(rank=0, local_rank=0, dp_rank=0, dp_size=1, device=torch.device("cpu"))


class Model:
    """What `save` and `load` need of an engine, with two tensors."""

    def __init__(self, value: float = 0.0) -> None:
        self.module = torch.nn.Linear(3, 2)
        self.module.register_buffer("bias_of_router", torch.full((2,), value))
        self.values = {n: torch.full_like(p, value).detach() for n, p in self.module.named_parameters()}
        self.applied_steps = 0

    def logical_shapes(self):
        return {name: tuple(p.shape) for name, p in self.module.named_parameters()}

    def buffers(self):
        return {name: LogicalBuffer(buffer, None) for name, buffer in checkpoint.persistent_buffers(self.module)}

    def read_logical(self):
        for name, value in self.values.items():
            for part in ("param", "exp_avg", "exp_avg_sq"):
                yield f"{part}/{name}", value

    def write_logical(self, tensors, *, applied_steps):
        self.values = {n: tensors[f"param/{n}"] for n in self.values}
        self.applied_steps = applied_steps

    def adam_steps(self):
        return {self.applied_steps}


def write(root: Path, step: int, keep: int = 2, value: float | None = None) -> str | None:
    model = Model(float(step) if value is None else value)
    return checkpoint.save(root, model, ALONE, step=step, state={"applied_steps": step}, keep=keep)


def newest(root: Path, said: list[str] | None = None) -> checkpoint.Checkpoint:
    found = checkpoint.newest_valid(root, ALONE, warn=(said if said is not None else []).append)
    assert found is not None
    return found


def test_what_is_saved_is_loaded_buffers_included(tmp_path):
    assert write(tmp_path, 7) is None
    found, model = newest(tmp_path), Model()
    checkpoint.load(found, model, ALONE)
    assert found.step == 7 and model.applied_steps == 7
    assert all(bool((v == 7).all()) for v in model.values.values())
    assert torch.equal(dict(model.module.named_buffers())["bias_of_router"], torch.full((2,), 7.0))


def test_no_checkpoint_is_no_error(tmp_path):
    for root in (tmp_path, tmp_path / "absent"):
        assert checkpoint.newest_valid(root, ALONE, warn=print) is None


def test_only_the_newest_stay(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.steps_on_disk(tmp_path)] == ["step-0000000004", "step-0000000003"]


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


def test_when_every_checkpoint_is_damaged_training_does_not_silently_start_anew(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "step-0000000001" / "MANIFEST.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is whole"):
        newest(tmp_path)


def test_a_manifest_that_names_a_file_outside_the_folder_is_refused(tmp_path):
    write(tmp_path, 1)
    path = tmp_path / "step-0000000001" / "MANIFEST.json"
    outer = json.loads(path.read_text())
    name, entry = next(iter(outer["manifest"]["files"].items()))
    outer["manifest"]["files"] = {f"../{name}": entry}
    body = json.dumps(outer["manifest"], indent=1, sort_keys=True)
    outer["xxh3_128"] = checkpoint.xxhash.xxh3_128(body.encode()).hexdigest()
    path.write_text(json.dumps(outer, indent=1, sort_keys=True))
    with pytest.raises(CheckpointError, match="illegal file name"):
        checkpoint.read_manifest(path.parent)


def test_a_save_that_fails_says_why_and_leaves_the_older_one(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    error = write(tmp_path, 2)
    assert error is not None and "No space left" in error
    assert newest(tmp_path).step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000001"]


def test_a_folder_left_by_a_killed_save_is_not_a_checkpoint(tmp_path):
    (tmp_path / ".staging-0000000003").mkdir()
    assert checkpoint.newest_valid(tmp_path, ALONE, warn=print) is None
    assert write(tmp_path, 3) is None and newest(tmp_path).step == 3


def test_what_a_killed_save_left_is_removed_by_the_next_save_of_any_step(tmp_path):
    left = tmp_path / ".staging-0000000003"
    left.mkdir()
    (left / "tensors-00000-of-00001.safetensors").write_bytes(b"half")
    assert write(tmp_path, 5) is None
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000005"]


def test_damaged_checkpoints_of_later_steps_never_push_out_the_one_just_written(tmp_path):
    for step in (5, 9, 10):
        write(tmp_path, step, keep=3)
    for step in (9, 10):
        (tmp_path / f"step-{step:010d}" / "MANIFEST.json").write_text("{}")
    assert newest(tmp_path).step == 5
    write(tmp_path, 7, keep=2)
    assert [p.name for p in checkpoint.steps_on_disk(tmp_path)] == ["step-0000000007", "step-0000000005"]
    assert newest(tmp_path).step == 7


def test_a_checkpoint_the_disk_cannot_read_is_passed_over(tmp_path, monkeypatch):
    write(tmp_path, 1)
    write(tmp_path, 2)
    hash_of = checkpoint.file_hash

    def failing(path: Path) -> str:
        if "step-0000000002" in str(path):
            raise OSError(5, "Input/output error")
        return hash_of(path)

    monkeypatch.setattr(checkpoint, "file_hash", failing)
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


def test_ranks_that_see_different_folders_walk_through_the_same_ones(tmp_path):
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


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the program catches it."""


def kill_before_operation(monkeypatch, number: int) -> list[str]:
    """Let the first `number` file operations of a save happen and none after them; returns the list of those begun."""
    begun: list[str] = []

    def counted(name, operation):
        def wrapper(*args, **kwargs):
            begun.append(name)
            if len(begun) > number:
                raise Killed
            return operation(*args, **kwargs)

        return wrapper

    for owner, names in (
        (Path, ("mkdir", "write_text", "rename", "unlink")),
        (checkpoint, ("save_file", "_fsync")),
        (checkpoint.shutil, ("rmtree",)),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    return begun


@pytest.mark.parametrize("damaged_before", [False, True])
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, damaged_before):
    whole_new = number = 0
    while True:
        root = tmp_path / str(number)
        write(root, 1, keep=1)
        if damaged_before:  # a folder of the same step that was passed over when the run resumed
            (root / "step-0000000002").mkdir()
            (root / "step-0000000002" / "MANIFEST.json").write_text("{}")
        with monkeypatch.context() as patch:
            begun = kill_before_operation(patch, number)
            try:
                write(root, 2, keep=1)
                finished = True
            except Killed:
                finished = False
        step = newest(root).step
        assert step in (1, 2), begun
        whole_new += step == 2
        assert write(root, 3, keep=1) is None
        assert [p.name for p in root.iterdir()] == ["step-0000000003"], begun
        if finished:
            break
        number += 1
    assert number >= 8 and 1 < whole_new < number  # killed on both sides of the rename
