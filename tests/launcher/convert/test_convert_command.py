"""`headway convert` writes weights of another mechanism and says what it did; `init.convert` does so at a start."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from run_folders import records, trajectory
from untrained_runs import decoder_of, untrained_run

from headway.launcher.base.errors import SpecError
from headway.launcher.cli.main import main
from headway.launcher.convert.measure import judgement, mean_loss
from headway.launcher.exchange.export import export
from headway.launcher.exchange.opened import open_model
from headway.launcher.run.run_dir import read_mapping
from headway.launcher.run.stored_spec import RunDir, stored_spec
from headway.launcher.spec.load import load_spec
from headway.model.attention.gqa import GqaConfig
from headway.model.decoder import Decoder
from headway.model.huggingface.folder import WeightsError, load_exported
from headway.model.mixed import MixedConfig

MHA = {"type": "mha", "heads": 4, "head_dim": 6}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An MHA run of 2 layers on synthetic data, with random weights."""
    return untrained_run(tmp_path_factory.mktemp("convert") / "run", attention=MHA)


def convert(*words):
    assert main(["convert", *map(str, words)]) == 0


@pytest.fixture
def refused(capsys):
    """`refused(words, code, message)`: one message and no traceback."""

    def check(*words, code: int, message: str) -> None:
        assert main(["convert", *map(str, words)]) == code
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and re.search(message, errors[0].removeprefix("error: ")), errors

    return check


def same(a: Decoder, b: Decoder, *, equal: bool = True) -> None:
    tokens = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.allclose(a.logits(tokens), b.logits(tokens), atol=1e-5) == equal


def test_the_card_has_the_losses_of_both_decoders(run, tmp_path, capsys):
    out = tmp_path / "out"
    convert(run, "--to", "gqa", "--kv-heads", 2, "--how", "align", "--tokens", 480, "--out", out)
    card = json.loads((out / "conversion.json").read_text())
    batches = judgement(stored_spec(RunDir(run)).data, 480)
    assert card["calibration"] == {"split": "train", "tokens": 480}
    assert (card["loss"]["split"], card["loss"]["tokens"]) == ("validation", 480)
    assert card["loss"]["before"] == pytest.approx(mean_loss(decoder_of(run), batches, ""))
    assert card["loss"]["after"] == pytest.approx(mean_loss(load_exported(out), batches, ""))
    assert card["loss"]["before"] != card["loss"]["after"]
    assert [layer["groups"] for layer in card["layers"]] == [[[0, 1], [2, 3]]] * 2
    assert all(layer["keys"][1] > layer["keys"][0] for layer in card["layers"])
    said = capsys.readouterr().out
    assert f"loss       {card['loss']['before']:.4f} before, {card['loss']['after']:.4f} after" in said
    assert "layer 1    KV heads 0+1 2+3; cosine within groups: keys " in said


def test_heads_are_compared_by_weights_without_any_tokens(run, tmp_path, capsys):
    export(run, tmp_path / "weights", to="safetensors")
    words = ["--to", "gqa", "--kv-heads", 3, "--how", "cluster_align", "--by", "weights", "--unequal"]
    convert(tmp_path / "weights", *words, "--out", tmp_path / "out")
    card = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert (card["how"], card["by"], card["calibration"]) == ("cluster_align", "weights", None)
    assert card["to"]["group_sizes"] == [1, 1, 2]
    attention = load_exported(tmp_path / "out").attention
    assert isinstance(attention, GqaConfig) and attention.group_sizes == [1, 1, 2]
    said = capsys.readouterr().out
    for layer in card["layers"]:
        before, after = layer["dispersion"]
        assert after <= before and sorted(head for group in layer["groups"] for head in group) == [0, 1, 2, 3]
        groups = " ".join("+".join(map(str, group)) for group in layer["groups"])
        assert f"layer {layer['layer']}    KV heads {groups}; dispersion {before:.3f} -> {after:.3f}" in said
    assert "to gqa with 3, by cluster_align of weights" in said


