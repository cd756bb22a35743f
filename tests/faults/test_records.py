"""What a run has recorded is what was written, once for each step, whatever disks and clocks do."""

import errno
import json
import os
import random

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from headway.launcher import lines
from headway.launcher.lines import LineFile, decode, encode
from headway.launcher.records import read_run
from headway.launcher.run_dir import RunDir
from headway.launcher.tracking import Tracker


def record(step: int, loss: float = 2.5) -> dict:
    timing = {"step_s": 0.1, "data_s": 0.0, "tokens_per_s": 10.0}
    values = {"loss": loss, "aux_loss": 0.0, "grad_norm": 1.0, "lr": 0.1}
    return {"kind": "train", "step": step, "tokens": 8 * step, **values, **timing}


def tracker(run: RunDir, start: int = 0, *, tensorboard: bool = False) -> Tracker:
    run.path.mkdir(exist_ok=True)
    return Tracker(run, main=True, tensorboard=tensorboard, log_every_steps=100, total_steps=100, start_step=start)


def test_a_line_is_json_and_its_record_comes_back():
    for value in (record(3), {"text": 'a "crc": "quoted", é \u2028'}, {"loss": float("inf")}):
        assert decode(encode(value)) == value
        json.loads(encode(value))
    assert decode(json.dumps({"step": 1})) == {"step": 1}  # as they were before there were checksums


def test_no_changed_byte_of_a_line_is_taken_for_a_number():
    # F27
    line, chance = encode(record(7)).encode(), random.Random(1)
    for _ in range(2000):
        body = bytearray(line)
        body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        found = decode(body.decode(errors="replace"))
        assert found is None or all(found.get(key) == value for key, value in record(7).items())
    for cut in range(len(line)):
        assert decode(line[:cut].decode()) is None


def test_damaged_lines_are_left_out_everywhere(tmp_path):
    run = RunDir(tmp_path)
    whole = [encode(record(step, loss=float(step))) for step in (1, 2, 3)]
    whole[1] = whole[1].replace('"loss": 2.0', '"loss": 9.0')
    run.metrics.write_text("\n".join(whole) + "\n" + whole[0][:20])
    assert [r["step"] for r in run.read_metrics()] == [1, 3]
    (tmp_path / "spec.json").write_text("{}")
    run.truncate_metrics(last_step=3)
    assert [decode(line) for line in run.metrics.read_text().splitlines()] == [record(1, 1.0), record(3, 3.0)]


def test_records_wait_for_room_on_the_disk_and_none_is_lost(tmp_path, monkeypatch, capsys):
    write, room = os.write, [40, 0, 0]

    def scarce(fd, data):
        if not room:
            return write(fd, data)
        if (left := room.pop(0)) == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:left])

    track = tracker(RunDir(tmp_path / "run"))
    monkeypatch.setattr(lines.os, "write", scarce)
    for step in (1, 2, 3):
        track.train(record(step), seconds_left=None)
    track.close()
    assert [r["step"] for r in RunDir(tmp_path / "run").read_metrics()] == [1, 2, 3]
    assert capsys.readouterr().out.count("RECORDS CANNOT BE WRITTEN") == 1


def test_records_that_never_found_room_are_no_silent_loss(tmp_path, monkeypatch):
    def full(fd, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = LineFile(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(lines.os, "write", full)
    assert isinstance(file.write("a"), OSError) and file.write("b") is None  # said once
    with pytest.raises(OSError, match="could not be written"):
        file.close()


def test_a_tensorboard_that_cannot_be_written_ends_no_training(tmp_path, monkeypatch, capsys):
    run = RunDir(tmp_path / "run")
    track = tracker(run, tensorboard=True)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert track._board is not None
    monkeypatch.setattr(track._board, "add_scalar", full)
    for step in (1, 2):
        track.train(record(step), seconds_left=None)
    track.flush()
    track.close()
    assert capsys.readouterr().out.count("TENSORBOARD IS NOT WRITTEN ANY MORE") == 1
    assert [r["step"] for r in run.read_metrics()] == [1, 2]


@pytest.mark.parametrize("clock", [-86_400, 86_400, 0, "1970"])
def test_each_step_is_shown_once_whatever_the_clock_did_between_two_attempts(tmp_path, monkeypatch, clock):
    # F12
    import time

    now, run = time.time, RunDir(tmp_path / "run")
    first = tracker(run, tensorboard=True)
    for step in (1, 2, 3, 4):
        first.train(record(step), seconds_left=None)
    first.close()
    monkeypatch.setattr(time, "time", (lambda: 1000.0) if clock == "1970" else lambda: now() + clock)
    run.truncate_metrics(last_step=2)
    second = tracker(run, start=2, tensorboard=True)
    for step in (3, 4, 5):
        second.train(record(step, loss=9.0), seconds_left=None)
    second.close()
    assert read_run(run.path).train.tokens.tolist() == [8, 16, 24, 32, 40]
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    shown = {event.step: event.value for event in board.Scalars("train/loss")}
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert shown[3] == 9.0
