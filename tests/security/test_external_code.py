"""No spec, run folder or folder of weights leads to the import of code that no installed package registers."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from headway.launcher.base.errors import SpecError
from headway.launcher.cli.main import main
from headway.launcher.run.run_dir import RunDir
from headway.launcher.run.stored_spec import stored_spec
from headway.launcher.spec.load import load_spec
from headway.model.attention import external
from headway.model.huggingface import folder as hf

NAMES = [
    "evil",
    "evil:Config",
    "evil.Config",
    "./evil",
    "evil.py",
    "os:system",
    "headway.model.attention.gqa:GqaConfig",
    "headway_example_mechanism",
    "__main__",
    "",
    " evil",
    "evil\n[headway.mechanisms]",
]
SPEC = {
    "name": "tiny",
    "model": {"width": 32, "layers": 2, "ffn_width": 48, "vocab_size": 32},
    "data": {
        "seq_len": 32,
        "source": {"type": "synthetic", "task": "mqar", "vocab_size": 32, "pairs": 4, "queries": 4},
    },
    "optimizer": {"lr": 3e-3},
    "train": {"tokens": 10240, "global_batch": 8, "micro_batch": 2},
}
SHAPE = {"heads": 4, "kv_heads": 2, "head_dim": 8}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder with code and the metadata of a package that registers it, which is the working folder."""
    external.registered.cache_clear()
    folder = tmp_path / "here"
    info = folder / "evil-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{external.GROUP}]\nevil = evil:Config\n")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    monkeypatch.chdir(folder)
    yield folder
    assert not (tmp_path / "canary").exists() and "evil" not in sys.modules, "code was imported"
    external.registered.cache_clear()


def test_the_canary_would_sing(tmp_path, install):
    canary = tmp_path / "bird"
    install("evil", f"open({str(canary)!r}, 'w')", package="registered-evil")
    with pytest.raises(SpecError):
        spec_of(tmp_path, "evil")
    assert canary.exists()


def spec_of(folder: Path, name: str):
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(SPEC | {"attention": {"type": name, **SHAPE}}))
    return load_spec(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_spec_imports_nothing_that_is_not_registered(name, here):
    with pytest.raises(SpecError):
        spec_of(here, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_folder_imports_nothing_that_is_not_registered(name, here, capsys):
    run = RunDir(here)
    run.spec.write_text(json.dumps(SPEC | {"attention": {"type": name, **SHAPE}}))
    with pytest.raises(SpecError):
        stored_spec(run)
    for words in (["generate", str(here), "1 2"], ["export", str(here), "out", "--to", "safetensors"]):
        assert main(words) == 64
        assert "attention" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_exported_weights_import_nothing_that_is_not_registered(name, here):
    config = {
        "source": "x",
        "model": SPEC["model"],
        "attention": {"type": name, **SHAPE},
        "vocab_size": 32,
        "seq_len": 32,
        "tokens": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "files": {},
    }
    (here / hf.CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValidationError):
        hf.ExportedConfig.model_validate(config)
    with pytest.raises(hf.WeightsError, match=r"config\.json"):
        hf.load_exported(here)


@pytest.mark.parametrize("value", [["evil"], {"evil": 1}, 3, None, True])
def test_a_type_that_is_no_text_is_refused(value, here):
    with pytest.raises(SpecError):
        spec_of(here, value)


def test_a_command_started_beside_such_files_imports_nothing(here, headway_alone):
    # As a shell starts it: the working folder is not on Python's path, so its metadata registers nothing.
    headway_alone.folder = here
    (here / "tiny.yaml").write_text(yaml.safe_dump(SPEC | {"attention": {"type": "evil", **SHAPE}}))
    done = headway_alone.run("train", "tiny.yaml")
    assert done.returncode == 64 and "'evil' is not a known type" in done.stderr
