"""The page of a report in Chromium: what readers click, point at and drag does what the page says."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
from browser import browse, chromium, needs_browser
from study_folders import GAIN, loss_at

pytestmark = needs_browser

PHONE = 390
"""Width of a usual phone, in CSS pixels."""
READ = """
const lines = (name) => all(`.panel [data-variant="${name}"].series`);
const rows = (name) => all(`tr[data-variant="${name}"]`);
const legend = (name) => all(".chart button.variant").filter((b) => b.value === name);
const ticks = (svg) => [...svg.querySelectorAll("text")].map((t) => t.textContent);
const range = (svg, key) => svg.dataset[key].split(",").map(Number);
"""


def test_the_page_as_written_draws_its_charts_under_its_policy(few: Path, tmp_path: Path) -> None:
    dom, console = chromium(few / "report.html", tmp_path, "--dump-dom")
    assert console == []
    charts = (few / "report.html").read_text().count('class="chart-data"')
    assert dom.count('class="live"') == charts >= 3
    assert dom.count('class="panel"') == dom.count('clip-path="url(#clip-') >= 8, "every panel has its points"


def test_the_policy_stops_other_scripts(few: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    text = (few / "report.html").read_text()
    page.write_text(text.replace("</body>", "<script>document.title = 'changed'</script></body>"))
    dom, console = chromium(page, tmp_path, "--dump-dom")
    assert "<title>changed" not in dom and any("Content Security Policy" in line for line in console)


def test_a_click_on_a_name_hides_the_variant_in_all_figures_and_tables(few: Path, tmp_path: Path) -> None:
    script = """
    const state = () => ({
      lines: ["gqa", "rgqa-k2"].map((v) => lines(v).filter(shown).length),
      rows: ["gqa", "rgqa-k2"].map((v) => rows(v).filter(shown).length),
      pressed: [...new Set(legend("rgqa-k2").map((b) => b.getAttribute("aria-pressed")))],
      labels: ticks(all(".panel svg")[3]).filter((t) => /gqa|head/.test(t)),
      note: shown(document.querySelector(".hidden-note")) ? text(".hidden-note") : "",
    });
    const states = [state()];
    legend("rgqa-k2")[1].click();
    states.push(state());
    all(".hidden-note .all")[0].click();
    states.push(state());
    all(".only")[2].click();
    states.push(state());
    return { states, buttons: legend("rgqa-k2").map((b) => [b.tagName, b.tabIndex]) };
    """
    found = browse(few / "report.html", tmp_path, READ + script)
    first, hidden, again, only = found["states"]
    # four lines in each panel of losses and heads; of differences three seeds and a mean, and the triangle of speed
    assert first["lines"][0] >= 24 and first["lines"][1] >= 33
    assert first["pressed"] == ["true"] and first["note"] == ""
    assert first["labels"][:3] == ["rgqa-k1", "rgqa-k2", "switchhead"]
    assert hidden["lines"] == [first["lines"][0], 0] and hidden["pressed"] == ["false"]
    assert hidden["rows"] == [first["rows"][0], 0] and first["rows"][1] > 5
    assert hidden["labels"][:2] == ["rgqa-k1", "switchhead"]
    assert hidden["note"].startswith("Hidden in figures and tables: rgqa-k2. Text and numbers stay those of all")
    assert again == first
    assert only["lines"] == [0, first["lines"][1]] and "all but rgqa-k2." in only["note"]
    assert len(found["buttons"]) >= 3 and all(button == ["BUTTON", 0] for button in found["buttons"])


def test_a_pointer_shows_variant_seed_and_values_of_the_nearest_point(few: Path, tmp_path: Path) -> None:
    script = """
    const svg = all(".panel svg")[0];
    const tip = all(".tip")[0];
    const plot = svg.querySelector("rect");
    const [x, y] = ["x", "y"].map((key) => Number(plot.getAttribute(key)));
    const [w, h] = ["width", "height"].map((key) => Number(plot.getAttribute(key)));
    const [[x0, x1], [y0, y1]] = [range(svg, "x"), range(svg, "y")];
    const point = (a, b) => pointer(svg, "pointermove", x + w * (a - x0) / (x1 - x0), y + h * (y1 - b) / (y1 - y0));
    const found = [];
    for (const [a, b] of POINTS) {
      point(a, b);
      found.push([...tip.children].map((line) => line.textContent));
    }
    const dimmed = getComputedStyle(lines("gqa")[0]).opacity;
    pointer(svg, "pointerleave", 0, 0);
    return { found, dimmed, left: tip.hidden, undimmed: getComputedStyle(lines("gqa")[0]).opacity };
    """
    value = loss_at("switchhead", 2, 0.5)
    mean = sum(loss_at("rgqa-k2", seed, 1.0) for seed in (1, 2, 3)) / 3
    points = f"[[20000, {value}], [40000, {mean}]]"
    found = browse(few / "report.html", tmp_path, READ + script.replace("POINTS", points))
    (name, tokens, loss), (mean_name, end, mean_loss) = found["found"]
    assert (name, tokens) == ("switchhead, seed 2", "training tokens: 20,000")
    assert loss == f"loss (nats per token): {value:.6g}"
    assert (mean_name, end) == ("rgqa-k2, mean of 3 seeds", "training tokens: 40,000")
    assert float(mean_loss.partition(": ")[2]) == pytest.approx(mean, abs=1e-5)
    assert float(found["dimmed"]) < 0.5 and found["undimmed"] == "1" and found["left"] is True


def test_a_drag_zooms_axes_and_ticks_and_a_double_click_resets(few: Path, tmp_path: Path) -> None:
    script = """
    const svg = all(".panel svg")[0];
    const other = all(".panel svg")[1];
    const reset = all(".reset")[0];
    const state = () => ({
      x: range(svg, "x"), y: range(svg, "y"), ticks: ticks(svg), other: range(other, "x"), reset: !reset.disabled,
    });
    const plot = svg.querySelector("rect");
    const [x, y] = ["x", "y"].map((key) => Number(plot.getAttribute(key)));
    const [w, h] = ["width", "height"].map((key) => Number(plot.getAttribute(key)));
    const drag = (a, b) => {
      const [from, to] = [a, b].map(([p, q]) => [x + w * p, y + h * q]);
      pointer(svg, "pointerdown", ...from);
      pointer(svg, "pointermove", ...to);
      const drawn = svg.querySelector(".range") !== null;
      pointer(svg, "pointerup", ...to);
      return drawn;
    };
    const key = (name) => svg.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
    const states = [state()];
    const drawn = drag([0.5, 0.2], [0.75, 0.22]);
    states.push(state());
    svg.dispatchEvent(new MouseEvent("dblclick", { bubbles: true }));
    states.push(state());
    drag([0.2, 0.2], [0.4, 0.6]);
    states.push(state());
    reset.click();
    states.push(state());
    key("+");
    states.push(state());
    key("0");
    states.push(state());
    drag([0.5, 0.5], [0.502, 0.502]);
    states.push(state());
    return { states, drawn };
    """
    found = browse(few / "report.html", tmp_path, READ + script)
    home, along, again, box, reset, key, back, nothing = found["states"]
    assert found["drawn"] and home["x"][0] == 0 and not home["reset"]
    low, high = home["x"]
    assert along["x"] == pytest.approx([low + 0.5 * (high - low), low + 0.75 * (high - low)])
    # y shows the points in the range of x, with a margin of 5 % on both sides
    inside = [loss_at(v, s, step / 40) for v in GAIN for s in (1, 2, 3) for step in range(4, 41, 4)
              if along["x"][0] <= 1000 * step <= along["x"][1]]  # fmt: skip
    margin = 0.05 * (max(inside) - min(inside))
    assert along["y"] == pytest.approx([min(inside) - margin, max(inside) + margin], abs=1e-5)
    assert along["ticks"] != home["ticks"] and along["other"] == home["other"] and along["reset"]
    numbers = [float(t.removesuffix("k")) for t in along["ticks"] if re.fullmatch(r"[\d.]+k", t)]
    assert len(numbers) >= 2 and along["x"][0] <= 1000 * min(numbers) and 1000 * max(numbers) <= along["x"][1]
    assert box["x"] == pytest.approx([low + 0.2 * (high - low), low + 0.4 * (high - low)])
    bottom, top = home["y"]
    assert box["y"] == pytest.approx([bottom + 0.4 * (top - bottom), bottom + 0.8 * (top - bottom)])
    assert key["x"][0] > low and key["x"][1] < high
    assert again == reset == back == nothing == home


def test_a_click_on_a_header_sorts_numbers_as_numbers(few: Path, tmp_path: Path) -> None:
    script = """
    const table = all("table")[0];
    const column = [...table.tHead.rows[0].cells].findIndex((c) => c.textContent.startsWith("difference"));
    const head = table.tHead.rows[0].cells[column];
    const order = () => [[...table.tBodies[0].rows].map((r) => r.cells[0].textContent), head.getAttribute("aria-sort")];
    const states = [order()];
    for (let i = 0; i < 3; i++) {
      head.querySelector("button").click();
      states.push(order());
    }
    table.tHead.rows[0].cells[0].querySelector("button").click();
    const speed = all("table").find((t) => t.tHead.textContent.includes("quartiles"));
    speed.tHead.rows[0].cells[1].querySelector("button").click();
    return { states, by_name: order(), speed: [...speed.tBodies[0].rows].map((r) => r.cells[1].textContent) };
    """
    found = browse(few / "report.html", tmp_path, READ + script)
    as_written, up, down = list(GAIN), ["rgqa-k2", "switchhead", "rgqa-k1"], ["rgqa-k1", "switchhead", "rgqa-k2"]
    assert found["states"] == [
        [as_written, None],
        [[*up, "gqa"], "ascending"],  # the baseline has no number
        [[*down, "gqa"], "descending"],
        [as_written, None],
    ]
    assert found["by_name"] == [sorted(GAIN), None]
    numbers = [float(cell.replace(",", "")) for cell in found["speed"]]
    assert numbers == sorted(numbers) and found["speed"] != sorted(found["speed"])


def test_long_tables_can_be_filtered(many: Path, many_names: list[str], tmp_path: Path) -> None:
    script = """
    const input = all("input[type=search]")[0];
    const names = () => [...all("table")[0].tBodies[0].rows].filter(shown).map((r) => r.cells[0].textContent);
    const before = names().length;
    input.value = "HASH";
    input.dispatchEvent(new Event("input"));
    return [before, names()];
    """
    assert browse(many / "report.html", tmp_path, script) == [len(many_names), ["rgqa-k1-hash"]]


@pytest.mark.parametrize("study", ["few", "many"])
def test_a_phone_scrolls_tables_in_their_boxes_and_not_the_page(
    study: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    script = """
    const boxes = all(".scroll").filter((b) => b.scrollWidth > b.clientWidth + 100);
    const first = boxes[0].querySelector("td");
    const last = boxes[0].querySelector("td:last-child");
    const before = [first, last].map((cell) => cell.getBoundingClientRect().left);
    boxes[0].scrollLeft = 100;
    const after = [first, last].map((cell) => cell.getBoundingClientRect().left);
    const panels = all(".panel svg").map((s) => s.getBoundingClientRect());
    return {
      width: [innerWidth, document.scrollingElement.scrollWidth], moved: after.map((left, i) => before[i] - left),
      folded: all(".side details").map((d) => d.open), charts: Math.max(...panels.map((p) => p.right)),
      stacked: panels[1].top >= panels[0].bottom,
      keys: boxes.every((b) => b.tabIndex === 0),
    };
    """
    page = request.getfixturevalue(study) / "report.html"
    found = browse(page, tmp_path, script, width=PHONE, height=844)
    assert found["width"][0] == PHONE and found["width"][1] <= PHONE and found["charts"] <= PHONE
    assert found["moved"] == [0, 100], "the first column stays"
    assert found["folded"] == [False, False] and found["stacked"] and found["keys"]


@pytest.mark.parametrize("width", [PHONE, 1400])
def test_no_text_of_a_live_figure_is_cut_off(width: int, many: Path, tmp_path: Path) -> None:
    script = """
    const found = [];
    for (const svg of all(".panel svg")) {
      const outer = svg.getBoundingClientRect();
      for (const t of svg.querySelectorAll("text")) {
        const box = t.getBoundingClientRect();
        if (box.left < outer.left - 1 || box.right > outer.right + 1 || box.bottom > outer.bottom + 1)
          found.push(t.textContent);
      }
    }
    return found;
    """
    assert browse(many / "report.html", tmp_path, script, width=width) == []


def test_contents_stand_at_the_side_and_mark_the_section_in_view(few: Path, tmp_path: Path) -> None:
    script = """
    const current = () => all("nav [aria-current]").map((a) => a.textContent);
    const found = [current()];
    for (const id of ["loss-at-equal-tokens", "provenance"]) {
      document.documentElement.style.scrollBehavior = "auto";
      document.getElementById(id).scrollIntoView();
      dispatchEvent(new Event("scroll")); // sent with the next frame, which headless Chromium may not draw
      found.push(current());
    }
    const side = document.querySelector(".side").getBoundingClientRect();
    const main = document.querySelector("main").getBoundingClientRect();
    return { found, open: all(".side details").map((d) => d.open), beside: side.right <= main.left, top: side.top };
    """
    found = browse(few / "report.html", tmp_path, script)
    assert found["found"] == [["Study demo"], ["Loss at equal tokens"], ["Provenance"]]
    assert found["open"] == [True, True] and found["beside"]
    assert abs(found["top"]) < 1  # pixels: the position of a scrolled page is rounded to whole ones


CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const channels = (colour) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const light = (colour) => {
  const [r, g, b] = channels(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
/** Ratio of WCAG 2.2 between two colours. */
const ratio = (a, b) => {
  const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (channels(colour)[3] === 255) return colour;
  }
  return "white";
};
const contrasts = () => {
  const paint = (e) => (e.closest("svg") ? getComputedStyle(e).fill : getComputedStyle(e).color);
  const words = all("p, li, td, th, a, button:not(:disabled), figcaption, h1, h2, summary, .panel text");
  const text = words.filter((e) => shown(e) && e.textContent.trim()).map((e) => ratio(paint(e), behind(e)));
  const lines = all(".series").map((e) => ratio(getComputedStyle(e).stroke, behind(e)));
  return { text: Math.min(...text), lines: Math.min(...lines), page: light(behind(document.body)), n: text.length };
};
"""


