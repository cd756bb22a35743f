"""Head diversity: each measure equals its formula, and measuring does not change the model."""

from typing import Any

import pytest
import torch

from headway.model.attention.gqa import GqaConfig, MhaConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.base import HeadPool
from headway.model.measure.diversity import (
    effective_rank,
    head_diversity,
    linear_cka,
    measured,
    token_cosine,
    weight_cosine,
)

G, M, D = 2, 3, 5


def random_pool(dtype=torch.float64):
    made = torch.randn(2, 11, G, M, D, dtype=dtype), torch.randn(2, 11, G, M, D, dtype=dtype)
    return HeadPool("query head", torch.randn(G, M, 40, dtype=dtype), *made)


def pairs():
    return [(g, m, n) for g in range(G) for m in range(M) for n in range(m)]


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_cosine_of_weights_is_the_mean_over_pairs_of_a_group():
    w = random_pool().weights
    wanted = sum(abs(cosine(w[g, m], w[g, n])) for g, m, n in pairs()) / len(pairs())
    assert float(weight_cosine(w)) == pytest.approx(wanted, rel=1e-12)


def test_cosine_of_vectors_is_signed_and_the_mean_over_tokens():
    q = random_pool().projections.flatten(0, 1)
    each = [cosine(q[t, g, m], q[t, g, n]) for g, m, n in pairs() for t in range(22)]
    assert min(each) < -0.5
    assert float(token_cosine(q.unflatten(0, (2, 11)))) == pytest.approx(sum(each) / len(each), rel=1e-12)


def test_effective_rank_is_the_exponential_of_the_entropy_of_singular_values():
    w = random_pool().weights
    wanted = 0.0
    for g in range(G):
        s = torch.linalg.svd(w[g]).S
        p = s / s.sum()
        wanted += float((-(p * p.log()).sum()).exp()) / G
    assert float(effective_rank(w)) == pytest.approx(wanted, rel=1e-12)


def test_cka_is_the_published_formula():
    o = random_pool().outputs.flatten(0, 1)
    wanted = 0.0
    for g, m, n in pairs():
        a, b = (o[:, g, i] - o[:, g, i].mean(0) for i in (m, n))
        wanted += float((a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())) / len(pairs())
    assert float(linear_cka(o.unflatten(0, (2, 11)))) == pytest.approx(wanted, rel=1e-12)


def test_cka_sees_through_rotation_scale_and_shift_and_cosine_does_not():
    one = torch.randn(2, 11, G, 1, D, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    same = torch.cat([one, 3 * one @ turn + 1], -2)
    assert float(linear_cka(same)) == pytest.approx(1.0, abs=1e-12)
    assert abs(float(token_cosine(same))) < 0.9


def test_equal_and_orthogonal_members_reach_the_limits_of_the_measures():
    pool = random_pool()
    equal = head_diversity(pool._replace(**{k: v.narrow(d, 0, 1).expand_as(v) for k, v, d in parts(pool)}))
    assert (equal.c_w, equal.c_q, equal.c_o, equal.cka) == pytest.approx((1, 1, 1, 1), abs=1e-12)
    # singular values of a matrix of rank 1 are rounding errors of about 1e-16, and their entropy some 1e-14
    assert equal.effective_rank == pytest.approx(1, abs=1e-6)
    orthogonal = torch.eye(M, 40, dtype=torch.float64).expand(G, M, 40)
    assert float(weight_cosine(orthogonal)) == 0
    assert float(effective_rank(orthogonal)) == pytest.approx(M, rel=1e-12)


def parts(pool):
    """(field, value, dimension of the members)."""
    return [("weights", pool.weights, 1), ("projections", pool.projections, 3), ("outputs", pool.outputs, 3)]


def test_members_with_zero_outputs_give_finite_measures():
    pool = random_pool()
    silent = head_diversity(pool._replace(outputs=torch.zeros_like(pool.outputs)))
    assert (silent.c_o, silent.cka) == (0, 0)


# ---------------------------------------------------------------- in a model


def test_measuring_happens_in_the_forward_pass_and_does_not_change_the_model(mechanism, decoder, tokens):
    model = decoder(mechanism).eval()
    before = model.logits(tokens)
    with measured(dict(enumerate(model.attention_layers()))) as found:
        assert torch.equal(model.logits(tokens), before)
    assert torch.equal(model.logits(tokens), before)
    assert all(not layer._forward_pre_hooks for layer in model.attention_layers())
    for index, layer in enumerate(model.attention_layers()):
        seen: list[HeadPool | None] = []
        hook = layer.register_forward_pre_hook(lambda layer, inputs, seen=seen: seen.append(layer.pool(*inputs)))
        model.logits(tokens)
        hook.remove()
        (pool,) = seen
        assert (pool is None) == (index not in found)
        if pool is not None:
            assert found[index] == head_diversity(pool)
            assert found[index].members == pool.weights.shape[1] == pool.outputs.shape[3] > 1


def test_measures_do_not_depend_on_the_selected_heads(decoder, tokens):
    """In the first layer: what reaches later ones has been through the choice."""
    common: dict[str, Any] = {"heads": 8, "kv_heads": 2, "head_dim": 6}
    found = []
    for config in (RgqaConfig(**common, top_k=1), RgqaConfig(**common, top_k=3), GqaConfig(**common)):
        model = decoder(config).eval()
        with measured(dict(enumerate(model.attention_layers()))) as measures:
            model.logits(tokens)
        found.append(measures)
    assert found[0][0] == found[1][0] == found[2][0]
    assert found[0][1] != found[2][1]


def test_groups_with_one_member_are_not_measured(decoder, tokens):
    model = decoder(MhaConfig(heads=4, head_dim=6)).eval()
    with measured(dict(enumerate(model.attention_layers()))) as found:
        model.logits(tokens)
    assert found == {}


def test_value_experts_are_compared_in_switchhead(decoder, tokens):
    model = decoder(SwitchHeadConfig(kv_heads=2, head_dim=6, experts=3, top_k=1)).eval()
    with measured(dict(enumerate(model.attention_layers()))) as found:
        model.logits(tokens)
    assert {d.member for d in found.values()} == {"value expert"} and found[0].members == 3


def test_random_heads_start_nearly_orthogonal_in_their_weights(decoder, tokens):
    model = decoder(GqaConfig(heads=8, kv_heads=2, head_dim=6)).eval()
    with measured(dict(enumerate(model.attention_layers()))) as found:
        model.logits(tokens)
    for diversity in found.values():
        # Mean |cos| in d D = 120 dimensions: sqrt(2 / (pi d D)) = 0.073; the mean of 12 pairs scatters by 0.02.
        assert diversity.c_w == pytest.approx(0.073, abs=0.05)
        assert diversity.effective_rank > 3.8
