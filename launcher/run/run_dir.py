"""The run folder: resolved spec, metrics, checkpoints, logs, and the lock that prevents a second run."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.launcher.base.errors import SpecError
from headway.launcher.run.chain import Chain, tag_of
from headway.launcher.run.cut import Cut, cut_tail, rewrite
from headway.launcher.run.lines import Damage, Lost, read_lines

if TYPE_CHECKING:
    from pydantic import BaseModel

    from headway.launcher.spec.spec import Spec

# Keys that may differ between the spec of a run folder and the spec that continues the run: paths, records and the
# distribution of the work. All other keys change the result, so that a different value is another run.
FREE_KEYS = (
    "name",
    "run_dir",
    "tracking",
    "checkpoint",
    "guard.replicas_every_steps",
    "launch",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.context",
    "parallel.sequence_parallel",
    "parallel.recompute",
    "parallel.zero",
    "parallel.engine",
    "parallel.overlap",
    "speed",
    "data.workers",
    "data.prefetch",
    "data.retry_s",
    "data.timeout_s",
    "data.source.path",
    "data.source.remote",
    "data.source.cache_bytes",
    "data.validation",
    "init.weights",
    "init.run",
)
_BELOW_FREE_KEYS = tuple(f"{key}." for key in FREE_KEYS)

SHA256 = "init.sha256"
"""The key that identifies the initial weights, or the checkpoint that a branch starts from."""

SEEDS = ("seed", "data.seed")

ADDED_KEYS = {
    "attention.head_dim": None,
    "attention.heads": None,
    "attention.k_schedule": [],
    "attention.kv_heads": None,
    "attention.share_kv": 1,
    "attention.value_residual": "none",
    "data.encoder_tokens": None,
    "init.convert": None,
    "init.convert.by": "activations",
    "init.optimizer": "continue",
    "model.branch_start": "as_drawn",
    "model.encoder_layers": None,
    "model.relative_buckets": 32,
    "model.relative_max_distance": 128,
    "model.scaled_head": False,
    "model.type": "decoder",
    "parallel.gradient_reduction": "fp32",
    "train.validate_first": False,
}
"""Keys that run folders of earlier versions lack -> the value that corresponds to those versions."""

_OF_KIND = re.compile(r"^attention\.kinds\.[^.]+\.")
_NONE = object()  # no value of a key


class RunDir:
    """Paths of one run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec = path / "spec.json"
        self.id = path / "run_id.json"
        self.card = path / "run.json"
        self.micro_batch = path / "micro_batch.json"
        self.branch_start = path / "branch_start.json"
        self.converted = path / "converted"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.traces = path / "traces"
        self.logs = path / "logs"

    @classmethod
    def of(cls, spec: Spec) -> RunDir:
        return cls(Path(spec.run_dir or f"runs/{spec.name}"))

    def refuse_foreign(self) -> None:
        """Raise SpecError unless the folder is absent, empty or a run. Other folders must not be written to."""
        ours = {"run.lock", "worker.lock", "logs", "slurm", self.id.name, _temporary(self.id).name}
        # Files that an interrupted start leaves before the spec is written.
        ours |= {_temporary(self.spec).name, self.micro_batch.name, _temporary(self.micro_batch).name}
        if self.path.is_dir() and not self.spec.exists() and not self.checkpoints.exists():
            foreign = sorted({p.name for p in self.path.iterdir()} - ours)
            if foreign:
                raise SpecError(
                    f"run_dir: {self.path} is no run folder and not empty (it has {foreign[0]}); "
                    f"give another run_dir=..."
                )

    def is_complete(self) -> bool:
        """Whether the run has trained all its tokens."""
        return read_mapping(self.summary).get("complete") is True

    @contextlib.contextmanager
    def locked(self, name: str = "run.lock", *, wait_s: float = 0.0) -> Iterator[None]:
        """Hold the lock of the folder. Raises SpecError if a live process still holds it after `wait_s` seconds.

        The kernel releases the lock when its holder ends.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                _flock(fd, wait_s)
            except OSError as e:
                if not isinstance(e, BlockingIOError):
                    raise SpecError(
                        f"run_dir: {self.path} is on a file system without locks ({e.strerror}), so nothing keeps two "
                        "runs from writing into it; mount it with flock, or use another run_dir=..."
                    ) from e
                holder = os.pread(fd, 128, 0).decode(errors="replace").strip()
                raise SpecError(
                    f"{self.path}: a live run holds this folder (process {holder or 'unknown'}); wait for it, stop it, "
                    f"or give another run_dir=..."
                ) from e
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()} on {socket.gethostname()[:64]}".encode(), 0)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, 0)  # a lock that is not held contains no name
        finally:
            os.close(fd)

    def adopt(self, spec: Spec) -> None:
        """Write `spec` into the folder, or check that the folder belongs to the same run.

        Raises SpecError with the keys that differ.
        """
        new = spec.model_dump(mode="json")
        there = read_json(self.spec, None)
        if not isinstance(there, dict) and self.checkpoints.is_dir() and any(self.checkpoints.glob("step-*")):
            raise SpecError(
                f"{self.spec}: missing or unreadable, so nothing says which spec the checkpoints beside it belong to; "
                f"restore it, or delete the folder to train anew"
            )
        if isinstance(there, dict):
            differing = difference(identity(there), identity(new))
            if differing:
                shown = "\n".join(f"  {key}: {a!r} in the folder, {b!r} now" for key, a, b in differing[:10])
                raise SpecError(
                    f"{self.path}: this folder is a run of another spec:\n{shown}\n"
                    f"give another run_dir=..., or delete the folder to train anew"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        if self.run_id() is None:
            write_json(self.id, secrets.token_hex(8))
        write_json(self.spec, new)

    def run_id(self) -> str | None:
        """Unique id of the run. Checkpoints contain it, so that checkpoints of another run are not used by mistake."""
        found = read_json(self.id, None)
        return found if isinstance(found, str) else None

    def read_metrics(self, damage: Damage | None = None) -> Iterator[dict[str, Any]]:
        """Yield all complete records of this run. Lines that a crash truncated or damaged are skipped."""
        yield from read_lines(self.metrics, damage, tag=self.tag)

    @property
    def tag(self) -> str:
        """Identifies the run in its records."""
        return tag_of(self.run_id())

    def cut_metrics(self, *, last_step: int, source: RunDir | None = None, anchor: Chain | None = None) -> Cut:
        """Drop records after `last_step`, since these steps are trained again. Returns the earlier lost records.

        `anchor`: the end of the records when the checkpoint of `last_step` was begun. If the file still begins so, it
        is cut there, without reading the records before it. Otherwise it is written anew: after a power failure either
        the old file or the new one exists, and records appended to the new file are kept. `source`: take the records up
        to `last_step` from this run, and drop all of this one's.
        """
        if source is None and anchor is not None and anchor.run == self.tag:
            cut = cut_tail(self.metrics, anchor, last_step=last_step)
            if cut is not None:
                return Cut(lost=Lost(lines=0, gaps=()), chain=cut)
        tmp, chain, origin = self.metrics.with_suffix(".tmp"), Chain.start(self.tag), source or self
        partly = source is not None
        lost = rewrite(origin.metrics, tmp, chain, tag=origin.tag, last_step=last_step, partly=partly)
        tmp.replace(self.metrics)
        sync(self.path)
        return Cut(lost=lost, chain=chain)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk, so that they survive a power failure. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _flock(fd: int, wait_s: float) -> None:
    end = time.monotonic() + wait_s
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.05)


def identity(spec: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys and values of a resolved spec that affect its result; `ADDED_KEYS` only if they change it.

    Keys of the kinds of `attention.type: mixed` count as those of `attention`.
    """
    flat = {k: v for k, v in flatten(spec).items() if v != ADDED_KEYS.get(_OF_KIND.sub("attention.", k), _NONE)}
    if isinstance(sources := flat.get("data.source.sources"), list):
        flat["data.source.sources"] = [{"weight": part.get("weight")} for part in sources if isinstance(part, dict)]
    return {k: v for k, v in flat.items() if not is_free(k)}


