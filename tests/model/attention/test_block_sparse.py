"""Block-sparse attention: the equation, GQA with all blocks, the cache and what it reads, costs, recomputation."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from headway.kernels.documents import Documents
from headway.kernels.rope import apply_rope, rope_tables
from headway.model.attention import block_sparse as module
from headway.model.attention.block_sparse import BlockSparseConfig
from headway.model.attention.gqa import GqaConfig
from headway.model.base import Context, RoutingMemory
from headway.model.blocks import Blocks
from headway.model.config import ModelConfig
from headway.model.cost import account
from headway.model.decoder import Decoder
from headway.model.kv_cache import KVCache
from headway.model.measure.observe import Off, observed
from headway.model.mixed import MixedConfig

SHAPE: dict[str, Any] = {"heads": 6, "kv_heads": 2, "head_dim": 6}
FORMS: dict[str, dict[str, Any]] = {
    "group": SHAPE | {"block": 3, "blocks": 1},
    "head": SHAPE | {"block": 2, "blocks": 2, "chosen_by": "head"},
    "norm": SHAPE | {"block": 2, "blocks": 1, "qk_norm": True, "rope_fraction": 2 / 3},
    "one KV head": {"heads": 3, "kv_heads": 1, "head_dim": 6, "block": 2, "blocks": 2},
    "mha": {"heads": 3, "kv_heads": 3, "head_dim": 6, "block": 4, "blocks": 1},
}
SEGMENTS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2])
LENGTHS = [4, 5, 2]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> BlockSparseConfig:
    return BlockSparseConfig(**FORMS[request.param])


@pytest.fixture(params=[None, SEGMENTS], ids=["whole", "documents"])
def documents(request: pytest.FixtureRequest) -> Documents | None:
    return None if request.param is None else Documents.of(request.param.expand(3, 11))


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What layers choose in a test."""
    found: list[Tensor] = []
    plain = module.choose_blocks

    def spy(*given: Any, **options: Any) -> Tensor:
        found.append(plain(*given, **options))
        return found[-1]

    monkeypatch.setattr(module, "choose_blocks", spy)
    return found


def buffers(cache: KVCache, part: str) -> tuple[Tensor, Tensor]:
    found = cache._parts[part]._buffers
    assert found is not None
    return found


def token_by_token(layer: Any, config: BlockSparseConfig, x: Tensor, lengths: list[int]) -> Tensor:
    """The equation for one sequence x [S, d]."""
    tables = rope_tables(len(x), config.rotated, config.rope_base, x.device)

    def heads(name: str, norm: Any) -> Tensor:
        made = (x @ layer.get_parameter(name).T).unflatten(-1, (-1, config.head_dim))
        if norm is not None:
            made = made / (made.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.gain
        return made

    q, k = (apply_rope(heads(n, r.norm)[None], tables)[0] for n, r in (("w_q", layer.q_rope), ("w_k", layer.k_rope)))
    v, members = heads("w_v", None), config.heads // config.kv_heads
    outputs, begin = [], 0
    for length in lengths:
        for t in range(begin, begin + length):
            own = begin + (t - begin) // config.block * config.block
            mixed = []
            for h in range(config.heads):
                g = h // members
                query = q[t, g * members : (g + 1) * members].mean(0) if config.chosen_by == "group" else q[t, h]
                earlier = range(begin, own, config.block)
                products = [(float(query @ k[j : j + config.block, g].mean(0)), -j) for j in earlier]
                chosen = [-j for _, j in sorted(products, reverse=True)[: config.blocks]]
                seen = [s for j in sorted(chosen) for s in range(j, j + config.block)] + list(range(own, t + 1))
                weights = (k[seen, g] @ q[t, h] / config.head_dim**0.5).softmax(0)
                mixed.append(weights @ v[seen, g])
            outputs.append(torch.cat(mixed) @ layer.get_parameter("w_o").T)
        begin += length
    return torch.stack(outputs)


@torch.no_grad()
def test_the_layer_is_the_equation(form, layer, context, x, documents) -> None:
    made, lengths = layer(form), [11] if documents is None else LENGTHS
    y = made(x, context(form, 11, documents)).y
    for row, one in zip(y, x, strict=True):
        torch.testing.assert_close(row, token_by_token(made, form, one, lengths), rtol=0, atol=1e-12)


def loss_and_gradients(model: Decoder, tokens: Tensor, segments: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    out = model(tokens, tokens.roll(-1, 1), segments)
    out.loss_sum.backward()
    return out.loss_sum.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_with_all_blocks_it_is_gqa_and_with_fewer_it_is_not(name: str, packed: bool, decoder, tokens) -> None:
    fields = FORMS[name]
    shared = {key: value for key, value in fields.items() if key not in ("block", "blocks", "chosen_by")}
    segments = SEGMENTS.expand(3, 11) if packed else None
    gqa, every = (
        decoder(GqaConfig(**shared)),
        decoder(BlockSparseConfig.model_validate(fields | {"block": 2, "blocks": 5})),
    )
    assert [n for n, _ in gqa.named_parameters()] == [n for n, _ in every.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(gqa.parameters(), every.parameters(), strict=True))
    (loss, grads), (expected, wanted) = (loss_and_gradients(m, tokens, segments) for m in (every, gqa))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, wanted[key], rtol=0, atol=1e-12 * float(wanted[key].abs().max()) + 1e-13)
    few = decoder(BlockSparseConfig.model_validate(fields | {"block": 2, "blocks": 1}))
    assert abs(float(loss_and_gradients(few, tokens, segments)[0] - expected)) > 1e-6


@torch.no_grad()
def test_later_tokens_change_no_choice(form, layer, context, x, choices) -> None:
    made = layer(form)
    for t in range(1, 11):
        changed = x.clone()
        changed[:, t:] = changed[:, t:].flip(1) * 5
        choices.clear()
        outputs = [made(given, context(form)).y[:, :t] for given in (x, changed)]
        assert torch.equal(choices[0][:, :t], choices[1][:, :t])
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-13)  # calls have other shapes


