"""The page of a report without a browser: contents, figures with text and data, and a policy for its script."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from study_folders import GAIN

from headway.launcher.compare.analyse import analyse
from headway.launcher.report.charts import Axis, Chart, Panel, Series, chart_json
from headway.launcher.report.page import Heading, Image, Table, to_html
from headway.launcher.report.plots.study import Plot
from headway.launcher.report.plots.style import styles

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="10pt"><path id="a" d="M 0 0"/></svg>'


class Page(HTMLParser):
    """Ids, links, headings (level, id), names of variants of rows, data blocks and text of figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[tuple[int, str]] = []
        self.rows: list[str] = []
        self.data: list[Any] = []
        self.figures: list[str] = []
        self.open: list[tuple[str, dict[str, Any]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = {key: value or "" for key, value in attrs}
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "a":
            self.links.append(found["href"])
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), found["id"]))
        if tag == "tr" and "data-variant" in found:
            self.rows.append(found["data-variant"])
        if tag == "figure":
            self.figures.append("")
        if tag != "meta":
            self.open.append((tag, found))

    def handle_startendtag(self, tag, attrs):
        self.ids += [value or "" for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        if any(tag == "script" and found.get("type") == "application/json" for tag, found in self.open):
            self.data.append(json.loads(data))
        elif any(tag == "text" for tag, _ in self.open):
            self.figures[-1] += data + "\n"


@pytest.fixture(scope="module")
def page(few: Path) -> Page:
    return Page((few / "report.html").read_text())


def test_ids_stand_once_and_every_link_has_its_target(page: Page) -> None:
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)


def test_the_contents_lead_to_every_heading_in_order(page: Page) -> None:
    assert page.links == ["#report", *(f"#{name}" for _, name in page.headings)]
    assert [level for level, _ in page.headings].count(1) == 1


@pytest.mark.parametrize("levels", [[1, 3, 3, 2, 3, 2], [1, 2, 4], [2], [1, 3]])
def test_levels_of_headings_leave_none_out(levels: list[int], tmp_path: Path) -> None:
    text = to_html([Heading("same", level) for level in levels], title="t", folder=tmp_path)
    found = Page(text)
    assert all(b <= a + 1 for (a, _), (b, _) in pairwise(found.headings))
    assert len({name for _, name in found.headings}) == len(levels)


def test_headings_before_the_first_section_are_sections(tmp_path: Path) -> None:
    blocks = [Heading("title", 1), Heading("a", 3), Heading("b", 3), Heading("c"), Heading("d", 3)]
    found = Page(to_html(blocks, title="t", folder=tmp_path))
    assert [level for level, _ in found.headings] == [1, 2, 2, 2, 3]


