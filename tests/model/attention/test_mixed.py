"""Models whose layers have different mechanisms: each layer is that of its kind, with its own RoPE, cost and cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from headway.kernels.documents import Documents
from headway.kernels.rope import rope_tables
from headway.model.attention.gqa import GqaConfig, MhaConfig
from headway.model.attention.rgqa import RgqaConfig, SizeRule
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.attention.wgqa import WgqaConfig
from headway.model.balance import BalanceConfig
from headway.model.base import AttentionConfig, AttentionSection, Context
from headway.model.config import ModelConfig
from headway.model.cost import account, layer_configs
from headway.model.decoder import Decoder
from headway.model.mixed import AnyAttention, MixedConfig

MODEL = ModelConfig(width=24, layers=5, ffn_width=40, init_std=0.3)
VOCAB, BATCH, SEQ = 30, 2, 17

LOCAL = GqaConfig(heads=6, kv_heads=2, head_dim=8, windows=4)
ROUTED = RgqaConfig(heads=8, kv_heads=2, head_dim=6, top_k=1, rope_base=300.0, balance=BalanceConfig(f_p=0.1))
VALUES = SwitchHeadConfig(kv_heads=3, head_dim=4, experts=3, top_k=2, rope_fraction=0.0, balance=BalanceConfig(f_p=0.2))
MERGED = WgqaConfig(heads=4, kv_heads=2, head_dim=8, rope_fraction=0.5, qk_norm=True)
MIXED = MixedConfig(
    kinds={"local": LOCAL, "routed": ROUTED, "values": VALUES, "merged": MERGED},
    pattern=["local", "routed", "values", "merged"],
)
EACH = [LOCAL, ROUTED, VALUES, MERGED, LOCAL]


def decoder(attention: AttentionSection, model: ModelConfig = MODEL) -> Decoder:
    return Decoder(model, attention, vocab_size=VOCAB, seed=4).double()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and documents of which one boundary is inside of a window."""
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(1))
    segments = torch.zeros(BATCH, SEQ, dtype=torch.int32)
    segments[0, 7:], segments[1, 2:] = 1, 1
    return tokens[:, :-1], tokens[:, 1:], segments


@pytest.mark.parametrize("kind", [LOCAL, ROUTED, VALUES, MERGED], ids=lambda kind: kind.type)
def test_one_kind_is_the_plain_mechanism_bit_for_bit(kind: AttentionConfig) -> None:
    one, plain = decoder(MixedConfig(kinds={"only": kind}, pattern=["only"])), decoder(kind)
    for model in (one, plain):
        out = model(*batch())
        (out.loss_sum + out.aux_loss).backward()
    assert [name for name, _ in one.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for a, b in zip(one.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b) and a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)
    arguments: dict[str, Any] = {"vocab_size": VOCAB, "seq_len": 32}
    assert account(MODEL, one.attention, **arguments) == account(MODEL, kind, **arguments)


def test_each_layer_computes_what_a_model_of_its_kind_alone_computes() -> None:
    """The blocks of plain models, taken one after another, each with the RoPE of its kind."""
    mixed, (tokens, labels, segments) = decoder(MIXED), batch()
    with torch.no_grad():
        found = mixed(tokens, labels, segments)
        x, aux = torch.nn.functional.embedding(tokens, mixed.embedding), 0.0
        for index, kind in enumerate(EACH):
            block = decoder(kind).blocks[index]
            rope = rope_tables(SEQ, kind.rotated, kind.rope_base, tokens.device)
            context = Context(rope=rope, documents=Documents.of(segments), tokens=tokens)
            x, loss, _ = block(x, context)
            aux += 0.0 if loss is None else float(loss)
        logits = mixed.norm(x) @ mixed.embedding.T
        wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert float(found.loss_sum) == pytest.approx(float(wanted), rel=1e-6)  # the loss is summed in fp32
    assert float(found.aux_loss) == pytest.approx(aux, rel=1e-6) and aux > 0


