"""Router statistics: sums over micro-batches, and the definitions of the figures."""

import math
from typing import Any

import pytest
import torch

from headway.kernels.rope import rope_tables
from headway.model.attention.rgqa import RgqaConfig
from headway.model.balance import BalanceConfig
from headway.model.base import Context
from headway.model.measure.router_meter import TOKEN_BUCKETS, RouterMeter, figures, token_information
from headway.model.router import LinearRouterConfig

SHAPE: dict[str, Any] = {"heads": 8, "kv_heads": 2, "head_dim": 6}


def picks(logits, k):
    return torch.zeros_like(logits).scatter(-1, logits.topk(k).indices, 1.0)


def measured(logits, k, tokens, chosen=None) -> Any:
    """Stats of one update; gates are sigmoids."""
    meter = RouterMeter()
    chosen = picks(logits, k) if chosen is None else chosen
    meter.update(logits, chosen, logits.topk(k).values.sigmoid(), tokens)
    return meter.stats()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_sums_are_those_of_a_loop_over_tokens(tokens, k):
    logits = torch.randn(3, 11, 2, 4)
    load, d, _ = measured(logits, k, tokens)
    wanted = {name: [0.0, 0.0] for name in ("entropy", "gate", "top1_margin", "close", "switches")}
    counts = torch.zeros(TOKEN_BUCKETS, 2, 4)
    for b in range(3):
        for g in range(2):
            before = None
            for s in range(11):
                r = logits[b, s, g].double()
                order = r.argsort(descending=True).tolist()
                p = r.softmax(0)
                chosen = set(order[:k])
                top1 = float(r[order[0]] - r[order[1]])
                wanted["entropy"][g] -= float((p * p.log()).sum())
                wanted["gate"][g] += float(r[order[:k]].sigmoid().sum())
                wanted["top1_margin"][g] += top1
                wanted["close"][g] += top1 < 0.1
                wanted["switches"][g] += 0 if before is None else len(chosen - before)
                counts[tokens[b, s], g, list(chosen)] += 1
                before = chosen
    assert d.tokens == 33 and d.choices.tolist() == [33 * k] * 2 and d.followers.tolist() == [30 * k] * 2
    assert torch.equal(d.token_load, counts) and torch.equal(load, counts.sum(0))
    for name, values in wanted.items():
        assert getattr(d, name).tolist() == pytest.approx(values, rel=1e-5, abs=1e-6), name  # sums are fp32


def test_micro_batches_add_up_to_the_batch_and_a_reset_clears_the_sums(tokens):
    logits = torch.randn(3, 11, 2, 4)
    whole, meter = measured(logits, 2, tokens), RouterMeter()
    for row in range(3):
        part = logits[row : row + 1]
        meter.update(part, picks(part, 2), part.topk(2).values.sigmoid(), tokens[row : row + 1])
    cut: Any = meter.stats()
    assert torch.equal(cut.load, whole.load)
    for a, b in zip(cut.detail.tensors(), whole.detail.tensors(), strict=True):
        torch.testing.assert_close(a, b)
    meter.reset()
    assert meter.stats() is None


def test_loads_alone_are_counted_where_details_are_not_wanted(layer, context, x):
    config = RgqaConfig(**SHAPE, top_k=2)
    module = layer(config)
    module.watch_routers(closely=False)
    module(x, context(config))
    load, detail, _ = module.router_stats()["router"]
    assert load.sum() == 33 * 2 * 2 and detail is None
    module.reset_router_stats()
    module.watch_routers(closely=True)
    module(x, context(config))
    assert torch.equal(module.router_stats()["router"].load, load)
    assert module.router_stats()["router"].detail.tokens == 33


def test_evaluation_is_not_counted(layer, context, x):
    config = RgqaConfig(**SHAPE, top_k=2)
    module = layer(config).eval()
    module(x, context(config))
    assert module.router_stats() == {}
    module.train()(x, context(config))
    assert set(module.router_stats()) == {"router"}


def test_a_bias_that_overrides_the_logits_changes_the_load_and_not_the_margin(layer, x, tokens):
    module = layer(RgqaConfig(**SHAPE, top_k=1, balance=BalanceConfig(loss_free_rate=1e-3)))
    module.router.bias[:, 3] = 10.0
    module.router(x, Context(rope=rope_tables(11, 6, 1e4, x.device), tokens=tokens), k=1)
    detail = module.router_stats()["router"].detail
    logits = (x @ module.router.w.T).unflatten(-1, (2, 4))
    best = logits.topk(2).values
    assert detail.top1_margin.tolist() == pytest.approx((best[..., 0] - best[..., 1]).sum((0, 1)).tolist(), rel=1e-5)
    assert detail.token_load.sum(0).tolist() == [[0, 0, 0, 33]] * 2


