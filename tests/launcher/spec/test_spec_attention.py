"""A mechanism's fields against the run around it: sequences, layers, tokens of training."""

from pathlib import Path

import pytest

from headway.launcher.base.errors import SpecError
from headway.launcher.spec.load import load_spec

TINY = Path(__file__).parents[3] / "yaml" / "base" / "tiny.yaml"  # 2 layers, sequences of 64, 200,000 tokens
DYNAMIC = ("attention.type=dynamic_gqa", "attention.update_every_steps=10")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["attention.windows=65"], ["attention.windows: ", "65 tokens", "64", "null", "data.seq_len 65"]),
        (["attention.windows=[null, 65]"], ["attention.windows: ", "65 tokens", "64 at most"]),
        (["attention.window_pattern=[8, [65, 1]]"], ["attention.window_pattern: ", "65 tokens", "64 at most"]),
        (
            ["attention.window_pattern=[8, null, 8]"],
            ["attention.window_pattern: ", "3 entries for 2", "model.layers 3"],
        ),
        (["attention.windows=[8]"], ["attention.windows: ", "1 windows for 2 KV heads", "list of 2", "one integer"]),
        (["attention.windows=0"], ["attention.windows"]),
        (["attention.group_sizes=[1, 6]"], ["attention.group_sizes: ", "add up to 7 of 8"]),
        (
            [*DYNAMIC, "attention.freeze_after_tokens=1e6"],
            ["attention.freeze_after_tokens: ", "160563 (80 %)", "train.tokens 1250000"],
        ),
        (DYNAMIC, ["attention.freeze_after_tokens", "missing"]),
    ],
)
def test_what_does_not_go_with_the_run_is_refused(overrides, words):
    with pytest.raises(SpecError) as caught:
        load_spec(TINY, [*overrides])
    for word in words:
        assert word in str(caught.value)


def test_windows_are_written_as_null_integers_and_lists():
    for text, windows in (("null", None), ("16", 16), ("[null, 16]", [None, 16])):
        attention = load_spec(TINY, [f"attention.windows={text}"]).spec.attention.model_dump()
        assert attention["windows"] == windows
    attention = load_spec(TINY, ["attention.window_pattern=[64, [null, 16]]"]).spec.attention.model_dump()
    assert attention["window_pattern"] == [64, [None, 16]]
