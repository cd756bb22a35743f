"""Rules of `model.type: encoder_decoder`: which other settings it takes, and what works on decoders only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headway.launcher.base.errors import SpecError

if TYPE_CHECKING:
    from headway.launcher.spec.sections import Sections


def decoders_only(spec: Sections, what: str) -> None:
    """Raise SpecError if the model is an encoder-decoder. `what`: the command or key that has no form for one."""
    if spec.model.is_encoder_decoder:
        raise no_form(what)


def no_form(what: str) -> SpecError:
    """The error for `what` has no form for an encoder-decoder."""
    return SpecError(
        f"model.type: {what} works on decoders only, and this model is an encoder_decoder; use model.type decoder, "
        "or leave this out (docs/encoder-decoder.md lists what an encoder_decoder can do)"
    )


def why_not_encoder_decoder(spec: Sections) -> str | None:
    """Reason why settings conflict with the type of the model, with the legal choices; None if legal."""
    source, seq_len, parallel, speed = spec.data.encoder_tokens, spec.data.seq_len, spec.parallel, spec.speed
    if not spec.model.is_encoder_decoder:
        if source is None:
            return None
        return (
            f"data.encoder_tokens: {source} has no effect with model.type decoder; leave it out, or use model.type "
            "encoder_decoder"
        )
    if (reason := spec.attention.no_encoder_decoder) is not None:
        return reason
    if source is None:
        return (
            "data.encoder_tokens: missing, and model.type encoder_decoder needs it: the encoder reads the first tokens "
            f"of each sequence, and the decoder predicts the others; use for example data.encoder_tokens {seq_len // 2}"
        )
    if spec.model.positions == "relative_t5" and any(one.qk_norm for _, one in spec.attention.mechanisms()):
        return (
            "attention.qk_norm: true, but scores of model.positions relative_t5 are not divided by sqrt(head_dim), so "
            "normed queries and keys would make them large; use attention.qk_norm false, or model.positions rope"
        )
    for key in ("context", "pipeline"):
        if (ranks := getattr(parallel, key)) > 1:
            return (
                f"parallel.{key}: {ranks} has no form for model.type encoder_decoder, whose decoder reads the output "
                f"of the encoder in every layer; use parallel.{key} 1, and parallel.tensor or more data-parallel ranks"
            )
    parts = parallel.tensor if parallel.sequence_parallel else 1
    if source % parts or (seq_len - source) % parts:
        return (
            f"parallel.sequence_parallel: {source} tokens of the source and {seq_len - source} of the target do not "
            f"both divide into {parts} parts; use parallel.sequence_parallel false, or other data.encoder_tokens"
        )
    for key, value, legal in (
        ("attention", speed.attention, ("auto",)),
        ("compile", speed.compile, ("auto", "none", "elementwise")),
        ("matmul", speed.matmul, ("none",)),
    ):
        if value not in legal:
            return (
                f"speed.{key}: {value} has no form for model.type encoder_decoder; use speed.{key} {' or '.join(legal)}"
            )
    return None
