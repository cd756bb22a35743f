"""Training records read as columns: the same numbers as from parsed lines, whatever the lines are."""

from __future__ import annotations

import json
import math
import random
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headway.launcher.run.chain import Chain
from headway.launcher.run.columns.form import NUMBERS, Forms, row_of
from headway.launcher.run.columns.table import StepHashes, TrainTable, gaps_between
from headway.launcher.run.lines import Damage, gaps, lines_of, parse_raw
from headway.launcher.run.records import read_run, step_seconds
from headway.launcher.run.run_dir import RunDir

VALUES: list[Any] = [
    0.0,
    -0.0,
    -1.5e-7,
    3,
    10**17,
    1e300,
    math.inf,
    -math.inf,
    math.nan,
    None,
    True,
    "text",
    [1],
    10**40,
]


def record(step: int, draw: random.Random, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": "train", "step": step, "tokens": 4096 * step, "loss": draw.gauss(3, 1)}
    found |= {"lr": draw.random(), "grad_norm": draw.random(), "skipped": draw.random() < 0.1}
    found |= {"batch_hash": f"{draw.getrandbits(64):016x}", "step_s": draw.random(), "data_s": draw.random() / 1000}
    return found | {"train_s": step * 0.1234567} | more


def write(folder: Path, records: list[dict[str, Any]]) -> RunDir:
    run = RunDir(folder)
    run.id.write_text(json.dumps("0123456789abcdef"))
    chain = Chain.start(run.tag)
    run.metrics.write_text("".join(chain.line(r) + "\n" for r in records))
    return run


def rows(run: RunDir, *, quick: bool) -> tuple[list[Any], Damage, int]:
    """Rows of the training records, what is damaged, and how many lines a form has read."""
    damage, found, by_form = Damage(), [], 0
    with run.metrics.open("rb") as file:
        for line in lines_of(file, damage, tag=run.tag, parse=Forms().read if quick else parse_raw):
            by_form += line.row is not None
            row = line.row or (row_of(line.record) if line.record.get("kind") == "train" else None)
            if row is not None:
                found.append((row.step, np.array(row.values).tobytes(), *row[2:]))
    return found, damage, by_form


def same(run: RunDir) -> int:
    """Check that both ways of reading agree, to the last bit. Returns the number of lines that a form has read."""
    quick, quick_damage, by_form = rows(run, quick=True)
    slow, slow_damage, none = rows(run, quick=False)
    assert quick == slow and quick_damage == slow_damage and none == 0
    return by_form


def test_a_long_run_is_read_by_its_form(tmp_path):
    draw = random.Random(0)
    run = write(tmp_path, [record(step, draw) for step in range(1, 501)])
    assert same(run) == 500 - 32


def test_values_of_any_kind_are_read_as_the_parser_reads_them(tmp_path):
    draw = random.Random(1)
    records = [record(step, draw) for step in range(1, 101)]
    keys = (*NUMBERS, "lr", "skipped", "batch_hash", "router", "new")
    records += [record(step, draw, **{draw.choice(keys): draw.choice(VALUES)}) for step in range(101, 901)]
    records += [record(step, draw, router={"layer_00": {"q": {"load": [[0.5, 0.5]]}}}) for step in range(901, 1001)]
    assert 400 < same(write(tmp_path, records)) < 1000


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_read_as_the_parser_reads_them(tmp_path, seed):
    draw = random.Random(seed)
    run = write(tmp_path, [record(step, draw) for step in range(1, 301)])
    whole = run.metrics.read_bytes().splitlines(keepends=True)
    for _ in range(25):
        lines = list(whole)
        at = draw.randrange(len(lines))
        match draw.randrange(4):
            case 0:
                del lines[at]
            case 1:
                lines.insert(at, draw.choice(lines))
            case 2:
                lines[at] = lines[at][: draw.randrange(len(lines[at]))]
            case 3:
                byte = draw.randrange(len(lines[at]))
                lines[at] = lines[at][:byte] + bytes([draw.randrange(256)]) + lines[at][byte + 1 :]
        run.metrics.write_bytes(b"".join(lines))
        assert same(run) > 0


def test_a_changed_number_with_its_old_checksum_is_damage(tmp_path):
    draw = random.Random(2)
    run = write(tmp_path, [record(step, draw, loss=2.5) for step in range(1, 201)])
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    lines[150] = lines[150].replace(b'"loss": 2.5', b'"loss": 2.4')
    run.metrics.write_bytes(b"".join(lines))
    assert str(read_run(tmp_path).lost) == "1 line is damaged and no record of step 151"


def test_the_later_of_two_records_of_a_step_counts(tmp_path):
    draw = random.Random(4)
    steps = [*range(1, 81), *range(61, 101)]
    records = [record(step, draw) for step in steps]
    run, last = read_run(write(tmp_path, records).path), {r["step"]: r for r in records}
    assert run.train.step.tolist() == list(range(1, 101)) and not run.lost
    assert run.train.loss.tolist() == [last[step]["loss"] for step in range(1, 101)]
    assert run.step_s.tolist() == [last[step]["step_s"] for step in range(1, 101)]
    assert run.skipped == sum(r["skipped"] for r in last.values())
    assert run.batch_hash == {step: r["batch_hash"] for step, r in last.items()}


@pytest.mark.parametrize("marked", [{5, 6}, set(range(20, 60)), {150}])
def test_profiled_steps_have_no_times_wherever_they_stand(tmp_path, marked):
    # also where a form would be made of them, and behind records of a known form
    draw = random.Random(5)
    records = [record(step, draw) for step in range(1, 201)]
    records = [r | {"profiled": True} if r["step"] in marked else r for r in records]
    run = read_run(write(tmp_path, records).path)
    assert len(run.train) == 200 and not run.lost
    for key, found in {"step_s": run.step_s, "data_s": run.data_s}.items():
        assert found.tolist() == [r[key] for r in records if r["step"] not in marked]


def test_hashes_of_other_lengths_and_steps_without_one_are_kept_apart():
    table = TrainTable(NUMBERS)
    hashes: list[Any] = ["0" * 16, "short", None, "\u00e9" * 16, "1" * 16]
    for step, hashed in enumerate(hashes, 1):
        row = row_of({"step": step, "batch_hash": hashed})
        assert row is not None
        table.add_row(row, 0)
    assert table.hashes(table.kept()) == {step: h for step, h in enumerate(hashes, 1) if h is not None}


def test_hashes_are_a_mapping_with_and_without_gaps():
    for steps in ([3, 4, 5], [3, 5, 9], []):
        found = StepHashes(np.array(steps, dtype=np.int64), b"".join(b"%016d" % step for step in steps))
        assert found == {step: f"{step:016d}" for step in steps} and len(found) == len(steps)
        assert 4 in found or 4 not in steps
        assert 2 not in found and 10 not in found and found.get(6) is None


@pytest.mark.parametrize("steps", [[], [1, 2, 3], [2, 3, 7, 8, 12], [5]])
def test_gaps_of_columns_are_those_of_lists(steps):
    assert gaps_between(np.array(steps, dtype=np.int64)) == gaps(steps)


def test_lists_in_records_are_matched_item_by_item(tmp_path):
    draw = random.Random(8)
    loads = [[[0.5, 0.5], [1]], [[0.25, None, 0.5]], [[0.1], [], [2]], [], [[0.5, 0.5], [1], [0.5]], [["a"]]]
    loads += [[[0.5, 0.5]]] * 40
    records = [record(step, draw, lists=draw.choice(loads)) for step in range(1, 401)]
    run = write(tmp_path, records)
    assert 0 < same(run) < 400 - 32
    whole = run.metrics.read_bytes().splitlines(keepends=True)
    changes = (b"[[0.5, 0.5,]]", b"[[0.5 0.5]]", b"[[0.5, 0.5]", b"[0.5, [0.5]]", b"[[0.50, 0.5]]", b"[[,]]", b"[ []]")
    for changed in changes:
        later = [_with_checksum(line.replace(b"[[0.5, 0.5]]", changed)) for line in whole[200:]]
        run.metrics.write_bytes(b"".join(whole[:200] + later))
        assert same(run) > 0


def test_a_record_with_very_many_values_is_left_to_the_parser(tmp_path):
    draw, many = random.Random(9), {f"layer_{i:02d}": {"gate": [0.5] * 8, "load": 0.5} for i in range(300)}
    began = time.process_time()
    assert same(write(tmp_path, [record(step, draw, router=many) for step in range(1, 41)])) == 0
    assert time.process_time() - began < 5  # patterns of such records took seconds to compile


@pytest.mark.parametrize("depth", [3, 100, 900])
def test_deep_records_are_read(tmp_path, depth):
    draw, deep = random.Random(10), json.loads("[" * depth + "]" * depth)
    assert (same(write(tmp_path, [record(step, draw, deep=deep) for step in range(1, 61)])) > 0) == (depth < 900)
    assert len(read_run(tmp_path).train) == 60


def _with_checksum(line: bytes) -> bytes:
    body = line.rpartition(b', "crc": "')[0]
    return body + f', "crc": "{zlib.crc32(body):08x}"}}\n'.encode()


NUMBERS_AS_TEXT = (
    *("0", "-0", "-0.0", "-0e5", "0.10", "1e5", "1E+05", "12345678901234567", "123456789012345678", "1" * 19, "1" * 40),
    *("2.5e-324", "1e400", "-Infinity", "NaN", "0." + "3" * 30, "0." + "3" * 31, "1e1000"),
)
NO_NUMBERS = ("00", "01", "-", ".5", "5.", "1e", "+1", "-NaN", "--1", "0x1", "1_0", "1 2", "")


@pytest.mark.parametrize("text", [*NUMBERS_AS_TEXT, *NO_NUMBERS])
def test_numbers_in_any_spelling_are_read_as_the_parser_reads_them(tmp_path, text):
    draw = random.Random(7)
    run = write(tmp_path, [record(step, draw, loss=2.5) for step in range(1, 41)])
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    body = lines[-1].rpartition(b', "crc": "')[0].replace(b'"loss": 2.5', f'"loss": {text}'.encode())
    lines[-1] = body + f', "crc": "{zlib.crc32(body):08x}"}}\n'.encode()
    run.metrics.write_bytes(b"".join(lines))
    same(run)
    assert read_run(tmp_path).lost.lines == (text in NO_NUMBERS)


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("damaged", [False, True])
def test_rewritten_records_are_those_that_are_encoded_one_by_one(tmp_path, branch, damaged):
    draw = random.Random(6)
    records = [record(step, draw) for step in range(1, 201)]
    for step in (50, 100, 150, 200):
        records.insert(records.index(records[step]), {"kind": "validation", "step": step, "loss": draw.random()})
    records[120:120] = [{"kind": "resume", "text": "\u00e9\n"}, record(99, draw, router={"layer_00": {}})]
    (tmp_path / "one").mkdir()
    source = write(tmp_path / "one", records)
    if damaged:
        lines = source.metrics.read_bytes().splitlines(keepends=True)
        lines[60] = lines[60].replace(b"4096", b"4097") if b"4096" in lines[60] else lines[60][:-9] + b"\n"
        del lines[70], lines[90]
        source.metrics.write_bytes(b"".join(lines) + lines[3][:40])
    target = RunDir(tmp_path / "other") if branch else source
    if branch:
        target.path.mkdir()
        target.id.write_text(json.dumps("fedcba9876543210"))
    chain = Chain.start(target.tag)
    kept = [r for r in source.read_metrics() if r.get("step", 0) <= 180]
    wanted = "".join(chain.line(r) + "\n" for r in kept)
    cut = target.cut_metrics(last_step=180, source=source if branch else None)
    assert target.metrics.read_text() == wanted and cut.chain == chain
    assert len(kept) == 185 - 3 * damaged and bool(cut.lost) == damaged


def test_seconds_of_steps_leave_out_the_first_ones(tmp_path):
    draw = random.Random(5)
    records = [record(step, draw) for step in range(1, 61)]
    records.append({"kind": "validation", "step": 60, "loss": 3.0, "step_s": 5.0})
    assert step_seconds(write(tmp_path, records), after=2).tolist() == [r["step_s"] for r in records[2:60]]
