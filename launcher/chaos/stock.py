"""The stock side of the drill: a plain training loop around DeepSpeed's own save_checkpoint and load_checkpoint.

This module is one rank, started by torchrun or the fork server. Its arguments are a folder and a JSON of `Options`.
Data and initial weights depend only on seed and step, so an uninterrupted run and a correctly resumed run have the same
losses bit for bit.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headway.launcher.chaos.options import (
    COMPLETE,
    FFN,
    HEADS,
    LAYERS,
    RECORDS,
    SEQUENCE,
    VOCABULARY,
    WIDTH,
    Options,
    damaged,
)
from headway.parallel.deepspeed_options import quiet_deepspeed

_READER_BYTES = 32 << 30


class Decoder(nn.Module):
    """A decoder of torch's own layers, about as large as the drill's Headway model."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, FFN, dropout=0.0, batch_first=True, norm_first=True)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, S + 1] -> mean loss in nats."""
        x = self.embed(tokens[:, :-1])
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        logits = self.head(self.layers(x, mask=mask, is_causal=True))
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def batch(seed: int, step: int, rank: int) -> Tensor:
    """Tokens [4, S + 1] of a step. The second half of each sequence repeats the first."""
    chance = torch.Generator().manual_seed((seed << 40) + (step << 8) + rank)
    half = torch.randint(VOCABULARY, (4, SEQUENCE // 2 + 1), generator=chance)
    return torch.cat((half, half), dim=1)[:, : SEQUENCE + 1]


def main() -> int:
    """`stock FOLDER OPTIONS` trains one rank; `stock read FILE DAMAGES OUT` runs the reader on damaged files."""
    torch.set_num_threads(1)
    if sys.argv[1] == "read":
        return read(Path(sys.argv[2]), json.loads(sys.argv[3]), Path(sys.argv[4]))
    folder, options = Path(sys.argv[1]), Options(**json.loads(sys.argv[2]))
    rank = int(os.environ["RANK"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank-{rank}.pid").write_text(str(os.getpid()))
    train(folder, options, rank)
    return 0


def train(folder: Path, options: Options, rank: int) -> None:
    """The loop of DeepSpeed's documentation: load the checkpoint that `latest` names, train, save."""
    deepspeed = quiet_deepspeed(cpu=True)
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=options.timeout_s))
    torch.manual_seed(options.seed)
    model = Decoder()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config())
    checkpoints = folder / "checkpoints"
    engine.load_checkpoint(str(checkpoints))
    done = engine.global_steps
    if options.die is not None:
        _dying(engine.checkpoint_engine, rank, options.die)
    with (folder / RECORDS).open("a", encoding="utf-8") as records:
        for step in range(done + 1, options.steps + 1):
            loss = engine(batch(options.seed, step, rank))
            engine.backward(loss)
            engine.step()
            if step == done + 1:
                _record(records, rank, {"from": done})
            _record(records, rank, {"step": step, "loss": loss.item()})
            if step % options.save_every == 0 or step == options.steps:
                engine.save_checkpoint(str(checkpoints))
    if rank == 0:
        (folder / COMPLETE).touch()
    dist.barrier()
    dist.destroy_process_group()


def config() -> dict[str, Any]:
    """ZeRO-1 in bf16; all other settings are DeepSpeed's defaults."""
    return {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
    }


def _record(file: Any, rank: int, value: dict[str, Any]) -> None:
    if rank == 0:
        file.write(json.dumps(value) + "\n")
        file.flush()


def _dying(engine: Any, rank: int, die: str) -> None:
    """Let the rank kill itself when it writes its n-th file of a kind.

    Kinds "model" and "optim": before, inside (half of the file is written) or after it. Kind "latest": before it.
    """
    who, nth, kind, moment = die.split("/")
    if int(who) != rank:
        return
    save: Callable[..., None] = engine.save
    commit: Callable[[Any], bool] = engine.commit
    left = int(nth)

    def saving(*args: Any, **named: Any) -> None:
        nonlocal left
        path = named["path"] if "path" in named else args[1]
        due = kind in Path(path).name
        left -= due
        due = due and left == 0
        if due and moment == "before":
            _kill()
        save(*args, **named)
        if due:
            if moment == "inside":
                os.truncate(path, Path(path).stat().st_size // 2)
            _kill()

    def committing(info: Any) -> bool:
        nonlocal left
        left -= kind == "latest"
        if kind == "latest" and left == 0:
            _kill()
        return commit(info)

    engine.save, engine.commit = saving, committing


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------- DeepSpeed's reader on damaged files


def read(path: Path, damages: list[list[int]], out: Path) -> int:
    """Read the file once per damage [length, bit]: truncated to the length, and with that bit flipped (-1: none).

    Writes one line per damage: refused, changed (a value differs from the original without an error), or equal. If the
    process dies at one damage, the lines of the earlier ones are written.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    resource.setrlimit(resource.RLIMIT_AS, (_READER_BYTES, _READER_BYTES))  # a flipped bit may request a huge size
    engine = TorchCheckpointEngine()
    engine.zipfile_serialization = True
    body = path.read_bytes()
    whole, copy = flat(engine.load(str(path), map_location="cpu")), path.with_name("damaged.pt")
    with out.open("a", encoding="utf-8") as results:
        for length, bit in damages:
            copy.write_bytes(damaged(body, length, bit))
            try:
                same = flat(engine.load(str(copy), map_location="cpu")) == whole
            except Exception:  # any exception means that the damage was detected
                results.write("refused\n")
            else:
                results.write("equal\n" if same else "changed\n")
            results.flush()
    return 0


def flat(value: Any) -> Any:
    """A structure that compares equal if and only if all nested values are equal bit for bit."""
    if isinstance(value, Tensor):
        raw = value.detach().contiguous().cpu()
        return str(raw.dtype), tuple(raw.shape), raw.flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return [(flat(key), flat(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [flat(item) for item in value]
    if hasattr(value, "__dict__"):
        return type(value).__name__, flat(vars(value))
    return repr(value)


if __name__ == "__main__":
    sys.exit(main())