def test_text_has_contrast_in_both_styles(few: Path, tmp_path: Path) -> None:
    script = """
    const found = [contrasts()];
    all(".theme")[0].click();
    found.push(contrasts());
    return found;
    """
    flag = "--blink-settings=preferredColorScheme=0"
    dark, light = browse(few / "report.html", tmp_path, CONTRAST + script, flag)
    assert dark["page"] < 0.02 and light["page"] == 1, "the page follows the system, and the button overrules it"
    for style in (dark, light):
        assert style["n"] > 100 and style["text"] >= 4.5, "WCAG AA for text"
        assert style["lines"] >= 3, "WCAG AA for graphics"


PRINTED = """
const use = (from, to) => {
  for (const rule of document.styleSheets[0].cssRules) if (rule.media?.mediaText === from) rule.media.mediaText = to;
};
"""


def test_print_has_static_figures_and_no_controls(few: Path, tmp_path: Path) -> None:
    script = """
    const state = () => [".static", ".chart", ".side"].map((s) => all(s).filter(shown).length);
    const before = state();
    use("print", "all");
    return { before, after: state(), scroll: getComputedStyle(all(".scroll")[0]).overflowX,
             split: getComputedStyle(all("figure")[0]).breakInside };
    """
    found = browse(few / "report.html", tmp_path, PRINTED + script)
    page = (few / "report.html").read_text()
    charts, figures = page.count('class="chart-data"'), page.count('<div class="static">')
    assert charts < figures, "the map of loads has no live form"
    assert found["before"] == [figures - charts, charts, 1]
    assert found["after"] == [figures, 0, 0]
    assert found["scroll"] == "visible" and found["split"] == "avoid"
    pdf = tmp_path / "page.pdf"
    chromium(few / "report.html", tmp_path, f"--print-to-pdf={pdf}")
    assert pdf.read_bytes().startswith(b"%PDF")