def test_each_layer_gets_a_number_of_heads_and_the_spec_states_them(run, tmp_path, capsys, monkeypatch):
    """The choice itself is tested on decoders; here the numbers are given."""
    export(run, tmp_path / "weights", to="safetensors")
    words = ["--to", "gqa", "--kv-heads", 3, "--how", "cluster", "--by", "weights", "--by-layer"]
    monkeypatch.setattr("headway.model.convert.grouping.best_numbers", lambda alike, total, seed: [2, total - 2])
    convert(tmp_path / "weights", *words, "--out", tmp_path / "out")
    assert "to gqa with 3 on average, by cluster of weights" in capsys.readouterr().out.replace("mixed", "gqa")
    card = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert card["kv_heads"] == [4, [2, 4]] and [len(layer["groups"]) for layer in card["layers"]] == [2, 4]
    loaded = load_exported(tmp_path / "out")
    assert isinstance(loaded.attention, MixedConfig) and loaded.attention.pattern == ["kv_2", "kv_4"]
    spec = stored_spec(RunDir(run)).model_dump(mode="json", exclude={"model", "attention", "init"})
    (tmp_path / "spec.json").write_text(json.dumps({"base": "out/model.yaml", **spec}))
    attention = load_spec(tmp_path / "spec.json").spec.attention
    assert attention == loaded.attention


def test_as_json_it_is_one_document(run, tmp_path, capsys):
    convert(run, "--to", "mqa", "--tokens", 48, "--out", tmp_path / "out", "--json")
    card = json.loads(capsys.readouterr().out)
    assert card["out"] == str(tmp_path / "out") and card["kv_heads"] == [4, 1]


@pytest.mark.parametrize("form", ["hf", "safetensors"])
def test_weights_of_a_run_of_an_export_and_of_a_llama_convert_alike(run, tmp_path, form, capsys, monkeypatch):
    monkeypatch.setattr("headway.launcher.exchange.export.is_installed", lambda: False)  # its import takes seconds
    export(run, tmp_path / "source", to=form)
    convert(tmp_path / "source", "--to", "gqa", "--kv-heads", 2, "--out", tmp_path / "a")
    convert(run, "--to", "gqa", "--kv-heads", 2, "--out", tmp_path / "b")
    same(load_exported(tmp_path / "a"), load_exported(tmp_path / "b"))
    same(load_exported(tmp_path / "a"), decoder_of(run), equal=False)
    card = json.loads((tmp_path / "a" / "conversion.json").read_text())
    assert card["loss"] is None and card["loss_not_measured"].startswith("no dataset was named")
    assert "loss       not measured: no dataset" in capsys.readouterr().out


ROUTED = {
    "rgqa": ["--kv-heads", "2", "attention.top_k=1", "attention.k_schedule=[{until_tokens: 100, top_k: 2}]"],
    "moh": ["--kv-heads", "2", "attention.top_k=2", "attention.k_schedule={start: 4, until_tokens: 100}"],
    "wgqa": ["--kv-heads", "2", "attention.weights=column"],
}


@pytest.mark.parametrize("to", ROUTED)
def test_other_targets_start_as_gqa_and_open(run, tmp_path, to):
    convert(run, "--to", to, *ROUTED[to], "--tokens", 48, "--out", tmp_path / "a")
    convert(run, "--to", "gqa", "--kv-heads", 2, "--tokens", 48, "--out", tmp_path / "b")
    opened = open_model(tmp_path / "a")
    same(opened.decoder.cpu(), load_exported(tmp_path / "b"))


@pytest.mark.parametrize("more", [[], ["attention.top_k=1", "attention.k_schedule={start: 2, until_tokens: 100}"]])
def test_switchhead_starts_as_the_source(run, tmp_path, capsys, more):
    convert(run, "--to", "switchhead", *more, "--tokens", 48, "--out", tmp_path / "a")
    same(load_exported(tmp_path / "a"), decoder_of(run))
    assert "nothing was pooled: the result computes the function of the source" in capsys.readouterr().out


SPARSE = ["--to", "block_sparse"]


def sparse_card(run, out, block, *words, capsys):
    """The card of a conversion, and what the command said of the function."""
    convert(run, *SPARSE, f"attention.block={block}", *words, "--tokens", 480, "--out", out)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("function ")]
    assert len(said) == 1 and said[0] in (out / "README.md").read_text()
    return json.loads((out / "conversion.json").read_text()), said[0].removeprefix("function   ")