def is_free(key: str) -> bool:
    """Whether a dotted key is one of `FREE_KEYS` or below one."""
    return key.startswith(_BELOW_FREE_KEYS) or key in FREE_KEYS


def spec_hash(spec: dict[str, Any]) -> str:
    """sha256 of `identity`, 16 hex digits."""
    return hashlib.sha256(json.dumps(identity(spec), sort_keys=True).encode()).hexdigest()[:16]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys. Lists remain values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def brief(section: BaseModel) -> dict[str, Any]:
    """The keys of a section that are not at their defaults, nested, as JSON values; they are read as the same section.

    What is nested has its `type` too, and all of its keys if all are defaults of their own: the section may have
    another default there (`attention.balance`), and `flatten` gives nothing for an empty mapping.
    """
    every, named = section.model_dump(mode="json"), section.model_dump(mode="json", exclude_defaults=True)
    return _brief(every, named)


def _brief(every: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    found = {"type": every["type"], **named} if "type" in every else dict(named)
    for key, value in named.items():
        if isinstance(value, dict):
            found[key] = _brief(every[key], value) if value else every[key]
    return found


def difference(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value in a, value in b) for all values that differ. A missing key counts as None."""
    return [(k, a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def changed(planned: dict[str, Any], there: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """`difference` of the identities of a planned spec and of the spec in a run folder.

    The first start fills in `init.sha256`, so a hash in the folder is no difference if the plan names none.
    """
    flat, ours, theirs = flatten(planned), identity(planned), identity(there)
    if ours.get(SHA256) is None and any(flat.get(key) is not None for key in ("init.weights", "init.run")):
        theirs.pop(SHA256, None)
    return difference(ours, theirs)


def read_json(path: Path, default: Any) -> Any:
    """Read the JSON in `path`. Returns `default` if the file does not exist or is truncated."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return default


def read_mapping(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`. Returns an empty dict if there is none."""
    value = read_json(path, None)
    return value if isinstance(value, dict) else {}


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def write_json(path: Path, value: Any) -> None:
    """Write atomically, as `write_text` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write atomically: a reader sees either the old file or the new one, also after a power failure."""
    tmp = _temporary(path)
    with tmp.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    tmp.replace(path)
