"""Match sizes by measured time: with a simulated clock, stored in the study's folder, and once with a real model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from headway.launcher.base.errors import SpecError
from headway.launcher.compare.cells import PREEMPTED
from headway.launcher.match import measured as match_measured
from headway.launcher.match.matching import MatchConfig, Matched, Spread
from headway.launcher.match.measured import FILE, Measurements, spread_note
from headway.launcher.match.table import matching_rows
from headway.launcher.match.time import CHECK_ROUNDS, Pass, compare, decoder_pass
from headway.launcher.spec.spec import Spec
from headway.launcher.study import run as study_module
from headway.launcher.study.config import load_study
from headway.launcher.study.plan import plan_study, study_record
from headway.launcher.study.run import report_study, run_study, status_study

Seconds = Callable[[Spec], float]


def spec(*, ffn_width: int = 160, **attention) -> Spec:
    return Spec.model_validate(
        {
            "model": {"width": 64, "layers": 2, "ffn_width": ffn_width, "vocab_size": 64},
            "attention": {"type": "gqa", "heads": 8, "kv_heads": 2, "head_dim": 8} | attention,
            "data": {"seq_len": 32, "source": {"type": "synthetic", "task": "copy", "vocab_size": 64}},
            "optimizer": {"lr": 1e-3},
            "train": {"tokens": 1000, "global_batch": 1, "micro_batch": 1},
            "launch": {"threads": 1},
        }
    )


def by_ffn_width(spec: Spec) -> float:
    """Seconds of a pass, which depend on the MLP: rgqa with an FFN width of 240 takes as long as gqa with 160."""
    return (0.06 if spec.attention.type == "gqa" else 0.02) + 0.0005 * spec.model.ffn_width


class Clock:
    """Simulates the timed pass: `seconds(spec)` with noise, on a machine that slows down over time."""

    def __init__(self, seconds: Seconds, *, noise: float = 0.01) -> None:
        self._seconds, self._noise, self._random = seconds, noise, random.Random(1)
        self.built: list[int] = []
        self.seq_lens: set[int] = set()
        self.passes = 0

    def build(self, spec: Spec, seq_len: int) -> Pass:
        self.built.append(spec.model.ffn_width)
        self.seq_lens.add(seq_len)

        def run() -> float:
            self.passes += 1
            drift = 1 + self.passes / 200
            return self._seconds(spec) * drift * self._random.gauss(1, self._noise)

        return run


def solve(clock: Clock, variant: Spec, **match) -> Matched:
    config = MatchConfig.model_validate({"quantity": "wall_clock", "tolerance": 0.02} | match)
    return Measurements(build=clock.build).match("v", variant, spec(), config)


# ---------------------------------------------------------------- solving


def test_rounds_in_turns_cancel_a_machine_that_slows_down():
    clock = Clock(lambda s: float(s.model.ffn_width), noise=0)
    ours, theirs = clock.build(spec(ffn_width=150), 32), clock.build(spec(ffn_width=100), 32)
    ratios = compare(ours, theirs, rounds=21)
    assert ratios.median == pytest.approx(1.5, rel=0.01)  # each pass is 0.5 % slower than the last
    assert ratios.low < 1.5 < ratios.high


def test_the_size_with_equal_time_is_found_with_few_measurements():
    clock = Clock(by_ffn_width)
    found = solve(clock, spec(type="rgqa", top_k=1))
    assert abs(found.value - 240) <= 16  # one multiple: 4 % of the value, 6 % of the time
    assert abs(found.residual) <= 0.02
    assert len(clock.built) <= 8


def test_the_longer_measurement_of_the_chosen_size_is_recorded():
    found = solve(Clock(by_ffn_width), spec(type="rgqa", top_k=1))
    assert found.spread is not None
    assert found.spread.rounds == CHECK_ROUNDS
    assert found.spread.low < found.residual < found.spread.high
    assert found.cost / found.target == pytest.approx(1 + found.residual, abs=0.02)


def test_a_size_far_from_the_initial_one_is_found():
    clock = Clock(lambda s: 0.01 if s.attention.type == "gqa" else 0.00001 * s.model.ffn_width)
    found = solve(clock, spec(type="rgqa", top_k=1, ffn_width=16))
    assert abs(found.value - 1000) <= 16


def test_only_legal_sizes_are_built():
    """The time matches at 3 KV heads, but with 12 heads on 2 ranks only 2, 4, 6 and 12 are legal."""
    clock = Clock(lambda s: 0.03 if s.model.ffn_width == 160 else 0.01 * s.attention.model_dump()["kv_heads"])
    variant = spec(heads=12, kv_heads=6, ffn_width=128)
    free = {"free": "attention.kv_heads", "multiple": 1, "tensor_parallel": 2}
    found = solve(clock, variant, **free, tolerance=0.4)
    assert found.value in (2, 4)
    with pytest.raises(SpecError, match=r"the nearest legal multiple of 1 is [24] \(3 is not legal: attention.w_q"):
        solve(clock, variant, **free)


def test_passes_have_the_requested_sequence_length():
    clock = Clock(by_ffn_width)
    solve(clock, spec(type="rgqa", top_k=1), seq_len=48)
    assert clock.seq_lens == {48}


def test_a_time_that_does_not_depend_on_the_dimension_is_refused():
    with pytest.raises(SpecError, match="the measured time does not depend on it beyond the noise"):
        solve(Clock(lambda s: 0.05), spec(type="rgqa", top_k=1))


def test_sizes_much_larger_than_the_baseline_are_not_built():
    clock = Clock(lambda s: 1.0 if s.attention.type == "gqa" else 0.01 + 1e-6 * s.model.ffn_width)
    with pytest.raises(SpecError, match=r"even its largest legal value \d+ is too little .*times the baseline's"):
        solve(clock, spec(type="rgqa", top_k=1))
    assert max(clock.built) < 8 * 300  # 160, and some more for the baseline's attention and head


def test_a_variant_that_is_too_slow_at_its_smallest_is_refused_with_quartiles():
    clock = Clock(lambda s: 0.01 if s.attention.type == "gqa" else 0.1 + 0.001 * s.model.ffn_width)
    with pytest.raises(SpecError) as error:
        solve(clock, spec(type="rgqa", top_k=1))
    text = str(error.value)
    assert "even its smallest legal value 16 is too much" in text
    assert "ms per pass, the baseline takes" in text and f"over {CHECK_ROUNDS} rounds" in text


@pytest.mark.parametrize(("low", "high", "uncertain"), [(-0.009, 0.01, False), (-0.03, 0.0, True), (0.0, 0.011, True)])
def test_a_spread_beyond_the_tolerance_is_noted(low, high, uncertain):
    matched = Matched(
        free="f", value=1, cost=1.0, target=1.0, residual=0.0, spread=Spread(low=low, high=high, rounds=21)
    )
    note = spread_note(matched, MatchConfig(quantity="wall_clock", tolerance=0.01))
    assert (note is not None) == uncertain
    if note:
        assert f"{low:+.2%} to {high:+.2%} over 21 rounds" in note and "tolerance of 1.00%" in note


# ---------------------------------------------------------------- in a study

BASE = """
model: {width: 64, layers: 2, ffn_width: 160}
attention: {type: gqa, heads: 8, kv_heads: 2, head_dim: 8}
data:
  seq_len: 32
  source: {type: synthetic, task: copy, vocab_size: 64}
