"""Config of a file of probe tasks: a study, and the tasks on which each variant is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field, model_validator

from headway.launcher.spec.yamlio import Node
from headway.launcher.study.config import FULL, Changes, Study, StudyConfig, check_changes, load_study
from headway.launcher.study.sizes import overlap


class ProbeConfig(StudyConfig):
    """A study with tasks. Every task is a separate study of the same variants and seeds on its own data."""

    tasks: Changes = Field(
        min_length=1, description="name -> what differs from the base, as spec keys: {data.source.pairs: 4}"
    )

    @model_validator(mode="after")
    def _check_tasks(self) -> ProbeConfig:
        if self.budgets != [FULL]:
            raise ValueError(
                "budgets: probe tasks are compared at their full length only; leave it out here, or give tasks other "
                "train.tokens"
            )
        if self.is_ladder:
            raise ValueError("sizes, tokens_per_param and tune: probe tasks do not have them; leave them out")
        check_changes("tasks", self.tasks)
        for name, keys in self.tasks.items():
            for key in keys:
                self._check_key(name, key)
        return self

    def _parts(self) -> list[tuple[str, list[str], list[int]]]:
        return [(task, [*self.variants], self.seeds) for task in self.tasks]

    def _check_key(self, task: str, key: str) -> None:
        if self.match and overlap(key, self.match.free):
            raise ValueError(
                f"tasks: {task}: `match` solves {self.match.free}; leave it out here, or free another dimension"
            )
        for variant, keys in self.variants.items():
            if any(overlap(key, own) for own in keys):
                raise ValueError(
                    f"tasks: {task}: {key} is set by variant {variant} too; leave it out of one of them, or set it in "
                    "the base"
                )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A file of probe tasks after loading. `whole`: the file as a study. `tasks`: one study for each task."""

    config: ProbeConfig
    whole: Study
    tasks: dict[str, Study]


def load_probe(path: Path) -> Probe:
    """Read a file of probe tasks. Raises NoInputError or SpecError with file:line, the key, and advice."""
    whole = load_study(path, ProbeConfig)
    config = whole.config
    assert isinstance(config, ProbeConfig)
    written = whole.tree.value["tasks"].value
    return Probe(
        config=config, whole=whole, tasks={name: _task(whole, config, name, written[name]) for name in config.tasks}
    )


def _task(whole: Study, config: ProbeConfig, name: str, written: Node) -> Study:
    """The study of one task. Its keys are added to every variant, so that the command line of every cell has them."""
    shared = {key: getattr(config, key) for key in ("base", "match", "branch_start", "margin_nats", "seeds")}
    return replace(
        whole,
        config=StudyConfig(
            study=f"{config.study}.{name}",
            out=str(whole.out / name),
            baseline=config.baseline_name,
            variants={variant: {**config.tasks[name], **keys} for variant, keys in config.variants.items()},
            **shared,
        ),
        out=whole.out / name,
        records=whole.records and whole.records / name,
        variants={
            variant: Node(dict([*_leaves(written), *_leaves(node)]), node.place, node.key_place)
            for variant, node in whole.variants.items()
        },
    )


def _leaves(node: Node, prefix: str = "") -> Iterator[tuple[str, Node]]:
    """(dotted key, value) of all leaves of a mapping: as `flat_keys`, but with positions in the file."""
    for key, item in node.value.items() if node.is_mapping else ():
        if item.is_mapping:
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
