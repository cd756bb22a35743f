"""Windows per group and per layer: visible keys, FLOPs, and the KV cache."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from headway.kernels.attention import core
from headway.kernels.documents import Documents
from headway.model.attention.gqa import GqaConfig, MhaConfig
from headway.model.base import SequenceRanks
from headway.model.config import ModelConfig
from headway.model.cost import account

SEGMENTS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2])


def written_out(module, x, windows, members, segments):
    """No rotation; `members` heads per group, each position with the keys of its group's window and its document."""
    q, k, v = ((x @ w.T).unflatten(-1, (-1, 6)) for w in (module.w_q, module.w_k, module.w_v))
    at = torch.arange(x.shape[1])
    distance = at[:, None] - at
    out = torch.zeros_like(x)
    for h in range(q.shape[2]):
        g = h // members
        seen = (distance >= 0) & (distance < (windows[g] or x.shape[1])) & (segments[:, None] == segments)
        scores = torch.einsum("bsd,btd->bst", q[:, :, h], k[:, :, g]) / 6**0.5
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out = out + (weights @ v[:, :, g]) @ module.w_o[:, h * 6 : (h + 1) * 6].T
    return out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "windows", [[3, 3, 3, 3], [None, 3, 3, 5], [None, 3, None, 3], [1, 2, 1, None], [11, None, 30, None]]
)
def test_each_group_sees_its_own_window(layer, context, x, windows, packed):
    config = GqaConfig(heads=8, kv_heads=4, head_dim=6, rope_fraction=0.0, windows=windows)
    module = layer(config)
    x.requires_grad_()
    segments = SEGMENTS if packed else torch.zeros(11)
    documents = Documents.of(segments.expand(3, 11)) if packed else None
    y, expected = module(x, context(config, documents=documents)).y, written_out(module, x, windows, 2, segments)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    wrt = [x, *module.parameters()]
    for mine, written in zip(
        torch.autograd.grad(y.square().sum(), wrt), torch.autograd.grad(expected.square().sum(), wrt), strict=True
    ):
        torch.testing.assert_close(mine, written, rtol=1e-10, atol=1e-10)


def test_one_call_of_the_core_per_distinct_window(layer, context, x):
    calls = []

    def counted(q, *args, window=None):
        calls.append((q.shape[2], window))
        return core(q, *args, window=window)

    for windows, expected in (
        ([None, 3, None, 3], [(4, None), (4, 3)]),
        ([3, 3, 3, 5], [(6, 3), (2, 5)]),
        (3, [(8, 3)]),
        (None, [(8, None)]),
    ):
        calls.clear()
        config = GqaConfig.model_validate({"heads": 8, "kv_heads": 4, "head_dim": 6, "windows": windows})
        layer(config)(x, replace(context(config), sequence=SequenceRanks(attend=counted)))
        assert calls == expected


def test_one_integer_is_the_window_of_all_groups(decoder, tokens):
    one = GqaConfig(heads=4, kv_heads=2, head_dim=6, windows=3)
    listed = GqaConfig(heads=4, kv_heads=2, head_dim=6, windows=[3, 3])
    assert torch.equal(decoder(one).logits(tokens), decoder(listed).logits(tokens))
    assert not torch.equal(
        decoder(one).logits(tokens), decoder(listed.model_copy(update={"windows": None})).logits(tokens)
    )


def test_a_window_as_long_as_the_sequence_is_none(decoder, tokens):
    plain = GqaConfig(heads=4, kv_heads=2, head_dim=6)
    whole = plain.model_copy(update={"windows": 11})
    torch.testing.assert_close(decoder(whole).logits(tokens), decoder(plain).logits(tokens), rtol=0, atol=1e-12)
    assert whole.flops_per_token(width=20, seq_len=11) == plain.flops_per_token(width=20, seq_len=11)


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [1, 4, 1, 2]])
def test_core_flops_count_the_keys_that_are_seen(sizes):
    seq_len, windows = 13, [None, 5, 1, 40]
    config = GqaConfig(heads=8, kv_heads=4, head_dim=6, windows=windows, group_sizes=sizes)
    groups = list(zip(sizes, windows, strict=True))
    seen = sum(size * min(t + 1, w or seq_len) for size, w in groups for t in range(seq_len))
    assert config.core_flops_per_token(seq_len=seq_len) == pytest.approx(4 * 6 * seen / seq_len, rel=1e-12)
    plain = config.model_copy(update={"windows": None})
    less = plain.core_flops_per_token(seq_len=seq_len) - config.core_flops_per_token(seq_len=seq_len)
    for part in ("useful", "executed"):
        costs = [getattr(c.flops_per_token(width=20, seq_len=seq_len), part) for c in (plain, config)]
        assert costs[0] - costs[1] == pytest.approx(less, rel=1e-12)


