"""Shape of the decoder."""

from __future__ import annotations

from pydantic import Field

from headway.model.base import StrictConfig


class ModelConfig(StrictConfig):
    """A pre-norm decoder: RMSNorm, attention, RMSNorm, SwiGLU; RoPE; no biases."""

    width: int = Field(ge=8, description="d, the residual width")
    layers: int = Field(ge=1, le=10_000)
    ffn_width: int = Field(ge=1, description="F, the hidden width of the SwiGLU MLP")
    vocab_size: int | None = Field(default=None, ge=2, description="none: taken from the data's tokenizer")
    tied_embeddings: bool = True
    norm_eps: float = Field(default=1e-5, gt=0)
    init_std: float = Field(default=0.02, gt=0, description="output projections use init_std / sqrt(2 layers)")
