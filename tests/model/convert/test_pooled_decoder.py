"""A converted decoder is the pooled one: of equal, unequal and aligned groups, and with numbers of its own by layer."""

from types import SimpleNamespace

import pytest
import torch
from conversions import HEADS, MODEL, SHAPE, D, converted, differ, gqa, mha, same

from headway.model.attention.gqa import GqaConfig, MqaConfig
from headway.model.attention.moa import MoaConfig
from headway.model.base import AttentionConfig
from headway.model.convert.decoder import (
    attention_inputs,
    check_conversion,
    convert_decoder,
    with_numbers_by_layer,
    with_unequal_groups,
)
from headway.model.convert.heads import mean_pool
from headway.model.mixed import MixedConfig


@pytest.mark.parametrize("how", ["mean", "first"])
def test_a_pooled_decoder_has_the_pooled_heads_and_all_else_of_the_source(decoder, tokens, how):
    source, found = converted(decoder, mha(), gqa(2), how=how)
    state, old = found.decoder.state_dict(), source.state_dict()
    for i in range(MODEL.layers):
        weights = {name: old[f"blocks.{i}.attn.{name}"] for name in ("w_q", "w_k", "w_v", "w_o")}
        for name, tensor in mean_pool(weights, 2, head_dim=D, how=how).items():
            torch.testing.assert_close(state[f"blocks.{i}.attn.{name}"], tensor)
    assert all(torch.equal(state[name], old[name]) for name in old if ".attn." not in name)
    assert [layer.groups for layer in found.layers] == [((0, 1, 2), (3, 4, 5))] * 2
    assert not found.same_function
    differ(source, found.decoder, tokens)


def test_gqa_is_pooled_further_to_mqa(decoder, tokens):
    source, found = converted(decoder, gqa(3), MqaConfig(**SHAPE))
    k = source.state_dict()["blocks.1.attn.w_k"]
    torch.testing.assert_close(found.decoder.state_dict()["blocks.1.attn.w_k"], k.unflatten(0, (3, D)).mean(0))
    assert found.layers[0].groups == ((0, 1, 2),)


def test_groups_of_different_sizes(decoder, tokens):
    source, found = converted(decoder, mha(), gqa(2, group_sizes=[1, 5]))
    k = source.state_dict()["blocks.0.attn.w_k"].unflatten(0, (HEADS, D))
    expected = torch.cat([k[0], k[1:].mean(0)])
    torch.testing.assert_close(found.decoder.state_dict()["blocks.0.attn.w_k"], expected)
    assert found.layers[0].groups == ((0,), (1, 2, 3, 4, 5))


OPTIONS = [{}, {"biases": True}, {"gate": "headwise"}, {"gate": "elementwise"}, {"qk_norm": True}, {"windows": 4}]


@pytest.mark.parametrize("fields", OPTIONS, ids=str)
def test_as_many_kv_heads_as_before_are_the_same_function(decoder, tokens, fields):
    source, found = converted(decoder, mha(**fields), gqa(HEADS, **fields))
    assert found.same_function
    same(source, found.decoder, tokens)


