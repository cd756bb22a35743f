"""Layers that use values, or keys and values, of earlier layers: two options of dense attention.

`value_residual` (ResFormer, Zhou et al., 2024, arXiv 2410.17897): the values of every layer after the first are mixed
with those of the first. `share_kv` (cross-layer attention, Brandon et al., 2024, arXiv 2405.12981): of every n
consecutive layers the first one has W_K and W_V, and the others attend to its keys and values.

    V_n <- l_1 V_1 + l_2 V_n                      fixed: l_1 = l_2 = 1/2; learned: two numbers per layer, which start so
    K_n, V_n <- K_m, V_m,  m = n - (n mod share_kv)          layers numbered from 0

"Layers" are those of one kind (`headway.model.mixed`); without kinds, all layers of the model. A layer that gives hands
on heads (`AttentionOutput.handed`), and one that takes finds them in `Context.handed`: of the same tokens, and of the
same groups of a tensor-parallel rank. Gradients flow back through them.

Legend: G KV heads (= groups), D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from headway.model.attention.grouped import GroupedConfig
from headway.model.base import Flops


@dataclass(frozen=True)
class Place:
    """What a layer is to the others: `source` is the earlier layer that it takes from, None if it takes from none."""

    source: int | None


class AcrossConfig(GroupedConfig):
    """Base config of mechanisms whose layers may use values, or keys and values, of earlier ones."""

    reads_layers: ClassVar[bool] = False
    """Whether the module has the options. Not inherited: a mechanism that changes its layer must say so itself."""
    value_residual: Literal["none", "fixed", "learned"] = Field(
        default="none",
        description="mix the values of each layer with those of the first: half of each, or by two learned numbers",
    )
    share_kv: int = Field(
        default=1,
        ge=1,
        description="of so many consecutive layers, the first has W_K and W_V, and the others use its keys and values",
    )
    _place: Place | None = PrivateAttr(default=None)  # of the config of one layer

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.across is not None and not vars(type(self)).get("reads_layers", False):
            raise ValueError(
                f"{self.across}: {self.type} has no form of it, as its layer differs from that of gqa; leave "
                f"{self.across} out, or use type gqa, mha, mqa or sqa"
            )
        if self.value_residual != "none" and self.share_kv > 1:
            raise ValueError(
                f"share_kv: {self.share_kv} layers have one V, and value_residual {self.value_residual} mixes the V of "
                "each layer; use share_kv 1, or value_residual none"
            )
        return self

    @property
    def across(self) -> str | None:
        """The key by which layers use values, or keys and values, of earlier ones; None if they do not."""
        return "value_residual" if self.value_residual != "none" else "share_kv" if self.share_kv > 1 else None

    def layer(self, index: int, layers: int) -> Self:
        return self.among(index, range(layers))

    def among(self, index: int, own: Sequence[int], *, kind: str | None = None) -> Self:
        """The config of layer `index`; `own` are the layers of its kind, in order. `kind`: its name in a pattern.

        Raises ValueError if they are too few for the option.
        """
        of, where = ("", "") if kind is None else (f" of kind {kind}", f" of kind {kind} in the pattern")
        if self.across is None:
            return self
        if self.value_residual != "none":
            if len(own) < 2:
                raise ValueError(
                    "attention.value_residual: mixes values of later layers with those of the first, and there is one "
                    f"layer{of}; use value_residual none, or two or more layers{where}"
                )
            first = own[0]
        else:
            if self.share_kv > len(own):
                raise ValueError(
                    f"attention.share_kv: {self.share_kv} layers cannot share keys and values, as there "
                    f"{'is' if len(own) == 1 else 'are'} {len(own)}{of}; use share_kv {len(own)} at most, or "
                    f"{self.share_kv} layers{where}"
                )
            position = own.index(index)
            first = own[position - position % self.share_kv]
        found = self.model_copy()
        found._place = Place(None if first == index else first)
        return found

    @property
    def takes_from(self) -> int | None:
        if self.across is None:
            return None
        assert self._place is not None, f"{self.across}: layers differ, ask the config of one layer"
        return self._place.source

    @property
    def reads_kv(self) -> bool:
        """Whether the layer has no W_K and W_V."""
        return self.share_kv > 1 and self.takes_from is not None

    @property
    def mixes_values(self) -> bool:
        """Whether the layer's values are mixed with those of the first layer."""
        return self.value_residual != "none" and self.takes_from is not None

    @property
    def no_encoder_decoder(self) -> str | None:
        reason = super().no_encoder_decoder
        if reason is not None or self.across is None:
            return reason
        return (
            f"attention.{self.across}: has no encoder-decoder form: the layers of encoder, decoder and cross attention "
            f"have keys and values of different tokens; leave attention.{self.across} out, or use model.type decoder"
        )

    def num_params(self, *, width: int) -> int:
        """Without 2dGD and the gain of the keys where a layer reads; plus 2 where it mixes by learned numbers."""
        own = super().num_params(width=width)
        if self.reads_kv:
            return own - 2 * width * self.groups * self.head_dim - (self.head_dim if self.qk_norm else 0)
        return own + (2 if self.mixes_values and self.value_residual == "learned" else 0)

    def flops_per_token(self, *, width: int, seq_len: int) -> Flops:
        """Without 4dGD where a layer reads. Mixing values (3GD) is not counted."""
        own = super().flops_per_token(width=width, seq_len=seq_len)
        saved = 4 * width * self.groups * self.head_dim if self.reads_kv else 0
        return own + Flops(useful=-saved, executed=-saved)
