"""`headway board`: event files are rebuilt from the records, and the server is local unless --expose is given."""

import json
import os
import re
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.board.files import rebuild
from headway.launcher.board.links import Links, log_folder, runs_below
from headway.launcher.board.server import board
from headway.launcher.cli.main import main
from headway.launcher.run.lines import encode
from headway.launcher.run.run_dir import RunDir, write_json
from headway.launcher.train.tracking import Tracker

ROUTER = {
    "load": [[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]],
    "effective": [2.0, 4.0],
    "dead": [2, 0],
    "entropy": [1.0, 1.2],
    "gate": [0.9, 1.1],
    "top1_margin": [0.2, 0.4],
    "close": [0.0, 0.5],
    "switch_rate": [0.5, None],
    "mutual_information": [0.1, 0.2],
    "information_share": [0.3, None],
}
HEADS = {"c_w": 0.1, "c_q": 0.2, "c_o": 0.3, "effective_rank": 3.5, "cka": 0.4}


def train(run: RunDir, start: int, last: int, *, loss: float = 2.0) -> None:
    """An attempt that records routers, heads, validations and a skipped step."""
    run.path.mkdir(parents=True, exist_ok=True)
    run.cut_metrics(last_step=start)
    track = Tracker(run, main=True, tensorboard=True, log_every_steps=100, total_steps=100, start_step=start)
    for step in range(start + 1, last + 1):
        values = {"loss": float("nan") if step == 5 else loss + 1 / step, "aux_loss": 0.1, "grad_norm": 1.0, "lr": 0.1}
        timing = {"step_s": 0.1, "data_s": 0.01, "tokens_per_s": 80.0, "train_s": 0.1 * step}
        router = {"router": {"layer_00": {"router": ROUTER}}} if step % 2 == 0 else {}
        common = {"step": step, "tokens": 8 * step}
        track.train({"kind": "train", **common, **values, **timing, **router}, seconds_left=None)
        if step % 3 == 0:
            result = {"loss": loss, "accuracy": 0.5, "targets": 1, "train_s": 0.1 * step}
            track.validation({"kind": "validation", **common, **result})
            track.heads({"kind": "heads", **common, "layers": {"layer_00": HEADS, "layer_01": HEADS}})
    track.close()


def view(run: RunDir) -> dict[str, list]:
    """Tag -> its points, in order; NaN as text, so that it equals itself."""
    found = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    tags = found.Tags()
    scalars = {tag: [(e.step, str(e.value)) for e in found.Scalars(tag)] for tag in tags["scalars"]}
    return scalars | {tag: [(e.step, e.encoded_image_string) for e in found.Images(tag)] for tag in tags["images"]}


@pytest.fixture
def run(tmp_path) -> RunDir:
    """Two attempts: the second continues after step 6, and repeats steps 7 to 9."""
    made = RunDir(tmp_path / "runs" / "tiny")
    train(made, 0, 9)
    train(made, 6, 12, loss=3.0)
    return made


def test_rebuilt_files_equal_the_original_ones(run):
    # F27: including routers, heads and images
    before = view(run)
    assert [step for step, _ in before["train/loss"]] == list(range(1, 13)) and "router/load_router" in before
    assert before["train/loss"][4] == (5, "nan") and len(before) == 8 + 3 + 5 + 10 + 1
    for _ in range(2):
        assert not rebuild(run)
        assert view(run) == before


def test_a_rebuild_shows_each_layer_if_asked_or_if_the_spec_does(run):
    before = view(run)
    assert not any("layer_" in tag for tag in before)
    rebuild(run, per_layer=True)
    shown = view(run)
    assert len(shown) == len(before) + 2 * 5 + 10 and before.items() <= shown.items()
    rebuild(run)
    assert view(run) == before
    write_json(run.spec, {"tracking": {"per_layer": True}})
    rebuild(run)
    assert view(run) == shown
    with pytest.raises(SpecError, match="--per-layer: event files have it only after --rebuild"):
        board([run.path], host="127.0.0.1", port=0, expose=False, rebuild_files=False, serve=False, per_layer=True)


