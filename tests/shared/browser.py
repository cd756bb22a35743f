"""A page in headless Chromium: run a script in it and read what the script returns. Skips where no browser is."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NARROWEST = 500
"""Pixels. Chromium makes no window narrower than this; a narrower page is shown in a frame."""
NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is in PATH")

HEAD = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push(event.message));
const pause = (ms = 50) => new Promise((done) => setTimeout(done, ms));
const all = (selector) => [...document.querySelectorAll(selector)];
const text = (selector) => document.querySelector(selector).textContent;
const shown = (element) => element.getClientRects().length > 0;
/** A pointer event at a position in an element, in pixels from its corner. */
function pointer(element, kind, x, y) {
  const box = element.getBoundingClientRect();
  const where = { clientX: box.left + x, clientY: box.top + y, bubbles: true, button: 0, pointerId: 1 };
  element.dispatchEvent(new PointerEvent(kind, where));
}
</script>"""
TAIL = """<script>
addEventListener("load", async () => {
  await pause(200);
  let result = null;
  try { result = await (async () => { %s })(); } catch (error) { problems.push(String(error.stack)); }
  const pre = document.createElement("pre");
  pre.id = "outcome";
  pre.textContent = JSON.stringify({ result, problems });
  top.document.body.append(pre);
});
</script>"""


def chromium(page: Path, folder: Path, *flags: str, width: int = 1400, height: int = 900) -> tuple[str, list[str]]:
    """(standard output, messages in the console) of Chromium with `flags`; `folder` is for its profile."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=8000", f"--window-size={width},{height}", "--enable-logging=stderr"]
    done = subprocess.run([*command, *flags, page.as_uri()], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def framed(source: str, width: int, height: int) -> str:
    """A page that shows another one in a frame of this size."""
    style = f"border:0;width:{width}px;height:{height}px"
    return (
        f'<!doctype html><body style="margin:0"><iframe style="{style}" srcdoc="{html.escape(source)}"></iframe></body>'
    )


def browse(
    page: Path, folder: Path, script: str, *flags: str, width: int = 1400, height: int = 900, expected: str = ""
) -> Any:
    """What `script`, the body of an async function, returns in a copy of the page.

    Nothing may be written to the console but messages that contain `expected`. The copy has no security policy, which
    would not allow the script.
    """
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    source = source.replace("<head>", f"<head>{HEAD}", 1).replace("</body>", f"{TAIL % script}</body>", 1)
    copy = folder / "driven.html"
    copy.write_text(framed(source, width, height) if width < NARROWEST else source)
    dom, console = chromium(copy, folder, "--dump-dom", *flags, width=width, height=height)
    found = re.search(r'<pre id="outcome">(.*?)</pre>', dom, re.S)
    assert found, f"the script did not end; console: {console}"
    outcome = json.loads(html.unescape(found[1]))
    assert outcome["problems"] == []
    assert [line for line in console if not expected or expected not in line] == []
    return outcome["result"]
