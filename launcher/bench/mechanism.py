"""`headway bench mechanism`: time forward, forward and backward, and prefill of every variant of a study, at several
sequence lengths.

All variants take turns in one process, round by round. Each is compared with the baseline of the same round, so that a
drifting machine speed affects all of them. Each time ratio is reported with the ratio of useful FLOPs of the whole
model (Amdahl's bound for a cheaper attention) and of executed FLOPs. Time can fall below these ratios, because softmax
and the memory traffic of score maps are not FLOPs.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.launcher.base import console
from headway.launcher.base.errors import SpecError, printable
from headway.launcher.base.spread import spread
from headway.launcher.hosts.commands import worker_environment
from headway.launcher.match.bounds import bound_specs
from headway.launcher.match.matching import value_at
from headway.launcher.report.plots.style import STYLE, WIDTH_IN
from headway.launcher.run.machine import git_commit, machine, versions
from headway.launcher.spec.encoder_decoder import decoders_only
from headway.launcher.spec.load import load_spec
from headway.launcher.study.config import FULL, StudyConfig, load_study
from headway.launcher.study.plan import plan_study

if TYPE_CHECKING:
    import torch

    from headway.launcher.spec.spec import Spec
    from headway.model.decoder import Decoder

PHASES = ("forward", "forward_backward", "prefill")
LENGTHS = (256, 1024, 2048)
WARMUP = 2
ALIGNED = 128
"""Tensor cores have their full rate where sizes are multiples of this (NVIDIA's guide to matrix multiplication)."""
FAR = 1.5
"""A time ratio is marked if it exceeds the ratio of useful FLOPs by this factor."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Forward FLOPs per token of the whole model. In prefill, the head is computed only for the last token."""

    useful: float
    executed: float


@dataclass(frozen=True, kw_only=True)
class Variants:
    """The variants of a study at their matched sizes, and the device that they are measured on.

    `specs`: variant -> (spec, vocabulary). `goals`: tokens per sequence -> how many times as fast as the baseline a
    variant has to be, where the sizes are those of the study's `bounds`.
    """

    name: str
    baseline: str
    specs: dict[str, tuple[Spec, int]]
    device: torch.device
    goals: dict[int, float] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()


def matched_variants(path: Path, overrides: Sequence[str]) -> Variants:
    """Plan the study at `path`, and set the threads of this process to those of its specs."""
    plan = plan_study(load_study(path), overrides)
    config = plan.study.config
    cells = [cell for cell in plan.cells if cell.seed == config.seeds[0] and cell.budget == FULL]
    specs = {cell.variant: (cell.spec, cell.vocab_size) for cell in cells}
    return _on_device(config, specs)


def larger_variants(path: Path, overrides: Sequence[str]) -> Variants:
    """The variants at the larger model of `bounds` of the study at `path`, which needs no data and no trained run.

    Solved integers are multiples of the power of two that divides the baseline's, up to `ALIGNED`: matrix units are
    slower at odd sizes, which no FLOPs show. Raises SpecError if the study has no `bounds`.
    """
    study = load_study(path)
    config = study.config
    if config.bounds is None:
        raise SpecError(f"--at-bounds: {path} has no `bounds`, which name the larger model; add them, or leave it out")
    larger, match = study.path.parent / config.bounds.spec, config.match
    if match is not None:
        value = value_at(load_spec(larger, overrides).spec, match.free)
        match = match.model_copy(update={"multiple": max(match.multiple, math.gcd(value, ALIGNED))})
    specs, vocab_size = bound_specs(
        config.bounds, larger, study.variants, baseline=config.baseline_name, match=match, arguments=overrides
    )
    found = _on_device(config, {name: (spec, vocab_size) for name, spec in specs.items()})
    return replace(found, goals=config.bounds.goals, lengths=tuple(sorted(config.bounds.seq_len)))


def _on_device(config: StudyConfig, specs: dict[str, tuple[Spec, int]]) -> Variants:
    any_spec = specs[config.baseline_name][0]
    os.environ.update(worker_environment(any_spec))
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    on_gpu = any_spec.launch.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    return Variants(name=config.study, baseline=config.baseline_name, specs=specs, device=device)


def chosen(found: Variants, names: Sequence[str]) -> Variants:
    """The variants with these names, and the baseline; all without names. Raises SpecError for an unknown name."""
    for name in names:
        if name not in found.specs:
            raise SpecError(f"--variants: {printable(name)} is not a variant; choose among {', '.join(found.specs)}")
    kept = {name: spec for name, spec in found.specs.items() if not names or name in {*names, found.baseline}}
    return replace(found, specs=kept)


def write_measured(out: Path, result: dict[str, Any], text: str) -> None:
    """Write a measurement as JSON to `out`, and its table beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    out.with_suffix(".md").write_text(text)


def in_turns(names: Sequence[str], number: int) -> list[str]:
    """The names in the order of round `number`: each round begins with another one."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def bench_mechanism(
    path: Path,
    overrides: Sequence[str],
    *,
    lengths: Sequence[int] | None,
    rounds: int,
    tokens: int,
    out: Path | None,
    at_bounds: bool = False,
    names: Sequence[str] = (),
) -> int:
    """Measure every variant of the study at `path` at its matched size.

    `lengths`: tokens per sequence; None: `LENGTHS`, or those of the bounds. `tokens`: tokens per pass; shorter
    sequences are batched. `at_bounds`: measure the larger model of the study's `bounds`. `names`: the variants to
    measure beside the baseline; all if there are none. Raises SpecError for invalid lengths, names or too few rounds.
    """
    if rounds < 2:
        raise SpecError(f"--rounds: {rounds} round(s) have no spread; use at least 2")
    found = larger_variants(path, overrides) if at_bounds else None
    lengths = (found.lengths if found is not None else LENGTHS) if lengths is None else lengths
    if not lengths or min(lengths) < 2 or len(set(lengths)) != len(lengths):
        raise SpecError(
            f"--lengths: {list(lengths)} is invalid; use different lengths of at least 2 tokens, such as 256,1024"
        )
    study = chosen(matched_variants(path, overrides) if found is None else found, names)
    specs, baseline, device = study.specs, study.baseline, study.device
    any_spec = specs[baseline][0]
    from headway.parallel.operations import settled  # imports torch, whose threads are set by now

    result: dict[str, Any] = {
        "kind": "mechanism",
        "command": shlex.join(
            [
                *["headway", "bench", "mechanism", str(path), *overrides],
                *(["--at-bounds"] if at_bounds else []),
                *(["--variants", ",".join(names)] if names else []),
                *["--lengths", ",".join(map(str, lengths)), "--rounds", str(rounds), "--tokens", str(tokens)],
            ]
        ),
        "study": study.name,
        "baseline": baseline,
        "device": device.type,
        "precision": any_spec.parallel.precision,
        "speed": settled(any_spec.speed, any_spec.parallel, device.type),
        "goals": {str(n): ratio for n, ratio in study.goals.items()},
        "rounds": rounds,
        "git_commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "specs": {name: spec.model_dump(mode="json") for name, (spec, _) in specs.items()},
        "rows": [],
    }
    for i, length in enumerate(lengths):
        about = f"{len(specs)} variants, {len(PHASES)} phases, {rounds} rounds"
        console.note(f"{length} tokens ({i + 1} of {len(lengths)}): {about}")
        result["rows"] += _measure(specs, baseline, length, rounds=rounds, tokens=tokens, device=device)
        if out is not None:  # write after each length, so that an interruption loses only the current one
            write_measured(out, result, markdown(result))
    console.result(markdown(result))
    if out is not None:
        draw(result, out.with_suffix(".png"))
        console.say(f"written to {out}, {out.with_suffix('.md')} and {out.with_suffix('.png')}")
    return 0


