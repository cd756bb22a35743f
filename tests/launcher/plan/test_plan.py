"""`headway plan`: the description of a layout, the search for layouts, and the committed plans."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from headway.kernels.documents import Documents
from headway.launcher.base.errors import SpecError
from headway.launcher.plan import speed
from headway.launcher.plan.hardware import ASSUMPTIONS, GPUS, NETWORKS, Assumptions, Gpu, find_gpu, find_network
from headway.launcher.plan.layouts import Layout, Search, plan_layout, search
from headway.launcher.plan.memory import memory
from headway.launcher.plan.planner import cost_of, plan, with_vocabulary
from headway.launcher.plan.speed import bubble
from headway.launcher.plan.stages import grid_of
from headway.launcher.plan.tables import markdown, tables
from headway.launcher.plan.traffic import flows
from headway.launcher.spec.load import load_spec
from headway.model.activations import saved_storages
from headway.model.decoder import Decoder

ROOT = Path(__file__).parents[3]
TINY, LARGE = ROOT / "yaml/base/tiny.yaml", ROOT / "yaml/models/940m.yaml"
LAYOUTS = sorted((ROOT / "yaml/layouts").glob("*.yaml"))


def planned(file: Path, *overrides: str, gpu: str = "h100", network: str = "ndr") -> Layout:
    spec = with_vocabulary(load_spec(file, overrides).spec)
    useful = 3 * cost_of(spec)["flops_per_token_useful"]
    return plan_layout(spec, find_gpu(gpu), find_network(network), useful_flops_per_token=useful)


def found(file: Path, gpus: int, *overrides: str, gpu: str = "h100") -> Search:
    spec = with_vocabulary(load_spec(file, overrides).spec)
    useful = 3 * cost_of(spec)["flops_per_token_useful"]
    return search(spec, gpus=gpus, gpu=find_gpu(gpu), network=find_network("ndr"), useful_flops_per_token=useful)


def sent(layout: Layout, kind: str) -> float:
    return sum(f.bytes_per_step for f in flows(layout.grid, layout.grid.stages[0]) if f.kind.startswith(kind))


# ---------------------------------------------------------------- the command


def test_the_plan_states_memory_communication_bubble_and_speed_with_sources(capsys) -> None:
    assert plan(LARGE, ["launch.processes=8", "parallel.tensor=2", "parallel.pipeline=2"]) == 0
    text = capsys.readouterr().out
    for part in ("parameters of a rank", "Adam's moments", "activations", "pipeline bubble", "tokens/s, estimated"):
        assert part in text
    assert "tensor: layers' inputs and outputs" in text and "data: gradients" in text
    assert "estimates from datasheets, not measured" in text and GPUS["h100"].source in text


def test_json_has_every_figure(capsys) -> None:
    assert plan(TINY, ["launch.processes=2", "train.micro_batch=8"], gpus=2, as_json=True) == 0
    figures = json.loads(capsys.readouterr().out)
    assert sum(figures["params_by_part"].values()) == figures["num_params"] == sum(figures["params_per_rank"].values())
    assert figures["fits"] and figures["memory_bytes"]["peak"] < figures["usable_bytes"]
    assert figures["search"]["best"][0]["layout"]["processes"] == 2


def test_an_unknown_gpu_or_network_names_the_known_ones() -> None:
    with pytest.raises(SpecError, match=r"Did you mean h100\? Use one of: h100, h200"):
        plan(TINY, [], gpu="h10")
    with pytest.raises(SpecError, match=r"--network: 'wifi' is not known\. Use one of: ndr"):
        plan(TINY, [], network="wifi")


def test_a_layout_that_does_not_fit_says_by_how_much(capsys) -> None:
    assert plan(ROOT / "yaml/models/3b.yaml", [], gpu="rtx3090") == 0
    layout = planned(ROOT / "yaml/models/3b.yaml", gpu="rtx3090")
    assert not layout.fits(GPUS["rtx3090"])
    assert "DOES NOT FIT" in (text := capsys.readouterr().out) and "GiB too much" in text


def test_a_plan_takes_seconds_and_loads_neither_deepspeed_nor_megatron() -> None:
    code = (
        "import sys; from headway.launcher.cli.main import main; main(sys.argv[1:]); "
        "sys.exit(any(m in sys.modules for m in ('deepspeed', 'megatron')))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, "plan", str(LARGE)], stdout=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 0


# ---------------------------------------------------------------- the numbers


def test_stages_hold_the_whole_model_once_and_a_tied_matrix_twice() -> None:
    layout = planned(LARGE, "launch.processes=4", "parallel.pipeline=4")
    held = sum(stage.num_params for stage in layout.grid.stages)
    model = layout.spec.model
    assert held == cost_of(layout.spec)["num_params"] + 32_000 * model.width
    assert sum(len(stage.blocks) for stage in layout.grid.stages) == model.layers


def test_the_bubble_shrinks_with_micro_batches() -> None:
    few = planned(LARGE, "launch.processes=4", "parallel.pipeline=4", "train.micro_batch=128")
    many = planned(LARGE, "launch.processes=4", "parallel.pipeline=4", "train.micro_batch=1")
    assert bubble(few.grid) == 3 / (4 + 3) and bubble(many.grid) == 3 / (512 + 3)
    assert many.speed.middle > few.speed.middle


def test_the_first_stage_keeps_most_micro_batches() -> None:
    grid = planned(LARGE, "launch.processes=4", "parallel.pipeline=4", "train.micro_batch=1").grid
    assert [grid.in_flight(stage) for stage in grid.stages] == [4, 3, 2, 1]


def test_recomputation_saves_memory_and_takes_time() -> None:
    kept, again = planned(LARGE), planned(LARGE, "parallel.recompute=block")
    assert again.memory.activations < kept.memory.activations / 5
    assert again.speed.middle < kept.speed.middle


def test_zero_stages_shard_optimizer_then_gradients_then_parameters() -> None:
    one, two, three = (planned(LARGE, "launch.processes=8", f"parallel.zero={z}").memory for z in (1, 2, 3))
    assert one.moments == two.moments == three.moments
    assert two.gradients < one.gradients and two.parameters == one.parameters
    assert three.parameters == one.parameters / 8


def test_tensor_parallel_traffic_is_four_all_reduces_per_block_and_micro_batch() -> None:
    layout = planned(LARGE, "launch.processes=2", "parallel.tensor=2")
    spec, grid = layout.spec, layout.grid
    residual = grid.tokens * spec.model.width * 2
    borders = 4 * spec.model.layers + 2  # plus after the embedding and before the head
    assert sent(layout, "tensor: layers") == grid.accumulation * borders * residual  # 2 (T-1)/T = 1
    both = planned(LARGE, "launch.processes=2", "parallel.tensor=2", "parallel.sequence_parallel=true")
    assert sent(both, "tensor: layers") == sent(layout, "tensor: layers")


def test_gradients_are_reduced_once_per_step_under_zero_1_and_per_pass_under_zero_2() -> None:
    one, two = (planned(LARGE, "launch.processes=8", f"parallel.zero={z}") for z in (1, 2))
    rounded = planned(LARGE, "launch.processes=8", "parallel.gradient_reduction=bf16")
    assert sent(one, "data: gradients") == 2 * 7 / 8 * 4 * cost_of(one.spec)["num_params"]
    assert sent(rounded, "data: gradients") == sent(one, "data: gradients") / 2
    assert sent(two, "data: gradients") == one.grid.accumulation * sent(one, "data: gradients")


def test_a_slower_network_slows_only_groups_across_hosts() -> None:
    inside = ["launch.processes=8"]
    across = ["launch.processes=8", "launch.hosts=2", "launch.address=first"]
    fast, slow = (planned(LARGE, *inside, network=n).speed.middle for n in ("ndr", "ethernet"))
    assert fast == slow
    fast, slow = (planned(LARGE, *across, network=n).speed.middle for n in ("ndr", "ethernet"))
    assert slow < fast


def test_assumptions_are_ordered_and_no_share_is_beyond_the_datasheet() -> None:
    low, high = ASSUMPTIONS
    for name in ("matmul", "core", "document_core", "memory", "exchange", "hidden"):
        assert 0 < getattr(low, name) < getattr(high, name) < 1
    assert all("not measured here" in row.source for row in (*GPUS.values(), *NETWORKS.values()))


def test_overlap_hides_a_share_of_the_exchange_at_most_for_the_time_of_the_passes() -> None:
    words = ["launch.processes=8", "launch.hosts=2", "launch.address=first", "parallel.zero=3"]
    for network, bound_by_passes in (("ndr", False), ("ethernet", True)):
        off, on = (planned(LARGE, *words, f"parallel.overlap={x}", network=network) for x in ("false", "auto"))
        for assumed, without, times in zip(ASSUMPTIONS, off.speed.times, on.speed.times, strict=True):
            hidden = without.gradients_s - times.gradients_s
            passes = times.matmul_s + times.core_s + times.elementwise_s
            share = assumed.hidden * without.gradients_s  # under ZeRO-3 all exchanges overlap
            assert hidden == pytest.approx(min(share, passes))
            assert (passes < share) is bound_by_passes
            assert times.matmul_s == without.matmul_s


def test_under_zero_2_gradients_overlap_and_new_parameters_do_not() -> None:
    words = ["launch.processes=8", "parallel.zero=2"]
    off, on = (planned(LARGE, *words, f"parallel.overlap={x}") for x in ("false", "auto"))
    gradients = sent(on, "data: gradients") / (sent(on, "data: gradients") + sent(on, "data: parameters"))
    for assumed, without, times in zip(ASSUMPTIONS, off.speed.times, on.speed.times, strict=True):
        share = 1 - times.gradients_s / without.gradients_s
        assert share == pytest.approx(assumed.hidden * gradients, rel=0.01)  # apart from latencies
    assert planned(LARGE, "launch.processes=8").speed == planned(LARGE, *words[:1], "parallel.overlap=false").speed


def test_a_published_speed_lies_within_the_range() -> None:
    """llm-foundry, scripts/train/benchmarking: its 1B model on 8 H100, sequences of 2048: 45,455 tokens/s per GPU.

    24 layers, width 2048, 16 heads, MLP of four widths without a gate: here a gated one of as many parameters.
    """
    shape = ["model.layers=24", "model.ffn_width=5461", "model.vocab_size=50368", "attention.type=mha"]
    heads = ["attention.heads=16", "attention.head_dim=128", "data.document_mask=false", "launch.processes=8"]
    low, high = planned(LARGE, *shape, *heads).speed.tokens_per_s
    assert low < 8 * 45_455 < high


# ---------------------------------------------------------------- the search


def test_the_search_proposes_legal_layouts_that_fit_fastest_first() -> None:
    result = found(LARGE, 64)
    assert result.best and all(layout.fits(GPUS["h100"]) for layout in result.best)
    speeds = [layout.speed.middle for layout in result.best]
    assert all(b <= a * 1.06 for a, b in pairwise(speeds))  # 5 % apart counts as equal
    for layout in result.best[:5]:
        spec = load_spec(LARGE, layout.overrides).spec  # the printed arguments are valid
        assert spec.launch.world_size == 64
        assert grid_of(spec).data_ranks == layout.grid.data_ranks


def test_the_search_lists_layouts_that_fit_with_no_micro_batch() -> None:
    result = found(ROOT / "yaml/models/3b.yaml", 8, gpu="rtx3090")
    assert result.too_big and not any(layout.fits(GPUS["rtx3090"]) for layout in result.too_big)
    assert result.best and result.best[0].spec.parallel.pipeline > 1  # data parallel ranks alone do not fit


def test_the_search_proposes_no_overlap_where_there_is_none() -> None:
    """In bf16 under ZeRO-1, and with a pipeline, `parallel.overlap: true` is refused when a spec is loaded."""
    asked = ["parallel.overlap=true", "train.global_batch=8"]
    result = found(LARGE, 4, "parallel.zero=2", *asked)
    assert result.best and result.illegal["parallel.overlap"] > 0
    for layout in result.best:
        assert load_spec(LARGE, [*asked, *layout.overrides]).spec.parallel.overlap is True


def test_the_search_shards_states_over_context_parallel_ranks() -> None:
    result = found(LARGE, 4, "launch.processes=4", "parallel.context=4", "train.global_batch=8")
    assert {layout.spec.parallel.zero for layout in result.best if layout.grid.data_parallel == 1} == {1, 2, 3}


def test_the_search_has_no_sequence_parallelism_where_sequences_do_not_divide() -> None:
    result = found(LARGE, 4, "data.seq_len=2050", "train.global_batch=8")
    layouts = {layout.spec.parallel.tensor: layout.spec.parallel.sequence_parallel for layout in result.best}
    assert layouts == {1: False, 2: True, 4: False}
    assert not result.illegal["parallel.sequence_parallel"]


def test_the_search_proposes_only_legal_tensor_sizes() -> None:
    result = found(ROOT / "yaml/models/82m.yaml", 8)  # three KV heads
    assert {layout.spec.parallel.tensor for layout in result.best} == {1}


@pytest.mark.parametrize("gpus", [0, -8])
def test_a_number_of_gpus_below_one_is_refused(gpus) -> None:
    with pytest.raises(SpecError, match=rf"--gpus: {gpus} is not a number of GPUs; use 1 or more"):
        found(LARGE, gpus)


def test_a_number_of_gpus_that_is_not_whole_hosts_is_refused() -> None:
    with pytest.raises(SpecError, match=r"--gpus: 12 is not a multiple of the 8 GPUs of a host.*use 8 or 16"):
        found(LARGE, 12)


# ---------------------------------------------------------------- included models and layouts


@pytest.mark.parametrize("file", LAYOUTS, ids=lambda file: file.stem)
def test_a_shipped_layout_fits_the_gpu_it_is_planned_for(file: Path) -> None:
    layout = planned(file)  # loading checks that it is legal
    assert layout.fits(GPUS["h100"])
    assert file.stem == layout.spec.name == f"{layout.spec.name.rpartition('-')[0]}-{layout.spec.launch.world_size}"


def test_every_model_has_a_layout_for_1_8_and_64_gpus() -> None:
    models = {file.stem for file in (ROOT / "yaml/models").glob("*.yaml")}
    assert models == {"82m", "162m", "250m", "940m", "3b"}
    assert {file.stem for file in LAYOUTS} == {f"{model}-{gpus}" for model in models for gpus in (1, 8, 64)}


@pytest.mark.parametrize("name", ["82m", "162m", "250m", "940m", "3b"])
def test_a_model_has_the_parameters_of_its_name(name: str) -> None:
    target = {"82m": 82e6, "162m": 162e6, "250m": 250e6, "940m": 940e6, "3b": 3e9}[name]
    spec = load_spec(ROOT / f"yaml/models/{name}.yaml").spec
    assert cost_of(spec)["num_params"] == pytest.approx(target, rel=5e-3)


def test_the_committed_plans_are_what_the_code_computes() -> None:
    """`make plans` writes docs/results/plans again."""
    folder, fresh = ROOT / "docs/results/plans", tables(ROOT)
    committed = json.loads((folder / "plans.json").read_text())
    assert {name: committed[name] for name in fresh} == json.loads(json.dumps(fresh))
    assert (folder / "plans.md").read_text() == markdown(fresh)


def test_relative_positions_take_time() -> None:
    """A product of 2 D per score besides the 4 D of queries, keys and values, and 2 d G D for the position keys."""
    gpu, rope, relative = GPUS["h100"], planned(TINY), planned(TINY, "model.positions=relative_xl")
    assert relative.speed.times[0].core_s == pytest.approx(1.5 * rope.speed.times[0].core_s)
    more = 2 * 3 * 2 * 64 * 2 * 8 * relative.spec.tokens_per_step  # layers, passes
    seconds = relative.speed.times[0].matmul_s - rope.speed.times[0].matmul_s
    assert seconds == pytest.approx(more / (ASSUMPTIONS[0].matmul * gpu.fp32_flops))


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_rank_multiplies_with_all_matrices_that_it_holds(tensor: int) -> None:
    """Each tensor-parallel rank computes the latents of mla in full."""
    attention = "attention={type: mla, heads: 4, head_dim: 8, latent: 32, rope_dim: 4, latent_norm: false}"
    layout = planned(TINY, attention, f"launch.processes={tensor}", f"parallel.tensor={tensor}")
    held = layout.grid.stages[0].parameters
    matrices = held["attention"] + held["mlp"] + held["embedding"]  # tied: that of the head
    seconds = 6 * matrices * layout.spec.tokens_per_step / (ASSUMPTIONS[0].matmul * GPUS["h100"].fp32_flops)
    assert layout.speed.times[0].matmul_s == pytest.approx(seconds)


def test_the_time_of_a_training_counts_the_stages_of_a_schedule() -> None:
    until, kind = 2_000_000_000, "type: rgqa, heads: 32, kv_heads: 8, head_dim: 64"
    schedule = f"k_schedule: [{{until_tokens: {until}, top_k: 4}}]"
    of = {"plain": "top_k: 1", "dense": "top_k: 4", "both": f"top_k: 1, {schedule}"}
    plans = {name: planned(LARGE, "model.layers=1", f"attention={{{kind}, {keys}}}") for name, keys in of.items()}
    layout, dense, sparse = plans["both"], plans["dense"].speed.tokens_per_s, plans["plain"].speed.tokens_per_s
    left = layout.spec.steps * layout.spec.tokens_per_step - until
    expected = [until / dense[i] + left / sparse[i] for i in (1, 0)]
    assert speed.training_s(layout.grid, GPUS["h100"], NETWORKS["ndr"]) == pytest.approx(expected)
    assert dense[0] < sparse[0]


def test_each_micro_batch_in_flight_keeps_masks_of_its_own() -> None:
    """Of documents in sequences up to 512 tokens, in fp32. Besides, a mask of one byte exists while one is built."""
    words = ["data.seq_len=80", "launch.processes=2", "parallel.pipeline=2", "train.micro_batch=4"]
    layout = planned(TINY, *words)
    spec, grid = layout.spec, layout.grid
    decoder = Decoder(spec.model, spec.attention, vocab_size=64, seed=1)
    tokens = torch.zeros(4, 80, dtype=torch.int64)
    with saved_storages(besides=decoder.parameters()) as saved:
        outputs = [decoder(tokens, tokens, torch.zeros_like(tokens)) for _ in range(2)]
    masks = [size for size in saved.values() if size == 4 * 80 * 80 * 4]
    assert len(outputs) == len(masks) == 2
    planned_masks = [memory(grid, stage).mask for stage in grid.stages]
    assert [grid.in_flight(stage) for stage in grid.stages] == [2, 1]
    assert planned_masks == [sum(masks) + 4 * 80 * 80, masks[0] + 4 * 80 * 80]


@pytest.mark.parametrize(
    "attention",
    [
        "{type: gated_delta, heads: 8, head_dim: 8}",
        "{type: block_sparse, heads: 8, kv_heads: 2, head_dim: 8, block: 16, blocks: 1}",
    ],
)
def test_layers_that_read_no_mask_have_none(attention: str) -> None:
    layout = planned(TINY, f"attention={attention}")
    decoder = Decoder(layout.spec.model, layout.spec.attention, vocab_size=64, seed=1)
    tokens = torch.zeros(2, 48, dtype=torch.int64)
    documents: list[Documents] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Documents, "mask", lambda own, *_: documents.append(own))
        decoder(tokens, tokens, torch.zeros_like(tokens))
    assert not documents and layout.memory.mask == 0 < planned(TINY).memory.mask


def test_the_rate_of_the_core_is_that_of_the_channels_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent attention has those of positions besides `head_dim`."""
    asked: list[int] = []

    def noted(gpu: Gpu, *, width: int, head_dim: int, seq_len: int) -> tuple[Assumptions, Assumptions]:
        asked.append(head_dim)
        return ASSUMPTIONS

    monkeypatch.setattr(speed, "assumptions", noted)
    for attention in (
        "{type: mla, heads: 4, head_dim: 8, latent: 6, rope_dim: 4}",
        "{type: mha, heads: 4, head_dim: 8}",
    ):
        speed.assumptions_of(load_spec(TINY, [f"attention={attention}"]).spec, find_gpu("h100"))
    assert asked == [12, 8]
