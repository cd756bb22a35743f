"""NAMOH: heads that attend within the tokens routed to them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from headway.kernels.documents import Documents
from headway.kernels.rope import apply_rope, rope_tables
from headway.model import segments as kernels
from headway.model.attention.gqa import MhaConfig
from headway.model.attention.namoh import NamohConfig
from headway.model.balance import BalanceConfig
from headway.model.head_cache import HeadCache
from headway.model.kv_cache import KVCache
from headway.model.measure.observe import observed
from headway.model.router import RandomRouterConfig
from headway.model.segments import Segments

SHAPE: dict[str, Any] = {"heads": 5, "head_dim": 6}

SEGMENTS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2])
STRONG = BalanceConfig(f_p=0.3, z=0.1)
FORMS: dict[str, dict[str, Any]] = {
    "published": {"top_k": 2},
    "shared": {"top_k": 2, "shared_heads": 2, "window": 4},
    "shared, all tokens": {"top_k": 1, "shared_heads": 1, "gate": "sigmoid2"},
    "norm": {"top_k": 3, "qk_norm": True, "rope_fraction": 2 / 3},
    "grouped": {"top_k": 2, "projections": "grouped", "qk_norm": True},
    "positions of the sequence": {"top_k": 2, "rank_positions": False},
    "all": {"top_k": 5, "gate": "detached_renorm"},
}


@pytest.fixture(params=[None, SEGMENTS], ids=["whole", "documents"])
def documents(request: pytest.FixtureRequest) -> Documents | None:
    return None if request.param is None else Documents.of(request.param.expand(3, 11))


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> NamohConfig:
    return NamohConfig(**SHAPE, **FORMS[request.param], balance=STRONG)


def token_by_token(module, config: NamohConfig, x: Tensor, numbers: Tensor) -> Tensor:
    """The equations for one sequence x [S, d]; numbers [S]: of the documents."""
    size, names = config.head_dim, ("w_q", "w_k", "w_v")
    tables = rope_tables(len(x), config.rotated, config.rope_base, x.device)

    def head(prefix: str, h: int, t: int, place: int) -> list[Tensor]:
        q, k, v = (module.get_parameter(f"{n}{prefix}")[h * size : (h + 1) * size] @ x[t] for n in names)
        if config.qk_norm:
            q, k = (module.q_norm.gain * q / (q.square().mean() + 1e-5).sqrt(), k / (k.square().mean() + 1e-5).sqrt())
            k = module.k_norm.gain * k
        row = tables[0][place : place + 1], tables[1][place : place + 1]
        return [apply_rope(q[None, None, None], row)[0, 0, 0], apply_rope(k[None, None, None], row)[0, 0, 0], v]

    logits = x @ module.router.w.T
    chosen = [set(row.sort(descending=True, stable=True).indices[: config.k].tolist()) for row in logits]
    y = []
    for t in range(len(x)):
        p = logits[t].softmax(-1)
        if config.gate == "sigmoid2":
            p = 2 * logits[t].sigmoid()
        elif config.gate == "detached_renorm":
            p = p / sum(p[h] for h in chosen[t])
        earlier = [u for u in range(t + 1) if numbers[u] == numbers[t]]
        total = torch.zeros_like(x[t])
        for prefix, heads in (("", sorted(chosen[t])), ("_shared", range(config.shared_heads))):
            for h in heads:
                mine = [u for u in earlier if prefix or h in chosen[u]]
                places = {u: i if config.rank_positions and not prefix else u for i, u in enumerate(mine)}
                if prefix:
                    mine = [u for u in mine if t - u < (config.window or len(x))]
                q = head(prefix, h, t, places[t])[0]
                keys, values = zip(*(head(prefix, h, u, places[u])[1:] for u in mine), strict=True)
                weights = (torch.stack(keys) @ q / size**0.5).softmax(-1)
                factor = 1.0 if prefix else p[h]
                w_o = module.get_parameter(f"w_o{prefix}")[:, h * size : (h + 1) * size]
                total = total + factor * (w_o @ (weights @ torch.stack(values)))
        y.append(total)
    return torch.stack(y)


@torch.no_grad()
def test_both_forms_are_the_equations(form, layer, context, x, documents):
    module, numbers = layer(form), torch.zeros(11) if documents is None else SEGMENTS
    expected = token_by_token(module, form, x[1], numbers)
    for forward in (module.forward, module.forward_reference):
        torch.testing.assert_close(forward(x, context(form, 11, documents)).y[1], expected, rtol=0, atol=1e-12)


def results(module, forward: Callable[..., Any], x: Tensor, context) -> list[Tensor]:
    """Output, loss and gradients."""
    x = x.detach().requires_grad_()
    out = forward(x, context)
    up = torch.randn(out.y.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    wrt = [x, *module.parameters()]
    return [out.y, out.aux_loss, *torch.autograd.grad((out.y * up).sum() + out.aux_loss, wrt)]


def pairs(module, x: Tensor, context) -> Iterator[tuple[Tensor, Tensor]]:
    """(of packed segments, of the dense form): outputs, losses and gradients."""
    yield from zip(
        results(module, module, x, context), results(module, module.forward_reference, x, context), strict=True
    )


def test_packed_segments_have_the_values_and_gradients_of_the_dense_form(form, layer, context, x, documents):
    module, given = layer(form), context(form, 11, documents)
    for got, want in zip(
        results(module, module, x, given), results(module, module.forward_reference, x, given), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_so_do_segments_of_more_than_a_block_of_scores(layer, context, tokens):
    config = NamohConfig(**SHAPE, top_k=2, balance=STRONG)
    segments = (torch.arange(700)[None] >= torch.tensor([[699], [311]])).int()
    x = torch.randn(2, 700, 20, dtype=torch.float64)
    module, given = layer(config), replace(context(config, 700, Documents.of(segments)), tokens=None)
    for got, want in zip(
        results(module, module, x, given), results(module, module.forward_reference, x, given), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


# ---------------------------------------------------------------- what it becomes


@pytest.mark.parametrize("projections", ["dense", "grouped"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_all_heads_with_unit_gates_are_multi_head_attention(layer, context, x, documents, projections, qk_norm):
    config = NamohConfig(
        **SHAPE, top_k=5, gate="hard", balance=BalanceConfig(), projections=projections, qk_norm=qk_norm
    )
    mha = MhaConfig(**SHAPE, qk_norm=qk_norm)
    mine, plain = layer(config), layer(mha)
    names = ("w_q", "w_k", "w_v", "w_o")
    assert all(torch.equal(mine.get_parameter(n), plain.get_parameter(n)) for n in names)
    up, found = torch.randn_like(x), []
    for module in (mine, plain):
        leaf = x.clone().requires_grad_()
        y = module(leaf, context(config, 11, documents)).y
        wrt = [leaf, *(module.get_parameter(n) for n in names)]
        found.append([y, *torch.autograd.grad(y, wrt, up)])
    # Positions count within documents here: angles are fp32, and others at other positions.
    atol = 1e-12 if documents is None else 1e-5
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=atol)


def test_all_heads_with_straight_through_gates_teach_the_router_besides(layer, context, x):
    config = NamohConfig(**SHAPE, top_k=5, gate="straight_through", balance=BalanceConfig())
    mine, plain = layer(config), layer(MhaConfig(**SHAPE))
    y = mine(x, context(config)).y
    torch.testing.assert_close(y, plain(x, context(config)).y, rtol=0, atol=1e-12)
    y.square().sum().backward()
    assert mine.router.w.grad.abs().max() > 1e-3


def test_a_head_whose_tokens_are_all_tokens_is_that_head_alone(layer, context, x):
    """Head 0 takes every token, and the others share the second slot: it is a shared head without a window."""
    config = NamohConfig(**SHAPE, top_k=2, shared_heads=1, gate="hard", router=RandomRouterConfig())
    module = layer(config)
    x = x.clone()
    x[..., 0] = 1.0
    with torch.no_grad():
        module.router.w[0] = 0
        module.router.w[0, 0] = 1e3
        for name in ("w_q", "w_k", "w_v"):
            module.get_parameter(f"{name}_shared").copy_(module.get_parameter(name)[:6])
        module.get_parameter("w_o")[:, 6:] = 0
        module.get_parameter("w_o_shared").copy_(-module.get_parameter("w_o")[:, :6])
    torch.testing.assert_close(module(x, context(config)).y, torch.zeros_like(x), rtol=0, atol=1e-13)


# ---------------------------------------------------------------- causality and positions


@pytest.mark.parametrize("name", ["published", "shared", "grouped"])
@torch.no_grad()
def test_a_later_token_changes_nothing_before_it_to_the_last_bit(layer, context, x, documents, name):
    """In the dense form, whose shapes do not follow the routing; routing and gates in both."""
    config = NamohConfig(**SHAPE, **FORMS[name])
    module, given = layer(config), context(config, 11, documents)
    before = module.forward_reference(x, given).y
    chosen = module.router(x, given, k=2)
    packed = module(x, given).y
    moved = 0
    for t in range(11):
        for scale in (-5.0, 0.0, 300.0):
            changed = x.clone()
            changed[:, t] = scale * torch.randn(3, 20, dtype=x.dtype)
            after = module.forward_reference(changed, given).y
            assert torch.equal(after[:, :t], before[:, :t]) and not torch.equal(after[:, t], before[:, t])
            routing = module.router(changed, given, k=2)
            assert torch.equal(routing.idx[:, :t], chosen.idx[:, :t])
            assert torch.equal(routing.gate[:, :t], chosen.gate[:, :t])
            moved += int((routing.idx[:, t] != chosen.idx[:, t]).sum())
            # The padded length of a call follows the longest of its segments, and so does the order of its sums.
            torch.testing.assert_close(module(changed, given).y[:, :t], packed[:, :t], rtol=0, atol=1e-13)
    assert moved > 30  # later tokens did change their heads


@pytest.mark.parametrize("name", ["published", "shared", "grouped"])
def test_an_output_has_no_gradient_at_later_tokens_or_other_documents(layer, context, x, documents, name):
    config = NamohConfig(**SHAPE, **FORMS[name], balance=BalanceConfig())
    module, leaf = layer(config), x.clone().requires_grad_()
    y = module(leaf, context(config, 11, documents)).y
    seen = 0
    for t in range(11):
        (grad,) = torch.autograd.grad(y[:, t].sum(), leaf, retain_graph=True)
        hidden = torch.arange(11) > t
        if documents is not None:
            hidden |= SEGMENTS[t] != SEGMENTS
        assert not grad[:, hidden].any()
        seen += int((grad[:, ~hidden] != 0).any(-1).sum())
    assert seen > 33


@torch.no_grad()
def test_a_document_is_itself_wherever_it_is_packed(layer, context, x):
    """Exactly: positions count within the head and the document. Not so for positions of the sequence."""
    for ranks, atol in ((True, 1e-13), (False, 1e-5)):
        config = NamohConfig(**SHAPE, top_k=2, rank_positions=ranks)
        module, documents = layer(config), Documents.of(SEGMENTS.expand(3, 11))
        packed = module(x, context(config, 11, documents)).y[:, 4:9]
        torch.testing.assert_close(packed, module(x[:, 4:9], context(config, 5)).y, rtol=0, atol=atol)


@torch.no_grad()
def test_tokens_of_other_heads_do_not_move_a_head_unless_positions_are_those_of_the_sequence(layer, context, x):
    for ranks in (True, False):
        config = NamohConfig(heads=4, head_dim=6, top_k=1, rank_positions=ranks, rope_base=10.0)
        module = layer(config).eval()
        heads = module.router(x[:1], context(config), k=1).idx.flatten()
        kept = heads == heads[-1]
        assert 1 < kept.sum() < 11
        alone = module(x[:1, kept], context(config, int(kept.sum()))).y
        among = module(x[:1], context(config)).y[:, kept]
        assert torch.allclose(alone, among, rtol=0, atol=1e-12) == ranks


# ---------------------------------------------------------------- decoding


def routed(cache: KVCache) -> Tensor:
    counts = cache.of_heads.counts
    assert counts is not None
    return counts


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_each_token_decoded_alone_is_that_of_the_whole_pass(decoder, tokens, name):
    model = decoder(NamohConfig(**SHAPE, **FORMS[name])).eval()
    cache, whole = model.new_cache(11), model.logits(tokens)
    for t in range(11):
        torch.testing.assert_close(model.logits(tokens[:, [t]], cache=cache), whole[:, [t]], rtol=0, atol=1e-12)
    for layer in cache.layers:
        assert routed(layer).sum(1).tolist() == [11 * model.attention.top_k] * 3  # ragged over heads, not over tokens
    assert len(routed(cache.layers[0]).unique()) > 1 or name == "all"


@pytest.mark.parametrize("scores", [1, 40, 1 << 24])
@torch.no_grad()
def test_chunks_are_attended_in_calls_of_bounded_size(decoder, tokens, monkeypatch, scores):
    monkeypatch.setattr(kernels, "SCORES", scores)
    model = decoder(NamohConfig(**SHAPE, top_k=2)).eval()
    cache = model.new_cache()
    parts = [model.logits(part, cache=cache) for part in tokens.split((4, 6, 1), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model.logits(tokens), rtol=0, atol=1e-12)


@torch.no_grad()
def test_rows_of_a_batch_are_selected_and_repeated_with_their_heads(decoder, tokens):
    model = decoder(NamohConfig(**SHAPE, top_k=2, shared_heads=1, window=4)).eval()
    cache = model.new_cache(11)
    model.logits(tokens[:, :6], cache=cache)
    cache.select(torch.tensor([2, 0, 2]))
    mixed = torch.stack([torch.cat([tokens[a, :6], tokens[b, 6:]]) for a, b in ((2, 0), (0, 1), (2, 2))])
    parts = [model.logits(mixed[:, t : t + 1], cache=cache) for t in range(6, 11)]
    torch.testing.assert_close(torch.cat(parts, 1), model.logits(mixed)[:, 6:], rtol=0, atol=1e-12)
    one = model.new_cache()
    model.logits(tokens[:1, :6], cache=one)
    numbers = one.numbers
    many = one.repeated(3, 5)
    continued = torch.cat([tokens[:1, :6].expand(3, -1), tokens[:, 6:]], 1)
    got = model.logits(tokens[:, 6:], cache=many)
    torch.testing.assert_close(got, model.logits(continued)[:, 6:], rtol=0, atol=1e-12)
    assert one.numbers == numbers  # the copy is one


def test_gradients_of_new_tokens_survive_later_calls(layer, context, x):
    """Cached tokens are constants."""
    config = NamohConfig(**SHAPE, top_k=2, balance=BalanceConfig())
    module, cache, leaf = layer(config).eval(), KVCache(), x.clone().requires_grad_()
    whole = context(config)
    tables = [tuple(table[part] for table in whole.rope) for part in (slice(0, 7), slice(7, 11))]
    first = module(leaf[:, :7], type(whole)(rope=tables[0], cache=cache)).y
    second = module(leaf[:, 7:], type(whole)(rope=tables[1], cache=cache)).y
    (got,) = torch.autograd.grad(second.square().sum(), leaf, retain_graph=True)
    assert not got[:, :7].any()
    (first.square().sum() + second.square().sum()).backward()  # no buffer of autograd was written again
    fixed = x.clone()
    other = fixed.clone().requires_grad_()
    y = module(torch.cat([fixed[:, :7], other[:, 7:]], 1), whole).y[:, 7:]
    (want,) = torch.autograd.grad(y.square().sum(), other)
    torch.testing.assert_close(got[:, 7:], want[:, 7:], rtol=0, atol=1e-11)


@torch.no_grad()
def test_a_new_token_reads_the_caches_of_its_own_heads_alone():
    g = torch.Generator().manual_seed(0)
    idx = torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(20)]).view(2, 10, 2)
    cache = HeadCache(10)
    packed = [Segments.of(part, heads=4) for part in (idx[:, :9], idx[:, 9:])]
    k = torch.randn(2 * 20, 3, generator=g)
    assert cache.extend(k[:36], k[:36], packed[0]) is None
    past = cache.extend(k[36:], k[36:], packed[1])
    assert past is not None
    used = set(past.row.tolist())
    assert used == {4 * b + int(h) for b in range(2) for h in idx[b, 9]}
    for row in range(8):
        if row not in used:
            past.keys[row], past.values[row] = float("nan"), float("nan")
    out = kernels.cached_core(k[36:], k[36:], k[36:], past, packed[1].lengths)
    assert torch.isfinite(out).all()
    assert cache.numbers == 2 * 3 * 40  # written: 2kD a token, whatever the load
    assert past.keys.shape[1] == int(routed_counts(cache).max()) < 10


def routed_counts(cache: HeadCache) -> Tensor:
    assert cache.counts is not None
    return cache.counts


# ---------------------------------------------------------------- cost


@torch.no_grad()
def test_the_core_computes_the_scores_of_the_segments_and_pads_little(layer, context, monkeypatch):
    """Counted where they are computed: the quadratic term follows the load."""
    config, computed = NamohConfig(**SHAPE, top_k=2), []
    plain = kernels._Call.padded

    def padded(call, packed):
        computed.append(call)
        return plain(call, packed)

    monkeypatch.setattr(kernels._Call, "padded", padded)
    module, x = layer(config).eval(), torch.randn(2, 60, 20, dtype=torch.float64)
    segments = Segments.of(module.router(x, context(config, 60), k=2).idx.squeeze(2), heads=5)
    module(x, context(config, 60))
    calls = computed[::3]  # q, k and v
    real = sum(call.pair.numel() if call.real is None else int(call.real.sum()) for call in calls)
    square = sum(len(call.pair) * call.pair.shape[1] * (call.pair.shape[1] + 1) // 2 for call in calls)
    assert real == 2 * 60 * 2 and segments.scores <= square <= kernels.SPREAD**2 * segments.scores
    skewed = torch.zeros(2, 60, 1, dtype=torch.int64)
    assert Segments.of(skewed, heads=5).scores == 2 * 60 * 61 // 2


# ---------------------------------------------------------------- ranks and observation


@pytest.mark.parametrize("name", ["published", "shared", "grouped"])
@pytest.mark.parametrize("empty", [False, True], ids=["", "a rank without tokens"])
def test_two_ranks_gradients_add_up_to_the_layers(layer, context, lockstep, x, name, empty):
    """The router is whole on both: its gradient is partial, like that of any replicated gain."""
    fields = FORMS[name] | {"heads": 4, "head_dim": 6, "balance": STRONG}
    config = NamohConfig(**fields)
    full, parts, x = layer(config), [layer(config), layer(config)], x.clone()
    if empty:
        x[..., 0] = 1.0
        for module in (full, *parts):
            with torch.no_grad():
                module.router.w[:, 0] = torch.tensor([100.0, 100.0, 0.0, 0.0])
    shards = config.shards()
    for rank, part in enumerate(parts):
        for key, shard in shards.items():
            mine = full.get_parameter(key).detach().chunk(2, shard.dim)[rank].clone()
            part.register_parameter(key, torch.nn.Parameter(mine))
    upstream = torch.randn_like(x)
    whole = full(x, context(config))
    ((whole.y * upstream).sum() + whole.aux_loss).backward()
    outs = lockstep(parts, lambda part: part(x, context(config)))
    torch.testing.assert_close(outs[0].y + outs[1].y, whole.y, rtol=0, atol=1e-12)
    for out in outs:
        ((out.y * upstream).sum() + out.aux_loss / 2).backward()
    for key, parameter in full.named_parameters():
        grads = [part.get_parameter(key).grad for part in parts]
        assert all(grad is not None for grad in grads), key
        got = torch.cat(grads, shards[key].dim) if key in shards else sum(grads)
        torch.testing.assert_close(got, parameter.grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_observed_maps_are_the_attention_of_the_packed_pairs(decoder, tokens, packed, monkeypatch):
    """What a map says, applied to the values of the slot's head, is what the core gave for that slot."""
    model, calls = decoder(NamohConfig(**SHAPE, top_k=2)).eval(), []
    segments = SEGMENTS.expand(3, 11) if packed else None

    plain = kernels.packed_core

    def spy(q, k, v, lengths):
        calls.append((v, plain(q, k, v, lengths)))
        return calls[-1][1]

    monkeypatch.setattr(kernels, "packed_core", spy)
    with observed(model, segments) as layers:
        model.logits(tokens, segments)
    for layer, (v, o) in zip(layers, calls, strict=True):
        (attention,), (rows,) = layer.maps, layer.rows
        assert torch.equal(rows, layer.routings["router"].idx.squeeze(2)) and layer.heads == 5
        numbers = SEGMENTS.expand(3, 11) if packed else None
        places = Segments.of(rows, heads=5, numbers=numbers)
        values = places.expand(v).gather(2, rows[..., None].expand(*rows.shape, 6))
        assert values.shape == (3, 11, 2, 6)
        pool = places.expand(v)  # [B, S, H, D]
        for j in range(2):
            of_head = torch.einsum("bst,bthd->bshd", attention[:, j], pool)
            found = of_head.gather(2, rows[:, :, j, None, None].expand(3, 11, 1, 6)).squeeze(2)
            want = places.expand(o).gather(2, rows[:, :, j, None, None].expand(3, 11, 1, 6)).squeeze(2)
            torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