optimizer: {lr: 3.0e-3}
train: {tokens: 2560, global_batch: 8, micro_batch: 8, validation_tokens: 256}
launch: {threads: 1}
"""

STUDY = """
study: timed
base: base.yaml
match: {quantity: wall_clock, multiple: 4, tolerance: 5%}
seeds: [1, 2]
variants:
  gqa:
  routed: {attention.type: rgqa, attention.top_k: 1}
"""


@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
    """A study file in the working folder. No cell is trained, because the study stops before the first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "timed.yaml").write_text(STUDY)
    monkeypatch.setattr(study_module, "train_cells", lambda *_, **__: PREEMPTED)
    monkeypatch.setattr(study_module, "_report", lambda out: out / "report.html")
    return tmp_path / "timed.yaml"


def play(monkeypatch, clock: Clock) -> Clock:
    monkeypatch.setattr(match_measured, "decoder_pass", clock.build)
    return clock


def planned() -> list[int]:
    record = json.loads(Path("studies/timed/study.json").read_text())
    return [cell["spec"]["model"]["ffn_width"] for cell in record["cells"]]


def test_a_continued_study_measures_nothing_again_and_keeps_its_sizes(study, monkeypatch):
    first = play(monkeypatch, Clock(by_ffn_width))
    run_study(study)
    sizes = planned()
    assert first.built and abs(sizes[1] - 240) <= 20
    second = play(monkeypatch, Clock(lambda s: 2 * by_ffn_width(s), noise=0.05))
    run_study(study)
    assert second.built == []
    assert planned() == sizes


def test_only_a_new_variant_is_measured(study, monkeypatch):
    play(monkeypatch, Clock(by_ffn_width))
    run_study(study)
    sizes = planned()
    study.write_text(STUDY + "  other: {attention.type: rgqa, attention.top_k: 2}\n")
    clock = play(monkeypatch, Clock(by_ffn_width))
    run_study(study)
    assert clock.built
    assert planned()[:2] == sizes[:2]
    assert len(json.loads(Path("studies/timed", FILE).read_text())) == 2


