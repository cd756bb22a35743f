"""Run by test_plan_measured.py in 2 processes: measures memory of real engines, peak and traffic of a step.

Prints one JSON object per case on rank 0. Not a test module itself.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from headway.launcher.spec.layouts import accumulation
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec
from headway.parallel.build import make_engine
from headway.parallel.layout import Layout, arrange, init_layout

PEAKS = 3
"""Number of measured steps, of which the smallest peak counts, because gloo's threads free their buffers late."""


class Micro(NamedTuple):
    tokens: torch.Tensor
    labels: torch.Tensor
    segments: torch.Tensor | None
    source: torch.Tensor | None = None
    source_segments: torch.Tensor | None = None


def storages(keep: list[torch.Tensor] | None = None) -> dict[int, int]:
    """Address -> bytes of the storage of every tensor in this process. The tensors are added to `keep`."""
    found = {}
    for candidate in gc.get_objects():
        if type(candidate) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (candidate, candidate.grad if candidate.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
                    if keep is not None:
                        keep.append(tensor)
    return found


def peak_bytes(profiler: torch.profiler.profile) -> int:
    """Peak of the allocated memory during the profile, in addition to that before it."""
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events: list[Any] = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


SHARES: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all_gather_into_tensor": lambda ranks: ranks - 1,  # the input is one rank's part
    "reduce_scatter_tensor": lambda ranks: (ranks - 1) / ranks,
    "all_to_all_single": lambda ranks: (ranks - 1) / ranks,
    "send": lambda ranks: 1.0,
}
"""Operation -> bytes that one rank sends, divided by bytes of its input."""


class Traffic:
    """Counts the bytes that this rank sends through torch.distributed, for ring algorithms.

    Collectives work on copies that are made once and kept. Otherwise gloo's thread could free a tensor last, and the
    profile of this thread would miss that.
    """

    def __init__(self) -> None:
        self.sent = 0.0
        self.copies: dict[Any, torch.Tensor] = {}
        for name, share in SHARES.items():
            setattr(dist, name, self._counting(getattr(dist, name), name, share))

    def _counting(self, operation: Callable[..., Any], name: str, share: Callable[[int], float]) -> Callable[..., Any]:
        @torch.no_grad()
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            sent = tensors[-1]  # the input is the argument after the output
            if sent.is_floating_point() and sent.dtype != torch.float64:  # float64: sums of losses for records
                ranks = dist.get_world_size(kwargs.get("group"))
                self.sent += share(ranks) * sent.numel() * sent.element_size()
            if name == "send":
                return operation(*args, **kwargs)
            staged = {id(t): self._copy((name, i), t) for i, t in enumerate(tensors)}
            work = operation(
                *(staged.get(id(a), a) for a in args), **{k: staged.get(id(a), a) for k, a in kwargs.items()}
            )
            if work is not None:
                work.wait()
            for tensor in tensors:
                tensor.copy_(staged[id(tensor)])
            return work

        return counted

    def _copy(self, place: Any, tensor: torch.Tensor) -> torch.Tensor:
        key = (place, tensor.shape, tensor.dtype)
        if key not in self.copies:
            self.copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return self.copies[key].copy_(tensor)

    @property
    def copied_bytes(self) -> int:
        return sum(copy.numel() * copy.element_size() for copy in self.copies.values())


def case(spec: Spec, layout: Layout, traffic: Traffic) -> dict[str, float]:
    traffic.copies.clear()
    gc.collect()
    others: list[torch.Tensor] = []  # kept, so that their addresses are not reused
    before = storages(others)
    size = spec.model.vocab_size
    assert size is not None
    engine = make_engine(
        spec.model,
        spec.attention,
        vocab_size=size,
        seed=1,
        seq_len=spec.data.seq_len,
        parallel=spec.parallel,
        optimizer=spec.optimizer,
        layout=layout,
        micro_batch=spec.train.micro_batch,
        accumulation=accumulation(spec),
    )
    gc.collect()
    held = sum(n for address, n in storages().items() if address not in before) - traffic.copied_bytes
    tokens = torch.randint(0, size, (spec.train.micro_batch, spec.data.seq_len))
    segments = torch.zeros_like(tokens, dtype=torch.int32) if spec.data.document_mask else None
    micro = [Micro(tokens, tokens, segments)] * accumulation(spec)
    targets = len(micro) * tokens.numel() * layout.dp_size
    engine.train_step(micro, targets=targets, lr=1e-3)  # allocate everything that is created in the first step
    gc.collect()
    after = sum(n for address, n in storages().items() if address not in before) - traffic.copied_bytes
    peaks = []
    for _ in range(PEAKS):
        traffic.sent = 0.0
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            engine.train_step(micro, targets=targets, lr=1e-3)
        peaks.append(peak_bytes(profiler))
    return {"held": held, "after": after, "peak": min(peaks), "sent": traffic.sent}


def main() -> None:
    spec_file, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    traffic = Traffic()
    first = init_layout(device="cpu", timeout_s=60)
    layouts: dict[tuple[int, int, int], Layout] = {(1, 1, 1): first}
    for words in cases:
        spec = load_spec(Path(spec_file), words.split()).spec
        key = (spec.parallel.tensor, spec.parallel.pipeline, spec.parallel.context)
        if key not in layouts:
            layouts[key] = arrange(spec.parallel, local_rank=first.local_rank, device=first.device)
        result = case(spec, layouts[key], traffic)
        if layouts[key].is_main:
            print("CASE", json.dumps({"words": words, **result}), flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Skip the interpreter's teardown: on a loaded machine a thread of gloo has aborted a rank there, after all results.
    sys.stdout.flush()
    os._exit(0)
