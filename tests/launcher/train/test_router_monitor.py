"""Router records: figures of a window of steps, biases of each step, and few collectives."""

import json
from typing import Any, ClassVar

import pytest
import torch

from headway.launcher.train import router as monitor_module
from headway.launcher.train.router import RouterMonitor
from headway.model.base import Attention
from headway.model.measure.router_meter import RouterMeter
from headway.model.router_stats import RouterStats
from headway.parallel.layout import Layout


class Layer(Attention):
    """One group of four experts; `see` counts a choice of expert `e` for each of 40 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.meter, self.told, self.cut = RouterMeter(), [], False

    def see(self, expert: int) -> None:
        logits = torch.nn.functional.one_hot(torch.full((2, 20, 1), expert), 4).float()
        self.meter.update(logits, logits, torch.ones(2, 20, 1, 1), torch.full((2, 20), expert))

    def router_stats(self) -> dict[str, RouterStats]:
        stats = self.meter.stats()
        return {} if stats is None else {"router": stats._replace(cut=self.cut)}

    def watch_routers(self, *, closely: bool) -> None:
        self.meter.closely = closely

    def reset_router_stats(self) -> None:
        self.meter.reset()

    def after_step(self, global_load: dict[str, torch.Tensor]) -> None:
        self.told.append(global_load["router"].tolist())


class Ranks(Layout):
    """As many equal ranks as `dp_size` says; counts the collectives."""

    calls = 0

    def sum_data(self, tensor: torch.Tensor) -> torch.Tensor:
        Ranks.calls += 1
        return tensor.mul_(self.dp_size)

    def gather_json(self, value: Any) -> list[Any]:
        return [value]


def monitor(layer: Layer, *, dp_size: int = 1, every: int = 4, total: int = 10, per_step: int = 40) -> RouterMonitor:
    Ranks.calls = 0
    layout = Ranks(rank=0, local_rank=0, device=torch.device("cpu"), dp_rank=0, dp_size=dp_size)
    return RouterMonitor({0: layer}, layout, every_steps=every, total_steps=total, tokens_per_step=per_step)


def run(monitor: RouterMonitor, layer: Layer, choices: list[int]) -> dict[int, dict]:
    records = {}
    for step, expert in enumerate(choices, 1):
        monitor.before_step(step)
        layer.see(expert)
        record = monitor.after_step(step)
        if record:
            records[step] = record["layer_00"]["router"]
    return records


def test_records_are_of_the_first_step_the_last_and_every_few():
    layer = Layer()
    assert list(run(monitor(layer), layer, [0] * 10)) == [1, 4, 8, 10]
    assert list(run(monitor(layer, every=5), layer, [0] * 10)) == [1, 5, 10]
    assert list(run(monitor(layer, total=5), layer, [0] * 10)) == [1, 4, 5, 8]  # a benchmark goes on beyond the last


def test_an_expert_is_dead_only_if_no_step_since_the_last_record_chose_it():
    layer = Layer()
    records = run(monitor(layer), layer, [3, 0, 1, 2, 0, 0, 0, 0])
    assert records[1]["dead"] == [3] and records[1]["load"] == [[0, 0, 0, 1]]
    assert records[4]["dead"] == [1] and records[4]["load"][0] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=1e-5)
    assert records[4]["effective"] == pytest.approx([3], abs=1e-4)
    assert records[8]["dead"] == [3]


def test_biases_learn_from_each_step_and_from_all_ranks():
    layer = Layer()
    run(monitor(layer, dp_size=2), layer, [3, 0, 1])
    assert layer.told == [[[0, 0, 0, 80]], [[80, 0, 0, 0]], [[0, 80, 0, 0]]]


def test_details_are_of_the_last_tokens_before_a_record_and_loads_of_all(monkeypatch):
    monkeypatch.setattr(monitor_module, "MEASURED_TOKENS", 80)
    layer = Layer()
    records = run(monitor(layer), layer, [0] * 8)
    assert [records[step]["tokens"] for step in (1, 4, 8)] == [40, 80, 80]
    records = run(monitor(layer), layer, [0, 0, 0, 1, 1, 2, 2, 3])
    # the last two steps chose expert 2, then 3; the id tells which
    assert records[8]["load"] == [[0, 0.25, 0.5, 0.25]]
    assert records[8]["mutual_information"] == pytest.approx([0.6931], abs=0.02)


def test_ranks_are_summed_with_one_call_a_step_and_one_a_record():
    layer = Layer()
    one = run(monitor(layer), layer, [0, 1, 2, 3, 0, 1, 1, 1])
    two = run(monitor(layer, dp_size=2), layer, [0, 1, 2, 3, 0, 1, 1, 1])
    assert Ranks.calls == 8 + 3
    assert two[8]["tokens"] == 2 * one[8]["tokens"]
    for key in ("load", "dead", "entropy", "top1_margin", "switch_rate", "gate", "close"):
        assert two[8][key] == one[8][key], key


def test_what_is_counted_between_steps_does_not_count():
    layer = Layer()
    m = monitor(layer)
    layer.see(2)
    assert run(m, layer, [0])[1]["load"] == [[1, 0, 0, 0]]


def test_a_figure_without_a_value_is_null_in_json():
    layer = Layer()
    assert run(monitor(layer), layer, [1])[1]["information_share"] == [None]


class Together(Layout):
    """The last of several ranks: the others have given their answers before."""

    answers: ClassVar[list[Any]] = []

    def gather_json(self, value: Any) -> list[Any]:
        self.answers.append(json.loads(json.dumps(value)))
        return list(self.answers)


def records_of_ranks(ranks: list[tuple[int, int, bool]]) -> dict[str, Any]:
    """Of (layer, chosen expert, whether its groups are the rank's alone) for each rank, what the last one records."""
    Together.answers.clear()
    record: dict[str, Any] = {}
    for number, (index, expert, cut) in enumerate(ranks):
        layer = Layer()
        layout = Together(rank=number, local_rank=number, device=torch.device("cpu"), tp_size=len(ranks))
        layer.cut = cut
        monitor = RouterMonitor({index: layer}, layout, every_steps=1, total_steps=1, tokens_per_step=40)
        monitor.before_step(1)
        layer.see(expert)
        record = monitor.after_step(1)
    return record


def test_groups_of_tensor_parallel_ranks_stand_one_after_the_other():
    figures = records_of_ranks([(0, 3, True), (0, 1, True)])["layer_00"]["router"]
    assert figures["load"] == [[0, 0, 0, 1], [0, 1, 0, 0]]
    assert figures["dead"] == [3, 3] and len(figures["entropy"]) == 2
    assert figures["tokens"] == 40  # both saw the same


def test_a_router_that_every_tensor_parallel_rank_holds_whole_is_recorded_once():
    assert records_of_ranks([(0, 3, False), (0, 3, False)])["layer_00"]["router"]["load"] == [[0, 0, 0, 1]]


def test_layers_of_all_stages_are_recorded_in_their_order():
    record = records_of_ranks([(2, 0, False), (0, 1, False)])
    assert list(record) == ["layer_00", "layer_02"]
    assert record["layer_02"]["router"]["load"] == [[1, 0, 0, 0]]