def test_fresh_repeats_all_measurements(study, monkeypatch):
    play(monkeypatch, Clock(by_ffn_width))
    run_study(study)
    clock = play(monkeypatch, Clock(lambda s: by_ffn_width(s) + (0.02 if s.attention.type == "gqa" else 0)))
    run_study(study, fresh=True)
    assert clock.built and planned()[1] > 260
    (kept,) = json.loads(Path("studies/timed", FILE).read_text()).values()
    assert kept["matched"]["value"] == planned()[1]


def test_another_machine_or_version_is_measured_again(study, monkeypatch):
    play(monkeypatch, Clock(by_ffn_width))
    run_study(study)
    clock = play(monkeypatch, Clock(by_ffn_width))
    monkeypatch.setattr(match_measured, "machine", lambda: {"cpu": "another"})
    plan_study(load_study(study))
    assert clock.built


def test_status_report_and_a_dry_run_of_a_measured_study_measure_nothing(study, monkeypatch):
    play(monkeypatch, Clock(by_ffn_width))
    run_study(study)
    clock = play(monkeypatch, Clock(by_ffn_width))
    status_study(study)
    report_study(study)
    run_study(study, dry_run=True)
    assert clock.built == []


def test_a_dry_run_stores_no_measurement(study, monkeypatch):
    play(monkeypatch, Clock(by_ffn_width))
    run_study(study, dry_run=True)
    assert not Path("studies").exists()


def test_the_table_names_the_quantity_and_shows_quartiles(study, monkeypatch):
    play(monkeypatch, Clock(by_ffn_width))
    plan = plan_study(load_study(study))
    heading, baseline, routed = matching_rows(study_record(plan))
    assert heading[3] == "residual [quartiles] in seconds per forward and backward pass"
    assert baseline[3] == "baseline"
    low, high = routed[3].partition("[")[2].strip("]").split(", ")
    assert float(low.strip("%")) < float(routed[3].split("%")[0]) < float(high.strip("%"))


def test_a_noisy_measurement_is_noted_at_the_variant(study, monkeypatch):
    study.write_text(STUDY.replace("tolerance: 5%", "tolerance: 8%"))
    play(monkeypatch, Clock(by_ffn_width, noise=0.15))
    plan = plan_study(load_study(study))
    assert any("less certain than the tolerance" in note for note in plan.variants[1].notes)


# ---------------------------------------------------------------- counted quantities in a study


@pytest.mark.parametrize(
    ("match", "heading"),
    [
        ("{multiple: 4, tolerance: 2%}", "residual in parameters"),
        ("{quantity: flops, multiple: 4, seq_len: 4096}", "residual in useful FLOPs per token at 4,096 tokens"),
        ("{quantity: kv_bytes, free: attention.kv_heads, multiple: 1}", "residual in KV bytes per token"),
    ],
)
def test_the_table_of_a_counted_match_names_the_quantity(study, match, heading):
    study.write_text(STUDY.replace("{quantity: wall_clock, multiple: 4, tolerance: 5%}", match))
    rows = list(matching_rows(study_record(plan_study(load_study(study)))))
    assert rows[0][3] == heading
    assert rows[2][3].endswith("%")


def test_a_baseline_that_does_not_divide_by_the_tensor_parallel_size_is_refused(study):
    study.write_text(STUDY.replace("quantity: wall_clock", "tensor_parallel: 4"))
    with pytest.raises(SpecError) as error:
        plan_study(load_study(study))
    assert str(error.value).startswith(f"{study}:4:")
    assert "match.tensor_parallel: the baseline itself: attention.w_q has 2 whole pieces" in str(error.value)


def test_a_sequence_length_for_parameters_is_refused_with_its_line(study):
    study.write_text(STUDY.replace("quantity: wall_clock", "seq_len: 64"))
    with pytest.raises(SpecError, match=r"timed.yaml:4:\d+: match.seq_len: the number of parameters does not depend"):
        load_study(study)


# ---------------------------------------------------------------- with the real model


def test_the_real_model_is_timed_and_a_longer_mlp_takes_longer():
    """The sizes differ by a factor of four, so that a busy machine cannot reverse the order."""
    large, small = (decoder_pass(spec(ffn_width=n), 32) for n in (4096, 64))
    ratios = compare(large, small, rounds=5)
    assert ratios.baseline_s > 0
    assert ratios.median > 1.5


def test_a_real_variant_is_matched_by_its_time():
    """The variant equals the baseline except for its initial FFN width. The tolerance allows for a busy machine."""
    variant, baseline = spec(ffn_width=512), spec(ffn_width=1024)
    match = MatchConfig(quantity="wall_clock", multiple=128, tolerance=0.5, seq_len=128)
    found = Measurements().match("v", variant, baseline, match)
    assert found.value % 128 == 0 and 512 < found.value <= 2048
    assert found.spread is not None and found.spread.rounds == CHECK_ROUNDS