def test_layers_repeat_the_window_pattern(decoder, tokens):
    pattern = GqaConfig(heads=4, kv_heads=2, head_dim=6, window_pattern=[3, [None, 2]])
    assert [pattern.layer(i, 5).windows for i in range(5)] == [3, [None, 2], 3, [None, 2], 3]
    model = decoder(pattern)
    assert [block.attn.windows for block in model.blocks] == [[3, 3], [None, 2]]
    cost = account(
        ModelConfig(width=20, layers=2, ffn_width=28), pattern, vocab_size=37, seq_len=11, bytes_per_element=8
    )
    first, second = (pattern.layer(i, 2) for i in range(2))
    assert cost.attention_core_flops.executed == first.core_flops_per_token(seq_len=11) + second.core_flops_per_token(
        seq_len=11
    )
    cache = model.new_cache()
    parts = [model.logits(part, cache=cache) for part in tokens.split((4, 1, 5, 1), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model.logits(tokens), rtol=0, atol=1e-12)
    assert cache.numbers * 8 == pytest.approx(cost.kv_bytes_per_token * tokens.numel(), rel=1e-12)


def test_decoding_caches_only_keys_that_a_window_still_reads(decoder, tokens):
    """2 layers x 3 sequences x (K and V) x 6 channels; 11 tokens in the global group, 3 in the other."""
    model = decoder(GqaConfig(heads=4, kv_heads=2, head_dim=6, windows=[None, 4]))
    cache = model.new_cache()
    for part in tokens.split((7, 1, 3), 1):
        model.logits(part, cache=cache)
    assert cache.numbers == 2 * 3 * 2 * 6 * (11 + 3)


def test_heads_of_mha_have_windows_of_their_own(decoder, tokens):
    mha = MhaConfig(heads=4, head_dim=6, windows=[None, 3, 3, None])
    gqa_config = GqaConfig(heads=4, kv_heads=4, head_dim=6, windows=[None, 3, 3, None])
    assert torch.equal(decoder(mha).logits(tokens), decoder(gqa_config).logits(tokens))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"windows": [None, 3, 4]}, ["windows: ", "3 windows for 2 KV heads", "list of 2", "one integer"]),
        ({"window_pattern": [3, [4]]}, ["window_pattern: ", "1 windows for 2 KV heads", "list of 2", "one integer"]),
        ({"windows": 3, "window_pattern": [4]}, ["window_pattern: ", "windows alone", "window_pattern alone"]),
    ],
)
def test_windows_that_do_not_fit_the_groups_are_refused(fields, words):
    with pytest.raises(ValidationError) as refusal:
        GqaConfig.model_validate({"heads": 4, "kv_heads": 2, "head_dim": 6, **fields})
    message = refusal.value.errors()[0]["msg"].removeprefix("Value error, ")
    assert message.startswith(words[0])
    for word in words[1:]:
        assert word in message


@pytest.mark.parametrize("windows", [0, [3, 0], "3", 2.5])
def test_a_window_is_a_positive_integer(windows):
    with pytest.raises(ValidationError):
        GqaConfig.model_validate({"heads": 4, "kv_heads": 2, "head_dim": 6, "windows": windows})


def test_a_pattern_longer_than_the_model_is_refused():
    config = GqaConfig(heads=4, kv_heads=2, head_dim=6, window_pattern=[None, 3, 4])
    with pytest.raises(ValueError, match=r"^attention.window_pattern: 3 entries for 2 layers; use 2 .*model.layers 3$"):
        config.layer(0, 2)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"windows": 65}, "windows"),
        ({"windows": [None, 65]}, "windows"),
        ({"window_pattern": [4, [65, 1]]}, "window_pattern"),
    ],
)
def test_a_window_longer_than_the_sequences_is_refused(fields, name):
    config = GqaConfig.model_validate({"heads": 4, "kv_heads": 2, "head_dim": 6, **fields})
    with pytest.raises(
        ValueError, match=rf"^attention.{name}: .*65 tokens .* 64; use null .* 64 at most, or data.seq_len 65$"
    ):
        config.check_run(seq_len=64, tokens=10**6, tokens_per_step=64)
    config.check_run(seq_len=65, tokens=10**6, tokens_per_step=64)
