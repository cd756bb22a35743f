"""README.md of an export, the model card: what was trained on what, its losses, and its place in a study."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from headway.data.config import SyntheticSource, datasets_of
from headway.launcher.base import console
from headway.launcher.base.errors import HeadwayError, printable
from headway.launcher.base.loss_unit import PER_TOKEN, loss_unit
from headway.launcher.compare.findings import bits_per_byte, signed_interval
from headway.launcher.compare.stats import Estimate
from headway.launcher.run.folders import cells_of, kind_of
from headway.launcher.run.record_check import check_records
from headway.launcher.run.run_dir import RunDir, brief, flatten, read_mapping
from headway.launcher.spec.spec import Spec
from headway.model.cost import account
from headway.model.huggingface import form
from headway.model.huggingface.llama import ARCHITECTURE as LLAMA
from headway.parallel.checkpoint import Checkpoint

LICENCE = "not stated: name one here, and as `license: ID` above, before you publish the weights"

USE = {
    form.ARCHITECTURE: """\
    import headway.hf  # registers the model: pip install 'headway[hf]'
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("FOLDER")
    tokenizer = AutoTokenizer.from_pretrained("FOLDER")  # if the model was trained on text

No code of the folder is executed. `generate` uses the KV cache of the mechanism; a batch has sequences of equal length.
`headway generate FOLDER "prompt"` continues text without transformers.
""",
    LLAMA: """\
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("FOLDER")
    tokenizer = AutoTokenizer.from_pretrained("FOLDER")  # if the model was trained on text
""",
    "": """\
    from headway.model.huggingface.folder import load_exported

    decoder = load_exported("FOLDER")      # reads tensors and JSON; executes no code from the folder
    logits = decoder.logits(tokens)        # tokens [B, S] int64 -> [B, S, V]

`headway generate FOLDER "prompt"` continues text. A spec with `init.weights: FOLDER` starts from them.
""",
    "encoder_decoder": """\
    from headway.model.huggingface.folder import load_model

    model = load_model("FOLDER")           # reads tensors and JSON; executes no code from the folder
    logits = model.logits(source, target)  # token ids [B, s] and [B, t] int64 -> [B, t, V]

`headway generate FOLDER "prompt"` writes a target, if the model was trained on pairs. A spec with `init.weights:
FOLDER` starts from them.
""",
}
"""How a folder is used, by the architecture in its config.json; in Headway's own format by its type (decoder: "")."""


def model_card(run: RunDir, spec: Spec, found: Checkpoint, *, architecture: str, checked: str) -> str:
    """Text of README.md.

    `architecture`: a key of `USE`. `checked`: how the weights were compared. Numbers come from the records of the run,
    and those of other variants from its study; what is not there is left out.
    """
    library = "transformers" if architecture else "headway"
    tags = "".join(f"- {tag}\n" for tag in ("headway", spec.attention.type))
    head = f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n{tags}---\n"
    name = architecture or "Weights"
    sections = [
        f"{head}\n# {spec.name}\n\n{name} of run {spec.name}, attention {spec.attention.type}, step {found.step}, "
        f"{found.state['tokens']} tokens. Written by `headway export`; {checked}.\n",
        _table(("property", "value"), _facts(run, spec, found)),
        *_study(run),
        f"## Use\n\n{USE['encoder_decoder' if spec.model.is_encoder_decoder else architecture]}",
    ]
    return "\n".join(sections)


def _facts(run: RunDir, spec: Spec, found: Checkpoint) -> Iterable[tuple[str, str]]:
    card = read_mapping(run.card)
    assert spec.model.vocab_size is not None
    cost = account(
        spec.model,
        spec.attention,
        vocab_size=spec.model.vocab_size,
        seq_len=spec.data.seq_len,
        encoder_tokens=spec.data.encoder_tokens,
    )
    options = flatten(brief(spec.attention))
    words = ", ".join(f"{key} {value}" for key, value in options.items() if key != "type")
    yield "attention", f"{spec.attention.type} ({words})" if words else spec.attention.type
    model = spec.model
    encoder = f"{model.encoder_blocks} layers of the encoder, " if model.is_encoder_decoder else ""
    yield "shape", f"{encoder}{model.layers} layers of width {model.width}, vocabulary {model.vocab_size:,}"
    yield "parameters", f"{cost.num_params:,}"
    flops = cost.flops_per_token
    yield "forward FLOPs per token", f"{flops.useful:,.0f} useful, {flops.executed:,.0f} executed here"
    yield "KV cache", f"{cost.kv_bytes_per_token:,.0f} bytes per token in bf16 at {spec.data.seq_len} tokens"
    yield "training tokens", f"{found.state['tokens']:,} of {spec.train.tokens:,}, sequences of {spec.data.seq_len}"
    yield from _losses(run, card, spec, found.step)
    yield "data", _data(spec)
    if isinstance(card.get("data_fingerprint"), str):
        yield "fingerprint of the data", card["data_fingerprint"]
    versions = card.get("versions")
    if isinstance(versions, dict):
        yield "trained with", ", ".join(f"{n} {v}" for n, v in versions.items() if n in ("headway", "torch", "python"))
    if isinstance(card.get("git_commit"), str):
        yield "commit of Headway", card["git_commit"]
    yield "licence", LICENCE


