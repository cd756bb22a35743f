"""Properties of every mechanism: causality, independence of sequences and documents, exact costs, sharding."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from headway.model import base
from headway.model.attention.block_sparse import BlockSparseConfig
from headway.model.attention.namoh import NamohConfig
from headway.model.attention.registry import MECHANISMS
from headway.model.config import ModelConfig
from headway.model.cost import account
from headway.model.router import Router
from headway.model.shard import is_cut

# Torch does not look into operations of ours; shapes of what they multiply, which on a CPU is dense. It does not count
# triangular systems either: n (n - 1) / 2 multiplications and additions for each column, as the diagonal is 1.
COUNTED = {
    torch.ops.aten.linalg_solve_triangular: lambda a, b, *_, out_shape, **__: math.prod(b) * (b[-2] - 1),
    torch.ops.headway.routed_project: lambda x, w, *_, out_shape: 2 * x[0] * x[1] * w[0],
    torch.ops.headway.routed_combine: lambda slots, w, *_, out_shape: 2 * slots[0] * w[0] * w[1],
}
SEGMENTS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2])


def rounding(mechanism):
    """0: exact. Where shapes follow the routing, as of products of one expert's tokens alone, so does rounding."""
    return 1e-13 if mechanism.reads_routing else 0


@pytest.mark.parametrize("packed", [False, True])
def test_a_token_changes_nothing_before_it(mechanism, decoder, tokens, packed):
    model = decoder(mechanism)
    segments = SEGMENTS.expand(3, 11) if packed else None
    before = model.logits(tokens, segments)
    for t in (0, 5, 10):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 37
        after = model.logits(changed, segments)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=rounding(mechanism))
        assert not torch.equal(after[:, t], before[:, t])


def test_earlier_tokens_of_the_document_are_seen(mechanism, decoder, tokens):
    model = decoder(mechanism)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 37
    for segments, last in ((None, 10), (SEGMENTS.expand(3, 11), 8)):
        difference = (model.logits(changed, segments) - model.logits(tokens, segments)).abs().amax(-1)
        assert (difference[:, 4 : last + 1] > 1e-9).all()


def test_a_document_does_not_see_the_one_before_it(mechanism, decoder, tokens):
    model = decoder(mechanism)
    segments = SEGMENTS.expand(3, 11)
    changed = tokens.clone()
    changed[:, :4] = (changed[:, :4] + 1) % 37
    after, before = model.logits(changed, segments)[:, 4:], model.logits(tokens, segments)[:, 4:]
    torch.testing.assert_close(after, before, rtol=0, atol=rounding(mechanism))
    assert not torch.equal(model.logits(changed)[:, 4:], model.logits(tokens)[:, 4:])


def test_a_packed_document_equals_the_document_alone(mechanism, decoder, tokens):
    model = decoder(mechanism)
    packed = model.logits(tokens, SEGMENTS.expand(3, 11))[:, 4:9]
    # rotary tables are fp32: shifting the positions moves scores by about 1e-7
    torch.testing.assert_close(packed, model.logits(tokens[:, 4:9]), rtol=0, atol=1e-5)


def test_a_sequence_does_not_depend_on_its_batch(mechanism, decoder, tokens):
    model = decoder(mechanism)
    labels = tokens.roll(-1, 1)
    alone = [model(tokens[i : i + 1], labels[i : i + 1]) for i in range(3)]
    together = model(tokens, labels)
    torch.testing.assert_close(
        torch.cat([model.logits(tokens[i : i + 1]) for i in range(3)]), model.logits(tokens), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(together.loss_sum, sum(out.loss_sum for out in alone), rtol=1e-12, atol=0)
    torch.testing.assert_close(together.aux_loss, sum(out.aux_loss for out in alone) / 3, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_params_are_those_of_the_module(mechanism, decoder, tied):
    model = decoder(mechanism, tied=tied)
    config = _config(tied)
    cost = account(config, mechanism, vocab_size=37, seq_len=11)
    assert cost.num_params == sum(p.numel() for p in model.parameters())
    counted = dict.fromkeys(cost.params_by_part, 0)
    for name, parameter in model.named_parameters():
        part = {"embedding": "embedding", "head": "head", "norm": "norm"}.get(name.split(".")[0])
        part = part or {"attn": "attention", "mlp": "mlp"}.get(name.split(".")[2], "norm")
        counted[part] += parameter.numel()
    assert counted == cost.params_by_part


def test_executed_flops_are_those_that_torch_counts(mechanism, decoder, tokens, monkeypatch):
    """Torch counts matrix products: the core as a full square, unless it has no scores, and no gating products."""
    model = decoder(mechanism)
    if isinstance(mechanism, BlockSparseConfig):  # `test_blocks.py` counts the scores of its core
        monkeypatch.setattr(base, "blocks_core", lambda q, k, v, chosen, blocks: torch.zeros_like(q))
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=COUNTED) as counter,
    ):
        model.logits(tokens)
    per_token = counter.get_total_flops() / tokens.numel()
    cost = account(_config(True), mechanism, vocab_size=37, seq_len=11)
    maps = mechanism.score_maps
    if isinstance(mechanism, NamohConfig):  # torch has no count for packed pairs: `test_namoh.py` counts their scores
        maps = mechanism.shared_heads
    if isinstance(mechanism, BlockSparseConfig):
        maps = 0
    square = 2 * 4 * mechanism.core_channels * maps * 11
    gating = 2 * mechanism.gating_flops_per_token()  # in two layers
    core = cost.attention_core_flops.executed if mechanism.score_maps else 0  # without a softmax, counted as it is
    executed = cost.flops_per_token.executed - core - gating + square
    assert executed == pytest.approx(per_token, rel=1e-12)  # a window's keys per token are a fraction
    assert cost.flops_per_token.useful <= cost.flops_per_token.executed


