"""The real Spec: files of the repository load, the mistakes people make are named, and no input gives a traceback."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from headway.data.corpus.config import CorpusConfig
from headway.launcher.base.errors import HeadwayError, SpecError
from headway.launcher.spec.load import format_config, load_spec
from headway.launcher.spec.merge import format_value
from headway.launcher.spec.spec import Spec

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "yaml/base/tiny.yaml"


def kind_of(file: Path) -> type[BaseModel]:
    text = yaml.safe_load(file.read_text())
    if "tasks" in text:
        from headway.launcher.study.probe_config import ProbeConfig

        return ProbeConfig
    if "variants" in text:
        from headway.launcher.study.config import StudyConfig

        return StudyConfig
    return CorpusConfig if "corpus" in text else Spec


@pytest.mark.parametrize("file", sorted((ROOT / "yaml").rglob("*.yaml")), ids=lambda file: str(file.relative_to(ROOT)))
def test_every_spec_of_the_repository_is_valid(file: Path) -> None:
    loaded = load_spec(file, root=kind_of(file))
    assert all(loaded.origins[key].text for key in loaded.origins)
    assert format_config(loaded)


def refusal(*overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load_spec(TINY, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["attention.type=rqga"],
            "attention.type: 'rqga' is not a known type. Did you mean rgqa? Legal: block_sparse, dynamic_gqa, ",
        ),
        (
            ["attention.topk=1"],
            "attention.topk: unknown key. Did you mean attention.top_k, which only exists for attention.type: ",
        ),
        (["attention.type=rgqa", "attention.top_k=9"], "attention.top_k: 9"),
        (["attention.kv_heads=3"], "attention.kv_heads: "),
        (["lr=1"], "lr: unknown key. Did you mean optimizer.lr?"),
        (["zero=2"], "zero: unknown key. Did you mean parallel.zero?"),
        (["parallel.zero=0"], "parallel.zero: 0 is not a known value. Legal: 1, 2, 3"),
        (["parallel.precision=fp16"], "parallel.precision: 'fp16' is not a known value."),
        (["train.micro_batch=5"], "train.global_batch: "),
        (["data.source={type: mds}"], "data.source.path: is missing"),
    ],
)
def test_common_mistakes_are_named(overrides: list[str], message: str) -> None:
    assert message in refusal(*overrides)


def test_a_spec_loads_and_fails_within_a_second(tmp_path: Path) -> None:
    start = time.process_time()
    load_spec(TINY)
    refusal("attention.topk=1")
    assert time.process_time() - start < 1  # measured: 0.05 s


def test_a_study_like_change_of_mechanism_records_what_it_drops() -> None:
    extra = [({"attention.type": "switchhead", "attention.experts": 4, "attention.top_k": 2}, "study.yaml:9")]
    loaded = load_spec(TINY, extra=extra)
    assert loaded.spec.attention.type == "switchhead"
    assert loaded.notes and all(
        "does not exist for attention.type switchhead: dropped" in note for note in loaded.notes
    )


# ---------------------------------------------------------------- mutations: a result or a SpecError, nothing else

POISON = [
    "~",
    "",
    "{}",
    "[]",
    "[[]]",
    "{a: {b: c}}",
    "true",
    "no",
    "-1",
    "0",
    "1e308",
    "1e400",
    "-.inf",
    ".nan",
    "9" * 30,
    "9" * 5000,
    "0x10",
    "017",
    "1:30",
    "''",
    '"\\u0000"',
    '"\\ud800"',
    "'\u202e'",
    "x" * 3000,
    "../../etc/passwd",
    "$(id)",
    "!!python/name:os.system",
    "&a [*a]",
    "*a",
    "<<: {a: 1}",
    "? x",
    "\t1",
    "- 1",
    "[1, 2",
    "{a: 1",
    "a: b",
    "|\n  text",
    "2024-01-01",
    "!!binary aGk=",
    "%",
    "@",
    "`",
    "1\n---\nb: 1",
]


def mutate(lines: list[str], rng: random.Random) -> bytes:
    lines = list(lines)
    at = rng.randrange(len(lines))
    key, colon, value = lines[at].partition(":")
    match rng.randrange(14):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[at])
        case 2:
            lines[at] = key[: -rng.randrange(1, 3)] + rng.choice(["", "x", "_", ".", "é", "\x00", "'"]) + colon + value
        case 3 | 4 | 5 | 6:
            lines[at] = f"{key}{colon} {rng.choice(POISON)}"
        case 7:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        case 8:
            lines[at] = "\t" * rng.randrange(1, 3) + lines[at].lstrip()
        case 9:
            lines[at] = " " * rng.randrange(7) + lines[at].lstrip()
        case 10:
            lines.insert(
                at,
                rng.choice(
                    [
                        "base: x.yaml",
                        "base: .",
                        "attention.type: mha",
                        "train: 3",
                        "a.b.c: 1",
                        "...",
                        "---",
                        "train.tokens: 7",
                    ]
                ),
            )
        case 11:
            lines[at] = f"{key}{colon} {rng.choice('[{')}" * rng.choice([1, 40, 1500])
        case 12:
            raw = bytearray("\n".join(lines).encode())
            raw[rng.randrange(len(raw))] = rng.randrange(256)
            return bytes(raw)
        case _:
            return rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b""]) + "\r\n".join(lines).encode()
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def test_mutated_specs_give_a_spec_or_a_located_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = TINY.read_text().splitlines()
    rng, accepted, refused = random.Random(20), 0, 0
    for _ in range(400):
        raw = mutate(lines, rng)
        Path("x.yaml").write_bytes(raw)
        try:
            load_spec("x.yaml")
            accepted += 1
        except SpecError as error:
            refused += 1
            for line in str(error).splitlines():
                assert line.startswith(("x.yaml", "and ")) and line.isprintable() and len(line) < 1200, (raw, line)
    assert accepted > 20 and refused > 200  # else the mutations test nothing


def test_mutated_overrides_give_a_spec_or_a_message() -> None:
    rng = random.Random(21)
    keys = [
        *load_spec(TINY).origins,
        "attention",
        "data",
        "model",
        "data.source",
        "a",
        "",
        ".",
        "base",
        "attention..type",
        "é",
        "-x",
        "[0]",
    ]
    refused = 0
    for _ in range(300):
        argument = f"{rng.choice(keys)}{rng.choice(['=', '=', '=', '', '=='])}{rng.choice(POISON)}"
        try:
            load_spec(
                TINY,
                [
                    argument,
                    *([f"attention.type={rng.choice(['gqa', 'switchhead', 'mha'])}"] if rng.random() < 0.3 else []),
                ],
            )
        except HeadwayError as error:
            refused += 1
            assert error.exit_code == 64 and all(line.isprintable() for line in str(error).splitlines()), argument
    assert refused > 100


def test_a_resolved_spec_given_as_arguments_is_the_same_spec(tmp_path: Path) -> None:
    loaded = load_spec(TINY, ["optimizer.lr=3.3333333333333335e-4", "run_dir=a folder/x #1"])
    nothing = tmp_path / "nothing.yaml"
    nothing.write_text("{}")
    values = {}
    for key in loaded.origins:
        value = loaded.spec
        for part in key.split("."):
            value = getattr(value, part)
        values[key] = value
    again = load_spec(nothing, [f"{key}={format_value(value)}" for key, value in values.items()])
    assert again.spec == loaded.spec
