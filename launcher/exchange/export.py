"""`headway export`: write a run's weights as a Hugging Face Llama, or as safetensors with Headway's own config."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from headway.launcher.base import console
from headway.launcher.base.errors import HeadwayError, SpecError
from headway.launcher.base.new_folder import new_folder, refuse_taken
from headway.launcher.exchange.hf_tokenizer import compare_texts, load_reader, write_tokenizer
from headway.launcher.exchange.llama_check import (
    LENGTH,
    SEQUENCES,
    Difference,
    compare_continuation,
    differences,
    is_installed,
    load_library,
    load_llama,
    random_tokens,
)
from headway.launcher.run.codec import Codec
from headway.launcher.run.folders import find_run
from headway.launcher.run.stored_spec import stored_spec
from headway.launcher.run.weights import find_checkpoint, load_decoder
from headway.launcher.spec.spec import Spec
from headway.model.convert import fold_decoder
from headway.model.decoder import Decoder
from headway.model.huggingface import folder as hf
from headway.model.huggingface.llama import folded, llama_config, llama_name
from headway.parallel.checkpoint import Checkpoint
from headway.parallel.config import CheckpointError

MIN_SHARD_BYTES = 1 << 10
PROMPT, CONTINUATION = 16, 32
"""Tokens of the prompt and of its greedy continuation, which are compared with transformers."""
SPARE_BYTES = 64 << 20
"""Disk space for files other than tensors."""


def export(
    path: Path,
    out: Path,
    *,
    to: Literal["hf", "safetensors"],
    step: int | None = None,
    max_shard_bytes: int = hf.MAX_SHARD_BYTES,
) -> int:
    """Write the weights of a run's newest complete checkpoint, or of the checkpoint of `step`, to the new folder `out`.

    `to` hf: a LlamaForCausalLM with its tokenizer. Ids of texts, logits and a greedy continuation are compared if
    transformers is installed. Raises SpecError if a Llama cannot express the mechanism or `out` exists, NoInputError if
    `path` is not a run, CheckpointError if the checkpoint is incomplete or of another run, DataError if the run's
    tokenizer is missing or transformers gives other ids, HeadwayError if logits or continuations differ. After an error
    `out` does not exist.
    """
    if max_shard_bytes < MIN_SHARD_BYTES:
        raise SpecError(f"--max-shard-bytes: {max_shard_bytes} is too small; use 5e9, or leave it out")
    refuse_taken(out, option="OUT")
    run = find_run(path)
    spec = stored_spec(run)
    codec = Codec.of(spec, run)
    if to == "hf":
        _llama_config(spec, codec)
    found = find_checkpoint(run, step)
    decoder = load_decoder(spec, found)
    with new_folder(out, option="OUT") as folder:
        if to == "hf":
            result = _write_llama(folder, spec, found, decoder, codec, max_shard_bytes)
        else:
            result = _write_ours(folder, spec, found, decoder, codec, max_shard_bytes)
    size = sum(p.stat().st_size for p in out.iterdir())
    if console.wants_json():
        facts = {"out": str(out), "to": to, "attention": spec.attention.type, "step": found.step, "bytes": size}
        console.emit({**facts, "files": sorted(p.name for p in out.iterdir()), "check": result})
        return 0
    console.result(f"{out}: {spec.attention.type} of step {found.step}, {size / 1e6:,.1f} MB; {result}")
    return 0


def _llama_config(spec: Spec, codec: Codec) -> dict[str, Any]:
    assert spec.model.vocab_size is not None
    try:
        return llama_config(
            spec.model,
            spec.attention,
            vocab_size=spec.model.vocab_size,
            seq_len=spec.data.seq_len,
            eos_token_id=codec.eos_id,
        )
    except ValueError as e:
        raise SpecError(f"--to hf: {e}") from None


def _write_llama(
    folder: Path, spec: Spec, found: Checkpoint, decoder: Decoder, codec: Codec, max_shard_bytes: int
) -> str:
    plain = decoder if folded(spec.attention) is spec.attention else fold_decoder(decoder, spec.model)
    tensors = {llama_name(name): tensor for name, tensor in plain.state_dict().items()}
    _write_tensors(folder, tensors, max_shard_bytes)
    config = _llama_config(spec, codec)
    hf.write_json(folder / hf.CONFIG, config)
    ends = {"bos_token_id": None, "eos_token_id": codec.eos_id, "pad_token_id": None}
    hf.write_json(folder / "generation_config.json", ends)
    if codec.file is not None:
        write_tokenizer(folder, codec, seq_len=spec.data.seq_len)
    result = _compared(folder, spec, decoder, codec)
    if spec.model.dropout:
        result += f"; without model.dropout {spec.model.dropout:g}, which acts in training and has no place in a Llama"
    text = f"LlamaForCausalLM of {_origin(spec, found)}.\n\nWritten by `headway export --to hf`; {result}.\n"
    (folder / "README.md").write_text(f"# {spec.name}\n\n{text}", encoding="utf-8")
    return result


def _compared(folder: Path, spec: Spec, decoder: Decoder, codec: Codec) -> str:
    """Compare what transformers reads from `folder` with the run: ids of texts, logits, a greedy continuation.

    Returns the result as text. Raises DataError for other ids, HeadwayError for other logits or another continuation.
    """
    if not is_installed():
        return "ids and logits not compared: transformers is not installed"
    vocab_size, seq_len = len(decoder.embedding), spec.data.seq_len
    library, validation = load_library(), validation_tokens(spec)
    words, prompt = "", validation[:1, : max(1, min(PROMPT, seq_len // 2))]
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    if codec.tokenizer is not None:
        with console.progress("compare ids of texts with transformers", lines=False):
            reader = load_reader(folder, library)
            rows = [*validation.tolist(), *prompt.tolist()]
            texts = [codec.decode([i for i in row if i != codec.eos_id]) for row in rows]
            words = f"transformers gives equal ids for {compare_texts(reader, codec, texts)} texts, "
        if codec.tokenizer.encode(texts[-1:])[0]:
            inputs = dict(reader(texts[-1], return_tensors="pt"))
    with console.progress("compare logits with transformers", lines=False):
        llama = load_llama(folder, library)
        found = differences(
            folder, llama, decoder, {"random": random_tokens(vocab_size, seq_len), "validation": validation}
        )
        tokens = max(1, min(CONTINUATION, seq_len - inputs["input_ids"].shape[1]))
        new = compare_continuation(folder, llama, decoder, inputs, eos_id=codec.eos_id, tokens=tokens)
    return f"{words}{said(found)}; equal greedy continuation of {new} tokens"


def said(found: dict[str, Difference]) -> str:
    """Result of the comparison of logits, as text."""
    return "largest difference from the logits of transformers: " + ", ".join(
        f"{difference} on {name} tokens" for name, difference in found.items()
    )


def _write_ours(
    folder: Path, spec: Spec, found: Checkpoint, decoder: Decoder, codec: Codec, max_shard_bytes: int
) -> str:
    assert spec.model.vocab_size is not None
    files = _write_tensors(folder, decoder.state_dict(), max_shard_bytes)
    if codec.file is not None:
        shutil.copyfile(codec.file, folder / hf.TOKENIZER)
        files.append(hf.TOKENIZER)
    config = hf.ExportedConfig(
        source=_origin(spec, found),
        model=spec.model,
        attention=spec.attention,
        vocab_size=spec.model.vocab_size,
        seq_len=spec.data.seq_len,
        tokens=int(found.state["tokens"]),
        bos_token_id=None,
        eos_token_id=codec.eos_id,
        files={},
    )
    hf.write_exported(folder, config, files)
    (folder / "README.md").write_text(readme(config), encoding="utf-8")
    ids = validation_tokens(spec)
    again = hf.load_exported(folder)
    with torch.no_grad():
        if not torch.equal(again.logits(ids), decoder.logits(ids)):
            raise HeadwayError(
                f"{folder}: the logits of the written weights differ from the run's; the folder was removed. Please "
                "report this with the spec"
            )
    return "the logits of the written weights equal the run's bit for bit"


def readme(config: hf.ExportedConfig) -> str:
    """Text of README.md for a folder in Headway's own format."""
    return (
        f"# Weights of a {config.attention.type} decoder\n\n{config.source[0].upper()}{config.source[1:]}.\n\n"
        "safetensors in fp32; config.json holds the decoder's `model` and `attention` and the sha256 of every file.\n\n"
        "    from headway.model.huggingface.folder import load_exported\n\n"
        '    decoder = load_exported("FOLDER")      # reads tensors and JSON; executes no code from the folder\n'
        "    logits = decoder.logits(tokens)        # tokens [B, S] int64 -> [B, S, V]\n\n"
        '`headway generate FOLDER "prompt"` continues text. A spec with `init.weights: FOLDER` starts from them.\n'
    )


