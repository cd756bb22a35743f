"""Records of a run are read as they were written, once per step, despite disk faults and clock changes."""

import errno
import json
import os
import random
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from headway.launcher.board.writer import TensorBoard
from headway.launcher.compare.analyse import StudyResult
from headway.launcher.compare.fairness import run_differences
from headway.launcher.report.page import to_markdown
from headway.launcher.report.study import _warnings
from headway.launcher.run import lines
from headway.launcher.run.card import with_attempts
from headway.launcher.run.chain import Chain
from headway.launcher.run.lines import Damage, LineFile, decode, encode, gaps, read_lines
from headway.launcher.run.record_check import RecordCheck, check_records
from headway.launcher.run.records import RunRecord, read_run
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.load import load_spec
from headway.launcher.train.loop import finish
from headway.launcher.train.tracking import Tracker

YAML = Path(__file__).resolve().parents[2] / "yaml"


def record(step: int, loss: float = 2.5) -> dict:
    timing = {"step_s": 0.1, "data_s": 0.0, "tokens_per_s": 10.0}
    values = {"loss": loss, "aux_loss": 0.0, "grad_norm": 1.0, "lr": 0.1}
    return {"kind": "train", "step": step, "tokens": 8 * step, **values, **timing}


def tracker(run: RunDir, start: int = 0, *, tensorboard: bool = False) -> Tracker:
    run.path.mkdir(exist_ok=True)
    return Tracker(run, main=True, tensorboard=tensorboard, log_every_steps=100, total_steps=100, start_step=start)


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def shown(run: RunDir, tag: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def run_record(card: dict) -> RunRecord:
    return cast(RunRecord, SimpleNamespace(run=card, summary={}))


def test_a_line_is_json_and_its_record_comes_back():
    for value in (record(3), {"text": 'a "crc": "quoted", é \u2028'}, {"loss": float("inf")}):
        assert decode(encode(value)) == value
        json.loads(encode(value))
    assert decode(json.dumps({"step": 1})) == {"step": 1}  # the format before checksums


def test_a_changed_byte_of_a_line_is_detected():
    # F27
    line, chance = encode(record(7)).encode(), random.Random(1)
    for _ in range(2000):
        body = bytearray(line)
        body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        found = decode(body.decode(errors="replace"))
        assert found is None or all(found.get(key) == value for key, value in record(7).items())
    for cut in range(len(line)):
        assert decode(line[:cut].decode()) is None


def test_damaged_lines_are_skipped_by_all_readers(tmp_path):
    run = RunDir(tmp_path)
    whole = [encode(record(step, loss=float(step))) for step in (1, 2, 3)]
    whole[1] = whole[1].replace('"loss": 2.0', '"loss": 9.0')
    run.metrics.write_text("\n".join(whole) + "\n" + whole[0][:20])
    assert [r["step"] for r in run.read_metrics()] == [1, 3]
    (tmp_path / "spec.json").write_text("{}")
    run.cut_metrics(last_step=3)
    assert [decode(line) for line in run.metrics.read_text().splitlines()] == [record(1, 1.0), record(3, 3.0)]


def test_records_wait_for_disk_space_and_none_is_lost(tmp_path, monkeypatch, capsys):
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


def test_records_that_never_found_disk_space_are_reported(tmp_path, monkeypatch):
    file = LineFile(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(lines, "_MOST_BYTES", 1000)
    monkeypatch.setattr(lines.os, "write", full)
    assert isinstance(file.write("a"), OSError) and file.write("b") is None  # reported once
    with pytest.raises(OSError, match="could not be written"):
        file.write("c" * 1000)  # more than may wait in memory
    with pytest.raises(OSError, match="could not be written"):
        file.close()


@pytest.mark.parametrize("where", ["folder", "call", "thread"])
def test_training_continues_if_tensorboard_cannot_be_written(tmp_path, monkeypatch, capsys, where):
    # F27
    run = RunDir(tmp_path / "run")
    if where == "folder":
        run.path.mkdir()
        run.tensorboard.write_text("no folder")
    track = tracker(run, tensorboard=True)
    if where == "call":
        (board,) = track._sinks
        monkeypatch.setattr(cast(TensorBoard, board).board, "add_scalar", full)
    if where == "thread":
        monkeypatch.setattr(RecordWriter, "write", full)
        monkeypatch.setattr(threading, "excepthook", lambda _: None)  # it would print the thread's exception
    for step in range(1, 30):
        track.train(record(step), seconds_left=None)
        track.flush()
    track.close()
    assert capsys.readouterr().out.count("TENSORBOARD IS NOT WRITTEN ANY MORE") == 1
    assert [r["step"] for r in run.read_metrics()] == list(range(1, 30))


DAY = 86_400.0
CLOCKS = {  # clock times at the start of each of three attempts, and in the middle of the last
    "back a day": [0.0, -DAY, -2 * DAY, -2 * DAY],
    "forward a day": [0.0, DAY, 2 * DAY, 2 * DAY],
    "equal": [0.0, 0.0, 0.0, 0.0],
    "1970": [0.0, -1.7e9, -1.7e9 - 500, -1.7e9 - 400],
    "during the run": [0.0, 1.0, 2.0, -DAY],
    "times of files reversed": [0.0, 1.0, 2.0, 3.0],
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_each_step_is_shown_once_after_clock_changes(tmp_path, monkeypatch, clock):
    # F12
    run = RunDir(tmp_path / "run")
    for attempt, (start, offset) in enumerate(zip((0, 2, 4), CLOCKS[clock][:3], strict=True)):
        monkeypatch.setattr(time, "time", lambda now=1.7e9 + 1000 + offset: now)
        if clock == "times of files reversed":
            for age, path in enumerate(sorted(run.path.glob("**/*"))):
                os.utime(path, (1e9 - age, 1e9 - age))
        run.path.mkdir(exist_ok=True)
        run.cut_metrics(last_step=start)
        track = tracker(run, start=start, tensorboard=True)
        for step in range(start + 1, start + 5):
            track.train(record(step, loss=float(attempt)), seconds_left=None)
            monkeypatch.setattr(
                time, "time", lambda now=1.7e9 + 1000 + (CLOCKS[clock][3] if attempt == 2 else offset): now
            )
        track.close()
    wanted = [(1, 0.0), (2, 0.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0), (7, 2.0), (8, 2.0)]
    assert [(r["step"], r["loss"]) for r in run.read_metrics()] == wanted
    assert shown(run, "train/loss") == wanted


def test_no_duration_is_measured_with_a_clock_that_can_jump():
    # F12
    allowed = {
        "launcher/cli/listing.py": 1,
        "launcher/run/checkpoints.py": 1,
        "data/manifest.py": 1,
    }  # ages of files, compared with the files' own times
    root = Path(__file__).resolve().parents[2]
    files = [
        p for folder in ("launcher", "parallel", "model", "data", "kernels") for p in (root / folder).rglob("*.py")
    ]
    found = {str(p.relative_to(root)): n for p in files if (n := len(re.findall(r"\btime\.time\(", p.read_text())))}
    assert found == allowed


# ---------------------------------------------------------------- lost records are reported


def test_a_line_without_a_checksum_among_lines_with_one_is_damaged(tmp_path):
    path, damage = tmp_path / "metrics.jsonl", Damage()
    forged = encode(record(2)).replace('"crc"', '"crb"').replace('"loss": 2.5', '"loss": 1.5')
    path.write_text("\n".join([encode(record(1)), forged, encode(record(3)), encode(record(4))[:50]]))
    assert [r["step"] for r in read_lines(path, damage)] == [1, 3]
    assert damage.lines == [2]  # an incomplete last line is not damage: it is being written, or the writer was killed
    path.write_text(json.dumps(record(1)) + "\n" + encode(record(2)) + "\n")
    assert [r["step"] for r in read_lines(path)] == [1, 2]  # a run of an older version that continues


def test_lost_records_are_counted_and_named(tmp_path):
    run = RunDir(tmp_path)
    whole = [encode(record(step)) for step in range(1, 10)]
    whole[4] = whole[4].replace("2.5", "3.5")
    run.metrics.write_text("\n".join(whole[:2] + whole[4:]) + "\n")
    lost = "1 line is damaged and no record of step 3 to 5"
    assert str(read_run(run.path).lost) == lost
    cells = [SimpleNamespace(key="gqa/seed-1", record=read_run(run.path), damaged=False, done=False)]
    facts = SimpleNamespace(pairing=SimpleNamespace(status="PAIRED"), confounds=0)
    page = to_markdown(list(_warnings(cast(StudyResult, SimpleNamespace(cells=cells, short_cells=[], **vars(facts))))))
    assert f"gqa/seed-1: {lost}" in page
    assert str(run.cut_metrics(last_step=11).lost) == "1 line is damaged and no record of step 3 to 5, 10 to 11"
    assert not run.cut_metrics(last_step=2).lost
    assert gaps([], 3) == ((1, 3),) and gaps([1, 2, 3], 3) == () and gaps([2, 4]) == ((1, 1), (3, 3))


def test_a_file_of_records_that_cannot_be_read_is_not_replaced_by_an_empty_one(tmp_path):
    run = RunDir(tmp_path)
    run.metrics.mkdir()
    with pytest.raises(OSError):
        run.cut_metrics(last_step=2)
    assert run.metrics.is_dir()


def test_a_power_cut_after_records_are_cut_leaves_one_of_the_two_files(tmp_path, monkeypatch):
    run, order = RunDir(tmp_path), []
    run.metrics.write_text("".join(encode(record(step)) + "\n" for step in (1, 2, 3)))
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: order.append(str(Path(f"/proc/self/fd/{fd}").readlink())) or fsync(fd))
    monkeypatch.setattr(Path, "replace", lambda self, to: order.append("replace") or replace(self, to))
    run.cut_metrics(last_step=2)
    assert order == [str(tmp_path / "metrics.tmp"), "replace", str(tmp_path)]


def test_a_concurrent_reader_sees_only_whole_records(tmp_path):
    run, done = RunDir(tmp_path), threading.Event()

    def write():
        file = LineFile(run.metrics)
        for step in range(1, 1500):
            file.write(encode(record(step)))
        file.close()
        done.set()

    threading.Thread(target=write).start()
    while not done.is_set():
        damage = Damage()
        steps = [r["step"] for r in run.read_metrics(damage)]
        assert steps == list(range(1, len(steps) + 1)) and damage.lines == []
    assert len(list(run.read_metrics())) == 1499


def test_a_run_with_unwritten_records_is_not_complete(tmp_path, monkeypatch, capsys):
    run = RunDir(tmp_path)
    track, write = tracker(run), os.write
    monkeypatch.setattr(lines.os, "write", full)
    track.train(record(1), seconds_left=None)
    track.flush()
    assert "RECORDS ARE NOT SAFE ON THE DISK: No space left" in capsys.readouterr().out
    session = SimpleNamespace(validation_loss=2.0, step=1, layout=SimpleNamespace(is_main=True), run=run, tracker=track)
    with pytest.raises(OSError, match="could not be written") as caught:
        finish(cast(Any, session))
    assert caught.value.errno == errno.ENOSPC  # for which a rank exits with 74
    assert not run.summary.exists()
    monkeypatch.setattr(lines.os, "write", write)
    track.close()
    assert [r["step"] for r in run.read_metrics()] == [1]


def test_code_that_changed_between_two_starts_of_a_run_is_a_confound():
    spec = load_spec(YAML / "base" / "tiny.yaml").spec

    def card(commit: str) -> dict:
        versions = {"torch": "2.13"}
        return {"started_at": "2030-01-01T00:00:00Z", "git_commit": commit, "versions": versions, "machine": {}}

    first = with_attempts(card("aaa"), {}, spec, from_step=0)
    same = with_attempts(card("aaa"), first, spec, from_step=40)
    other = with_attempts(card("bbb"), same, spec, from_step=80)
    again = with_attempts(card("aaa"), other, spec, from_step=80)  # no step of bbb is left
    found = [run_differences({"gqa/seed-1": run_record(c)}) for c in (first, same, other, again)]
    assert found == [[], [], ["git_commit changed within gqa/seed-1: aaa from step 0, bbb from step 80"], []]
    many = {**other, "attempts": [first["attempts"][0], *[other["attempts"][-1]] * 300]}
    kept = with_attempts(card("ccc"), many, spec, from_step=90)["attempts"]
    assert [len(kept), kept[0]["git_commit"], kept[-1]["git_commit"]] == [200, "aaa", "ccc"]
    older = with_attempts(
        card("bbb"), card("aaa"), spec, from_step=5
    )  # a card of an older version without a list of attempts
    assert [a["git_commit"] for a in older["attempts"]] == ["aaa", "bbb"]


def test_a_resumed_run_says_which_records_it_lost(headway):
    # F27
    assert headway.train("train.tokens=2560", "train.validate_every_tokens=1280").returncode == 0
    run = RunDir(headway.folder / "runs" / "tiny")
    text = run.metrics.read_text().splitlines(keepends=True)
    (place,) = [i for i, line in enumerate(text) if '"kind": "train", "step": 3,' in line]
    run.metrics.write_text("".join([*text[:place], text[place].replace("loss", "lost"), *text[place + 1 :]]))
    run.summary.unlink()
    done = headway.train("train.tokens=2560", "train.validate_every_tokens=1280")
    assert done.returncode == 0 and "RECORDS WERE LOST" in done.stdout
    assert "1 line is damaged and no record of step 3" in done.stdout
    (lost,) = [r for r in run.read_metrics() if r["kind"] == "records_lost"]
    assert (lost["lines"], lost["gaps"]) == (1, [[3, 3]])
    assert [a["from_step"] for a in json.loads(run.card.read_text())["attempts"]] == [0, 10]
    assert str(read_run(run.path).lost) == "no record of step 3"


# ---------------------------------------------------------------- the chain of checksums


def trained(run: RunDir, steps: int, start: int = 0, chain: Chain | None = None) -> list[Chain]:
    """Write records as training does; returns the end of the records before each step, and after the last."""
    run.path.mkdir(exist_ok=True)
    ends = []
    track = Tracker(
        run, main=True, tensorboard=False, log_every_steps=100, total_steps=100, start_step=start, chain=chain
    )
    for step in range(start + 1, start + steps + 1):
        ends.append(Chain.restored(track.end()))
        track.train(record(step), seconds_left=None)
        if step % 2 == 0:
            track.validation({"kind": "validation", "step": step, "loss": 2.0, "accuracy": 0.1, "targets": 8})
    ends.append(Chain.restored(track.end()))
    track.close()
    assert all(ends)
    return ends


def finished(run: RunDir, end: Chain) -> None:
    value = {"complete": True, "steps": end.step, "records": end.state()}
    run.summary.write_text(json.dumps(value))


@pytest.mark.parametrize("old", [0, 3])
@pytest.mark.parametrize("torn", [b"", b'{"kind": "tra'])
def test_a_resume_cuts_in_place_and_the_chain_goes_on(tmp_path, torn, old):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.id.write_text('"abc"')
    run.metrics.write_text("".join(encode(record(step)) + "\n" for step in range(1, old + 1)))  # an earlier version's
    ends = trained(run, 9, start=old)
    track = Tracker(run, main=True, tensorboard=False, log_every_steps=100, total_steps=100, start_step=0)
    track.event({"kind": "checkpoint", "step": old + 6}, "")  # written after later steps were
    track.close()
    with run.metrics.open("ab") as file:
        file.write(torn)
    before, inode = run.metrics.read_bytes(), run.metrics.stat().st_ino
    anchor = ends[6]
    cut = run.cut_metrics(last_step=old + 6, anchor=anchor)
    assert not cut.lost and run.metrics.stat().st_ino == inode
    assert run.metrics.read_bytes()[: anchor.bytes] == before[: anchor.bytes]
    kept = list(run.read_metrics())
    assert kept[-1] == {"kind": "checkpoint", "step": old + 6} and max(r["step"] for r in kept) == old + 6
    finished(run, trained(run, 4, start=old + 6, chain=cut.chain)[-1])
    damage = Damage()
    assert [r["step"] for r in run.read_metrics(damage) if r["kind"] == "train"] == list(range(1, old + 11))
    assert damage == Damage(unchained=old) and check_records(run.path) == RecordCheck(checked=True)


def test_a_resume_without_an_anchor_or_with_a_damaged_beginning_writes_the_records_anew(tmp_path):
    run = RunDir(tmp_path / "run")
    anchor = trained(run, 9)[6]
    lines = run.metrics.read_text().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if '"validation", "step": 4,' in line)
    run.metrics.write_text("".join(lines[:place] + lines[place + 1 :]))
    cut = run.cut_metrics(last_step=6, anchor=anchor)
    assert str(cut.lost) == "lines were removed in 1 place"  # no step of training is missing
    finished(run, trained(run, 4, start=6, chain=cut.chain)[-1])
    assert check_records(run.path) == RecordCheck(checked=True)
    assert not run.cut_metrics(last_step=8).lost and not read_run(run.path).lost


def test_the_records_of_a_branch_are_bound_to_the_branch(tmp_path):
    parent, branch = RunDir(tmp_path / "parent"), RunDir(tmp_path / "branch")
    for run in (parent, branch):
        run.path.mkdir()
        run.id.write_text(json.dumps(run.path.name))
    trained(parent, 9)
    cut = branch.cut_metrics(last_step=6, source=parent)
    finished(branch, trained(branch, 2, start=6, chain=cut.chain)[-1])
    assert check_records(branch.path) == RecordCheck(checked=True)
    assert [r["step"] for r in branch.read_metrics() if r["kind"] == "train"] == list(range(1, 9))
    branch.metrics.write_bytes(parent.metrics.read_bytes())
    assert "belong to another run" in str(check_records(branch.path).damage)


@pytest.mark.parametrize("seed", range(3))
def test_any_removed_moved_or_repeated_line_is_noticed(tmp_path, seed):
    run, chance = RunDir(tmp_path / "run"), random.Random(seed)
    finished(run, trained(run, 40)[-1])
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    for _ in range(60):
        a, b = sorted(chance.sample(range(len(lines) + 1), 2))
        removed, repeated = lines[:a] + lines[b:], lines[:b] + lines[a:]
        moved = lines[:a] + lines[b:] + lines[a:b]
        for found in (removed, repeated, *([moved] if moved != lines else [])):
            run.metrics.write_bytes(b"".join(found))
            assert check_records(run.path).damage
    run.metrics.write_bytes(b"".join(lines))
    assert check_records(run.path) == RecordCheck(checked=True)


def test_a_run_that_was_killed_and_resumed_has_whole_records(headway):
    options = ("train.tokens=5120", "checkpoint.every_tokens=1280", "train.validate_every_tokens=1280")
    run = RunDir(headway.folder / "runs" / "tiny")
    fault = {"HEADWAY_FAULT": "save:after_rename#2:kill"}
    assert headway.train(*options, "launch.restarts=0", env=fault).returncode != 0
    assert not run.is_complete()
    done = headway.train(*options)
    assert done.returncode == 0 and "resumed from" in done.stdout and "RECORDS WERE LOST" not in done.stdout
    assert check_records(run.path) == RecordCheck(checked=True) and not read_run(run.path).lost
    named = json.loads(run.summary.read_text())["records"]
    assert (named["lines"], named["step"]) == (len(run.metrics.read_bytes().splitlines()), 20)
