"""What tests read in the folder of a run, also while it trains."""

from pathlib import Path
from typing import Any

from headway.launcher.run.lines import decode


def records(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Those of a kind in metrics.jsonl; a line that is being written is left out."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except OSError:
        return []
    return [r for line in lines if line.endswith("\n") and (r := decode(line)) is not None and r["kind"] == kind]


def steps_done(run: Path) -> int:
    """Optimizer steps in metrics.jsonl."""
    return len(records(run))


def trajectory(run: Path) -> list[tuple[Any, ...]]:
    """Records that must be equal bit for bit in two runs of one spec."""
    train = [(r["step"], r["loss"], r["grad_norm"], r["aux_loss"], r["lr"], r["batch_hash"]) for r in records(run)]
    return train + [(r["step"], r["loss"], r["targets"]) for r in records(run, "validation")]


def pids(run: Path, ranks: int = 2) -> list[int]:
    """Process ids that the ranks of the newest start have written."""
    return [int((run / "logs" / f"rank-{rank}.pid").read_text()) for rank in range(ranks)]


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
