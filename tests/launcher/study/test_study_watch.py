"""`headway study watch`: a page on this machine that shows what a study does, and renews itself."""

from __future__ import annotations

import http.client
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import BROWSER, needs_browser

from headway.launcher.study.config import load_study
from headway.launcher.study.watch.page import Pages, Part
from headway.launcher.study.watch.server import make_server

STUDY = """
study: small
base: tiny.yaml
baseline: gqa
seeds: [1]
variants: {gqa: {attention.type: gqa}, rgqa-k1: {attention.top_k: 1}}
"""
SHORT = ["train.tokens=2560", "train.validate_every_tokens=1280", "--no-timing"]


@pytest.fixture(scope="module")
def study(headway_once: Any) -> Path:
    """A study of two cells, the file of it; it is trained."""
    file = headway_once.folder / "study.yaml"
    file.write_text(STUDY)
    done = headway_once.run("study", "run", "study.yaml", *SHORT)
    assert done.returncode == 0, done.stderr
    return file


def get(port: int, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@contextmanager
def served(pages: Pages, report: Path) -> Iterator[int]:
    server = make_server(pages, report, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def pages_of(file: Path) -> Pages:
    return Pages("small", lambda: [Part(label="", study=load_study(file))])


def test_the_command_serves_the_page_and_the_report_until_a_signal(study: Path, headway_once: Any) -> None:
    words = headway_once.command("study", "watch", "study.yaml", "--port", "0")
    environment = headway_once.environment()
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=study.parent, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        address = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\n", process.stdout.readline())
        assert address is not None
        port = int(address[1])
        status, page = get(port, "/")
        assert status == 200 and "2 of 2 cells are done; 5.12k tokens trained." in page
        assert "gqa/seed-1" in page and "Loss so far" in page
        assert f'data-state="{get(port, "/state")[1]}"' in page
        assert get(port, "/report.html") == (200, (study.parent / "studies/small/report.html").read_text())
        assert get(port, "/../tiny.yaml")[0] == get(port, "/study.json")[0] == 404
        assert get(port, "/", host=f"example.org:{port}")[0] == 403
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0


def test_a_study_that_has_not_begun_and_one_that_fails_are_shown(tmp_path: Path, study: Path) -> None:
    (tmp_path / "tiny.yaml").write_text((study.parent / "tiny.yaml").read_text())
    (tmp_path / "study.yaml").write_text(STUDY + f"out: {tmp_path}/studies/small\n")
    page = pages_of(tmp_path / "study.yaml")
    assert "0 of 2 cells are done, 2 missing; 0 tokens trained." in page.html()
    before = page.state()
    folder = tmp_path / "studies/small"
    folder.mkdir(parents=True)
    (folder / "outcomes.json").write_text('{"gqa/seed-1": {"exit_code": 1, "last_lines": ["error: a < b"]}}')
    assert page.state() != before
    assert "1 failed, 1 missing" in page.html() and "error: a &lt; b" in page.html()


class Changing(Pages):
    """A page of a study whose first cell goes on after it was shown for the first time."""

    shown = 0
    metrics: Path

    def html(self) -> str:
        text = super().html().replace("<h1", f"<p id='shown'>shown {self.shown}</p><h1", 1)
        if not self.shown:
            with self.metrics.open("a") as file:
                file.write("\n")
        self.shown += 1
        return text


@needs_browser
def test_a_browser_draws_the_losses_and_loads_the_page_again_when_a_cell_goes_on(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study.parent)  # the folder of a study is relative to it
    assert BROWSER is not None
    pages = Changing("small", lambda: [Part(label="", study=load_study(study))])
    pages.metrics = study.parent / "studies/small/cells/gqa/seed-1/metrics.jsonl"
    before = pages.metrics.read_bytes()
    try:
        with served(pages, Path("none")) as port:
            command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
            command += ["--virtual-time-budget=7000", "--enable-logging=stderr", "--dump-dom"]
            done = subprocess.run([*command, f"http://127.0.0.1:{port}/"], capture_output=True, text=True, timeout=120)
    finally:
        pages.metrics.write_bytes(before)
    assert done.returncode == 0, done.stderr
    assert "shown 1" in done.stdout and pages.shown == 2
    figure = done.stdout.partition("<figure")[2].partition("</figure>")[0]
    assert "<svg" in figure and figure.count("<path") + figure.count("<polyline") >= 2
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line and "favicon" not in line] == []
