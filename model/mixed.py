"""Several mechanisms in one model: each layer has one of them, by a pattern that is repeated over the layers.

    attention:
      type: mixed
      kinds:
        local: {type: gqa, heads: 8, kv_heads: 2, head_dim: 32, windows: 128}
        global: {type: gqa, heads: 8, kv_heads: 2, head_dim: 32, rope_fraction: 0.0}
      pattern: [local, local, local, global]

Layer i has the kind `pattern[i % len(pattern)]`. Each kind is the config of a mechanism with all its options, its own
RoPE included. A kind without `heads`, `kv_heads` or `head_dim` has those beside `kinds`, if its mechanism has the key.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union

from pydantic import Field, FieldSerializationInfo, field_serializer, field_validator, model_validator

from headway.model.attention.across import AcrossConfig
from headway.model.attention.registry import EXTERNALS, MECHANISMS, AnyMechanism, RegisteredTypes
from headway.model.base import AttentionConfig, AttentionSection

SHARED = ("heads", "kv_heads", "head_dim")
"""Keys of kinds that can be given once, beside `kinds`."""


class MixedConfig(AttentionSection):
    """The mechanism of each layer of a model whose layers differ."""

    type: Literal["mixed"] = "mixed"
    heads: int | None = Field(default=None, ge=1, description="heads of kinds that do not set their own")
    kv_heads: int | None = Field(default=None, ge=1, description="kv_heads of kinds that do not set their own")
    head_dim: int | None = Field(default=None, ge=1, description="head_dim of kinds that do not set their own")
    kinds: dict[str, AnyMechanism] = Field(min_length=1, description="mechanisms by names of your own")
    pattern: list[str] = Field(min_length=1, description="names of kinds, first layer to last; repeated over layers")

    @model_validator(mode="before")
    @classmethod
    def _shared_keys(cls, data: Any) -> Any:
        kinds = data.get("kinds") if isinstance(data, dict) else None
        if not isinstance(kinds, dict):
            return data
        shared = {key: data[key] for key in SHARED if data.get(key) is not None}
        return {**data, "kinds": {name: _with_shared(kind, shared) for name, kind in kinds.items()}}

    @field_validator("kinds", mode="before")
    @classmethod
    def _not_nested(cls, kinds: Any) -> Any:
        for name, kind in kinds.items() if isinstance(kinds, dict) else ():
            if isinstance(kind, dict) and kind.get("type") == "mixed":
                raise ValueError(
                    f"{str(name)[:60]} is of type mixed, and kinds are single mechanisms; name its kinds here, and put "
                    "its pattern into `pattern`"
                )
        return kinds

    @model_validator(mode="after")
    def _pattern_and_kinds_agree(self) -> Self:
        names = ", ".join(self.kinds)
        for name in self.kinds:
            if not name.isidentifier():
                raise ValueError(f"kinds: {name[:60]!r} is no name; use letters, digits and _, such as `local`")
        for name in self.pattern:
            if name not in self.kinds:
                raise ValueError(f"pattern: {name[:60]!r} is not one of the kinds; use {names}, or add it to `kinds`")
        if unused := [name for name in self.kinds if name not in self.pattern]:
            raise ValueError(
                f"pattern: has no layer of kind {', '.join(unused)}; add it to the pattern, or leave it out of `kinds`"
            )
        return self

    @field_serializer("kinds")
    def _with_types(self, kinds: dict[str, AttentionConfig], info: FieldSerializationInfo) -> dict[str, Any]:
        """Each kind with its `type`, also where defaults are left out: a mapping without it is of no mechanism.

        Shared values are left out, so that a change of the shared key changes them.
        """
        options: dict[str, Any] = {"mode": info.mode, "exclude_defaults": info.exclude_defaults}
        options["exclude_unset"] = info.exclude_unset
        shared = {key: value for key in SHARED if (value := getattr(self, key)) is not None}
        written = {name: {"type": kind.type, **kind.model_dump(**options)} for name, kind in kinds.items()}
        return {
            name: {key: value for key, value in kind.items() if key not in shared or shared[key] != value}
            for name, kind in written.items()
        }

    @property
    def no_encoder_decoder(self) -> str | None:
        return (
            "attention.type: mixed has no encoder-decoder form: a pattern would have to say which layers of encoder, "
            "decoder and cross attention it covers; use one mechanism, or model.type decoder"
        )

    def layer(self, index: int, layers: int) -> AttentionConfig:
        if len(self.pattern) > layers:
            raise ValueError(
                f"attention.pattern: {len(self.pattern)} entries for {layers} layers; use {layers} entries at most, or "
                f"model.layers {len(self.pattern)}"
            )
        name = self.pattern[index % len(self.pattern)]
        try:
            found = self.kinds[name].layer(index, layers)
            if isinstance(found, AcrossConfig) and found.across is not None:
                names = itertools.islice(itertools.cycle(self.pattern), layers)
                found = found.among(index, [i for i, other in enumerate(names) if other == name], kind=name)
            return found
        except ValueError as error:
            raise ValueError(_of_kind(name, error)) from error

    def at_size(self, num_params: int) -> Self:
        return self.model_copy(update={"kinds": {name: kind.at_size(num_params) for name, kind in self.kinds.items()}})

    def check_run(self, *, seq_len: int, tokens: int, tokens_per_step: int) -> None:
        for name, kind in self.kinds.items():
            try:
                kind.check_run(seq_len=seq_len, tokens=tokens, tokens_per_step=tokens_per_step)
            except ValueError as error:
                raise ValueError(_of_kind(name, error)) from error

    def mechanisms(self) -> Iterator[tuple[str, AttentionConfig]]:
        for name, kind in self.kinds.items():
            yield f"kinds.{name}.", kind


def _with_shared(kind: Any, shared: dict[str, Any]) -> Any:
    """A kind as written, with the shared keys that its mechanism has and that it does not set."""
    if not isinstance(kind, dict) or not isinstance(name := kind.get("type"), str):
        return kind
    mechanism = MECHANISMS.get(name) or EXTERNALS.find(name)
    known = {} if mechanism is None else mechanism.model_fields
    return {**{key: value for key, value in shared.items() if key in known}, **kind}


def _of_kind(name: str, error: ValueError) -> str:
    """The message with the keys of a kind instead of those of the section."""
    return re.sub(r"(?<![\w.])attention\.", f"attention.kinds.{name}.", str(error))


if TYPE_CHECKING:
    AnyAttention = Annotated[AttentionSection, Field(discriminator="type")]
else:
    AnyAttention = Annotated[
        Union[*MECHANISMS.values(), MixedConfig],
        Field(discriminator="type"),
        RegisteredTypes(),
    ]
