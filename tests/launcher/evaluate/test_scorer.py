"""Log-probabilities in batches, after a shared context and in windows equal those of one pass for each row."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headway.launcher.evaluate import scorer as module
from headway.launcher.evaluate.scorer import Row, Scorer, windows
from headway.launcher.exchange.opened import Opened
from headway.launcher.run.codec import Codec
from headway.launcher.study.config import load_study
from headway.launcher.study.plan import variant_spec
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder

VOCAB = 53
STUDY = load_study(Path(__file__).resolve().parents[3] / "yaml/studies/all-mechanisms.yaml")


def model_of(attention: object, *, seq_len: int = 48) -> Opened:
    shape = ModelConfig(width=32, layers=2, ffn_width=48, init_std=0.2)
    decoder = Decoder(shape, attention, vocab_size=VOCAB, seed=3).double().eval()  # pyright: ignore[reportArgumentType]
    return Opened(
        model=decoder,
        codec=Codec(None, VOCAB),
        seq_len=seq_len,
        title="made",
        data=None,
        identity={},
    )


def rows(count: int, *, longest: int, seed: int = 1) -> list[Row]:
    numbers = random.Random(seed)
    made = []
    for _ in range(count):
        length = numbers.randint(2, longest)
        made.append(Row([numbers.randrange(VOCAB) for _ in range(length)], numbers.randint(1, length - 1)))
    return made


def questions(count: int, *, seed: int = 2) -> Iterator[Row]:
    """Choices of several lengths after contexts of 3 to 40 tokens."""
    numbers = random.Random(seed)
    for number in range(count):
        context = [numbers.randrange(VOCAB) for _ in range((3, 31, 32, 40)[number % 4])]
        for length in (1, 1, 2, 5, 7):
            yield Row([*context, *(numbers.randrange(VOCAB) for _ in range(length))], len(context))


def expected(model: Opened, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        logits = model.decoder.logits(torch.tensor([list(row.ids[:-1])]))[0, row.first - 1 :]
    labels = torch.tensor(list(row.ids[row.first :]))
    return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0], logits.argmax(-1) == labels


@pytest.mark.parametrize("variant", STUDY.config.variants)
def test_rows_of_every_mechanism_have_the_values_of_their_own_pass(variant: str) -> None:
    model = model_of(variant_spec(STUDY, [], variant).attention)
    asked = [*rows(12, longest=40), *questions(4)]
    counted: list[int] = []
    # float32 logits; grouped products of routed experts round differently in another batch
    for row, found in zip(asked, Scorer(model, batch_tokens=128).score(asked, counted.append), strict=True):
        log_p, best = expected(model, row)
        torch.testing.assert_close(torch.from_numpy(found.log_p), log_p.double(), rtol=0, atol=2e-5)
        assert found.best.tolist() == best.tolist()
    assert sum(counted) == sum(len(row.ids) - row.first for row in asked)


def test_windows_predict_every_token_once_with_as_much_context_as_fits() -> None:
    numbers = random.Random(4)
    for _ in range(500):
        length, limit = numbers.randint(2, 60), numbers.randint(1, 20)
        first = numbers.randint(1, length - 1)
        found = list(windows(length, first, limit))
        assert [t for _, begin, end in found for t in range(begin, end)] == list(range(first, length))
        for begin, _, end in found:
            assert end - 1 - begin == min(limit, end - 1)  # inputs
        if length - first <= limit:
            assert len(found) == 1


def test_long_rows_are_scored_in_windows() -> None:
    from headway.model.attention.gqa import GqaConfig

    model = model_of(GqaConfig(heads=4, kv_heads=2, head_dim=8))
    row = rows(1, longest=200, seed=6)[0]
    row = Row(list(row.ids) * 3, 1)
    found = Scorer(model, limit=16).score([row])[0]
    parts = [expected(model, Row(row.ids[b:e], f - b))[0] for b, f, e in windows(len(row.ids), 1, 16)]
    torch.testing.assert_close(torch.from_numpy(found.log_p), torch.cat(parts).double(), rtol=0, atol=2e-5)


def test_choices_of_one_context_share_its_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from headway.model.attention.gqa import GqaConfig

    model = model_of(GqaConfig(heads=4, kv_heads=2, head_dim=8))
    hidden, shapes = model.decoder.hidden, []

    def counted(tokens: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))
        return hidden(tokens, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(model.decoder, "hidden", counted)
    context = list(range(module._SHARED))
    Scorer(model).score([Row([*context, *more], len(context)) for more in ([1, 2, 3], [4], [5, 6])])
    assert shapes == [(1, 32), (3, 2)]
    shapes.clear()
    Scorer(model).score([Row([*context[:8], last], 8) for last in range(5)])
    assert shapes == [(1, 8)]


def test_equal_questions_have_equal_digests() -> None:
    from headway.model.attention.gqa import GqaConfig

    model = model_of(GqaConfig(heads=4, kv_heads=2, head_dim=8))

    def digest(asked: list[Row], limit: int | None = None) -> str:
        scorer = Scorer(model, limit=limit)
        scorer.score(asked)
        return scorer.digest

    asked = rows(4, longest=20)
    assert digest(asked) == digest(rows(4, longest=20))
    assert len({digest(asked), digest(asked[:3]), digest([*asked[:3], Row(asked[3].ids, 1)]), digest(asked, 7)}) == 4
