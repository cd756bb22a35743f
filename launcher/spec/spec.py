"""The Spec: one fully resolved run. The keys of its YAML files are the fields of its sections."""

from __future__ import annotations

from pydantic import model_validator

from headway.launcher.spec.layouts import check_layout
from headway.launcher.spec.sections import Sections


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
        check_layout(self)
        self.attention.check_run(
            seq_len=self.data.seq_len, tokens=self.steps * self.tokens_per_step, tokens_per_step=self.tokens_per_step
        )
        return self
