"""Variants that start from a converted teacher, and variants from scratch that get their compute."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from run_folders import records
from untrained_runs import untrained_run

from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.compare.analyse import analyse
from headway.launcher.compare.questions import answer_spread
from headway.launcher.compare.training_flops import training_flops
from headway.launcher.compare.uptraining import uptraining_of
from headway.launcher.exchange.export import export
from headway.launcher.run.run_dir import read_mapping
from headway.launcher.study.branches import changes
from headway.launcher.study.cluster.elements import elements_of
from headway.launcher.study.config import load_study
from headway.launcher.study.plan import plan_study, study_record
from headway.launcher.study.queue import Queue, unfinished
from headway.model.attention.block_sparse import BlockSparseConfig
from headway.model.attention.gqa import GqaConfig

ROOT = Path(__file__).resolve().parents[3]
BASE = """
name: tiny
model: {width: 32, layers: 2, ffn_width: 48, init_std: 0.05}
attention: {type: gqa, heads: 4, kv_heads: 2, head_dim: 8}
data: {seq_len: 32, source: {type: synthetic, task: mqar, vocab_size: 32, pairs: 4, queries: 4}}
optimizer: {lr: 3.0e-3}
schedule: {warmup_tokens: 512}
train: {tokens: 2560, global_batch: 8, micro_batch: 8, validation_tokens: 512}
launch: {threads: 1, restarts: 0, device: cpu}
"""
CONVERT = {"to": "gqa", "kv_heads": 2, "tokens": 512}
VARIANTS = {
    "mha": {"attention.type": "mha"},
    "gqa": {"from": {"run": "mha", "convert": CONVERT, "alpha": [0, 0.2, 0.4]}},
    "mqa": {"from": {"run": "mha", "convert": {"to": "mqa", "tokens": 512}, "alpha": 0.2}},
    "scratch": {"attention.type": "gqa", "compute": {"of": "gqa-a0.4", "teacher": "counted"}},
}


def write(folder: Path, variants=None, **more) -> Path:
    (folder / "base.yaml").write_text(BASE)
    tree = {"study": "up", "base": "base.yaml", "baseline": "mha", "seeds": [1, 2], **more}
    tree = json.loads(json.dumps({**tree, "variants": variants or VARIANTS}))  # without shared parts, which YAML names
    (folder / "up.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder / "up.yaml"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- the plan


def test_a_list_of_alphas_is_a_variant_for_each(here):
    study = load_study(write(here))
    assert list(study.config.variants) == ["mha", "gqa-a0.2", "gqa-a0.4", "mqa", "scratch"]


def test_cells_start_from_the_teacher_of_their_seed(here):
    plan = plan_study(load_study(write(here)))
    cells = {cell.key: cell for cell in plan.cells}
    short = cells["gqa-a0.2/seed-2"]
    assert short.after == "mha/seed-2" and cells["scratch/seed-2"].after is None
    assert short.spec.init.weights == "studies/up/cells/mha/seed-2"
    assert short.spec.init.convert is not None and short.spec.init.convert.how == "mean"
    assert short.spec.train.tokens == 512 and short.spec.train.validate_first
    assert short.spec.schedule.warmup_tokens == 102  # the teacher's, by the share of its tokens
    assert isinstance(short.spec.attention, GqaConfig) and short.spec.attention.groups == 2
    # 1,024 tokens of gqa and 2,560 of its teacher, which is a little dearer per token
    flops = {v.name: v.cost.flops_per_token.useful for v in plan.variants}
    exact = (1024 * flops["gqa-a0.4"] + 2560 * flops["mha"]) / flops["scratch"]
    assert cells["scratch/seed-1"].spec.train.tokens == round(exact / 256) * 256 == 3840


def test_heads_may_be_compared_by_weights(here):
    origin = {"run": "mha", "convert": {**CONVERT, "how": "cluster", "by": "weights"}, "alpha": 0.2}
    plan = plan_study(load_study(write(here, {"mha": VARIANTS["mha"], "gqa": {"from": origin}})))
    convert = next(cell.spec.init.convert for cell in plan.cells if cell.variant == "gqa")
    assert convert is not None and (convert.how, convert.by) == ("cluster", "weights")


def test_a_teacher_becomes_block_sparse_with_the_blocks_of_the_variant(here):
    origin = {"run": "mha", "convert": {"to": "block_sparse", "kv_heads": 2}, "alpha": 0.2}
    blocks = {"attention.block": 8, "attention.blocks": 2}
    plan = plan_study(load_study(write(here, {"mha": VARIANTS["mha"], "sparse": {"from": origin, **blocks}})))
    found = next(cell.spec.attention for cell in plan.cells if cell.variant == "sparse")
    assert found == BlockSparseConfig(heads=4, kv_heads=2, head_dim=8, block=8, blocks=2)
    with pytest.raises(SpecError, match=r"attention.blocks?: is missing and has no default"):
        plan_study(load_study(write(here, {"mha": VARIANTS["mha"], "sparse": {"from": origin}})))


def test_the_compute_of_an_annealed_variant_counts_its_stages(here):
    anneal = {"attention.top_k": 2, "attention.k_schedule": {"start": 4, "until_tokens": 512}}
    variants = {
        "mha": VARIANTS["mha"],
        "moh": {"from": {"run": "mha", "convert": {"to": "moh", "kv_heads": 2}, "alpha": 0.4}, **anneal},
        "plain": {"attention.type": "moh", "attention.kv_heads": 2, "attention.shared_heads": 0, "attention.top_k": 2},
        "scratch": {"attention.type": "gqa", "attention.kv_heads": 2, "compute": {"of": "moh", "teacher": "free"}},
    }
    plan = plan_study(load_study(write(here, variants)))
    costs = {v.name: v.cost for v in plan.variants}
    stages = costs["moh"].stages
    assert [at for at, _ in stages] == [0, 256, 512] and stages[-1][1] == costs["moh"].flops_per_token
    assert stages[0][1].useful > stages[1][1].useful > costs["moh"].flops_per_token.useful
    exact = 256 * stages[0][1].useful + 256 * stages[1][1].useful + 512 * stages[2][1].useful  # of 1,024 tokens
    assert costs["moh"].trained(1024).useful == pytest.approx(exact)
    scratch = next(cell.spec for cell in plan.cells if cell.variant == "scratch")
    assert scratch.train.tokens == round(exact / costs["scratch"].flops_per_token.useful / 256) * 256
    recorded = {v["name"]: v["cost"] for v in study_record(plan)["variants"]}
    assert recorded["moh"]["flops_per_token_stages"] == [[at, flops.useful] for at, flops in stages]
    assert float(training_flops(recorded["moh"], 1024)) == pytest.approx(3 * exact)
    assert "flops_per_token_stages" not in recorded["plain"]


def test_own_schedule_and_keys_of_the_variant_are_kept(here):
    origin = {"run": "mha", "convert": CONVERT, "alpha": 0.5, "schedule": "own"}
    variants = {**VARIANTS, "own": {"from": origin, "optimizer.lr": 1e-4}}
    plan = plan_study(load_study(write(here, variants)))
    spec = next(cell.spec for cell in plan.cells if cell.variant == "own")
    assert (spec.schedule.warmup_tokens, spec.optimizer.lr, spec.train.tokens) == (512, 1e-4, 1280)


def test_the_teachers_own_keys_go_with_its_weights(here):
    variants = {**VARIANTS, "mha": {"attention.type": "mha", "attention.qk_norm": True, "model.ffn_width": 40}}
    plan = plan_study(load_study(write(here, variants)))
    spec = next(cell.spec for cell in plan.cells if cell.variant == "mqa")
    assert spec.attention.layer(0, 1).qk_norm and spec.model.ffn_width == 40


def test_a_teacher_comes_before_the_cells_that_convert_it(here):
    plan = plan_study(load_study(write(here)))
    tasks = unfinished([plan])
    queue = Queue(waiting=list(tasks), planned=[{cell.key: cell for cell in plan.cells}])

    def take():
        taken = queue.take()
        assert taken is not None
        return taken

    first, _ = take()
    assert first.label == "mha/seed-1"
    assert [take()[0].label for _ in range(3)] == ["scratch/seed-1", "mha/seed-2", "scratch/seed-2"]
    assert queue.take() is None
    queue.end(first)
    task, way = take()
    assert task.label == "gqa-a0.2/seed-1"
    assert way.waits == "its teacher mha/seed-1 is not complete, so there are no weights to convert"


def test_a_cluster_gets_a_cell_when_its_teacher_is_complete(here):
    """The last job of a chain submits what could not start before."""
    plan = plan_study(load_study(write(here)))

    def elements():
        return {e.parts[0].key for e in elements_of(unfinished([plan]), [plan], elsewhere=set())}

    assert elements() == {"mha/seed-1", "mha/seed-2", "scratch/seed-1", "scratch/seed-2"}
    teacher = here / "studies" / "up" / "cells" / "mha" / "seed-1"
    (teacher / "checkpoints" / "step-0000000010").mkdir(parents=True)
    (teacher / "summary.json").write_text('{"complete": true}')
    assert {f"{name}/seed-1" for name in ("gqa-a0.2", "gqa-a0.4", "mqa")} <= elements()
    assert "gqa-a0.2/seed-2" not in elements()


def test_imported_weights_are_a_teacher_of_so_many_tokens(here):
    run = untrained_run(here / "run", attention={"type": "mha", "heads": 4, "head_dim": 6}, model={"width": 32})
    export(run, here / "weights", to="safetensors")
    config = here / "weights" / "config.json"
    variants = {"gqa": {"from": {**ORIGIN, "run": "weights", "alpha": 0.5}, "schedule.warmup_tokens": 5}}
    plan = plan_study(load_study(write(here, variants, baseline="gqa")))
    spec = plan.cells[0].spec
    assert spec.train.tokens == 256  # of the 384 tokens that the export tells
    assert (spec.attention.layer(0, 1).head_dim, spec.schedule.warmup_tokens, plan.cells[0].after) == (6, 5, None)
    config.write_text(config.read_text().replace('"tokens": 384', '"tokens": 0'))
    with pytest.raises(SpecError, match=r"variants.gqa.from: weights does not say .*; add teacher_tokens"):
        plan_study(load_study(write(here, variants, baseline="gqa")))
    for changes_, message in (
        ({"schedule": "teacher"}, r"from.schedule: the weights in weights have no schedule; use schedule: own"),
        ({"run": "mha"}, r"from.teacher_tokens: mha is a run, whose spec has its tokens; leave teacher_tokens out"),
    ):
        origin = {**ORIGIN, "run": "weights", "teacher_tokens": 5120, **changes_}
        with pytest.raises(SpecError, match=message):
            plan_study(load_study(write(here, {**VARIANTS, "gqa": {"from": origin}, "scratch": {}})))


ORIGIN = {"run": "mha", "convert": CONVERT, "alpha": 0.1}


def gqa(**changes):
    return {**VARIANTS, "gqa": {"from": {**ORIGIN, **changes}}, "scratch": {"attention.type": "gqa"}}


BAD = [
    (gqa(alpha=1.5), {}, r"variants: gqa: from.alpha: 1.5 is out of range: .*above 0 and at most 1"),
    (gqa(alpha=0), {}, r"gqa: from.alpha: 0 is out of range.*measured in a list with others, such as \[0, 0.05\]"),
    (gqa(alpha=[0]), {}, r"gqa: from.alpha: only 0, which trains nothing"),
    (gqa(alpha=[0.1, 0.1]), {}, r"gqa: from.alpha: an alpha is given twice"),
    (gqa(run="gqa"), {}, r"from.run: is the variant itself"),
    (gqa(run="mqa"), {}, r"from.run: mqa is uptrained itself; name a variant that is trained from its start"),
    (gqa(convert={"to": "moa"}), {}, r"gqa: from.convert.to: input should be 'gqa', 'mqa', 'wgqa'"),
    (gqa(what=1), {}, r"gqa: from.what: unknown key; this section looks like \{run: mha"),
    (gqa(), {"budgets": [0.5, 1]}, r"budgets: cannot be combined with variants that have `from`"),
    (gqa(), {"match": {"quantity": "params", "free": "model.ffn_width"}}, r"match: cannot be combined"),
    ({**gqa(), "x": {"from": ORIGIN, "train.tokens": 5}}, {}, r"variants: x: `from` sets train.tokens; leave it out"),
    ({**gqa(), "x": {"compute": {"of": "mha", "teacher": "free"}}}, {}, r"compute.of: mha is no variant with `from`"),
    ({**VARIANTS, "gqa-a0.2": {}}, {}, r"gives a variant gqa-a0.2, which is written too"),
]


@pytest.mark.parametrize(("variants", "more", "message"), BAD, ids=range(len(BAD)))
def test_a_wrong_origin_is_refused_when_the_file_is_read(here, variants, more, message):
    with pytest.raises(SpecError, match=message):
        load_study(write(here, variants, **more))


@pytest.mark.parametrize(
    ("variants", "error", "message"),
    [
        (gqa(convert={"to": "gqa", "kv_heads": 3}), SpecError, "4 query heads do not divide into 3"),
        (gqa(run="runs/none"), NoInputError, r"variants.gqa.from.run: runs/none: no such folder.*name a variant of"),
        (
            {**gqa(), "mha": {"attention.type": "sqa", "attention.kept": 1}},
            SpecError,
            "attention of type sqa, and only",
        ),
        (
            {**gqa(convert={**CONVERT, "how": "align"}), "mha": {"attention.type": "mha", "attention.qk_norm": True}},
            SpecError,
            r"variants.gqa.from.convert: align: the source has QK-norm",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_when_the_study_is_planned(here, variants, error, message):
    with pytest.raises(error, match=message):
        plan_study(load_study(write(here, variants)))


def test_an_unfinished_run_is_no_teacher(here, make_run):
    make_run(here / "runs" / "begun", complete=False)
    (here / "runs" / "begun" / "spec.json").write_text(json.dumps(yaml.safe_load(BASE)))
    with pytest.raises(SpecError, match=r"runs/begun is not finished, .*; finish it with the same"):
        plan_study(load_study(write(here, gqa(run="runs/begun"))))


def test_the_shipped_study_is_planned_but_for_its_data():
    study = load_study(ROOT / "yaml" / "studies" / "uptrain.yaml")
    assert len(study.config.variants) == 1 + 6 * 3 + 3 and study.config.baseline_name == "mha"


# ---------------------------------------------------------------- trained


@pytest.fixture(scope="module")
def trained(headway_once):
    variants = {name: keys for name, keys in VARIANTS.items() if name != "mqa"}
    asks = ["gqa-a0.4 varies more over seeds than gqa-a0.2", "gqa-a0.4 is better than mha"]
    study = write(headway_once.folder, variants, asks=asks)
    done = headway_once.run("study", "run", str(study), "--jobs", "1", "--no-timing")
    assert done.returncode == 0, done.stderr + done.stdout
    return headway_once.folder / "studies" / "up"


def test_the_report_has_the_losses_of_the_runs_over_alpha(trained):
    found = uptraining_of(analyse(trained))
    assert found is not None
    methods = {method.name: method for method in found.methods}
    assert [point.alpha for point in methods["gqa"].points] == [0, 0.2, 0.4]
    for alpha, step, variant in ((0, 0, "gqa-a0.2"), (0.4, 4, "gqa-a0.4")):
        point = next(p for p in methods["gqa"].points if p.alpha == alpha)
        for seed in (1, 2):
            run = trained / "cells" / variant / f"seed-{seed}"
            told = [r["loss"] for r in records(run, "validation") if r["step"] == step]
            assert point.losses[seed] == pytest.approx(told[-1])
            if not alpha:
                card = read_mapping(run / "converted" / "conversion.json")
                assert point.losses[seed] == pytest.approx(card["loss"]["after"], abs=1e-5)
    first, last = methods["gqa"].points[1:]
    assert last.flops == pytest.approx(2 * first.flops) and 0.3 < last.flops < 0.4
    (versus,) = found.versus
    result = analyse(trained)
    losses = {v.name: v.losses for v in result.variants}
    expected = sum(losses["gqa-a0.4"][s] - losses["scratch"][s] for s in (1, 2)) / 2
    assert versus.difference.mean == pytest.approx(expected) and versus.tokens == 3840


def test_runs_are_compared_at_their_own_ends_and_are_no_confounds(trained):
    result = analyse(trained)
    assert result.own_ends and result.pairing.status == "PAIRED"
    assert {c.record.tokens for c in result.cells} == {2560, 512, 1024, 3840}
    for cell in result.cells:
        last = records(trained / "cells" / cell.key, "validation")[-1]
        assert cell.loss == last["loss"]
    assert [d for d in result.differences if d.kind == "CONFOUND"] == [] == list(result.circumstances)
    assert result.trend is None and not any(v.start.confounded for v in result.variants)


def test_the_page_has_the_section_and_its_figure(trained):
    page = (trained / "report.md").read_text()
    section = page[page.index("## Uptraining") : page.index("## What was compared")]
    assert re.search(r"\| gqa \| mha to gqa, 2 KV heads, by mean \| 0.4 \| 1,024 \|", section)
    assert "uptraining.png" in section and (trained / "uptraining.svg").is_file()
    assert re.search(r"\| gqa-a0.4 \| scratch \| counted \| 3,840 \| 2 \|", section)
    assert re.search(r"\| gqa-a0.4 varies more over seeds than gqa-a0.2 \| (yes|no|undecided) \| sd [0-9.]+x", page)
    assert "At the end of each run, " in page


def test_finished_cells_are_not_trained_again(trained, monkeypatch):
    monkeypatch.chdir(trained.parents[1])
    plan = plan_study(load_study(trained.parents[1] / "up.yaml"))
    assert len(plan.cells) == 8 and unfinished([plan]) == [] and [c for cell in plan.cells for c in changes(cell)] == []


def test_the_folder_of_a_run_is_a_teacher(trained, headway_once):
    teacher = headway_once.folder / "runs" / "teacher"
    shutil.copytree(trained / "cells" / "mha" / "seed-1", teacher)
    variants = {"gqa": {"from": {**ORIGIN, "run": "runs/teacher", "alpha": 0.1}}}
    path = write(headway_once.folder, variants, study="other", baseline="gqa", seeds=[1])
    done = headway_once.run("study", "run", str(path), "--no-timing", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    found = uptraining_of(analyse(headway_once.folder / "studies" / "other"))
    assert found is not None and found.methods[0].teacher == "runs/teacher"
    assert [p.difference for p in found.methods[0].points] == [None, None]
    before = uptraining_of(analyse(trained))
    assert before is not None  # the same weights, converted in the same way
    assert found.methods[0].points[0].losses[1] == pytest.approx(before.methods[0].points[0].losses[1])


def test_cells_of_a_teacher_that_failed_are_not_run_and_say_why(here, headway):
    path = write(headway.folder, {name: VARIANTS[name] for name in ("mha", "gqa")}, seeds=[1])
    foreign = headway.folder / "studies" / "up" / "cells" / "mha" / "seed-1" / "notes.txt"  # no run, so it is refused
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    done = headway.run("study", "run", str(path), "--jobs", "1", "--no-timing")
    assert done.returncode == 1, done.stderr
    outcomes = read_mapping(headway.folder / "studies" / "up" / "outcomes.json")
    assert outcomes["mha/seed-1"]["exit_code"] != 0
    (line,) = outcomes["gqa-a0.2/seed-1"]["last_lines"]
    assert line.startswith("error: its teacher mha/seed-1 is not complete, so there are no weights to convert")


# ---------------------------------------------------------------- the question of spreads


def test_a_spread_is_larger_only_if_the_f_test_says_so():
    small = {s: 3 + 0.001 * (-1) ** s * s for s in range(12)}
    large = {s: 3 + 0.1 * (-1) ** s * s for s in range(12)}
    said, shown = answer_spread(large, small)
    assert said == "yes" and shown.startswith("sd 100.00x [")
    low, high = map(float, re.findall(r"[\d.]+", shown)[1:])
    # F(0.025; 11, 11) = 3.474 (tables of the F distribution)
    assert low == pytest.approx(100 / 3.474**0.5, abs=0.05) and high == pytest.approx(100 * 3.474**0.5, abs=0.05)
    assert answer_spread(small, large)[0] == "no"
    assert answer_spread(small, {s: v + 1 for s, v in small.items()})[0] == "undecided"
    assert answer_spread({1: 3.0}, small) == ("undecided", "no ratio of sds: each needs two seeds")
