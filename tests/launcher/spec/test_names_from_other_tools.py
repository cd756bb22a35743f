"""Keys and values that other tools have: refused, with the key of Headway and its unit; never accepted."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from headway.launcher.base.errors import SpecError
from headway.launcher.spec.aliases import ALIASES, alias, fold
from headway.launcher.spec.fields import paths, root_shape
from headway.launcher.spec.foreign_values import KEYS_OF_VALUES, value_hint
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec
from headway.launcher.study.config import StudyConfig
from headway.model.attention.registry import MECHANISMS, OTHER_TYPES

SPEC = """
model: {width: 32, layers: 1, ffn_width: 64}
attention: {type: gqa, heads: 4, kv_heads: 2, head_dim: 8}
data:
  seq_len: 32
  source: {type: synthetic, task: mqar, vocab_size: 32, pairs: 4, queries: 4}
optimizer: {lr: 3.0e-3}
train: {tokens: 2560, global_batch: 8, micro_batch: 8}
"""
KEYS = set(paths(root_shape(Spec), {}))
SECTIONS = sorted({key.split(".")[0] for key in KEYS if "." in key})
DOTTED = re.compile(rf"\b(?:{'|'.join(SECTIONS)})\.[a-z_]+(?:\.[a-z_]+)*(?!\w)")


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(SPEC)
    return Path("x.yaml")


def refusal(*overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load_spec("x.yaml", overrides, no_auto=None)
    return str(caught.value)


def keys_in(text: str) -> list[str]:
    return [match[0] for match in DOTTED.finditer(text) if match[0] not in ("tokenizer.json", "metrics.jsonl")]


@pytest.mark.parametrize("entry", ALIASES, ids=lambda entry: entry.names[0])
def test_every_entry_leads_to_keys_that_exist(entry) -> None:
    assert {*entry.keys, *entry.times, *keys_in(entry.hint)} <= KEYS
    assert entry.hint or len(entry.keys) == 1, "a name without a hint is another name of one key"


def test_every_value_leads_to_keys_that_exist() -> None:
    assert {"attention.type", "parallel.precision"} <= KEYS_OF_VALUES.keys() <= KEYS
    for by_hint in KEYS_OF_VALUES.values():
        for hint in by_hint:
            assert set(keys_in(hint)) <= KEYS, hint


def test_no_name_stands_for_two_things() -> None:
    names = Counter(fold(name) for entry in ALIASES for name in entry.names)
    assert [name for name, count in names.items() if count > 1] == []


def test_no_name_hides_a_key_of_headway() -> None:
    """A key that is written in the wrong section is still led to its own section."""
    last = {fold(key.rpartition(".")[2]): key for key in KEYS if not key.startswith(("attention.", "data.source."))}
    for name, key in last.items():
        entry = alias(key.rpartition(".")[2])
        assert entry is None or any(fold(k.rpartition(".")[2]) == name for k in entry.keys), (key, entry)


def test_no_mechanism_that_headway_has_is_called_foreign() -> None:
    assert [name for name in MECHANISMS if value_hint("attention.type", name)] == []
    for hint in KEYS_OF_VALUES["attention.type"]:
        named = set(re.findall(r"\b(?:mha|mqa|gqa|sqa|rgqa|gqe|moa|moh|wgqa|switchhead)\b", hint))
        assert named <= MECHANISMS.keys()


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("learning_rate=1e-3", "learning_rate: unknown key. Did you mean optimizer.lr?"),
        ("max_lr=1e-3", "Did you mean optimizer.lr?"),
        ("model.n_layer=3", "model.n_layer: unknown key. Did you mean model.layers?"),
        ("model.num_attention_heads=3", "Did you mean attention.heads?"),
        ("n_query_groups=2", "Did you mean attention.kv_heads?"),
        ("HiddenSize=2", "Did you mean model.width?"),
        ("max-steps=100", "Use train.tokens: it counts tokens, steps x train.global_batch x data.seq_len. "
         "Here 100 x 8 x 32: train.tokens=25600."),
        ("train.max_iters=1e3", "Here 1000 x 8 x 32: train.tokens=256000."),
        ("eval_interval=10", "Here 10 x 8 x 32: train.validate_every_tokens=2560."),
        ("save_steps=5", "Here 5 x 8 x 32: checkpoint.every_tokens=1280."),
        ("warmup_ratio=0.1", "the ratio x train.tokens. Here 0.1 x 2560: schedule.warmup_tokens=256."),
        ("epochs=3", "There is no key for epochs. Use train.tokens: epochs x training tokens of the dataset"),
        ("gradient_accumulation_steps=4", "train.global_batch / (train.micro_batch x data-parallel ranks)"),
        ("resid_pdrop=0.1", "Use model.dropout, and model.dropout_places for where it acts"),
        ("attention.dropout=0.1", "Use model.dropout"),
        ("attention_dropout=0.1", "There is no dropout of attention weights"),
        ("model.attn_pdrop=0.1", "There is no dropout of attention weights"),
        ("model.drop_path=0.1", "There is no dropout of whole layers"),
        ("wandb_project=x", "Did you mean tracking.wandb.project?"),
        ("report_to=wandb", "in TensorBoard (tracking.tensorboard), W&B (tracking.wandb) and MLflow (tracking.mlflow)"),
        ("mlflow_tracking_uri=x", "Did you mean tracking.mlflow.uri?"),
        ("bf16=true", "Use parallel.precision: bf16"),
        ("resume_from_checkpoint=true", "The same command again continues the run"),
        ("tp=2", "Did you mean parallel.tensor?"),
        ("dp=2", "launch.processes"),
    ],
)  # fmt: skip
def test_a_name_from_elsewhere_is_refused_with_the_key_and_its_unit(spec: Path, written: str, says: str) -> None:
    message = refusal(written)
    assert says in message
    assert "Legal keys here" not in message and "\n" not in message


def test_a_name_in_the_file_is_refused_with_its_line(spec: Path) -> None:
    spec.write_text(SPEC.replace("{lr: 3.0e-3}", "{learning_rate: 3.0e-3}"))
    assert refusal().startswith("x.yaml:7:13: optimizer.learning_rate: unknown key. Did you mean optimizer.lr?")


def test_a_number_is_only_computed_where_its_unit_is_certain(spec: Path) -> None:
    assert "Here" not in refusal("save_steps=0.1")  # a share of the run in Hugging Face
    assert "Here" not in refusal("save_steps=epoch")
    assert "Here" not in refusal("warmup_ratio=3")


def test_a_section_of_another_tool_is_answered_key_by_key(spec: Path) -> None:
    message = refusal("training={steps: 100, seq_len: 64, local_batch_size: 2, colour: red}")
    assert message.startswith("argument 'training={steps: 100, ")
    assert "training.steps: Use train.tokens" in message and "train.tokens=25600." in message
    assert "training.seq_len: did you mean data.seq_len?" in message
    assert "training.local_batch_size: Did you mean train.micro_batch?" in message
    assert "colour: " not in message.partition("unknown key")[2]


def test_a_misspelt_section_of_headway_is_led_to_its_own_name(spec: Path) -> None:
    assert "trian: unknown key. Did you mean train? Legal keys here: name, " in refusal("trian.tokens=3")
    assert "training.seq_len: did you mean data.seq_len?" in refusal("training.seq_len=3")


def test_a_key_of_another_mechanism_is_still_said_to_be_its_own(spec: Path) -> None:
    assert "is no key of attention.type gqa, only of: dynamic_gqa." in refusal("attention.ema_decay=0.9")


def test_files_of_other_kinds_are_not_told_about_keys_of_a_run(spec: Path) -> None:
    Path("s.yaml").write_text("study: s\nbase: x.yaml\nseeds: [1]\nvariants: {a: {}}\nmax_steps: 3\n")
    with pytest.raises(SpecError, match=r"max_steps: unknown key\. Legal keys here: study, base"):
        load_spec("s.yaml", root=StudyConfig)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("latent", "Use mla."),
        ("tpa", "no such factors of keys and values. Closest: mla"),
        ("nsa", "no such choice of keys. Closest: block_sparse"),
        ("MoBA", "Use block_sparse."),
        ("mamba2", "state-space and recurrent layers, Headway has the gated delta rule alone. Closest: gated_delta"),
        ("gated_deltanet", "Use gated_delta."),
        ("linear_attention", "the gated delta rule alone"),
        ("qwen3_next", "Use mixed, with gated_delta in most layers"),
        ("sliding_window", "Use gqa with attention.windows: 128"),
        ("swa", "Use gqa with attention.windows: 128"),
        ("diff", "no difference of two softmax maps"),
        ("flash", "a kernel, not a mechanism: the choice is speed.attention (flash)"),
        ("sdpa", "a kernel, not a mechanism"),
        ("full", "Use mha."),
        ("ring", "use parallel.context"),
    ],
)
def test_a_known_mechanism_that_headway_lacks_has_an_honest_answer(spec: Path, name: str, says: str) -> None:
    message = refusal(f"attention.type={name}")
    assert says in message and "Did you mean" not in message
    assert f"Legal: {', '.join([*MECHANISMS, *OTHER_TYPES])};" in message


def test_a_misspelt_mechanism_is_still_led_to_the_nearest(spec: Path) -> None:
    assert "Did you mean rgqa?" in refusal("attention.type=rqga")


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("parallel.precision=bfloat16", "Write bf16. Legal: fp32, bf16"),
        ("parallel.precision=fp16", "no precision but fp32 and bf16"),
        ("speed.compile=true", "Write elementwise"),
        ("parallel.recompute=full", "Write block."),
        ("schedule.type=linear_warmup", "Write linear."),
        ("data.source.type=huggingface", "headway data build CORPUS.yaml"),
    ],
)
def test_values_of_other_tools_are_refused_with_what_to_write(spec: Path, written: str, says: str) -> None:
    assert says in refusal(written)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["optimizer.lr", "1e-3"], "Write optimizer.lr=1e-3"),
        (["seed", "3"], "Write seed=3"),
        (["optimizer.lr=", "1e-3"], "Write optimizer.lr=1e-3, without a space"),
        (["optimizer.lr", "=", "1e-3"], "Write optimizer.lr=1e-3, without a space"),
        (["optimizer.lr", "=1e-3"], "Write optimizer.lr=1e-3, without a space"),
        (["optimizer.lr:1e-3"], "Write optimizer.lr=1e-3"),
        (["--optimizer.lr=1e-3"], "Write optimizer.lr=1e-3"),
        (["~optimizer.eps"], "A key cannot be deleted; write optimizer.eps= for null"),
        (["optimizer.betas=0.9,0.98"], "Write '[0.9,0.98]'"),
        (["attention.windows=8,16"], "Write '[8,16]'"),
        (["optimizer.lr=1e-3,3e-4"], "to compare several, write a study"),
        (["attention.type=gqa,mqa"], "to compare several, write a study"),
        (["seed=1,2,3"], "to compare several, write a study"),
        (["train.tokens=1,000"], "Write 1000"),
    ],
)
def test_other_ways_to_write_a_value_are_refused_with_the_right_one(spec: Path, words: list[str], says: str) -> None:
    message = refusal(*words)
    assert says in message and "\n" not in message


def test_a_list_in_a_file_is_advised_without_quotes_for_a_shell(spec: Path) -> None:
    spec.write_text(SPEC + "optimizer.betas: 0.9,0.98\n")
    assert refusal().endswith("Write [0.9,0.98]")


@pytest.mark.parametrize("words", [["launch.env.TOKEN", "hunter2"], ["launch.env.TOKEN=", "hunter2"]])
def test_a_variable_for_the_ranks_is_never_shown(spec: Path, words: list[str]) -> None:
    assert "hunter2" not in refusal(*words)