def test_texts_and_hyperparameters_are_written_once_and_rebuilt(run, tmp_path):
    made = RunDir(tmp_path / "named")
    made.path.mkdir()
    write_json(made.spec, {"name": "named", "optimizer": {"lr": 0.1}})
    train(made, 0, 3)
    train(made, 2, 5)
    write_json(made.summary, {"complete": True, "steps": 5, "tokens": 40, "train_s": 0.5, "final_validation_loss": 2.0})
    tags = ["run/spec/text_summary", "custom_scalars__config__"]
    found = tensors(made)
    assert [step for step, _ in found[tags[0]]] == [0] and set(found) == set(tags)
    rebuild(made)
    again = tensors(made)
    assert again[tags[0]] == found[tags[0]] and again[tags[1]][-1] == found[tags[1]][-1]
    assert set(again) == {*tags, "run/report/text_summary"}


def tensors(run: RunDir) -> dict[str, list]:
    """Tag -> the points of texts and layouts, in order."""
    found = EventAccumulator(str(run.tensorboard), size_guidance={"tensors": 0})
    found.Reload()
    tags = [tag for tag in found.Tags()["tensors"] if not tag.startswith("_hparams_")]
    return {tag: [(e.step, e.tensor_proto.string_val[0]) for e in found.Tensors(tag)] for tag in tags}


def test_a_rebuild_repairs_a_flipped_bit(run):
    # F27
    before = view(run)
    for path in run.tensorboard.iterdir():
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 3] ^= 1
        path.write_bytes(damaged)
    assert view(run) != before  # a flipped bit hides all later points
    rebuild(run)
    assert view(run) == before


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_truncated_event_file_shows_each_step_once_after_a_resume(run, cut):
    # F27
    newest = max(run.tensorboard.iterdir(), key=lambda path: path.name)
    newest.write_bytes(newest.read_bytes()[:-cut])
    train(run, 9, 15)
    assert [step for step, _ in view(run)["train/loss"]] == list(range(1, 16))


def test_a_run_continues_after_a_rebuild(run):
    rebuild(run)
    train(run, 9, 15, loss=4.0)
    before = view(run)
    assert [step for step, _ in before["train/loss"]] == list(range(1, 16))
    rebuild(run)
    assert view(run) == before


def test_a_killed_rebuild_leaves_the_old_or_the_new_files(run, monkeypatch):
    before, replace = view(run), Path.replace
    next(run.tensorboard.iterdir()).write_bytes(b"")  # so that old and new files differ
    old = view(run)
    assert old != before
    for name in ("replace", "unlink"):
        with monkeypatch.context() as m:
            m.setattr(Path, name, killed)
            with pytest.raises(KeyboardInterrupt):
                rebuild(run)
        assert view(run) == (old if name == "replace" else before)
    assert Path.replace is replace
    train(run, 12, 15)  # the next attempt puts the existing files in order
    assert [step for step, _ in view(run)["train/loss"]] == list(range(1, 16))


def killed(*_):
    raise KeyboardInterrupt


def test_points_carry_the_start_of_the_run_and_the_seconds_of_training(run):
    write_json(run.card, {"attempts": [{"started_at": "2030-01-01T00:00:00Z"}, {"started_at": "2031-01-01T00:00:00Z"}]})
    rebuild(run)
    found = EventAccumulator(str(run.tensorboard))
    found.Reload()
    times = [event.wall_time - 1893456000 for event in found.Scalars("train/loss")]
    assert times == pytest.approx([0.1 * step for step in range(1, 13)])


def test_lost_records_are_named_and_the_rest_is_shown(run, capsys):
    text = run.metrics.read_text().replace('"step": 4, "tokens": 32', '"step": 4, "tokens": 33')
    run.metrics.write_text(text + encode({"kind": "train", "step": 13}) + "\n")
    assert board([run.path], host="127.0.0.1", port=None, expose=False, rebuild_files=True, serve=False) == 0
    assert "2 lines are damaged and no record of step 4" in capsys.readouterr().out
    assert [step for step, _ in view(run)["train/loss"]] == [1, 2, 3, *range(5, 13)]


