"""Registry of the attention mechanisms by name. To add one, add a file and its config class to the union below."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from headway.model.attention.dynamic import DynamicGqaConfig
from headway.model.attention.gqa import GqaConfig, MhaConfig, MqaConfig
from headway.model.attention.gqe import GqeConfig
from headway.model.attention.hybrid import HybridConfig
from headway.model.attention.moa import MoaConfig
from headway.model.attention.moh import MohConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.sqa import SqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.attention.wgqa import WgqaConfig
from headway.model.base import AttentionConfig

AnyAttention = Annotated[
    GqaConfig
    | MhaConfig
    | MqaConfig
    | SqaConfig
    | DynamicGqaConfig
    | GqeConfig
    | HybridConfig
    | MoaConfig
    | MohConfig
    | RgqaConfig
    | SwitchHeadConfig
    | WgqaConfig,
    Field(discriminator="type"),
]

MECHANISMS: dict[str, type[AttentionConfig]] = {
    config.model_fields["type"].default: config for config in get_args(get_args(AnyAttention)[0])
}
