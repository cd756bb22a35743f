"""The mechanisms by name. A new one is a new file and a line in each of the two tables below."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from headway.model.attention.gqa import GqaConfig, MhaConfig, MqaConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.base import AttentionConfig

AnyAttention = Annotated[
    GqaConfig | MhaConfig | MqaConfig | RgqaConfig | SwitchHeadConfig,
    Field(discriminator="type"),
]

MECHANISMS: dict[str, type[AttentionConfig]] = {
    config.model_fields["type"].default: config
    for config in (GqaConfig, MhaConfig, MqaConfig, RgqaConfig, SwitchHeadConfig)
}
