"""The goal of a study with `bounds`: what a report says and draws of losses and of what FLOPs allow."""

from __future__ import annotations

from typing import Any

import pytest
from ladder_folders import LadderFolder, law
from study_folders import table

from headway.launcher.compare.ladder.read import read_ladder
from headway.launcher.compare.simultaneous import Simultaneous
from headway.launcher.report.charts import Chart
from headway.launcher.report.ladder import ladder_report
from headway.launcher.report.plots.bounds import draw_bounds
from headway.launcher.report.plots.style import styles_of

RATIOS = {"gqa": (1.0, 1.0), "rgqa-k1": (1.4, 2.0), "rgqa-k2": (1.5, 2.1), "switchhead": (1.4, 1.8)}


def bounds(**changes: Any) -> dict[str, Any]:
    rows = {
        name: {
            "free_value": None,
            "num_params": 940_000_000,
            "speed_up": {"8192": short, "32768": long},
            "flops_per_token": {},
            "kv_bytes_per_token": {"32768": 100.0},
        }
        for name, (short, long) in RATIOS.items()
    }
    return {
        "spec": "940m.yaml",
        "name": "940m",
        "seq_len": [8192, 32768],
        "goal": {"8192": 1.33, "32768": 1.9},
        "variants": rows,
    } | changes


def loss(variant: str, params: float) -> float:
    """rgqa-k1 is far better, rgqa-k2 far worse, switchhead equal."""
    return law("gqa", params) + {"rgqa-k1": -0.2, "rgqa-k2": 0.2}.get(variant, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("goal") / "out"
    made = LadderFolder(
        out,
        (3, 2, 1),
        loss=loss,
        variants=list(RATIOS),
        variants_at={"medium": ["gqa", "rgqa-k1"], "small": ["gqa", "rgqa-k1", "rgqa-k2"]},
    )
    made.write(bounds=bounds())
    ladder_report(out)
    return out


def test_each_variant_has_its_largest_size_with_an_interval_and_what_is_left_of_the_goal(folder):
    page = (folder / "report.md").read_text().replace("\\", "")
    assert "1.33 times as fast at 8,192 tokens and 1.9 times as fast at 32,768 tokens" in page
    rows = table(page, "The goal")
    study = read_ladder(folder)
    by_size = dict(study.differences())
    assert list(by_size) == ["tiny", "small", "medium"] and by_size["medium"]["rgqa-k1"].low is None
    assert set(rows) == {"rgqa-k1", "rgqa-k2", "switchhead"}
    for name, size, words in (
        ("rgqa-k1", "small", "open: the loss is better, the speed is not measured"),
        ("rgqa-k2", "small", "refuted here: the loss is worse"),
        ("switchhead", "tiny", "out of reach: too many FLOPs at 32,768 tokens"),
    ):
        found = by_size[size][name]
        assert rows[name] == [size, f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]", words]


def test_the_figure_has_these_numbers_at_every_length(folder):
    assert (folder / "bounds.png").exists() and "bounds.png" in (folder / "report.md").read_text()
    study = read_ladder(folder)
    drawing = draw_bounds(study.record, study.differences(), styles_of("gqa", study.result.others), study.unit)
    assert drawing is not None
    chart = drawing.chart
    assert isinstance(chart, Chart) and len(chart.panels) == 2
    small = dict(study.differences())["small"]
    for panel, column, goal in zip(chart.panels, (0, 1), (1.33, 1.9), strict=True):
        points = {s.variant: s for s in panel.series}
        assert {name: list(s.x) for name, s in points.items()} == {
            name: [ratios[column]] for name, ratios in RATIOS.items() if name != "gqa"
        }
        for name in ("rgqa-k1", "rgqa-k2"):
            found, point = small[name], points[name]
            assert (list(point.y), point.low, point.high) == ([found.mean], [found.low], [found.high])
            assert point.texts == ["at small"]
        assert [(r.axis, r.at) for r in panel.rules] == [("y", 0.0), ("x", goal)]


def test_without_a_goal_there_is_the_figure_and_no_verdict(folder):
    record = {"baseline": "gqa", "bounds": {k: v for k, v in bounds().items() if k != "goal"}}
    found = [("", {"rgqa-k1": Simultaneous(n=1, mean=-0.1)})]
    drawing = draw_bounds(record, found, styles_of("gqa", ["rgqa-k1"]), "nats per token")
    assert drawing is not None
    assert "goal" not in drawing.caption and "largest size" not in drawing.caption
    assert drawing.chart is not None
    assert [len(p.rules) for p in drawing.chart.panels] == [1, 1]
    assert draw_bounds(record, [("", {})], {}, "nats per token") is None
    assert draw_bounds({"baseline": "gqa"}, found, {}, "nats per token") is None
