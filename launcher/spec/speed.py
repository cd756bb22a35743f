"""Check settings of `speed` against the rest of a spec. The ranks check the support of the machine when they start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headway.model.cost import layer_configs

if TYPE_CHECKING:
    from headway.launcher.spec.sections import Sections
    from headway.model.base import AttentionConfig


def why_not_speed(spec: Sections) -> str | None:
    """Reason why settings of `speed` conflict with the rest of the spec, with the legal choices; None if legal."""
    speed, parallel = spec.speed, spec.parallel
    if speed.loss != "chunked" and parallel.tensor > 1:
        return (
            f"speed.loss: {speed.loss} knows no parts of the vocabulary, which parallel.tensor {parallel.tensor} cuts; "
            "use speed.loss chunked, or parallel.tensor 1"
        )
    if speed.loss != "chunked" and spec.model.head_bias:
        return (
            f"speed.loss: {speed.loss} is given no bias of the head, and model.head_bias is true; use speed.loss "
            "chunked, or model.head_bias false"
        )
    if speed.loss == "torch" and parallel.precision == "bf16":
        return (
            "speed.loss: torch returns the sum of the losses in bf16, that is 8 bits of it; use speed.loss chunked or "
            "liger, or parallel.precision fp32"
        )
    if speed.matmul == "fp8" and parallel.zero == 3:
        return (
            "speed.matmul: fp8 is not combined with parallel.zero 3, which cuts the matrices between passes; use "
            "speed.matmul none, or parallel.zero 1 or 2"
        )
    if speed.matmul == "fp8" and parallel.precision == "fp32":
        return "speed.matmul: fp8 replaces products in bf16; use speed.matmul none, or parallel.precision bf16"
    if speed.norm != "torch" and spec.model.norm != "rmsnorm":
        return (
            f"speed.norm: {speed.norm} replaces RMSNorm, and model.norm is {spec.model.norm}; use speed.norm torch, or "
            "model.norm rmsnorm"
        )
    if speed.attention != "auto" and spec.model.relative:
        return (
            f"speed.attention: {speed.attention} takes no scores of distances, which model.positions relative_xl adds; "
            "use speed.attention auto, or model.positions rope"
        )
    if speed.attention != "auto" and (own := [config.type for config in _layers(spec) if config.own_core]):
        return (
            f"speed.attention: {speed.attention} does not reach attention.type {own[0]}, whose core has one form; use "
            "speed.attention auto, or another attention.type"
        )
    if speed.attention == "flash" and not spec.data.document_mask and _windows(spec):
        return (
            "speed.attention: flash is given no windows without documents; use speed.attention auto or cudnn, "
            "attention.windows null, or data.document_mask true"
        )
    return _why_not_block(spec) if speed.compile == "block" else None


def _why_not_block(spec: Sections) -> str | None:
    """Reason why blocks of this spec are not compiled; None if they are."""
    parallel, other = spec.parallel, "use speed.compile none or auto"
    if spec.launch.device == "cuda":
        return f"speed.compile: block is for the CPU, and launch.device is cuda; {other}, or launch.device cpu"
    if parallel.recompute != "none":
        return (
            f"speed.compile: block decides which activations are kept, and parallel.recompute {parallel.recompute} "
            f"does so too; {other}, or parallel.recompute none"
        )
    for key in ("tensor", "context", "pipeline"):
        if (size := getattr(parallel, key)) > 1:
            return (
                f"speed.compile: block has no form with exchanges between the ranks of a block, or with stages, and "
                f"parallel.{key} is {size}; {other}, or parallel.{key} 1"
            )
    if parallel.zero == 3:
        return (
            "speed.compile: block reads all parameters of a block, which parallel.zero 3 cuts between passes; "
            f"{other}, or parallel.zero 1 or 2"
        )
    if spec.model.relative:
        return (
            "speed.compile: block has no form of relative scores, which model.positions relative_xl adds; "
            f"{other}, or model.positions rope"
        )
    reasons = (config.no_compiled_blocks for config in _layers(spec))
    if (reason := next((reason for reason in reasons if reason is not None), None)) is not None:
        return f"speed.compile: block has no form of {reason}; {other}, or another attention.type"
    if (config := _reads_routing(spec)) is not None:
        what, instead = "attention.projections grouped", "attention.projections dense"
        if config.model_copy(update={"projections": "dense"}).reads_routing:
            what, instead = f"attention.type {config.type}", "another attention.type"
        return (
            f"speed.compile: block takes no shapes that follow the routing, which {what} reads on the host; "
            f"{other}, or {instead}"
        )
    return None


def _reads_routing(spec: Sections) -> AttentionConfig | None:
    """The first layer in which shapes follow the routing, as where the tokens of each expert are multiplied alone."""
    return next((config for config in _layers(spec) if config.reads_routing), None)


def _windows(spec: Sections) -> bool:
    """Whether any layer sets an attention window."""
    return any(getattr(config, "windows", None) is not None for config in _layers(spec))


def _layers(spec: Sections) -> list[AttentionConfig]:
    return layer_configs(spec.model, spec.attention, vocab_size=spec.model.vocab_size or 1)
