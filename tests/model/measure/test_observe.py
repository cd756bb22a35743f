"""Observing a decoder changes nothing, shows the attention of the core, and switches single heads and experts off."""

import pytest
import torch

from headway.kernels.attention import core
from headway.model.base import SequenceRanks
from headway.model.measure.observe import Off, observed

SEGMENTS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2])


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_maps_are_the_attention_of_the_core_and_the_pass_is_the_same(shared_mechanism, decoder, tokens, packed):
    model, calls = decoder(shared_mechanism).eval(), []
    segments = SEGMENTS.expand(3, 11) if packed else None
    plain = model.logits(tokens, segments)

    def spy(q, k, v, documents, **options):
        o = core(q, k, v, documents, **options)
        calls.append((v.repeat_interleave(q.shape[2] // v.shape[2], 2), o))
        return o

    model._contexts._sequence = SequenceRanks(attend=spy)
    with observed(model, segments) as layers:
        assert torch.equal(model.logits(tokens, segments), plain)
    maps = [one for layer in layers for one in layer.maps]
    assert len(layers) == 2 and len(maps) == len(calls) >= 2
    for attention, (v, o) in zip(maps, calls, strict=True):
        torch.testing.assert_close(torch.einsum("bhst,bthd->bshd", attention, v), o, rtol=0, atol=1e-12)
    for layer in layers:
        for rows, attention in zip(layer.rows, layer.maps, strict=True):
            assert rows.shape == (3, 11, attention.shape[1]) and 0 <= rows.min() <= rows.max() < layer.heads
        assert all(int(routing.idx.max()) < layer.experts[name] for name, routing in layer.routings.items())


def zeroed(model, name, rows=None, columns=None):
    """The logits with a part of a weight of the first layer set to 0, for each of the weights in turn."""
    weight = model.get_parameter(f"blocks.0.attn.{name}")
    kept = weight.detach().clone()
    with torch.no_grad():
        if rows is not None:
            weight[rows] = 0
        else:
            weight[:, columns] = 0
    return lambda: weight.data.copy_(kept)


CASES = {
    # mechanism, what is switched off, and the weights that say the same
    "gqa": (Off(0, 4), "w_o", None, slice(40, 50)),
    "mqa-gated": (Off(0, 1), "w_o", None, slice(6, 12)),
    "gqa-local-global": (Off(0, 2), "w_o", None, slice(12, 18)),  # of the second window, before heads of the first
    "gqa-asymmetric": (Off(0, 1), "w_o", None, slice(6, 12)),
    "rgqa": (Off(0, 5), "w_o", None, slice(50, 60)),
    "rgqa-always-on": (Off(0, 3), "w_o", None, slice(18, 24)),  # the always-on head of the second group
    "moa": (Off(0, 2), "w_o", None, slice(12, 18)),
    "moh": (Off(0, 4), "w_o", None, slice(24, 30)),
    "namoh": (Off(0, 2), "w_o", None, slice(12, 18)),
    "namoh-shared": (Off(0, 7), "w_o_shared", None, slice(6, 12)),
    "mla": (Off(0, 2), "w_o", None, slice(12, 18)),
    "gla": (Off(0, 4), "w_o", None, slice(20, 25)),
    "gated-delta": (Off(0, 3), "w_o", None, slice(15, 20)),
    "hybrid": (Off(0, 1, "value_router", 1), "w_v", slice(24, 30), None),
    "switchhead": (Off(0, 2, "source", 1), "w_v", slice(50, 60), None),
    "switchhead-grouped": (Off(0, 0, "destination", 1), "w_o", None, slice(18, 24)),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_what_is_switched_off_is_that_part_of_the_weights(name, mechanisms, decoder, tokens):
    off, weight, rows, columns = CASES[name]
    model = decoder(mechanisms[name]).eval()
    plain = model.logits(tokens)
    with observed(model, off=off, maps=False):
        without = model.logits(tokens)
    restore = zeroed(model, weight, rows, columns)
    torch.testing.assert_close(without, model.logits(tokens), rtol=0, atol=1e-12)
    restore()
    assert torch.equal(model.logits(tokens), plain) and not torch.allclose(without, plain)


@torch.no_grad()
def test_a_routed_head_is_off_as_head_and_as_expert_and_only_for_its_tokens(mechanisms, decoder, tokens):
    model = decoder(mechanisms["rgqa"]).eval()
    found = []
    for off in (Off(1, 4), Off(1, 1, "router", 1)):
        with observed(model, off=off) as layers:
            found.append(model.hidden(tokens))
        uses = (layers[1].routings["router"].idx[:, :, 1] == 1).any(-1)
        assert torch.equal(uses, (layers[1].rows[0] == 4).any(-1))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    changed = (found[0] != model.hidden(tokens)).any(-1)  # the last layer: a token changes itself alone
    assert torch.equal(changed, uses) and 0 < int(uses.sum()) < uses.numel()


def test_hooks_are_removed_after_an_error(mechanisms, decoder, tokens):
    model = decoder(mechanisms["gqa"]).eval()
    with pytest.raises(RuntimeError, match="stop"), observed(model):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