def _origin(spec: Spec, found: Checkpoint) -> str:
    branch = "" if spec.init.run is None else f" (a branch of {spec.init.run})"
    run = f"run {spec.name}{branch}, attention {spec.attention.type}"
    return f"{run}, step {found.step}, {found.state['tokens']} tokens"


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[str]:
    """Write tensors, read them back and compare. Raises CheckpointError if the disk is full or a tensor differs."""
    need = sum(t.numel() * t.element_size() for t in tensors.values()) + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < need:
        raise CheckpointError(
            f"{folder.parent}: {free / 1e9:.2f} GB free, {need / 1e9:.2f} GB needed; free space, or use another folder"
        )
    with console.progress("write tensors", len(tensors), "tensors") as bar:
        names = hf.write_tensors(folder, tensors, max_shard_bytes=max_shard_bytes)
        bar.name("read tensors back")
        back = hf.TensorFiles(folder)
        back.check({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            if not torch.equal(back[name], tensor):
                raise CheckpointError(
                    f"{folder}: {name} has other values when read back; check the disk, and export again"
                )
            bar.update()
    return names


def validation_tokens(spec: Spec) -> Tensor:
    """Tokens of the run's validation data, int64 of shape [at most SEQUENCES, at most LENGTH]."""
    from headway.data.loader import validation_batches

    batches = validation_batches(
        spec.data, tokens=SEQUENCES * spec.data.seq_len, micro_batch=SEQUENCES, dp_rank=0, dp_size=1
    )
    return batches[0].tokens[:, :LENGTH].long()
