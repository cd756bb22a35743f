"""Section `tracking`: what is recorded and shown beside metrics.jsonl. Specs are copied into run folders, so none of
these keys may contain a secret."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from headway.data.config import StrictModel
from headway.parallel.secrecy import secret_form

MOST_PROFILED = 20
"""Steps of a run with a trace, which has an entry for each operator and kernel. Such a step is slower than others."""

_RANGE = re.compile(r"([0-9]{1,12})-([0-9]{1,12})")
_ADDRESS = re.compile(r"(https?|sqlite|postgresql|mysql|mssql)(\+\w+)?://.|databricks(://.+)?$")
Steps = Annotated[str, Field(pattern=rf"^{_RANGE.pattern}$")]
"""A range of steps, both ends included, as `200-204`."""


class _TrackerConfig(StrictModel):
    """A service that shows runs. `variables`: environment variables with its keys and addresses.

    `module`: what is imported for it. `extra`: name of the extra of this package that installs it.
    """

    name: ClassVar[str]
    module: ClassVar[str]
    extra: ClassVar[str]
    variables: ClassVar[tuple[str, ...]]

    @field_validator("*", mode="before")  # before the messages of other rules, which show the value
    @classmethod
    def _no_secrets(cls, value: Any) -> Any:
        form = secret_form(value) if isinstance(value, str) else None
        if form is not None:
            named = " or ".join(name for name in cls.variables if re.search("KEY|PASSWORD|TOKEN", name))
            raise ValueError(
                f"has the form of a secret ({form}), and specs are copied into run folders; write it without the "
                f"secret, and set {named} where you start the command"
            )
        return value


class WandbConfig(_TrackerConfig):
    """Weights & Biases."""

    name: ClassVar[str] = "W&B"
    module: ClassVar[str] = "wandb"
    extra: ClassVar[str] = "wandb"
    variables: ClassVar[tuple[str, ...]] = ("WANDB_API_KEY", "WANDB_BASE_URL")

    project: str = Field(default="headway", pattern=r"^[^/\\#?%:]{1,128}$", description="project of the run")
    entity: str | None = Field(default=None, min_length=1, max_length=128, description="user or team; none: your own")
    mode: Literal["online", "offline"] = Field(
        default="online", description="offline: files in the run folder, which `wandb sync` sends later"
    )
    group: str | None = Field(
        default=None, min_length=1, max_length=128, description="runs shown together; a study sets its own name"
    )


class MlflowConfig(_TrackerConfig):
    """MLflow."""

    name: ClassVar[str] = "MLflow"
    module: ClassVar[str] = "mlflow"
    extra: ClassVar[str] = "mlflow"
    variables: ClassVar[tuple[str, ...]] = (
        *("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
        *("MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_CLIENT_CERT_PATH"),
    )

    uri: str = Field(
        min_length=1, description="of the server, as https://HOST, or of a local file, sqlite:///PATH; not a folder"
    )
    experiment: str = Field(default="headway", min_length=1, max_length=256, description="experiment of the run")
    group: str | None = Field(
        default=None, min_length=1, max_length=250, description="tag headway.group; a study sets its own name"
    )

    @field_validator("uri")
    @classmethod
    def _no_folder(cls, value: str) -> str:
        if not _ADDRESS.match(value):
            raise ValueError(
                f"{value[:80]!r} is no address of a server or a database, and MLflow does not write into folders any "
                "more; use sqlite:///mlflow.db for a local file, or https://HOST"
            )
        return value


class TrackingConfig(StrictModel):
    """Records in addition to metrics.jsonl."""

    log_every_steps: int = Field(default=1, ge=1, description="console lines; metrics.jsonl has every step")
    router_every_steps: int = Field(default=10, ge=1, description="steps from one record of router figures to the next")
    tensorboard: bool = True
    per_layer: bool = Field(
        default=False, description="show routers and heads of each layer beside their means; metrics.jsonl has all"
    )
    profile_steps: tuple[int | Steps, ...] = Field(
        default=(), description="steps with a trace of PyTorch's profiler: numbers, and ranges such as 200-204"
    )
    wandb: WandbConfig | None = Field(default=None, description="none: not shown there")
    mlflow: MlflowConfig | None = Field(default=None, description="none: not shown there")

    @field_validator("profile_steps")
    @classmethod
    def _few_steps(cls, value: tuple[int | str, ...]) -> tuple[int | str, ...]:
        count = 0
        for item in value:
            first, last = _ends(item)
            if first < 1 or last < first:
                raise ValueError(f"{item!r} is no step and no range of steps; use numbers from 1 on, and FIRST-LAST")
            count += last - first + 1
        if count > MOST_PROFILED:
            raise ValueError(
                f"{count:,} steps are too many, because every rank writes a large file for each of them; "
                f"use at most {MOST_PROFILED}, such as [10, 200-204]"
            )
        return value

    @property
    def profiled(self) -> frozenset[int]:
        """The steps of `profile_steps`."""
        ends = map(_ends, self.profile_steps)
        return frozenset(step for first, last in ends for step in range(first, last + 1))

    @property
    def services(self) -> tuple[WandbConfig | MlflowConfig, ...]:
        """The trackers that are not files of the run folder."""
        return tuple(found for found in (self.wandb, self.mlflow) if found is not None)

    def grouped(self, name: str) -> dict[str, str]:
        """Dotted keys that group a run under `name` in each tracker that has no group yet."""
        found = {"wandb": self.wandb, "mlflow": self.mlflow}
        return {f"tracking.{key}.group": name for key, one in found.items() if one is not None and one.group is None}


def _ends(item: int | str) -> tuple[int, int]:
    """First and last step of an item of `profile_steps`."""
    if isinstance(item, int):
        return item, item
    first, _, last = item.partition("-")
    return int(first), int(last)
