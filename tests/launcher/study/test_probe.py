"""Probe tasks: one study for each task, one table of what each mechanism can do.

Training is played by a small script that records a given accuracy at each validation.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from played_study import play

from headway.launcher.base.errors import SpecError
from headway.launcher.cli.main import main
from headway.launcher.report.probe import probe_report
from headway.launcher.spec.load import load_spec
from headway.launcher.study.probe import plan_probe, report_probe, run_probe
from headway.launcher.study.probe_config import load_probe
from headway.launcher.study.run import run_study

ROOT = Path(__file__).resolve().parents[3]

BASE = """
model: {width: 32, layers: 2, ffn_width: 96}
attention: {type: gqa, heads: 4, kv_heads: 2, head_dim: 8}
data:
  seq_len: 32
  source: {type: synthetic, task: mqar, vocab_size: 32, pairs: 4, queries: 4}
optimizer: {lr: 3.0e-3}
train: {tokens: 2560, global_batch: 8, micro_batch: 8, validation_tokens: 256, validate_every_tokens: 512}
launch: {threads: 1}
"""

PROBE = """
study: small
base: base.yaml
out: probes/small
match: {multiple: 4, tolerance: 2%}
seeds: [1, 2]
tasks:
  recall-2: {data.source.pairs: 2, data.source.queries: 2}
  recall-8: {data.source: {pairs: 8, queries: 4}}
  copy: {data.source.task: copy, data.source.span: 8}
variants:
  gqa: {attention.type: gqa}
  routed: {attention: {type: rgqa, top_k: 1}}
"""

# Does to a run folder what `headway train` does; accuracy.json: TASK/VARIANT/SEED -> the accuracy at each validation,
# or the exit status of a run that fails.
TRAINER = """
import json, sys
from pathlib import Path

run_dir = Path(next(a for a in sys.argv if a.startswith("run_dir=")).split("=", 1)[1])
task, variant, seed = run_dir.parents[2].name, run_dir.parent.name, run_dir.name.removeprefix("seed-")
played = json.loads(Path("accuracy.json").read_text()).get(f"{task}/{variant}/{seed}", [0.5, 1, 1, 1, 1])
cells = json.loads((run_dir.parents[2] / "study.json").read_text())["cells"]
spec = next(c["spec"] for c in cells if c["variant"] == variant and c["seed"] == int(seed))
run_dir.mkdir(parents=True, exist_ok=True)
with open("trained.txt", "a") as f:
    f.write(f"{task}/{variant}/{seed}\\n")
if isinstance(played, int):
    sys.exit(played)