def test_kv_bytes_are_those_that_decoding_keeps(mechanism, decoder, tokens):
    model = decoder(mechanism).eval()
    cache = model.new_cache()
    for part in tokens.split((4, 6, 1), 1):
        model.logits(part, cache=cache)
    cost = account(_config(True), mechanism, vocab_size=37, seq_len=11, bytes_per_element=8)
    assert cache.numbers * 8 == pytest.approx(cost.kv_bytes_per_token * tokens.numel(), rel=1e-12)
    assert cache.nbytes == cache.numbers * 8


@pytest.mark.parametrize("chunks", [(4, 5, 1, 1), (1,) * 11])
def test_decoding_in_chunks_equals_the_full_pass(mechanism, decoder, tokens, chunks):
    model = decoder(mechanism).eval()
    cache = model.new_cache()
    parts = [model.logits(part, cache=cache) for part in tokens.split(chunks, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model.logits(tokens), rtol=0, atol=1e-12)
    assert cache.tokens == 11


def test_every_parameter_gets_a_gradient(mechanism, decoder, tokens):
    model = decoder(mechanism)
    out = model(tokens, tokens.roll(-1, 1))
    (out.loss_sum + out.aux_loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_every_registered_mechanism_is_here(mechanisms):
    missing = MECHANISMS.keys() - {config.type for config in mechanisms.values()}
    assert not missing, (
        f"{sorted(missing)} go through no generic test: add a variant with that attention.type to "
        "yaml/studies/all-mechanisms.yaml"
    )


def test_a_type_without_an_entry_of_its_own_is_taken_from_the_study(study_mechanisms, mechanisms):
    found = study_mechanisms({config.type for config in mechanisms.values()} - {"rgqa", "moa"})
    assert {name: config.type for name, config in found.items()} == {"study: rgqa": "rgqa", "study: moa": "moa"}


def test_mechanisms_that_cannot_be_sharded_are_known(whole_mechanisms, mechanisms):
    """One KV head; groups that follow the keys; a router that reads the queries of all ranks."""
    here = {name for name in whole_mechanisms if not name.startswith("study: ")}
    assert here == {"moa", "mqa-gated", "dynamic-gqa", "moh-llama"}, (
        "say why a new entry cannot be cut, and add it here"
    )
    for name in whole_mechanisms:
        assert {shard.units for shard in mechanisms[name].shards().values()} == {1}


def test_ranks_that_own_whole_groups_add_up_to_the_layer(cut_mechanism, layer, context, lockstep, x):
    """Tensor parallelism as declared: two ranks hold a slice of every sharded parameter each, outputs are summed."""
    mechanism = cut_mechanism
    full = layer(mechanism)
    shards = mechanism.shards()
    assert set(shards) <= {name for name, _ in full.named_parameters()}
    parts = []
    for rank in range(2):
        part = layer(mechanism)
        for name, shard in shards.items():
            tensor = full.get_parameter(name)
            assert shard.units % 2 == 0 and tensor.shape[shard.dim] % shard.units == 0
            owner, _, own_name = name.rpartition(".")
            mine = torch.nn.Parameter(tensor.detach().chunk(2, shard.dim)[rank])
            part.get_submodule(owner).register_parameter(own_name, mine)
        for name, buffer in full.named_buffers():
            owner, _, own_name = name.rpartition(".")
            router = part.get_submodule(owner)
            assert isinstance(router, Router)
            mine = buffer.chunk(2)[rank] if is_cut(owner, router, shards) else buffer.clone()
            router.register_buffer(own_name, mine)
        parts.append(part)
    whole = full(x, context(mechanism))
    outs = lockstep(parts, lambda part: part(x, context(mechanism)))
    torch.testing.assert_close(outs[0].y + outs[1].y, whole.y, rtol=0, atol=1e-12)
    if whole.aux_loss is not None:
        torch.testing.assert_close((outs[0].aux_loss + outs[1].aux_loss) / 2, whole.aux_loss, rtol=0, atol=1e-14)


def _config(tied):
    return ModelConfig(width=20, layers=2, ffn_width=28, tied_embeddings=tied)