def test_without_scripts_static_figures_and_contents_are_shown(few: Path, tmp_path: Path) -> None:
    source = (few / "report.html").read_text()
    text = html.escape(source)
    page = tmp_path / "outer.html"
    frame = f'<iframe sandbox="allow-same-origin" style="width:1300px;height:800px" srcdoc="{text}"></iframe>'
    page.write_text(f"<!doctype html><html><head></head><body>{frame}</body></html>")
    script = """
    const inner = document.querySelector("iframe").contentDocument;
    const count = (selector) => [...inner.querySelectorAll(selector)].filter(shown).length;
    return [".static svg", ".chart, button, .hidden-note", "nav a", "table"].map(count);
    """
    figures, controls, links, tables = browse(page, tmp_path, script, expected="Blocked script execution")
    assert (figures, controls) == (source.count('<div class="static">'), 0) and links > 8 and tables > 8


def test_no_text_of_a_static_figure_is_cut_off(many: Path, many_names: list[str], tmp_path: Path) -> None:
    script = """
    all("figure").forEach((f) => f.classList.remove("live"));
    const found = [];
    for (const svg of all(".static svg")) {
      const outer = svg.getBoundingClientRect();
      for (const t of svg.querySelectorAll("text")) {
        const box = t.getBoundingClientRect();
        if (box.left < outer.left || box.right > outer.right || box.top < outer.top || box.bottom > outer.bottom)
          found.push(t.textContent);
      }
    }
    const legend = all(".static svg")[0].querySelectorAll("text[data-variant], [data-variant] text");
    const boxes = [...legend].map((t) => t.getBoundingClientRect());
    const meet = (a, b) => a.left < b.right && b.left < a.right && a.top + 1 < b.bottom - 1 && b.top + 1 < a.bottom - 1;
    const overlaps = boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) => meet(a, b))).length;
    return { found, names: boxes.length, overlaps };
    """
    found = browse(many / "report.html", tmp_path, script)
    assert found == {"found": [], "names": len(many_names), "overlaps": 0}
