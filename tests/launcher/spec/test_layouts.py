"""A layout that cannot run is refused where it is written, before anything starts, with what would be legal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from headway.launcher.base.errors import SpecError
from headway.launcher.spec.layouts import (
    accumulation,
    check_vocabulary,
    legal_context,
    legal_pipeline,
    legal_tensor,
    vocabulary,
    warnings,
    why_not,
    why_not_cuttable,
)
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec
from headway.launcher.study.config import load_study
from headway.launcher.study.plan import plan_study, variant_spec
from headway.model.attention.registry import MECHANISMS

# 2 layers, FFN 160, vocabulary 64, sequences of 64, 8 query heads over 2 KV heads, 16 sequences a step in one pass
TINY = Path(__file__).parents[3] / "yaml" / "base" / "tiny.yaml"
STUDY = TINY.parents[1] / "studies" / "all-mechanisms.yaml"


def spec(*overrides: str) -> Spec:
    return load_spec(TINY, overrides).spec


def arranged(base: Spec, *, launch: dict[str, Any] | None = None, **parallel: Any) -> Spec:
    """A copy with another layout, legal or not."""
    changes: dict[str, Any] = {"parallel": base.parallel.model_copy(update=parallel)}
    changes["launch"] = base.launch.model_copy(update=launch or {"processes": 64})
    return base.model_copy(update=changes)


# key it is located at, overrides -> reason, choices
REFUSALS: dict[str, tuple[str, list[str], str, str]] = {
    "world": (
        "parallel.tensor",
        ["parallel.tensor=2", "launch.processes=3"],
        "tensor x pipeline x context = 2 x 1 x 1 = 2 ranks do not divide launch.hosts x launch.processes = 1 x 3 = 3",
        "use parallel.tensor 1, or launch.processes 2 or 4",
    ),
    "world of several hosts, at its largest part": (
        "parallel.context",
        ["parallel.context=2", "launch.hosts=3", "launch.address=first"],
        "tensor x pipeline x context = 1 x 1 x 2 = 2 ranks do not divide launch.hosts x launch.processes = 3 x 1 = 3",
        "use parallel.context 1, or launch.processes 2 or 4",
    ),
    "world without a legal value of one key": (
        "parallel.tensor",
        ["parallel.tensor=2", "parallel.pipeline=2", "launch.processes=5"],
        "tensor x pipeline x context = 2 x 2 x 1 = 4 ranks do not divide launch.hosts x launch.processes = 1 x 5 = 5",
        "use launch.processes 4 or 8",
    ),
    "batch": (
        "train.global_batch",
        ["train.global_batch=16", "train.micro_batch=3", "launch.processes=2"],
        "16 sequences do not divide into micro_batch x data-parallel ranks = 3 x 2",
        "use train.global_batch 12 or 18, or train.micro_batch 1, 2, 4 or 8",
    ),
    "batch that ranks cannot share": (
        "train.global_batch",
        ["train.global_batch=16", "launch.processes=3"],
        "16 sequences do not divide into micro_batch x data-parallel ranks = 16 x 3",
        "use train.global_batch 48 or 96",
    ),
    "zero 2 with a pipeline": (
        "parallel.zero",
        ["parallel.zero=2", "parallel.pipeline=2"],
        "stage 2 hands each gradient to its owner after every backward pass, where 2 pipeline stages add up those of a "
        "step's micro-batches first",
        "use parallel.zero 1, or parallel.pipeline 1",
    ),
    "zero 3 with a pipeline": (
        "parallel.zero",
        ["parallel.zero=3", "parallel.pipeline=2"],
        "stage 3 hands each gradient to its owner after every backward pass, where 2 pipeline stages add up those of a "
        "step's micro-batches first",
        "use parallel.zero 1, or parallel.pipeline 1",
    ),
    "stages": (
        "parallel.pipeline",
        ["parallel.pipeline=4"],
        "4 stages for 2 layers, and each needs one at least",
        "use parallel.pipeline 1 or 2, or model.layers 4",
    ),
    "many legal stages": (
        "parallel.pipeline",
        ["parallel.pipeline=8", "model.layers=6"],
        "8 stages for 6 layers, and each needs one at least",
        "use parallel.pipeline 1 to 6, or model.layers 8",
    ),
    "more ranks than groups": (
        "parallel.tensor",
        ["parallel.tensor=4"],
        "attention.w_q has 2 whole pieces for 4 ranks, and KV heads are not copied",
        "use parallel.tensor 1 or 2, or attention.kv_heads 4",
    ),
    "groups that do not divide": (
        "parallel.tensor",
        ["parallel.tensor=4", "attention.heads=24", "attention.kv_heads=6"],
        "attention.w_q has 6 whole pieces, which do not divide over 4 ranks",
        "use parallel.tensor 1 or 2, or attention.kv_heads 4",
    ),
    "groups in one layer only": (
        "parallel.tensor",
        ["parallel.tensor=4", "attention.kv_heads=4", "attention.window_pattern=[null, [8, null, 8, null]]"],
        "attention.w_q in layer 1 has 2 whole pieces for 4 ranks, and KV heads are not copied",
        "use parallel.tensor 1 or 2, or an attention whose KV heads stand alone and are a multiple of 4 "
        "(gqa, rgqa, switchhead, ...)",
    ),
    "one KV head": (
        "parallel.tensor",
        ["parallel.tensor=2", "attention.type=mqa"],
        "attention.w_q is one whole piece, as there is one KV head, and KV heads are not copied",
        "use parallel.tensor 1, or an attention whose KV heads stand alone and are a multiple of 2 "
        "(gqa, rgqa, switchhead, ...)",
    ),
    "heads that move": (
        "parallel.tensor",
        ["parallel.tensor=2", "attention.type=dynamic_gqa", "attention.freeze_after_tokens=0"],
        "attention.w_q is one whole piece: in this dynamic_gqa heads are chosen or move across KV heads, or KV heads "
        "differ without a pattern that ranks could repeat",
        "use parallel.tensor 1, or an attention whose KV heads stand alone and are a multiple of 2 "
        "(gqa, rgqa, switchhead, ...)",
    ),
    "FFN": (
        "parallel.tensor",
        ["parallel.tensor=2", "model.ffn_width=161"],
        "model.ffn_width 161 does not divide over 2 tensor-parallel ranks",
        "use parallel.tensor 1, or model.ffn_width 162",
    ),
    "vocabulary of the data": (
        "parallel.tensor",
        ["parallel.tensor=2", "data.source.vocab_size=63"],
        "a vocabulary of 63 does not divide over 2 tensor-parallel ranks",
        "use parallel.tensor 1, or model.vocab_size 64 (it may be larger than that of the data)",
    ),
    "vocabulary of the model": (
        "parallel.tensor",
        ["parallel.tensor=2", "model.vocab_size=65"],
        "a vocabulary of 65 does not divide over 2 tensor-parallel ranks",
        "use parallel.tensor 1, or model.vocab_size 66 (it may be larger than that of the data)",
    ),
    "sequence parallel alone": (
        "parallel.sequence_parallel",
        ["parallel.sequence_parallel=true"],
        "norms and residuals are shared by the tensor-parallel ranks, of which there is one",
        "use parallel.sequence_parallel false, or parallel.tensor 2",
    ),
    "sequence parallel of a model that cannot be cut": (
        "parallel.sequence_parallel",
        ["parallel.sequence_parallel=true", "model.ffn_width=161"],
        "norms and residuals are shared by the tensor-parallel ranks, of which there is one",
        "use parallel.sequence_parallel false, or a model and data.seq_len that two ranks can share",
    ),
    "sequence parallel over parts of sequences": (
        "parallel.sequence_parallel",
        ["parallel.sequence_parallel=true", "parallel.tensor=2", "parallel.context=2", "data.seq_len=66"],
        "sequences of 66 tokens do not divide into tensor x context = 2 x 2 parts",
        "use parallel.sequence_parallel false, or data.seq_len 64 or 68",
    ),
    "sequences": (
        "parallel.context",
        ["parallel.context=3"],
        "sequences of 64 tokens do not divide into 3 parts",
        "use parallel.context 1 or 2, or data.seq_len 63 or 66",
    ),
    "KV heads over context ranks": (
        "parallel.context",
        ["parallel.context=4"],
        "attention has 2 KV heads on each tensor-parallel rank, which 4 ranks cannot share out for whole sequences (a "
        "single one would be gathered)",
        "use parallel.context 1 or 2, or parallel.tensor 2",
    ),
    "KV heads of one layer over context ranks": (
        "parallel.context",
        ["parallel.context=2", "attention.kv_heads=4", "attention.window_pattern=[null, [8, 8, 8, null]]"],
        "attention in layer 1 has 3 KV heads on each tensor-parallel rank, which 2 ranks cannot share out for whole "
        "sequences (a single one would be gathered)",
        "use parallel.context 1, or KV heads that 2 divides",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_an_argument_that_is_illegal_is_refused_with_the_legal_choices(name):
    key, overrides, reason, choices = REFUSALS[name]
    with pytest.raises(SpecError) as caught:
        load_spec(TINY, overrides)
    written = next(override for override in overrides if override.startswith(f"{key}="))
    assert str(caught.value) == f"argument '{written}': {key}: {reason}; {choices}"


@pytest.mark.parametrize("name", REFUSALS)
def test_a_file_that_is_illegal_is_refused_at_its_line(name, tmp_path):
    key, overrides, reason, choices = REFUSALS[name]
    file = tmp_path / "spec.yaml"
    lines = [f"base: {TINY}", *(override.replace("=", ": ", 1) for override in overrides)]
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(SpecError) as caught:
        load_spec(file)
    line = next(i for i, text in enumerate(lines, 1) if text.startswith(f"{key}:"))
    assert str(caught.value) == f"{file}:{line}:1: {key}: {reason}; {choices}"


@pytest.mark.parametrize("name", REFUSALS)
def test_a_search_gets_the_reason_without_an_exception(name):
    key, overrides, reason, choices = REFUSALS[name]
    legal = spec(*(o for o in overrides if o.startswith(("attention.", "model.", "data."))))
    values = [override.partition("=") for override in overrides]
    parallel = {k[9:]: yaml.safe_load(v) for k, _, v in values if k.startswith("parallel.")}
    launch = {k[7:]: yaml.safe_load(v) for k, _, v in values if k.startswith("launch.")}
    train = {k[6:]: int(v) for k, _, v in values if k.startswith("train.")}
    changed = legal.model_copy(update={"train": legal.train.model_copy(update=train)})
    assert why_not(legal) is None
    assert why_not(arranged(changed, launch={"processes": 1} | launch, **parallel)) == f"{key}: {reason}; {choices}"


def test_a_refused_layout_is_a_mistake_in_the_spec():
    with pytest.raises(SpecError) as caught:
        spec("parallel.tensor=4")
    assert caught.value.exit_code == 64


# ---------------------------------------------------------------- what is legal


# mechanism -> other fields; legal tensor sizes with 4 KV heads, context sizes alone and of half a model
LEGAL: dict[str, tuple[dict[str, Any], list[int], list[int], list[int] | None]] = {
    "mha": ({"heads": 8}, [1, 2, 4, 8], [1, 2, 4, 8], [1, 2, 4]),
    "mqa": ({"heads": 8}, [1], [1, 2, 4, 8, 16, 32], None),
    "block_sparse": ({"heads": 8, "kv_heads": 4, "block": 8, "blocks": 2}, [1, 2, 4], [1], [1]),
    "gqa": ({"heads": 8, "kv_heads": 4}, [1, 2, 4], [1, 2, 4], [1, 2]),
    "sqa": ({"heads": 8, "kv_heads": 4, "kept": 1}, [1, 2, 4], [1, 2, 4], [1, 2]),
    "dynamic_gqa": ({"heads": 8, "kv_heads": 4, "freeze_after_tokens": 0}, [1], [1, 2, 4, 8], None),
    "gated_delta": ({"heads": 4, "value_heads": 8}, [1, 2, 4], [1], [1]),
    "gqe": ({"heads": 8, "kv_heads": 4, "top_k": 1}, [1, 2, 4], [1, 2, 4], [1, 2]),
    "hybrid": (
        {"heads": 8, "kv_heads": 4, "top_k": 1, "value_experts": 2, "value_top_k": 1},
        [1, 2, 4],
        [1, 2, 4],
        [1, 2],
    ),
    "mla": ({"heads": 4, "latent": 6, "rope_dim": 2}, [1, 2, 4], [1, 2, 4], [1, 2]),
    "moa": ({"heads": 8, "top_k": 2}, [1], [1, 2, 4, 8, 16, 32], None),
    "moh": ({"heads": 8, "kv_heads": 4, "shared_heads": 2, "top_k": 2}, [1, 2, 4], [1, 2, 4], [1, 2]),
    "namoh": ({"heads": 8, "top_k": 4, "shared_heads": 4, "window": 8}, [1, 2, 4], [1], [1]),
    "rgqa": ({"heads": 8, "kv_heads": 4, "top_k": 1}, [1, 2, 4], [1, 2, 4], [1, 2]),
    "switchhead": ({"kv_heads": 4, "experts": 3, "top_k": 2}, [1, 2, 4], [1, 2, 4], [1, 2]),
    "wgqa": ({"heads": 8, "kv_heads": 4}, [1, 2, 4], [1, 2, 4], [1, 2]),
}


def from_study(name: str) -> dict[str, Any]:
    """The fields of the first variant of this type in the study of all mechanisms, for one that is not in LEGAL."""
    study = load_study(STUDY)
    variants = [v for v, keys in study.config.variants.items() if keys["attention.type"] == name]
    assert variants, f"add a variant with attention.type {name} to yaml/studies/all-mechanisms.yaml"
    return variant_spec(study, (), variants[0]).attention.model_dump(exclude_unset=True)


def with_mechanism(name: str, **more: Any) -> Spec:
    fields = LEGAL[name][0] if name in LEGAL else from_study(name)
    values = spec().model_dump() | {"attention": {"type": name, "head_dim": 8} | fields | more}
    values["data"]["seq_len"], values["train"]["micro_batch"] = 32, 8
    return Spec.model_validate(values)


@pytest.mark.parametrize("name", LEGAL)
def test_a_mechanism_runs_on_exactly_the_layouts_that_are_called_legal(name):
    base = with_mechanism(name)
    _, tensor, context, of_half = LEGAL[name]
    assert legal_tensor(base) == tensor and legal_context(base) == context and legal_pipeline(base) == [1, 2]
    sizes = [1, 2, 3, 4, 5, 8, 16, 32]
    assert [t for t in sizes if why_not(arranged(base, launch={"processes": t}, tensor=t)) is None] == tensor
    assert [c for c in sizes if why_not(arranged(base, launch={"processes": c}, context=c)) is None] == context
    halves = [c for c in sizes if why_not(arranged(base, launch={"processes": 2 * c}, tensor=2, context=c)) is None]
    assert halves == (of_half or [])


@pytest.mark.parametrize("name", MECHANISMS)
def test_what_is_called_legal_is_not_refused_and_the_rest_is(name):
    """Of every mechanism; LEGAL states beyond that what the sizes are."""
    base = with_mechanism(name)
    for ranks in (1, 2, 3, 4, 8):
        cut = why_not(arranged(base, launch={"processes": ranks}, tensor=ranks))
        shared = why_not(arranged(base, launch={"processes": ranks}, context=ranks))
        assert (cut is None, shared is None) == (ranks in legal_tensor(base), ranks in legal_context(base)), ranks


def test_a_mechanism_that_is_not_listed_is_taken_from_the_study(monkeypatch):
    monkeypatch.delitem(LEGAL, "gqe")
    assert with_mechanism("gqe").attention.model_dump()["top_k"] == 1 and from_study("moa")["type"] == "moa"


@pytest.mark.parametrize("name", MECHANISMS)
def test_ranks_that_are_legal_get_equal_parts_of_every_parameter_that_is_cut(name):
    base = with_mechanism(name)
    mechanism = base.attention.layer(0, base.model.layers)
    layer = mechanism.build(width=base.model.width, layers=2, init_std=0.02, norm_eps=1e-5)
    sizes = {k: layer.get_parameter(k).shape[shard.dim] for k, shard in mechanism.shards().items()}
    legal = [ranks for ranks in range(1, 9) if why_not_cuttable(base, ranks) is None]
    assert legal == legal_tensor(base)
    assert all(size % ranks == 0 for size in sizes.values() for ranks in legal)


@pytest.mark.parametrize(
    ("more", "tensor"), [({}, [1, 2, 4]), ({"balance": {"loss_free_rate": 1e-3}}, [1])], ids=["aux loss", "bias"]
)
def test_a_router_over_all_heads_with_a_bias_keeps_the_layer_whole(more, tensor):
    assert legal_tensor(with_mechanism("moh", **more)) == tensor


def test_the_shared_head_of_gqe_does_not_limit_context_ranks():
    for shared_head in ("mean", "dedicated", "none"):
        assert legal_context(with_mechanism("gqe", shared_head=shared_head)) == [1, 2, 4]


def test_groups_of_unequal_size_are_dealt_as_the_query_heads_that_copy_them():
    base = with_mechanism("gqa", group_sizes=[1, 3, 1, 3])
    assert legal_tensor(base) == [1, 2]
    assert legal_context(base) == [1, 2, 4, 8] and legal_context(arranged(base, tensor=2)) == [1, 2, 4]


def test_a_layer_with_other_windows_limits_the_whole_model():
    base = with_mechanism("gqa", window_pattern=[None, [8, None, 8, None]])
    assert legal_tensor(base) == [1, 2]  # its pattern repeats twice
    assert legal_context(base) == [1, 2]  # two KV heads per window
    assert legal_context(arranged(base, tensor=2)) == [1, 2]  # one per window in layer 1, two in layer 0


def test_parts_of_sequences_are_cut_again_under_sequence_parallelism():
    values = with_mechanism("mha").model_dump()
    values["data"]["seq_len"] = 36
    base = Spec.model_validate(values)
    assert legal_context(arranged(base, tensor=2)) == [1, 2, 4]
    assert legal_context(arranged(base, tensor=2, sequence_parallel=True)) == [1, 2]  # a quarter, 9 tokens, is odd


def test_a_pipeline_under_zero_2_has_one_stage():
    assert legal_pipeline(spec("parallel.zero=2")) == [1]


def test_the_vocabulary_counts_where_it_is_known():
    assert vocabulary(spec()) == 64 and vocabulary(spec("model.vocab_size=65")) == 65
    assert legal_tensor(spec("model.vocab_size=65")) == [1]


def test_recomputation_and_precision_are_legal_everywhere():
    full = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence_parallel=true", "launch.processes=8"]
    made = spec(*full, "parallel.recompute=block", "parallel.precision=bf16", "train.micro_batch=2")
    assert made.data_parallel == 2 and accumulation(made) == 4


def test_data_parallel_ranks_are_what_the_other_directions_leave():
    made = arranged(spec(), launch={"hosts": 4, "processes": 8}, tensor=2, pipeline=2, context=2)
    assert made.data_parallel == 4


# ---------------------------------------------------------------- a vocabulary that the data brings


def shards(**model: Any) -> Spec:
    values = spec("launch.processes=2", "train.micro_batch=1").model_dump()
    values["parallel"] |= {"tensor": 2}
    values["data"]["source"] = {"type": "mds", "path": "datasets/none"}
    values["model"] |= model
    return Spec.model_validate(values)


def test_a_vocabulary_that_comes_with_the_data_is_checked_when_it_is_known():
    unknown = shards()
    assert vocabulary(unknown) is None
    check_vocabulary(unknown)
    filled = unknown.model_copy(update={"model": unknown.model.model_copy(update={"vocab_size": 50_257})})
    with pytest.raises(SpecError) as caught:
        check_vocabulary(filled)
    assert str(caught.value) == (
        "parallel.tensor: a vocabulary of 50257 does not divide over 2 tensor-parallel ranks; use parallel.tensor 1, "
        "or model.vocab_size 50258 (it may be larger than that of the data)"
    )
    check_vocabulary(shards(vocab_size=50_258))


# ---------------------------------------------------------------- studies


def test_each_variant_of_a_study_is_checked_and_refused_where_it_stands(tmp_path):
    base = f"base: {TINY}\nparallel.tensor: 2\nlaunch.processes: 2\ntrain.micro_batch: 8\n"
    (tmp_path / "base.yaml").write_text(base)
    study = tmp_path / "study.yaml"
    study.write_text(
        "study: cut\nbase: base.yaml\nseeds: [1]\nvariants:\n  gqa:\n  one:\n    attention.type: mqa\n"
        "  moved:\n    parallel.tensor: 4\n"
    )
    with pytest.raises(SpecError) as caught:
        plan_study(load_study(study))
    assert str(caught.value).startswith(f"{tmp_path / 'base.yaml'}:2:1: parallel.tensor: attention.w_q is one whole")
    study.write_text(study.read_text().replace("attention.type: mqa", "attention.type: mha"))
    with pytest.raises(SpecError) as caught:
        plan_study(load_study(study))
    assert str(caught.value).startswith(f"{study}:9:5: parallel.tensor: attention.w_q has 2 whole pieces for 4 ranks")
    study.write_text(study.read_text().replace("parallel.tensor: 4", "parallel.tensor: 1"))
    assert [cell.spec.parallel.tensor for cell in plan_study(load_study(study)).cells] == [2, 2, 1]


# ---------------------------------------------------------------- legal, but wasteful


def test_a_good_layout_has_no_warning():
    made = spec("parallel.tensor=2", "parallel.pipeline=2", "launch.processes=4", "train.micro_batch=8")
    assert warnings(made) == []


def test_a_pipeline_of_few_micro_batches_is_idle():
    (text,) = warnings(spec("parallel.pipeline=2", "launch.processes=2"))
    assert text == (
        "parallel.pipeline: 1 micro-batches a step in 2 stages leave each stage idle for 50% of the time; "
        "use train.global_batch 32 or more, or fewer stages"
    )


def test_ranks_that_exchange_much_and_lie_on_several_hosts_are_named():
    base = with_mechanism("mha")
    apart = arranged(base, launch={"hosts": 2, "processes": 2}, tensor=4)
    assert why_not(apart) is None
    (text,) = warnings(apart)
    assert text.startswith("parallel.tensor: ranks that exchange activations four times in each layer lie on several")
    apart = arranged(base, launch={"hosts": 2, "processes": 2}, tensor=2, context=2)
    assert [text.partition(":")[0] for text in warnings(apart)] == ["parallel.context"]
    together = arranged(base, launch={"hosts": 2, "processes": 4}, tensor=2, context=2)
    assert warnings(together) == []
