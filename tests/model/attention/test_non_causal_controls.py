"""The checks of causality, chunked decoding and independence of the batch can fail: KDGQA fails each of them.

KDGQA (arXiv 2408.08454) allots query heads to KV heads by the norms of the keys, summed over the batch and the whole
sequence: made for images, it lets a token see later ones and a sequence see its batch.
"""

import importlib.util
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from headway.kernels.attention import core
from headway.model.attention.gqa import GqaConfig
from headway.model.attention.grouped import GroupedConfig, GroupedQueryAttention
from headway.model.base import AttentionOutput


class KdgqaConfig(GroupedConfig):
    """`even` gives every KV head as many query heads, which is GQA: the control of the control."""

    type: str = "kdgqa"
    kv_heads: int
    allocation: Literal["key_norms", "even"]

    @property
    def groups(self):
        return self.kv_heads

    def build(self, *, width, layers, init_std, norm_eps):
        return Kdgqa(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)


class Kdgqa(GroupedQueryAttention):
    """Contiguous runs of query heads, a run per KV head, as long as `allot` says."""

    def __init__(self, config, **sizes):
        super().__init__(config, **sizes)
        self.config = config

    def forward(self, x, context):
        q = self.q_rope(self.heads_of(x, self.w_q), context.rope)
        k, v = self.keys_and_values(x, context)
        if self.config.allocation == "even":
            runs = [self.config.heads_per_group] * self.config.groups
        else:
            runs = allot(k.norm(dim=(1, 3)).sum(0), self.config.heads)
        parts = [
            core(part, k[:, :, g : g + 1], v[:, :, g : g + 1], context.documents)
            for g, part in enumerate(q.split(runs, 2))
            if runs[g]
        ]
        return AttentionOutput(F.linear(torch.cat(parts, 2).flatten(2), self.w_o), None)


def allot(norms, heads):
    """Query heads per KV head in proportion to the min-max scaled norms [G]; rounding is made good one by one."""
    scaled = (norms - norms.min()) / (norms.max() - norms.min())
    runs = (scaled / scaled.sum() * heads).round().long().tolist()
    while sum(runs) > heads:
        runs[runs.index(max(runs))] -= 1
    while sum(runs) < heads:
        runs[runs.index(min(runs))] += 1
    return runs


def kdgqa(allocation):
    return KdgqaConfig(heads=24, kv_heads=3, head_dim=4, allocation=allocation)


def _load_checks():
    path = Path(__file__).with_name("test_every_mechanism.py")
    spec = importlib.util.spec_from_file_location("checks_of_every_mechanism", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


checks = _load_checks()

CHECKS = {
    "causality": lambda *given: checks.test_a_token_changes_nothing_before_it(*given, packed=False),
    "causality, packed": lambda *given: checks.test_a_token_changes_nothing_before_it(*given, packed=True),
    "documents": checks.test_a_document_does_not_see_the_one_before_it,
    "batch invariance": checks.test_a_sequence_does_not_depend_on_its_batch,
    "chunked decoding": lambda *given: checks.test_decoding_in_chunks_equals_the_full_pass(*given, chunks=(5, 6)),
}


@pytest.mark.parametrize("check", list(CHECKS))
def test_groups_by_the_norms_of_keys_fail_what_fixed_groups_pass(check, decoder, tokens):
    CHECKS[check](kdgqa("even"), decoder, tokens)
    with pytest.raises(AssertionError):
        CHECKS[check](kdgqa("key_norms"), decoder, tokens)


def test_the_last_token_reaches_the_first_through_the_allocation(decoder, tokens):
    model = decoder(kdgqa("key_norms"))
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 37
    assert (model.logits(changed)[:, :-1] - model.logits(tokens)[:, :-1]).abs().max() > 1e-3


def test_even_allocation_is_gqa(decoder, tokens):
    gqa = GqaConfig(heads=24, kv_heads=3, head_dim=4)
    torch.testing.assert_close(decoder(kdgqa("even")).logits(tokens), decoder(gqa).logits(tokens), rtol=0, atol=1e-12)


def test_allocated_heads_follow_min_max_scaled_norms_and_sum_to_all():
    assert allot(torch.tensor([1.0, 3.0, 2.0]), 12) == [0, 8, 4]
    assert allot(torch.tensor([1.0, 2.0, 2.0]), 3) == [0, 1, 2]  # 1.5 rounds to 2 twice
    assert allot(torch.tensor([1.0, 2.0, 2.0]), 5) == [1, 2, 2]  # 2.5 too
