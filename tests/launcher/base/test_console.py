"""What reaches a terminal, a pipe and a script: bars, colour, `--quiet`, `--json`."""

from __future__ import annotations

import io
import json
import os
import pty
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from headway.launcher.base import console
from headway.launcher.base.errors import SpecError

COUNT = """
    import time
    with console.progress("count", 40, "things") as bar:
        for i in range(40):
            time.sleep(0.03)
            bar.update()
            if i == 30:
                console.say("a line between")
"""
CONTROL = {chr(i) for i in range(32)} - {"\n"}


def command(code: str) -> list[str]:
    return [sys.executable, "-P", "-c", "from headway.launcher.base import console\n" + textwrap.dedent(code)]


def environment(**changes: str) -> dict[str, str]:
    base = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    return {**base, "TERM": "xterm", **changes}


def on_terminal(words: list[str], cwd: Path | None = None, **changes: str) -> tuple[int, str]:
    """(exit status, all that a terminal is sent), stdout and stderr together; 100 columns."""
    ours, theirs = pty.openpty()
    try:
        import fcntl
        import termios

        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        process = subprocess.Popen(
            words, cwd=cwd, env=environment(**changes), stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        said = b""
        while True:
            try:
                got = os.read(ours, 1 << 16)
            except OSError:  # the last process that had it open has ended
                break
            if not got:
                break
            said += got
        return process.wait(timeout=60), said.decode().replace("\r\n", "\n")
    finally:
        os.close(ours)


def through_pipes(words: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=environment(**changes), capture_output=True, text=True, timeout=60)


def shown_at_end(said: str) -> list[str]:
    """The lines of a terminal after everything that was sent: a carriage return writes over what stands there."""
    lines = []
    for line in said.split("\n"):
        screen = ""
        for part in line.split("\r"):
            screen = part + screen[len(part) :]
        lines.append(screen.rstrip())
    return lines


# ---------------------------------------------------------------- progress


def test_a_terminal_shows_a_bar_that_lines_do_not_break_and_that_goes_when_the_work_is_done():
    code, said = on_terminal(command(COUNT))
    assert code == 0 and "count:" in said and "/40" in said and "%" in said
    assert shown_at_end(said) == ["a line between", ""]


def test_a_pipe_gets_lines_alone():
    done = through_pipes(command(COUNT))
    assert (done.returncode, done.stdout, done.stderr) == (0, "a line between\n", "")


@pytest.mark.parametrize("how", ["dumb", "quiet"])
def test_a_dumb_terminal_and_a_quiet_command_show_no_bar(how):
    code = COUNT if how == "dumb" else "with console.output(quiet=True):\n" + textwrap.indent(COUNT, "    ")
    _, said = on_terminal(command(code), TERM="dumb" if how == "dumb" else "xterm")
    assert said == ("a line between\n" if how == "dumb" else "")


def test_no_color_leaves_the_bar():
    _, said = on_terminal(command(COUNT), NO_COLOR="1")
    assert "count:" in said and "\x1b[1;31m" not in said


def test_time_goes_on_while_one_piece_takes_long_unless_something_is_measured():
    work = "import time\nwith console.progress('one', 1, tick={}) as bar:\n    time.sleep(1.7)\n"
    _, said = on_terminal(command(work.format(True)))
    assert "[00:00<" in said and "[00:01<" in said
    _, said = on_terminal(command(work.format(False)))
    assert "one:" not in said


def test_work_with_an_estimate_of_its_own_shows_no_other():
    work = "import time\nwith console.progress('cells', 2, 'cells', rate={}) as bar:\n"
    work += "    time.sleep(0.6)\n    bar.update()\n    time.sleep(0.6)\n"
    _, said = on_terminal(command(work.format(False)))
    assert "1/2 cells [00:0" in said and "cells/s" not in said and "<" not in said
    _, said = on_terminal(command(work.format(True)))
    assert "1/2 [00:0" in said and "<00:0" in said


def test_work_that_is_done_at_once_shows_nothing():
    _, said = on_terminal(command("with console.progress('quick', 3) as bar:\n    bar.update(3)\n"))
    assert said.strip("\r \n") == ""


def test_long_work_without_a_terminal_writes_a_line_from_time_to_time(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.progress("encode", 4_000_000, "B") as bar:
        for _ in range(4):
            now[0] += 31
            bar.update(1_000_000)
    assert capsys.readouterr().err == "encode: 50 % of 4M B after 1m02s\nencode: 100 % of 4M B after 2m04s\n"
    with console.progress("count", lines=False) as bar:
        now[0] += 100
        bar.update()
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- colour


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("terminal", "variables", "coloured"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),  # set and empty is as if it was not set
        (True, {"TERM": "dumb"}, False),
        (False, {"FORCE_COLOR": "1"}, True),
        (False, {"FORCE_COLOR": "0"}, False),
        (False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_colour_is_for_terminals_and_the_two_variables_have_the_last_word(terminal, variables, coloured, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ("\x1b[" in console.paint("text", "red", Screen() if terminal else io.StringIO())) == coloured


def test_the_command_line_says_errors_in_red_on_a_terminal_and_plainly_in_a_pipe(headway):
    words = headway.command("train", "missing.yaml")
    variables = headway.server.environment
    code, said = on_terminal(words, headway.folder, **variables)
    assert code == 66 and "\x1b[1;31merror:\x1b[0m missing.yaml" in said
    code, said = on_terminal(words, headway.folder, NO_COLOR="1", **variables)
    assert code == 66 and said.startswith("error: missing.yaml") and "\x1b" not in said
    code, said = on_terminal(headway.command("fly"), headway.folder, **variables)
    assert code == 64 and "\x1b[1;31merror:\x1b[0m" in said
    done = headway.run("train", "missing.yaml")
    assert done.stderr.startswith("error: missing.yaml") and not CONTROL & set(done.stderr)


# ---------------------------------------------------------------- quiet and json


def speak() -> None:
    print("printed")
    console.say("said")
    console.note("noted")
    subprocess.run(["echo", "child"], check=True)
    console.alert("alerted")
    console.warn("warned")
    console.error(SpecError("mistaken"))
    console.result("found")
    console.result("in short", only_quiet=True)


STDERR = ["alerted", "warned", "error: mistaken"]


def test_without_options_results_and_what_is_done_are_on_stdout(capfd):
    with console.output():
        speak()
    said = capfd.readouterr()
    assert said.out.split("\n") == ["printed", "said", "child", "alerted", "found", ""]
    assert said.err.splitlines() == ["noted", "warned", "error: mistaken"]


def test_quiet_leaves_the_result_and_what_went_wrong(capfd):
    with console.output(quiet=True):
        assert console.quiet()
        speak()
    said = capfd.readouterr()
    assert said.out == "found\nin short\n" and said.err.splitlines() == STDERR
    assert not console.quiet()


def test_json_has_stdout_to_itself(capfd):
    with console.output(json=True):
        speak()
        console.emit({"loss": 1.5, "rows": (float("nan"), float("inf"))})
    said = capfd.readouterr()
    assert json.loads(said.out) == {"loss": 1.5, "rows": [None, None]}
    assert said.err.splitlines() == ["printed", "said", "noted", "child", *STDERR, "found"]


def test_quiet_and_json_together_leave_json_and_what_went_wrong(capfd):
    with console.output(quiet=True, json=True):
        speak()
        console.emit([1])
    said = capfd.readouterr()
    assert json.loads(said.out) == [1] and said.err.splitlines() == STDERR


def test_stdout_is_back_after_a_mistake(capfd):
    with pytest.raises(SpecError), console.output(json=True):
        raise SpecError("no")
    print("here")
    os.write(1, b"there\n")
    assert capfd.readouterr() == ("here\nthere\n", "")
