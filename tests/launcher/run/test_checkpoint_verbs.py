"""`headway checkpoint list|verify|show` reads what a run has saved, names what is damaged, and changes nothing."""

import json
import shutil

import pytest
import torch

from headway.launcher.cli.main import main
from headway.launcher.run import checkpoints
from headway.launcher.run.run_dir import RunDir, write_json
from headway.parallel.config import CheckpointConfig
from headway.parallel.layout import Layout
from headway.parallel.manifest import read_manifest
from headway.parallel.saver import Saver
from headway.parallel.tensors.spans import whole

ALONE = Layout(rank=0, local_rank=0, dp_rank=0, dp_size=1, device=torch.device("cpu"))


class Model:
    """What is saved of an engine."""

    def buffers(self):
        return {}

    def read_spans(self):
        yield "param/weight", whole((3, 2)), torch.ones(3, 2)


@pytest.fixture
def run(tmp_path):
    """Checkpoints of the steps 5 and 10; the validation loss is that of step 10."""
    folder = RunDir(tmp_path / "run")
    folder.path.mkdir()
    write_json(folder.id, "mine")
    for step in (5, 10):
        saver = Saver(
            folder.checkpoints, Model(), ALONE, CheckpointConfig(), about={"run": "mine", "spec": {"seed": 7}}
        )
        state = {"step": step, "tokens": 100 * step, "validation_loss": 2.5, "validation_step": 10}
        saver.start(step, state)
        assert saver.commit().error is None
    return folder.path


def damage(run, step=10):
    """Flip a bit of the checkpoint's tensors; returns the file."""
    file = next((run / "checkpoints" / f"step-{step:010d}").glob("*.safetensors"))
    body = bytearray(file.read_bytes())
    body[-1] ^= 1
    file.write_bytes(body)
    return file


def contents(run):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(run.rglob("*"))}


def test_list_shows_the_newest_first_and_a_loss_only_where_it_was_measured(run, capsys):
    assert main(["checkpoint", "list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["10", "1,000", "2.5000"] and lines[2].split()[:3] == ["5", "500", "-"]
    assert "one process" in lines[1]
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["step"], r["validation_loss"], r["error"]) for r in rows] == [(10, 2.5, None), (5, None, None)]
    assert rows[0]["bytes"] > 24 and rows[0]["age_s"] < 60


def test_verify_names_the_file_that_changed_and_changes_nothing(run, capsys):
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count("every byte as it was written") == 2
    bad = damage(run)
    before = contents(run)
    assert main(["checkpoint", "verify", str(run)]) == 74
    newest, older = capsys.readouterr().out.splitlines()
    assert str(bad) in newest and "every byte" in older
    assert main(["checkpoint", "verify", str(run), "--step", "5"]) == 0
    assert main(["checkpoint", "verify", str(run), "--json"]) == 74
    for verb in ("list", "show"):  # sizes and manifests are right
        assert main(["checkpoint", verb, str(run)]) == 0
    assert contents(run) == before


def test_a_checkpoint_of_another_run_does_not_pass(run, capsys):
    write_json(run / "run_id.json", "another")
    assert main(["checkpoint", "verify", str(run)]) == 74
    assert "written by another run ('mine', this run is 'another')" in capsys.readouterr().out
    assert main(["checkpoint", "show", str(run)]) == 74
    assert "move the folder to its run" in capsys.readouterr().err
    assert main(["checkpoint", "list", str(run)]) == 0
    assert capsys.readouterr().out.count("DAMAGED: ") == 2
    assert all("this run is 'another'" in row["error"] for row in checkpoints.checkpoint_rows(run))


def test_list_shows_a_damaged_one_beside_the_others(run, capsys):
    next((run / "checkpoints" / "step-0000000010").glob("*.safetensors")).unlink()
    assert main(["checkpoint", "list", str(run)]) == 0
    _, newest, older = capsys.readouterr().out.splitlines()
    assert "DAMAGED" in newest and older.split()[0] == "5"


def test_show_tells_where_a_checkpoint_comes_from_and_what_it_holds(run, capsys):
    assert main(["checkpoint", "show", str(run), "--step", "5"]) == 0
    text = capsys.readouterr().out
    assert "tokens: 500" in text and 'run: "mine"' in text and "param/weight [3, 2]" in text
    assert main(["checkpoint", "show", str(run), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["step"] == 10 and shown["about"]["spec"] == {"seed": 7} and shown["shapes"] == {"param/weight": [3, 2]}


@pytest.mark.parametrize("arguments", [["RUN", "--step", "7"], ["absent"]])
def test_what_is_not_there_is_said(run, capsys, arguments):
    assert main(["checkpoint", "list", *(word.replace("RUN", str(run)) for word in arguments)]) == 66
    said = capsys.readouterr().err
    assert "there are: 10, 5" in said if "--step" in arguments else "absent: no such folder" in said


def test_a_checkpoint_that_a_training_deletes_meanwhile_is_no_damage(run, capsys, monkeypatch):
    def late(path, **kwargs):
        if path.name == "step-0000000005":
            (path / "MANIFEST.json").unlink()  # retention has begun with it
            monkeypatch.setattr(checkpoints.time, "sleep", lambda _: shutil.rmtree(path))
        return read_manifest(path, **kwargs)

    monkeypatch.setattr(checkpoints, "read_manifest", late)
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert "step 5" not in capsys.readouterr().out
