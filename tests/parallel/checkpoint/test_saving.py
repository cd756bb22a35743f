"""A save leaves a complete checkpoint or none, whatever ends it, and the older ones that are to be kept."""

import os
import threading
from pathlib import Path

import pytest
import torch
from checkpoints import ALONE, Model, newest, write

from headway.parallel import checkpoint, manifest, saver
from headway.parallel.config import CheckpointConfig


def test_what_is_saved_is_loaded_buffers_included(tmp_path):
    assert write(tmp_path, 7) is None
    found, model = newest(tmp_path), Model()
    checkpoint.load(found, model, ALONE)
    assert found.step == 7 and model.applied_steps == 7
    assert all(bool((v == 7).all()) for v in model.values.values())
    assert torch.equal(dict(model.module.named_buffers())["bias_of_router"], torch.full((2,), 7.0))


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.steps_on_disk(tmp_path)] == ["step-0000000004", "step-0000000003"]


def test_a_save_that_fails_says_why_and_leaves_the_older_one(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver, "write_image", full)
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


def test_old_checkpoints_are_gone_at_once_and_their_files_are_deleted_meanwhile(tmp_path, monkeypatch):
    go_on, remove = threading.Event(), saver._remove

    def slow(folders: list[Path]) -> None:
        if folders:
            assert go_on.wait(10)
        remove(folders)

    saving = saver.Saver(tmp_path, Model(), ALONE, CheckpointConfig(keep=1), about={})
    saving.start(1, {"applied_steps": 1})
    assert saving.commit().error is None
    monkeypatch.setattr(saver, "_remove", slow)
    saving.start(2, {"applied_steps": 2})
    assert saving.commit().error is None  # training goes on here
    assert [p.name for p in checkpoint.steps_on_disk(tmp_path)] == ["step-0000000002"]
    left = tmp_path / ".deleted-step-0000000001"
    assert [p.name for p in left.iterdir()] == ["tensors-00000-of-00001.safetensors"]
    assert checkpoint.newest_readable(tmp_path, warn=pytest.fail, run=None).step == 2
    go_on.set()
    saving.start(3, {"applied_steps": 3})  # waits for the space
    assert not left.exists()
    assert saving.commit(last=True).error is None
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000003"]


def test_what_a_killed_process_did_not_delete_is_deleted_by_the_next_save(tmp_path):
    left = tmp_path / ".deleted-step-0000000001"
    left.mkdir()
    (left / "tensors-00000-of-00001.safetensors").write_bytes(b"old")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / ".deleted-link").symlink_to(elsewhere)  # of someone else
    assert write(tmp_path, 2) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == [".deleted-link", "elsewhere", "step-0000000002"]


def test_damaged_checkpoints_of_later_steps_never_push_out_the_one_just_written(tmp_path):
    for step in (5, 9, 10):
        write(tmp_path, step, keep=3)
    for step in (9, 10):
        (tmp_path / f"step-{step:010d}" / "MANIFEST.json").write_text("{}")
    assert newest(tmp_path).step == 5
    write(tmp_path, 7, keep=2)
    assert [p.name for p in checkpoint.steps_on_disk(tmp_path)] == ["step-0000000007", "step-0000000005"]
    assert newest(tmp_path).step == 7


