"""`headway plan`: compute cost, memory and speed of a spec without training and without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.errors import SpecError
from headway.launcher.plan.hardware import Gpu, find_gpu, find_network, usable_bytes
from headway.launcher.plan.layouts import plan_layout, search
from headway.launcher.plan.micro_batch.plan import by_plan, with_number
from headway.launcher.plan.micro_batch.search import Choice
from headway.launcher.plan.precision import bf16_note
from headway.launcher.plan.text import cost_lines, layout_figures, layout_lines, on_cpu, search_figures, search_lines
from headway.launcher.run.resolve import resolve
from headway.launcher.spec.encoder_decoder import decoders_only
from headway.launcher.spec.layouts import vocabulary
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec


def plan(
    path: Path,
    overrides: Sequence[str],
    *,
    gpus: int | None = None,
    gpu: str = "h100",
    network: str = "ndr",
    as_json: bool = False,
) -> int:
    """Print parameters, FLOPs, memory, communication and expected speed of a spec in its own layout.

    With `gpus`, also print the layouts on that many GPUs with the highest expected speed. Raises SpecError if the GPU
    or network is unknown, the spec is not legal, or `gpus` is given for a spec on CPUs.
    """
    chosen, between = find_gpu(gpu), find_network(network)
    loaded = load_spec(path, overrides, no_auto=None)
    spec, auto = with_vocabulary(loaded.spec), None
    if spec.model.is_encoder_decoder:
        return _cost_alone(spec, gpus=gpus, as_json=as_json)
    if gpus is not None and on_cpu(spec):
        raise SpecError(
            "--gpus: this spec trains on CPUs (launch.device is cpu); add launch.device=cuda behind it to search for "
            "layouts on GPUs, or leave out --gpus"
        )
    if loaded.auto:
        auto = by_plan(spec, usable_bytes(chosen))
        spec = with_number(spec, auto.micro_batch or 1)  # if 1 does not fit, the output below says so
    cost = cost_of(spec)
    useful = 3 * cost["flops_per_token_useful"]
    own = plan_layout(spec, chosen, between, useful_flops_per_token=useful)
    found = None
    if gpus is not None:
        found = search(spec, gpus=gpus, gpu=chosen, network=between, useful_flops_per_token=useful)
    if as_json:
        figures = {**cost, **layout_figures(own, chosen, between)}
        if auto is not None:
            figures["micro_batch_auto"] = auto_line(spec.train.micro_batch, auto, chosen)
        if found is not None:
            figures["search"] = search_figures(found, chosen, between)
        console.emit(figures)
        return 0
    lines = [*cost_lines(spec, cost), "", *layout_lines(own, chosen, between)]
    if auto is not None:
        lines.insert(0, auto_line(spec.train.micro_batch, auto, chosen))
    if found is not None:
        assert gpus is not None
        lines += ["", *search_lines(found, gpus, chosen)]
    if (note := bf16_note(spec)) is not None:
        lines += ["", note]
    console.result("\n".join(lines))
    return 0


def _cost_alone(spec: Spec, *, gpus: int | None, as_json: bool) -> int:
    """Print the cost of an encoder-decoder, whose memory and speed are not planned."""
    if gpus is not None:
        decoders_only(spec, "--gpus")
    cost = cost_of(spec)
    note = "memory, communication and speed are planned for decoders only (model.type encoder_decoder)"
    if as_json:
        console.emit({**cost, "not_planned": note})
        return 0
    console.result("\n".join([*cost_lines(spec, cost), "", note]))
    return 0


def auto_line(number: int, auto: Choice, gpu: Gpu) -> str:
    """The message that states the micro-batch with which `train.micro_batch: auto` is planned."""
    why = auto.why if auto.micro_batch is not None else "even one sequence does not fit"
    return (
        f"train.micro_batch: auto is planned as {number} on {gpu.name}: {why}; `headway train` measures on its own "
        "host and may choose another number"
    )


def with_vocabulary(spec: Spec) -> Spec:
    """The spec with its vocabulary size set. The data is read only if neither model nor source states the size."""
    size = vocabulary(spec)
    if size is None:
        return resolve(spec)[0]
    return spec.model_copy(update={"model": spec.model.model_copy(update={"vocab_size": size})})


def cost_of(spec: Spec) -> dict[str, Any]:
    """Parameters, FLOPs and KV cache of a spec whose vocabulary size is set."""
    from headway.launcher.match.matching import spec_cost

    assert spec.model.vocab_size is not None
    cost = spec_cost(spec, spec.model.vocab_size)
    tokens = spec.steps * spec.tokens_per_step
    return {
        "num_params": cost.num_params,
        "params_by_part": cost.params_by_part,
        "flops_per_token_useful": cost.flops_per_token.useful,
        "flops_per_token_executed": cost.flops_per_token.executed,
        "flops_per_token_attention_core": cost.attention_core_flops.useful,
        "kv_bytes_per_token": cost.kv_bytes_per_token,
        "training_tokens": tokens,
        "training_flops_useful": 3 * cost.trained(tokens).useful,
        "flops_per_token_stages": [[at, flops.useful] for at, flops in cost.stages],
    }
