"""Every `headway` command of the README and docs is right as it is written: it parses, and runs as far as it can here.

Commands run in a folder with the project's `yaml/`, small datasets and a small trained run. `REDUCED` makes long ones
short; `NOT_EXECUTED` lists, with the reason, those that only parse.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import pytest

from headway.launcher.cli import parser as cli
from headway.launcher.study.config import load_study
from headway.launcher.study.probe_config import load_probe

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted((ROOT / "docs").glob("*.md"))

NEW = "<a new name>"
PLACEHOLDERS = {
    "RUN": "runs/quickstart",
    "RUN...": "runs/quickstart",
    "SPEC": "spec.yaml",
    "STUDY": "study.yaml",
    "OUT": NEW,
    "DIR": NEW,
    "LLAMA": "llama",
    "PAIRS": "datasets/functions",
    "FOLDER": "llama",
    "FOLDER...": ".",
    "VERB": "plan",
    "KEY=VALUE": "seed=3",
    "N": "8",
    "OWNER/NAME": "someone/model",
}
"""What a reader would put in place of a word."""
OF_VERB = {
    # tests/launcher/evaluate/test_harness.py has tasks of the harness
    "eval": {
        "arc_easy,lambada_openai": "questions.jsonl",
        "arc_easy": "questions.jsonl",
        "runs/summarise": "runs/quickstart",
        "runs/summarise-encoder-decoder": "runs/quickstart",
    },
    "generate": {"OUT": "exported", "runs/summarise-encoder-decoder": "runs/quickstart"},
    "inspect": {"runs/first": "runs/quickstart", "heldout.txt": "corpora/text/0.txt"},
    "export": {"4000": "4"},  # a checkpoint of the small run
}
"""The same for one verb alone."""
TEXT_CORPUS = ["corpus.type=text", "corpus.paths=[corpora/text]"]
PAIRS_CORPUS = [
    "corpus={type: pairs, paths: [held.jsonl], prompt: article, target: highlights}",
    "tokenizer={type: file, path: datasets/stdlib/tokenizer.json}",
]
REDUCED = {
    "data build yaml/data/functions.yaml": PAIRS_CORPUS,
    "data build yaml/data/stdlib.yaml": TEXT_CORPUS,
    "data build stdlib": TEXT_CORPUS,
    "train": ["--dry-run"],
    "study run": ["--dry-run"],
    "probe run": ["--dry-run"],
    "board": ["--no-server"],
    "eval": ["--new-tokens", "8"],
    "bench decode": ["--rounds", "2", "--new", "2"],
    "bench step": ["--steps", "2"],
    "bench data": ["--steps", "2"],
    "bench documents": ["--lengths", "32", "--rounds", "2"],
    "bench mechanism": ["--lengths", "32", "--rounds", "2", "--tokens", "64"],
}
"""Words behind commands that start so, which would otherwise take minutes or not end."""
OF_A_PAGE = "needs the files of its page, in order; tests/house/test_uptraining_page.py"
NOT_EXECUTED = {
    "chaos": "takes three minutes, and torchrun; tests/faults/test_chaos.py runs it",
    "board RUN --send": "needs a tracker; tests/launcher/board/test_trackers.py",
    "bench mechanism yaml/studies/frontier.yaml": "models of 940M; tests/launcher/bench/test_bench_mechanism.py",
    "bench peers": "takes half a minute; tests/launcher/bench/test_bench_peers.py runs it",
    "bench gpu": "needs a GPU; tests/launcher/bench/test_bench_gpu.py runs parts of it on a CPU",
    "bench report": "needs the rows of a GPU, and --refit changes the planner; tests/launcher/bench/test_bench_gpu.py",
    "study merge": "needs trained cells; tests/launcher/study/test_merge.py",
    "compare": "needs two trained runs; tests/launcher/study/test_compare_runs.py",
    "study plan": "needs a trained pilot; tests/launcher/study/test_seeds_plan.py",
    "eval STUDY": "needs trained cells; tests/launcher/evaluate/test_eval_command.py",
    "eval studies/frontier/sizes/0.5m": "needs trained cells; tests/launcher/evaluate/test_eval_command.py",
    "study report": "needs trained cells; tests/launcher/study/test_study.py",
    "study watch": "serves until a signal; tests/launcher/study/test_study_watch.py",
    "init": "writes into the working folder; tests/launcher/cli/test_first_project.py",
    "rm": "deletes the run that the other commands read; tests/launcher/cli/test_removing.py",
    "probe report": "needs trained cells; tests/launcher/study/test_probe.py",
    "export RUN OUT --to hf --push": "needs the Hugging Face hub; tests/launcher/exchange/test_hub.py",
    "import hf://OWNER/NAME": "needs the Hugging Face hub; tests/launcher/exchange/test_hub.py",
    "convert imported": OF_A_PAGE,
    "data build corpus.yaml": OF_A_PAGE,
    "export studies/uptraining/cells/gqa-align-a0.01/seed-1": OF_A_PAGE,
}
SPEC = """
name: spec
model: {width: 32, layers: 2, ffn_width: 48, init_std: 0.05}
attention: {type: rgqa, heads: 8, kv_heads: 2, head_dim: 8, top_k: 1}
data: {seq_len: 32, source: {type: synthetic, task: mqar, vocab_size: 32, pairs: 4, queries: 4}}
optimizer: {lr: 3.0e-3}
train: {tokens: 10240, global_batch: 16, micro_batch: 2, validation_tokens: 512}
launch: {threads: 1}
"""
STUDY = """
study: small
base: spec.yaml
seeds: [1]
variants: {gqa: {attention.type: gqa}, rgqa-k1: {attention.top_k: 1}}
"""
SMALL_RUN = [
    "schedule.warmup_tokens=0",
    "model={width: 32, layers: 1, ffn_width: 48}",
    "attention={heads: 4, head_dim: 8}",
    "data.seq_len=64",
    "train={tokens: 1024, validation_tokens: 256}",
    "launch.threads=1",
]


# Finding commands.


@dataclass(frozen=True)
class Documented:
    place: str  # page:line
    text: str  # from `headway` to the end of the command
    inline: bool  # in running text, where a command may be named without its arguments


def commands_of(page: str, text: str) -> list[Documented]:
    """Commands in fenced and indented blocks, one a line, and in inline code."""
    found: list[Documented] = []
    prose: list[str] = []
    fence = False
    for number, line in enumerate(re.sub(r"\s*\\\n\s*", " ", text).splitlines(), 1):
        if line.lstrip().startswith("```"):
            fence = not fence
        in_block = fence or line.startswith("    ")
        if in_block and (command := re.match(r"\s*(?:\$ )?(headway\s.*)", line)):
            # Three spaces or a # begin a description; > and && go on with the shell.
            text = re.split(r"\s{3,}|\s+#|\s+(?:>|&&)\s", command[1])[0]
            found.append(Documented(f"{page}:{number}", text, inline=False))
        prose.append("" if in_block or line.lstrip().startswith("```") else line)
    whole = "\n".join(prose)
    for match in re.finditer(r"`(headway\s[^`]+)`", whole):
        number = whole.count("\n", 0, match.start()) + 1
        found.append(Documented(f"{page}:{number}", " ".join(match[1].split()), inline=True))
    return found


def expanded(command: str) -> list[list[str]]:
    """`headway a|b RUN [--c]` -> each command that it stands for, in words."""
    texts = [command]
    while any("[" in text and "]" in text and " [" in text for text in texts):
        texts = [form for text in texts for form in (re.sub(r" \[[^]]*\]", "", text, count=1), _unbracketed(text))]
    choices = [[word.split("|") for word in shlex.split(text)] for text in dict.fromkeys(texts)]
    return [list(words) for choice in choices for words in itertools.product(*choice)]


def _unbracketed(text: str) -> str:
    return re.sub(r" \[([^]]*)\]", r" \1", text, count=1)


def starting_so(words: list[str], table: dict[str, Any]) -> Any:
    """The entry of `table` for a command, or None."""
    return next((value for start, value in table.items() if words[1:][: len(start.split())] == start.split()), None)


def filled_in(words: list[str]) -> list[str]:
    table = {**PLACEHOLDERS, **(starting_so(words, OF_VERB) or {})}
    return [table.get(word, word) for word in words]


# Parsing them.


class Refused(Exception):
    """What the parser says."""


class Strict(cli.Parser):
    def error(self, message: str) -> NoReturn:
        raise Refused(message)


def strict_parser() -> argparse.ArgumentParser:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "Parser", Strict)
        return cli.make_parser()


PARSER = strict_parser()


def why_not(words: list[str], *, inline: bool) -> str | None:
    """None for a command that parses; in running text also for one whose arguments are left out."""
    if inline:
        words = [word for word in words if word != "..."]
        known = options_of(PARSER, words[1:])
        if wrong := [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]:
            return f"no such option: {wrong[0]}"
    try:
        args, rest = PARSER.parse_known_args(words[1:])
    except SystemExit as e:  # --help
        return None if not e.code else "exits"
    except Refused as e:
        return None if inline and str(e).startswith("the following arguments are required") else str(e)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in args]
    return f"unrecognized: {unknown[0]}" if unknown else None


def options_of(parser: argparse.ArgumentParser, words: list[str]) -> set[str]:
    """Options of the verb that `words` begin with."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and words and words[0] in action.choices:
            return options_of(action.choices[words[0]], words[1:])
    return {option for action in parser._actions for option in action.option_strings}