class Inline:
    """A thread that does its work at once: what kills it kills the process."""

    def __init__(self, target, args, **kwargs) -> None:
        self.start = lambda: target(*args)

    def join(self) -> None:
        pass

    def is_alive(self) -> bool:
        return False


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

    monkeypatch.setattr(saver.threading, "Thread", Inline)
    for owner, names in (
        (Path, ("mkdir", "write_text", "rename", "unlink")),
        (saver, ("write_image", "fsync")),
        (manifest, ("fsync",)),
        (saver.shutil, ("rmtree",)),
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
        if damaged_before:  # a folder of the same step that was skipped as damaged when the run resumed
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


def test_what_is_saved_is_the_step_at_which_the_save_began(tmp_path, monkeypatch):
    go_on = threading.Event()
    write_file = saver.write_image

    def slow(*args):
        assert go_on.wait(10)
        return write_file(*args)

    monkeypatch.setattr(saver, "write_image", slow)
    model = Model(1.0)
    saving = saver.Saver(tmp_path, model, ALONE, CheckpointConfig(), about={"run": "a"})
    saving.start(1, {"applied_steps": 1})
    assert saving.pending_step == 1 and not saving.written
    for value in model.values.values():  # the next steps
        value.fill_(2.0)
    dict(model.module.named_buffers())["bias_of_router"].fill_(2.0)
    assert checkpoint.newest_valid(tmp_path, ALONE, warn=print) is None
    go_on.set()
    outcome = saving.commit()
    assert outcome.error is None and saving.pending_step is None and outcome.write_s > 0
    other = Model()
    checkpoint.load(newest(tmp_path), other, ALONE)
    assert all(bool((v == 1).all()) for v in other.values.values())
    assert torch.equal(dict(other.module.named_buffers())["bias_of_router"], torch.full((2,), 1.0))


def test_a_writer_thread_that_dies_leaves_no_checkpoint(tmp_path, monkeypatch):
    class Gone(BaseException):
        pass

    def gone(*args):
        raise Gone

    monkeypatch.setattr(saver, "write_image", gone)
    monkeypatch.setattr(saver.threading, "excepthook", lambda args: None)
    assert "the writing thread died" in (write(tmp_path, 1) or "")
    assert list(tmp_path.iterdir()) == []


def test_milestones_and_the_best_stay_beside_the_newest(tmp_path):
    config = CheckpointConfig(keep=2, keep_every_tokens=300, keep_best=True)
    for step, loss, validated in ((1, 3.0, 1), (2, 1.0, 2), (3, 2.0, 3), (4, 0.5, 2), (5, 2.5, 5), (6, 2.0, 6)):
        saving = saver.Saver(tmp_path, Model(), ALONE, config, about={})
        state = {"applied_steps": step, "step": step, "validation_loss": loss, "validation_step": validated}
        saving.start(step, {**state, "milestone": step == 3})
        assert saving.commit().error is None
    # 4 looks best, but its loss is that of an earlier step.
    assert [int(p.name[-1]) for p in checkpoint.steps_on_disk(tmp_path)] == [6, 5, 3, 2]


def test_marked_checkpoints_stay_without_any_other_reason_to_keep_some(tmp_path):
    config = CheckpointConfig(keep=1, keep_at_tokens=(30, 45))
    for step in range(1, 7):  # of 10 tokens
        saving = saver.Saver(tmp_path, Model(), ALONE, config, about={})
        marked = config.marked(before=10 * step - 10, tokens=10 * step)
        saving.start(step, {"applied_steps": step, "step": step, "milestone": marked})
        assert saving.commit().error is None
    assert [int(p.name[-1]) for p in checkpoint.steps_on_disk(tmp_path)] == [6, 5, 3]


def test_a_manifest_too_large_to_be_read_back_is_a_failed_save(tmp_path):
    assert write(tmp_path, 1) is None
    saving = saver.Saver(tmp_path, Model(), ALONE, CheckpointConfig(), about={"spec": "x" * (8 << 20)})
    saving.start(2, {"applied_steps": 2})
    assert "exceed the limit of 8 MiB" in (saving.commit().error or "")
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000001"]


@pytest.mark.parametrize("kind", ["link to a folder", "broken link", "file"])
def test_a_staging_entry_that_no_save_made_is_named_with_what_to_do(tmp_path, kind):
    root, other = tmp_path / "checkpoints", tmp_path / "other"
    root.mkdir()
    other.mkdir()
    (other / "precious").write_text("kept")
    left = root / ".staging-0000000007"
    if kind == "file":
        left.write_text("")
    else:
        left.symlink_to(other if kind == "link to a folder" else tmp_path / "gone")
    model = Model(1.0)
    saving = saver.Saver(root, model, ALONE, CheckpointConfig(), about={})
    saving.start(2, {"applied_steps": 2})
    outcome = saving.commit()
    assert str(left) in str(outcome.error) and outcome.mend == "Move it elsewhere"
    assert (other / "precious").read_text() == "kept" and os.path.lexists(left)
    left.unlink()
    assert write(root, 2) is None and newest(root).step == 2


def test_checkpoints_may_be_a_link_to_a_folder_on_another_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    root = tmp_path / "checkpoints"
    root.symlink_to(tmp_path / "disk")
    for step in (1, 2, 3):
        assert write(root, step) is None
    assert newest(root).step == 3 and sorted(p.name for p in (tmp_path / "disk").iterdir())[-1] == "step-0000000003"
