"""Value residuals and keys and values shared by layers: costs, caches, memory, recomputation, ranks and stages."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_chains import (
    BATCH,
    DENSE,
    FORMS,
    GROUPED,
    LOCAL,
    MODEL,
    SEGMENTS,
    SEQ,
    VOCAB,
    each_form,
    made,
    plain,
    tokens,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from headway.kernels.documents import Documents
from headway.kernels.rope import rope_tables
from headway.model.activations import Sharing, block_parameters, footprint, saved_storages
from headway.model.attention.gqa import GqaConfig
from headway.model.base import AttentionConfig, AttentionSection, Context, Ranks
from headway.model.contexts import LayerContexts
from headway.model.cost import account, layer_configs
from headway.model.decoder import Block, Decoder, Placement, Recompute, run_block
from headway.model.measure.branch import branch_ratios, branch_scales, measured_branches
from headway.model.mixed import MixedConfig
from headway.model.shard import cut_attention
from headway.parallel.partition import stage_bounds, stage_pieces

# ---------------------------------------------------------------- cost


@each_form
def test_the_cache_holds_what_the_cost_says(config: AttentionSection) -> None:
    decoder = made(config).eval()
    cache = decoder.new_cache()
    for part in tokens().split([4, 6, 1], 1):
        decoder.logits(part, cache=cache)
    cost = account(MODEL, config, vocab_size=VOCAB, seq_len=SEQ, bytes_per_element=8)
    assert cache.numbers * 8 == pytest.approx(cost.kv_bytes_per_token * BATCH * SEQ, rel=1e-12)
    reading = [one.takes_from is not None and one.kv_bytes_per_token(seq_len=1, bytes_per_element=1) == 0
               for one in layer_configs(MODEL, config, vocab_size=VOCAB)]  # fmt: skip
    assert [layer.numbers == 0 for layer in cache.layers] == reading


@pytest.mark.parametrize(("share_kv", "own"), [(1, 5), (2, 3), (3, 2), (4, 2), (5, 1)])
def test_cache_and_matrices_are_those_of_the_layers_that_have_them(share_kv: int, own: int) -> None:
    """Of 5 layers, which not every number divides."""
    shared, alone = (
        account(MODEL, GqaConfig(**GROUPED, share_kv=n), vocab_size=VOCAB, seq_len=SEQ) for n in (share_kv, 1)
    )
    assert shared.kv_bytes_per_token * 5 == alone.kv_bytes_per_token * own
    less = (5 - own) * 2 * MODEL.width * 2 * 6
    assert shared.num_params == alone.num_params - less
    assert shared.flops_per_token.useful == alone.flops_per_token.useful - 2 * less
    assert shared.attention_core_flops == alone.attention_core_flops


@each_form
def test_parameters_are_those_of_the_module(config: AttentionSection) -> None:
    decoder = made(config)
    cost = account(MODEL, config, vocab_size=VOCAB, seq_len=SEQ)
    assert cost.num_params == sum(p.numel() for p in decoder.parameters())
    for one, block in zip(layer_configs(MODEL, config, vocab_size=VOCAB), decoder.blocks, strict=True):
        assert isinstance(block, Block)
        total = sum(p.numel() for p in block.parameters())
        assert block_parameters(MODEL, one, tensor=1).total == total
        if "w_q" in one.shards() and one.shards()["w_q"].units % 2 == 0:
            half = block_parameters(MODEL, one, tensor=2)
            cut = [p.numel() for name, p in block.named_parameters() if name in block.shards]
            assert half.total == total - sum(cut) // 2


@each_form
def test_flops_are_those_that_torch_counts(config: AttentionSection) -> None:
    decoder = made(config)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder.logits(tokens())
    cost = account(MODEL, config, vocab_size=VOCAB, seq_len=SEQ)
    square = sum(4 * one.head_dim * one.score_maps * SEQ for one in layer_configs(MODEL, config, vocab_size=VOCAB))
    executed = cost.flops_per_token.executed - cost.attention_core_flops.executed + square
    assert executed == pytest.approx(counter.get_total_flops() / (BATCH * SEQ), rel=1e-12)


@each_form
def test_every_parameter_gets_a_gradient(config: AttentionSection) -> None:
    decoder = made(config)
    out = decoder(tokens(), tokens().roll(-1, 1))
    out.loss_sum.backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


# ---------------------------------------------------------------- recomputation, memory, starts


@each_form
@pytest.mark.parametrize("recompute", ["block", "selective"])
def test_recomputation_changes_no_gradient(config: AttentionSection, recompute: Recompute) -> None:
    found = []
    for how in ("none", recompute):
        decoder = made(config, recompute=how).train()
        out = decoder(tokens(), tokens().roll(-1, 1), SEGMENTS)
        out.loss_sum.backward()
        found.append([out.loss_sum.detach(), *(p.grad for p in decoder.parameters())])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*found, strict=True))


def chain_bytes(config: AttentionSection, *, recompute: Recompute, seq_len: int = 32) -> int:
    """Bytes that the blocks of a model keep for the backward pass, one sequence, fp32; embedding and head left out."""
    decoder = Decoder(MODEL, config, vocab_size=VOCAB, seed=1, placement=Placement(recompute=recompute)).train()
    ids = torch.randint(0, VOCAB, (1, seq_len))
    contexts = decoder._contexts.of(ids, None, dtype=torch.float32)
    tables = [table for i in range(MODEL.layers) for table in contexts._each[i].rope]
    x = torch.randn(1, seq_len, MODEL.width, requires_grad=True)
    known = [*decoder.parameters(), *decoder.buffers(), *tables]
    held: dict[int, int] = {}
    with saved_storages(besides=known) as saved:
        for i, block in enumerate(decoder.blocks):
            x, _, handed = run_block(block, x, contexts.at(i), decoder.placement)
            contexts.hand_on(i, handed)
            held |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in handed}
    return sum((saved | held).values())


@each_form
def test_planned_memory_is_what_the_blocks_of_a_model_keep(config: AttentionSection) -> None:
    """What is handed on counts once, where it is made. Masks of windows, which the plan counts apart, are as many as in
    plain attention, so the difference to it is compared.
    """

    def planned(config: AttentionSection) -> float:
        sharing = Sharing(bf16=False, masked=False, device="cpu", seq_len=32)
        each = layer_configs(MODEL, config, vocab_size=VOCAB)
        return sum(footprint(MODEL, one, sharing).kept(32) for one in each)

    found = planned(plain(config)) - planned(config)
    real = chain_bytes(plain(config), recompute="none") - chain_bytes(config, recompute="none")
    assert found == pytest.approx(real, abs=1)
    assert (real != 0) == (config is not DENSE["fixed"])  # which keeps nothing more


@each_form
def test_recomputed_blocks_keep_their_input_and_what_they_hand_on(config: AttentionSection) -> None:
    sharing = Sharing(bf16=False, masked=False, device="cpu", seq_len=32)
    prints = [footprint(MODEL, one, sharing) for one in layer_configs(MODEL, config, vocab_size=VOCAB)]
    row = 4 * MODEL.width
    handed = sum(row + one.handed_per_token for one in prints) * 32
    assert handed == pytest.approx(chain_bytes(config, recompute="block"), rel=1e-6)


def test_context_ranks_keep_exchanged_heads_in_every_layer() -> None:
    """The exchange gives each layer its own copy of keys and values for whole sequences."""
    first, second = layer_configs(MODEL, GqaConfig(**GROUPED, share_kv=2), vocab_size=VOCAB)[:2]
    shared = Sharing(bf16=False, masked=False, device="cpu", seq_len=32, context=2)
    assert footprint(MODEL, second, shared).dealt_per_token == footprint(MODEL, first, shared).dealt_per_token > 0
    alone = footprint(MODEL, second, Sharing(bf16=False, masked=False, device="cpu", seq_len=32))
    assert footprint(MODEL, second, shared).kept_per_token >= alone.kept_per_token + 2 * 2 * 6 * 4


@each_form
def test_attention_starts_with_the_strength_that_is_asked_for(config: AttentionSection) -> None:
    scales = branch_scales(MODEL, config, vocab_size=VOCAB, seed=1, tokens=tokens(), segments=SEGMENTS, target=0.3)
    decoder = Decoder(MODEL, config, vocab_size=VOCAB, seed=1, scales=scales).eval()
    blocks = {i: block for i, block in enumerate(decoder.blocks) if isinstance(block, Block)}
    with torch.no_grad(), measured_branches(blocks) as found:
        decoder(tokens(), tokens(), SEGMENTS)
    for sums in found.values():
        assert branch_ratios(sums)["attention"] == pytest.approx(0.3, rel=3e-4)


def test_the_contexts_of_a_pass_let_go_of_what_no_layer_needs() -> None:
    contexts = LayerContexts([Context(rope=(torch.zeros(0), torch.zeros(0)))] * 5, [None, None, 0, None, 1])
    heads = tuple(torch.zeros(1) for _ in range(5))
    held = []
    for i in range(5):
        context = contexts.at(i)
        assert context.handed == (() if i not in (2, 4) else (heads[i // 2 - 1],))
        contexts.hand_on(i, (heads[i],))
        held.append(sorted(contexts._handed))
    assert held == [[0], [0, 1], [1], [1], []]


# ---------------------------------------------------------------- ranks and stages


@pytest.mark.parametrize("name", ["fixed", "learned", "learned, uneven", "shared", "shared by 3", "shared, uneven"])
def test_two_tensor_parallel_ranks_add_up_to_the_model(name: str) -> None:
    """Each rank hands on its own groups. Gradients of what all ranks hold in full are sums over ranks."""
    config = DENSE[name]
    whole = made(config)
    ranks = []
    for index in range(2):
        part = deepcopy(whole)
        for block in part.blocks:
            assert isinstance(block, Block)
            cut_attention(block.attn, block._attention_shards, Ranks(index=index, count=2))
        ranks.append(part)
    contexts = [each._contexts.of(tokens(), SEGMENTS, dtype=torch.float64) for each in (*ranks, whole)]
    x = F.embedding(tokens(), whole.embedding).detach().requires_grad_()
    y, z = x, x
    for i, block in enumerate(whole.blocks):
        assert isinstance(block, Block)
        sums = []
        for own, context in zip(ranks, contexts[:2], strict=True):
            out = own.blocks[i].get_submodule("attn")(block.attn_norm(y), context.at(i))
            context.hand_on(i, out.handed)
            sums.append(out.y)
        y = y + sums[0] + sums[1]
        out = block.attn(block.attn_norm(z), contexts[2].at(i))
        contexts[2].hand_on(i, out.handed)
        z = z + out.y
    torch.testing.assert_close(y, z, rtol=0, atol=1e-12)
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    (y * weight).sum().backward()
    taken = [dict(each.named_parameters()) for each in ranks]
    for p in whole.parameters():  # norms of the whole model were used by both passes
        p.grad = None
    (z * weight).sum().backward()
    seen = 0
    for full_name, p in whole.named_parameters():
        if ".attn." not in full_name:
            continue
        assert p.grad is not None
        parts = [each[full_name].grad for each in taken]
        assert parts[0] is not None and parts[1] is not None
        shard = whole.shards.get(full_name)
        joined = parts[0] + parts[1] if shard is None else torch.cat(parts, shard.dim)
        torch.testing.assert_close(joined, p.grad, rtol=1e-10, atol=1e-11)
        seen += shard is None and ".mix_" in full_name
    assert seen == (8 if config.value_residual == "learned" else 0)


@pytest.mark.parametrize("config", [DENSE["learned"], DENSE["shared"]], ids=["learned", "shared"])
def test_context_parallel_ranks_hand_on_their_part_of_the_sequences(config: GqaConfig, share_sequences: Any) -> None:
    first, second = (made(config).attention_layers()[i] for i in range(2))
    x = torch.randn(2, BATCH, 10, MODEL.width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x.requires_grad_()
    rope = rope_tables(10, config.rotated, config.rope_base, x.device)
    documents = Documents.of(SEGMENTS[:, :10].contiguous())
    whole = Context(rope=rope, documents=documents)

    def both(rank: int | None, inputs: Tensor, context: Context) -> Tensor:
        one, two = (first, second) if rank is None else copies[rank]
        one_in, two_in = inputs.unbind(2)
        handed = one(one_in, context).handed
        return two(two_in, replace(context, handed=handed)).y

    copies = [(deepcopy(first), deepcopy(second)) for _ in range(2)]
    stacked = x.movedim(0, 2)  # [B, S, 2, d]
    parts = share_sequences(2, stacked, whole, both)
    alone = both(None, stacked, whole)
    together = torch.cat(parts, 1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    weight = torch.linspace(-1, 2, alone.numel(), dtype=alone.dtype).view_as(alone)
    (mine,), (theirs,) = (torch.autograd.grad((y * weight).sum(), x, retain_graph=True) for y in (together, alone))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)
    assert mine[0].abs().max() > 0  # through what was handed on


def pieces_of(config: AttentionSection, layers: int = 5) -> list[int]:
    return stage_pieces(layer_configs(MODEL.model_copy(update={"layers": layers}), config, vocab_size=VOCAB))


def test_layers_that_take_from_earlier_ones_lie_in_one_stage() -> None:
    local = MixedConfig(
        kinds={"local": LOCAL, "plain": GqaConfig(**GROUPED)}, pattern=["local", "plain", "local", "plain"]
    )
    assert pieces_of(GqaConfig(**GROUPED)) == [1] * 5
    assert pieces_of(DENSE["learned"]) == [5]
    assert pieces_of(DENSE["shared"]) == [2, 2, 1] and pieces_of(DENSE["shared by 3"], 8) == [3, 3, 2]
    assert pieces_of(local, 8) == [3, 1, 3, 1]  # 0 and 2, with the plain layer between them
    assert pieces_of(FORMS["mixed"]) == [5]  # 0 -> 2, 1 -> 4


def test_bounds_of_stages_do_not_cut_pieces() -> None:
    costs = [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.5]
    assert stage_bounds(costs, 2) == [0, 4, 9]
    assert stage_bounds(costs, 2, [2, 2, 2]) == [0, 5, 9]  # 4 and 2.5, not 2 and 4.5
    assert stage_bounds(costs, 3, [2, 2, 2]) == [0, 3, 5, 9]
    assert stage_bounds(costs, 3, [1] * 6) == stage_bounds(costs, 3)
    with pytest.raises(ValueError, match="3 layers cannot be split into 4 stages"):
        stage_bounds(costs, 4, [2, 2, 2])


def test_a_config_of_no_layer_has_no_costs() -> None:
    """It does not say whether it is that of a layer that has keys and values."""
    for config in (DENSE["shared"], DENSE["learned"]):
        with pytest.raises(AssertionError, match="ask the config of one layer"):
            config.num_params(width=MODEL.width)


def test_configs_of_layers_are_compared_with_their_place() -> None:
    config: AttentionConfig = DENSE["shared"]
    assert config.layer(0, 5) != config.layer(1, 5) and config.layer(1, 5) == config.layer(1, 5)
    assert config.model_dump() == config.layer(1, 5).model_dump()
