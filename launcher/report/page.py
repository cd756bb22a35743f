"""A report as a list of blocks, and its two output formats: Markdown, and one self-contained HTML page.

The text of blocks supports one markup, `code`; all other characters are shown as written.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headway.launcher.report.plots.study import Plot, inline_svg


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
    plot: Plot


Block = Heading | Text | Items | Table | Image


def to_markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block], *, title: str, folder: Path) -> str:
    """One page with embedded styles and figures, without scripts or external links. `folder` contains the figures."""
    body = "\n".join(_html(block, folder) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


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
    raise AssertionError(block)


def _plain(text: str) -> str:
    # Escape characters outside of code that Markdown would interpret as markup.
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(p if p.startswith("`") else re.sub(r"([*_<>\[\]])", r"\\\1", p) for p in parts)


def _html(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Text(text, tone):
            return f'<p class="{tone}">{_inline(text)}</p>'
        case Items(lines):
            return "<ul>" + "".join(f"<li>{_inline(line)}</li>" for line in lines) + "</ul>"
        case Table(rows, left):
            return _html_table(rows, left)
        case Image(plot):
            label = html.escape(plot.title, quote=True)
            svg = inline_svg(folder / plot.svg).replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
            return f"<figure>{svg}<figcaption>{_inline(plot.caption)}</figcaption></figure>"
    raise AssertionError(block)


def _html_table(rows: Sequence[Sequence[str]], left: frozenset[int]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        shown = (f"<{tag}{' class=l' if i in left else ''}>{_inline(c)}</{tag}>" for i, c in enumerate(cells))
        return f"<tr>{''.join(shown)}</tr>"

    head, body = row(rows[0], "th"), "\n".join(row(cells, "td") for cells in rows[1:])
    return f'<div class="scroll"><table>\n<thead>{head}</thead>\n<tbody>{body}</tbody>\n</table></div>'


def _inline(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


_STYLE = """
body{margin:0;background:#fff;color:#1b1b1b;font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1020px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.7em;margin:0 0 .4em}
h2{font-size:1.2em;margin:2.2em 0 .5em;border-bottom:1px solid #ddd;padding-bottom:.2em}
h3{font-size:1.02em;margin:1.6em 0 .4em}
.lead{font-size:1.08em;background:#f2f6fa;border-left:4px solid #0072b2;padding:.7em 1em}
.warn{background:#fdf1e9;border-left:4px solid #d55e00;padding:.7em 1em;font-weight:600}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9em;margin:.6em 0}
th,td{padding:.32em .8em;text-align:right;border-bottom:1px solid #e6e6e6;white-space:nowrap;
font-variant-numeric:tabular-nums}
th{border-bottom:2px solid #bbb}.l{text-align:left}
code{background:#f3f3f3;padding:.1em .3em;border-radius:3px;font-size:.92em;overflow-wrap:anywhere}
figure{margin:1em 0}figure svg{max-width:100%;height:auto}figcaption{font-size:.88em;color:#555}
li{margin:.2em 0}
"""
