"""Keys of `tracking`: no secret stands in them, traces are few, and a study groups its runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headway.launcher.base.errors import SpecError
from headway.launcher.hosts.commands import dry_run_text, full_environment
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.load import format_config, load_spec
from headway.launcher.spec.tracking import MOST_PROFILED, TrackingConfig

SPEC = """
name: tiny
model: {width: 32, layers: 2, ffn_width: 48}
attention: {type: gqa, heads: 4, kv_heads: 2, head_dim: 8}
data: {seq_len: 32, source: {type: synthetic, task: mqar, vocab_size: 32, pairs: 4, queries: 4}}
optimizer: {lr: 3.0e-3}
train: {tokens: 10240, global_batch: 8, micro_batch: 2, validation_tokens: 512}
"""
KEY = "4f1c9a07e3b85d26fa0913c7be48d56201a9e37c"


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


def refusal(spec: Path, *arguments: str) -> str:
    with pytest.raises(SpecError) as error:
        load_spec(spec, arguments)
    return str(error.value)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("tracking.mlflow.uri=https://me:hunter2@mlflow.example", "MLFLOW_TRACKING_TOKEN or MLFLOW_TRACKING_PASSWORD"),
        ("tracking.mlflow={uri: 'postgresql://me:hunter2@db/x'}", "has the form of a secret (a URL with a password)"),
        (f"tracking.wandb.project={KEY}", "set WANDB_API_KEY where you start the command"),
        (f"tracking.wandb.entity={KEY}", "tracking.wandb.entity: has the form of a secret (a long random word)"),
        (f"tracking.wandb.api_key={KEY}", "Set WANDB_API_KEY, or"),
        (f"wandb_api_key={KEY}", "keys of trackers stand in none"),
        (f"++tracking.wandb.key={KEY}", "keys of trackers stand in none"),
        ("tracking.mlflow.password=hunter2", "in the environment of the command"),
    ],
)
def test_a_secret_is_refused_with_advice_and_not_shown(spec: Path, argument: str, says: str) -> None:
    message = refusal(spec, argument)
    assert says in message
    assert "hunter2" not in message and KEY not in message


def test_a_secret_in_a_file_is_refused_with_its_place(spec: Path) -> None:
    spec.write_text(f"{SPEC}tracking:\n  mlflow:\n    uri: https://me:hunter2@host\n")
    message = refusal(spec)
    assert "tiny.yaml:10:" in message and "tracking.mlflow.uri: has the form" in message and "hunter2" not in message


@pytest.mark.parametrize("folder", ["mlruns", "./mlruns", "file:///tmp/mlruns", "/tmp/mlruns", "httpx"])
def test_a_folder_is_no_address_of_mlflow(spec: Path, folder: str) -> None:
    assert "use sqlite:///mlflow.db for a local file" in refusal(spec, f"tracking.mlflow.uri={folder}")


def test_a_word_that_is_no_secret_is_shown_as_before(spec: Path) -> None:
    assert "argument 'tracking.log_every_steps=none'" in refusal(spec, "tracking.log_every_steps=none")
    loaded = load_spec(spec, ["tracking.mlflow.uri=https://mlflow.example:8080", "tracking.wandb.project=my project"])
    assert loaded.spec.tracking.wandb is not None and loaded.spec.tracking.wandb.mode == "online"
    assert "# argument 'tracking.mlflow.uri=https://mlflow.example:8080'" in format_config(loaded)


@pytest.mark.parametrize(
    ("written", "steps"),
    [("[]", set()), ("[3]", {3}), ("[1, 10-12]", {1, 10, 11, 12}), ("['7-7', 7]", {7}), ("[1e1]", {10})],
)
def test_profiled_steps_are_numbers_and_ranges(spec: Path, written: str, steps: set[int]) -> None:
    assert load_spec(spec, [f"tracking.profile_steps={written}"]).spec.tracking.profiled == steps


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (f"[1-{MOST_PROFILED + 1}]", f"use at most {MOST_PROFILED}"),
        ("[1-999999999999]", "999,999,999,999 steps are too many"),
        (f"[1-{MOST_PROFILED}, 5]", f"{MOST_PROFILED + 1} steps are too many"),
        ("[0]", "0 is no step and no range of steps"),
        ("[9-3]", "'9-3' is no step and no range of steps"),
        ("[1..3]", "tracking.profile_steps[0]"),
        ("[true]", "tracking.profile_steps[0]"),
        ("5", "tracking.profile_steps"),
    ],
)
def test_too_many_or_wrong_steps_are_refused(spec: Path, written: str, says: str) -> None:
    assert says in refusal(spec, f"tracking.profile_steps={written}")


def test_ranks_get_variables_of_the_trackers_of_the_spec_alone(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = {"WANDB_API_KEY": KEY, "MLFLOW_TRACKING_PASSWORD": "hunter2", "WANDB_MODE": "disabled"}
    for name, value in secret.items():
        monkeypatch.setenv(name, value)
    plain = load_spec(spec).spec
    with_wandb = load_spec(spec, ["tracking.wandb.mode=offline"]).spec
    assert not secret.keys() & full_environment(plain, {}).keys()
    assert secret.keys() & full_environment(with_wandb, {}).keys() == {"WANDB_API_KEY"}
    text = dry_run_text(with_wandb, RunDir.of(with_wandb))
    assert 'WANDB_API_KEY="$WANDB_API_KEY"' in text and KEY not in text
    assert os.environ["WANDB_API_KEY"] not in with_wandb.model_dump_json()


def test_a_group_is_given_to_trackers_without_one() -> None:
    assert TrackingConfig().grouped("study") == {}
    both = TrackingConfig.model_validate({"wandb": {"group": "mine"}, "mlflow": {"uri": "sqlite:///x.db"}})
    assert both.grouped("study") == {"tracking.mlflow.group": "study"}
