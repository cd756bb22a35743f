"""Every target of a conversion starts with exactly the function of its GQA decoder, or is refused."""

from itertools import product
from typing import Any

import pytest
import torch
from conversions import HEADS, MODEL, ONE, SHAPE, D, converted, differ, gqa, mha, same

from headway.model.attention.block_sparse import BlockSparseConfig
from headway.model.attention.gqa import MqaConfig
from headway.model.attention.moh import MohConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.sqa import SqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.attention.wgqa import WgqaConfig
from headway.model.balance import BalanceConfig
from headway.model.base import AttentionConfig
from headway.model.convert.decoder import (
    attention_inputs,
    check_conversion,
    convert_decoder,
    target_fields,
    with_unequal_groups,
)
from headway.model.convert.methods import TARGETS
from headway.model.decoder import Decoder
from headway.model.k_schedule import KStage, LinearK
from headway.model.mixed import MixedConfig
from headway.model.router import QueryNormRouterConfig, RandomRouterConfig, TokenHashRouterConfig, TwoLayerRouterConfig


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
