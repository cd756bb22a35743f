"""Headway's AdamW is PyTorch's, bit for bit, but for the import of the compiler."""

import torch

from headway.parallel.adamw import AdamW


def trained(kind: type[torch.optim.AdamW]) -> tuple[list[torch.Tensor], dict]:
    """Parameters after three steps, with a group added late and the state saved and loaded in between."""
    made = torch.Generator().manual_seed(1)
    first, second = (torch.nn.Parameter(torch.randn(7, 5, generator=made)) for _ in range(2))
    optimizer = kind([first], lr=1e-2, weight_decay=0.1, fused=True)
    optimizer.add_param_group({"params": [second], "weight_decay": 0.0, "lr": 1e-3})
    for step in range(3):
        (first * second).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            optimizer.load_state_dict(optimizer.state_dict())
    return [first.detach(), second.detach()], optimizer.state_dict()


def test_steps_and_state_equal_those_of_torch_bit_for_bit() -> None:
    (ours, state), (theirs, other) = trained(AdamW), trained(torch.optim.AdamW)
    assert all(map(torch.equal, ours, theirs))
    assert state["param_groups"] == other["param_groups"]
    for index, values in other["state"].items():
        assert all(torch.equal(state["state"][index][key], value) for key, value in values.items())


def test_a_step_turns_gradients_off_but_not_for_its_closure() -> None:
    seen = []
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    AdamW([parameter]).step(lambda: seen.append(torch.is_grad_enabled()))
    assert seen == [True]
    assert torch.is_grad_enabled()