def test_block_sparse_with_all_blocks_starts_as_the_source_or_as_gqa(run, tmp_path, capsys):
    card, said = sparse_card(run, tmp_path / "a", 8, "attention.blocks=5", capsys=capsys)
    assert card["same_function"] and (card["complete_tokens"], card["not_exact"]) == (48, None)
    assert said == "nothing was pooled: the result computes the function of the source in sequences of up to 48 tokens"
    assert card["loss"]["after"] == pytest.approx(card["loss"]["before"], abs=1e-6)
    same(load_exported(tmp_path / "a"), decoder_of(run))
    card, said = sparse_card(run, tmp_path / "b", 8, "--kv-heads", 2, "attention.blocks=5", capsys=capsys)
    convert(run, "--to", "gqa", "--kv-heads", 2, "--tokens", 480, "--out", tmp_path / "c")
    assert not card["same_function"] and card["not_exact"] is None
    assert said == "all blocks are chosen: the result computes the function of gqa in sequences of up to 48 tokens"
    plain = json.loads((tmp_path / "c" / "conversion.json").read_text())
    assert card["loss"]["after"] == pytest.approx(plain["loss"]["after"], abs=1e-6) != card["loss"]["before"]
    assert (plain["complete_tokens"], plain["not_exact"]) == (None, None)
    same(load_exported(tmp_path / "b"), load_exported(tmp_path / "c"))


def test_block_sparse_that_leaves_blocks_out_is_said_not_to_be_exact(run, tmp_path, capsys):
    card, said = sparse_card(run, tmp_path / "a", 4, "attention.blocks=1", "attention.chosen_by=head", capsys=capsys)
    assert not card["same_function"] and card["complete_tokens"] == 8 and said == card["not_exact"]
    assert said == (
        "not exact: in sequences of 48 tokens, tokens do not attend to the blocks that they do not choose; in "
        "sequences of up to 8 tokens all blocks are chosen, and the function is that of gqa"
    )
    batches = judgement(stored_spec(RunDir(run)).data, 480)
    assert card["loss"]["before"] == pytest.approx(mean_loss(decoder_of(run), batches, ""))
    assert card["loss"]["after"] == pytest.approx(mean_loss(load_exported(tmp_path / "a"), batches, ""))
    assert abs(card["loss"]["before"] - card["loss"]["after"]) > 1e-3
    assert card["to"]["chosen_by"] == "head"


def test_losses_of_documents_in_which_all_blocks_are_chosen_are_said_to_be_those(run, tmp_path, capsys):
    """The problems of these sequences are documents of 16 tokens, so no loss shows that the start is not exact."""
    card, _ = sparse_card(run, tmp_path / "a", 8, "attention.blocks=1", capsys=capsys)
    assert card["loss"]["before"] == pytest.approx(card["loss"]["after"], abs=1e-6) and not card["same_function"]
    assert card["not_exact"].endswith(
        "function is that of gqa, as in those of the losses (documents of up to 16 tokens)"
    )
    export(run, tmp_path / "weights", to="safetensors")
    card, _ = sparse_card(tmp_path / "weights", tmp_path / "b", 8, "attention.blocks=1", capsys=capsys)
    assert card["loss"] is None and card["not_exact"].endswith("the function is that of gqa")


def test_the_longest_document_is_that_of_any_row(run):
    batches = judgement(stored_spec(RunDir(run)).data, 100)
    assert batches.longest_document == 16
    segments = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 2]])
    first, *_ = batches.micro
    assert replace(batches, micro=[first, replace(first, segments=segments)]).longest_document == 16
    assert replace(batches, micro=[replace(first, segments=segments)]).longest_document == 4
    assert replace(batches, micro=[replace(first, segments=None)]).longest_document == 48


def test_a_spec_starts_from_the_folder(run, tmp_path):
    out = tmp_path / "out"
    convert(run, "--to", "gqa", "--kv-heads", 2, "--tokens", 48, "--out", out)
    spec = stored_spec(RunDir(run)).model_dump(mode="json", exclude={"model", "attention", "init"})
    (tmp_path / "spec.json").write_text(json.dumps({"base": "out/model.yaml", **spec}))
    loaded = load_spec(tmp_path / "spec.json").spec
    assert loaded.attention.type == "gqa" and loaded.init.sha256 is not None