def test_a_layer_with_the_rope_of_another_kind_would_be_noticed() -> None:
    """The test above compares tables that differ."""
    tokens, labels, segments = batch()
    kinds = MIXED.kinds | {"routed": ROUTED.model_copy(update={"rope_base": 10_000.0})}
    other = decoder(MIXED.model_copy(update={"kinds": kinds}))
    with torch.no_grad():
        losses = [float(model(tokens, labels, segments).loss_sum) for model in (decoder(MIXED), other)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_decoding_token_by_token_gives_the_logits_of_one_pass() -> None:
    """Windows, routed heads, value experts and merged heads, each with its own cache."""
    model = decoder(MIXED).eval()
    tokens = batch()[0]
    with torch.no_grad():
        whole, cache = model.logits(tokens), model.new_cache(SEQ)
        parts = [model.logits(tokens[:, :5], cache=cache)]
        parts += [model.logits(tokens[:, i : i + 1], cache=cache) for i in range(5, SEQ)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-12)


def test_cost_is_that_of_each_layer() -> None:
    found = account(MODEL, MIXED, vocab_size=VOCAB, seq_len=64, bytes_per_element=4)
    plain = [account(MODEL, kind, vocab_size=VOCAB, seq_len=64, bytes_per_element=4) for kind in EACH]
    head = 2 * VOCAB * MODEL.width
    assert found.params_by_part["attention"] == sum(one.params_by_part["attention"] for one in plain) // MODEL.layers
    assert found.num_params == sum(p.numel() for p in decoder(MIXED).parameters())
    for name in ("useful", "executed"):
        layers = sum(getattr(one.flops_per_token, name) - head for one in plain) / MODEL.layers
        assert getattr(found.flops_per_token, name) == pytest.approx(layers + head, rel=1e-12)
        core = sum(getattr(one.attention_core_flops, name) for one in plain) / MODEL.layers
        assert getattr(found.attention_core_flops, name) == pytest.approx(core, rel=1e-12)
    kv = sum(one.kv_bytes_per_token for one in plain) / MODEL.layers
    assert found.kv_bytes_per_token == pytest.approx(kv, rel=1e-12)


def test_fields_by_layer_and_by_size_are_resolved_inside_of_kinds() -> None:
    ladder = RgqaConfig.model_validate(
        {"type": "rgqa", "heads": 8, "kv_heads": 2, "head_dim": 6, "top_k": [1, 2, 3, 1, 2]}
    )
    mixed = MixedConfig(kinds={"routed": ladder, "local": LOCAL}, pattern=["routed", "local"])
    each = layer_configs(MODEL, mixed, vocab_size=VOCAB)
    assert [getattr(one, "top_k", None) for one in each] == [1, None, 3, None, 2]


def test_a_rule_by_size_counts_the_parameters_of_all_layers() -> None:
    """The kinds differ much in size: a model of either kind alone would be on the other side of the step."""
    wide = MhaConfig(heads=30, head_dim=8)

    def mixed(at_params: float) -> MixedConfig:
        rule = SizeRule(ratio=0.25, slope=0.25, at_params=at_params)
        routed = RgqaConfig(heads=8, kv_heads=2, head_dim=6, top_k=rule)
        return MixedConfig(kinds={"routed": routed, "wide": wide}, pattern=["routed", "wide"])

    total = account(MODEL, mixed(1e4), vocab_size=VOCAB, seq_len=8).num_params
    assert total == sum(p.numel() for p in decoder(mixed(1e4)).parameters())
    chosen = [layer_configs(MODEL, mixed(at), vocab_size=VOCAB)[0] for at in (total + 1, total - 1)]
    assert [one.model_dump()["top_k"] for one in chosen] == [1, 2]


def test_schedules_and_router_statistics_are_those_of_the_layers() -> None:
    model = decoder(MIXED).train()
    model.before_step(0)
    tokens, labels, segments = batch()
    model(tokens, labels, segments).loss_sum.backward()
    counted = [
        {name: stats.load.shape for name, stats in one.router_stats().items()} for one in model.attention_layers()
    ]
    assert [bool(one) for one in counted] == [False, True, True, False, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": ["lokal"]}, r"pattern: 'lokal' is not one of the kinds; use local, wide, or add it"),
        ({"pattern": ["local"]}, r"pattern: has no layer of kind wide; add it to the pattern"),
        ({"pattern": []}, r"pattern\n.*at least 1"),
        ({"kinds": {}}, r"kinds\n.*at least 1"),
        ({"kinds": {"a b": {"type": "mha", "heads": 2, "head_dim": 4}}, "pattern": ["a b"]}, r"'a b' is no name"),
        ({"kinds": {"x": {"type": "mixed", "kinds": {}, "pattern": []}}, "pattern": ["x"]}, r"x is of type mixed"),
    ],
)
def test_what_is_wrong_is_refused_with_what_to_do(change: dict[str, Any], message: str) -> None:
    wide = {"type": "mha", "heads": 2, "head_dim": 4}
    value = {"type": "mixed", "kinds": {"local": wide | {"windows": 3}, "wide": wide}, "pattern": ["local", "wide"]}
    found = TypeAdapter[AttentionSection](AnyAttention).validate_python(value)
    assert isinstance(found, MixedConfig) and isinstance(found.layer(1, 2), AttentionConfig)
    with pytest.raises(ValidationError, match=message):
        TypeAdapter[AttentionSection](AnyAttention).validate_python(value | change)


