"""`k_schedule` of R-GQA, MoH and SwitchHead: k by tokens alone, both ends exact, and its costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from headway.model.attention.moh import MohConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.config import ModelConfig
from headway.model.cost import account, heaviest
from headway.model.k_schedule import KStage, LinearK, k_after, stages_of

MODEL = ModelConfig(width=20, layers=2, ffn_width=28)
ROUTED = {  # all: the k of a start with everything on
    "rgqa": (RgqaConfig, {"heads": 8, "kv_heads": 2, "head_dim": 6, "top_k": 1}, 4),
    "moh": (MohConfig, {"heads": 6, "kv_heads": 3, "head_dim": 6, "shared_heads": 2, "top_k": 2, "form": "code"}, 4),
    "switchhead": (SwitchHeadConfig, {"kv_heads": 3, "head_dim": 6, "experts": 4, "top_k": 1}, 4),
}


@pytest.fixture(params=ROUTED)
def routed(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any], int]:
    return ROUTED[request.param]


def test_a_linear_decrease_has_equal_parts() -> None:
    linear = LinearK(start=4, until_tokens=300)
    assert stages_of(linear, 1) == [
        KStage(until_tokens=100, top_k=4),
        KStage(until_tokens=200, top_k=3),
        KStage(until_tokens=300, top_k=2),
    ]
    assert [k_after(linear, 1, tokens) for tokens in (0, 99, 100, 199, 200, 299, 300, 10**12)] == [
        4,
        4,
        3,
        3,
        2,
        2,
        1,
        1,
    ]
    assert [stage.until_tokens for stage in stages_of(LinearK(start=3, until_tokens=5), 1)] == [3, 5]
    assert stages_of(linear, 4) == [] and k_after([], 3, 0) == 3


def test_k_depends_on_the_tokens_alone(layer: Any, routed: tuple[Any, dict[str, Any], int]) -> None:
    kind, fields, most = routed
    config = kind(**fields, k_schedule=LinearK(start=most, until_tokens=300))
    module, seen = layer(config), []
    for tokens in (0, 150, 300, 150, 299):  # a resumed run begins anywhere
        module.before_step(tokens)
        seen.append(module.top_k)
    expected = {3: [4, 3, 1, 3, 2], 2: [4, 3, 2, 3, 3]}[most - config.top_k]
    assert seen == expected


def test_both_ends_are_the_plain_mechanism(
    layer: Any, context: Any, x: torch.Tensor, routed: tuple[Any, dict[str, Any], int]
) -> None:
    kind, fields, most = routed
    config = kind(**fields, k_schedule=LinearK(start=most, until_tokens=300))
    module = layer(config)
    for tokens, k in ((0, most), (300, fields["top_k"])):
        plain = layer(kind(**{**fields, "top_k": k}))
        plain.load_state_dict(module.state_dict())
        module.before_step(tokens)
        ours, theirs = (m(x, context(config)) for m in (module, plain))
        assert torch.equal(ours.y, theirs.y)
    assert (
        module(x, context(config)).y.sub(layer(kind(**{**fields, "top_k": most}))(x, context(config)).y).abs().max()
        > 1e-4
    )


def test_costs_of_training_count_the_stages(routed: tuple[Any, dict[str, Any], int]) -> None:
    kind, fields, most = routed

    def cost(**changes: Any) -> Any:
        return account(MODEL, kind(**{**fields, **changes}), vocab_size=37, seq_len=16)

    stages = [KStage(until_tokens=100, top_k=most), KStage(until_tokens=400, top_k=most - 1)]
    found, plain = cost(k_schedule=stages), cost()
    first, second = cost(top_k=most), cost(top_k=most - 1)
    assert (found.flops_per_token, found.num_params, found.kv_bytes_per_token) == (
        plain.flops_per_token,
        plain.num_params,
        plain.kv_bytes_per_token,
    )
    assert [at for at, _ in found.stages] == [0, 100, 400] and plain.stages == ()
    for part in ("useful", "executed"):
        of = [getattr(each.flops_per_token, part) for each in (first, second, plain)]
        assert [getattr(flops, part) for _, flops in found.stages] == pytest.approx(of)
        assert getattr(found.trained(1000), part) == pytest.approx(100 * of[0] + 300 * of[1] + 600 * of[2])
        assert getattr(found.trained(150), part) == pytest.approx(100 * of[0] + 50 * of[1])
    assert first.flops_per_token.useful > second.flops_per_token.useful > plain.flops_per_token.useful
    assert plain.trained(1000).useful == 1000 * plain.flops_per_token.useful
    assert heaviest(kind(**fields, k_schedule=stages)) == kind(**{**fields, "top_k": most})


def test_layers_with_another_top_k_have_stages_of_their_own(decoder: Any) -> None:
    fields = {**ROUTED["rgqa"][1], "top_k": [1, 3], "k_schedule": LinearK(start=4, until_tokens=300)}
    model = decoder(RgqaConfig(**fields))
    model.before_step(150)
    assert [layer.top_k for layer in model.attention_layers()] == [3, 4]
    found = account(MODEL, RgqaConfig(**fields), vocab_size=37, seq_len=16)
    assert [at for at, _ in found.stages] == [0, 100, 200, 300]


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([{"until_tokens": 5, "top_k": 9}], "top_k: 9"),
        ({"start": 9, "until_tokens": 5}, "top_k: 9"),
        (
            [{"until_tokens": 9, "top_k": 2}, {"until_tokens": 5, "top_k": 3}],
            r"k_schedule: .* must increase",
        ),
    ],
)
def test_schedules_that_cannot_be_are_refused(name: str, schedule: Any, message: str) -> None:
    kind, fields, _ = ROUTED[name]
    with pytest.raises(ValidationError, match=message):
        kind(**fields, k_schedule=schedule)


def test_a_linear_decrease_does_not_increase_and_needs_its_end() -> None:
    kind, fields, most = ROUTED["switchhead"]
    with pytest.raises(ValidationError, match=r"k_schedule: starts with 2, fewer than top_k 3; use start 3 or more"):
        kind(**{**fields, "top_k": 3}, k_schedule={"start": 2, "until_tokens": 9})
    with pytest.raises(ValidationError, match=r"renorm at top_k 1"):
        kind(**{**fields, "top_k": 2, "gate": "renorm"}, k_schedule=[{"top_k": 1, "until_tokens": 9}])
    rule = {"ratio": 0.5, "slope": 0.1, "at_params": 1e6}
    with pytest.raises(ValidationError, match=r"k_schedule: a linear decrease needs the number that it ends at"):
        RgqaConfig(**{**ROUTED["rgqa"][1], "top_k": rule}, k_schedule=LinearK(start=most, until_tokens=9))
    for each, own, start in ROUTED.values():
        config = each(**own, k_schedule={"start": start, "until_tokens": 1000})
        config.check_run(seq_len=8, tokens=1008, tokens_per_step=8)
        with pytest.raises(ValueError, match=r"attention.k_schedule: a stage lasts until 1000"):
            config.check_run(seq_len=8, tokens=1000, tokens_per_step=8)
