"""Values of variables with names of secrets occur in no spec, message or dry run."""

from __future__ import annotations

import json
import random
import string

import pytest

from headway.launcher.base.errors import SpecError, format_error
from headway.launcher.hosts.commands import dry_run_text, forwarded
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.load import format_config, load_spec

VALUE = "sesame-7f3a"
SECRETS = [
    "HF_TOKEN",
    "WANDB_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "DB_PASSWORD",
    "PGPASS",
    "my_key",
    "GOOGLE_CREDENTIALS",
    "GH_PAT",
    "SESSION_COOKIE",
    "REGISTRY_AUTH",
    "SENTRY_DSN",
]
HARMLESS = ["TOKENIZERS_PARALLELISM", "NCCL_IB_PKEY", "NCCL_DEBUG", "HF_HOME", "DATA_PATH", "NCCL_PATTERN", "AUTHOR"]

CHANCE = random.Random(3)


def drawn(letters: str, count: int) -> str:
    """Random characters: secrets of no one, so that this file holds none."""
    return "".join(CHANCE.choice(letters) for _ in range(count))


HEX, WORD = "0123456789abcdef", string.ascii_letters + string.digits
SECRET_VALUES = [
    "postgres://trainer:sesame@db.example/runs",
    "https://user:p%40ss@example.org/x",
    "redis://:sesame@cache:6379",
    "Server=db;User Id=me;Password=sesame;",
    "https://example.org/x?access_token=sesame1",
    "Bearer sesame-7f3a-41",
    "ghp_" + drawn(WORD, 36),
    "github_pat_" + drawn(WORD, 22) + "_" + drawn(WORD, 20),
    "hf_" + drawn(string.ascii_letters, 34),
    "AKIA" + drawn(string.ascii_uppercase, 16),
    "sk-" + drawn(WORD, 40),
    "sk-proj-" + drawn(WORD, 40),
    "glpat-" + drawn(WORD, 20),
    "xoxb-" + drawn("0123456789", 12),
    "eyJhbGciOi." + "eyJzdWIi." + drawn(WORD, 20),
    "-----BEGIN PRIVATE KEY-----",
    *(drawn(HEX, 40) for _ in range(20)),
    *(drawn(WORD, 40) for _ in range(20)),
    *(drawn(WORD + "+/", 64) + "==" for _ in range(20)),
    "prefix:" + drawn(WORD, 40) + ",more",
]
HARMLESS_VALUES = [
    "INFO",
    "1",
    "expandable_segments:True,garbage_collection_threshold:0.8,max_split_size_mb:512",
    "mlx5_0:1,mlx5_1:1,mlx5_2:1,mlx5_3:1",
    "GPU-8f2d1c4e-93aa-4c1b-8a76-2f1e0d9c8b7a,GPU-0f2d1c4e-93aa-4c1b-8a76-2f1e0d9c8b7b",
    "/opt/software/easybuild/2024a/CUDA/12.4.1-GCCcore-13.3.0/targets/x86_64-linux/lib",
    "https://proxy.example:3128",
    "http://user@proxy.example:3128",
    "/scratch/project_465000123/user/runs/2026-11-29-experiment-17",
    "LowLatencyThreadPoolExecutorWorkers2",
    "internationalization20240115",
    "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "11111111112222222222333333333344444444445555",
    "::1,fe80::1ff:fe23:4567:890a",
    "tokenizer=fast;passive=1",
]


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("way", ["file", "argument", "mapping", "section"])
def test_a_secret_value_in_a_spec_is_refused_and_not_printed(name, way, headway):
    arguments = {
        "file": [],
        "argument": [f"launch.env.{name}={VALUE}"],
        "mapping": [f"launch.env={{{name}: {VALUE}}}"],
        "section": [f"launch={{processes: 1, env: {{{name}: {VALUE}}}}}"],
    }[way]
    if way == "file":
        text = headway.spec.read_text().replace("launch: {", f"launch: {{env: {{{name}: {VALUE}}}, ")
        headway.spec.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_spec(headway.spec, arguments)
    said = format_error(caught.value)
    assert name in said and VALUE not in said and f"{name}: null" in said and "another name" in said