def test_the_policy_allows_our_script_and_nothing_else(few: Path) -> None:
    text = (few / "report.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert f'http-equiv="Content-Security-Policy" content="{policy}"' in text


# ---------------------------------------------------------------- figures


def charts(page: Page) -> list[dict[str, Any]]:
    return [block for block in page.data if isinstance(block, dict)]


def test_the_chart_of_losses_has_the_numbers_of_curves_csv(page: Page, few: Path) -> None:
    with (few / "curves.csv").open() as file:
        points = [row for row in csv.DictReader(file) if row["kind"] == "validation"]
    columns = ("tokens", "train_flops_useful", "train_s")
    panels = charts(page)[0]["panels"]
    assert len(panels) == len(columns)
    for panel, column in zip(panels, columns, strict=True):
        seeds = {(s["variant"], s["name"]): s for s in panel["series"] if s["name"].startswith("seed ")}
        assert len(seeds) == 12
        for (variant, name), series in seeds.items():
            own = [p for p in points if (p["variant"], f"seed {p['seed']}") == (variant, name)]
            assert series["x"] == pytest.approx([float(p[column]) for p in own], rel=1e-6)
            assert series["y"] == pytest.approx([float(p["loss_nats"]) for p in own], rel=1e-6)
        means = {s["variant"]: s for s in panel["series"] if s["name"] == "mean of 3 seeds"}
        assert list(means) == list(GAIN)
        for variant, series in means.items():
            ends = [float(p["loss_nats"]) for p in points if p["variant"] == variant and p["tokens"] == "40000"]
            assert series["y"][-1] == pytest.approx(sum(ends) / 3, rel=1e-6)


def test_the_chart_of_differences_has_the_intervals_of_the_comparison(page: Page, few: Path) -> None:
    losses = charts(page)[1]["panels"][0]
    means = {s["variant"]: s for s in losses["series"] if s["name"] == "mean"}
    for variant, difference in analyse(few).comparison.differences.items():
        found = [means[variant][key][0] for key in ("x", "x_low", "x_high")]
        assert found == pytest.approx([difference.mean, difference.low, difference.high], rel=1e-6)
    assert [text for _, text in losses["y"]["ticks"]] == list(GAIN)[1:]


def test_figures_are_in_the_page_without_scripts(few: Path) -> None:
    text = (few / "report.html").read_text()
    assert text.count('<div class="static"><svg') == 6
    assert 'class="live"' not in text  # a script adds it, and the style sheet hides static figures by it alone
    assert set(re.findall(r"([^}]*)\{ display: none; \}", text.split("@media print")[0])) >= {"\n.live > .static "}


def test_text_of_figures_is_text(page: Page) -> None:
    assert len(page.figures) == 6
    for words in ("training tokens", "useful training FLOPs", "loss (nats per token)", "rgqa-k2", "15k"):
        assert words in page.figures[0]
    assert "validation loss minus gqa's (nats per token)" in page.figures[1]


def test_what_belongs_to_a_variant_can_be_found(page: Page, few: Path) -> None:
    text = (few / "report.html").read_text()
    figures = re.findall(r'<div class="static">(.*?)</div>', text, re.S)
    for variant in GAIN:
        # three panels with a mean and a group of all seeds each, and the line and the text of the legend
        assert figures[0].count(f'data-variant="{variant}"') == 8
        groups = re.findall(rf'<g data-variant="{variant}">(.*?)</g>', figures[0], re.S)
        assert [group.count("<path ") for group in groups].count(3) == 3
        assert page.rows.count(variant) >= 5
    assert not [name for name in page.ids if "variant:" in name]


def test_the_legend_of_many_variants_names_all_and_their_styles_differ(many: Path, many_names: list[str]) -> None:
    looks = styles(analyse(many))
    assert len({json.dumps(look) for look in looks.values()}) == len(looks) == len(many_names)
    found = Page((many / "report.html").read_text())
    assert set(looks) <= set(found.figures[0].splitlines())
    (listed,) = [block for block in found.data if isinstance(block, list)]
    for style in ("dash", "marker"):
        assert len({(v["color"], v[style]) for v in listed}) == len(many_names)
    assert [v["name"] for v in listed] == list(looks)


# ---------------------------------------------------------------- data of charts


def a_chart(**series: Any) -> Chart:
    panel = Panel(x=Axis(label="x"), y=Axis(label="y"), series=[Series(variant="a", name="mean", **series)])
    return Chart(panels=[panel], styles={"a": {"color": "#000000", "linestyle": (0, (3, 1))}})


def test_numbers_that_are_not_finite_are_null() -> None:
    data = json.loads(chart_json(a_chart(x=[1, 2.5, 123456789.123], y=[math.nan, math.inf, 1 / 3])))
    (series,) = data["panels"][0]["series"]
    assert series["x"] == [1, 2.5, 123456800] and series["y"] == [None, None, 0.3333333]


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(AssertionError, match="a mean: lists of different lengths"):
        chart_json(a_chart(x=[1, 2], y=[1]))


def test_no_text_ends_a_block_of_data(tmp_path: Path) -> None:
    (tmp_path / "p.svg").write_text(SVG)
    nasty = "</script><script>alert(1)</script>&"
    plot = Plot(title="t", caption="c", svg="p.svg", png="p.png", chart=a_chart(x=[1], y=[1], texts=[nasty]))
    found = Page(to_html([Image(plot)], title="t", folder=tmp_path, styles={nasty: {"color": "#000000"}}))
    data = charts(found)
    assert data[0]["panels"][0]["series"][0]["texts"] == [nasty]
    (listed,) = [block for block in found.data if isinstance(block, list)]
    assert [(v["name"], v["dash"]) for v in listed] == [(nasty, ""), ("a", "6 2")]


def test_rows_and_cells_of_a_variant_carry_its_name(tmp_path: Path) -> None:
    rows = [["variant", "x"], ["a", "1"], ["a/seed-1", "2"], ["ab", "3"], ["b", "4"]]
    found = Page(to_html([Table(rows)], title="t", folder=tmp_path, styles={"a": {"color": "#000000"}}))
    assert found.rows == ["a", "a"]


def test_a_figure_twice_in_a_page_keeps_ids_apart(tmp_path: Path) -> None:
    for name in ("p", "q"):
        (tmp_path / f"{name}.svg").write_text(SVG.replace("<path", '<use href="#a" clip-path="url(#a)"/><path'))
    plots = [Plot(title="t", caption="c", svg=f"{n}.svg", png=f"{n}.png") for n in ("p", "q")]
    text = to_html([Image(plot) for plot in plots], title="t", folder=tmp_path)
    assert '<use href="#p.a" clip-path="url(#p.a)"/>' in text and '<use href="#q.a" clip-path="url(#q.a)"/>' in text
    assert [name for name in Page(text).ids if name.endswith(".a")] == ["p.a", "q.a"]
