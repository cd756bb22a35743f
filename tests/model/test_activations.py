"""The predicted activation memory of a block equals the bytes that autograd saves when the real block runs."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from headway.kernels.documents import BLOCK, Documents
from headway.kernels.rope import rope_tables
from headway.model.activations import Sharing, block_parameters, footprint, saved_storages
from headway.model.attention.registry import MECHANISMS
from headway.model.base import Context, Ranks
from headway.model.config import ModelConfig
from headway.model.decoder import Block, Placement

MODEL = ModelConfig(width=96, layers=2, ffn_width=200)
GROUPED = {"heads": 8, "kv_heads": 2, "head_dim": 16}
CONFIGS = {
    "gqa": GROUPED,
    "rgqa": {**GROUPED, "top_k": 1},
    "gqe": {**GROUPED, "top_k": 1},
    "switchhead": {"kv_heads": 2, "head_dim": 16, "experts": 4, "top_k": 2},
    "wgqa": GROUPED,
    "hybrid": {**GROUPED, "top_k": 1, "value_experts": 4, "value_top_k": 2},
}


def config(name: str, **changes):
    return MECHANISMS[name].model_validate({"type": name, **CONFIGS[name], **changes})


@pytest.fixture(params=MECHANISMS)
def any_config(request, study_mechanisms):
    """One config of every registered mechanism; those without an entry above are the study's."""
    name = request.param
    return config(name) if name in CONFIGS else study_mechanisms(MECHANISMS.keys() - {name})[f"study: {name}"]