BAD = [
    (["--to", "gqa", "--kv-heads", "3"], 64, r"^--to gqa: kv_heads: 4 query heads do not divide into 3"),
    (["--to", "gqa", "--kv-heads", "8"], 64, r"^--kv-heads: 8, and the source has 4; use 4 or a divisor"),
    (["--to", "mqa", "--kv-heads", "2"], 64, r"^--kv-heads: 2 with --to mqa, which has one KV head"),
    (["--to", "switchhead", "--kv-heads", "2"], 64, r"2 score maps, and the source has 4.*use kv_heads 4"),
    (["--to", "rgqa", "--kv-heads", "2", "attention.top_k=1"], 64, r"attention.top_k: .*use top_k = "),
    (["--to", "wgqa", "--kv-heads", "2", "--how", "cluster", "--unequal"], 64, r"--unequal: wgqa has groups of equal"),
    (["--to", "gqa", "--kv-heads", "2", "--unequal"], 64, r"mean: makes groups of consecutive heads.*use cluster"),
    (["--to", "gqa", "--kv-heads", "2", "--by-layer"], 64, r"mean: makes groups of consecutive heads.*use cluster"),
    (["--to", "moh", "--how", "cluster", "--by-layer"], 64, r"--by-layer: is not possible for moh; use --to gqa"),
    (["--to", "gqa", "--unequal", "--by-layer"], 64, r"^--by-layer: chooses equal groups.*use one of them"),
    (SPARSE, 64, r"^attention.block: --to block_sparse needs it \(P, .*add attention.block=VALUE"),
    ([*SPARSE, "attention.block=8"], 64, r"^attention.blocks: --to block_sparse needs it .*add attention.blocks=VALUE"),
    ([*SPARSE, "attention.block=48", "attention.blocks=1"], 64, r"in sequences of 48, .*block 12"),
    (
        [*SPARSE, "attention.block=8", "attention.blocks=1", "--unequal"],
        64,
        r"--unequal: block_sparse has groups of equal size",
    ),
    (["--to", "gqa", "attention.top_k=1"], 64, r"^attention.top_k: gqa has no such key; use one of head_dim, "),
    (["--to", "gqa", "optimizer.lr=1"], 64, r"only attention.KEY=value can be set here"),
    (["--to", "gqa", "attention.type=moa"], 64, r"^attention.type: --to names the mechanism"),
    (["--to", "gqa", "--step", "7"], 66, r"^--step: .*no checkpoint of step 7 \(there: 1\)"),
]


@pytest.mark.parametrize(("words", "code", "message"), BAD, ids=[" ".join(words) for words, _, _ in BAD])
def test_what_cannot_be_converted_is_refused_in_one_message(run, tmp_path, refused, words, code, message):
    refused(run, *words, "--tokens", 48, "--out", tmp_path / "out", code=code, message=message)
    assert not (tmp_path / "out").exists()


def test_sources_that_are_none_are_refused(run, tmp_path, refused):
    out = ["--out", tmp_path / "out"]
    refused(tmp_path / "none", "--to", "gqa", *out, code=66, message="no such folder")
    other = untrained_run(
        tmp_path / "other", attention={"type": "sqa", "heads": 4, "kept": 2, "kv_heads": 2, "head_dim": 6}
    )
    message = r"attention of type sqa, and only mha, gqa, mqa can be converted; name a model"
    refused(other, "--to", "gqa", *out, code=64, message=message)
    normed = untrained_run(tmp_path / "normed", attention={**MHA, "qk_norm": True})
    words = ["--to", "gqa", "--kv-heads", 2, "--how", "align", "--tokens", 48]
    refused(normed, *words, *out, code=64, message=r"align: the source has QK-norm.*use mean or cluster")
    export(run, tmp_path / "weights", to="safetensors")
    message = r"^--how align: needs calibration tokens, .*--data, compare weights with --by weights, or use --how mean"
    refused(tmp_path / "weights", "--to", "gqa", "--how", "align", *out, code=64, message=message)
    words = ["--to", "gqa", "--step", 1]
    refused(tmp_path / "weights", *words, *out, code=66, message=r"^--step: .* is not the folder of a run")
    words = ["--to", "gqa", "--data", tmp_path]
    refused(tmp_path / "weights", *words, *out, code=65, message=r"^--data: .* is no dataset; build one")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- init.convert