@pytest.mark.parametrize("value", ["12345678901", "[sesame]", "true", "{sesame: 1}", "1.5e300", "'sesame"])
def test_a_value_of_the_wrong_type_is_not_printed(value, headway):
    with pytest.raises(SpecError) as caught:
        load_spec(headway.spec, [f"launch.env={{HF_TOKEN: {value}}}"])
    assert "12345678901" not in str(caught.value) and "sesame" not in str(caught.value)
    assert "e300" not in str(caught.value)


@pytest.mark.parametrize("name", HARMLESS)
def test_variables_with_similar_names_may_have_values(name, headway):
    assert load_spec(headway.spec, [f"launch.env={{{name}: '1'}}"]).spec.launch.env == {name: "1"}


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_from_the_environment_reaches_the_ranks_and_is_not_printed(name, headway, monkeypatch):
    monkeypatch.setenv(name, VALUE)
    loaded = load_spec(headway.spec, [f"launch.env={{{name}: null}}", "launch.processes=2"])
    assert forwarded(loaded.spec, {name: VALUE}) == {name: VALUE}
    shown = dry_run_text(loaded.spec, RunDir.of(loaded.spec)) + format_config(loaded) + loaded.spec.model_dump_json()
    assert name in shown and VALUE not in shown
    with pytest.raises(SpecError) as caught:
        forwarded(loaded.spec, {"OTHER": VALUE})
    assert VALUE not in str(caught.value)


# ---------------------------------------------------------------- by value


@pytest.mark.parametrize("value", SECRET_VALUES, ids=range(len(SECRET_VALUES)))
def test_a_value_with_the_form_of_a_secret_is_refused_and_not_printed(value, headway):
    with pytest.raises(SpecError) as caught:
        load_spec(headway.spec, [f"launch.env={{MY_SETTING: {json.dumps(value)}}}"])
    said = format_error(caught.value)
    assert "MY_SETTING" in said and "form of a secret" in said and "MY_SETTING: null" in said, said
    assert value not in said and "sesame" not in said


@pytest.mark.parametrize("value", HARMLESS_VALUES)
def test_settings_paths_and_devices_are_no_secrets(value, headway):
    env = load_spec(headway.spec, [f"launch.env={{MY_SETTING: {json.dumps(value)}}}"]).spec.launch.env
    assert env == {"MY_SETTING": value}


@pytest.mark.parametrize("argument", ["launch.env=sesame", "launch.env=[sesame]", "launch.env={A_B: [sesame]}"])
def test_a_wrong_type_is_refused_without_its_value(argument, headway):
    with pytest.raises(SpecError) as caught:
        load_spec(headway.spec, [argument])
    assert "launch.env" in str(caught.value) and "sesame" not in str(caught.value)


# ---------------------------------------------------------------- names alone in run folders


def test_a_run_folder_holds_names_of_variables_and_no_value(headway, monkeypatch):
    monkeypatch.setenv("DB_URL", "postgres://trainer:opensesame@db/runs")
    words = ("launch.env={DB_URL: null, NCCL_DEBUG: WHISPERED}", "launch.processes=2", "train.tokens=2560")
    done = headway.train(*words, "run_dir=run")
    assert done.returncode == 0, done.stderr
    said = [done.stdout, done.stderr]
    files = [path for path in (headway.folder / "run").rglob("*") if path.is_file()]
    texts = [path.read_bytes().decode("latin-1") for path in files] + said
    assert len(files) > 8 and not any("opensesame" in text or "WHISPERED" in text for text in texts)
    stored = json.loads((headway.folder / "run" / "spec.json").read_text())
    assert stored["launch"]["env"] == {"DB_URL": None, "NCCL_DEBUG": None}
    assert headway.train(*words, "run_dir=run").returncode == 0  # the stored spec is that of the same run


def test_the_ranks_get_the_values(headway):
    spec = load_spec(headway.spec, ["launch.env={DB_URL: null, NCCL_DEBUG: INFO}"]).spec
    assert forwarded(spec, {"DB_URL": "x"}) == {"DB_URL": "x", "NCCL_DEBUG": "INFO"}
