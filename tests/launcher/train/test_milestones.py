"""Which checkpoints of a run are milestones."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from headway.launcher.train import saving
from headway.launcher.train.saving import Saving
from headway.parallel.config import CheckpointConfig
from headway.parallel.saver import Outcome

PER_STEP = 100


class FakeSaver:
    """Keeps the state of each save; those of the steps in `failing` fail."""

    pending_step: Any

    def __init__(self, failing: set[int]) -> None:
        self.failing, self.pending_step, self.states = failing, None, dict[int, Any]()

    def start(self, step: int, state: Any) -> None:
        self.pending_step, self.states[step] = step, state

    def commit(self, *, last: bool = False) -> Outcome:
        step, self.pending_step = self.pending_step, None
        error = "the disk is full" if step in self.failing else None
        return Outcome(step=step, error=error, stall_s=0.0, write_s=0.0)


@pytest.mark.parametrize(
    ("failing", "milestones"),
    [(set(), [4, 6, 9]), ({4}, [5, 6, 9]), ({4, 5}, [6, 9]), ({6}, [4, 7, 9]), ({9}, [4, 6, 10])],
)
def test_the_first_whole_checkpoint_after_each_multiple_is_a_milestone(monkeypatch, failing, milestones):
    made = FakeSaver(failing)
    monkeypatch.setattr(saving, "Saver", lambda *args, **kwargs: made)
    monkeypatch.setattr(saving, "_about", lambda run, spec: {})
    config = CheckpointConfig(keep_every_tokens=3 * PER_STEP)
    spec = SimpleNamespace(checkpoint=config, tokens_per_step=PER_STEP)
    run, layout = SimpleNamespace(checkpoints=None), SimpleNamespace(is_main=True)
    own = Saving(cast(Any, run), cast(Any, spec), cast(Any, layout), cast(Any, None))
    tracker = cast(Any, SimpleNamespace(flush=lambda: None, event=lambda record, text: None))
    for step in (1, 2, 4, 5, 6, 7, 9, 10):
        own.begin(tracker, {"step": step, "tokens": step * PER_STEP})
    own.settle(tracker)
    whole = [step for step in made.states if step not in failing]
    assert [step for step in whole if made.states[step]["milestone"]] == milestones