def is_whole(words: list[str]) -> bool:
    return why_not(words, inline=False) is None


DOCUMENTED = [
    (documented, words)
    for page in PAGES
    for documented in commands_of(str(page.relative_to(ROOT)), page.read_text())
    for words in expanded(documented.text)
]


def test_every_documented_command_parses() -> None:
    assert len(DOCUMENTED) > 250
    found = {f"{d.place}: {shlex.join(words)}": why_not(filled_in(words), inline=d.inline) for d, words in DOCUMENTED}
    assert {command: why for command, why in found.items() if why is not None} == {}


def test_commands_are_found_in_every_form() -> None:
    block = '```\nheadway c "d "  # why\n$ headway e \\\n  f\n```\n'
    text = f"A `headway\ntrain SPEC`.\n\n    headway a b   what it does\n\n{block}"
    assert [(d.text, d.inline) for d in commands_of("page", text)] == [
        ("headway a b", False),
        ('headway c "d "', False),
        ("headway e f", False),
        ("headway train SPEC", True),
    ]


@pytest.mark.parametrize(
    ("command", "inline"),
    [
        ("headway trian spec.yaml", True),
        ("headway bench speed SPEC", False),
        ("headway train spec.yaml --node-number 0", False),
        ("headway export --format hf", True),
        ("headway export RUN OUT", False),
        ("headway doctor launch.processes=2", False),
        ("headway plan spec.yaml --gpus many", False),
    ],
)
def test_a_command_that_is_wrong_is_seen(command: str, inline: bool) -> None:
    assert why_not(filled_in(shlex.split(command)), inline=inline)


