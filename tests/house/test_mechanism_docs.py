"""docs/mechanisms.md has a section and a cost row for every mechanism a spec may name."""

import re
from pathlib import Path

import pytest

from headway.model.attention.registry import MECHANISMS

DOCS = (Path(__file__).parents[2] / "docs" / "mechanisms.md").read_text()


@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism_is_explained_and_its_cost_stated(name):
    assert re.search(rf"^## .*`{name}`", DOCS, re.M)
    assert re.search(rf"^\| `{name}`.*[24][a-zA-Z]*D.*\|.*\|.*\|", DOCS, re.M)


def test_links_lead_to_sections_that_exist():
    headings = re.findall(r"^## (.*)$", DOCS, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    for target in re.findall(r"\]\(#([^)]*)\)", DOCS):
        assert target in anchors, target


def test_routed_gqa_is_called_a_reconstruction():
    section = DOCS[DOCS.index("## Routed GQA") :]
    assert "**A reconstruction.**" in section[:200]
