"""Convert a decoder, and say what was done: the card of a conversion."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from headway.data.config import DataConfig, DataError, datasets_of
from headway.launcher.base import console
from headway.launcher.base.errors import SpecError
from headway.launcher.convert.measure import Batches, calibration, judgement, mean_loss
from headway.model.attention.block_sparse import BlockSparseConfig
from headway.model.attention.gqa import GqaConfig
from headway.model.base import AttentionSection
from headway.model.config import ModelConfig
from headway.model.convert.decoder import (
    attention_inputs,
    convert_decoder,
    with_numbers_by_layer,
    with_unequal_groups,
)
from headway.model.convert.methods import COMPARED, By, How, is_calibrated
from headway.model.decoder import Decoder

CARD = "conversion.json"
FORMAT = 1


class Change(NamedTuple):
    """A converted decoder and its card (`conversion.json`)."""

    decoder: Decoder
    card: dict[str, Any]


def convert(
    decoder: Decoder,
    model: ModelConfig,
    target: AttentionSection,
    *,
    how: How,
    by: By = "activations",
    unequal: bool = False,
    by_layer: bool = False,
    tokens: int,
    data: DataConfig | None,
    seq_len: int,
    seed: int,
    source: str,
    why_no_data: str = "no dataset was named",
) -> Change:
    """Convert `decoder`, which was built with `model`, to attention `target`.

    by: what heads are compared by. unequal: choose the sizes of the groups (`with_unequal_groups`).
    by_layer: choose the number of KV heads of each layer (`with_numbers_by_layer`).
    tokens: of the training split for calibration, and of the validation split for the losses. data: None: losses are
    not measured (`why_no_data`). seq_len: tokens of the sequences that the target is for. source: what is converted,
    for people. Raises SpecError for what cannot be converted, and if a method needs data.
    """
    _check_blocks(target, seq_len)
    inputs, calibrated, judged = None, None, None
    if data is not None:
        try:
            calibrated, judged = calibration(data, tokens), judgement(data, tokens)
        except DataError as e:
            if is_calibrated(how, by):
                raise
            why_no_data = str(e)
    elif is_calibrated(how, by):
        raise SpecError(
            f"--how {how}: needs calibration tokens, and {why_no_data}; name a dataset with --data, compare weights "
            "with --by weights, or use --how mean"
        )
    if calibrated is not None:
        with console.progress("read calibration tokens", lines=False):
            inputs = attention_inputs(decoder, [(b.tokens, b.segments) for b in calibrated.micro])
    before = None if judged is None else mean_loss(decoder, judged, "loss before")
    try:
        with console.progress("convert", lines=False):
            if unequal or by_layer:
                choose = _unequal if unequal else _by_layer
                target = choose(decoder, model, target, how=how, by=by, inputs=inputs, seed=seed)
            found = convert_decoder(decoder, model, target, how=how, by=by, inputs=inputs, seed=seed)
    except ValueError as e:
        raise SpecError(f"convert: {e}") from None
    after = None if judged is None else mean_loss(found.decoder, judged, "loss after")
    old, complete = decoder.attention, found.complete_tokens
    card = {
        "format": FORMAT,
        "source": source,
        "how": how,
        "by": by if how in COMPARED else None,
        "from": old.model_dump(mode="json"),
        "to": target.model_dump(mode="json"),
        "kv_heads": [_kv_heads(old, model.layers), _kv_heads(target, model.layers)],
        "same_function": found.same_function and (complete is None or seq_len <= complete),
        "complete_tokens": complete,
        "not_exact": None if complete is None else _not_exact(complete, seq_len, judged),
        "seed": seed,
        "data": None if data is None else [str(Path(part.path)) for part in datasets_of(data.source)] or ["synthetic"],
        "calibration": None if calibrated is None else {"split": calibrated.split, "tokens": calibrated.tokens},
        "loss": None
        if judged is None
        else {"split": judged.split, "tokens": judged.tokens, "before": before, "after": after},
        "loss_not_measured": why_no_data if judged is None else None,
        "layers": [asdict(layer) for layer in found.layers],
    }
    return Change(found.decoder, card)


def _check_blocks(target: AttentionSection, seq_len: int) -> None:
    """Raise SpecError for blocks that leave none to choose, which no spec with these sequences could train."""
    for prefix, kind in target.mechanisms():
        if isinstance(kind, BlockSparseConfig) and kind.block >= seq_len:
            raise SpecError(
                f"attention.{prefix}block: a block of {kind.block} tokens leaves no earlier block to choose in "
                f"sequences of {seq_len}, those of the source; use attention.{prefix}block {max(1, seq_len // 4)}"
            )


def _not_exact(complete: int, seq_len: int, judged: Batches | None) -> str | None:
    """Why the target does not start with the function of the GQA layers; None if it does, in sequences of seq_len."""
    if seq_len <= complete:
        return None
    text = (
        f"not exact: in sequences of {seq_len:,} tokens, tokens do not attend to the blocks that they do not choose; "
        f"in sequences of up to {complete:,} tokens all blocks are chosen, and the function is that of gqa"
    )
    if judged is None or (longest := judged.longest_document) > complete:
        return text
    return f"{text}, as in those of the losses (documents of up to {longest:,} tokens)"


def _unequal(decoder: Decoder, model: ModelConfig, target: AttentionSection, **options: Any) -> GqaConfig:
    if not isinstance(target, GqaConfig):
        raise ValueError(f"--unequal: {target.type} has groups of equal size; use --to gqa, or leave --unequal out")
    if target.group_sizes:
        raise ValueError("--unequal: attention.group_sizes states the sizes already; leave one of them out")
    return with_unequal_groups(decoder, model, target, **options)


def _by_layer(decoder: Decoder, model: ModelConfig, target: AttentionSection, **options: Any) -> AttentionSection:
    if not isinstance(target, GqaConfig):
        raise ValueError(f"--by-layer: is not possible for {target.type}; use --to gqa, or leave --by-layer out")
    if target.group_sizes:
        raise ValueError("--by-layer: attention.group_sizes states the groups of all layers; leave one of them out")
    return with_numbers_by_layer(decoder, model, target, **options)


def _kv_heads(attention: AttentionSection, layers: int) -> int | list[int]:
    """KV heads; of layers that differ, those of each layer."""
    each = [attention.layer(i, layers) for i in range(layers)]
    numbers = [int(getattr(one, "groups", getattr(one, "kv_heads", 1))) for one in each]
    return numbers if len(set(numbers)) > 1 else numbers[0]


def _limit(card: dict[str, Any]) -> str:
    complete = card["complete_tokens"]
    return "" if complete is None else f" in sequences of up to {complete:,} tokens"


def card_lines(card: dict[str, Any]) -> list[str]:
    """The card as text for the console: one line of facts each, then one line a layer."""
    old, new = (sum(n) / len(n) if isinstance(n, list) else n for n in card["kv_heads"])
    each = " on average" if isinstance(card["kv_heads"][1], list) else ""
    what = f"{card['from']['type']} with {old} KV heads to {card['to']['type']} with {new:g}{each}, by {card['how']}"
    what += f" of {card['by']}" if card["by"] else ""
    lines = [f"converted  {card['source']}: {what}"]
    if card["same_function"]:
        lines.append("function   nothing was pooled: the result computes the function of the source" + _limit(card))
    elif card["not_exact"]:
        lines.append(f"function   {card['not_exact']}")
    elif card["complete_tokens"] is not None:
        lines.append("function   all blocks are chosen: the result computes the function of gqa" + _limit(card))
    used = card["calibration"]
    if used is None:
        lines.append("tokens     no calibration tokens")
    else:
        lines.append(f"tokens     {used['tokens']:,} of the {used['split']} split for calibration")
    loss = card["loss"]
    if loss is None:
        lines.append(f"loss       not measured: {card['loss_not_measured']}")
    else:
        lines.append(
            f"loss       {loss['before']:.4f} before, {loss['after']:.4f} after, in nats per token, on "
            f"{loss['tokens']:,} tokens of the {loss['split']} split"
        )
    for layer in card["layers"]:
        groups = " ".join("+".join(map(str, group)) for group in layer["groups"])
        chosen = layer["dispersion"]
        found = "" if chosen is None else f"; dispersion {chosen[0]:.3f} -> {chosen[1]:.3f}"
        alike = [
            f"{name} {layer[name][0]:.3f} -> {layer[name][1]:.3f}" for name in ("keys", "values") if layer.get(name)
        ]
        shown = f"; cosine within groups: {', '.join(alike)}" if alike else ""
        lines.append(f"layer {layer['layer']:<4} KV heads {groups}{found}{shown}")
    return lines