def _losses(run: RunDir, card: dict[str, Any], spec: Spec, step: int) -> Iterable[tuple[str, str]]:
    """Losses of the newest validation up to the checkpoint, over all tokens and for each set. None of a damaged run."""
    if (damage := check_records(run.path).damage) is not None:
        console.warn(f"warning: README.md lacks the losses of the run: {damage}; restore {run.path} from a copy")
        return
    newest: dict[str, Any] | None = None
    for record in run.read_metrics() if run.metrics.exists() else ():
        if record.get("kind") == "validation" and isinstance(record.get("step"), int) and record["step"] <= step:
            newest = record
    if newest is None:
        return
    when = "" if newest["step"] == step else f", at step {newest['step']}"
    unit = loss_unit(spec.model_dump(mode="json", include={"data"}))
    yield "validation loss", _loss(newest, card.get("validation_bytes_per_token"), unit) + when
    facts, sets = card.get("validation_sets"), newest.get("sets")
    for name, found in (sets if isinstance(sets, dict) else {}).items():
        of_set = facts.get(name) if isinstance(facts, dict) else None
        per_byte = of_set.get("bytes_per_token") if isinstance(of_set, dict) else None
        yield f"validation loss, {name}", _loss(found, per_byte, PER_TOKEN if unit == PER_TOKEN else "nats") + when


def _loss(record: dict[str, Any], bytes_per_token: Any, unit: str) -> str:
    text = f"{record['loss']:.4f} {unit}"
    if isinstance(bytes_per_token, float | int) and bytes_per_token > 0:
        text += f", {bits_per_byte(record['loss'], bytes_per_token):.4f} bits per byte"
    low, high, documents = (record.get(key) for key in ("loss_low", "loss_high", "documents"))
    if isinstance(low, float) and isinstance(high, float) and isinstance(documents, int):
        text += f" (95 % interval over {documents:,} documents: {low:.4f} to {high:.4f} {unit})"
    return text


def _data(spec: Spec) -> str:
    """Names of the datasets. Their paths are those of one machine."""
    source = spec.data.source
    if isinstance(source, SyntheticSource):
        return f"synthetic, {source.task}"
    names = [Path(part.path).name for part in datasets_of(source)]
    return ", ".join(printable(name, 200) for name in names)


# ---------------------------------------------------------------- the study


def study_of(run: RunDir) -> Path | None:
    """The folder of the study whose cell the run is; None for a run of its own."""
    here = run.path.resolve()
    for folder in here.parents[:3]:
        if kind_of(folder) == "study" and here in [cell.resolve() for cell in cells_of(folder)]:
            return folder
    return None


def _study(run: RunDir) -> Iterable[str]:
    """The section on the study of the run: its variant beside the baseline."""
    folder = study_of(run)
    if folder is None:
        return
    from headway.launcher.compare.analyse import analyse

    try:
        result = analyse(folder)
    except HeadwayError as e:
        console.warn(f"warning: README.md lacks the numbers of the study: {e}")
        return
    here = run.path.resolve()
    cells = (*result.cells, *result.short_cells)
    cell = next((c for c in cells if c.record.path.resolve() == here), None)
    if cell is None:
        return
    rows = []
    for variant in result.variants:
        if variant.name not in (cell.variant, result.baseline.name):
            continue
        is_base = variant is result.baseline
        rows.append(
            (
                variant.name + (" (these weights)" if variant.name == cell.variant else ""),
                "baseline" if is_base else result.verdict(variant),
                str(len(variant.losses)),
                _interval(variant.loss),
                "baseline" if is_base else signed_interval(variant.difference),
            )
        )
    margin = "" if result.margin is None else f", with a margin of {result.margin} nats"
    tokens = "no finished cells" if result.tokens is None else result.when
    yield (
        f"## In the study {result.record['study']}\n\n"
        f"Variant {cell.variant}, seed {cell.seed}. Losses are validation losses in {result.unit}, {tokens}; "
        f"intervals are of 95 %, those of differences for all variants at once; pairing {result.pairing.status}"
        f"{margin}.\n\n"
    ) + _table(("variant", "verdict", "seeds", "loss", f"difference to {result.baseline.name}"), rows)


def _interval(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:.4f}" + ("" if found.low is None else f" [{found.low:.4f}, {found.high:.4f}]")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
