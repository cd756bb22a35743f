"""Shape of the decoder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from headway.model.base import StrictConfig

BranchStart = Literal["as_drawn", "zero"] | Annotated[float, Field(gt=0, le=10)]
"""See `headway.model.branch`."""


class ModelConfig(StrictConfig):
    """A pre-norm decoder: RMSNorm, attention, RMSNorm, SwiGLU; RoPE; no biases."""

    width: int = Field(ge=8, description="d, the residual width")
    layers: int = Field(ge=1, le=10_000)
    ffn_width: int = Field(ge=1, description="F, the hidden width of the SwiGLU MLP")
    vocab_size: int | None = Field(default=None, ge=2, description="none: taken from the data's tokenizer")
    tied_embeddings: bool = True
    norm_eps: float = Field(default=1e-5, gt=0)
    init_std: float = Field(default=0.02, gt=0, description="output projections use init_std / sqrt(2 layers)")
    branch_start: BranchStart = Field(
        default="as_drawn",
        description="start of attention: as_drawn, zero (the MLP too), or rms of what it adds / rms of the stream",
    )

    @property
    def branch_target(self) -> float | None:
        """The ratio that attention is scaled to at the start; 0 for the MLP too; None: both stay as drawn."""
        named = {"as_drawn": None, "zero": 0.0}
        return named[self.branch_start] if isinstance(self.branch_start, str) else self.branch_start
