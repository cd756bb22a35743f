"""What the training loop does beside training, and what ranks agree on before a step."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from headway.data.loader import StepBatch
from headway.launcher.train import hooks
from headway.launcher.train.agreement import Wishes, agree
from headway.launcher.train.hooks import CompareReplicas, GuardSteps, HeadDiversity, RouterStatistics, run_hooks
from headway.launcher.train.session import Session
from headway.parallel.engine import StepStats
from headway.parallel.layout import Layout

STATS = StepStats(
    loss=2.0, aux_loss=0.0, grad_norm=1.0, targets=8, forward_s=0.1, backward_s=0.1, optimizer_s=0.1, skipped=False
)

A_DECODER = SimpleNamespace(spec=SimpleNamespace(model=SimpleNamespace(is_encoder_decoder=False)))


def session(**values: Any) -> Any:
    guard = SimpleNamespace(replicas_every_steps=2)
    return SimpleNamespace(spec=SimpleNamespace(guard=guard), engine=None, layout=None, tokens=0, **values)


def test_replicas_are_compared_at_the_start_every_n_steps_and_before_a_save_but_once_per_step(monkeypatch):
    compared: list[int] = []
    s, hook = session(step=0), CompareReplicas()
    monkeypatch.setattr(hooks.replicas, "compare", lambda engine, layout: compared.append(s.step))
    hook.on_start(s)
    for step in range(1, 6):
        s.step = step
        hook.after_log(s, STATS, {})
        if step in (4, 5):
            hook.before_save(s)
    assert compared == [0, 2, 4, 5]


def test_heads_are_measured_before_the_first_step_of_a_run_and_not_of_a_resumed_one(monkeypatch):
    monkeypatch.setattr(HeadDiversity, "__init__", lambda self: None)
    measured: list[int] = []
    hook = HeadDiversity()  # type: ignore[call-arg]
    hook._probe = cast(Any, SimpleNamespace(measure=lambda: {"layer_00": {}}))
    tracker = SimpleNamespace(heads=lambda record: measured.append(record["step"]))
    hook.on_start(session(step=7, tracker=tracker))
    assert measured == []
    hook.on_start(session(step=0, tracker=tracker))
    hook.after_validation(session(step=10, tracker=tracker))
    assert measured == [0, 10]


def test_router_figures_are_part_of_the_record_of_their_step_alone():
    hook = RouterStatistics.__new__(RouterStatistics)
    hook._monitor = cast(Any, SimpleNamespace(after_step=lambda step, applied: {"layer_00": step} if step == 3 else {}))
    due, other = {"loss": 1.0}, {"loss": 1.0}
    hook.after_step(session(step=3), STATS, due)
    hook.after_step(session(step=4), STATS, other)
    assert due == {"loss": 1.0, "router": {"layer_00": 3}} and other == {"loss": 1.0}


@pytest.mark.parametrize("skipped", [False, True])
def test_what_was_saved_before_a_skipped_step_is_committed_before_the_guard_may_end_the_run(
    skipped, monkeypatch, tmp_path
):
    done: list[str] = []
    monkeypatch.setattr(hooks, "dump", lambda folder, step, digest, *_: done.append(f"dump {step} {digest}"))
    saving = SimpleNamespace(saved_step=2, settle=lambda tracker: done.append("settle"))
    guard = SimpleNamespace(after_step=lambda step, stats, tracker, saved_step: done.append(f"guard {saved_step}"))
    s = session(step=5, run=SimpleNamespace(path=tmp_path), saving=saving, guard=guard, tracker=None, loader=None)
    stats = StepStats(**{**STATS.__dict__, "skipped": skipped})
    GuardSteps().after_log(s, stats, {"batch_hash": "ab"})
    assert done == (["settle", "dump 5 ab", "guard 2"] if skipped else ["guard 2"])


def test_a_guard_that_ends_the_run_comes_before_replicas_are_compared(monkeypatch):
    for hook in (RouterStatistics, HeadDiversity):
        monkeypatch.setattr(hook, "__init__", lambda self, s: None)
    kinds = [type(hook) for hook in run_hooks(cast(Any, A_DECODER))]
    assert kinds.index(GuardSteps) < kinds.index(CompareReplicas)


def agreed(*wishes: Wishes) -> list[Any]:
    """What each of as many data-parallel ranks knows after the exchange."""
    count, sent = len(wishes), list[torch.Tensor]()
    batch = StepBatch(step=3, micro=(), targets=10, digest=1 << 40, sequences=2)

    def ask(wish: Wishes, exchange: Any) -> Any:
        layout = SimpleNamespace(is_data_lead=True, device="cpu", world_size=count, dp_size=count, sum=exchange)
        return agree(batch, wish, cast(Layout, layout), step=3, global_batch=2 * count)

    class Sent(Exception):
        pass

    def send(mine: torch.Tensor) -> torch.Tensor:
        sent.append(mine)
        raise Sent

    for wish in wishes:
        with pytest.raises(Sent):
            ask(wish, send)
    return [ask(wish, lambda _: torch.stack(sent).sum(0)) for wish in wishes]


def test_one_rank_is_enough_to_stop_or_save_and_all_must_have_written():
    nothing = Wishes(stop=False, save=False, written=False)
    stop, save = Wishes(stop=True, save=False, written=True), Wishes(stop=False, save=True, written=True)
    for a in agreed(nothing, stop):
        assert (a.stop, a.save, a.written) == (True, False, False)
        assert a.targets == 20 and a.digest == f"{2 << 40:016x}"
    for a in agreed(stop, save):
        assert (a.stop, a.save, a.written) == (True, True, True)


@pytest.mark.parametrize(
    ("step", "every_tokens", "due"),
    [(2, 250, False), (3, 250, True), (4, 250, False), (5, 250, True), (3, None, False), (6, None, True), (1, 1, True)],
)
def test_validations_and_saves_come_when_their_tokens_were_crossed_and_at_the_end(step, every_tokens, due):
    spec = SimpleNamespace(steps=6, tokens_per_step=100)
    parts = dict.fromkeys(("run", "layout", "engine", "loader", "validation", "saving", "tracker", "guard"), None)
    assert Session(**cast(Any, parts), spec=cast(Any, spec), step=step).is_due(every_tokens) is due
