"""`headway export` and `headway import` keep the logits, and refuse models for which that is impossible."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from llamas import logits, some_tokens, transformers
from safetensors.torch import load_file

from headway.launcher.base.errors import HeadwayError, NoInputError, SpecError
from headway.launcher.base.new_folder import new_folder
from headway.launcher.cli.main import main
from headway.launcher.exchange import export as export_module
from headway.launcher.exchange import hf_check
from headway.launcher.exchange.export import export
from headway.launcher.exchange.import_hf import import_hf
from headway.launcher.run.initial_weights import with_initial_hash
from headway.launcher.run.run_dir import RunDir
from headway.launcher.run.weights import find_checkpoint, load_decoder
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec
from headway.model.huggingface import folder as hf
from headway.model.huggingface import llama
from headway.model.huggingface.folder import WeightsError, load_exported
from headway.parallel.config import CheckpointError

CORPUS = """
name: set
corpus: {type: text, paths: [text]}
out: set
tokenizer: {type: train_bpe, vocab_size: 300}
validation_fraction: 0.2
"""
TEXT = """
name: text
model: {width: 32, layers: 2, ffn_width: 48, init_std: 0.1, tied_embeddings: false}
attention: {type: gqa, heads: 4, kv_heads: 2, head_dim: 8}
data: {seq_len: 32, source: {type: mds, path: SET}}
optimizer: {lr: 3.0e-3}
train: {tokens: 768, global_batch: 8, micro_batch: 4, validation_tokens: 512}
checkpoint: {every_tokens: 512, keep: 2}
launch: {processes: 1, threads: 1}
"""
PAGE = (Path(__file__).parents[3] / "docs" / "export.md").read_text()
EXAMPLE = next(block for block in PAGE.split("```python\n")[1:] if "import headway.hf" in block).split("```")[0]
SHORT = ("train.tokens=1024", "train.micro_batch=8", "checkpoint.every_tokens=512")


@pytest.fixture(scope="module")
def runs(headway_once):
    """A folder with the runs `text` (gqa, real text), `wgqa` and `rgqa` (synthetic token ids)."""
    folder = headway_once.folder
    (folder / "text").mkdir()
    for i in range(30):
        (folder / "text" / f"{i}.txt").write_text(f"document {i} says that the sum of {i} and {i} is {2 * i}. " * 20)
    (folder / "corpus.yaml").write_text(CORPUS)
    (folder / "text.yaml").write_text(TEXT.replace("SET", str(folder / "set")))
    # The schedule changes between its two checkpoints, of steps 2 and 4.
    rgqa = ("attention.k_schedule=[{until_tokens: 768, top_k: 2}]", *SHORT)
    wgqa = ("attention.type=wgqa", "attention.start=random", "model.dropout=0.1", *SHORT)
    for arguments in (
        ("data", "build", "corpus.yaml"),
        ("train", "text.yaml", "run_dir=text.run"),
        ("train", "tiny.yaml", "run_dir=wgqa.run", *wgqa),
        ("train", "tiny.yaml", "run_dir=rgqa.run", *rgqa),
    ):
        done = headway_once.run(*arguments)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def llama_folder(runs, tmp_path_factory):
    """The run `text`, exported as a Llama."""
    out = tmp_path_factory.mktemp("llama") / "hf"
    assert export(runs / "text.run", out, to="hf") == 0
    return out


def decoder_of(run, step=None):
    run = RunDir(run)
    return load_decoder(Spec.model_validate_json(run.spec.read_text()), find_checkpoint(run, step))


# ------------------------------------------------------------------ export as a Llama


def test_transformers_computes_the_logits_of_the_run_and_reads_text_as_it_did(llama_folder, runs):
    library = transformers()
    theirs = library.LlamaForCausalLM.from_pretrained(llama_folder)
    ours, tokens = decoder_of(runs / "text.run"), some_tokens(300)
    assert theirs.dtype == torch.float32
    assert (logits(ours, tokens) - logits(theirs, tokens)).abs().max() < 1e-5 < logits(ours, tokens).std()
    reader = library.AutoTokenizer.from_pretrained(llama_folder)
    from headway.data.tokenizer import load

    text = "document 7 says that the sum of 7 and 7 is 14."
    assert reader(text)["input_ids"] == load(runs / "set" / "tokenizer.json").encode([text])[0]
    assert reader.eos_token_id == theirs.config.eos_token_id == 0


def test_the_command_prints_the_difference_of_the_logits(runs, tmp_path, capsys):
    assert main(["export", str(runs / "text.run"), str(tmp_path / "hf"), "--to", "hf", "--step", "2"]) == 0
    out = capsys.readouterr().out
    assert "gqa of step 2" in out and "on random tokens" in out and "on validation tokens" in out
    written = load_file(tmp_path / "hf" / "model.safetensors")
    older, newer = (decoder_of(runs / "text.run", step).state_dict()["head"] for step in (2, 3))
    assert torch.equal(written["lm_head.weight"], older) and not torch.equal(older, newer)


def test_shards_hold_the_same_tensors_as_one_file(llama_folder, runs, tmp_path):
    assert export(runs / "text.run", tmp_path / "hf", to="hf", max_shard_bytes=40_000) == 0
    shards = sorted((tmp_path / "hf").glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and all(path.stat().st_size < 45_000 for path in shards)
    sharded, whole = hf.TensorFiles(tmp_path / "hf"), hf.TensorFiles(llama_folder)
    assert set(sharded) == set(whole) and all(torch.equal(sharded[name], whole[name]) for name in whole)
    theirs = transformers().LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(theirs.lm_head.weight, whole["lm_head.weight"])


def test_weighted_gqa_is_folded(runs, tmp_path, capsys):
    assert export(runs / "wgqa.run", tmp_path / "hf", to="hf") == 0
    said = "without model.dropout 0.1, which acts in training and has no place in a Llama"
    out = capsys.readouterr().out
    assert "on random tokens" in out and said in out and said in (tmp_path / "hf" / "README.md").read_text()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert "lm_head.weight" not in load_file(tmp_path / "hf" / "model.safetensors") and config["tie_word_embeddings"]


def test_a_model_of_text_without_a_llama_form_reads_and_continues_text_as_the_run_does(runs, tmp_path, capsys):
    """Windows have no parameters, so the weights of the run fit. The example of docs/export.md runs on the folder."""
    library, run, out = transformers(), shutil.copytree(runs / "text.run", tmp_path / "run"), tmp_path / "OUT"
    spec = json.loads((run / "spec.json").read_text())
    spec["attention"]["windows"] = [8, None]
    (run / "spec.json").write_text(json.dumps(spec))
    assert main(["export", str(run), str(out), "--to", "hf"]) == 0
    said = capsys.readouterr().out
    assert "HeadwayForCausalLM, gqa" in said and "equal ids for" in said and "equal greedy continuation of" in said
    names: dict = {}
    with contextlib.chdir(tmp_path):
        exec(EXAMPLE, names)  # noqa: S102
    assert (
        names["text"].startswith("def ") and names["loss"].item() > 1 and (tmp_path / "COPY" / "config.json").exists()
    )
    reader, model = (
        library.AutoTokenizer.from_pretrained(out),
        library.AutoModelForCausalLM.from_pretrained(tmp_path / "COPY"),
    )
    inputs = reader("document 3 says", return_tensors="pt")
    text = reader.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)
    for folder in (run, out):
        assert main(["generate", str(folder), "document 3 says", "--tokens", "12", "--temperature", "0"]) == 0
        assert capsys.readouterr().out.rstrip("\n") == text.rstrip("\n")


def test_logits_that_differ_leave_nothing(runs, tmp_path, monkeypatch):
    """Gate and up projection are swapped. They have equal shapes, so only the logits differ."""
    swapped = {"mlp.w_gate": llama.BLOCK["mlp.w_up"], "mlp.w_up": llama.BLOCK["mlp.w_gate"]}
    monkeypatch.setattr(llama, "BLOCK", llama.BLOCK | swapped)
    with pytest.raises(HeadwayError, match=r"logits of random tokens differ by .*nothing was written"):
        export(runs / "text.run", tmp_path / "hf", to="hf")
    assert list(tmp_path.iterdir()) == []


def test_without_transformers_the_missing_comparison_is_reported(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hf_check.importlib.util, "find_spec", lambda name: None)
    assert export(runs / "text.run", tmp_path / "hf", to="hf") == 0
    assert "not compared: transformers is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("step", [[], ["--step", "3"]])
def test_a_checkpoint_of_another_run_is_not_exported(runs, tmp_path, capsys, step):
    """Its shapes fit and its hashes are right: only its identity tells that the weights are those of another run."""
    run = shutil.copytree(runs / "text.run", tmp_path / "run")
    mine, other = json.loads((run / "run_id.json").read_text()), "0" * 16
    (run / "run_id.json").write_text(json.dumps(other))
    for words in (
        ["export", str(run), str(tmp_path / "out"), "--to", "hf", *step],
        ["export", str(run), str(tmp_path / "out"), "--to", "safetensors", *step],
        ["generate", str(run), "document 3"],
    ):
        assert main(words) == 74
        said = capsys.readouterr().err
        assert f"written by another run ('{mine[:20]}" in said and f"this run is '{other}'" in said
        assert "move the folder to its run" in said
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_an_existing_target_is_refused(runs, tmp_path, monkeypatch):
    run = runs / "text.run"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name, why in (("full", "not empty"), ("file", "is a file"), ("link", "is a link")):
        with pytest.raises(SpecError, match=why):
            export(run, tmp_path / name, to="safetensors")
    (tmp_path / ".new.staging").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SpecError, match="is a link where a folder is to be written"):
        export(run, tmp_path / "new", to="safetensors")
    assert list((tmp_path / "elsewhere").iterdir()) == [] and (tmp_path / "full" / "mine").read_text() == "mine"
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match="free space, or use another folder"):
        export(run, tmp_path / "roomless", to="safetensors")
    assert not (tmp_path / "roomless").exists() and not (tmp_path / ".roomless.staging").exists()


def test_only_one_process_writes_and_leftovers_of_a_killed_one_are_removed(tmp_path):
    out = tmp_path / "out"
    with new_folder(out, option="OUT"):
        second = new_folder(out, option="OUT")
        with pytest.raises(SpecError, match="another process is writing"):
            second.__enter__()
    shutil.rmtree(out)
    (tmp_path / ".out.staging" / "left").mkdir(parents=True)
    with new_folder(out, option="OUT") as staging:
        (staging / "a").write_text("a")
        assert not out.exists()
    with pytest.raises(SpecError, match="not empty"):
        new_folder(out, option="OUT").__enter__()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "a"]


def test_errors_of_the_command_say_what_to_do(runs, tmp_path, capsys):
    for words, status, text in (
        (["export", "nowhere", "x", "--to", "hf"], 66, "name the folder of a run"),
        (["export", str(runs / "text.run"), "x", "--to", "hf", "--step", "7"], 66, "there: 2, 3"),
        (["export", str(runs / "text.run"), "x", "--to", "hf", "--max-shard-bytes", "nan"], 64, "--max-shard-bytes"),
        (["export", str(runs / "text.run"), "x", "--to", "gguf"], 64, "invalid choice"),
        (["import", "nowhere", "--to", "x"], 66, "no such folder"),
    ):
        with contextlib.chdir(tmp_path):
            assert main(words) == status
        assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ export with Headway's own config


@pytest.mark.parametrize("name", ["rgqa", "wgqa", "text"])
def test_any_mechanism_reads_back_bit_for_bit(runs, tmp_path, name):
    assert export(runs / f"{name}.run", tmp_path / "out", to="safetensors") == 0
    ours, back = decoder_of(runs / f"{name}.run"), load_exported(tmp_path / "out")
    tokens = some_tokens(len(ours.embedding))
    assert torch.equal(logits(ours, tokens), logits(back, tokens)) and not back.training
    if name == "rgqa":
        biases = [b for n, b in back.named_buffers() if n.endswith("router.bias")]
        assert biases and all(b.abs().max() > 0 for b in biases)
        assert export(runs / "rgqa.run", tmp_path / "older", to="safetensors", step=2) == 0
        k = [[layer.top_k for layer in load_exported(tmp_path / name).attention_layers()] for name in ("older", "out")]
        assert k == [[2, 2], [1, 1]]


def test_a_changed_folder_is_not_read(runs, tmp_path):
    assert export(runs / "rgqa.run", tmp_path / "good", to="safetensors") == 0

    def broken(change, match):
        bad = shutil.copytree(tmp_path / "good", tmp_path / "bad")
        change(bad)
        with pytest.raises(WeightsError, match=match):
            load_exported(bad)
        shutil.rmtree(bad)

    def config(**changes):
        def change(bad):
            written = json.loads((bad / "config.json").read_text())
            (bad / "config.json").write_text(json.dumps(written | changes))

        return change

    def flip(bad):
        data = bytearray((bad / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (bad / "model.safetensors").write_bytes(data)

    def cut(bad):
        os.truncate(bad / "model.safetensors", 100)

    def link(bad):
        (bad / "model.safetensors").unlink()
        (bad / "model.safetensors").symlink_to(tmp_path / "good" / "model.safetensors")

    model = json.loads((tmp_path / "good" / "config.json").read_text())["model"]
    broken(flip, "sha256 differs")
    broken(cut, "100 bytes, config.json says")
    broken(link, "is a link")
    broken(lambda bad: (bad / "model.safetensors").unlink(), "No such file")
    broken(config(surprise=1), "surprise: Extra inputs are not permitted")
    broken(config(version=2), "version")
    broken(config(files={"../config.json": {"bytes": 1, "sha256": "0" * 64}}), "files")
    broken(config(model=model | {"layers": 10_000}), "too few")
    broken(config(model=model | {"width": 1 << 40}), "too few")
    broken(config(model=model | {"ffn_width": 24}), r"w_(gate|up|down) has shape \[.*, config.json implies \[")


# ------------------------------------------------------------------ import


def test_export_and_import_are_inverse_bit_for_bit(llama_folder, runs, tmp_path, capsys):
    assert main(["import", str(llama_folder), "--to", str(tmp_path / "ours")]) == 0
    assert "largest difference from the logits of transformers" in capsys.readouterr().out
    run, back = decoder_of(runs / "text.run"), load_exported(tmp_path / "ours")
    tokens = some_tokens(300)
    assert torch.equal(logits(run, tokens), logits(back, tokens))
    assert main(["generate", str(tmp_path / "ours"), "document 3", "--tokens", "6", "--temperature", "0"]) == 0
    imported = capsys.readouterr().out
    assert main(["generate", str(runs / "text.run"), "document 3", "--tokens", "6", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == imported


# ------------------------------------------------------------------ training from imported weights


@pytest.fixture(scope="module")
def imported(runs, llama_folder):
    """Weights imported into the folder of the runs, with a spec that trains from them."""
    assert import_hf(llama_folder, runs / "ours") == 0
    rest = "".join(line + "\n" for line in TEXT.replace("SET", str(runs / "set")).splitlines() if "model:" not in line)
    rest = "".join(line + "\n" for line in rest.splitlines() if "attention:" not in line)
    (runs / "from.yaml").write_text(f"base: ours/model.yaml\n{rest}")
    return runs


def losses(run):
    return [r["loss"] for r in RunDir(run).read_metrics() if r["kind"] == "train"]


def test_training_starts_from_the_imported_weights_on_any_layout(imported, headway_once):
    """The first loss of a run is that of the imported weights. With random weights it would be log 300."""
    ones = headway_once.run("train", "from.yaml", "run_dir=one")
    cut = headway_once.run("train", "from.yaml", "run_dir=cut", "launch.processes=2", "parallel.tensor=2")
    staged = headway_once.run("train", "from.yaml", "run_dir=staged", "launch.processes=2", "parallel.pipeline=2")
    for done in (ones, cut, staged):
        assert done.returncode == 0, done.stderr
    decoder, spec = load_exported(imported / "ours"), load_spec(imported / "from.yaml").spec
    from headway.data.loader import Loader

    train = spec.train
    loader = Loader(
        spec.data, split="train", global_batch=train.global_batch, micro_batch=8, dp_rank=0, dp_size=1, start_step=0
    )
    batch = next(loader)
    loader.close()
    with torch.no_grad():
        outs = [decoder(m.tokens, m.labels, m.segments) for m in batch.micro]
    start = float(sum(o.loss_sum for o in outs) / sum(o.targets for o in outs))
    one = losses(imported / "one")
    assert one[0] == pytest.approx(start, rel=1e-5) and start < 5.5
    # Ranks sum in a different order.
    assert losses(imported / "cut") == pytest.approx(one, rel=1e-5)
    assert losses(imported / "staged") == pytest.approx(one, rel=1e-5)


def test_a_run_cannot_continue_with_other_initial_weights(imported, runs, tmp_path):
    spec = with_initial_hash(load_spec(imported / "from.yaml", ["init.sha256="]).spec)
    written = load_spec(imported / "from.yaml").spec
    assert spec.init.sha256 == written.init.sha256 == hf.sha256_of(imported / "ours" / "config.json")
    run = RunDir(tmp_path / "run")
    run.adopt(spec)
    moved = shutil.copytree(imported / "ours", tmp_path / "moved")
    run.adopt(with_initial_hash(load_spec(imported / "from.yaml", [f"init.weights={moved}"]).spec))
    assert export(runs / "text.run", tmp_path / "other", to="safetensors", step=2) == 0
    other = [f"init.weights={tmp_path / 'other'}", "init.sha256="]
    with pytest.raises(SpecError, match=r"(?s)a run of another spec.*init.sha256"):
        run.adopt(with_initial_hash(load_spec(imported / "from.yaml", other).spec))
    with pytest.raises(SpecError, match="holds other weights"):
        with_initial_hash(load_spec(imported / "from.yaml", other[:1]).spec)
    # A run that continues does not need the folder; one that starts does.
    gone = load_spec(imported / "from.yaml", ["init.weights=gone", f"run_dir={run.path}"]).spec
    with pytest.raises(WeightsError, match=r"init\.weights: gone: no such folder"):
        with_initial_hash(gone)
    (run.checkpoints / "step-0000000001").mkdir(parents=True)
    assert with_initial_hash(gone) == gone


def test_imported_weights_are_found_from_any_folder(llama_folder, runs, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert import_hf(llama_folder, Path("imp/x")) == 0
    rest = "".join(line + "\n" for line in TEXT.replace("SET", str(runs / "set")).splitlines() if "model:" not in line)
    rest = "".join(line + "\n" for line in rest.splitlines() if "attention:" not in line)
    (tmp_path / "here/from.yaml").write_text(f"base: imp/x/model.yaml\n{rest}")

    def weights(path):
        spec = with_initial_hash(load_spec(Path(path)).spec)
        return Path(str(spec.init.weights)).resolve()

    assert weights("from.yaml") == tmp_path / "here/imp/x"
    monkeypatch.chdir(tmp_path)
    assert weights("here/from.yaml") == tmp_path / "here/imp/x"
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir("/")
    assert weights(tmp_path / "there/from.yaml") == tmp_path / "there/imp/x"


def test_missing_weights_are_found_before_a_process_is_started(imported, headway_once):
    done = headway_once.run("train", "from.yaml", "run_dir=missing", "init.weights=gone")
    assert done.returncode == 65 and "error: init.weights: gone: no such folder" in done.stderr
    assert not (imported / "missing").exists()


def test_weights_that_do_not_fit_the_spec_are_refused(imported, tmp_path):
    def refused(*overrides):
        return with_initial_hash(load_spec(imported / "from.yaml", overrides).spec)

    with pytest.raises(SpecError, match=r"(?s)holds another model:.*model.norm_eps: 1e-05 there, 1e-06 in the spec"):
        refused("model.norm_eps=1e-6")
    with pytest.raises(SpecError, match=r"(?s)holds another model:.*attention.qk_norm"):
        refused("attention.qk_norm=true")
    with pytest.raises(SpecError, match=r"use init\.weights or init\.run too, or leave init out"):
        refused("init.weights=")
    with pytest.raises(WeightsError, match=r"init\.weights: gone: no such folder"):
        refused("init.weights=gone", "init.sha256=")
    set_folder = shutil.copytree(imported / "set", tmp_path / "set")
    manifest = json.loads((set_folder / "MANIFEST.json").read_text())
    assert manifest["tokenizer_sha256"] == hf.sha256_of(imported / "ours" / "tokenizer.json")
    tokenizer = json.loads((imported / "ours" / "tokenizer.json").read_text())
    changed = shutil.copytree(imported / "ours", tmp_path / "changed")
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    config = hf.read_exported(changed)
    hf.write_exported(changed, config, list(config.files))
    with pytest.raises(SpecError, match="made with another tokenizer"):
        refused(f"init.weights={changed}", "init.sha256=")


def test_a_folder_of_weights_is_not_a_run(imported):
    with pytest.raises(NoInputError, match="name the folder of a run"):
        export(imported / "ours", imported / "new", to="hf")
