"""`k_schedule`: more experts per token early in training, as a function of the tokens trained so far alone.

Legend: k = top_k, heads or experts that a token selects in each group.
"""

from __future__ import annotations

from typing import TypeAlias, TypeVar

from pydantic import Field

from headway.model.base import StrictConfig


class KStage(StrictConfig):
    """One stage of `k_schedule`: `top_k` applies until `until_tokens` training tokens are processed."""

    until_tokens: int = Field(ge=1)
    top_k: int = Field(ge=1)


class LinearK(StrictConfig):
    """A linear decrease: from `start` to top_k by 1 at a time, each for an equal part of `until_tokens`."""

    start: int = Field(ge=1, description="heads or experts that a token selects at first")
    until_tokens: int = Field(ge=1, description="training tokens after which the final top_k applies")


KSchedule: TypeAlias = list[KStage] | LinearK

C = TypeVar("C", bound=StrictConfig)


def stages_of(schedule: KSchedule, top_k: int) -> list[KStage]:
    """The stages before the final `top_k` of one layer."""
    if not isinstance(schedule, LinearK):
        return schedule
    steps = schedule.start - top_k
    return [
        KStage(until_tokens=-(-schedule.until_tokens * (i + 1) // steps), top_k=schedule.start - i)
        for i in range(steps)
    ]


def k_after(schedule: KSchedule, top_k: int, tokens: int) -> int:
    """k of one layer after `tokens` training tokens."""
    return next((stage.top_k for stage in stages_of(schedule, top_k) if tokens < stage.until_tokens), top_k)


def staged(config: C, schedule: KSchedule, top_k: int) -> list[tuple[int, C]]:
    """(tokens from which it applies, config without a schedule) of each stage of one layer, for `stages` of configs."""
    found, begin = [], 0
    for stage in stages_of(schedule, top_k):
        found.append((begin, config.model_copy(update={"top_k": stage.top_k, "k_schedule": []})))
        begin = stage.until_tokens
    return [*found, (begin, config.model_copy(update={"k_schedule": []}) if found else config)]


def all_k(schedule: KSchedule, top_k: int | list[int]) -> list[int]:
    """Every k that the stages and the final `top_k` state; a linear decrease has all numbers between them too."""
    final = top_k if isinstance(top_k, list) else [top_k]
    return final + ([schedule.start] if isinstance(schedule, LinearK) else [stage.top_k for stage in schedule])


def check_k_schedule(schedule: KSchedule, top_k: int | list[int]) -> None:
    """Raise ValueError for stages that are not in order, and for a linear decrease that would increase k."""
    if isinstance(schedule, LinearK):
        most = max(top_k) if isinstance(top_k, list) else top_k
        if schedule.start < most:
            raise ValueError(
                f"k_schedule: starts with {schedule.start}, fewer than top_k {most}; use start {most} or more, or a "
                "list of stages"
            )
        return
    ends = [stage.until_tokens for stage in schedule]
    if ends != sorted(set(ends)):
        raise ValueError(
            f"k_schedule: until_tokens {ends} must increase from stage to stage; sort the stages, or use one stage"
        )


def check_k_schedule_of_run(schedule: KSchedule, *, tokens: int, tokens_per_step: int) -> None:
    """Raise ValueError if a run of `tokens` training tokens does not reach the final top_k."""
    ends = [schedule.until_tokens] if isinstance(schedule, LinearK) else [stage.until_tokens for stage in schedule]
    late = [end for end in ends if end > tokens - tokens_per_step]
    if late:
        raise ValueError(
            f"attention.k_schedule: a stage lasts until {late[0]} tokens and the last step begins at "
            f"{tokens - tokens_per_step}, so the final top_k, for which costs are stated, would never be trained; "
            f"use until_tokens {tokens // 2}, or train.tokens {2 * late[0]}"
        )
