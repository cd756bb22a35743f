"""Values of variables with names of secrets occur in no spec, message or dry run."""

from __future__ import annotations

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
]
HARMLESS = ["TOKENIZERS_PARALLELISM", "NCCL_IB_PKEY", "NCCL_DEBUG", "HF_HOME"]


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
