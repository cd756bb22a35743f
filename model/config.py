"""Shape of the model: a decoder, or an encoder and a decoder."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from headway.model.base import StrictConfig

BranchStart = Literal["as_drawn", "zero"] | Annotated[float, Field(gt=0, le=10)]
"""See `headway.model.measure.branch`."""

MlpType = Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu"]
"""See `headway.model.layers`."""

DropoutPlace = Literal["embedding", "branches", "hidden", "head"]
"""Where dropout acts: on the embedding (with learned positions), on the outputs of attention and MLP before they are
added, on the hidden activations of the MLP, and on the input of the output head (after the final norm)."""


class ModelConfig(StrictConfig):
    """A pre-norm decoder: norm, attention, norm, MLP. By default RMSNorm, SwiGLU, RoPE and no biases.

    With `type: encoder_decoder` there are also blocks of an encoder, and the decoder's have cross attention.
    """

    type: Literal["decoder", "encoder_decoder"] = Field(
        default="decoder", description="encoder_decoder: the decoder also attends to the output of an encoder"
    )
    width: int = Field(ge=8, description="d, the residual width")
    layers: int = Field(ge=1, le=10_000, description="L, blocks; of an encoder_decoder, those of the decoder")
    encoder_layers: int | None = Field(
        default=None, ge=1, le=10_000, description="blocks of the encoder (encoder_decoder); none: as many as layers"
    )
    ffn_width: int = Field(ge=1, description="F, the hidden width of the MLP")
    mlp: MlpType = Field(
        default="swiglu",
        description="swiglu, geglu (with the GELU of gelu_tanh, as T5 v1.1): three matrices; gelu, gelu_tanh (GELU as "
        "GPT-2 approximates it), relu: two matrices",
    )
    mlp_biases: bool = Field(default=False, description="biases of the MLP's matrices")
    vocab_size: int | None = Field(default=None, ge=2, description="none: taken from the data's tokenizer")
    tied_embeddings: bool = True
    scaled_head: bool = Field(
        default=False, description="encoder_decoder: width ** -0.5 on the input of the output head, as in T5"
    )
    head_bias: bool = Field(default=False, description="a bias [V] of the output head")
    norm: Literal["rmsnorm", "layernorm"] = Field(
        default="rmsnorm", description="layernorm: with gain and bias; QK-norm is an RMSNorm with either"
    )
    positions: Literal["rope", "learned", "relative_xl", "relative_t5", "none"] = Field(
        default="rope",
        description="rope: queries and keys are rotated; learned: a vector per position, added to the embedding; "
        "relative_xl: a score for the distance of query and key, as in Transformer-XL; relative_t5 (encoder_decoder): "
        "a bias per head and bucket of distances, as in T5, whose scores are not divided by sqrt(head_dim); none",
    )
    relative_buckets: int = Field(
        default=32, ge=4, le=65_536, multiple_of=2, description="buckets of distances of `positions: relative_t5`"
    )
    relative_max_distance: int = Field(
        default=128, ge=3, description="distance from which on all are in one bucket of `positions: relative_t5`"
    )
    max_positions: int | None = Field(
        default=None, ge=1, description="positions of `positions: learned`, at least data.seq_len"
    )
    norm_eps: float = Field(default=1e-5, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1, description="p, in training; not of attention weights")
    dropout_places: tuple[DropoutPlace, ...] = Field(
        default=("embedding", "branches"),
        description="what is dropped: the embedding, outputs of attention and MLP (branches), the hidden activations "
        "of the MLP, the input of the output head",
    )
    init_std: float = Field(default=0.02, gt=0, description="output projections use init_std / sqrt(2 layers)")
    branch_start: BranchStart = Field(
        default="as_drawn",
        description="start of attention: as_drawn, zero (the MLP too), or rms of what it adds / rms of the stream",
    )

    @field_validator("dropout_places")
    @classmethod
    def _each_place_once(cls, places: tuple[DropoutPlace, ...]) -> tuple[DropoutPlace, ...]:
        if not places:
            raise ValueError("no place; use embedding, branches, hidden or head, or dropout 0")
        if len(set(places)) < len(places):
            raise ValueError(f"{', '.join(places)} names a place twice; name each place once")
        return places

    @model_validator(mode="after")
    def _encoder_decoders_have_their_keys(self) -> Self:
        fields = type(self).model_fields
        if not self.is_encoder_decoder:
            for key in ("encoder_layers", "scaled_head"):
                if getattr(self, key) != fields[key].default:
                    raise ValueError(
                        f"{key}: {getattr(self, key)} has no effect with type decoder; leave it out, or use type "
                        "encoder_decoder"
                    )
            if self.positions == "relative_t5":
                raise ValueError(
                    "positions: relative_t5 is for type encoder_decoder; use rope or relative_xl, or type "
                    "encoder_decoder"
                )
        elif self.positions in ("learned", "relative_xl"):
            raise ValueError(
                f"positions: {self.positions} has no form for an encoder and its cross attention; use rope or "
                "relative_t5"
            )
        elif self.branch_start != "as_drawn":
            raise ValueError(
                f"branch_start: {self.branch_start} is measured for decoders only; use as_drawn with type "
                "encoder_decoder"
            )
        for key in ("relative_buckets", "relative_max_distance"):
            if self.positions != "relative_t5" and getattr(self, key) != fields[key].default:
                raise ValueError(
                    f"{key}: {getattr(self, key)} has no effect with positions {self.positions}; leave it out, or use "
                    "positions relative_t5"
                )
        if self.relative_max_distance <= self.relative_buckets // 2 and self.positions == "relative_t5":
            raise ValueError(
                f"relative_max_distance: {self.relative_max_distance} leaves nothing for the larger half of "
                f"{self.relative_buckets} buckets; use {self.relative_buckets // 2 + 1} or more"
            )
        return self

    @model_validator(mode="after")
    def _learned_positions_have_a_number(self) -> Self:
        if self.positions == "learned" and self.max_positions is None:
            raise ValueError(
                "max_positions: missing, and positions learned has one vector per position; use max_positions with "
                "data.seq_len or more, or positions rope"
            )
        if self.positions != "learned" and self.max_positions is not None:
            raise ValueError(
                f"max_positions: {self.max_positions} has no effect with positions {self.positions}; leave it out, or "
                "use positions learned"
            )
        return self

    @property
    def is_encoder_decoder(self) -> bool:
        return self.type == "encoder_decoder"

    @property
    def encoder_blocks(self) -> int:
        """Number of the encoder's blocks; 0 for a decoder."""
        return (self.encoder_layers or self.layers) if self.is_encoder_decoder else 0

    @property
    def learned_positions(self) -> int:
        """Number of learned position vectors [d]."""
        return self.max_positions or 0

    def head_params(self, vocab_size: int) -> int:
        """Parameters of the output head that the embedding does not have: its matrix unless tied, and its bias."""
        return vocab_size * ((0 if self.tied_embeddings else self.width) + int(self.head_bias))

    @property
    def relative(self) -> bool:
        """Whether scores depend on distances (`positions: relative_xl`)."""
        return self.positions == "relative_xl"

    @property
    def norm_params(self) -> int:
        """Parameters of one norm."""
        return self.width * (2 if self.norm == "layernorm" else 1)

    @property
    def mlp_matrices(self) -> int:
        """Matrices of the MLP: if gated two into the hidden width and one out of it, else one each."""
        return 3 if self.mlp in ("swiglu", "geglu") else 2

    @property
    def mlp_params(self) -> int:
        """Parameters of one layer's MLP."""
        biases = (self.mlp_matrices - 1) * self.ffn_width + self.width if self.mlp_biases else 0
        return self.mlp_matrices * self.width * self.ffn_width + biases

    @property
    def mlp_flops(self) -> int:
        """Forward FLOPs of one layer's MLP per token. Activation function and biases are not counted."""
        return 2 * self.mlp_matrices * self.width * self.ffn_width

    @property
    def branch_target(self) -> float | None:
        """The ratio that attention is scaled to at the start; 0 for the MLP too; None: both stay as drawn."""
        named = {"as_drawn": None, "zero": 0.0}
        return named[self.branch_start] if isinstance(self.branch_start, str) else self.branch_start
