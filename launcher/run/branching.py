"""Branch a run: continue another run from one of its checkpoints, under another end of the schedule (`init.run`).

The parent is checked before any process is started, and again where the ranks load its checkpoint. A branch that has a
checkpoint of its own continues from that and does not need the parent any more.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.data.places import looked_for
from headway.launcher.base import console
from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.run.folders import not_a_run
from headway.launcher.run.run_dir import SEEDS, SHA256, RunDir, difference, flatten, identity, read_mapping
from headway.launcher.run.stored_spec import stored_spec
from headway.launcher.spec.paths import split_step
from headway.launcher.spec.spec import Spec
from headway.parallel.config import CheckpointError
from headway.parallel.manifest import MANIFEST, Checkpoint, read_manifest, step_of, steps_on_disk, verify_hashes
from headway.parallel.schedule import learning_rate

MAY_DIFFER = ("train.tokens", "train.validate_every_tokens", "train.validate_first", "schedule", "guard", "init")
"""Keys in which a branch may differ from its parent, besides those that may change between two starts of one run."""
MAY_DIFFER_FRESH = (*MAY_DIFFER, "optimizer")
"""The same with a fresh optimizer (`init.optimizer: fresh`)."""


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A checked parent of a branch.

    spec: That of the parent.
    sha256: Hash of the manifest of its checkpoint.
    equal_steps: Number of leading steps in which parent and branch have equal learning rates.
    fresh_optimizer: Whether the branch starts with moments of 0.
    """

    run: RunDir
    spec: Spec
    checkpoint: Checkpoint
    sha256: str
    equal_steps: int
    fresh_optimizer: bool

    @property
    def step(self) -> int:
        return self.checkpoint.step

    @property
    def note(self) -> str | None:
        """Why the branch is not equal to a run that is trained from its start; None if its learning rates are equal."""
        reasons = []
        if self.fresh_optimizer:
            reasons.append(f"the optimizer starts anew after step {self.step} (init.optimizer: fresh)")
        if self.equal_steps < self.step:
            reasons.append(
                f"the learning rates of the parent differ from this schedule's from step {self.equal_steps + 1} on"
            )
        if not reasons:
            return None
        return f"{' and '.join(reasons)}, so this run is not equal to one trained from its start"

    def facts(self) -> dict[str, Any]:
        """For the run card and the records."""
        state, about = self.checkpoint.state, self.checkpoint.manifest.about
        return {
            "run": self.run.run_id(),
            "path": str(self.run.path),
            "step": self.step,
            "tokens": state.get("tokens"),
            "train_s": state.get("train_s"),
            "sha256": self.sha256,
            "git_commit": about.get("git_commit"),
            "optimizer": "fresh" if self.fresh_optimizer else "continue",
            "lineage": lineage(self.run, self.spec, self.step),
            "note": self.note,
        }


def parse(written: str) -> tuple[Path, int]:
    """(run folder, step) of the text PATH@STEP of `init.run`. Raises SpecError for another text."""
    parts = split_step(written)
    if parts is None or parts[1] < 1:
        raise SpecError(
            f"init.run: {written[:80]!r} is not PATH@STEP with a step of at least 1; use the folder of a run and the "
            "step of one of its checkpoints, such as runs/stable@4000"
        )
    return Path(parts[0]).expanduser(), parts[1]


def with_parent(spec: Spec, fingerprint: str | None) -> tuple[Spec, dict[str, Any] | None]:
    """The spec with `init.sha256` filled in, and the facts of its checked parent (all hashes are verified).

    `fingerprint`: of the data; None for synthetic data. The facts are None for a branch that already has a checkpoint
    of its own, or is complete: then the parent may be gone. Raises as `find_parent` and CheckpointError.
    """
    own = RunDir.of(spec)
    known = _known_hash(own, spec)
    if known is not None:
        found = spec.init.sha256 or _hash_there(spec) or known
        return _with_hash(spec, found), None
    parent = find_parent(spec, fingerprint)
    with console.progress(f"verify checkpoint of step {parent.step}", parent.checkpoint.bytes, "B") as bar:
        verify_hashes(parent.checkpoint.path, parent.checkpoint.manifest, checked=bar.update)
    return _with_hash(spec, parent.sha256), parent.facts()


