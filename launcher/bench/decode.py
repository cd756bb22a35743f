"""`headway bench decode`: time prefill and each further token of every variant of a study, over batches and lengths,
with the bytes that its KV cache holds.

All variants take turns in one process, round by round, and each is compared with the baseline of the same round.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.launcher.base import console
from headway.launcher.base.errors import SpecError
from headway.launcher.base.spread import spread
from headway.launcher.bench.mechanism import Variants, decoder_of, in_turns, matched_variants, timed, write_measured
from headway.launcher.report.plots.style import STYLE, WIDTH_IN
from headway.launcher.run.machine import git_commit, machine, versions

if TYPE_CHECKING:
    import torch

    from headway.model.decoder import Decoder, DecoderCache

PHASES = ("prefill", "token")
WARMUP = 1


def bench_decode(
    path: Path,
    overrides: Sequence[str],
    *,
    batches: Sequence[int],
    lengths: Sequence[int],
    new: int,
    rounds: int,
    out: Path | None,
) -> int:
    """Measure every variant of the study at `path` at its matched size, untrained.

    `lengths`: tokens of the prompt; `new`: tokens that are decoded after it, one by one. Raises SpecError for values
    that cannot be measured.
    """
    for name, values in (("--batches", batches), ("--lengths", lengths)):
        if len(set(values)) != len(values):
            raise SpecError(f"{name}: {list(values)} names one twice; give different numbers, such as 1,8")
    study = matched_variants(path, overrides)
    for name, (spec, _) in study.specs.items():
        known = spec.model.learned_positions
        if known and max(lengths) + new > known:
            raise SpecError(
                f"--lengths {max(lengths)}: {name} has learned positions for {known} tokens, {new} of them for "
                f"new ones; give at most {known - new}"
            )
    words = [*["headway", "bench", "decode", str(path), *overrides], "--batches", ",".join(map(str, batches))]
    words += ["--lengths", ",".join(map(str, lengths)), "--new", str(new), "--rounds", str(rounds)]
    result: dict[str, Any] = {
        "kind": "decode",
        "command": shlex.join(words),
        "study": study.name,
        "baseline": study.baseline,
        "device": study.device.type,
        "precision": study.specs[study.baseline][0].parallel.precision,
        "new_tokens": new,
        "rounds": rounds,
        "git_commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "specs": {name: spec.model_dump(mode="json") for name, (spec, _) in study.specs.items()},
        "rows": [],
    }
    for batch in batches:
        for length in lengths:
            result["rows"] += _measure(study, batch, length, new=new, rounds=rounds)
            if out is not None:  # after each pair, so that an interruption loses only the current one
                write_measured(out, result, markdown(result))
    console.result(markdown(result))
    if out is not None:
        draw(result, out.with_suffix(".png"))
        console.say(f"written to {out}, {out.with_suffix('.md')} and {out.with_suffix('.png')}")
    return 0


class _Decoding:
    """One variant: a prompt of [B, L], then tokens one by one. `held`: bytes in the cache after the prompt."""

    def __init__(self, model: Decoder, prompt: torch.Tensor, new: int) -> None:
        self._model, self._prompt, self._new = model.eval(), prompt, new
        self._cache: DecoderCache | None = None
        self.held = 0

    def prefill(self) -> None:
        import torch

        with torch.inference_mode():
            self._cache = self._model.new_cache(self._prompt.shape[1] + self._new)
            self._model.logits(self._prompt, cache=self._cache, last=True)
        self.held = self._cache.nbytes

    def tokens(self) -> None:
        import torch

        assert self._cache is not None, "prefill comes first"
        with torch.inference_mode():
            for _ in range(self._new):
                self._model.logits(self._prompt[:, :1], cache=self._cache, last=True)


def _measure(study: Variants, batch: int, length: int, *, new: int, rounds: int) -> list[dict[str, Any]]:
    import torch

    decodings: dict[str, _Decoding] = {}
    for name, (spec, vocab_size) in study.specs.items():
        ids = torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))
        decodings[name] = _Decoding(decoder_of(spec, vocab_size, study.device), ids.to(study.device), new)
    seconds: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in decodings}
    names = list(decodings)
    with console.progress(f"decode {batch} x {length}", (WARMUP + rounds) * len(names), "passes", tick=False) as bar:
        for number in range(WARMUP + rounds):
            for name in in_turns(names, number):
                one = decodings[name]
                found = {"prefill": timed(one.prefill, study.device), "token": timed(one.tokens, study.device) / new}
                if number >= WARMUP:
                    for phase in PHASES:
                        seconds[name][phase].append(found[phase])
                bar.update()
    base = seconds[study.baseline]
    return [
        {
            "variant": name,
            "batch": batch,
            "length": length,
            "kv_bytes_held": decodings[name].held,
            "kv_ratio": decodings[name].held / decodings[study.baseline].held,
            **{
                phase: {
                    "seconds": spread(seconds[name][phase]),
                    "ratio": spread([a / b for a, b in zip(seconds[name][phase], base[phase], strict=True)]),
                    "raw_seconds": seconds[name][phase],
                }
                for phase in PHASES
            },
        }
        for name in names
    ]


def markdown(result: dict[str, Any]) -> str:
    """A table for each batch and length."""
    lines = [
        f"# Decoding with each mechanism beside {result['baseline']}",
        "",
        f"`{result['command']}`, commit {result['git_commit']}, {result['measured_at']}, {result['device']}, "
        f"{result['precision']}, untrained models. Time ratios: median of {result['rounds']} pairwise ratios "
        f"(quartiles). Token: one further token after the prompt, mean of {result['new_tokens']}.",
    ]
    pairs = list(dict.fromkeys((row["batch"], row["length"]) for row in result["rows"]))
    head = ["variant", "prefill", "token", "KV bytes held", "prefill time", "time per token"]
    for batch, length in pairs:
        lines += ["", f"## Batch of {batch}, prompt of {length} tokens", ""]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in (r for r in result["rows"] if (r["batch"], r["length"]) == (batch, length)):
            cells = [row["variant"], *(_cell(row[phase]["ratio"]) for phase in PHASES)]
            cells.append(f"{row['kv_bytes_held']:,} ({row['kv_ratio']:.2f})")
            cells += [f"{1e3 * row[phase]['seconds']['median']:.2f} ms" for phase in PHASES]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"


def draw(result: dict[str, Any], file: Path) -> None:
    """One panel per batch and length: time per token over the baseline's against KV bytes over the baseline's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pairs = list(dict.fromkeys((row["batch"], row["length"]) for row in result["rows"]))
    with plt.rc_context(STYLE):
        size = (WIDTH_IN * max(1.0, len(pairs) / 2), 5.0)
        figure, axes = plt.subplots(1, len(pairs), figsize=size, squeeze=False, sharey=True, layout="constrained")
        for axis, (batch, length) in zip(axes[0], pairs, strict=True):
            for row in (r for r in result["rows"] if (r["batch"], r["length"]) == (batch, length)):
                x, r = row["kv_ratio"], row["token"]["ratio"]
                axis.errorbar(x, r["median"], [[r["median"] - r["q1"]], [r["q3"] - r["median"]]], fmt="o", markersize=4)
                axis.annotate(row["variant"], (x, r["median"]), xytext=(4, 3), textcoords="offset points", fontsize=7)
            axis.set_title(f"batch {batch}, {length} tokens")
            axis.set_xlabel(f"KV bytes over {result['baseline']}'s")
        axes[0][0].set_ylabel(f"time per token over {result['baseline']}'s")
        figure.savefig(file, dpi=150, metadata={"Software": None})
        plt.close(figure)
