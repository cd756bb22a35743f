"""A run says which of its validation sets another of its datasets trains on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headway.data import overlap
from headway.data.config import MixSource
from headway.data.overlap import Overlap
from headway.launcher.run.resolve import _overlaps


def info(name: str) -> Any:
    return SimpleNamespace(path=Path(name), fingerprint=f"fingerprint of {name}")


def test_an_alert_names_the_sets_that_other_datasets_train_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compared: list[tuple[str, str]] = []

    def shared(validation: Path, train: Path) -> Overlap:
        compared.append((str(validation), str(train)))
        return Overlap(compared=40, shared=3 if (str(validation), str(train)) == ("news", "b") else 0)

    monkeypatch.setattr(overlap, "overlap", shared)
    parts = [{"path": "a", "weight": 1}, {"path": "b", "weight": 1}, {"path": "c", "weight": 1, "remote": "/far/c"}]
    source = MixSource.model_validate_json(json.dumps({"type": "mix", "sources": parts}))
    datasets = [info("a"), info("b"), info("c")]
    sets = {"a": datasets[0], "b": datasets[1], "c": datasets[2], "news": info("news")}
    assert _overlaps(source, sets, datasets) == [{"set": "news", "dataset": "b", "compared": 40, "shared": 3}]
    assert compared == [("a", "b"), ("b", "a"), ("news", "a"), ("news", "b")]
    said = capsys.readouterr().out
    assert said.startswith("VALIDATION IS TRAINED ON: 3 of 40 compared validation documents of news (news)")