def find_parent(spec: Spec, fingerprint: str | None) -> Parent:
    """The parent that `init.run` names, checked except for the hashes of its tensor files.

    Raises NoInputError if there is no such run or checkpoint, CheckpointError if the checkpoint is damaged, SpecError
    if parent and branch differ in more than `MAY_DIFFER` (or `MAY_DIFFER_FRESH`) or in their data, or if the checkpoint
    is another one than that of `init.sha256`.
    """
    path, step = parse(str(spec.init.run))
    run = RunDir(path)
    if not run.spec.is_file():
        raise NoInputError(f"init.run: {not_a_run(path)}{looked_for(path)}")
    if path.resolve() == RunDir.of(spec).path.resolve():
        raise SpecError(f"init.run: {path} is the folder of this run itself; give the branch another run_dir=...")
    before = stored_spec(run)
    _refuse_another(run, before, spec)
    trained_on = read_mapping(run.card).get("data_fingerprint")
    if trained_on != fingerprint:
        raise SpecError(
            f"init.run: {path} was trained on other data (fingerprint {str(trained_on)[:16]}, now "
            f"{str(fingerprint)[:16]}); use the dataset of that run"
        )
    checkpoint = _checkpoint(run, step)
    found = hash_of(checkpoint.path)
    if spec.init.sha256 not in (None, found):
        raise SpecError(
            f"init.sha256: the checkpoint of step {step} in {path} is another one ({found[:16]}, not "
            f"{str(spec.init.sha256)[:16]}); restore it, or give init.sha256={found} with another run_dir=..."
        )
    return Parent(
        run=run,
        spec=before,
        checkpoint=checkpoint,
        sha256=found,
        equal_steps=common_steps(before, spec),
        fresh_optimizer=spec.init.optimizer == "fresh",
    )


def hash_of(checkpoint: Path) -> str:
    """sha256 of the manifest of a checkpoint, which contains the hashes of its files. Raises OSError."""
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()


