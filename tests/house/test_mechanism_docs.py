"""docs/mechanisms.md has a section and a cost row for every mechanism a spec may name."""

import re
from pathlib import Path

import pytest

from headway.launcher.study.config import load_study
from headway.model.attention.registry import MECHANISMS

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "yaml" / "studies" / "all-mechanisms.yaml"
DOCS = (ROOT / "docs" / "mechanisms.md").read_text()


@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism_is_explained_and_its_cost_stated(name):
    assert re.search(rf"^## .*`{name}`", DOCS, re.M), f"docs/mechanisms.md: add a section `## ...: `{name}``"
    row = rf"^\| `{name}`.*[24][a-zA-Z]*D.*\|.*\|.*\|"
    assert re.search(row, DOCS, re.M), f"docs/mechanisms.md: add a row for `{name}` to the table of costs"


def test_every_name_in_the_table_of_costs_is_a_mechanism():
    names = set(re.findall(r"^\| `(\w+)`[^|]*\| \d?d", DOCS, re.M))
    assert names == MECHANISMS.keys(), (
        "docs/mechanisms.md: the table of costs has a row for each mechanism, and no other"
    )


@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism_is_in_the_study_of_all_of_them(name):
    kinds = {keys["attention.type"] for keys in load_study(STUDY).config.variants.values()}
    assert name in kinds, f"{STUDY.relative_to(ROOT)}: add a variant with attention.type {name}"


def test_links_lead_to_sections_that_exist():
    headings = re.findall(r"^## (.*)$", DOCS, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    for target in re.findall(r"\]\(#([^)]*)\)", DOCS):
        assert target in anchors, target


def test_routed_gqa_is_called_a_reconstruction():
    section = DOCS[DOCS.index("## Routed GQA") :]
    assert "**A reconstruction.**" in section[:200]