def copies(source, groups, biases, *, turns=True):
    """Make the KV heads of each group rotated (or equal) copies of one, in an order that mixes the groups.

    groups: how many, of equal size; or the group of each head.
    """
    owner = [h % groups for h in range(HEADS)] if isinstance(groups, int) else groups
    first = [owner.index(g) for g in owner]
    half, rotated = 3, 6
    for layer in source.attention_layers():
        for name, planes in (("w_k", rotated), ("w_v", 0)):
            heads = getattr(layer, name).data.unflatten(0, (HEADS, D))
            bias = getattr(layer, name.replace("w", "b")).data.unflatten(0, (HEADS, D)) if biases else None
            for h in range(HEADS):
                if not turns:
                    heads[h] = heads[first[h]]
                    continue
                turn = torch.zeros(D, D, dtype=torch.float64)
                angle = torch.rand(half, dtype=torch.float64) * 6
                i, j = torch.arange(planes // 2), torch.arange(planes // 2, planes)
                turn[i, i] = turn[j, j] = angle[: planes // 2].cos()
                turn[j, i], turn[i, j] = angle[: planes // 2].sin(), -angle[: planes // 2].sin()
                turn[planes:, planes:] = torch.linalg.qr(torch.randn(D - planes, D - planes, dtype=torch.float64)).Q
                heads[h] = turn @ heads[first[h]]
                if bias is not None:
                    bias[h] = turn @ bias[first[h]]
    return source


@pytest.mark.parametrize("by", ["activations", "weights"])
@pytest.mark.parametrize("fields", [{}, {"biases": True}, {"gate": "headwise"}], ids=str)
def test_rotated_copies_are_found_and_pooled_without_loss(decoder, tokens, fields, by):
    source = decoder(mha(**fields)).eval()
    with torch.no_grad():
        for tensor in source.parameters():
            tensor += 0.1 * torch.randn_like(tensor)
        copies(source, 2, biases="biases" in fields)
    inputs = attention_inputs(source, [(tokens, None)])
    assert inputs[0].shape == (tokens.numel(), MODEL.width)
    found = convert_decoder(source, MODEL, gqa(2, **fields), how="cluster_align", by=by, inputs=inputs)
    same(source, found.decoder, tokens)
    for layer in found.layers:
        assert set(layer.groups) == {(0, 2, 4), (1, 3, 5)}
        assert layer.keys is not None and layer.values is not None
        assert layer.keys[1] == pytest.approx(1) and layer.values[1] == pytest.approx(1)
        assert layer.keys[0] < 0.9 and layer.values[0] < 0.9
        assert layer.dispersion is not None and layer.dispersion[0] > 0.05
        assert layer.dispersion[1] == pytest.approx(0, abs=1e-9)
    if by == "weights":  # without any tokens
        again = convert_decoder(source, MODEL, gqa(2, **fields), how="cluster_align", by=by)
        assert again.layers[0].keys is None and again.layers[0].groups == found.layers[0].groups
        same(source, again.decoder, tokens)
    for how in ("align", "cluster"):
        differ(source, convert_decoder(source, MODEL, gqa(2, **fields), how=how, by=by, inputs=inputs).decoder, tokens)


@pytest.mark.parametrize("how", ["align", "cluster", "cluster_align"])
def test_weights_are_compared_without_regard_to_the_tokens(decoder, tokens, how):
    source = decoder(mha()).eval()
    options = {"how": how, "inputs": attention_inputs(source, [(tokens, None)])}
    given = convert_decoder(source, MODEL, gqa(2), by="weights", **options)
    without = convert_decoder(source, MODEL, gqa(2), how=how, by="weights")
    same(given.decoder, without.decoder, tokens)
    assert [layer.dispersion for layer in given.layers] == [layer.dispersion for layer in without.layers]
    other = convert_decoder(source, MODEL, gqa(2), by="activations", **options)
    if how == "align":
        differ(given.decoder, other.decoder, tokens)
    else:
        for ours, theirs in zip(given.layers, other.layers, strict=True):
            assert ours.dispersion is not None and theirs.dispersion is not None
            assert abs(ours.dispersion[1] - theirs.dispersion[1]) > 1e-3


@pytest.mark.parametrize("by", ["activations", "weights"])
@pytest.mark.parametrize("how", ["cluster", "cluster_align"])
def test_unequal_groups_of_copies_are_chosen_and_pooled_without_loss(decoder, tokens, how, by):
    source = copies(decoder(mha()).eval(), [1, 2, 1, 0, 2, 1], biases=False, turns=how == "cluster_align")
    options = {"how": how, "by": by, "inputs": attention_inputs(source, [(tokens, None)])}
    target = with_unequal_groups(source, MODEL, gqa(3), **options)
    assert target.group_sizes == [1, 2, 3]
    found = convert_decoder(source, MODEL, target, **options)
    same(source, found.decoder, tokens)
    assert found.layers[1].groups == ((3,), (1, 4), (0, 2, 5)) and not found.same_function
    assert found.layers[1].dispersion is not None and found.layers[1].dispersion[1] == pytest.approx(0, abs=1e-9)
    differ(source, convert_decoder(source, MODEL, gqa(3), **options).decoder, tokens)  # groups of two


def test_unequal_groups_are_of_whole_groups_of_the_source(decoder, tokens):
    source = decoder(gqa(3)).eval()
    for layer in source.attention_layers():
        for matrix in (layer.w_k.data, layer.w_v.data):
            matrix[2 * D :] = matrix[:D]
    target = with_unequal_groups(source, MODEL, gqa(2), how="cluster", by="weights")
    assert target.group_sizes == [2, 4]
    found = convert_decoder(source, MODEL, target, how="cluster", by="weights")
    assert found.layers[0].groups == ((1,), (0, 2))
    same(source, found.decoder, tokens)


@pytest.mark.parametrize("by", ["activations", "weights"])
@pytest.mark.parametrize("how", ["cluster", "cluster_align"])
def test_each_layer_gets_the_number_of_heads_that_it_needs(decoder, tokens, how, by):
    """The first layer has one head in six copies, the second three in two: four in all are without loss."""
    source = decoder(mha()).eval()
    for layer, groups in zip(source.attention_layers(), (1, 3), strict=True):
        turned = copies(SimpleNamespace(attention_layers=lambda layer=layer: [layer]), groups, False, turns=False)
        assert turned is not None
    options = {"how": how, "by": by, "inputs": attention_inputs(source, [(tokens, None)])}
    target = with_numbers_by_layer(source, MODEL, gqa(2), **options)
    assert isinstance(target, MixedConfig) and target.pattern == ["kv_1", "kv_3"]
    found = convert_decoder(source, MODEL, target, **options)
    same(source, found.decoder, tokens)
    assert [len(layer.groups) for layer in found.layers] == [1, 3] and not found.same_function
    differ(source, convert_decoder(source, MODEL, gqa(2), **options).decoder, tokens)
    assert with_numbers_by_layer(source, MODEL, gqa(6), **options) == target  # more heads would not be used
    one = with_numbers_by_layer(source, MODEL, gqa(1), **options)
    assert isinstance(one, GqaConfig) and one.kv_heads == 1


@pytest.mark.parametrize(("pattern", "kept"), [(["few", "all"], False), (["all", "few"], False), (["all"], True)])
def test_the_function_is_kept_if_no_layer_pools(decoder, tokens, pattern, kept):
    kinds: dict[str, AttentionConfig] = {name: {"few": gqa(3), "all": gqa(6)}[name] for name in pattern}
    source = decoder(mha()).eval()
    found = convert_decoder(source, MODEL, MixedConfig(kinds=kinds, pattern=pattern))
    assert found.same_function is kept
    (same if kept else differ)(source, found.decoder, tokens)


def test_a_target_by_layer_is_checked_kind_by_kind(decoder):
    wrong: dict[str, AttentionConfig] = {"one": gqa(1), "two": GqaConfig(heads=4, kv_heads=2, head_dim=D)}
    with pytest.raises(ValueError, match=r"^attention\.kinds\.two: attention\."):
        check_conversion(MODEL, mha(), MixedConfig(kinds=wrong, pattern=["one", "two"]), "mean")
    routed: dict[str, AttentionConfig] = {"moa": MoaConfig(heads=6, head_dim=D, top_k=1)}
    with pytest.raises(ValueError, match=r"^attention\.kinds\.moa: moa is no target of a conversion"):
        check_conversion(MODEL, mha(), MixedConfig(kinds=routed, pattern=["moa"]), "mean")
    with pytest.raises(ValueError, match=r"^mean: makes groups of consecutive heads, which are not chosen"):
        with_numbers_by_layer(decoder(mha()), MODEL, gqa(2), how="mean")


def test_equal_heads_keep_equal_groups(decoder, tokens):
    source = copies(decoder(mha()).eval(), 1, biases=False, turns=False)
    target = with_unequal_groups(source, MODEL, gqa(2), how="cluster", by="weights")
    assert target == gqa(2)
    same(source, convert_decoder(source, MODEL, target, how="cluster", by="weights").decoder, tokens)


def test_alignment_of_consecutive_copies_is_without_loss_also_in_unequal_groups(decoder, tokens):
    source = copies(decoder(mha()).eval(), 1, biases=False)
    inputs = attention_inputs(source, [(tokens, None)])
    found = convert_decoder(source, MODEL, gqa(2, group_sizes=[2, 4]), how="align", inputs=inputs)
    same(source, found.decoder, tokens)