def test_examples_of_the_help_and_of_yaml_files_parse() -> None:
    comments = [line for file in (ROOT / "yaml").rglob("*.yaml") for line in file.read_text().splitlines()]
    commands = re.findall(r"^#.*?(headway [a-z-]+ .*\.yaml.*)$", "\n".join(comments), re.M)
    commands = [command.partition("`")[0] for command in commands] + [
        example for verb in cli.all_verbs() for each in (verb, *verb.actions) for example in each.examples
    ]
    assert len(commands) > 30
    commands = [re.split(r"\s{3,}|\s+(?:>|&&)\s", command)[0] for command in commands]
    assert {c: why for c in commands if (why := why_not(shlex.split(c), inline=False))} == {}


# Running them.


def documents() -> list[str]:
    """Text with words enough for a vocabulary of 4,096 tokens, as that of the standard library has."""
    random = Random(0)
    words = ["".join(random.choices("abcdefghijklmnop", k=random.randint(5, 9))) for _ in range(3000)] * 4
    random.shuffle(words)
    return [" ".join(words[i : i + 120]) for i in range(0, len(words), 120)]


@pytest.fixture(scope="module")
def workspace(headway_once, tmp_path_factory):
    """`headway` in a folder that has what the pages speak of, small."""
    folder = headway_once.folder
    shutil.copytree(ROOT / "yaml", folder / "yaml")
    (folder / "spec.yaml").write_text(SPEC)
    (folder / "study.yaml").write_text(STUDY)
    texts = documents()
    (folder / "corpora/text").mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"corpora/text/{number}.txt").write_text(text)
    (folder / "corpora/books").mkdir()
    (folder / "questions.jsonl").write_text('{"query": "a b", "choices": [" c", " d"], "gold": 1}\n')
    pairs = "".join(json.dumps({"article": text[:200], "highlights": text[200:220]}) + "\n" for text in texts)
    (folder / "held.jsonl").write_text(pairs)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "corpora/books/a.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    for command in (
        ["data", "build", "yaml/data/stdlib.yaml", *TEXT_CORPUS],
        ["data", "build", "yaml/data/functions.yaml", *PAIRS_CORPUS],
        ["train", "yaml/base/quickstart.yaml", *SMALL_RUN],
        ["export", "runs/quickstart", "llama", "--to", "hf"],
        ["export", "runs/quickstart", "exported", "--to", "safetensors"],
    ):
        done = headway_once.run(*command)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    return headway_once


