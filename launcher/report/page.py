"""A report as a list of blocks, and its two output formats: Markdown, and one self-contained HTML page.

The text of blocks supports one markup, `code`; all other characters are shown as written.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from headway.launcher.report.charts import Chart, chart_json
from headway.launcher.report.plots.study import Plot, inline_svg
from headway.launcher.report.plots.style import marker


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph. `tone`: lead for the main finding, warn for a warning."""

    text: str
    tone: str = "plain"


@dataclass(frozen=True)
class Items:
    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table of text. The first of `rows` is the header. The first column and those in `left` are left-aligned."""

    rows: Sequence[Sequence[str]]
    left: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Image:
    """A figure. If its plot has a chart, scripts of the page replace the static figure on screens."""

    plot: Plot


@dataclass(frozen=True)
class Live:
    """A chart that only scripts of the page draw, for pages that are never printed or converted to Markdown."""

    chart: Chart
    title: str
    caption: str


@dataclass(frozen=True)
class Links:
    """A list of links to other pages: (text, path relative to this page)."""

    links: Sequence[tuple[str, str]]


Block = Heading | Text | Items | Table | Image | Live | Links
Styles = Mapping[str, Mapping[str, Any]]
"""Variant -> `color` and `linestyle`, as `plots.style.styles` returns them."""


# ---------------------------------------------------------------- Markdown


def to_markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Text(text, "warn"):
            return f"> **{_plain(text)}**"
        case Text(text, "lead"):
            return f"**{_plain(text)}**"
        case Text(text, _):
            return _plain(text)
        case Items(lines):
            return "\n".join(f"- {_plain(line)}" for line in lines)
        case Table(rows, left):
            cells = [[_plain(cell).replace("|", "\\|") or " " for cell in row] for row in rows]
            rule = ["---" if i in left else "---:" for i in range(len(cells[0]))]
            return "\n".join(f"| {' | '.join(row)} |" for row in [cells[0], rule, *cells[1:]])
        case Image(plot):
            return f"![{plot.title}]({plot.png})\n\n*{_plain(plot.caption)}*"
        case Live(_, title, caption):
            return f"*{_plain(title)}: {_plain(caption)}*"
        case Links(links):
            return "\n".join(f"- [{_plain(text)}]({quote(path)})" for text, path in links)
    raise AssertionError(block)


def _plain(text: str) -> str:
    # Escape characters outside of code that Markdown would interpret as markup.
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(p if p.startswith("`") else re.sub(r"([*_<>\[\]])", r"\\\1", p) for p in parts)


# ---------------------------------------------------------------- HTML


def to_html(
    blocks: Sequence[Block], *, title: str, folder: Path, styles: Styles | None = None, renewed: bool = False
) -> str:
    """One page with embedded styles, script and figures, without external links. `folder` contains the figures.

    `styles`: variants that readers can hide, in figures and in rows of tables that begin with their name. Variants of
    charts are among them in any case. The policy in the head of the page allows no script but the one of Headway, and
    no request; a `renewed` page may ask its server for itself (renew.js).
    """
    charts = [b.plot.chart for b in blocks if isinstance(b, Image) and b.plot.chart is not None]
    charts += [b.chart for b in blocks if isinstance(b, Live)]
    known: dict[str, Mapping[str, Any]] = dict(styles or {})
    for chart in charts:
        known |= {name: look for name, look in chart.styles.items() if name not in known}
    anchors = _anchors(blocks)
    body = "\n".join(_html(b, folder, known, anchors.get(i)) for i, b in enumerate(blocks))
    script = _part("charts.js") + _part("page.js") + (_part("renew.js") if renewed else "")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    policy += "; connect-src 'self'" if renewed else ""
    looks = [
        {"name": name, "color": look["color"].lower(), "dash": _dashes(look), "marker": marker(look)}
        for name, look in known.items()
    ]
    parts = [
        f"<title>{html.escape(title)}</title>\n<style>{_part('page.css')}</style>\n</head>\n<body>",
        '<a class="skip" href="#report">Skip to the report</a>',
        f'<div class="side">{_contents(anchors.values())}</div>',
        f'<main id="report">\n{body}\n</main>',
        _data(json.dumps(looks), "variants", "id"),
        f"<script>{script}</script>\n</body>\n</html>\n",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n' + "\n".join(parts)
    )


@dataclass(frozen=True)
class _Anchor:
    """A heading in the page: its level in the outline, its id, and its text."""

    level: int
    id: str
    text: str


def _anchors(blocks: Sequence[Block]) -> dict[int, _Anchor]:
    """Index of a block -> its heading. A heading before the first section is a section: no level is left out."""
    found: dict[int, _Anchor] = {}
    used = {"report", "variants"}
    last, in_section = 0, False
    for i, block in enumerate(blocks):
        if not isinstance(block, Heading):
            continue
        in_section |= block.level == 2
        last = min(block.level, last + 1 if in_section else 2)
        slug = name = re.sub(r"[^a-z0-9]+", "-", block.text.lower()).strip("-") or "section"
        number = 2
        while slug in used:
            slug, number = f"{name}-{number}", number + 1
        used.add(slug)
        found[i] = _Anchor(last, slug, block.text)
    return found


def _contents(anchors: Iterable[_Anchor]) -> str:
    """Links to all headings: sections of the page, and indented those below them."""
    links = "".join(
        f'<li class="level-{a.level}"><a href="#{a.id}">{_inline(a.text, code=False)}</a></li>' for a in anchors
    )
    if not links:
        return ""
    return f'<nav aria-label="Contents"><details open><summary>Contents</summary><ul>{links}</ul></details></nav>'


def _html(block: Block, folder: Path, styles: Styles, anchor: _Anchor | None) -> str:
    match block:
        case Heading(text, _):
            assert anchor is not None
            return f'<h{anchor.level} id="{anchor.id}">{_inline(text)}</h{anchor.level}>'
        case Text(text, tone):
            return f'<p class="{tone}">{_inline(text)}</p>'
        case Items(lines):
            return "<ul>" + "".join(f"<li>{_inline(line)}</li>" for line in lines) + "</ul>"
        case Table(rows, left):
            return _html_table(rows, left, styles)
        case Image(plot):
            return _html_figure(plot, folder)
        case Live(chart, title, caption):
            label = html.escape(title, quote=True)
            data = _data(chart_json(chart), "chart-data", "class")
            return f'<figure data-title="{label}">{data}<figcaption>{_inline(caption)}</figcaption></figure>'
        case Links(links):
            shown = (f'<li><a href="{html.escape(quote(path))}">{_inline(text)}</a></li>' for text, path in links)
            return f"<ul>{''.join(shown)}</ul>"
    raise AssertionError(block)


def _html_figure(plot: Plot, folder: Path) -> str:
    label = html.escape(plot.title, quote=True)
    svg = inline_svg(folder / plot.svg).replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    data = "" if plot.chart is None else _data(chart_json(plot.chart), "chart-data", "class")
    caption = f"<figcaption>{_inline(plot.caption)}</figcaption>"
    return f'<figure data-title="{label}"><div class="static">{svg}</div>{data}{caption}</figure>'


def _html_table(rows: Sequence[Sequence[str]], left: frozenset[int], styles: Styles) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        shown = (f"<{tag}{' class=l' if i in left else ''}>{_inline(c)}</{tag}>" for i, c in enumerate(cells))
        # A cell of a study is VARIANT/seed-N.
        variant = cells[0].partition("/")[0]
        mark = f' data-variant="{html.escape(variant)}"' if tag == "td" and variant in styles else ""
        return f"<tr{mark}>{''.join(shown)}</tr>"

    head, body = row(rows[0], "th"), "\n".join(row(cells, "td") for cells in rows[1:])
    return f'<div class="scroll"><table>\n<thead>{head}</thead>\n<tbody>{body}</tbody>\n</table></div>'


def _inline(text: str, *, code: bool = True) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>" if code else r"\1", html.escape(text))


def _data(text: str, name: str, kind: str) -> str:
    """A data block of the page. No text in it can end the block."""
    escaped = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return f'<script type="application/json" {kind}="{name}">{escaped}</script>'


def _dashes(look: Mapping[str, Any]) -> str:
    """A dash pattern of matplotlib as SVG's `stroke-dasharray`."""
    named = {"-": "", "--": "7 3", "-.": "8 3 2 3", ":": "2 3"}
    style = look.get("linestyle", "-")
    return named[style] if isinstance(style, str) else " ".join(f"{2 * float(n):g}" for n in style[1])


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
