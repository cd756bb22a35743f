"""A wrong key, type or value is one line with place, dotted key, what is wrong and what is legal; never a traceback."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from headway.launcher.base.errors import SpecError, exit_code, format_error
from headway.launcher.spec.load import validate
from headway.launcher.spec.yamlio import parse_yaml


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Dense(Strict):
    type: Literal["dense"] = "dense"
    heads: int = Field(default=8, ge=1, le=512)
    groups: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Dense:
        if self.heads % self.groups:
            raise ValueError(f"groups: {self.heads} heads do not divide into {self.groups} groups; use 1 or 2")
        return self


class Routed(Strict):
    type: Literal["routed"] = "routed"
    top_k: int = Field(ge=1, description="heads that a token uses")


class Optimizer(Strict):
    lr: float = Field(default=1e-3, gt=0, le=10)
    betas: tuple[float, float] = (0.9, 0.95)
    fused: bool = True
    decay: float | None = None


class Rule(Strict):
    ratio: float = Field(gt=0, le=1)


class Needed(Strict):
    k: int | Rule


class Root(Strict):
    name: str = Field(default="run", pattern="^[a-z]+$")
    tokens: int = Field(gt=0)
    zero: Literal[1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    attention: Annotated[Dense | Routed, Field(discriminator="type")] = Dense()
    optimizer: Optimizer = Optimizer()
    paths: list[str] = []
    mixed: int | str | None = None
    nested: list[Annotated[Dense | Routed, Field(discriminator="type")]] = []
    sizes: dict[str, Optimizer] = {}
    k: int | list[int] | Rule = 1
    needed: Needed = Needed(k=1)

    @field_validator("name")
    @classmethod
    def _free(cls, value: str) -> str:
        if value == "taken":
            raise ValueError("'taken' is in use; choose another name")
        return value

    @model_validator(mode="after")
    def _check(self) -> Root:
        if self.tokens == 13:
            raise ValueError("optimizer.lr: does not go with 13 tokens")
        if self.tokens == 14:
            raise ValueError("fourteen: is no key, so this is about the whole spec")
        return self


def check(text: str) -> Root:
    return validate(parse_yaml(text, "x.yaml"), Root)


def refusal(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        check(text)
    return str(caught.value)


# text below a line `tokens: 1` -> the whole message
MESSAGES = {
    # a number, a list or a mapping may stand here: only the arm that was meant complains
    "k: 1.5": "x.yaml:2:1: k: expected a whole number or a mapping (key: value) or a list, such as [1, 2]; got 1.5. "
    "The nearest whole number is 2",
    "k: {ratio: 2}": "x.yaml:2:5: k.ratio: must be > 0, <= 1; got 2",
    "k: {ration: 0.5}": "x.yaml:2:5: k.ration: unknown key. Did you mean k.ratio? Legal keys here: ratio\n"
    "x.yaml:2:1: k.ratio: is missing and has no default; write a number (> 0, <= 1)",
    "needed: {}": "x.yaml:2:1: needed.k: is missing and has no default; write a whole number or a mapping (key: value)",
    "k: [1, x]": "x.yaml:2:8: k[1]: expected a whole number; got 'x'",
    "tokns: 2": "x.yaml:2:1: tokns: unknown key. Did you mean tokens? Legal keys here: "
    "name, tokens, zero, precision, attention, "
    "optimizer, paths, mixed, nested, sizes, k, needed",
    "optimizer: {l_r: 1}": (
        "x.yaml:2:13: optimizer.l_r: unknown key. Did you mean optimizer.lr? Legal keys here: lr, betas, fused, decay"
    ),
    "optimizer: {xyzzy: 1}": "x.yaml:2:13: optimizer.xyzzy: unknown key. Legal keys here: lr, betas, fused, decay",
    "attention: {top_k: 1, type: dense}": (
        "x.yaml:2:13: attention.top_k: is no key of attention.type dense, only of: routed. Legal keys "
        "here: type, heads, groups"
    ),
    "attention: {topk: 1, type: dense}": "x.yaml:2:13: attention.topk: unknown key. Did you mean "
    "attention.top_k, which only exists for "
    "attention.type: routed? Legal keys here: type, heads, groups",
    "attention: {type: ruoted}": (
        "x.yaml:2:13: attention.type: 'ruoted' is not a known type. Did you mean routed? Legal: dense, routed"
    ),
    "attention: {type: 3}": "x.yaml:2:13: attention.type: 3 is not a known type. Legal: dense, routed",
    "attention: {heads: 3}": "x.yaml:2:1: attention.type: is missing; write one of: dense, routed",
    "attention: dense": "x.yaml:2:1: attention: expected a mapping (key: value); got 'dense'. Write {type: dense, ...}",
    "attention:": "x.yaml:2:1: attention: expected a mapping (key: value); got nothing (null)",
    "attention:\n  type: routed": (
        "x.yaml:2:1: attention.top_k: is missing and has no default; write a whole number (>= 1): heads "
        "that a token uses"
    ),
    "attention: {type: dense, heads: 3}": (
        "x.yaml:2:1: attention.groups: 3 heads do not divide into 2 groups; use 1 or 2"
    ),
    "attention: {type: dense, heads: 0}": "x.yaml:2:26: attention.heads: must be >= 1, <= 512; got 0",
    "attention: {type: dense, heads: 2.5}": "x.yaml:2:26: attention.heads: expected a whole number (>= 1, <= 512); "
    "got 2.5. "
    "The nearest whole number is 2",
    "optimizer.lr: 1": None,
    "zero: 4": "x.yaml:2:1: zero: 4 is not a known value. Legal: 1, 2, 3",
    "zero: '2'": "x.yaml:2:1: zero: '2' is not a known value. Legal: 1, 2, 3. Remove the quotes: 2",
    "zero: true": "x.yaml:2:1: zero: true is not a known value. Legal: 1, 2, 3",
    "precision: bf61": "x.yaml:2:1: precision: 'bf61' is not a known value. Did you mean bf16? Legal: fp32, bf16",
    "precision: 32": "x.yaml:2:1: precision: 32 is not a known value. Legal: fp32, bf16",
    "name: 017": "x.yaml:2:1: name: '017' does not match the pattern ^[a-z]+$",
    "name: 17": 'x.yaml:2:1: name: expected text; got 17. Put it in quotes if it is text: "17"',
    "name: taken": "x.yaml:2:1: name: 'taken' is in use; choose another name",
    "paths: data.txt": "x.yaml:2:1: paths: expected a list, such as [a, b]; got 'data.txt'. Write [data.txt]",
    "paths: [a, 3]": 'x.yaml:2:12: paths[1]: expected text; got 3. Put it in quotes if it is text: "3"',
    "mixed: 2.5": "x.yaml:2:1: mixed: expected a whole number or text or null; got 2.5. "
    'Put it in quotes if it is text: "2.5"',
    "nested: [{type: routed, top_k: 1}, {type: dense, heads: x}]": (
        "x.yaml:2:50: nested[1].heads: expected a whole number (>= 1, <= 512); got 'x'"
    ),
    "sizes: {a.b: {lr: 0}}": "x.yaml:2:15: sizes.a.b.lr: must be > 0, <= 10; got 0",
    "sizes: {a: 3}": "x.yaml:2:9: sizes.a: expected a mapping (key: value); got 3",
    "zero: [1]": "x.yaml:2:1: zero: a list of 1 is not a known value. Legal: 1, 2, 3",
    "name: {a: 1}": "x.yaml:2:1: name: expected text; got a mapping",
}


@pytest.mark.parametrize("text", MESSAGES)
def test_message(text: str) -> None:
    message = MESSAGES[text]
    if message is None:
        check(f"tokens: 1\noptimizer: {{lr: {text.rpartition(' ')[2]}}}")
        return
    assert refusal(f"tokens: 1\n{text}") == message


LR = "x.yaml:2:13: optimizer.lr: expected a number (> 0, <= 10); got "
NUMBERS = {
    "017": "A leading zero is ambiguous: write 17, or 0o17 for the octal number 15",
    "08": "A leading zero is ambiguous: write 8",
    "1:30": "Write one number in the unit of the key",
    "12:30:45": "Write one number in the unit of the key",
    '"1e-4"': "Remove the quotes: 1e-4",
    "'0x1F'": "Remove the quotes: 0x1F",
    "10k": "Write 10e3",
    "1.5M": "Write 1.5e6",
    "'1,000'": "Write 1000",
    "1__000": "Write 1000",
    "25%": "Write 0.25",
    ".nan": "Write a finite number",
    "-.inf": "Write a finite number",
    "1e400": "Write a finite number",
    "1e-400": "Write a finite number",
    "no": "Write 1 or 0",
}


@pytest.mark.parametrize("written", NUMBERS)
def test_text_where_a_number_belongs_says_what_to_write(written: str) -> None:
    message = refusal(f"tokens: 1\noptimizer: {{lr: {written}}}")
    assert message.startswith(LR) and NUMBERS[written] in message


@pytest.mark.parametrize(
    ("written", "meant"), [("yes", "true"), ("On", "true"), ("no", "false"), ("off", "false"), ("'true'", "true")]
)
def test_yes_and_no_where_a_truth_value_belongs_say_what_to_write(written: str, meant: str) -> None:
    message = refusal(f"tokens: 1\noptimizer: {{fused: {written}}}")
    assert "optimizer.fused: expected true or false" in message and f". Write {meant}" in message


@pytest.mark.parametrize("written", ["1", "0", "1.0", "~", "[true]"])
def test_nothing_else_is_a_truth_value(written: str) -> None:
    assert "expected true or false" in refusal(f"tokens: 1\noptimizer: {{fused: {written}}}")


@pytest.mark.parametrize(
    ("written", "value"), [("1e6", 10**6), ("1.5e3", 1500), ("2.0", 2), ("1_000", 1000), ("0x10", 16), ("1e18", 10**18)]
)
def test_a_float_that_is_exactly_an_integer_is_one_where_an_integer_belongs(written: str, value: int) -> None:
    tokens = check(f"tokens: {written}").tokens
    assert tokens == value and type(tokens) is int


@pytest.mark.parametrize("written", ["1.5", "1e-1", "1.0000000000000000001", "1e23", "1e300"])
def test_any_other_float_is_not_an_integer(written: str) -> None:
    assert refusal(f"tokens: {written}").startswith("x.yaml:1:1: tokens: expected a whole number (> 0); got ")


def test_an_integer_is_a_float_where_a_float_belongs_and_lists_become_tuples() -> None:
    optimizer = check("tokens: 1\noptimizer: {lr: 1, betas: [0, 1], decay: 2}").optimizer
    assert type(optimizer.lr) is float and optimizer.betas == (0.0, 1.0) and optimizer.decay == 2.0


@pytest.mark.parametrize("written", ["0.9", "[0.9]", "[0.9, 0.9, 0.9]", "[]", "{a: 1}"])
def test_a_tuple_takes_its_number_of_values(written: str) -> None:
    assert "optimizer.betas: expected a list of 2 values; got" in refusal(f"tokens: 1\noptimizer: {{betas: {written}}}")


def test_all_problems_are_reported_in_the_order_of_the_file_and_missing_keys_last() -> None:
    message = refusal("zero: 7\noptimizer:\n  lr: -1\n  bta: 2\nname: 3\n")
    places = [line.split(": ")[:2] for line in message.splitlines()]
    assert places == [
        ["x.yaml:1:1", "zero"],
        ["x.yaml:3:3", "optimizer.lr"],
        ["x.yaml:4:3", "optimizer.bta"],
        ["x.yaml:5:1", "name"],
        ["x.yaml", "tokens"],
    ]


def test_at_most_ten_problems_are_listed() -> None:
    lines = refusal("tokens: 1\n" + "".join(f"key{i}: 1\n" for i in range(25))).splitlines()
    assert len(lines) == 11 and lines[-1] == "and 15 more"


@pytest.mark.parametrize(
    ("tokens", "start"),
    [(13, "x.yaml:2:13: optimizer.lr: does not go with 13 tokens"), (14, "x.yaml: fourteen: is no key")],
)
def test_a_validators_message_is_placed_at_the_field_it_names(tokens: int, start: str) -> None:
    assert refusal(f"tokens: {tokens}\noptimizer: {{lr: 1}}").startswith(start)


def test_a_validators_message_about_a_default_is_placed_at_its_section() -> None:
    assert refusal("tokens: 13\noptimizer: {}").startswith("x.yaml:2:1: optimizer.lr: does not go")


def test_what_a_user_sees_has_the_status_64_and_no_traceback() -> None:
    with pytest.raises(SpecError) as caught:
        check("zero: 7\ntokens: 0")
    assert exit_code(caught.value) == 64
    assert format_error(caught.value).splitlines() == [
        "error: x.yaml:1:1: zero: 7 is not a known value. Legal: 1, 2, 3",
        "       x.yaml:2:1: tokens: must be > 0; got 0",
    ]
    assert exit_code(KeyError("x")) is None


def test_control_characters_of_a_spec_are_shown_escaped() -> None:
    message = refusal('tokens: 1\n"\\e[31m": 1\nname: "\\e[0m"\n')
    assert "\x1b" not in message and r"\x1b[31m" in message


def test_a_defect_in_a_validator_is_not_hidden_as_a_users_mistake() -> None:
    class Broken(Strict):
        a: int = 1

        @model_validator(mode="after")
        def _check(self) -> Any:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        validate(parse_yaml("a: 1", "x.yaml"), Broken)
