"""Figures of cost and loss: their points, fronts and bands, and what the page can hide."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from study_folders import FLOPS, GAIN, STEP_S, StudyFolder, end_loss

from headway.launcher.compare.analyse import StudyResult, analyse
from headway.launcher.report.charts import Series
from headway.launcher.report.plots.effective import MOST_IN_ONE, draw_pareto, draw_trend, pareto_front

BUDGETS = (0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> StudyResult:
    folder = StudyFolder(tmp_path_factory.mktemp("study") / "demo", list(GAIN), [1, 2, 3], BUDGETS)
    return analyse(folder.write())


def of(series: Iterable[Series], variant: str | None, mark: str) -> Series:
    (found,) = [s for s in series if s.variant == variant and s.mark == mark]
    return found


def gids(figure: Any) -> list[str]:
    found = [artist.get_gid() for axis in figure.axes for artist in [axis, *axis.get_children()]]
    return [gid for gid in found if gid]


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)], [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]),
        ([(1.0, 2.0), (2.0, 2.5), (3.0, 1.0), (3.0, 1.5)], [(1.0, 2.0), (3.0, 1.0)]),
        ([(1.0, 2.0), (1.0, 2.0), (2.0, 2.0)], [(1.0, 2.0)]),
        ([], []),
    ],
)
def test_the_front_has_what_no_other_point_beats(points, front):
    assert pareto_front(points) == front


def test_losses_at_annealed_ends_stand_at_their_cost(result):
    drawing = draw_pareto(result)
    assert drawing is not None and drawing.chart is not None
    seconds, flops, stored = drawing.chart.panels
    dots = of(seconds.series, "rgqa-k1", "dot")
    assert list(dots.x) == pytest.approx([STEP_S["rgqa-k1"] * steps for steps in (10, 20, 40)])
    assert list(dots.y) == pytest.approx([sum(end_loss("rgqa-k1", s, b) for s in (1, 2, 3)) / 3 for b in BUDGETS])
    assert list(dots.texts or ()) == ["budget 0.25: 10k tokens", "budget 0.5: 20k tokens", "budget 1: 40k tokens"]
    assert list(of(flops.series, "rgqa-k1", "dot").x) == pytest.approx(
        [3 * FLOPS["rgqa-k1"] * tokens for tokens in (10_000, 20_000, 40_000)]
    )
    assert (list(of(stored.series, "rgqa-k1", "dot").x), len(list(dots.y))) == ([512.0], 3)
    # at equal KV bytes, the front is the best variant alone
    front = of(stored.series, None, "line")
    assert list(front.y) == pytest.approx([min(v.loss.mean for v in result.variants if v.loss is not None)])


def test_one_budget_gives_one_point_for_each_variant(tmp_path):
    drawing = draw_pareto(analyse(StudyFolder(tmp_path / "demo", ["gqa", "rgqa-k2"], [1, 2]).write()))
    assert drawing is not None and drawing.chart is not None
    for panel in drawing.chart.panels:
        assert len(list(of(panel.series, "rgqa-k2", "dot").x)) == 1
    assert "budget" not in drawing.caption


def test_differences_over_tokens_have_their_simultaneous_bands(result):
    drawing = draw_trend(result)
    assert drawing is not None and drawing.chart is not None and result.trend is not None
    (panel,) = drawing.chart.panels
    for name in ("rgqa-k1", "rgqa-k2", "switchhead"):
        series, expected = of(panel.series, name, "line"), result.trend.of(name)
        assert list(series.x) == [tokens for tokens, _ in expected]
        assert list(series.y) == [d.mean for _, d in expected]
        assert (list(series.low or ()), list(series.high or ())) == (
            [d.low for _, d in expected],
            [d.high for _, d in expected],
        )
    assert len(drawing.figure.axes) == 1


def test_lines_markers_and_bands_of_a_variant_have_its_id(result):
    for make, kinds in ((draw_trend, 2), (draw_pareto, 5)):  # line and band; 2, 2 and 1 of the three panels
        drawing = make(result)
        assert drawing is not None
        for name in ("rgqa-k1", "rgqa-k2", "switchhead"):
            assert gids(drawing.figure).count(f"variant:{name}") == kinds, make


def test_many_variants_get_a_panel_each(tmp_path):
    names = ["gqa", *(f"v-{i}" for i in range(MOST_IN_ONE + 1))]
    result = analyse(StudyFolder(tmp_path / "demo", names, [1, 2]).write())
    drawing = draw_trend(result)
    assert drawing is not None and drawing.chart is not None
    shown = [axis for axis in drawing.figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == names[1:]
    assert len({axis.get_ylim() for axis in shown}) == 1
    assert gids(drawing.figure).count("variant:v-3") == 3  # the panel, its line and its band
    assert len(drawing.chart.panels) == 1  # the page shows all in one, where variants can be hidden


def test_the_page_shows_both_figures_and_can_hide_variants_in_them(full: Path):
    page = (full / "report.html").read_text()
    for name in ("trend", "pareto"):
        svg = (full / f"{name}.svg").read_text()
        assert 'id="variant:rgqa-k2"' in svg
        assert (full / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"Differences to gqa over training", page) and "Loss against cost" in page
