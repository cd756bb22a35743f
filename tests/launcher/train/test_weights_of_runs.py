"""`init.weights` from a checkpoint of a run, and branches with a fresh optimizer (`init.optimizer`)."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from run_folders import records, steps_done, trajectory

from headway.data.build import build
from headway.data.config import MdsSource
from headway.data.corpus.config import CorpusConfig
from headway.launcher.base import console
from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.run.branching import hash_of, lineage
from headway.launcher.run.initial_weights import _refuse_another_tokenizer_of_a_run, named, with_initial
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec
from headway.model.huggingface.folder import WeightsError
from headway.parallel.config import CheckpointError
from headway.parallel.manifest import read_manifest

LONG = ("schedule.decay_fraction=0", "checkpoint.keep=1", "checkpoint.keep_at_tokens=[2560]")
NEW = ("train.tokens=2560", "train.validate_first=true", "optimizer.lr=0.001", "seed=5")
LAYOUTS = [
    ("launch.processes=2", "parallel.zero=3"),
    ("launch.processes=2", "parallel.tensor=2"),
    ("launch.processes=2", "parallel.pipeline=2"),
    ("launch.processes=2", "parallel.context=2"),
]
TOLERANCE = 1e-5
"""Ranks sum in a different order."""


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:010d}"


def validations(run: Path) -> list[float]:
    return [record["loss"] for record in records(run, "validation")]


def card(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


@pytest.fixture(scope="module")
def folder(headway_once):
    """`source`, a run of 40 steps that keeps steps 10 and 40; `sharded`, the same by two tensor-parallel processes."""
    for overrides in ((*LONG, "run_dir=source"), (*LONG, *LAYOUTS[1], "run_dir=sharded", "train.tokens=2560")):
        done = headway_once.train(*overrides)
        assert done.returncode == 0, done.stderr
    return headway_once.folder


def trained(headway, run_dir: str, *overrides: str) -> Path:
    done = headway.train(*NEW, *overrides, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return headway.folder / run_dir


def test_a_run_starts_from_the_newest_weights_of_another_and_says_so(folder, headway_once):
    done = headway_once.train(*NEW, "init.weights=source", "run_dir=newest")
    assert done.returncode == 0, done.stderr
    run, source = folder / "newest", folder / "source"
    assert validations(run)[0] == validations(source)[-1]
    assert [record["step"] for record in records(run)] == list(range(1, 11))
    found = hash_of(checkpoint(source, 40))
    facts = card(run)["weights"]
    assert (facts["run"], facts["step"], facts["tokens"], facts["sha256"]) == (
        json.loads((source / "run_id.json").read_text()),
        40,
        10240,
        found,
    )
    stored = json.loads((run / "spec.json").read_text())["init"]
    assert (stored["weights"], stored["sha256"]) == ("source@40", found)
    assert f"weights    of source after step 40 (run {facts['run']}), sha256 {found[:16]}" in done.stdout
    assert read_manifest(checkpoint(run, 10)).state["applied_steps"] == 10


def test_a_step_may_be_named(folder, headway_once):
    run = trained(headway_once, "tenth", "init.weights=source@10")
    assert validations(run)[0] == records(folder / "source", "validation")[0]["loss"]
    assert card(run)["weights"]["step"] == 10


def test_weights_of_a_run_give_the_training_of_its_export(folder, headway_once):
    """Moments, schedule and order begin anew: nothing but parameters and buffers is taken."""
    assert headway_once.run("export", "source", "exported", "--to", "safetensors").returncode == 0
    ours, theirs = (trained(headway_once, f"of-{name}", f"init.weights={name}") for name in ("source", "exported"))
    assert trajectory(ours) == trajectory(theirs)
    files = [{n: e.xxh3_128 for n, e in read_manifest(checkpoint(run, 10)).files.items()} for run in (ours, theirs)]
    assert files[0] == files[1]
    assert card(theirs)["weights"].keys() == {"path", "sha256", "tokens", "source"}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda words: words[-1])
def test_every_layout_takes_the_weights(folder, headway_once, layout):
    if not (folder / "one").exists():
        trained(headway_once, "one", "init.weights=source")
    run = trained(headway_once, layout[-1], *layout, "init.weights=source")
    assert validations(run)[0] == pytest.approx(validations(folder / "source")[-1], rel=TOLERANCE)
    ours, one = records(run), records(folder / "one")
    assert [record["batch_hash"] for record in ours] == [record["batch_hash"] for record in one]
    assert [record["loss"] for record in ours[:5]] == pytest.approx(
        [record["loss"] for record in one[:5]], rel=TOLERANCE
    )


def test_weights_that_ranks_wrote_in_parts_are_taken(folder, headway_once):
    run = trained(headway_once, "whole", "init.weights=sharded")
    assert validations(run)[0] == pytest.approx(validations(folder / "sharded")[-1], rel=TOLERANCE)


def test_the_same_command_goes_on_without_the_other_run(folder, headway):
    shutil.copytree(folder / "source", headway.folder / "source")
    command = (*NEW, "init.weights=source", "run_dir=new", "checkpoint.every_tokens=1280")
    process = headway.start(*command)
    run = headway.folder / "new"
    headway.wait_for(lambda: checkpoint(run, 5).exists() and steps_done(run) >= 5, process)
    os.kill(int((run / "logs" / "rank-0.pid").read_text()), signal.SIGKILL)
    process.communicate(timeout=60)
    shutil.rmtree(headway.folder / "source")
    (run / "summary.json").unlink(missing_ok=True)
    shutil.rmtree(checkpoint(run, 10), ignore_errors=True)
    done = headway.train(*command)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    assert trajectory(run) == trajectory(folder / "newest")
    assert card(run)["weights"]["step"] == 40 and "weights    of source after step 40" in done.stdout


# ---------------------------------------------------------------- without processes


@pytest.fixture
def spec(folder, headway, monkeypatch):
    """`spec(*overrides)`: a resolved spec that starts from a copy of `source`."""
    shutil.copytree(folder / "source", headway.folder / "source")
    monkeypatch.chdir(headway.folder)

    def load(*overrides: str) -> Spec:
        usual = {"init.weights": "source", "run_dir": "new", "model.vocab_size": "32"}
        words = [f"{k}={v}" for k, v in usual.items() if not any(word.startswith(f"{k}=") for word in overrides)]
        return load_spec(headway.spec, [*words, *overrides]).spec

    return load


def test_a_run_that_trained_on_does_not_change_the_beginning(spec):
    aside = checkpoint(Path("source"), 40).rename("aside")
    first, facts = with_initial(spec())
    assert first.init.weights == "source@10" and facts is not None and facts["step"] == 10
    RunDir(Path("new")).adopt(first)
    aside.rename(checkpoint(Path("source"), 40))
    again, _ = with_initial(spec())
    assert again == first
    RunDir(Path("new")).adopt(again)
    other, _ = with_initial(spec("init.weights=source@40"))
    with pytest.raises(SpecError, match=r"(?s)a run of another spec:.*init\.sha256"):
        RunDir(Path("new")).adopt(other)
    assert with_initial(spec("run_dir=other"))[0].init.weights == "source@40"


def test_a_run_with_a_checkpoint_finds_its_source_moved_or_gone(spec):
    run = RunDir(Path("new"))
    first, _ = with_initial(spec("init.weights=source@10"))
    run.adopt(first)
    run.checkpoints.joinpath("step-0000000001").mkdir(parents=True)
    Path("source").rename("moved")
    for written in ("moved", "moved@10", "source", "source@10"):
        found, facts = with_initial(spec(f"init.weights={written}"))
        assert facts is None and found.init.sha256 == first.init.sha256
        run.adopt(found)
    with pytest.raises(NoInputError, match=r"init\.weights: source: no such folder"):
        with_initial(spec("init.weights=source@40"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("attention.top_k=2",), r"attention\.top_k: 1 there, 2 in the spec"),
        (("model.width=64",), r"model\.width: 32 there, 64 in the spec"),
        (("model.layers=3",), r"model\.layers: 2 there, 3 in the spec"),
        (("attention.qk_norm=true",), r"attention\.qk_norm: False there, True in the spec"),
        (("model.vocab_size=40",), r"model\.vocab_size: 32 there, 40 in the spec"),
        (("attention={type: gqa, heads: 4, kv_heads: 2, head_dim: 8}",), r"attention\.type: 'rgqa' there, 'gqa' in"),
    ],
)
def test_weights_of_another_model_are_refused_with_the_keys_that_differ(spec, overrides, said):
    with pytest.raises(
        SpecError, match=rf"(?s)init\.weights: source holds another model:.*{said}.*a run in spec\.json"
    ):
        with_initial(spec(*overrides))


@pytest.mark.parametrize("overrides", [("model.init_std=0.1",), ("seed=9",), ("data.seq_len=64",), ("optimizer.lr=1",)])
def test_what_does_not_concern_the_weights_may_differ(spec, overrides):
    assert with_initial(spec(*overrides))[0].init.weights == "source@40"


def test_places_that_hold_no_weights_are_refused(spec):
    def refused(error, message, *overrides):
        with pytest.raises(error, match=message):
            with_initial(spec(*overrides))

    refused(NoInputError, r"source has no checkpoint of step 12 \(there: 10, 40\); name one", "init.weights=source@12")
    refused(SpecError, r"source is the folder of this run itself; the same command without", "run_dir=source")
    refused(NoInputError, r"init\.weights: gone: no such folder", "init.weights=gone@5")
    refused(WeightsError, r"init\.weights: gone: no such folder", "init.weights=gone")
    Path("empty").mkdir()
    refused(WeightsError, r"empty has neither spec\.json nor config\.json, so it is no run", "init.weights=empty")
    Path("empty/study.json").write_text("{}")
    refused(NoInputError, r"init\.weights: empty is the folder of a study; name one of its runs", "init.weights=empty")
    zeros = f"init.sha256={'0' * 64}"
    refused(SpecError, r"init\.sha256: the checkpoint of step 40 in source is another one", zeros)
    (file,) = checkpoint(Path("source"), 10).glob("*.safetensors")
    file.write_bytes(bytes(file.stat().st_size))
    refused(CheckpointError, "its contents changed after it was written", "init.weights=source@10")
    Path("source/run_id.json").write_text('"another"')
    refused(CheckpointError, "it was written by another run")
    shutil.rmtree("source/checkpoints")
    refused(CheckpointError, "there is no checkpoint yet")


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(spec, capsys):
    (file,) = checkpoint(Path("source"), 40).glob("*.safetensors")
    file.write_bytes(bytes(file.stat().st_size))
    assert with_initial(spec())[0].init.weights == "source@10"
    assert "checkpoint skipped" in capsys.readouterr().err


def test_a_path_with_an_at_sign_is_one_if_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named("a@7") == (Path("a"), 7) and named("a") == (Path("a"), None)
    Path("a@7").mkdir()
    assert named("a@7") == (Path("a@7"), None) and named("a@7@8") == (Path("a@7"), 8)


def test_a_path_and_its_step_are_found_beside_the_file_of_the_spec(folder, headway, monkeypatch):
    place = headway.folder / "project"
    shutil.copytree(folder / "source", place / "source")
    monkeypatch.chdir(headway.folder)
    for written, end in (("source", ""), ("source@10", "@10")):
        (place / "spec.yaml").write_text(headway.spec.read_text() + f"init: {{weights: {written}}}\n")
        assert load_spec("project/spec.yaml").spec.init.weights == f"{place.resolve() / 'source'}{end}"


def test_datasets_with_another_tokenizer_are_refused(spec, tmp_path, monkeypatch):
    def dataset(name: str, words: str) -> MdsSource:
        (tmp_path / f"{name}.txt").write_text("".join(f"{words} {n}.\n\n" for n in range(200)))
        config = {
            "name": name,
            "corpus": {"type": "text", "paths": [str(tmp_path / f"{name}.txt")], "document": "blank_line"},
            "tokenizer": {"type": "train_bpe", "vocab_size": 260},
        }
        build(CorpusConfig.model_validate(config), out=tmp_path / name, progress=False)
        return MdsSource(type="mds", path=str(tmp_path / name))

    def of(source: MdsSource) -> Spec:
        base = spec()
        return base.model_copy(update={"data": base.data.model_copy(update={"source": source})})

    one, other, run = of(dataset("one", "a ab abc")), of(dataset("other", "x xy xyz")), RunDir(Path("source"))
    _refuse_another_tokenizer_of_a_run(one, one, run)
    with pytest.raises(SpecError, match=r"other was made with another tokenizer than source, .*one/tokenizer\.json"):
        _refuse_another_tokenizer_of_a_run(other, one, run)
    warned: list[str] = []
    monkeypatch.setattr(console, "warn", warned.append)
    shutil.rmtree(tmp_path / "one")
    _refuse_another_tokenizer_of_a_run(other, one, run)
    assert len(warned) == 1 and "nothing tells whether" in warned[0]


# ---------------------------------------------------------------- branches with a fresh optimizer

BRANCH = ("train.tokens=5120", "schedule.decay_fraction=0", "init.run=source@10", "init.optimizer=fresh")


def test_a_branch_with_a_fresh_optimizer_continues_everything_else(folder, headway_once):
    fresh, kept = (headway_once.train(*words, f"run_dir={name}") for name, words in _branches())
    assert (fresh.returncode, kept.returncode) == (0, 0), fresh.stderr + kept.stderr
    run, other, source = folder / "fresh", folder / "kept", folder / "source"
    assert (
        trajectory(other)[:20] == trajectory(source)[:20]
    )  # the same schedule: with its moments it is the same training
    ours = records(run)
    assert ours[:10] == records(source)[:10]
    for key in ("step", "loss", "grad_norm", "lr", "batch_hash"):  # the weights, the batch and the schedule of step 11
        assert ours[10][key] == records(source)[10][key]
    assert ours[11]["loss"] != records(source)[11]["loss"]
    assert [record["lr"] for record in ours] == [record["lr"] for record in records(other)]
    state = read_manifest(checkpoint(run, 20)).state
    assert state["applied_steps"] == 10 and state["tokens"] == 5120
    note = "the optimizer starts anew after step 10 (init.optimizer: fresh), so this run is not equal to one trained"
    assert fresh.stdout.count(note) == 2 and card(run)["branch"]["optimizer"] == "fresh"
    assert records(run, "branch")[0]["note"].startswith(note) and card(other)["branch"]["optimizer"] == "continue"


def _branches() -> list[tuple[str, tuple[str, ...]]]:
    return [("fresh", BRANCH), ("kept", BRANCH[:-1])]


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=lambda words: words[-1])
def test_every_layout_starts_its_optimizer_anew(folder, headway_once, layout):
    if not (folder / "fresh").exists():
        assert headway_once.train(*BRANCH, "run_dir=fresh").returncode == 0
    name = f"fresh-{layout[-1]}"
    done = headway_once.train(*BRANCH, *layout, f"run_dir={name}")
    assert done.returncode == 0, done.stderr
    ours, one = records(folder / name), records(folder / "fresh")
    assert [record["loss"] for record in ours[10:14]] == pytest.approx(
        [record["loss"] for record in one[10:14]], rel=TOLERANCE
    )
    assert read_manifest(checkpoint(folder / name, 20)).state["applied_steps"] == 10


def test_a_fresh_branch_resumes_with_the_moments_it_has_made(folder, headway):
    shutil.copytree(folder / "source", headway.folder / "source")
    command = (*BRANCH, "run_dir=cut")
    assert headway.train(*command).returncode == 0
    run = headway.folder / "cut"
    whole = trajectory(run)
    shutil.rmtree(checkpoint(run, 20))
    (run / "summary.json").unlink()
    done = headway.train(*command)
    assert done.returncode == 0 and "(step 15/20)" in done.stdout, done.stderr
    assert trajectory(run) == whole and read_manifest(checkpoint(run, 20)).state["applied_steps"] == 10


def test_the_optimizer_may_differ_only_if_it_is_fresh(folder, headway_once):
    other = ("optimizer.lr=0.001", "run_dir=other-lr")
    done = headway_once.train(*BRANCH[:-1], *other)
    assert done.returncode == 64 and "optimizer.lr: 0.003 there, 0.001 in the spec" in done.stderr
    done = headway_once.train(*BRANCH, *other)
    assert done.returncode == 0, done.stderr
    assert "and the learning rates of the parent differ from this schedule's from step 1 on" in done.stdout
    assert records(folder / "other-lr")[10]["lr"] == pytest.approx(0.001)


@pytest.mark.parametrize("more", [(), ("init.weights=source",)])
def test_only_a_branch_has_an_optimizer_to_start_anew(headway, more):
    with pytest.raises(SpecError, match=r"init\.optimizer: only a branch \(init\.run\) has an optimizer to continue"):
        load_spec(headway.spec, ["init.optimizer=fresh", *more])


def test_a_comparison_takes_branches_of_several_seeds_as_one_variant(folder, headway_once):
    """Each seed has a parent of its own, so each branch has another `init.sha256`."""
    seeds = ("seed=2", "data.seed=2")
    done = headway_once.train(*LONG, *seeds, "train.tokens=2560", "run_dir=source-2")
    assert done.returncode == 0, done.stderr
    for name, words in _branches():
        if not (folder / name).exists():
            assert headway_once.train(*words, f"run_dir={name}").returncode == 0
        words = [word.replace("source@10", "source-2@10") for word in words]
        done = headway_once.train(*words, *seeds, f"run_dir={name}-2")
        assert done.returncode == 0, done.stderr
    done = headway_once.run("compare", "kept", "kept-2", "fresh", "fresh-2", "--out", "compared", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["pairing"] == "PAIRED" and [v["validation_loss"]["n"] for v in found["variants"]] == [2, 2]
    page = (folder / "compared" / "report.md").read_text()
    assert "| `init.optimizer` | continue | fresh | intervention |" in page and "| CONFOUND |" not in page


def test_lineage_is_that_of_a_spec_without_its_seeds_up_to_the_step(folder, monkeypatch):
    monkeypatch.chdir(folder)
    run = RunDir(Path("source"))

    def found(step: int, override: str = "name=tiny", decay: float = 0) -> str:
        return lineage(run, load_spec("tiny.yaml", [f"schedule.decay_fraction={decay}", override]).spec, step)

    for same in ("seed=2", "data.seed=3", "train.tokens=99840", "name=x", "launch.processes=2"):
        assert found(10, same) == found(10), same
    assert found(10, decay=0.2) == found(10)  # the decay begins after step 32
    for other in ("optimizer.lr=1", "model.width=64", "attention.top_k=2", "schedule.warmup_tokens=0"):
        assert found(10, other) != found(10), other
    assert found(40, decay=0.2) != found(40)
