"""Base files, dotted keys, overrides: who wins, what a change of `type` drops, where each value came from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.spec.load import Loaded, format_config, load_mapping, load_spec


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Dense(Strict):
    type: Literal["dense"]
    heads: int = Field(ge=1)
    bias: bool = False


class Routed(Strict):
    type: Literal["routed"]
    experts: int = Field(ge=1)
    top_k: int = Field(default=1, ge=1)


class Train(Strict):
    tokens: int = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    steps: list[int] = []


class Root(Strict):
    name: str = "run"
    attention: Annotated[Dense | Routed, Field(discriminator="type")]
    train: Train


BASE = """
attention:
  type: dense
  heads: 8
train:
  tokens: 1000
  steps: [1, 2, 3]
"""


class Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, text: str) -> Path:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def load(self, text: str, *overrides: str, **kwargs: Any) -> Loaded[Root]:
        self.write("x.yaml", text)
        return load_spec("x.yaml", overrides, root=Root, **kwargs)

    def refusal(self, text: str, *overrides: str, **kwargs: Any) -> str:
        with pytest.raises(SpecError) as caught:
            self.load(text, *overrides, **kwargs)
        return str(caught.value)


@pytest.fixture
def specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.chdir(tmp_path)
    folder = Folder(tmp_path)
    folder.write("base.yaml", BASE)
    return folder


def test_the_child_wins_key_by_key_and_lists_are_replaced(specs: Folder) -> None:
    spec = specs.load("base: base.yaml\ntrain:\n  steps: [9]\n").spec
    assert spec.train.tokens == 1000 and spec.train.steps == [9]
    assert spec.attention == Dense(type="dense", heads=8)


def test_bases_are_looked_up_beside_the_file_that_names_them(specs: Folder) -> None:
    specs.write("a/b/low.yaml", BASE)
    specs.write("a/mid.yaml", "base: b/low.yaml\ntrain.tokens: 2000\n")
    loaded = specs.load("base: a/mid.yaml\nname: top\n")
    assert loaded.spec.train.tokens == 2000
    assert loaded.origins["attention.heads"].text == "a/b/low.yaml:4"


def test_dotted_keys_are_nested_keys(specs: Folder) -> None:
    dotted = specs.load("attention.type: routed\nattention: {experts: 4}\ntrain: {tokens: 5}\n").spec
    assert dotted.attention == Routed(type="routed", experts=4)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (f"{BASE}\nattention.heads: 4\n", "x.yaml:9:1: attention.heads: is given twice; the first one is at x.yaml:4"),
        (f"{BASE}\nattention.heads.x: 4\n", "x.yaml:9:1: attention.heads.x: is given twice"),
        (f"train.tokens: 4\n{BASE}", "is given twice; the first one is at x.yaml:1"),
        ("a..b: 1", "x.yaml:1:1: 'a..b' is not a dotted key"),
        (".a: 1", "x.yaml:1:1: '.a' is not a dotted key"),
        ("'': 1", "x.yaml:1:1: '' is not a dotted key"),
        (".".join("a" * 60) + ": 1", "nested more than 32 levels"),
    ],
)
def test_a_key_that_is_given_both_ways_or_is_no_dotted_key_is_refused(specs: Folder, text: str, place: str) -> None:
    assert place in specs.refusal(text)


def test_overrides_win_and_follow_the_rules_of_yaml(specs: Folder) -> None:
    loaded = specs.load(
        "base: base.yaml\n",
        "train.tokens=1e6",
        "train.betas=[0.8, 1e-1]",
        'name="017"',
        "train.steps=[]",
    )
    assert loaded.spec.train == Train(tokens=1_000_000, betas=(0.8, 0.1), steps=[])
    assert loaded.spec.name == "017"
    assert loaded.origins["train.tokens"].text == "argument 'train.tokens=1e6'"


@pytest.mark.parametrize(
    "value", ["a b", "x # y", "a: b", "no", "12:30:45", "$(id)", "-x", "a=b", "!x", "&a", "*a", "%s"]
)
def test_the_text_of_an_override_is_taken_as_it_is(specs: Folder, value: str) -> None:
    assert specs.load("base: base.yaml\n", f"name={value}").spec.name == value


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.tokens"], "argument 'train.tokens': is not KEY=VALUE"),
        (["=3"], "is not KEY=VALUE"),
        (["--name=3"], "is not KEY=VALUE"),
        ([" name=3"], "is not KEY=VALUE"),
        (["train..tokens=3"], "is not a dotted key"),
        (["train.tokens=[1"], "argument 'train.tokens=[1': is not valid YAML"),
        (["name=&a"[:5] + '"x" y'], "is not valid YAML"),
        (
            ["train.tokens=1", "train.tokens=2"],
            "argument 'train.tokens=2': train.tokens: is given twice; the first one is at argument",
        ),
        (["train={tokens: 1}", "train.tokens=2"], "is given twice"),
        (["base=other.yaml"], "`base` can only stand in a file"),
        (["train.tokens=017"], "argument 'train.tokens=017': train.tokens: expected a whole number (> 0); got '017'"),
        (["train.tokens="], "got nothing (null)"),
        (["train.tokens=" + "9" * 40], "64 bits"),
        (["name=a\udcff"], "not UTF-8"),
        (["nmae=x"], "argument 'nmae=x': nmae: unknown key. Did you mean name?"),
    ],
)
def test_wrong_overrides_name_the_argument(specs: Folder, overrides: list[str], message: str) -> None:
    assert message in specs.refusal("base: base.yaml\n", *overrides)


def test_a_change_of_type_drops_what_only_the_old_type_knows(specs: Folder) -> None:
    loaded = specs.load("base: base.yaml\nattention:\n  type: routed\n  experts: 4\n")
    assert loaded.spec.attention == Routed(type="routed", experts=4)
    assert loaded.notes == ["attention.heads = 8 (base.yaml:4) does not exist for attention.type routed: dropped"]


def test_a_change_of_type_on_the_command_line_counts_all_arguments_as_one_layer(specs: Folder) -> None:
    loaded = specs.load("base: base.yaml\n", "attention.experts=4", "attention.type=routed")
    assert loaded.spec.attention == Routed(type="routed", experts=4)
    message = specs.refusal("base: base.yaml\n", "attention.experts=4", "attention.type=routed", "attention.heads=2")
    assert (
        "argument 'attention.heads=2': attention.heads: is no key of attention.type routed, only of: dense." in message
    )


def test_a_layer_above_the_change_of_type_is_never_dropped_from(specs: Folder) -> None:
    specs.write("mid.yaml", "base: base.yaml\nattention: {type: routed, experts: 2}\n")
    message = specs.refusal("base: mid.yaml\nattention.heads: 4\n")
    assert message.startswith("x.yaml:2:1: attention.heads: is no key of attention.type routed, only of: dense.")


def test_changing_the_type_and_back_keeps_nothing_of_the_first_layer(specs: Folder) -> None:
    specs.write("mid.yaml", "base: base.yaml\nattention: {type: routed, experts: 2}\n")
    message = specs.refusal("base: mid.yaml\nattention.type: dense\n")
    assert "attention.heads: is missing" in message


def test_the_same_type_again_drops_nothing(specs: Folder) -> None:
    loaded = specs.load("base: base.yaml\nattention.type: dense\n")
    assert loaded.notes == [] and loaded.spec.attention == Dense(type="dense", heads=8)


def test_a_typing_mistake_in_a_lower_layer_is_reported_even_when_the_type_changes(specs: Folder) -> None:
    specs.write("base.yaml", BASE.replace("heads: 8", "haeds: 8"))
    message = specs.refusal("base: base.yaml\nattention: {type: routed, experts: 2}\n")
    assert message.startswith("base.yaml:4:3: attention.haeds: unknown key.")


def test_variants_lie_between_the_file_and_the_arguments(specs: Folder) -> None:
    variant: dict[str, Any] = {"attention.type": "routed", "attention": {"experts": 2, "top_k": 2}, "train.tokens": 7}
    loaded = specs.load("base: base.yaml\n", "attention.top_k=3", extra=[(variant, "study.yaml:12")])
    assert loaded.spec.attention == Routed(type="routed", experts=2, top_k=3)
    assert loaded.origins["train.tokens"].text == "study.yaml:12"
    message = specs.refusal("base: base.yaml\n", extra=[({"attention.topk": 2}, "study.yaml:12")])
    assert message.startswith("study.yaml:12: attention.topk: unknown key. Did you mean attention.top_k")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), object(), {1: 2}])
def test_variants_cannot_say_what_yaml_could_not(specs: Folder, value: object) -> None:
    assert specs.refusal("base: base.yaml\n", extra=[({"train.tokens": value}, "study.yaml:3")]).startswith(
        "study.yaml:3"
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x.yaml": "base: absent.yaml"}, "x.yaml:1:7: base: no such file: absent.yaml (looked for "),
        ({"x.yaml": "base: x.yaml"}, "based on each other: x.yaml -> x.yaml"),
        (
            {"x.yaml": "base: a.yaml", "a.yaml": "base: b.yaml", "b.yaml": "base: a.yaml"},
            "b.yaml:1:7: base: the files are based on each other: a.yaml -> b.yaml -> a.yaml",
        ),
        ({"x.yaml": "base: ."}, "x.yaml:1:7: base: no such file"),
        ({"x.yaml": "base: [base.yaml]"}, "expected the name of one YAML file"),
        ({"x.yaml": "base:"}, "expected the name of one YAML file"),
        ({"x.yaml": "base: 7"}, "expected the name of one YAML file"),
        ({"x.yaml": f"base: {'x' * 5000}"}, "x.yaml:1:7: base:"),
        ({"x.yaml": "base: a.yaml", "a.yaml": "a: [1"}, "a.yaml:1:6: is not valid YAML"),
        (
            {"x.yaml": "base: f0.yaml", **{f"f{i}.yaml": f"base: f{i + 1}.yaml" for i in range(30)}, "f30.yaml": BASE},
            "more than 16 files",
        ),
    ],
)
def test_wrong_bases_are_refused(specs: Folder, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        specs.write(name, text)
    with pytest.raises(SpecError) as caught:
        load_spec("x.yaml", root=Root)
    assert message in str(caught.value)


def test_a_spec_that_is_not_there_is_no_input(specs: Folder) -> None:
    with pytest.raises(NoInputError, match=r"absent\.yaml: no such file \(looked for /"):
        load_spec("absent.yaml", root=Root)


def test_every_resolved_value_is_shown_with_its_origin(specs: Folder) -> None:
    loaded = specs.load("base: base.yaml\nattention: {type: routed, experts: 4}\n", "train.betas=[0.5, 1e-5]")
    assert format_config(loaded).splitlines() == [
        "name              = run           # default",
        "attention.type    = routed        # x.yaml:2",
        "attention.experts = 4             # x.yaml:2",
        "attention.top_k   = 1             # default",
        "train.tokens      = 1000          # base.yaml:6",
        "train.betas       = [0.5, 1e-05]  # argument 'train.betas=[0.5, 1e-5]'",
        "train.steps       = [1, 2, 3]     # base.yaml:7",
        "# attention.heads = 8 (base.yaml:4) does not exist for attention.type routed: dropped",
    ]


def test_the_shown_config_given_as_arguments_is_the_same_spec(specs: Folder) -> None:
    loaded = specs.load("base: base.yaml\nname: 'a: [b] #'\n", "train.betas=[0.5, 1e-5]")
    shown = [line.rpartition("  # ")[0] for line in format_config(loaded).splitlines()]
    arguments = ["=".join(part.strip() for part in line.split(" = ", 1)) for line in shown]
    specs.write("nothing.yaml", "{}")
    assert load_spec("nothing.yaml", arguments, root=Root).spec == loaded.spec


def test_a_root_with_a_field_called_base_inherits_nothing_and_keeps_dots_in_free_names(specs: Folder) -> None:
    class Study(Strict):
        base: str
        variants: dict[str, dict[str, Any]]

    specs.write("study.yaml", "base: absent.yaml\nvariants:\n  gqa-1.5b: {attention.type: dense}\n")
    loaded = load_spec("study.yaml", root=Study)
    assert loaded.spec == Study(base="absent.yaml", variants={"gqa-1.5b": {"attention.type": "dense"}})
    assert loaded.origins["variants.gqa-1.5b.attention.type"].text == "study.yaml:3"


def test_a_raw_mapping_keeps_its_keys_and_places(specs: Folder) -> None:
    specs.write("raw.yaml", "base: base.yaml\na.b: 1\n")
    raw = load_mapping("raw.yaml")
    assert raw.plain() == {"base": "base.yaml", "a.b": 1} and raw.value["a.b"].at.short == "raw.yaml:2"
    assert load_mapping("raw.yaml", inherit=True).plain()["a"] == {"b": 1}
