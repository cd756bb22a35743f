"""A small model, and its checkpoints."""

from pathlib import Path

import torch

from headway.parallel import checkpoint
from headway.parallel.layout import Layout
from headway.parallel.logical import LogicalBuffer
from headway.parallel.tensors.spans import whole

ALONE = Layout(rank=0, local_rank=0, dp_rank=0, dp_size=1, device=torch.device("cpu"))


class Model:
    """What `save` and `load` need of an engine, with two tensors."""

    def __init__(self, value: float = 0.0) -> None:
        self.module = torch.nn.Linear(3, 2)
        self.module.register_buffer("bias_of_router", torch.full((2,), value))
        self.values = {n: torch.full_like(p, value).detach() for n, p in self.module.named_parameters()}
        self.applied_steps = 0

    def logical_shapes(self):
        return {name: tuple(p.shape) for name, p in self.module.named_parameters()}

    def buffers(self):
        return {name: LogicalBuffer(buffer, None) for name, buffer in checkpoint.persistent_buffers(self.module)}

    def read_spans(self):
        for name, value in self.values.items():
            for part in ("param", "exp_avg", "exp_avg_sq"):
                yield f"{part}/{name}", whole(tuple(value.shape)), value

    def write_logical(self, tensors, *, applied_steps):
        self.values = {n: tensors[f"param/{n}"] for n in self.values}
        self.applied_steps = applied_steps

    def adam_steps(self):
        return {self.applied_steps}


def write(root: Path, step: int, keep: int = 2, value: float | None = None) -> str | None:
    model = Model(float(step) if value is None else value)
    return checkpoint.save(root, model, ALONE, step=step, state={"applied_steps": step}, keep=keep)


def newest(root: Path, said: list[str] | None = None) -> checkpoint.Checkpoint:
    found = checkpoint.newest_valid(root, ALONE, warn=(said if said is not None else []).append)
    assert found is not None
    return found