def test_values_that_are_no_numbers_count_as_damage(run):
    lines = run.metrics.read_text().splitlines()
    before = view(run)
    text = [json.dumps({k: v for k, v in json.loads(line).items() if k not in ("chain", "crc")}) for line in lines]
    text = [line.replace('"grad_norm": 1.0', '"grad_norm": null') if '"step": 9,' in line else line for line in text]
    run.metrics.write_text("\n".join(text) + "\n")  # the format before checksums
    assert str(rebuild(run)) == "1 line is damaged and no record of step 9"
    assert view(run)["train/loss"] == [point for point in before["train/loss"] if point[0] != 9]


def test_a_run_that_is_being_trained_cannot_be_rebuilt(run):
    before = {path: path.read_bytes() for path in run.tensorboard.iterdir()}
    for name in ("run.lock", "worker.lock"):
        with run.locked(name), pytest.raises(SpecError, match="a live run holds this folder"):
            rebuild(run)
    assert {path: path.read_bytes() for path in run.tensorboard.iterdir()} == before


def test_runs_are_found_in_studies_and_probes(run, tmp_path):
    for name in ("study/cells/gqa/seed-1", "study/cells/gqa/seed-2", "probes/recall/cells/gqa/seed-1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text("")
    assert [r.path for r in runs_below(run.path)] == [run.path]
    assert [r.path.name for r in runs_below(tmp_path / "study")] == ["seed-1", "seed-2"]
    assert len(runs_below(tmp_path / "probes")) == 1
    (tmp_path / "empty").mkdir()
    for nothing in ("empty", "absent"):
        with pytest.raises(NoInputError, match="no run in this folder or below it"):
            runs_below(tmp_path / nothing)
    with pytest.raises(NoInputError, match="no record to show"):
        rebuild(RunDir(tmp_path / "study" / "cells" / "gqa" / "seed-1"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example.org", ""])
def test_other_machines_need_expose(run, host, capsys, monkeypatch):
    monkeypatch.setattr("headway.launcher.board.server._serve", lambda *_: pytest.fail("it was served"))
    assert main(["board", str(run.path), "--host", host, "--port", "0"]) == 64
    assert "error: --host: " in capsys.readouterr().err


def test_an_occupied_or_invalid_port_is_an_error(run, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["board", str(run.path), "--port", str(taken.getsockname()[1])]) == 70
    assert "use another --port" in capsys.readouterr().err
    assert main(["board", str(run.path), "--port", "70000"]) == 64


def test_tensorboard_shows_several_runs_on_loopback_until_it_is_stopped(run, headway, tmp_path):
    other = RunDir(tmp_path / "others" / "tiny")
    train(other, 0, 2)
    command = headway.command("board", str(run.path), str(other.path), "--port", "0")
    process = subprocess.Popen(command, env=headway.environment(), stdout=subprocess.PIPE, text=True)
    headway.started.append(process)
    assert process.stdout is not None
    said = re.fullmatch(r"TensorBoard: http://127\.0\.0\.1:(\d+)/ .*\n", process.stdout.readline())
    assert said is not None
    port = int(said[1])
    assert f"ssh -N -L {port}:127.0.0.1:{port} " in process.stdout.readline()
    with pytest.raises(OSError):
        socket.create_connection(
            ("127.0.0.2", port), timeout=5
        ).close()  # would succeed if the server listened at all addresses
    seen = []
    headway.wait_for(lambda: seen.append(runs(port)) or len(seen[-1]) == 2, process)
    assert seen[-1] == {"tiny", "tiny-2"}
    assert next(iter(layout(port)["category"]))["title"] == "Loss"
    assert next(name for name, tab in listed(port).items() if tab["enabled"]) == "custom_scalars"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


def asked(port: int, path: str):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/{path}", timeout=20) as answer:
        return json.load(answer)


def runs(port: int) -> set[str]:
    return set(asked(port, "runs"))


def layout(port: int) -> dict:
    return asked(port, "plugin/custom_scalars/layout")


def listed(port: int) -> dict:
    return asked(port, "plugins_listing")


def test_runs_of_a_study_have_the_names_of_variants_and_seeds(run, tmp_path):
    study = tmp_path / "study"
    cells = [study / "cells" / "gqa" / f"seed-{seed}" for seed in (1, 2)]
    for cell in cells:
        train(RunDir(cell), 0, 2)
    (study / "report.md").write_text("# Report\n\n![loss](loss.png)\n\ngqa is first")
    with log_folder([study]) as folder:
        links = Links(folder / "later", [study])
        links.update()
        assert shown_runs(folder) == {"gqa/seed-1", "gqa/seed-2", "report"}
        train(RunDir(study / "cells" / "rgqa" / "seed-1"), 0, 2)
        links.update()
        links.update()
        assert shown_runs(folder / "later") == {"gqa/seed-1", "gqa/seed-2", "rgqa/seed-1", "report"}
        found = EventAccumulator(str(folder / "report"))
        found.Reload()
        (event,) = found.Tensors("study/report/text_summary")
        assert event.tensor_proto.string_val == [b"# Report\n\n\n\ngqa is first"]
    with log_folder([study, run.path]) as folder:
        assert shown_runs(folder) == {
            "tiny",
            *(f"study/{n}" for n in ("gqa/seed-1", "gqa/seed-2", "rgqa/seed-1", "report")),
        }
    assert not folder.exists() and all((cell / "tensorboard").is_dir() for cell in cells)


def shown_runs(folder: Path) -> set[str]:
    """Names of runs, as TensorBoard finds them; those below `later` are another folder's."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    found = EventMultiplexer().AddRunsFromDirectory(str(folder)).Runs()
    return {name for name in found if not name.startswith("later/")}


def test_a_report_that_changes_is_shown_anew(tmp_path):
    study = tmp_path / "study"
    train(RunDir(study / "cells" / "gqa" / "seed-1"), 0, 1)
    links = Links(tmp_path / "links", [study])
    for number, text in enumerate(("first", "second")):
        (study / "report.md").write_text(text)
        os.utime(study / "report.md", ns=(number, number))
        links.update()
        links.update()
    found = EventAccumulator(str(tmp_path / "links" / "report"))
    found.Reload()
    assert [e.tensor_proto.string_val[0] for e in found.Tensors("study/report/text_summary")] == [b"first", b"second"]


def columns(folder: Path) -> tuple[list, list]:
    """(name, type) of the hyperparameters, and tags of the results, in the table of TensorBoard."""
    from tensorboard.plugins.hparams import metadata

    found = EventAccumulator(str(folder / "report"))
    found.Reload()
    content = found.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    experiment = metadata.parse_experiment_plugin_data(content)
    return [(i.name, i.type) for i in experiment.hparam_infos], [i.name.tag for i in experiment.metric_infos]


def test_the_table_of_hyperparameters_has_what_the_variants_of_a_study_set(tmp_path):
    study, cells, variants = tmp_path / "study", [], []
    for variant, lr, more in (("gqa", 0.1, {}), ("rgqa", 0.1, {"top_k": 2}), ("sqa", 0.2, {})):
        attention = {"type": variant, "head_dim": 16, "unset": variant, **more}
        spec = {"seed": 1, "attention": attention, "optimizer": {"lr": lr}, "model": {"ffn_width": len(cells)}}
        cells.append({"variant": variant, "spec": spec | {"run_dir": f"cells/{variant}"}})
        keys = {"attention": {"type": variant, **more}, "optimizer.lr": lr}
        variants.append({"name": variant, "keys": keys, "matched": {"free": "model.ffn_width"} if cells[1:] else None})
    study.mkdir()
    write_json(study / "study.json", {"cells": cells, "variants": variants})
    run = RunDir(study / "cells" / "gqa" / "seed-1")
    train(run, 0, 1)
    with log_folder([study]) as folder:
        found, results = columns(folder)
    assert found == [("attention.type", 1), ("optimizer.lr", 3), ("model.ffn_width", 3), ("attention.top_k", 3)]
    assert results[:2] == ["val/loss", "train/loss"]
    with log_folder([run.path]) as folder:
        assert not (folder / "report").exists()  # one run differs from none


def test_the_table_of_other_runs_has_the_keys_that_all_have(tmp_path):
    for name, more in (("a", {"optimizer": {"lr": 0.1}}), ("b", {"optimizer": {"lr": 0.2}, "attention": {"top_k": 1}})):
        train(RunDir(tmp_path / "runs" / name), 0, 1)
        write_json(RunDir(tmp_path / "runs" / name).spec, {"seed": 1, **more})
    with log_folder([tmp_path / "runs"]) as folder:
        assert columns(folder)[0] == [("optimizer.lr", 3)] and shown_runs(folder) == {"a", "b", "report"}
