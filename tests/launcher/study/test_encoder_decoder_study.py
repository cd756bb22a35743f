"""Studies of encoder-decoders start as drawn: the default of `branch_start` is measured for decoders only."""

from __future__ import annotations

from pathlib import Path

import pytest

from headway.launcher.base.errors import SpecError
from headway.launcher.study.config import load_study
from headway.launcher.study.plan import variant_spec

BASE = Path(__file__).parents[3] / "yaml" / "base" / "encoder-decoder.yaml"


def written(folder: Path, *lines: str) -> Path:
    file = folder / "study.yaml"
    variants = "variants: {gqa: {attention.type: gqa}, wgqa: {attention.type: wgqa}}"
    file.write_text("\n".join(["study: two", f"base: {BASE}", "seeds: [1]", variants, *lines, ""]))
    return file


def test_variants_start_as_drawn(tmp_path):
    study = load_study(written(tmp_path))
    assert [variant_spec(study, [], name).model.branch_start for name in study.variants] == ["as_drawn", "as_drawn"]


def test_a_start_that_the_study_states_is_refused(tmp_path):
    study = load_study(written(tmp_path, "branch_start: 0.3"))
    with pytest.raises(SpecError, match=r"branch_start: 0\.3 is measured for decoders only"):
        variant_spec(study, [], "gqa")
