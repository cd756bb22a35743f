"""`export --push` and `import hf://`: real requests of huggingface_hub, to a stand-in of the hub on this host."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import READ_ONLY, TOKEN, Repo, StandIn, stand_in
from llamas import logits, some_tokens, transformers
from untrained_runs import decoder_of, untrained_run

from headway.launcher.cli.main import main
from headway.model.huggingface.folder import load_exported

RGQA = {"type": "rgqa", "heads": 6, "kv_heads": 2, "head_dim": 6, "top_k": 2}
NAME = "someone/model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in that the library finds by HF_ENDPOINT, and a token in the environment."""
    transformers()  # which makes the library offline for this process
    library: Any = importlib.import_module("huggingface_hub")
    constants: Any = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with stand_in() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        # Values that the library computes when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        file_download: Any = importlib.import_module("huggingface_hub.file_download")
        address = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        importlib.import_module("huggingface_hub.utils").reset_sessions()
        assert library.get_token() == TOKEN
        yield found
    importlib.import_module("huggingface_hub.utils").reset_sessions()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_run(tmp_path_factory.mktemp("hub") / "run", attention=RGQA)


def push(run: Path, out: Path, *more: str) -> int:
    return main(["export", str(run), str(out), "--to", "hf", "--push", NAME, *more])


def test_an_export_goes_to_a_private_repository_and_comes_back(
    hub: StandIn, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(run, tmp_path / "out", "--max-shard-bytes", "8000", "--json") == 0
    assert json.loads(capsys.readouterr().out)["url"] == f"{hub.url}/{NAME}"
    repo = hub.repos[NAME]
    assert repo.private and repo.files == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert repo.commits == ["Export of run untrained, attention rgqa, step 1, 384 tokens"]
    assert main(["import", f"hf://{NAME}", "--to", str(tmp_path / "back")]) == 0
    expected = logits(decoder_of(run), some_tokens(40))
    assert torch.equal(logits(load_exported(tmp_path / "back"), some_tokens(40)), expected)
    source = json.loads((tmp_path / "back" / "config.json").read_text())["source"]
    assert source == f"HeadwayForCausalLM of hf://{NAME}@{repo.sha}"
    # A second export replaces the shards of the first.
    assert push(run, tmp_path / "whole") == 0
    assert "uploaded to" in capsys.readouterr().out
    assert repo.files == {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()} and len(repo.commits) == 2
    words = ["import", f"hf://{NAME}@main", "--to", str(tmp_path / "again")]
    assert main(words) == 0 and torch.equal(logits(load_exported(tmp_path / "again"), some_tokens(40)), expected)
    names = {p.name for p in tmp_path.iterdir()} - {"cache"}
    assert names == {"out", "back", "whole", "again"}


def test_headways_own_format_comes_back_too(hub: StandIn, run: Path, tmp_path: Path) -> None:
    words = ["export", str(run), str(tmp_path / "out"), "--to", "safetensors", "--push", NAME, "--public"]
    assert main(words) == 0 and not hub.repos[NAME].private
    hub.repos[NAME].files |= {"code.py": b"raise SystemExit", "weights.bin": b"", "deep/model.safetensors": b""}
    assert main(["import", f"hf://{NAME}", "--to", str(tmp_path / "back")]) == 0
    expected = logits(decoder_of(run), some_tokens(40))
    assert torch.equal(logits(load_exported(tmp_path / "back"), some_tokens(40)), expected)
    fetched = [request for request in hub.requests if "/resolve/" in request]
    assert fetched and not [request for request in fetched if re.search(r"\.py|\.bin|deep", request)]


def test_a_real_process_reads_the_token_and_the_endpoint_from_its_environment(
    hub: StandIn, run: Path, tmp_path: Path, headway_alone: Any
) -> None:
    """The comparison with transformers, which is offline, comes before the upload."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    words = ["export", str(run), "out", "--to", "hf", "--push", NAME]
    done = headway_alone.run(*words, env=env)
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {hub.url}/{NAME} (private)" in done.stdout and "on random tokens" in done.stdout
    assert set(hub.repos[NAME].files) == {p.name for p in (headway_alone.folder / "out").iterdir()}
    written = [p for p in headway_alone.folder.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert written == [] and TOKEN not in done.stdout + done.stderr


def refused(words: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(words) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in err and TOKEN not in out + err
    return err


def test_errors_of_an_upload_say_what_to_do(
    hub: StandIn, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(status: int, *more: str, name: str = NAME) -> str:
        words = ["export", str(run), str(tmp_path / "out"), "--to", "safetensors", "--push", name, *more]
        said = refused(words, status, capsys)
        assert not (tmp_path / "out").exists()
        return said

    assert "no name of a repository; use OWNER/NAME" in says(64, name="model")
    assert "no name of a repository; use OWNER/NAME" in says(64, name="a/b/c")
    assert "no repository of a model" in says(64, name="datasets/a/b")
    assert "uploads go to the main branch; use a/b" in says(64, name="a/b@main")
    assert hub.requests == []
    hub.repos[NAME] = Repo(private=False)
    assert "exists and is public" in (said := says(74)) and "add --public" in said
    hub.repos[NAME] = Repo(private=True)
    assert "exists and is private; leave out --public" in says(74, "--public")
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    assert "does not accept the token (status 401); log in with `hf auth login`" in says(74)
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token of the hub; log in with `hf auth login`, or set HF_TOKEN" in says(74)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuse["/api/whoami-v2"] = 503
    said = says(74)
    assert "answers with status 503" in said and "refused ***" in said and "try again later" in said
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    said = says(74)
    assert "http://127.0.0.1:1 cannot be reached" in said and "check the network" in said
    words = ["export", str(run), str(tmp_path / "out"), "--to", "safetensors", "--public"]
    assert "--public: has an effect with --push" in refused(words, 64, capsys)


def test_an_upload_that_fails_leaves_the_complete_folder(
    hub: StandIn, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    words = ["export", str(run), str(tmp_path / "out"), "--to", "safetensors", "--push", NAME]
    said = refused(words, 74, capsys)
    assert "the token may not do this (status 403); use one with write access" in said
    assert f"`hf upload {NAME} {tmp_path}/out --repo-type model --private` uploads it" in said
    assert load_exported(tmp_path / "out") and hub.repos == {}


def test_errors_of_a_download_say_what_to_do(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(status: int, name: str) -> str:
        said = refused(["import", name, "--to", str(tmp_path / "out")], status, capsys)
        assert {p.name for p in tmp_path.iterdir()} <= {"cache"}
        return said

    hub.repos["a/empty"] = Repo(private=False, files={"pytorch_model.bin": b"", "config.json": b"{}"})
    assert "is no name of a repository" in says(64, "hf://model")
    assert "no repository of a model" in says(64, "hf://datasets/a/b")
    assert "has no such repository, or it is private" in says(66, "hf://a/absent")
    assert "has no such revision" in says(66, "hf://a/empty@v9")
    assert "has no safetensors" in says(65, "hf://a/empty")
    hub.repos["a/code"] = Repo(private=False, files={"model.safetensors": b"x", "config.json": b"{}"})
    assert "config.json" in says(65, "hf://a/code")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "cannot be reached" in says(74, "hf://a/empty")
    monkeypatch.setattr(importlib.import_module("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    importlib.import_module("huggingface_hub.utils").reset_sessions()
    assert "HF_HUB_OFFLINE is set" in says(74, "hf://a/empty")
