"""Value residuals and keys and values shared by layers: the equations, their relatives, costs, caches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from headway.kernels.documents import Documents
from headway.kernels.rope import apply_rope, rope_tables
from headway.model.activations import Sharing, block_parameters, footprint, saved_storages
from headway.model.attention.gqa import DenseAttention, GqaConfig, MhaConfig, MqaConfig
from headway.model.attention.sqa import SqaConfig
from headway.model.base import AttentionConfig, AttentionSection, Context, Ranks
from headway.model.config import ModelConfig
from headway.model.contexts import LayerContexts
from headway.model.cost import account, layer_configs
from headway.model.decoder import Block, Decoder, Placement, Recompute, run_block
from headway.model.measure.branch import branch_ratios, branch_scales, measured_branches
from headway.model.mixed import MixedConfig
from headway.model.shard import cut_attention
from headway.parallel.engine import parameter_groups
from headway.parallel.partition import stage_bounds, stage_pieces

MODEL = ModelConfig(width=20, layers=5, ffn_width=28, init_std=0.3)
VOCAB, BATCH, SEQ = 37, 3, 11
SEGMENTS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2], dtype=torch.int32).expand(BATCH, SEQ)

GROUPED: dict[str, Any] = {"heads": 6, "kv_heads": 2, "head_dim": 6}
UNEVEN: dict[str, Any] = {"heads": 12, "kv_heads": 4, "head_dim": 6, "group_sizes": [1, 5, 1, 5]}
DENSE: dict[str, GqaConfig] = {
    "fixed": GqaConfig(**GROUPED, value_residual="fixed", qk_norm=True),
    "learned": GqaConfig(**GROUPED, value_residual="learned", biases=True),
    "learned, windows": GqaConfig(**GROUPED, value_residual="learned", windows=[None, 4], gate="headwise"),
    "learned, uneven": GqaConfig(**UNEVEN, value_residual="learned", windows=[3, None, 3, None]),
    "shared": GqaConfig(**GROUPED, share_kv=2, qk_norm=True),
    "shared by 3": GqaConfig(**GROUPED, share_kv=3, biases=True, gate="elementwise"),
    "shared by all": GqaConfig(**GROUPED, share_kv=5, windows=4),
    "shared, windows": GqaConfig(**GROUPED, share_kv=2, windows=[None, 4], biases=True, qk_norm=True),
    "shared, uneven": GqaConfig(**UNEVEN, share_kv=2, windows=[3, None, 3, None]),
}
LOCAL = GqaConfig(**GROUPED, share_kv=2, windows=4)
FAR = GqaConfig(heads=4, kv_heads=2, head_dim=8, value_residual="learned", rope_base=300.0)
FORMS: dict[str, AttentionSection] = {
    **DENSE,
    "mha": MhaConfig(heads=4, head_dim=6, share_kv=2),
    "mqa": MqaConfig(heads=4, head_dim=6, value_residual="learned"),
    "sqa": SqaConfig(heads=8, kv_heads=2, kept=2, head_dim=6, share_kv=2),
    "mixed": MixedConfig(kinds={"local": LOCAL, "far": FAR}, pattern=["local", "far", "local"]),
}
each_dense = pytest.mark.parametrize("config", DENSE.values(), ids=list(DENSE))
each_form = pytest.mark.parametrize("config", FORMS.values(), ids=list(FORMS))


def made(config: AttentionSection, *, recompute: Recompute = "none", model: ModelConfig = MODEL) -> Decoder:
    """In float64, with gains, biases and mixing numbers that are not those of the start."""
    placement = Placement(recompute=recompute)
    decoder = Decoder(model, config, vocab_size=VOCAB, seed=1, placement=placement)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in decoder.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return decoder.double()


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(2))


def gradients(decoder: Decoder, logits: Tensor) -> dict[str, Tensor]:
    weight = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    named = dict(decoder.named_parameters())
    found = torch.autograd.grad((logits * weight).sum(), list(named.values()))
    return dict(zip(named, found, strict=True))


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, tol: float = 1e-10) -> None:
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}")
        assert wanted.abs().max() > 0, name


# ---------------------------------------------------------------- the equations


def normed(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def written_out(decoder: Decoder, config: GqaConfig, ids: Tensor, segments: Tensor | None) -> Tensor:
    """Logits of the whole decoder, head by head, with the parameters of `decoder` by name."""
    p = dict(decoder.named_parameters())
    rope = rope_tables(SEQ, config.rotated, config.rope_base, ids.device)
    place = torch.arange(SEQ)
    x = p["embedding"][ids]
    first: Tensor | None = None
    keys, values = x, x
    for i in range(MODEL.layers):
        a = f"blocks.{i}.attn."
        h = normed(x, p[f"blocks.{i}.attn_norm.gain"])

        def heads(of: str, h: Tensor = h, a: str = a) -> Tensor:
            return F.linear(h, p[f"{a}w_{of}"], p.get(f"{a}b_{of}")).unflatten(-1, (-1, config.head_dim))

        q = heads("q")
        q = apply_rope(normed(q, p[f"{a}q_rope.norm.gain"]) if config.qk_norm else q, rope)
        if i % config.share_kv == 0:
            keys, values = heads("k"), heads("v")
            keys = apply_rope(normed(keys, p[f"{a}k_rope.norm.gain"]) if config.qk_norm else keys, rope)
            if config.value_residual != "none":
                if first is None:
                    first = values
                elif config.value_residual == "fixed":
                    values = (first + values) / 2
                else:
                    values = p[f"{a}mix_first"] * first + p[f"{a}mix_own"] * values
        outputs = []
        for group, (size, window) in enumerate(zip(config.sizes, config.group_windows, strict=True)):
            seen = place[:, None] >= place
            seen = seen & (place[:, None] - place < (window or SEQ))
            if segments is not None:
                seen = seen & (segments[:, :, None] == segments[:, None, :])
            for member in range(size):
                head = sum(config.sizes[:group]) + member
                scores = q[:, :, head] @ keys[:, :, group].transpose(1, 2) / config.head_dim**0.5
                outputs.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values[:, :, group])
        o = torch.stack(outputs, 2)
        if config.gate != "none":
            o = o * torch.sigmoid(F.linear(h, p[f"{a}w_gate"])).unflatten(-1, (o.shape[2], -1))
        x = x + F.linear(o.flatten(2), p[f"{a}w_o"], p.get(f"blocks.{i}.attn_out.bias"))
        m = normed(x, p[f"blocks.{i}.mlp_norm.gain"])
        inner = F.silu(m @ p[f"blocks.{i}.mlp.w_gate"].T) * (m @ p[f"blocks.{i}.mlp.w_up"].T)
        x = x + inner @ p[f"blocks.{i}.mlp.w_down"].T
    return normed(x, p["norm.gain"]) @ p["embedding"].T


@each_dense
@pytest.mark.parametrize("packed", [False, True])
def test_the_model_computes_the_equations_and_their_gradients(config: GqaConfig, packed: bool) -> None:
    decoder, segments = made(config), SEGMENTS if packed else None
    ours, theirs = decoder.logits(tokens(), segments), written_out(decoder, config, tokens(), segments)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    assert_alike(gradients(decoder, ours), gradients(decoder, theirs))


def test_layers_of_other_kinds_between_them_do_not_change_who_takes_from_whom() -> None:
    """local, far, local, local, far: local layers 0 and 2 share, 3 has its own; far layer 4 mixes that of layer 1."""
    each = layer_configs(MODEL, FORMS["mixed"], vocab_size=VOCAB)
    assert [one.takes_from for one in each] == [None, None, 0, None, 1]
    decoder = made(FORMS["mixed"])
    taken: list[tuple[Tensor, ...]] = []
    handed: list[tuple[Tensor, ...]] = []
    for block in decoder.blocks:
        block.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[1].handed))
        block.register_forward_hook(lambda _, inputs, out: handed.append(out.handed))
    decoder.logits(tokens())
    assert [len(one) for one in handed] == [2, 1, 0, 2, 0] and [len(one) for one in taken] == [0, 0, 2, 0, 1]
    assert all(a is b for a, b in zip(taken[2], handed[0], strict=True)) and taken[4][0] is handed[1][0]
    names = {name for name, _ in decoder.named_parameters()}
    assert "blocks.2.attn.w_k" not in names and {"blocks.3.attn.w_k", "blocks.4.attn.mix_own"} <= names


# ---------------------------------------------------------------- relatives


def plain(config: AttentionSection) -> AttentionSection:
    if isinstance(config, MixedConfig):
        return config.model_copy(update={"kinds": {name: plain(kind) for name, kind in config.kinds.items()}})
    return config.model_copy(update={"value_residual": "none", "share_kv": 1})


@pytest.mark.parametrize("name", [name for name in DENSE if name.startswith("learned")])
def test_a_value_residual_of_0_and_1_is_plain_attention(name: str) -> None:
    decoder, other = made(DENSE[name]), made(plain(DENSE[name]))
    with torch.no_grad():
        for i, layer in enumerate(decoder.attention_layers()):
            assert isinstance(layer, DenseAttention) and (layer.mix_first is None) == (i == 0)
            if layer.mix_first is not None and layer.mix_own is not None:
                layer.mix_first.fill_(0.0)
                layer.mix_own.fill_(1.0)
    other.load_state_dict({name: t for name, t in decoder.state_dict().items() if ".mix_" not in name})
    logits, wanted = decoder.logits(tokens(), SEGMENTS), other.logits(tokens(), SEGMENTS)
    assert torch.equal(logits, wanted)
    ours = {name: grad for name, grad in gradients(decoder, logits).items() if ".mix_" not in name}
    assert_alike(ours, gradients(other, wanted), tol=1e-13)


def test_learned_numbers_start_as_the_fixed_ones() -> None:
    kwargs: dict[str, Any] = {"vocab_size": VOCAB, "seed": 1}
    learned = Decoder(MODEL, GqaConfig(**GROUPED, value_residual="learned"), **kwargs).double()
    fixed = Decoder(MODEL, GqaConfig(**GROUPED, value_residual="fixed"), **kwargs).double()
    torch.testing.assert_close(learned.logits(tokens()), fixed.logits(tokens()), rtol=0, atol=1e-13)
    assert sum(p.numel() for p in learned.parameters()) == sum(p.numel() for p in fixed.parameters()) + 2 * 4
    matrices, vectors = parameter_groups(learned, 0.1)
    mixing = {id(p) for name, p in learned.named_parameters() if ".mix_" in name}
    assert len(mixing) == 8 and mixing <= {id(p) for p in vectors["params"]} and vectors["weight_decay"] == 0
    assert not mixing & {id(p) for p in matrices["params"]}


def test_parameters_of_equal_name_start_equal() -> None:
    kwargs: dict[str, Any] = {"vocab_size": VOCAB, "seed": 1}
    for config in DENSE.values():
        ours = dict(Decoder(MODEL, config, **kwargs).named_parameters())
        theirs = dict(Decoder(MODEL, plain(config), **kwargs).named_parameters())
        added = ours.keys() - theirs.keys()
        assert all(".mix_" in name for name in added)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() - added)


def test_without_the_options_a_layer_is_the_config_itself() -> None:
    config = GqaConfig(**GROUPED, value_residual="none", share_kv=1)
    assert config.layer(3, 5) is config and config == GqaConfig(**GROUPED) and config.takes_from is None


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("share_kv", [2, 3, 5])
def test_shared_keys_and_values_are_plain_attention_where_layers_see_the_same_input(
    share_kv: int, relative: bool
) -> None:
    """Blocks but the last of a group add nothing, so their layers have one input; plain layers get one W_K and W_V."""
    model = MODEL.model_copy(update={"positions": "relative_xl" if relative else "rope"})
    config = GqaConfig(**GROUPED, share_kv=share_kv, qk_norm=True, rope_fraction=0.0 if relative else 1.0)
    decoder, other = made(config, model=model), made(plain(config), model=model)
    with torch.no_grad():
        for i, block in enumerate(decoder.blocks):
            assert isinstance(block, Block)
            block.attn_norm.gain.copy_(torch.linspace(0.5, 1.5, MODEL.width))
            if (i + 1) % share_kv:
                block.attn.get_parameter("w_o").zero_()
                block.mlp.w_down.zero_()
    state = decoder.state_dict()
    for i in range(MODEL.layers):
        for name in ("w_k", "w_v", "k_rope.norm.gain"):
            state[f"blocks.{i}.attn.{name}"] = state[f"blocks.{i - i % share_kv}.attn.{name}"]
    other.load_state_dict(state)
    wanted = other.logits(tokens(), SEGMENTS)
    torch.testing.assert_close(decoder.logits(tokens(), SEGMENTS), wanted, rtol=0, atol=1e-12)
    with torch.no_grad():  # the readers' inputs differ, and so do the models
        for each in (decoder, other):
            each.blocks[0].get_parameter("mlp.w_down").normal_(generator=torch.Generator().manual_seed(1))
    assert (decoder.logits(tokens(), SEGMENTS) - other.logits(tokens(), SEGMENTS)).abs().max() > 1e-3


# ---------------------------------------------------------------- tokens, documents, decoding


@each_form
def test_a_token_changes_no_earlier_one_and_no_other_document(config: AttentionSection) -> None:
    decoder, ids = made(config).eval(), tokens()
    other = ids.clone()
    other[:, 6] = (other[:, 6] + 1) % VOCAB
    before, after = decoder.logits(ids), decoder.logits(other)
    assert torch.equal(before[:, :6], after[:, :6]) and (before[:, 6:10] != after[:, 6:10]).any(-1).all()
    before, after = decoder.logits(ids, SEGMENTS), decoder.logits(other, SEGMENTS)
    assert torch.equal(before[:, 9:], after[:, 9:]) and not torch.equal(before[:, 7:9], after[:, 7:9])


@each_form
def test_a_packed_document_equals_the_document_alone(config: AttentionSection) -> None:
    decoder = made(config)
    packed = decoder.logits(tokens(), SEGMENTS)[:, 4:9]
    # Rotary tables are fp32: shifting the positions moves scores by about 1e-7.
    torch.testing.assert_close(packed, decoder.logits(tokens()[:, 4:9]), rtol=0, atol=1e-5)


@each_form
@pytest.mark.parametrize("chunks", [(5, 6), (4, 5, 1, 1), (1,) * SEQ])
def test_decoding_equals_the_full_pass(config: AttentionSection, chunks: Sequence[int]) -> None:
    decoder = made(config).eval()
    cache = decoder.new_cache()
    parts = [decoder.logits(part, cache=cache) for part in tokens().split(list(chunks), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), decoder.logits(tokens()), rtol=0, atol=1e-12)


def test_relative_positions_decode_too() -> None:
    model = MODEL.model_copy(update={"positions": "relative_xl"})
    options: list[dict[str, Any]] = [{"share_kv": 2}, {"value_residual": "learned"}]
    for option in options:
        decoder = made(GqaConfig(**GROUPED, rope_fraction=0.0, **option), model=model).eval()
        cache = decoder.new_cache()
        parts = [decoder.logits(part, cache=cache) for part in tokens().split([4, 6, 1], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), decoder.logits(tokens()), rtol=0, atol=1e-12)


def test_rows_of_a_cache_can_be_chosen_and_repeated() -> None:
    decoder = made(DENSE["shared, windows"]).eval()
    ids, rows = tokens(), torch.tensor([2, 0])
    cache = decoder.new_cache()
    decoder.logits(ids[:, :7], cache=cache)
    one = decoder.new_cache()
    decoder.logits(ids[:1, :7], cache=one)
    cache.select(rows)
    found = decoder.logits(ids[rows, 7:], cache=cache)
    torch.testing.assert_close(found, decoder.logits(ids[rows])[:, 7:], rtol=0, atol=1e-12)
    several = one.repeated(2, 4)
    torch.testing.assert_close(decoder.logits(ids[rows, 7:], cache=several)[1], found[1], rtol=0, atol=1e-12)


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
