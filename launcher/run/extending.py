"""`headway train SPEC train.tokens=N --extend`: train a run to more tokens, as a branch of it in a folder of its own.

The branch starts from the newest checkpoint at which the run equals one trained to N tokens from its start: the
learning rates of both are equal up to there. The run itself is not changed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.run.branching import common_steps
from headway.launcher.run.folders import not_a_run
from headway.launcher.run.run_dir import RunDir, flatten, read_mapping
from headway.launcher.run.stored_spec import stored_spec
from headway.launcher.spec.spec import Spec
from headway.parallel.manifest import step_of, steps_on_disk


def extension(spec: Spec) -> tuple[list[str], str]:
    """(overrides, with which the spec is a branch of the run in its folder; line for the user).

    Raises NoInputError if there is no such run, SpecError if the spec has no more tokens than the run, or if the run
    has no checkpoint from which the branch would equal a run trained from its start.
    """
    run = RunDir.of(spec)
    if not run.spec.is_file():
        raise NoInputError(f"--extend: {not_a_run(run.path)}; the spec (or run_dir=...) names the run to extend")
    if spec.init.run is not None:
        raise SpecError("--extend: names the parent itself; leave out --extend, or init.run")
    before = stored_spec(run)
    if spec.train.tokens <= before.train.tokens:
        raise SpecError(
            f"--extend: train.tokens is {spec.train.tokens:,}, and the run in {run.path} has {before.train.tokens:,}; "
            "give more, such as "
            f"train.tokens={2 * before.train.tokens}"
        )
    branch = RunDir(run.path.with_name(f"{run.path.name}-{spec.train.tokens}"))
    written = flatten(read_mapping(branch.spec)).get("init.run")
    if isinstance(written, str):  # the same command again
        return _overrides(spec, branch.path, written), f"goes on with {branch.path}, a branch of {written}"
    same = common_steps(before, spec)
    steps = sorted(step_of(path) for path in steps_on_disk(run.checkpoints))
    if not (usable := [step for step in steps if 0 < step <= same]):
        raise SpecError(_reason(run, before, same, steps))
    parent = f"{run.path}@{usable[-1]}"
    what = f"extends {run.path} from step {usable[-1]} in {branch.path}"
    what += f" (its learning rates are those of the longer run up to step {same})"
    return _overrides(spec, branch.path, parent), what


def _overrides(spec: Spec, folder: Path, parent: str) -> list[str]:
    """The branch has its parent's state, so it does not start from the weights that the parent started from."""
    begin = [f"init.{key}=null" for key in ("weights", "convert", "sha256") if getattr(spec.init, key) is not None]
    return [f"run_dir={json.dumps(str(folder))}", *begin, f"init.run={json.dumps(parent)}"]


def with_overrides(arguments: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The arguments `a.b=c` of a command with `overrides` in place of those that set the same keys, or keys below."""
    keys = tuple(f"{word.partition('=')[0]}." for word in overrides)
    return [*(word for word in arguments if not f"{word.partition('=')[0].strip()}.".startswith(keys)), *overrides]


def _reason(run: RunDir, before: Spec, same: int, steps: list[int]) -> str:
    there = ", ".join(map(str, steps)) or "none"
    each = before.tokens_per_step
    text = (
        f"--extend: the learning rates of the run in {run.path} are those of the longer run up to step {same} only "
        f"({before.schedule.type} schedule), and it has no checkpoint from there (steps with a checkpoint: {there})"
    )
    if before.schedule.type in ("cosine", "linear"):
        text += "; use schedule.type: wsd, whose rates before the decay do not depend on train.tokens"
    elif same:
        text += f"; checkpoint.keep_at_tokens=[{same * each}] keeps one in a run that can be extended"
    if steps:
        text += f". init.run={run.path}@{steps[-1]} with another run_dir branches off all the same, and says so"
    return text
