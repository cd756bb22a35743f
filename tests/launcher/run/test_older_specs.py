"""Specs of published records keep their identity: new keys have the values that earlier versions had unnamed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headway.launcher.run.run_dir import difference, identity, spec_hash
from headway.launcher.spec.spec import Spec

RESULTS = Path(__file__).resolve().parents[3] / "docs" / "results"
RECORDS = sorted((RESULTS / "answer").rglob("seed-*.json"))


@pytest.mark.parametrize("record", RECORDS[:: max(1, len(RECORDS) // 8)], ids=lambda path: path.parent.name)
def test_a_published_run_is_the_same_run_today(record: Path) -> None:
    written = json.loads(record.read_text())["spec"]
    today = Spec.model_validate_json(json.dumps(written)).model_dump(mode="json")
    # A key that is missing here belongs into ADDED_KEYS, with the value that earlier versions had.
    assert difference(identity(written), identity(today)) == [] and spec_hash(written) == spec_hash(today)