def kept(
    attention,
    *,
    batch: int,
    seq_len: int,
    bf16: bool,
    masked: bool,
    recompute: Any = "none",
    split: int | None = None,
    ranks: Ranks | None = None,
) -> int:
    """Bytes of the storages that autograd saves in a forward pass of the real block, its real core included."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    block = Block(MODEL, attention).to(dtype)
    block.place(Placement(recompute=recompute, ranks=ranks or Ranks()))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.05)
    x = torch.randn(batch, seq_len, MODEL.width, dtype=dtype, requires_grad=True)
    rope = rope_tables(seq_len, attention.rotated, attention.rope_base, x.device)
    tokens = torch.zeros(batch, seq_len, dtype=torch.int64)
    documents = Documents.of((torch.arange(seq_len) >= (split or seq_len)).expand(batch, -1).int()) if masked else None
    shared = [*rope, tokens, *([] if documents is None or seq_len > BLOCK else [documents.mask(dtype, x.device)])]
    with saved_storages(besides=[*block.parameters(), *block.buffers(), *shared], selective=block.selective) as saved:
        block(x, Context(rope=rope, documents=documents, tokens=tokens))
    return sum(saved.values())


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_kept_bytes_are_those_of_autograd(any_config, bf16: bool, masked: bool) -> None:
    attention = any_config
    for batch, seq_len in ((1, 32), (2, 64)):  # two sizes: slope and what does not grow are both seen
        sharing = Sharing(bf16=bf16, masked=masked, device="cpu", seq_len=seq_len)
        said = footprint(MODEL, attention, sharing).kept(batch * seq_len)
        # 2 %: sums of losses and counts of a few bytes are rounded into the slope.
        assert said == pytest.approx(kept(attention, batch=batch, seq_len=seq_len, bf16=bf16, masked=masked), rel=0.02)


def test_selective_recomputation_keeps_what_the_real_block_keeps_under_it(any_config) -> None:
    attention = any_config
    for batch, seq_len in ((1, 32), (2, 64)):
        sharing = Sharing(bf16=False, device="cpu", selective=True, seq_len=seq_len)
        said = footprint(MODEL, attention, sharing).kept(batch * seq_len)
        real = kept(attention, batch=batch, seq_len=seq_len, bf16=False, masked=True, recompute="selective")
        assert said == pytest.approx(real, rel=0.02)


def test_on_a_gpu_both_norms_and_the_inner_part_of_swiglu_are_not_kept() -> None:
    everything, selective = (
        footprint(MODEL, config("gqa"), Sharing(seq_len=64, masked=False, selective=s)) for s in (False, True)
    )
    # Two norms' results and numbers per row, silu(gate) and its product with up; bf16.
    less = 2 * (2 * MODEL.width + 2 * MODEL.ffn_width) + 2 * 4
    assert everything.kept_per_token - selective.kept_per_token == less


def test_documents_attended_one_by_one_keep_one_more_output() -> None:
    attention = config("gqa")
    real = kept(attention, batch=1, seq_len=1024, bf16=False, masked=True, split=300)
    sharing = Sharing(bf16=False, masked=True, device="cpu", seq_len=1024)
    assert footprint(MODEL, attention, sharing).kept(1024) == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("seq_len", [64, 200, 600])  # one call, several calls, and documents one by one
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
def test_a_layer_keeps_the_masks_of_its_window(masked: bool, seq_len: int) -> None:
    """All sequences share those without documents. In short sequences with documents, each has its own."""
    attention = config("gqa", windows=40)
    sharing = Sharing(bf16=False, masked=masked, device="cpu", seq_len=seq_len)
    for batch in (1, 3):
        real = kept(attention, batch=batch, seq_len=seq_len, bf16=False, masked=masked, split=30)
        assert footprint(MODEL, attention, sharing).kept(batch * seq_len) == pytest.approx(real, rel=0.02)


def test_tensor_ranks_of_namoh_share_the_pairs_of_tokens_and_heads() -> None:
    """Whatever the routing, the pairs of all ranks are top_k for each token."""
    attention = MECHANISMS["namoh"].model_validate({"type": "namoh", "heads": 16, "head_dim": 16, "top_k": 8})
    sharing = Sharing(bf16=False, masked=False, device="cpu", seq_len=64, tensor=2)
    said = footprint(MODEL, attention, sharing).kept(64)
    real = []
    for index in range(2):
        torch.manual_seed(1)  # the same input and router on both
        ranks = Ranks(index=index, count=2)
        real.append(kept(attention, batch=1, seq_len=64, bf16=False, masked=False, ranks=ranks))
    assert said == pytest.approx(sum(real) / 2, rel=0.02)


def test_parameters_of_a_rank_are_its_share_and_what_all_ranks_hold(any_config) -> None:
    attention = any_config
    alone, shared = (block_parameters(MODEL, attention, tensor=t) for t in (1, 2))
    whole = attention.num_params(width=MODEL.width) + 3 * MODEL.width * MODEL.ffn_width + 2 * MODEL.width
    assert alone.total == whole
    replicated = shared.replicated + shared.by_part["norm"]
    assert 2 * (shared.total - replicated) == whole - replicated


def test_tensor_ranks_share_what_is_wide_and_sequence_parallelism_the_rest() -> None:
    attention, alone = config("gqa"), Sharing(seq_len=64)
    cut, parts = replace(alone, tensor=2), replace(alone, tensor=2, sequence_parallel=True)
    whole, half, less = (footprint(MODEL, attention, sharing).kept_per_token for sharing in (alone, cut, parts))
    # Before either norm x is whole without sequence parallelism: half of 2 d bytes more, and of the norm's own number.
    assert half > whole / 2
    assert half - less == 2 * (2 * MODEL.width + 4) / 2


@pytest.mark.parametrize("name", ["rgqa", "gqe"])
def test_a_routed_layer_keeps_no_more_than_gqa(name: str) -> None:
    """Above all no x in fp32 for the router, 4 d bytes. At this width the pool of heads is as wide as x."""
    model, sharing = ModelConfig(width=256, layers=2, ffn_width=200), Sharing(seq_len=64)
    routed, dense = (footprint(model, config(k, heads=16), sharing).kept_per_token for k in (name, "gqa"))
    assert routed < dense + 256  # choices, gates and logits


def test_norms_are_one_operation_on_a_gpu() -> None:
    cpu, gpu = (footprint(MODEL, config("gqa"), Sharing(seq_len=64, masked=False, device=d)) for d in ("cpu", "cuda"))
    # In bf16 the CPU keeps x and its normalised form in fp32 besides what the GPU keeps, at both norms.
    assert cpu.kept_per_token - gpu.kept_per_token >= 2 * 4 * MODEL.width


def test_all_reduces_within_attention_are_counted_per_mechanism() -> None:
    sharing = Sharing(seq_len=64, tensor=2)
    assert footprint(MODEL, config("gqa"), sharing).sums_per_token == 0
    # GQE: one fp32 number, the sum of chosen probabilities; keys and values of the shared head, 2 D in bf16.
    assert footprint(MODEL, config("gqe"), sharing).sums_per_token == 4 + 2 * 16 * 2


def test_context_ranks_exchange_every_head_of_the_core() -> None:
    dealt = footprint(MODEL, config("gqa"), Sharing(seq_len=64, context=2)).dealt_per_token
    assert dealt == 2 * (2 * 8 + 2 * 2) * 16
    one_kv_head = config("gqa", kv_heads=1)
    assert footprint(MODEL, one_kv_head, Sharing(seq_len=64, context=2)).dealt_per_token == 2 * 2 * 16 * 2


def test_recomputation_keeps_the_choices_of_routers() -> None:
    sharing = Sharing(seq_len=64)
    assert footprint(MODEL, config("gqa"), sharing).routing_per_token == 0
    assert footprint(MODEL, config("rgqa"), sharing).routing_per_token == 2  # one byte per group
