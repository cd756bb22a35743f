"""RoPE: scores depend only on distances."""

import torch

from headway.kernels.rope import apply_rope, rope_tables

CPU = torch.device("cpu")


def test_follows_the_textbook_rotation_of_planes():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    turned = apply_rope(x, rope_tables(5, 8, 100.0, CPU))
    for t in range(5):
        for i in range(4):
            angle = torch.tensor(t / 100.0 ** (i / 4), dtype=torch.float64)
            a, b = x[:, t, :, i], x[:, t, :, i + 4]
            # tables are fp32, so the comparison ends at its precision
            torch.testing.assert_close(turned[:, t, :, i], a * angle.cos() - b * angle.sin(), rtol=0, atol=1e-6)
            torch.testing.assert_close(turned[:, t, :, i + 4], b * angle.cos() + a * angle.sin(), rtol=0, atol=1e-6)


def test_dot_products_depend_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 1, 16, dtype=torch.float64)
    rope = rope_tables(64, 16, 10_000.0, CPU)
    q_all, k_all = apply_rope(q.expand(1, 64, 1, 16), rope)[0, :, 0], apply_rope(k.expand(1, 64, 1, 16), rope)[0, :, 0]
    scores = q_all @ k_all.T
    for distance in (0, 7, 31):
        same = scores.diagonal(-distance)
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=0, atol=1e-5)  # fp32 tables
    assert (scores[31, 0] - scores[0, 0]).abs() > 1e-3


def test_partial_rotation_leaves_the_other_channels_alone():
    x = torch.randn(1, 6, 2, 10)
    turned = apply_rope(x, rope_tables(6, 4, 10_000.0, CPU))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[..., :4], apply_rope(x[..., :4], rope_tables(6, 4, 10_000.0, CPU)))
    assert torch.equal(apply_rope(x, rope_tables(6, 0, 10_000.0, CPU)), x)


def test_bf16_is_rounded_once():
    x, rope = torch.randn(1, 9, 2, 8).bfloat16(), rope_tables(9, 8, 10_000.0, CPU)
    assert torch.equal(apply_rope(x, rope), apply_rope(x.float(), rope).bfloat16())


def test_late_positions_keep_their_phase():
    cos, sin = rope_tables(100_001, 2, 10_000.0, CPU)
    angle = torch.tensor(100_000.0, dtype=torch.float64)
    torch.testing.assert_close(cos[-1, 0].double(), angle.cos(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin[-1, 1].double(), angle.sin(), rtol=0, atol=1e-7)