def test_equal_logits_have_no_margin_and_count_as_close(tokens):
    detail = measured(torch.zeros(3, 11, 2, 4), 1, tokens).detail
    assert detail.top1_margin.tolist() == [0, 0] and detail.close.tolist() == [33, 33]
    assert detail.entropy.tolist() == pytest.approx([33 * math.log(4)] * 2)


def test_figures_are_means_per_group(tokens):
    logits = torch.randn(3, 11, 2, 4)
    logits[:, :, 1] = torch.tensor([5.0, 0.0, 0.0, 1.0])  # the second group always takes its first expert
    load, detail, _ = measured(logits, 1, tokens)
    found = figures(load, detail)
    assert found.tokens == 33 and found.load[1] == [1, 0, 0, 0]
    assert found.dead[1] == 3 and found.effective[1] == pytest.approx(1.0)
    share = load[0] / 33
    assert found.effective[0] == pytest.approx(float((-torch.special.xlogy(share, share).sum()).exp()), rel=1e-6)
    assert found.switch_rate[1] == 0 and found.top1_margin[1] == pytest.approx(4.0)
    assert found.gate[1] == pytest.approx(1 / (1 + math.exp(-5)))
    assert found.mutual_information[1] == pytest.approx(0, abs=1e-9)
    assert math.isnan(found.information_share[1])  # there is nothing to know of a constant


def test_an_expert_is_dead_below_a_thousandth_of_the_load(tokens):
    detail = measured(torch.randn(3, 11, 1, 4), 1, tokens).detail
    assert figures(torch.tensor([[5000.0, 4989.0, 11.0, 0.0]]), detail).dead == [1]
    assert figures(torch.tensor([[5000.0, 4991.0, 9.0, 0.0]]), detail).dead == [2]


def test_without_token_ids_there_are_no_token_figures():
    found = figures(*measured(torch.randn(3, 11, 2, 4), 1, None)[:2])
    assert all(math.isnan(v) for v in found.mutual_information + found.information_share)


# ---------------------------------------------------------------- mutual information with the token


@pytest.mark.parametrize("k", [1, 2])
def test_a_router_that_depends_on_the_token_id_only_reaches_the_maximum_information(k):
    tokens = torch.randint(0, 24, (4, 4096))
    table = torch.randn(24, 1, 6)
    found = figures(*measured(table[tokens], k, tokens)[:2])
    wanted = -sum(p * math.log(p) for p in found.load[0] if p) - math.log(k)
    assert found.mutual_information[0] == pytest.approx(wanted, rel=1e-3)
    assert found.information_share[0] == pytest.approx(1.0, rel=1e-6 if k == 1 else 1e-3)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_bias_that_is_subtracted_is_that_of_independent_choices(k):
    """400 groups are 400 draws: their mean is known to a few per cent of itself."""
    tokens = torch.randint(0, 64, (1, 4096))
    logits = torch.randn(1, 4096, 400, 4)
    detail = measured(logits, k, tokens).detail
    information, bias, _ = token_information(detail.like([t.double() for t in detail.tensors()]))
    joint = detail.token_load.double().permute(1, 0, 2) / (4096 * k)
    product = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
    raw = torch.where(joint > 0, joint * (joint / product.clamp_min(1e-30)).log(), 0.0).sum((1, 2))
    assert raw.mean() > 0.01 / k**2
    assert bias.mean() == pytest.approx(float(raw.mean()), rel=0.05)
    torch.testing.assert_close(information, (raw - bias).clamp_min(0), rtol=0, atol=1e-10)


def test_selecting_all_experts_has_no_information():
    tokens = torch.randint(0, 64, (1, 4096))
    information, bias, most = token_information(measured(torch.randn(1, 4096, 2, 4), 4, tokens).detail)
    for tensor in (information, bias, most):
        torch.testing.assert_close(tensor, torch.zeros(2), rtol=0, atol=1e-5)


def test_bucketing_ids_can_only_lower_the_information():
    tokens = torch.randint(0, 2, (1, 4096)) * TOKEN_BUCKETS  # two ids, one bucket
    table = torch.eye(4)[:, None]
    found = figures(*measured(table[tokens // TOKEN_BUCKETS], 1, tokens)[:2])
    assert found.mutual_information[0] == pytest.approx(0, abs=1e-3)
    assert found.load[0][0] == pytest.approx(0.5, abs=0.05)


def test_learned_routers_report_through_the_layer(layer, context, x, tokens):
    config = RgqaConfig(**SHAPE, top_k=2, router=LinearRouterConfig())
    module = layer(config)
    module(x, context(config))
    load, detail, _ = module.router_stats()["router"]
    assert torch.equal(detail.token_load.sum(0), load)
    assert detail.token_load.sum((1, 2)).nonzero().flatten().tolist() == sorted(set(tokens.flatten().tolist()))