START = ["attention.type=gqa", "attention.kv_heads=2", "init.convert.how=mean", "init.convert.tokens=512"]


@pytest.fixture(scope="module")
def teacher(headway_once):
    """A trained MHA run of the tiny spec, and the overrides that make it one."""
    mha = ["attention.type=mha", "train.tokens=2560", "train.validate_first=true"]
    done = headway_once.train("run_dir=runs/teacher", *mha)
    assert done.returncode == 0, done.stderr
    return headway_once


ANNEALED = [
    *["attention.type=moh", "attention.kv_heads=2", "attention.shared_heads=0", "attention.form=code"],
    *["attention.top_k=2", "attention.k_schedule={start: 4, until_tokens: 2048}", "attention.balance.loss_free_rate=0"],
    *["init.convert.how=cluster", "init.convert.by=weights", "init.convert.tokens=512"],
]


CHOSEN = [
    *["attention.type=block_sparse", "attention.kv_heads=2", "attention.block=8", "attention.blocks=1"],
    *["init.convert.how=align", "init.convert.tokens=512"],
]


@pytest.mark.parametrize(
    ("start", "by"),
    [(START, None), (ANNEALED, "weights"), (CHOSEN, "activations")],
    ids=["gqa", "moh", "block_sparse"],
)
def test_a_run_starts_from_converted_weights_and_resumes_without_them(teacher, start, by):
    """The annealed run is resumed at 1,280 tokens, where it has neither the first k nor the last."""
    up = teacher.folder / "runs" / start[0].partition("=")[2]
    words = [f"run_dir={up}", *start, "init.weights=runs/teacher", "train.tokens=2560", "train.validate_first=true"]
    done = teacher.train(*words)
    assert done.returncode == 0, done.stderr
    card = read_mapping(up / "converted" / "conversion.json")
    first = records(up, "validation")[0]
    assert (first["step"], first["loss"]) == (0, pytest.approx(card["loss"]["after"], abs=1e-5))
    last = records(teacher.folder / "runs" / "teacher", "validation")[-1]
    assert last["loss"] == pytest.approx(card["loss"]["before"], abs=1e-5)
    assert read_mapping(up / "run.json")["conversion"] == card
    assert bool(card["not_exact"]) is (start is CHOSEN) and (card["not_exact"] or "") in done.stdout
    assert f"converted by {card['how']}" in done.stdout and card["by"] == by
    before = trajectory(up)
    for step in sorted((up / "checkpoints").iterdir())[1:]:
        shutil.rmtree(step)
    (up / "summary.json").unlink()
    shutil.rmtree(up / "converted")
    again = teacher.train(*words)
    assert again.returncode == 0, again.stderr
    assert trajectory(up) == before and not (up / "converted").exists()
    assert read_mapping(up / "run.json")["conversion"] == card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attention.type=gqa", "attention.kv_heads=2"], "init.convert.how=mean converts mha or gqa to the attention"),
        ([*START, "model.width=40"], "model.width: 32 there, 40 in the spec"),
        ([*START, "attention.head_dim=16"], "init.convert: .*attention.head_dim: 16 in the target and 8 in the source"),
    ],
)
def test_weights_that_cannot_become_those_of_the_spec_are_refused(teacher, words, message):
    done = teacher.train("run_dir=runs/bad", *words, "init.weights=runs/teacher")
    assert done.returncode == 64
    assert re.search(message, done.stderr), done.stderr


def test_a_conversion_needs_weights(tmp_path, teacher):
    with pytest.raises(SpecError, match=r"init.convert: there are no weights to convert; use init.weights too"):
        load_spec(teacher.spec, START)


def test_a_converted_folder_that_was_changed_is_no_start(run, tmp_path):
    convert(run, "--to", "gqa", "--tokens", 48, "--out", tmp_path / "out")
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(WeightsError, match="its contents changed"):
        load_exported(tmp_path / "out")