def lineage(run: RunDir, spec: Spec, step: int) -> str:
    """Hash of what the state of a run after `step` depends on except its seeds, 16 hex digits.

    It is equal for runs of several seeds, and does not depend on how the learning rate goes on after the step.
    """
    free = (*SEEDS, SHA256, *(key for key in MAY_DIFFER if key.startswith("train.")), "schedule", "init.optimizer")
    known = identity(spec.model_dump(mode="json")).items()
    kept = {key: value for key, value in known if not any(key == f or key.startswith(f"{f}.") for f in free)}
    rates = [(min(end, step), repr(function)) for end, function in _pieces(spec)]
    begun = begin_of(read_mapping(run.card)) or spec.init.sha256
    text = json.dumps([kept, rates[: 1 + sum(end < step for end, _ in rates)], begun], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def begin_of(card: dict[str, Any]) -> list[Any] | None:
    """Lineage and step of the run that a run began from, and whether its optimizer was fresh; None without one."""
    begin = card.get("branch") or card.get("weights")
    if not isinstance(begin, dict) or not begin.get("lineage"):
        return None
    return [begin["lineage"], begin.get("step"), begin.get("optimizer")]


def inherited_attempts(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The starts of the parent that trained the steps of the branch, with the id of the parent as `run`."""
    attempts = read_mapping(RunDir(Path(facts["path"])).card).get("attempts")
    found = [a for a in attempts if isinstance(a, dict)] if isinstance(attempts, list) else []
    return [{"run": facts["run"], **a} for a in found if (a.get("from_step") or 0) < facts["step"]]


def _known_hash(own: RunDir, spec: Spec) -> str | None:
    """The hash in the folder of a branch that can continue without its parent, if it started from the same step."""
    if not (steps_on_disk(own.checkpoints) or own.is_complete()):
        return None
    flat = flatten(read_mapping(own.spec))
    written, found = flat.get("init.run"), flat.get(SHA256)
    parts = split_step(written) if isinstance(written, str) else None
    same = parts is not None and parts[1] == parse(str(spec.init.run))[1]
    return found if same and isinstance(found, str) else None


def _hash_there(spec: Spec) -> str | None:
    path, step = parse(str(spec.init.run))
    try:
        return hash_of(RunDir(path).checkpoints / f"step-{step:010d}")
    except OSError:
        return None


def _with_hash(spec: Spec, found: str) -> Spec:
    return spec.model_copy(update={"init": spec.init.model_copy(update={"sha256": found})})


def _checkpoint(run: RunDir, step: int) -> Checkpoint:
    steps = {step_of(path): path for path in steps_on_disk(run.checkpoints)}
    if step not in steps:
        there = ", ".join(map(str, sorted(steps))) or "none"
        raise NoInputError(
            f"init.run: {run.checkpoints} has no checkpoint of step {step} (there: {there}); name one of these; "
            "checkpoint.keep_at_tokens keeps those that branches start from"
        )
    try:
        manifest = read_manifest(steps[step], run=run.run_id())
    except CheckpointError as e:
        raise CheckpointError(f"init.run: {e}; restore it from a copy, or name another step") from e
    return Checkpoint(path=steps[step], step=step, manifest=manifest)


def _refuse_another(run: RunDir, before: Spec, spec: Spec) -> None:
    there, ours = (identity(s.model_dump(mode="json")) for s in (before, spec))
    free_keys = MAY_DIFFER_FRESH if spec.init.optimizer == "fresh" else MAY_DIFFER
    wrong = [
        f"  {key}: {a!r} there, {b!r} in the spec"
        for key, a, b in difference(there, ours)
        if not any(key == free or key.startswith(f"{free}.") for free in free_keys)
    ]
    if wrong:
        raise SpecError(
            "\n".join([f"init.run: {run.path} is no beginning of this run, because they differ:", *wrong[:10]])
            + f"\nonly {', '.join(free_keys)} may; use the values that are there, or leave init.run out to train from "
            "the start"
        )


# ---------------------------------------------------------------- learning rates


def common_steps(a: Spec, b: Spec) -> int:
    """Number of leading steps in which both specs have exactly equal learning rates, at most the steps of either.

    Pieces of the schedules that are the same function are compared once, all other steps one by one up to the first
    that differs.
    """
    last = min(a.steps, b.steps)
    mine, theirs = _pieces(a), _pieces(b)
    bounds = sorted({0, last, *(end for end, _ in (*mine, *theirs) if end < last)})
    for begin, end in itertools.pairwise(bounds):
        if _piece(mine, begin) == _piece(theirs, begin):
            continue
        for step in range(begin, end):
            if _rate(a, step) != _rate(b, step):
                return step
    return last


def _pieces(spec: Spec) -> list[tuple[int, Hashable]]:
    """(end, function) of each piece of the schedule, from step 0. Pieces with equal functions have equal rates."""
    schedule, each, total = spec.schedule, spec.tokens_per_step, spec.steps * spec.tokens_per_step
    peak, steps = spec.optimizer.lr, spec.steps
    # Warm-up: steps that end before `warmup_tokens`.
    warm = min(steps, max(0, -(-schedule.warmup_tokens // each) - 1))
    pieces: list[tuple[int, Hashable]] = [(warm, ("warm-up", peak, schedule.warmup_tokens, each))] if warm else []
    # Rounding is monotone, so rates after the warm-up never rise: bisect for the first lower one.
    first = _rate(spec, warm)
    flat = warm + bisect.bisect_left(range(warm, steps), True, key=lambda step: _rate(spec, step) < first)
    pieces.append((flat, ("constant", first)))
    if flat < steps:
        pieces.append((steps, (schedule.type, peak, schedule.curve(total), each)))
    return pieces


def _piece(pieces: list[tuple[int, Hashable]], step: int) -> Hashable:
    return next(function for end, function in pieces if step < end)


def _rate(spec: Spec, step: int) -> float:
    each = spec.tokens_per_step
    return learning_rate(
        spec.optimizer,
        spec.schedule,
        tokens_before=step * each,
        tokens_after=(step + 1) * each,
        total_tokens=spec.steps * each,
    )