def passes(made: Any, config: BlockSparseConfig, x: Tensor, cache: KVCache, sizes: list[int], past: int = 0) -> Tensor:
    """Outputs of x [B, S, d] after `past` cached tokens, in chunks of these sizes."""
    rope, parts = rope_tables(64, config.rotated, config.rope_base, x.device), []
    for part in x.split(sizes, 1):
        own = (rope[0][past : past + part.shape[1]], rope[1][past : past + part.shape[1]])
        parts.append(made(part, Context(rope=own, cache=cache)).y)
        past += part.shape[1]
    return torch.cat(parts, 1)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * 11, [1, 2, 3, 5], [7, 4], [3, 3, 3, 2]])
def test_cached_means_are_those_of_all_keys(form, layer, context, x, sizes) -> None:
    made, cache = layer(form), KVCache(11)
    torch.testing.assert_close(passes(made, form, x, cache, sizes), made(x, context(form)).y, rtol=0, atol=1e-12)
    keys, means = (buffers(cache, part)[0] for part in ("", "means"))
    expected = Blocks.of(Documents(((11,),) * 3), form.block, x.device).means(keys[:, :11])
    torch.testing.assert_close(means[:, : 11 // form.block], expected, rtol=0, atol=1e-14)
    assert cache.numbers == 3 * form.kv_heads * form.head_dim * (2 * 11 + 11 // form.block)


@torch.no_grad()
def test_a_decoded_token_reads_its_own_and_the_chosen_blocks_alone(form, layer, x, choices) -> None:
    """All other keys and values in the cache are NaN."""
    made, cache = layer(form), KVCache(11)
    passes(made, form, x[:, :10], cache, [10])
    expected = passes(made, form, x[:, 10:], copy.deepcopy(cache), [1], past=10)
    unread = torch.ones(3, 11, form.kv_heads, dtype=torch.bool)
    unread[:, 10 // form.block * form.block :] = False
    for b, row in enumerate(choices[-1][:, 0].tolist()):
        for c, picked in enumerate(row):
            for j in filter(None, picked):
                unread[b, (j - 1) * form.block : j * form.block, c * form.kv_heads // form.choosers] = False
    assert unread.any()
    if form.choosers == form.kv_heads:
        assert int((~unread).sum(1).max()) <= (form.blocks + 1) * form.block
    for buffer in buffers(cache, ""):
        buffer[unread] = float("nan")
    assert torch.equal(passes(made, form, x[:, 10:], cache, [1], past=10), expected)


@torch.no_grad()
def test_copies_and_selections_of_a_cache_have_the_means_of_their_rows(form, layer, x) -> None:
    made, cache = layer(form), KVCache(11)
    passes(made, form, x[:, :8], cache, [5, 3])
    cache.select(torch.tensor([2, 0, 0]))
    rows = torch.cat([x[[2, 0, 0], :8], x[:, 8:]], 1)
    expected = passes(made, form, rows, KVCache(11), [11])[:, 8:]
    torch.testing.assert_close(passes(made, form, x[:, 8:], cache, [1, 2], past=8), expected, rtol=0, atol=1e-12)

    first = KVCache(11)
    passes(made, form, x[:1, :8], first, [8])
    rows = torch.cat([x[:1, :8].expand(3, -1, -1), x[:, 8:]], 1)
    expected = passes(made, form, rows, KVCache(11), [11])[:, 8:]
    many = first.repeated(3, 3)
    torch.testing.assert_close(passes(made, form, x[:, 8:], many, [1, 2], past=8), expected, rtol=0, atol=1e-12)


def entries(config: BlockSparseConfig, seq_len: int) -> tuple[int, int]:
    """Keys that the mask of one head has, and candidates, counted token by token."""
    keys = candidates = 0
    for t in range(seq_len):
        earlier = sum(1 for end in range(config.block, t + 1, config.block))
        keys += t % config.block + 1 + config.block * min(config.blocks, earlier)
        candidates += earlier
    return keys, candidates


@pytest.mark.parametrize("seq_len", [1, 2, 7, 8, 11, 24, 25, 64])
@pytest.mark.parametrize(("block", "blocks"), [(1, 1), (3, 1), (4, 2), (8, 9), (5, 3), (70, 1)])
@pytest.mark.parametrize("chosen_by", ["group", "head"])
def test_costs_are_the_entries_of_the_mask(seq_len: int, block: int, blocks: int, chosen_by: str) -> None:
    config = BlockSparseConfig.model_validate(SHAPE | {"block": block, "blocks": blocks, "chosen_by": chosen_by})
    keys, candidates = entries(config, seq_len)
    layout = Blocks.of(Documents(((seq_len,),)), block, torch.device("cpu"))
    q, k = torch.randn(1, seq_len, 6, 6), torch.randn(1, seq_len, 2, 6)
    chosen = module.choose_blocks(q, layout.means(k), layout, count=blocks, choosers=config.choosers)
    seen = layout.seen(chosen)
    assert seen.sum((2, 3)).unique().tolist() == [keys]  # of every chooser
    assert int(layout.candidates(0, seq_len).sum()) == candidates
    core = 4 * 6 * 6 * keys / seq_len
    assert config.core_flops_per_token(seq_len=seq_len) == pytest.approx(core, rel=1e-12)
    gqa = GqaConfig(**SHAPE)
    sums = 2 * 6 + (6 * 6 if chosen_by == "group" else 0)
    per_product = 2 * 6 * (2 if chosen_by == "group" else 6)
    rest = gqa.flops_per_token(width=20, seq_len=seq_len).useful - gqa.core_flops_per_token(seq_len=seq_len) + sums
    flops = config.flops_per_token(width=20, seq_len=seq_len)
    assert flops.useful == pytest.approx(rest + core + per_product * candidates / seq_len, rel=1e-12)
    assert flops.executed == pytest.approx(rest + core + per_product * (seq_len // block), rel=1e-12)


def test_cost_of_a_published_size() -> None:
    """Blocks of 512 and a top-k of 3 at 8,192 tokens: 16 blocks, of which the first two have fewer candidates."""
    config = BlockSparseConfig(heads=32, kv_heads=32, head_dim=64, block=512, blocks=2, chosen_by="head")
    assert config.seen_keys(seq_len=8192) == (512 + 1) / 2 + 512 * (0 + 1 + 2 * 14) / 16


def test_parameters_and_tensor_parallel_parts_are_those_of_gqa() -> None:
    config, gqa = BlockSparseConfig(**FORMS["norm"]), GqaConfig(**SHAPE, qk_norm=True, rope_fraction=2 / 3)
    assert config.num_params(width=20) == gqa.num_params(width=20) and config.shards() == gqa.shards()


@torch.no_grad()
def test_a_recomputed_pass_has_the_choice_of_the_first(form, layer, context, x, monkeypatch) -> None:
    made, memory = layer(form), RoutingMemory()
    given = replace(context(form), memory=memory)
    memory.begin()
    first = made(x, given).y
    monkeypatch.setattr(module, "choose_blocks", lambda *a, **o: pytest.fail("chosen twice"))
    memory.begin()
    assert torch.equal(made(x, given).y, first)
    assert [choice.dtype for choice in memory.choices] == [torch.uint8]


MIXED = MixedConfig(
    kinds={"dense": GqaConfig(**SHAPE), "sparse": BlockSparseConfig(**FORMS["group"])}, pattern=["sparse", "dense"]
)


def test_layers_of_a_mixed_model(decoder, tokens) -> None:
    """Two layers: the first as in a model of sparse layers, the second as in one of dense layers."""
    model = decoder(MIXED).eval()
    cache = model.new_cache()
    parts = [model.logits(part, cache=cache) for part in tokens.split((4, 1, 5, 1), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model.logits(tokens), rtol=0, atol=1e-12)
    assert type(model.blocks[0].attn) is module.BlockSparseAttention
    every = BlockSparseConfig.model_validate(FORMS["group"] | {"blocks": 3})
    dense = decoder(MIXED.model_copy(update={"kinds": MIXED.kinds | {"sparse": every}}))
    torch.testing.assert_close(dense.logits(tokens), decoder(GqaConfig(**SHAPE)).logits(tokens), rtol=0, atol=1e-12)
    assert not torch.allclose(model.logits(tokens), dense.logits(tokens))
    shape = ModelConfig(width=20, layers=2, ffn_width=28)
    both = account(shape, MIXED, vocab_size=37, seq_len=11).attention_core_flops.useful
    assert both == sum(kind.core_flops_per_token(seq_len=11) for kind in (MIXED.kinds["sparse"], MIXED.kinds["dense"]))


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_observed_maps_are_the_attention_and_a_head_can_be_switched_off(form, decoder, tokens, packed) -> None:
    model, segments = decoder(form).eval(), SEGMENTS.expand(3, 11) if packed else None
    plain, outputs, values = model.logits(tokens, segments), [], []

    def keep_values(made: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(made, module.BlockSparseAttention)
        values.append(made.heads_of(given[0], made.w_v))

    for block in model.blocks:
        block.attn.register_forward_hook(lambda made, given, out: outputs.append(out.y))
        block.attn.register_forward_pre_hook(keep_values)
    with observed(model, segments) as layers:
        assert torch.equal(model.logits(tokens, segments), plain)
    for block, layer, v, y in zip(model.blocks, layers, values, outputs, strict=True):
        (attention,) = layer.maps
        assert layer.heads == form.heads and attention.shape == (3, form.heads, 11, 11)
        shared = v.repeat_interleave(form.heads // form.kv_heads, 2)
        o = torch.einsum("bhst,bthd->bshd", attention, shared)
        torch.testing.assert_close(o.flatten(2) @ block.attn.w_o.T, y, rtol=0, atol=1e-12)
    with observed(model, segments, off=Off(0, 2), maps=False):
        without = model.logits(tokens, segments)
    weight = model.get_parameter("blocks.0.attn.w_o")
    weight[:, 12:18] = 0
    torch.testing.assert_close(without, model.logits(tokens, segments), rtol=0, atol=1e-12)
    assert not torch.allclose(without, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 4}, r"kv_heads: 6 query heads do not divide into 4 equal groups; use kv_heads 3 or 6"),
        ({"block": 0}, r"block\n.*greater than or equal to 1"),
        ({"blocks": 0}, r"blocks\n.*greater than or equal to 1"),
        ({"windows": 4}, r"windows\n.*not permitted"),
    ],
)
def test_what_it_has_no_form_for_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BlockSparseConfig.model_validate(FORMS["group"] | change)


def test_a_block_as_long_as_the_sequences_is_refused() -> None:
    config = BlockSparseConfig(**SHAPE, block=64, blocks=1)
    with pytest.raises(
        ValueError,
        match=r"^attention\.block: a block of 64 tokens .* of 64; use attention\.block 16, or data\.seq_len 256$",
    ):
        config.check_run(seq_len=64, tokens=1, tokens_per_step=1)
    config.check_run(seq_len=65, tokens=1, tokens_per_step=1)
