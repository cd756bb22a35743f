"""Sums of a step reach every layer as those of all ranks, and a layer without any is told so."""

import torch

from headway.launcher.train.router import RouterMonitor
from headway.model.base import Attention
from headway.parallel.layout import Layout


class Counting(Attention):
    """Reports what it is given, and keeps what it is told."""

    def __init__(self, sums):
        super().__init__()
        self.sums, self.told, self.resets = sums, [], 0

    def step_sums(self):
        return self.sums

    def reset_router_stats(self):
        self.resets += 1

    def after_step(self, global_load):
        self.told.append(global_load)


class TwoEqualRanks(Layout):
    """Both ranks have the same sums."""

    calls = 0

    def sum_data(self, tensor):
        TwoEqualRanks.calls += 1
        return tensor.mul_(2)


def test_step_sums_are_added_over_ranks_with_one_call_for_all_layers():
    sums = {"power": torch.tensor([1.0, 2.0, 3.0]), "tokens": torch.tensor([5.0])}
    layers = [Counting(sums), Counting({}), Counting({"power": torch.tensor([[4.0], [6.0]])})]
    layout = TwoEqualRanks(rank=0, local_rank=0, device=torch.device("cpu"), dp_rank=0, dp_size=2)
    monitor = RouterMonitor(dict(enumerate(layers)), layout, every_steps=10, total_steps=10, tokens_per_step=1)
    before = TwoEqualRanks.calls
    assert monitor.after_step(1) == {}
    assert TwoEqualRanks.calls - before == 1
    (first,), (second,), (third,) = (layer.told for layer in layers)
    assert first["power"].tolist() == [2.0, 4.0, 6.0] and first["tokens"].tolist() == [10.0]
    assert second == {} and third["power"].tolist() == [[8.0], [12.0]]
    assert sums["power"].tolist() == [1.0, 2.0, 3.0]
    assert [layer.resets for layer in layers] == [1, 1, 1]


def test_layers_without_sums_cost_no_communication():
    layout = TwoEqualRanks(rank=0, local_rank=0, device=torch.device("cpu"), dp_rank=0, dp_size=2)
    before = TwoEqualRanks.calls
    RouterMonitor({0: Counting({})}, layout, every_steps=10, total_steps=10, tokens_per_step=1).after_step(1)
    assert TwoEqualRanks.calls == before
