"""Keys of a spec that `from` and `compute` of a variant stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.run.folders import not_a_run
from headway.launcher.run.run_dir import RunDir, flatten
from headway.launcher.run.stored_spec import stored_spec
from headway.launcher.study.budgets import cell_key
from headway.launcher.study.uptrain.origins import Compute, Origin, compute_of, method_of, origin_of
from headway.model.huggingface import folder as hf

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec
    from headway.launcher.study.config import Study
    from headway.model.base import AttentionSection
    from headway.model.cost import Cost

_START = ("vocab_size", "init_std", "branch_start")
"""Keys of `model` that do not belong to trained weights, or that the data give."""

TRAINING = 3.0
"""Training FLOPs / forward FLOPs."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What a variant with `from` is converted from.

    `spec`: of the run; for imported weights, the base spec with their model and attention. `tokens`: it was trained on.
    `path`: folder of a run or of weights outside of the study; else None. `is_run`: whether it has a schedule.
    """

    spec: Spec
    tokens: int
    path: Path | None
    is_run: bool = True

    @classmethod
    def of_run(cls, spec: Spec, path: Path | None) -> Teacher:
        return cls(spec=spec, tokens=spec.steps * spec.tokens_per_step, path=path)


class Specs(Protocol):
    """Specs of the variants of a study, and their costs (`headway.launcher.study.resolver.Resolver`)."""

    study: Study

    def load(self, variant: str, *more: tuple[dict[str, Any], str]) -> tuple[Spec, list[str]]: ...
    def base(self) -> Spec: ...
    def cost(self, spec: Spec) -> Cost: ...


class Uptraining:
    """Keys, seeds and order of the variants of a study with `from` and `compute`."""

    def __init__(self, resolver: Specs) -> None:
        self._resolver, self._study = resolver, resolver.study
        self._keys: dict[str, dict[str, Any]] = {}
        self._teachers: dict[str, Teacher] = {}

    def keys(self, variant: str) -> dict[str, Any]:
        """The keys of a variant; none without `from` and `compute`. The weights are those for the first seed.

        Raises NoInputError or SpecError for a teacher that is not there, not finished or cannot be converted.
        """
        if variant not in self._keys:
            origin, compute = self._origin(variant), self._compute(variant)
            self._keys[variant] = {}
            if origin is not None:
                self._keys[variant] = self._of_origin(variant, origin)
            elif compute is not None:
                self._keys[variant] = self._of_compute(variant, compute)
        return self._keys[variant]

    def of_seed(self, variant: str, seed: int) -> dict[str, Any]:
        """The keys of a cell that depend on its seed: the weights."""
        origin = self._origin(variant)
        return {} if origin is None else {"init.weights": self._weights(origin, seed)}

    def after(self, variant: str, seed: int) -> str | None:
        """Key of the cell whose weights a cell converts; None if it converts none of the study."""
        origin = self._origin(variant)
        return None if origin is None or not self._is_named(origin) else cell_key(origin.run, seed)

    def record(self, variant: str, spec: Spec) -> dict[str, Any] | None:
        """What the report needs of a variant with `from` or `compute`; None for others. `spec`: that of the variant.

        Raises SpecError if the teacher cannot be converted to it.
        """
        origin, compute = self._origin(variant), self._compute(variant)
        if compute is not None:
            return {"kind": "compute", "of": compute.of, "teacher": compute.teacher, "tokens": spec.train.tokens}
        if origin is None:
            return None
        teacher = self._teacher(variant, origin)
        self._check(variant, teacher, spec, origin)
        return {
            "kind": "from",
            "method": method_of(variant, origin.alpha),
            "teacher": origin.run if teacher.path is None else None,
            "run": str(self._weights(origin, self._study.config.seeds[0])),
            "teacher_type": teacher.spec.attention.type,
            "teacher_tokens": teacher.tokens,
            "teacher_flops_per_token": self._flops(teacher.spec, teacher.tokens) / teacher.tokens,
            "alpha": origin.alpha,
            "schedule": self._schedule(variant, origin, teacher),
            **origin.convert.model_dump(mode="json"),
        }

    # ------------------------------------------------------------ from

    def _of_origin(self, variant: str, origin: Origin) -> dict[str, Any]:
        teacher = self._teacher(variant, origin)
        base = self._resolver.base()
        each = base.tokens_per_step
        tokens = max(1, math.ceil(Fraction(str(origin.alpha)) * teacher.tokens / each)) * each
        keys = {
            **_model_keys(teacher.spec, base),
            **self._attention_keys(variant, teacher.spec.attention, origin),
            "init.weights": self._weights(origin, self._study.config.seeds[0]),
            "init.convert.how": origin.convert.how,
            **({} if origin.convert.by == "activations" else {"init.convert.by": origin.convert.by}),
            "init.convert.tokens": origin.convert.tokens,
            "train.tokens": tokens,
            "train.validate_first": True,
        }
        scaled = self._schedule(variant, origin, teacher) == "teacher"
        return keys | (_scaled(teacher.spec, tokens / teacher.tokens) if scaled else {})

    def _schedule(self, variant: str, origin: Origin, teacher: Teacher) -> str:
        if origin.schedule == "teacher" and not teacher.is_run:
            raise SpecError(
                f"{self._where(variant)}.schedule: the weights in {teacher.path} have no schedule; use schedule: own"
            )
        return origin.schedule or ("teacher" if teacher.is_run else "own")

    def _where(self, variant: str) -> str:
        return f"{self._study.path}: variants.{variant}.from"

    def _teacher(self, variant: str, origin: Origin) -> Teacher:
        path = None if self._is_named(origin) else self._folder(origin.run)
        is_run = path is None or not (path / hf.CONFIG).is_file()
        if is_run and origin.teacher_tokens is not None:
            raise SpecError(
                f"{self._where(variant)}.teacher_tokens: {origin.run} is a run, whose spec has its tokens; leave "
                "teacher_tokens out"
            )
        if origin.run not in self._teachers:
            if path is None:
                found = Teacher.of_run(self._resolver.load(origin.run)[0], None)
            elif is_run:
                found = Teacher.of_run(self._finished(variant, path), path)
            else:
                found = self._weights_of(variant, origin, path)
            self._teachers[origin.run] = found
        return self._teachers[origin.run]

    def _weights_of(self, variant: str, origin: Origin, path: Path) -> Teacher:
        config = hf.read_exported(path)
        tokens = origin.teacher_tokens or config.tokens
        if not tokens:
            raise SpecError(
                f"{self._where(variant)}: {path} does not say on how many tokens its weights were trained, and alpha "
                "is a share of them; add teacher_tokens"
            )
        base = self._resolver.base()
        model = config.model.model_copy(update={"vocab_size": config.vocab_size})
        spec = base.model_copy(update={"model": model, "attention": config.attention})
        return Teacher(spec=spec, tokens=tokens, path=path, is_run=False)

    def _finished(self, variant: str, path: Path) -> Spec:
        where = f"{self._where(variant)}.run"
        run = RunDir(path)
        if not run.spec.is_file():
            raise NoInputError(
                f"{where}: {not_a_run(path)}; name a variant of the study ({', '.join(self._study.config.variants)}), "
                "or the folder of a run or of imported weights"
            )
        spec = stored_spec(run)
        if not run.is_complete():
            raise SpecError(
                f"{where}: {path} is not finished, so its learning rate has not ended; finish it with the same "
                "`headway train` command, or name a run that is complete"
            )
        return spec

    def _folder(self, written: str) -> Path:
        """The folder of a run: relative to the working folder, or else to that of the study file."""
        path = Path(written).expanduser()
        beside = self._study.path.parent / path
        return path if path.exists() or not beside.exists() else beside

    def _is_named(self, origin: Origin) -> bool:
        return origin.run in self._study.config.variants

    def _weights(self, origin: Origin, seed: int) -> str:
        if self._is_named(origin):
            return str(self._study.out / "cells" / cell_key(origin.run, seed))
        return str(self._folder(origin.run))

    def _attention_keys(self, variant: str, source: AttentionSection, origin: Origin) -> dict[str, Any]:
        """The fields of the new attention, without those that are defaults of its mechanism."""
        from headway.model.attention.gqa import DenseConfig
        from headway.model.attention.registry import MECHANISMS
        from headway.model.convert.decoder import target_fields

        if not isinstance(source, DenseConfig):
            raise SpecError(
                f"{self._where(variant)}: the teacher {origin.run} has attention of type "
                f"{source.type}, and only mha, gqa, mqa can be converted; name another teacher"
            )
        fields = target_fields(source, origin.convert.to, origin.convert.kv_heads, origin.convert.how)
        defaults = {n: f.default for n, f in MECHANISMS[origin.convert.to].model_fields.items() if n != "type"}
        return {f"attention.{n}": value for n, value in fields.items() if n not in defaults or value != defaults[n]}

    def _check(self, variant: str, teacher: Teacher, spec: Spec, origin: Origin) -> None:
        from headway.model.convert.decoder import check_conversion

        try:
            check_conversion(teacher.spec.model, teacher.spec.attention, spec.attention, origin.convert.how)
        except ValueError as e:
            raise SpecError(f"{self._where(variant)}.convert: {e}") from None

    # ------------------------------------------------------------ compute

    def _of_compute(self, variant: str, compute: Compute) -> dict[str, Any]:
        origin = self._origin(compute.of)
        assert origin is not None, "the study file is checked"
        teacher, other = self._teacher(compute.of, origin), self._resolver.load(compute.of)[0]
        flops = self._flops(other, other.steps * other.tokens_per_step)
        if compute.teacher == "counted":
            flops += self._flops(teacher.spec, teacher.tokens)
        self._keys[variant] = {}  # the spec without `compute`, for its FLOPs
        own = self._resolver.load(variant)[0]
        steps = max(1, round(self._tokens_of(own, flops) / own.tokens_per_step))
        tokens = steps * own.tokens_per_step
        return {"train.tokens": tokens, **_scaled(own, tokens / (own.steps * own.tokens_per_step))}

    def _flops(self, spec: Spec, tokens: int) -> float:
        """Useful forward FLOPs of the first `tokens` training tokens."""
        return float(self._resolver.cost(spec).trained(tokens).useful)

    def _tokens_of(self, spec: Spec, flops: float) -> float:
        """Training tokens whose useful forward FLOPs are `flops`."""
        cost = self._resolver.cost(spec)
        last = cost.stages[-1][0] if cost.stages else 0  # the final stage, which `check_run` demands
        return last + (flops - cost.trained(last).useful) / cost.flops_per_token.useful

    def _origin(self, variant: str) -> Origin | None:
        return origin_of(variant, self._study.config.variants[variant])

    def _compute(self, variant: str) -> Compute | None:
        return compute_of(variant, self._study.config.variants[variant])


def _model_keys(teacher: Spec, base: Spec) -> dict[str, Any]:
    """The keys of `model` in which the teacher differs from the base spec."""
    ours, theirs = (flatten(spec.model.model_dump(mode="json")) for spec in (base, teacher))
    return {f"model.{k}": v for k, v in theirs.items() if k not in _START and v != ours[k]}


def _scaled(spec: Spec, share: float) -> dict[str, Any]:
    """The schedule of a spec for a run of a share of its tokens."""
    keys = {f"schedule.{key}": value for key, value in spec.schedule.model_dump(mode="json").items()}
    least = 1 if spec.schedule.type == "inverse_sqrt" else 0
    return {**keys, "schedule.warmup_tokens": max(least, round(share * spec.schedule.warmup_tokens))}
