"""A converted decoder is the pooled one, and every target starts with exactly the function of its GQA decoder."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headway.model.attention.block_sparse import BlockSparseConfig
from headway.model.attention.gqa import GqaConfig, MhaConfig, MqaConfig
from headway.model.attention.moa import MoaConfig
from headway.model.attention.moh import MohConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.sqa import SqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.attention.wgqa import WgqaConfig
from headway.model.balance import BalanceConfig
from headway.model.base import AttentionConfig
from headway.model.config import ModelConfig
from headway.model.convert.decoder import (
    attention_inputs,
    check_conversion,
    convert_decoder,
    target_fields,
    with_numbers_by_layer,
    with_unequal_groups,
)
from headway.model.convert.heads import mean_pool
from headway.model.convert.methods import TARGETS
from headway.model.decoder import Decoder
from headway.model.k_schedule import KStage, LinearK
from headway.model.mixed import MixedConfig
from headway.model.router import QueryNormRouterConfig, RandomRouterConfig, TokenHashRouterConfig, TwoLayerRouterConfig

HEADS, D = 6, 10
MODEL = ModelConfig(width=20, layers=2, ffn_width=28, init_std=0.3)  # the decoder of tests/model/conftest.py
SHAPE: dict[str, Any] = {"heads": HEADS, "head_dim": D, "rope_fraction": 0.6}
ONE = {"rtol": 0, "atol": 1e-11}


def mha(**fields):
    return MhaConfig(**SHAPE, **fields)


def gqa(groups, **fields):
    return GqaConfig(**SHAPE, kv_heads=groups, **fields)


def converted(decoder, config, target, **options):
    source = decoder(config).eval()
    with torch.no_grad():  # biases and gates that are not their start
        for tensor in source.parameters():
            tensor += 0.1 * torch.randn_like(tensor)
    return source, convert_decoder(source, MODEL, target, **options)


def same(a, b, tokens):
    with torch.no_grad():
        torch.testing.assert_close(a.logits(tokens), b.logits(tokens), **ONE)


def differ(a, b, tokens):
    with torch.no_grad():
        assert (a.logits(tokens) - b.logits(tokens)).abs().max() > 1e-3


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


@pytest.mark.parametrize("weights", ["scalar", "column", "row"])
@pytest.mark.parametrize(("how", "groups"), [("mean", 2), ("first", 3), ("cluster_align", 2)])
def test_weighted_gqa_starts_as_the_pooled_gqa(decoder, tokens, weights, how, groups):
    source = decoder(mha()).eval()
    inputs = attention_inputs(source, [(tokens, None)])
    plain = convert_decoder(source, MODEL, gqa(groups), how=how, inputs=inputs)
    weighted = WgqaConfig(**SHAPE, kv_heads=groups, weights=weights)
    same(plain.decoder, convert_decoder(source, MODEL, weighted, how=how, inputs=inputs).decoder, tokens)


def test_weighted_gqa_of_gqa_starts_as_the_pooled_gqa(decoder, tokens):
    source, plain = converted(decoder, gqa(3), gqa(1))
    same(plain.decoder, convert_decoder(source, MODEL, WgqaConfig(**SHAPE, kv_heads=1)).decoder, tokens)


GATES = ["sigmoid2", "sigmoid", "softmax", "softmax_n", "detached_renorm", "straight_through", "renorm", "hard"]


@pytest.mark.parametrize("gate", GATES)
def test_routed_gqa_with_all_heads_starts_as_gqa(decoder, tokens, gate):
    source, plain = converted(decoder, mha(), gqa(2))
    routed = RgqaConfig(**SHAPE, kv_heads=2, top_k=3, gate=gate)
    same(plain.decoder, convert_decoder(source, MODEL, routed).decoder, tokens)


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 2, "always_on": 1},
        {"top_k": 2, "always_on": 1, "always_on_gate": "sigmoid2", "gate": "softmax"},
        {"top_k": 3, "router": TwoLayerRouterConfig(hidden=4)},
        {"top_k": 3, "gate": "hard", "router": RandomRouterConfig()},
        {"top_k": 3, "gate": "straight_through", "router": QueryNormRouterConfig()},
        {"top_k": 1, "k_schedule": [KStage(until_tokens=100, top_k=3), KStage(until_tokens=200, top_k=2)]},
        {"top_k": 3, "balance": BalanceConfig(loss_free_rate=1e-3)},
    ],
    ids=lambda fields: " ".join(fields),
)
def test_routed_gqa_with_its_options_starts_as_gqa(decoder, tokens, fields):
    source, plain = converted(decoder, mha(), gqa(2))
    found = convert_decoder(source, MODEL, RgqaConfig(**SHAPE, kv_heads=2, **fields)).decoder
    same(plain.decoder, found, tokens)
    if "k_schedule" in fields:
        found.before_step(200)
        differ(plain.decoder, found, tokens)


@pytest.mark.parametrize(("form", "shared"), product(["paper", "code", "straight_through"], [0, 1, 2]))
def test_mixture_of_heads_with_all_heads_starts_as_gqa(decoder, tokens, form, shared):
    source, plain = converted(decoder, mha(), gqa(2))
    routed = MohConfig(**SHAPE, kv_heads=2, shared_heads=shared, top_k=HEADS - shared, form=form)
    same(plain.decoder, convert_decoder(source, MODEL, routed).decoder, tokens)


@pytest.mark.parametrize("groups", [2, HEADS])
@pytest.mark.parametrize(
    "fields",
    [
        {"experts": 2, "top_k": 2},
        {"experts": 3, "top_k": 3, "gate": "renorm"},
        {"experts": 4, "top_k": 4, "shared_selection": True},
        {"experts": 1, "top_k": 1},
    ],
    ids=str,
)
def test_switchhead_with_all_experts_starts_as_the_source(decoder, tokens, groups, fields):
    target = SwitchHeadConfig(kv_heads=HEADS, head_dim=D, rope_fraction=0.6, **fields)
    source, found = converted(decoder, gqa(groups), target)
    assert found.same_function
    same(source, found.decoder, tokens)
    if fields["experts"] > 1:  # else they would have equal gradients, and remain equal
        experts = found.decoder.state_dict()["blocks.0.attn.w_v"].unflatten(0, (HEADS, fields["experts"], D))
        assert not torch.equal(experts[:, 0], experts[:, 1])


@pytest.mark.parametrize("gate", ["sigmoid", "sigmoid2", "renorm"])
def test_switchhead_anneals_from_the_source_to_the_plain_mechanism(decoder, tokens, gate):
    fields: dict[str, Any] = {"kv_heads": HEADS, "head_dim": D, "rope_fraction": 0.6, "experts": 4, "gate": gate}
    target = SwitchHeadConfig(**fields, top_k=2, k_schedule=LinearK(start=4, until_tokens=200))
    source, found = converted(decoder, mha(), target)
    anneals(source, found.decoder, SwitchHeadConfig(**fields, top_k=2), tokens)


@pytest.mark.parametrize(("form", "shared"), product(["paper", "code", "straight_through"], [0, 2]))
def test_mixture_of_heads_anneals_from_gqa_to_the_plain_mechanism(decoder, tokens, form, shared):
    fields: dict[str, Any] = {"kv_heads": 2, "shared_heads": shared, "form": form}
    target = MohConfig(**SHAPE, **fields, top_k=2, k_schedule=LinearK(start=HEADS - shared, until_tokens=200))
    source, plain = converted(decoder, mha(), gqa(2))
    found = convert_decoder(source, MODEL, target).decoder
    anneals(plain.decoder, found, MohConfig(**SHAPE, **fields, top_k=2), tokens)


def anneals(start, found, plain, tokens):
    """`found` computes `start` at token 0, and what a decoder of config `plain` computes from token 200 on."""
    same(start, found, tokens)
    with torch.no_grad():  # a router that has learned
        for name, tensor in found.named_parameters():
            if ".router.w" in name or ".source.w" in name or ".destination.w" in name:
                tensor += torch.randn_like(tensor)
    end = decoder_like(found, plain)
    differ(end, found, tokens)
    found.before_step(200)
    same(end, found, tokens)
    differ(start, found, tokens)


def decoder_like(found, config):
    other = Decoder(MODEL, config, vocab_size=37, seed=0).double().eval()
    other.load_state_dict(found.state_dict())
    return other


def test_the_router_of_a_converted_decoder_learns(decoder, tokens):
    _, found = converted(decoder, mha(), RgqaConfig(**SHAPE, kv_heads=2, top_k=3))
    found.decoder.requires_grad_(True)
    found.decoder(tokens[:, :-1], tokens[:, 1:]).loss_sum.backward()
    router = found.decoder.get_parameter("blocks.0.attn.router.w")
    assert not router.any() and router.grad is not None and router.grad.abs().min() > 0


def sparse(groups, **fields):
    return BlockSparseConfig(**SHAPE, kv_heads=groups, **fields)


@pytest.mark.parametrize("chosen_by", ["group", "head"])
@pytest.mark.parametrize(
    ("block", "blocks", "how", "groups", "fields"),
    [
        (3, 2, "mean", 2, {}),
        (4, 1, "first", 3, {}),
        (1, 7, "cluster_align", 2, {}),
        (5, 1, "random", 1, {}),
        (3, 2, "mean", 2, {"qk_norm": True}),
    ],
)
def test_block_sparse_is_gqa_up_to_the_length_at_which_all_blocks_are_chosen(
    decoder, tokens, chosen_by, block, blocks, how, groups, fields
):
    """One token more, and a query leaves a block out."""
    source = decoder(mha(**fields)).eval()
    with torch.no_grad():
        for tensor in source.parameters():
            tensor += 0.1 * torch.randn_like(tensor)
    options = {"how": how, "inputs": attention_inputs(source, [(tokens, None)]), "seed": 3}
    plain = convert_decoder(source, MODEL, gqa(groups, **fields), **options)
    target = sparse(groups, block=block, blocks=blocks, chosen_by=chosen_by, **fields)
    found = convert_decoder(source, MODEL, target, **options)
    complete = block * (blocks + 1)
    assert found.complete_tokens == complete < tokens.shape[1] and plain.complete_tokens is None
    same(plain.decoder, found.decoder, tokens[:, :complete])
    differ(plain.decoder, found.decoder, tokens[:, : complete + 1])
    assert found.layers == plain.layers and not found.same_function


@pytest.mark.parametrize("source", [mha(), gqa(3), MqaConfig(**SHAPE)], ids=lambda config: config.type)
def test_block_sparse_with_all_blocks_and_the_heads_of_the_source_is_the_source(decoder, tokens, source):
    blocks = -(-(tokens.shape[1] - 1) // 2)
    old, found = converted(decoder, source, sparse(source.groups, block=2, blocks=blocks))
    assert found.same_function and found.complete_tokens == 2 * (blocks + 1)
    same(old, found.decoder, tokens)
    documents = torch.arange(tokens.shape[1]).expand_as(tokens) // 7
    with torch.no_grad():
        ours, theirs = (each.logits(tokens, documents) for each in (old, found.decoder))
    torch.testing.assert_close(ours, theirs, **ONE)


def test_the_layer_with_the_fewest_chosen_tokens_sets_the_length(decoder, tokens):
    kinds: dict[str, AttentionConfig] = {"few": sparse(6, block=2, blocks=1), "many": sparse(6, block=2, blocks=4)}
    old, found = converted(decoder, mha(), MixedConfig(kinds=kinds, pattern=["many", "few"]))
    assert found.complete_tokens == 4 and found.same_function
    same(old, found.decoder, tokens[:, :4])
    differ(old, found.decoder, tokens[:, :5])


def test_random_heads_are_those_of_an_untrained_decoder(decoder, tokens):
    source, found = converted(decoder, mha(), gqa(2), how="random", seed=5)
    new = Decoder(MODEL, gqa(2), vocab_size=37, seed=5).double().state_dict()
    state, old = found.decoder.state_dict(), source.state_dict()
    assert torch.equal(state["blocks.0.attn.w_v"], new["blocks.0.attn.w_v"])
    assert torch.equal(state["blocks.0.attn.w_q"], old["blocks.0.attn.w_q"])
    assert not convert_decoder(source, MODEL, gqa(HEADS), how="random").same_function


ROUTED: dict[str, Any] = {"kv_heads": 2, "top_k": 3}


@pytest.mark.parametrize(
    ("source", "target", "how", "message"),
    [
        (SqaConfig(heads=12, kv_heads=2, kept=3, head_dim=6), gqa(1), "mean", r"type sqa, and only mha, gqa, mqa"),
        (WgqaConfig(**SHAPE, kv_heads=2), gqa(1), "mean", r"type wgqa.*an export to hf folds"),
        (mha(), mha(), "mean", r"mha is no target.*use one of gqa"),
        (gqa(3), gqa(2), "mean", r"kv_heads: .*use kv_heads that divides 3"),
        (gqa(2), gqa(3), "mean", r"has 2 KV heads, fewer than 3; use 2"),
        (mha(qk_norm=True), gqa(2, qk_norm=True), "align", r"^align: .*QK-norm.*use mean or cluster"),
        (mha(gate="elementwise"), gqa(2, gate="elementwise"), "cluster_align", r"elementwise.*use mean or cluster"),
        (gqa(2, group_sizes=[1, 5]), gqa(1), "mean", r"group_sizes"),
        (mha(windows=[4] * 6), gqa(2, windows=[4] * 2), "mean", r"attention.windows: "),
        (mha(gate="headwise"), gqa(2), "mean", r"attention.gate: none in the target and headwise in the source"),
        (mha(biases=True), RgqaConfig(**SHAPE, **ROUTED), "mean", r"attention.biases: .*convert to gqa or mqa"),
        (mha(windows=4), sparse(2, block=2, blocks=1), "mean", r"attention.windows: .*block_sparse has no such option"),
        (gqa(2, group_sizes=[1, 5]), sparse(2, block=2, blocks=1), "mean", r"group_sizes.*use the same sizes, or a"),
        (mha(qk_norm=True), sparse(2, block=2, blocks=1, qk_norm=True), "align", r"^align: .*QK-norm"),
        (mha(), SwitchHeadConfig(kv_heads=2, head_dim=D, rope_fraction=0.6, experts=2, top_k=2), "mean", r"score maps"),
        (mha(), WgqaConfig(**SHAPE, kv_heads=2, start="random"), "mean", r"attention.start: random with mean"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_what_to_do(source, target, how, message):
    with pytest.raises(ValueError, match=message):
        check_conversion(MODEL, source, target, how)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (RgqaConfig(**SHAPE, kv_heads=2, top_k=2), r"attention.top_k: .*heads/kv_heads - always_on, or a first stage"),
        (
            MohConfig(**SHAPE, kv_heads=2, shared_heads=1, top_k=2),
            r"use top_k = heads - shared_heads, or a first",
        ),
        (
            SwitchHeadConfig(kv_heads=HEADS, head_dim=D, rope_fraction=0.6, experts=3, top_k=2),
            r"attention.top_k: .*use top_k = experts, or a first stage",
        ),
        (RgqaConfig(**SHAPE, **ROUTED, router=TokenHashRouterConfig()), r"attention.router: .*token_hash cannot be 0"),
    ],
)
def test_a_routed_target_without_an_exact_start_is_refused(decoder, target, message):
    with pytest.raises(ValueError, match=message):
        convert_decoder(decoder(mha()).eval(), MODEL, target)


def test_alignment_needs_calibration_tokens(decoder):
    with pytest.raises(ValueError, match=r"^align: needs calibration tokens.*compare by weights, or use mean"):
        convert_decoder(decoder(mha()), MODEL, gqa(2), how="align")
    with pytest.raises(ValueError, match=r"^cluster: needs calibration tokens"):
        with_unequal_groups(decoder(mha()), MODEL, gqa(2), how="cluster")
    with pytest.raises(ValueError, match=r"^align: makes groups of consecutive heads.*use cluster"):
        with_unequal_groups(decoder(mha()), MODEL, gqa(2), how="align", by="weights")
    with pytest.raises(ValueError, match=r"^kv_heads: the source has 2 KV heads, fewer than 3"):
        with_unequal_groups(decoder(gqa(2)), MODEL, gqa(3), how="cluster", by="weights")


@pytest.mark.parametrize("to", TARGETS)
def test_fields_of_a_target_convert(decoder, tokens, to):
    from headway.model.attention.registry import MECHANISMS

    fields = target_fields(mha(), to, None if to in ("mqa", "switchhead") else 3, "mean")
    own = {"block": 2, "blocks": 3} if to == "block_sparse" else {}  # which have no defaults
    target = MECHANISMS[to].model_validate({**fields, **own})
    assert converted(decoder, mha(), target)[1].decoder.attention == target
