"""The Spec: one fully resolved run. The keys of its YAML files are the fields of its sections."""

from __future__ import annotations

from pydantic import model_validator

from headway.launcher.spec.layouts import check_layout
from headway.launcher.spec.sections import Sections
from headway.model.cost import relative_form


class Spec(Sections):
    """One run."""

    @model_validator(mode="after")
    def _check(self) -> Spec:
        for i in range(self.model.layers):
            self.attention.layer(i, self.model.layers)
        if self.init.start_step >= self.steps:
            least = self.init.start_step * self.tokens_per_step + 1
            raise ValueError(
                f"init.run: nothing is left to train after step {self.init.start_step}, because this run has "
                f"{self.steps} steps; use an earlier checkpoint, or train.tokens of at least {least}"
            )
        if (reason := self.schedule.why_not(self.steps * self.tokens_per_step)) is not None:
            raise ValueError(f"schedule.{reason}")
        if (problem := self._wrong_positions()) is not None:
            raise ValueError(problem)
        check_layout(self)
        self.attention.check_run(
            seq_len=self.data.seq_len, tokens=self.steps * self.tokens_per_step, tokens_per_step=self.tokens_per_step
        )
        return self

    def _wrong_positions(self) -> str | None:
        """Why the positions do not fit the run, with the legal choices; None if they do."""
        model, seq_len = self.model, self.data.seq_len
        if model.positions == "learned" and model.learned_positions < seq_len:
            return (
                f"model.max_positions: {model.max_positions} learned positions are fewer than the {seq_len} tokens of "
                f"a sequence; use {seq_len} or more, or data.seq_len {model.max_positions}"
            )
        if model.positions == "rope":
            return None
        try:
            for i in range(model.layers):
                relative_form(model, self.attention.layer(i, model.layers))
        except ValueError as error:
            return str(error)
        for prefix, mechanism in self.attention.mechanisms():
            for name in ("rope_base", "rope_fraction"):
                if name == "rope_fraction" and mechanism.rope_fraction == 0:
                    continue  # states that nothing is rotated, which an odd head_dim must
                if getattr(mechanism, name) != type(mechanism).model_fields[name].default:
                    return (
                        f"attention.{prefix}{name}: has no effect with model.positions {model.positions}; leave it "
                        "out, or use model.positions rope"
                    )
        return None
