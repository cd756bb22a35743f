"""The two forms of a report: every kind of block, and no text that becomes markup."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from headway.launcher.report.page import Heading, Image, Items, Table, Text, to_html, to_markdown
from headway.launcher.report.plots.study import Plot, inline_svg
from headway.launcher.report.tables import p_text

SVG = """<?xml version="1.0"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<svg xmlns="http://www.w3.org/2000/svg" width="10pt">
 <metadata><a href="http://purl.org/dc">x</a></metadata>
 <path d="M 0 0"/>
</svg>
"""


@pytest.fixture
def plot(tmp_path) -> Plot:
    (tmp_path / "p.svg").write_text(SVG)
    return Plot(title='a "title"', caption="what it shows", svg="p.svg", png="p.png")


class Balance(HTMLParser):
    """Fails on a tag that is not closed in order; keeps the names of all tags and all text outside of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.scripts = 0
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.scripts += tag == "script"
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not set(self.open) & {"script", "style"}:
            self.text += data


def parsed(blocks, folder: Path) -> Balance:
    parser = Balance()
    parser.feed(to_html(blocks, title="t <i>", folder=folder))
    assert parser.open == []
    return parser


def test_every_block_is_well_formed_html(plot, tmp_path):
    blocks = [Heading("h", 1), Text("p", "lead"), Items(["a", "b"]), Table([["x", "y"], ["1", "2"]]), Image(plot)]
    page = parsed(blocks, tmp_path)
    assert {"h1", "p", "li", "td", "th", "svg", "path", "figcaption"} <= page.tags
    assert "metadata" not in page.tags


@pytest.mark.parametrize("nasty", ["<script>alert(1)</script>", "a & b", '"><img src=x>', "`<b>`"])
def test_text_never_becomes_markup(nasty, tmp_path):
    blocks = [Heading(nasty), Text(nasty), Items([nasty]), Table([[nasty], [nasty]])]
    page = parsed(blocks, tmp_path)
    assert not page.tags & {"img", "b"}
    assert page.scripts == 2, "the data of variants and our own script"
    assert page.text.count(nasty.strip("`")) == 6, "once more in the contents"


def test_an_inlined_figure_has_no_prolog_and_no_metadata(tmp_path):
    (tmp_path / "p.svg").write_text(SVG)
    svg = inline_svg(tmp_path / "p.svg")
    assert svg.startswith("<svg ") and svg.endswith("</svg>")
    assert "DTD" not in svg and "purl" not in svg


def test_markdown_escapes_its_marks_outside_of_code():
    assert to_markdown([Text("a_b *c* <d> `e_f`")]) == "a\\_b \\*c\\* \\<d\\> `e_f`\n"


def test_markdown_tables_align_numbers_right_and_keep_bars_apart():
    page = to_markdown([Table([["name", "value"], ["a|b", "1"]])])
    assert page.splitlines() == ["| name | value |", "| --- | ---: |", "| a\\|b | 1 |"]


def test_markdown_shows_figures_and_warnings(plot):
    page = to_markdown([Text("look out", "warn"), Image(plot)])
    assert page.startswith("> **look out**")
    assert "](p.png)" in page and "*what it shows*" in page


def test_no_p_value_is_shown_as_zero():
    assert [p_text(value) for value in (0.0, 0.0004, 0.001, 0.2)] == ["< 0.001", "< 0.001", "0.001", "0.200"]