def _measure(
    specs: dict[str, tuple[Spec, int]],
    baseline: str,
    length: int,
    *,
    rounds: int,
    tokens: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Rows of one length: for each variant and phase, the spread of the seconds and of the pairwise ratio."""
    import torch

    batch = max(1, tokens // length)
    passes: dict[str, dict[str, Callable[[], None]]] = {}
    for name, (spec, vocab_size) in specs.items():
        ids = torch.randint(0, vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(1)).to(device)
        passes[name] = _passes(decoder_of(spec, vocab_size, device), ids)
    seconds = {name: {phase: [] for phase in PHASES} for name in specs}
    names = list(specs)
    passes_total = (WARMUP + rounds) * len(PHASES) * len(names)
    with console.progress(f"measure {length} tokens", passes_total, "passes", tick=False) as bar:
        for i in range(WARMUP + rounds):
            for phase in PHASES:
                for name in in_turns(names, i):
                    elapsed = timed(passes[name][phase], device)
                    if i >= WARMUP:
                        seconds[name][phase].append(elapsed)
                    bar.update()
    rows = []
    for name, (spec, vocab_size) in specs.items():
        for phase in PHASES:
            ours, theirs = seconds[name][phase], seconds[baseline][phase]
            rates = _rates(spec, vocab_size, length, prefill=phase == "prefill")
            base = _rates(*specs[baseline], length, prefill=phase == "prefill")
            ratio = spread([a / b for a, b in zip(ours, theirs, strict=True)])
            rows.append(
                {
                    "variant": name,
                    "seq_len": length,
                    "sequences": batch,
                    "phase": phase,
                    "seconds": spread(ours),
                    "ratio": ratio,
                    "useful_flop_ratio": rates.useful / base.useful,
                    "executed_flop_ratio": rates.executed / base.executed,
                    "distance": ratio["median"] / (rates.useful / base.useful),
                    "raw_seconds": ours,
                }
            )
    return rows


def decoder_of(spec: Spec, vocab_size: int, device: torch.device) -> Decoder:
    """An untrained decoder of the spec, with its schedules in their final state, and with precision, recomputation and
    `speed` of the spec.
    """
    import torch

    from headway.model.base import SequenceRanks
    from headway.model.decoder import Decoder, Placement
    from headway.parallel.operations import operations_of

    decoders_only(spec, "a measurement of mechanisms")
    operations = operations_of(spec.speed, spec.parallel, device)
    placement = Placement(
        sequence=SequenceRanks(attend=operations.core), recompute=spec.parallel.recompute, operations=operations
    )
    model = Decoder(spec.model, spec.attention, vocab_size=vocab_size, seed=spec.seed, placement=placement)
    model.before_step(spec.steps * spec.tokens_per_step)  # the final state of schedules, for which costs are stated
    return model.to(device, torch.bfloat16 if spec.parallel.precision == "bf16" else torch.float32)


def _passes(model: Decoder, ids: torch.Tensor) -> dict[str, Callable[[], None]]:
    """Phase -> pass to time. The training passes compute router statistics and losses, as in training."""
    import torch

    tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def forward() -> None:
        with torch.no_grad():
            model.train()(tokens, labels)

    def forward_backward() -> None:
        out = model.train()(tokens, labels)
        (out.loss_sum / tokens.numel() + out.aux_loss).backward()
        model.zero_grad(set_to_none=True)

    def prefill() -> None:
        with torch.no_grad():
            model.eval().logits(tokens, cache=model.new_cache(), last=True)

    return {"forward": forward, "forward_backward": forward_backward, "prefill": prefill}


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of a call, with the work that it leaves to a GPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    t0 = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - t0


def _rates(spec: Spec, vocab_size: int, length: int, *, prefill: bool) -> Rates:
    from headway.model.cost import account

    flops = account(spec.model, spec.attention, vocab_size=vocab_size, seq_len=length).flops_per_token
    saved = 2 * vocab_size * spec.model.width * (1 - 1 / length) if prefill else 0.0
    return Rates(useful=flops.useful - saved, executed=flops.executed - saved)


def markdown(result: dict[str, Any]) -> str:
    """The measurement as a table per length."""
    lines = [
        f"# Time of each mechanism over {result['baseline']}'s",
        "",
        f"`{result['command']}`, commit {result['git_commit']}, {result['measured_at']}, {result['device']}, "
        f"{result['precision']}. Time cells: median of {result['rounds']} pairwise ratios (quartiles). Then follow the "
        "ratios of useful and of executed FLOPs of the whole model. The time ratio can be lower than both, because "
        "softmax and the memory traffic of score maps are not FLOPs. "
        f"`far`: the time ratio is more than {FAR} times the ratio of useful FLOPs. "
        f"Options of `speed`: {', '.join(f'{key} {value}' for key, value in result.get('speed', {}).items())}.",
    ]
    lengths = list(dict.fromkeys(row["seq_len"] for row in result["rows"]))
    for length in lengths:
        rows = [row for row in result["rows"] if row["seq_len"] == length]
        lines += ["", f"## {length} tokens, {rows[0]['sequences']} sequences", ""]
        head = ["variant", "forward", "forward + backward", "prefill", "useful", "executed", "own time"]
        goal = result.get("goals", {}).get(str(length))
        head += [] if goal is None else [f"training speed (goal {goal:g}x)"]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for name in dict.fromkeys(row["variant"] for row in rows):
            of = {row["phase"]: row for row in rows if row["variant"] == name}
            train = of["forward_backward"]
            cells = [name, *(_cell(of[phase]) for phase in PHASES)]
            cells += [f"{train['useful_flop_ratio']:.3f}", f"{train['executed_flop_ratio']:.3f}"]
            cells += [" / ".join(f"{1e3 * of[p]['seconds']['median']:.1f}" for p in PHASES) + " ms"]
            cells += [] if goal is None else [_speed(train, goal, baseline=name == result["baseline"])]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], file: Path) -> None:
    """Draw one panel per length: time ratio of forward and backward against useful FLOP ratio, a point per variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if row["phase"] == "forward_backward"]
    lengths = list(dict.fromkeys(row["seq_len"] for row in rows))
    low = 0.95 * min(row["useful_flop_ratio"] for row in rows)
    high = 1.05 * max(max(row["useful_flop_ratio"], 1.0) for row in rows)
    with plt.rc_context(STYLE):
        size = (WIDTH_IN * max(1.0, len(lengths) / 2), 5.5)
        figure, axes = plt.subplots(1, len(lengths), figsize=size, squeeze=False, sharey=True, layout="constrained")
        for axis, length in zip(axes[0], lengths, strict=True):
            axis.plot([low, high], [low, high], color="#000000", linewidth=1, label="equal to FLOPs")
            axis.plot([low, high], [FAR * low, FAR * high], color="#999999", linestyle="--", label=f"{FAR} times that")
            for row in (row for row in rows if row["seq_len"] == length):
                x, r = row["useful_flop_ratio"], row["ratio"]
                axis.errorbar(x, r["median"], [[r["median"] - r["q1"]], [r["q3"] - r["median"]]], fmt="o", markersize=4)
                axis.annotate(row["variant"], (x, r["median"]), xytext=(4, 3), textcoords="offset points", fontsize=7)
            axis.set_title(f"{length} tokens")
            axis.set_xlabel(f"useful FLOPs over {result['baseline']}'s")
        axes[0][0].set_ylabel(f"forward and backward time over {result['baseline']}'s")
        axes[0][0].legend(loc="upper left")
        figure.savefig(file, dpi=150, metadata={"Software": None})
        plt.close(figure)


def _speed(row: dict[str, Any], goal: float, *, baseline: bool) -> str:
    """How many times as fast as the baseline it trains: the median, and whether both quartiles reach the goal."""
    slow, fast = 1 / row["ratio"]["q3"], 1 / row["ratio"]["q1"]
    words = "" if baseline else " reached" if slow >= goal else " missed" if fast < goal else " undecided"
    return f"{1 / row['ratio']['median']:.2f}x{words}"


def _cell(row: dict[str, Any]) -> str:
    r = row["ratio"]
    far = " far" if row["distance"] > FAR else ""
    return f"{r['median']:.2f} ({r['q1']:.2f} to {r['q3']:.2f}){far}"