(run_dir / "spec.json").write_text(json.dumps(spec))
(run_dir / "run.json").write_text(json.dumps({"tokens_per_step": 256, "data_fingerprint": None}))
with (run_dir / "metrics.jsonl").open("w") as metrics:
    for step in range(1, 11):
        common = {"step": step, "tokens": step * 256, "train_s": step * 0.1, "loss": 4 - 0.1 * step}
        digest = f"{int(seed) * 100 + step:016x}"
        train = {"kind": "train", **common, "step_s": 0.1, "data_s": 0.0, "batch_hash": digest}
        metrics.write(json.dumps(train) + "\\n")
        if step % 2 == 0:
            accuracy = played[step // 2 - 1]
            metrics.write(json.dumps({"kind": "validation", **common, "accuracy": accuracy}) + "\\n")
summary = {"complete": True, "steps": 10, "tokens": 2560, "final_validation_loss": 3.0, "train_s": 1.0, "resumes": 0}
(run_dir / "summary.json").write_text(json.dumps(summary))
"""


class Folder:
    """A working folder with probe tasks, a base spec and the playing trainer."""

    def __init__(self, path: Path) -> None:
        self.path, self.file, self.out = path, path / "small.yaml", path / "probes" / "small"
        self.file.write_text(PROBE)
        (path / "base.yaml").write_text(BASE)
        (path / "trainer.py").write_text(TRAINER)
        self.play({})

    def play(self, accuracy: dict[str, list[float] | int]) -> None:
        (self.path / "accuracy.json").write_text(json.dumps(accuracy))

    def rewrite(self, old: str, new: str) -> None:
        text = self.file.read_text()
        assert old in text
        self.file.write_text(text.replace(old, new))

    def trained(self) -> list[str]:
        """Runs that were started since the last call, in order."""
        file = self.path / "trained.txt"
        runs = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return runs

    def table(self) -> dict[str, list[str]]:
        """Variant -> cells of the first table of probe.md."""
        text = (self.out / "probe.md").read_text()
        lines = text[text.index("| variant ") :].split("\n\n")[0].splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return {row[0]: row[1:] for row in [rows[0], *rows[2:]]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Folder(tmp_path)
    play(monkeypatch)
    return made


@pytest.fixture
def no_drawing(monkeypatch):
    monkeypatch.setattr("headway.launcher.study.probe._report", lambda out: out / "probe.html")


RUNS = [f"{t}/{v}/{s}" for s in (1, 2) for t in ("recall-2", "recall-8", "copy") for v in ("gqa", "routed")]


# ---------------------------------------------------------------- planning


def test_a_task_is_a_study_of_the_same_variants_on_its_own_data(folder):
    plans = plan_probe(load_probe(folder.file))
    assert list(plans) == ["recall-2", "recall-8", "copy"]
    for task, plan in plans.items():
        assert [c.key for c in plan.cells] == ["gqa/seed-1", "routed/seed-1", "gqa/seed-2", "routed/seed-2"]
        assert {c.spec.run_dir for c in plan.cells} == {f"probes/small/{task}/cells/{c.key}" for c in plan.cells}
        assert {c.spec.attention.type for c in plan.cells} == {"gqa", "rgqa"}
        assert plan.variants[1].matched is not None and abs(plan.variants[1].matched.residual) <= 0.02
    sources: dict[str, Any] = {task: plan.cells[0].spec.data.source for task, plan in plans.items()}
    assert (sources["recall-2"].pairs, sources["recall-8"].pairs) == (2, 8)
    assert (sources["copy"].task, sources["copy"].span) == ("copy", 8)


def test_the_overrides_of_a_cell_make_its_spec_on_a_command_line(folder):
    for plan in plan_probe(load_probe(folder.file), ["optimizer.lr=1e-2"]).values():
        for cell in plan.cells:
            assert load_spec(plan.study.base, cell.overrides).spec == cell.spec
            assert cell.spec.optimizer.lr == 1e-2


def test_the_repositorys_probe_tasks_are_legal_and_matched():
    probe = load_probe(ROOT / "yaml" / "probes.yaml")
    assert probe.config.match is not None and len(probe.config.seeds) >= 2
    plans = plan_probe(probe)
    recall: list[Any] = [p.cells[0].spec.data.source for t, p in plans.items() if t.startswith("mqar")]
    assert [source.pairs for source in recall] == [2, 4, 8]
    assert {"copy", "induction"} < plans.keys()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("data.source.span: 8}", "seed: 3}", ["tasks: copy: the study sets seed"]),
        ("data.source.span: 8}", "run_dir: x}", ["tasks: copy: the study sets run_dir"]),
        ("data.source.span: 8}", "model.ffn_width: 64}", ["tasks: copy: `match` solves model.ffn_width"]),
        ("data.source.span: 8}", "model: {ffn_width: 64}}", ["tasks: copy: `match` solves model.ffn_width"]),
        ("data.source.span: 8}", "attention.type: gqa}", ["tasks: copy: attention.type", "variant gqa"]),
        ("data.source.span: 8}", "data: {source.task: mqar}}", ["given twice"]),
        ("data.source.span: 8}", "data.source.spam: 8}", ["small.yaml:10", "data.source.spam", "span"]),
        ("data.source.pairs: 2, ", "data.source.pairs: 1, ", ["queries"]),
        ("  copy: ", "  ../copy: ", ["cannot name a folder"]),
        ("tasks:", "takss:", ["takss", "tasks"]),
        ("seeds: [1, 2]", "seeds: [1, 1]", ["given twice"]),
        ("base: base.yaml", "base: bare.yaml", ["bare.yaml"]),
        ("base: base.yaml", "base: base.yaml\nbaseline: rooted", ["Did you mean routed"]),
    ],
)
def test_a_mistake_in_the_file_is_one_located_message(folder, old, new, says):
    folder.rewrite(old, new)
    with pytest.raises(SpecError) as error:
        plan_probe(load_probe(folder.file))
    assert all(part in str(error.value) for part in says) and ".yaml" in str(error.value)


def test_a_base_with_another_source_is_refused_before_its_data_is_looked_for(folder):
    source = "{type: synthetic, task: mqar, vocab_size: 32, pairs: 4, queries: 4}"
    (folder.path / "base.yaml").write_text(BASE.replace(source, "{type: mds, path: absent}"))
    folder.rewrite(PROBE[PROBE.index("  recall-2") : PROBE.index("variants:")], "  long: {train.tokens: 5120}\n")
    with pytest.raises(SpecError, match=r"small\.yaml:3:1: base: task long would read `mds` data"):
        run_probe(folder.file)
    assert not folder.out.exists()


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("data.source.pairs=3", "task recall-2 sets data.source.pairs"),
        ("data.source={type: synthetic, task: copy}", "task recall-2 sets data.source.pairs"),
        ("data.seed=3", "the study sets data.seed"),
        ("tasks.copy=3", "belongs to the study"),
        ("trian.tokens=3", "Did you mean train"),
    ],
)
def test_arguments_that_do_not_concern_all_tasks_are_refused(folder, argument, says):
    with pytest.raises(SpecError) as error:
        plan_probe(load_probe(folder.file), [argument])
    assert says in str(error.value)


def test_files_of_the_other_kind_name_the_right_verb(folder):
    for wrong in (lambda: run_study(folder.file), lambda: load_spec(folder.file)):
        with pytest.raises(SpecError, match="headway probe run"):
            wrong()
    folder.rewrite(PROBE[PROBE.index("tasks:") : PROBE.index("variants:")], "")
    with pytest.raises(SpecError, match="tasks"):
        run_probe(folder.file)


# ---------------------------------------------------------------- running


def test_every_task_is_trained_once_and_a_second_run_trains_nothing(folder, no_drawing, capsys):
    assert run_probe(folder.file) == 0
    assert folder.trained() == RUNS
    assert "task 2/3: recall-8" in capsys.readouterr().out
    assert run_probe(folder.file) == 0
    assert folder.trained() == []


def test_the_status_has_every_run_of_every_task(folder, no_drawing, capsys):
    folder.play({"copy/gqa/2": 70})
    assert main(["probe", "status", str(folder.file)]) == 0
    before = capsys.readouterr().out
    assert before.count(" missing ") == 12 and [line for line in before.splitlines() if line.startswith("task ")] == [
        *("task recall-2", "task recall-8", "task copy")
    ]
    assert run_probe(folder.file) == 1
    capsys.readouterr()
    assert main(["probe", "status", str(folder.file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]
    states = {(task, cell["cell"]): cell["state"] for task, part in found.items() for cell in part["cells"]}
    assert len(states) == 12 and {key for key, state in states.items() if state != "done"} == {("copy", "gqa/seed-2")}
    assert states["copy", "gqa/seed-2"] == "failed"


def test_a_task_whose_runs_would_have_too_long_names_is_refused(folder):
    folder.rewrite("recall-2:", f"{'r' * 120}:")
    with pytest.raises(SpecError, match=r"variants: gqa: a run would have the name small\.r+\.gqa\.seed-"):
        load_probe(folder.file)


def test_runs_of_a_task_are_kept_as_records_of_their_own(folder, no_drawing):
    folder.rewrite("seeds:", "records: kept\nseeds:")
    assert run_probe(folder.file) == 0
    probe_report(folder.out)
    table = folder.table()
    folder.trained()
    assert len(list(Path("kept/copy").glob("*/seed-*.json"))) == 4
    shutil.rmtree(folder.out)
    (Path("kept/copy") / "gqa/seed-2.json").unlink()
    assert run_probe(folder.file) == 0
    assert folder.trained() == ["copy/gqa/2"]
    probe_report(folder.out)
    assert folder.table() == table


def test_a_failing_run_does_not_stop_the_others_and_is_tried_again(folder, no_drawing):
    folder.play({"recall-2/gqa/1": 74})
    assert run_probe(folder.file) == 1
    assert folder.trained() == RUNS
    folder.play({})
    assert run_probe(folder.file) == 0
    assert folder.trained() == ["recall-2/gqa/1"]


def test_a_stopped_run_ends_there_and_the_same_command_goes_on(folder, no_drawing, capsys):
    folder.play({"recall-8/gqa/1": 75})
    assert run_probe(folder.file) == 75
    assert folder.trained() == RUNS[:3]
    assert f"headway probe run {folder.file}" in capsys.readouterr().out
    folder.play({})
    assert run_probe(folder.file) == 0
    assert folder.trained() == RUNS[2:]


def test_a_changed_task_is_refused_before_any_other_is_trained(folder, no_drawing):
    run_probe(folder.file)
    folder.rewrite("recall-2: {", "new: {data.source.pairs: 6}\n  recall-2: {")
    folder.rewrite("data.source.span: 8", "data.source.span: 9")
    folder.trained()
    with pytest.raises(SpecError, match=r"data\.source\.span: 8 in the folder, 9 now"):
        run_probe(folder.file)
    assert folder.trained() == []
    assert run_probe(folder.file, fresh=True) == 0
    assert len(folder.trained()) == 16
    (aside,) = folder.out.parent.glob("small.old-*")
    assert (aside / "copy/cells/gqa/seed-1/summary.json").exists()


def test_a_dry_run_shows_every_command_and_writes_nothing(folder, capsys):
    assert run_probe(folder.file, dry_run=True) == 0
    shown = capsys.readouterr().out
    assert all(f"run_dir=probes/small/{t}/cells/{v}/seed-{s}" in shown for t, v, s in (r.split("/") for r in RUNS))
    assert not folder.out.exists()


def test_another_folder_is_not_written_into(folder):
    (folder.out / "precious").mkdir(parents=True)
    with pytest.raises(SpecError, match="not empty"):
        run_probe(folder.file)
    with pytest.raises(SpecError, match="no probe tasks were started here"):
        report_probe(folder.file)


# ---------------------------------------------------------------- the table


def test_the_table_shows_final_accuracy_and_the_first_validation_at_which_a_task_was_solved(folder):
    folder.play({
        "recall-2/routed/1": [0.2, 0.99, 0.98, 1.0, 0.995], "recall-2/routed/2": [0.2, 0.3, 0.4, 0.98, 0.985],
        "recall-8/routed/1": [0.1, 0.1, 0.2, 0.2, 0.3], "recall-8/routed/2": [0.1, 0.1, 0.2, 0.2, 0.5],
        "copy/gqa/2": 74, "copy/routed/1": 74, "copy/routed/2": 74,
    })  # fmt: skip
    assert run_probe(folder.file) == 1
    table = folder.table()
    assert table["variant"] == ["recall-2", "recall-8", "copy"]
    assert table["gqa"] == ["100.0 %; 4"] * 3
    assert table["routed"] == [
        "99.0 % (98.5 \u2013 99.5); 4 in 1 of 2 runs, else not solved in 10 steps",
        "40.0 % (30.0 \u2013 50.0); not solved in 10 steps",
        "-",
    ]
    # 32 tokens: 15 keys, 16 values; a token other than the filler
    assert table["chance"] == [f"{100 / 16:.1f} %", f"{100 / 16:.1f} %", f"{100 / 31:.1f} %"]
    page = (folder.out / "probe.html").read_text()
    assert "gqa/seed-2" in page and "exit code 74" in page and "<svg" in page and "every 2 steps" not in page
    assert "2 steps" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_the_csv_has_every_run_and_the_figure_every_number_of_pairs(folder):
    folder.play({"recall-8/routed/2": [0.1, 0.1, 0.2, 0.2, 0.25], "copy/gqa/1": 74})
    run_probe(folder.file)
    with (folder.out / "probe.csv").open() as file:
        rows = {(r["task"], r["variant"], r["seed"]): r for r in csv.DictReader(file)}
    assert len(rows) == len(RUNS)
    low, failed = rows["recall-8", "routed", "2"], rows["copy", "gqa", "1"]
    assert (low["final_accuracy"], low["steps_to_solve"], low["validation_interval_steps"]) == ("0.25", "", "2")
    assert (failed["state"], failed["final_accuracy"]) == ("failed", "")
    assert rows["recall-2", "gqa", "1"]["steps_to_solve"] == "4"
    assert (folder.out / "recall.svg").exists() and (folder.out / "recall.png").exists()
    page = (folder.out / "probe.html").read_text()
    assert page.count('class="chart-data"') == 1 and '<tr data-variant="routed">' in page
    assert (folder.out / "recall-2" / "report.html").exists()
    sizes = (folder.out / "probe.md").read_text().split("## Sizes")[1]
    residual = float(low["match_residual"])
    assert f"{int(low['num_params']):,} ({residual:+.2%})" in sizes and "(baseline)" in sizes


def test_a_real_run_records_its_accuracy_everywhere(headway):
    """metrics.jsonl, TensorBoard and the console say the same."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from headway.launcher.run.records import read_run

    done = headway.train("run_dir=run", "train.tokens=5120", "checkpoint.every_tokens=null")
    assert done.returncode == 0, done.stderr
    accuracy = read_run(headway.folder / "run").accuracy
    assert accuracy.shape == (2,) and all(0 <= a <= 1 for a in accuracy)
    assert f"accuracy {100 * accuracy[-1]:.2f}% over" in done.stdout
    board = EventAccumulator(str(headway.folder / "run" / "tensorboard"))
    board.Reload()
    assert [e.value for e in board.Scalars("val/accuracy")] == pytest.approx(list(accuracy), rel=1e-6)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("launch.method=slurm", r"^launch\.method: slurm submits a job"),
        ("launch.device=cuda", r"^launch\.device: cuda is not"),
    ],
)
def test_what_cannot_be_trained_here_is_refused_before_a_folder_is_moved_or_made(
    folder, override, said, fresh, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if fresh:
        Path("probes/small").mkdir(parents=True)
    with pytest.raises(SpecError, match=said):
        run_probe(folder.file, [override], fresh=fresh)
    assert [str(p) for p in Path().glob("probes/*")] == ["probes/small"] * fresh
    assert not any(Path("probes/small").glob("*"))
