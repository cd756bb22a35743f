"""The ten commands of docs/own-data.md, in order, in a folder that has what the page asks for."""

from __future__ import annotations

import random
import re
import shlex
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs/own-data.md"
SHORT = ["launch.threads=1", "launch.device=cpu", "train.tokens=4096", "train.validate_every_tokens=2048"]
SHORT += ["schedule.warmup_tokens=1024", "checkpoint.every_tokens=2048", "train.validation_tokens=2048"]
MORE = {
    "train": SHORT,
    "study run": [*SHORT, "--no-timing"],
}


def test_the_ten_commands_lead_from_a_folder_of_texts_to_a_report(headway) -> None:
    words = ["".join(random.Random(n).choices("abcdefghijklmnop", k=6)) for n in range(3000)] * 4
    random.Random(0).shuffle(words)
    for name, texts in (("texts", words[2000:]), ("heldout", words[:2000])):
        (headway.folder / name).mkdir()
        for at in range(0, len(texts), 100):
            (headway.folder / name / f"{at}.txt").write_text(" ".join(texts[at : at + 100]))
    commands = re.findall(r"^    (headway .*)$", PAGE.read_text(), re.M)
    assert len(commands) == 10
    for command in commands:
        words = shlex.split(command)[1:]
        more = next((more for verb, more in MORE.items() if words[: len(verb.split())] == verb.split()), [])
        done = headway.run(*words, *more)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    page = (headway.folder / "studies/attention/report.md").read_text()
    assert "## Evaluation" in page and r"heldout/bits\_per\_byte" in page
    assert (headway.folder / "studies/attention/report.html").is_file()
    assert (headway.folder / "exported/config.json").is_file()
