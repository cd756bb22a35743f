"""Context parallelism: attention, losses, gradients and statistics equal those of the whole sequences."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from headway.kernels.attention import core
from headway.kernels.documents import Documents
from headway.model.attention.gqa import GqaConfig
from headway.model.attention.gqe import GqeConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.balance import BalanceConfig
from headway.model.base import SequenceRanks

SEGMENTS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])


def copies(module, ranks):
    """One per rank, each with statistics of its own, all with the same parameters."""
    return [deepcopy(module, {id(p): p for p in module.parameters()}) for _ in range(ranks)]


def results(y, aux_loss, weight, wrt):
    """[y, loss, gradients] of a loss that weighs every output differently."""
    loss = (y * weight).sum() + (0 if aux_loss is None else aux_loss)
    return [y, loss, *torch.autograd.grad(loss, wrt)]


def mean_loss(outputs):
    return None if outputs[0].aux_loss is None else torch.stack([out.aux_loss for out in outputs]).mean()


@pytest.mark.parametrize("packed", [False, True])
def test_parts_of_sequences_together_are_the_layer_and_its_gradients(
    shared_mechanism, layer, context, share_sequences, x, packed
):
    mechanism = shared_mechanism
    module, x = layer(mechanism), x[:, :10].requires_grad_()
    documents = Documents.of(SEGMENTS.expand(3, 10)) if packed else None
    whole, wrt, weight = context(mechanism, 10, documents), [x, *module.parameters()], torch.randn_like(x)
    modules = copies(module, 2)
    parts = share_sequences(2, x, whole, lambda rank, part, own: modules[rank](part, own))
    y, aux_loss, _ = module(x, whole)
    mine = results(torch.cat([out.y for out in parts], 1), mean_loss(parts), weight, wrt)
    for shared, alone in zip(mine, results(y, aux_loss, weight, wrt), strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-10, atol=1e-10)


def test_parts_of_the_pool_are_those_of_the_whole(shared_mechanism, layer, context, share_sequences, x):
    mechanism = shared_mechanism
    module, x = layer(mechanism).eval(), x[:, :10]
    whole = context(mechanism, 10)
    parts = share_sequences(2, x, whole, lambda rank, part, own: module.pool(part, own))
    pool = module.pool(x, whole)
    if pool is None:
        assert parts == [None, None]
        return
    for name in ("projections", "outputs"):
        together = torch.cat([getattr(part, name) for part in parts], 1)
        torch.testing.assert_close(together, getattr(pool, name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
@pytest.mark.parametrize("name", ["f_p", "cv2", "z", "entropy"])
@pytest.mark.parametrize(
    "config",
    [
        RgqaConfig(heads=8, kv_heads=2, head_dim=6, top_k=2),
        SwitchHeadConfig(kv_heads=2, head_dim=6, experts=3, top_k=2),
    ],
    ids=["rgqa", "switchhead"],
)
@pytest.mark.parametrize("ranks", [2, 5])
def test_each_loss_takes_its_means_over_whole_sequences(config, layer, context, share_sequences, x, ranks, name, scope):
    balance = BalanceConfig.model_validate({name: 1.0, "scope": scope})
    config = config.model_copy(update={"balance": balance})
    module, x = layer(config), x[:, :10].requires_grad_()
    whole, wrt = context(config, 10), [x, *(p for n, p in module.named_parameters() if "w_" not in n)]
    modules = copies(module, ranks)
    parts = share_sequences(ranks, x, whole, lambda rank, part, own: modules[rank](part, own))
    expected, mine = module(x, whole).aux_loss, mean_loss(parts)
    assert expected is not None and mine is not None
    torch.testing.assert_close(mine, expected, rtol=1e-13, atol=0)
    if name != "z":
        assert all(torch.equal(out.aux_loss, parts[0].aux_loss) for out in parts)
    for shared, alone in zip(torch.autograd.grad(mine, wrt), torch.autograd.grad(expected, wrt), strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-10, atol=1e-14)


def test_statistics_of_the_parts_add_up(shared_mechanism, layer, context, share_sequences, x):
    """But for the pairs of tokens that two ranks hold one of each."""
    mechanism = shared_mechanism
    module, x = layer(mechanism), x[:, :10]
    modules, whole = copies(module, 2), context(mechanism, 10)
    share_sequences(2, x, whole, lambda rank, part, own: modules[rank](part, own))
    module(x, whole)
    for name, stats in module.router_stats().items():
        first, second = (each.router_stats()[name] for each in modules)
        assert torch.equal(first.load + second.load, stats.load)
        pairs = 3 * stats.detail.choices / stats.detail.tokens  # of each of 3 sequences: one token's k choices
        assert torch.equal((first.detail + second.detail).followers, stats.detail.followers - pairs)
        for field in ("tokens", "choices", "entropy", "gate", "token_load"):
            together = getattr(first.detail + second.detail, field)
            torch.testing.assert_close(together, getattr(stats.detail, field), rtol=1e-6, atol=0)
    for name, total in module.step_sums().items():
        torch.testing.assert_close(sum(each.step_sums()[name] for each in modules), total, rtol=1e-12, atol=0)


def attended(module, x, context):
    """Number of KV heads in each call of the core in one pass."""
    calls = []

    def counted(q, k, *args, window=None):
        assert q.shape[2] % k.shape[2] == 0
        calls.append(k.shape[2])
        return core(q, k, *args, window=window)

    module(x, replace(context, sequence=SequenceRanks(attend=counted)))
    return tuple(calls)


def test_kv_heads_of_each_call_of_the_core_are_those_that_the_config_says(shared_mechanism, layer, context, x):
    assert attended(layer(shared_mechanism), x, context(shared_mechanism)) == shared_mechanism.attended_heads()


@pytest.mark.parametrize(
    ("config", "heads", "halves"),
    [
        (GqaConfig(heads=8, kv_heads=4, head_dim=6, windows=[None, 9, None, 9]), (2, 2), (1, 1)),
        (GqaConfig(heads=12, kv_heads=4, head_dim=6, group_sizes=[1, 5, 1, 5]), (12,), (6,)),
        (GqaConfig(heads=12, kv_heads=4, head_dim=6, group_sizes=[1, 5, 1, 5], windows=[8, 9, 8, 9]), (2, 2), (1, 1)),
        (GqeConfig(heads=8, kv_heads=4, head_dim=6, top_k=1), (4, 1), (2, 1)),
        (GqeConfig(heads=8, kv_heads=4, head_dim=6, top_k=1, shared_head="none"), (4,), (2,)),
    ],
)
def test_tensor_parallel_ranks_share_the_heads_but_not_a_shared_head(config, heads, halves):
    assert (config.attended_heads(), config.attended_heads(tensor=2)) == (heads, halves)


def test_a_rank_of_two_attends_to_the_heads_that_the_config_says(cut_shared_mechanism, layer, context, lockstep, x):
    parts = []
    for _ in range(2):
        part = layer(cut_shared_mechanism)
        for name, shard in cut_shared_mechanism.shards().items():
            owner, _, own_name = name.rpartition(".")
            half = torch.nn.Parameter(part.get_parameter(name).detach().chunk(2, shard.dim)[0])
            part.get_submodule(owner).register_parameter(own_name, half)
        for name, buffer in list(part.named_buffers()):
            owner, _, own_name = name.rpartition(".")
            part.get_submodule(owner).register_buffer(own_name, buffer.chunk(2)[0])
        parts.append(part)
    calls = lockstep(parts, lambda part: attended(part, x, context(cut_shared_mechanism)))
    assert calls == [cut_shared_mechanism.attended_heads(tensor=2)] * 2