def test_errors_of_a_layer_name_the_keys_of_its_kind() -> None:
    with pytest.raises(ValueError, match=r"attention\.pattern: 4 entries for 3 layers; use 3 entries at most"):
        MIXED.layer(0, 3)
    kinds: dict[str, AttentionConfig] = {"far": GqaConfig(heads=2, kv_heads=1, head_dim=4, windows=99)}
    with pytest.raises(ValueError, match=r"^attention\.kinds\.far\.windows: a window of 99 tokens is longer"):
        MixedConfig(kinds=kinds, pattern=["far"]).check_run(seq_len=64, tokens=640, tokens_per_step=64)
    short = RgqaConfig(heads=4, kv_heads=2, head_dim=4, top_k=[1, 2])
    with pytest.raises(ValueError, match=r"^attention\.kinds\.routed\.top_k: "):
        MixedConfig(kinds={"routed": short}, pattern=["routed"]).layer(0, 3)


def test_kinds_share_the_keys_beside_them_and_a_change_of_these_reaches_them() -> None:
    adapter = TypeAdapter[AttentionSection](AnyAttention)
    value: dict[str, Any] = {
        "type": "mixed",
        "heads": 8,
        "kv_heads": 2,
        "head_dim": 6,
        "kinds": {"a": {"type": "gqa"}, "b": {"type": "mqa", "head_dim": 4}, "c": {"type": "mha", "heads": 3}},
        "pattern": ["a", "b", "c"],
    }
    found = adapter.validate_python(value)
    assert isinstance(found, MixedConfig)
    own = {
        "a": {"type": "gqa", "heads": 8, "kv_heads": 2, "head_dim": 6},
        "b": {"type": "mqa", "heads": 8, "head_dim": 4},
        "c": {"type": "mha", "heads": 3, "head_dim": 6},
    }
    alone = adapter.validate_python({"type": "mixed", "kinds": own, "pattern": ["a", "b", "c"]})
    assert isinstance(alone, MixedConfig) and found.kinds == alone.kinds
    dumps = [found.model_dump(), found.model_dump(exclude_unset=True), found.model_dump(exclude_defaults=True)]
    for dumped in ({"type": "mixed", **each} for each in [*dumps, found.model_dump(mode="json")]):
        assert "heads" not in dumped["kinds"]["a"] and dumped["kinds"]["c"]["heads"] == 3
        assert adapter.validate_python(dumped) == found
        wider = adapter.validate_python(dumped | {"head_dim": 10})
        assert isinstance(wider, MixedConfig)
        assert [kind.head_dim for kind in wider.kinds.values()] == [10, 4, 10]
    assert value["kinds"]["a"] == {"type": "gqa"}  # what was given is not changed
    with pytest.raises(ValidationError, match=r"kinds\.a\.gqa\.head_dim\n"):
        adapter.validate_python({key: item for key, item in value.items() if key != "head_dim"})