TO_RUN = {
    shlex.join(filled_in(words)): shlex.join(words)
    for documented, words in DOCUMENTED
    if is_whole(filled_in(words))
    and starting_so(words, NOT_EXECUTED) is None
    and not documented.place.startswith("docs/own-data.md")  # in order: tests/house/test_own_data_page.py
    and "--extend" not in words  # needs a trained run of that spec; tests/launcher/train/test_extending.py
}


@pytest.mark.parametrize("command", TO_RUN, ids=list(TO_RUN.values()))
def test_a_documented_command_runs(command: str, workspace) -> None:
    new = f"new-{list(TO_RUN).index(command)}"
    words = [new if word == NEW else word for word in shlex.split(command)]
    more = starting_so(words, REDUCED) or []
    if "--dry-run" in words or "--print-config" in words:
        more = []
    done = workspace.run(*words[1:], *more)
    assert done.returncode == 0, f"{shlex.join([*words, *more])} ended with {done.returncode}:\n{done.stderr}"


@pytest.mark.parametrize("table", [NOT_EXECUTED, REDUCED, OF_VERB], ids=["NOT_EXECUTED", "REDUCED", "OF_VERB"])
def test_tables_hold_only_what_is_documented(table: dict[str, Any]) -> None:
    assert [s for s in table if all(starting_so(words, {s: True}) is None for _, words in DOCUMENTED)] == []


def test_reasons_name_tests_that_exist() -> None:
    files = re.findall(r"tests/[\w/]+\.py", " ".join(NOT_EXECUTED.values()))
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_specs_of_commands_that_are_not_run_load() -> None:
    load = {"study": load_study, "probe": load_probe}
    seen = set()
    for _, words in DOCUMENTED:
        named = starting_so(words, NOT_EXECUTED) and words[1] in load and len(words) > 3
        if named and words[3] not in PLACEHOLDERS:
            load[words[1]](ROOT / words[3])
            seen.add(words[1])
    assert seen == set(load)
