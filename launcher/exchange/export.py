"""`headway export`: write a run's weights for Hugging Face transformers, or with Headway's own config."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from headway.launcher.base import console
from headway.launcher.base.errors import HeadwayError, SpecError
from headway.launcher.base.new_folder import new_folder, refuse_taken
from headway.launcher.exchange.hf_check import (
    LENGTH,
    SEQUENCES,
    TOLERANCE,
    Difference,
    compare_continuation,
    differences,
    is_installed,
    load_library,
    load_llama,
    load_ours,
    random_tokens,
)
from headway.launcher.exchange.hf_tokenizer import compare_texts, load_reader, write_tokenizer
from headway.launcher.exchange.hub import Hub, Repository, repository
from headway.launcher.exchange.model_card import USE, model_card
from headway.launcher.run.codec import Codec
from headway.launcher.run.folders import find_run
from headway.launcher.run.run_dir import RunDir
from headway.launcher.run.stored_spec import stored_spec
from headway.launcher.run.weights import find_checkpoint, load_model
from headway.launcher.spec.encoder_decoder import decoders_only
from headway.launcher.spec.spec import Spec
from headway.model.convert.heads import fold_decoder
from headway.model.decoder import Decoder
from headway.model.huggingface import folder as hf
from headway.model.huggingface import form, llama
from headway.model.seq2seq.build import Model, probe_logits
from headway.parallel.checkpoint import Checkpoint
from headway.parallel.config import CheckpointError

MIN_SHARD_BYTES = 1 << 10
PROMPT, CONTINUATION = 16, 32
"""Tokens of the prompt and of its greedy continuation, which are compared with transformers."""
SPARE_BYTES = 64 << 20
"""Disk space for files other than tensors."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What is written: a run, its checkpoint and the model with its weights."""

    run: RunDir
    spec: Spec
    codec: Codec
    found: Checkpoint
    model: Model

    @property
    def decoder(self) -> Decoder:
        """The model, which `_write_hf` takes of a decoder only."""
        assert isinstance(self.model, Decoder)
        return self.model

    @property
    def origin(self) -> str:
        """Where the weights came from, for people."""
        spec = self.spec
        branch = "" if spec.init.run is None else f" (a branch of {spec.init.run})"
        run = f"run {spec.name}{branch}, attention {spec.attention.type}"
        return f"{run}, step {self.found.step}, {self.found.state['tokens']} tokens"

    def _of_pairs(self) -> dict[str, Any]:
        """What the config of an encoder-decoder has too."""
        if not self.spec.model.is_encoder_decoder:
            return {}
        start = self.codec.start_ids
        return {
            "encoder_tokens": self.spec.data.encoder_tokens,
            "target_start_ids": None if start is None else list(start),
        }

    def exported(self) -> hf.ExportedConfig:
        """The config of the folder, without its files."""
        assert self.spec.model.vocab_size is not None
        return hf.ExportedConfig(
            source=self.origin,
            model=self.spec.model,
            attention=self.spec.attention,
            vocab_size=self.spec.model.vocab_size,
            seq_len=self.spec.data.seq_len,
            tokens=int(self.found.state["tokens"]),
            bos_token_id=None,  # training puts no token before a text
            eos_token_id=self.codec.eos_id,
            **self._of_pairs(),
            files={},
        )


def export(
    path: Path,
    out: Path,
    *,
    to: Literal["hf", "safetensors"],
    step: int | None = None,
    max_shard_bytes: int = hf.MAX_SHARD_BYTES,
    push: str | None = None,
    public: bool = False,
) -> int:
    """Write the weights of a run's newest complete checkpoint, or of the checkpoint of `step`, to the new folder `out`.

    `to` hf: with the tokenizer, a LlamaForCausalLM where a Llama has the form of the model, else a HeadwayForCausalLM
    (`headway.hf`). Ids of texts, logits and a greedy continuation are compared if transformers is installed.
    `push`: a repository OWNER/NAME of the hub, to which the folder is uploaded; a new one is private unless `public`.

    Raises SpecError if `out` exists or `push` is no name, NoInputError if `path` is not a run, CheckpointError if the
    checkpoint is incomplete or of another run, DataError if the run's tokenizer is missing or transformers gives other
    ids, HeadwayError if logits or continuations differ, HubError if the hub refuses. After an error `out` does not
    exist; only if the upload itself fails, it is complete.
    """
    if max_shard_bytes < MIN_SHARD_BYTES:
        raise SpecError(f"--max-shard-bytes: {max_shard_bytes} is too small; use 5e9, or leave it out")
    target = _target(push, public=public)
    refuse_taken(out, option="OUT")
    run = find_run(path)
    spec = stored_spec(run)
    codec = Codec.of(spec, run)
    hub = None
    if target is not None:
        hub = Hub()
        hub.check_push(target, public=public)
    if to == "hf":
        decoders_only(spec, "--to hf (--to safetensors writes both types)")
    found = find_checkpoint(run, step)
    written = Written(run=run, spec=spec, codec=codec, found=found, model=load_model(spec, found))
    with new_folder(out, option="OUT") as folder:
        if to == "hf":
            architecture, result = _write_hf(folder, written, max_shard_bytes)
        else:
            architecture, result = "", _write_ours(folder, written, max_shard_bytes)
        card = model_card(run, spec, found, architecture=architecture, checked=result)
        (folder / "README.md").write_text(card, encoding="utf-8")
    facts: dict[str, Any] = {"out": str(out), "to": to, "attention": spec.attention.type, "step": found.step}
    facts |= {"bytes": sum(p.stat().st_size for p in out.iterdir()), "files": sorted(p.name for p in out.iterdir())}
    facts |= {"architecture": architecture or None, "check": result}
    if hub is not None and target is not None:
        facts["url"] = hub.push(out, target, public=public, message=f"Export of {written.origin}")
    if console.wants_json():
        console.emit(facts)
        return 0
    what = f"{architecture}, " if architecture else ""
    console.result(f"{out}: {what}{spec.attention.type} of step {found.step}, {facts['bytes'] / 1e6:,.1f} MB; {result}")
    if "url" in facts:
        console.result(f"uploaded to {facts['url']}" + ("" if public else " (private)"))
    return 0


def _target(push: str | None, *, public: bool) -> Repository | None:
    """The repository to upload to. Raises SpecError for a name that is none."""
    if push is None:
        if public:
            raise SpecError("--public: has an effect with --push OWNER/NAME only; add it, or leave out --public")
        return None
    target = repository(push, option="--push")
    if target.revision is not None:
        raise SpecError(f"--push: uploads go to the main branch; use {target.name}")
    return target


def _write_hf(folder: Path, written: Written, max_shard_bytes: int) -> tuple[str, str]:
    """Write a Llama, or Headway's own form. Returns (the architecture, the result of the comparison as text)."""
    spec, codec, decoder = written.spec, written.codec, written.decoder
    assert spec.model.vocab_size is not None
    note = ""
    try:
        config = llama.llama_config(
            spec.model,
            spec.attention,
            vocab_size=spec.model.vocab_size,
            seq_len=spec.data.seq_len,
            eos_token_id=codec.eos_id,
        )
    except ValueError:
        architecture, config = form.ARCHITECTURE, form.form_config(written.exported())
        tensors = {form.tensor_name(name): tensor for name, tensor in decoder.state_dict().items()}
    else:
        architecture = llama.ARCHITECTURE
        plain = decoder if llama.folded(spec.attention) is spec.attention else fold_decoder(decoder, spec.model)
        tensors = {llama.llama_name(name): tensor for name, tensor in plain.state_dict().items()}
        if spec.model.dropout:
            rate = f"{spec.model.dropout:g}"
            note = f"; without model.dropout {rate}, which acts in training and has no place in a Llama"
    _write_tensors(folder, tensors, max_shard_bytes)
    hf.write_json(folder / hf.CONFIG, config)
    ends = {"bos_token_id": None, "eos_token_id": codec.eos_id, "pad_token_id": None}
    hf.write_json(folder / "generation_config.json", ends)
    if codec.file is not None:
        write_tokenizer(folder, codec, seq_len=spec.data.seq_len)
    return architecture, _compared(folder, written, architecture) + note


def _compared(folder: Path, written: Written, architecture: str) -> str:
    """Compare what is read from `folder` with the run: ids of texts, logits, a greedy continuation.

    Returns the result as text. Raises DataError for other ids, HeadwayError for other logits or another continuation.
    """
    spec, codec, decoder = written.spec, written.codec, written.decoder
    validation, ours = validation_tokens(spec), architecture == form.ARCHITECTURE
    again = ""
    if ours:
        _check_equal(folder, form.load_form(folder, hf.read_config(folder))[0], decoder, validation)
        again = "the logits of the written weights equal the run's bit for bit; "
    if not is_installed():
        return f"{again}ids and logits not compared: transformers is not installed"
    vocab_size, seq_len = len(decoder.embedding), spec.data.seq_len
    library = load_library()
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
        model = (load_ours if ours else load_llama)(folder, library)
        ids = {"random": random_tokens(vocab_size, seq_len), "validation": validation}
        # Headway's own model is the same code with the same weights.
        found = differences(folder, model, decoder, ids, tolerance=0 if ours else TOLERANCE)
        tokens = max(1, min(CONTINUATION, seq_len - inputs["input_ids"].shape[1]))
        new = compare_continuation(folder, model, decoder, inputs, eos_id=codec.eos_id, tokens=tokens)
    return f"{again}{words}{said(found)}; equal greedy continuation of {new} tokens"


def said(found: dict[str, Difference]) -> str:
    """Result of the comparison of logits, as text."""
    return "largest difference from the logits of transformers: " + ", ".join(
        f"{difference} on {name} tokens" for name, difference in found.items()
    )


def _write_ours(folder: Path, written: Written, max_shard_bytes: int) -> str:
    codec = written.codec
    files = _write_tensors(folder, written.model.state_dict(), max_shard_bytes)
    if codec.file is not None:
        shutil.copyfile(codec.file, folder / hf.TOKENIZER)
        files.append(hf.TOKENIZER)
    hf.write_exported(folder, written.exported(), files)
    _check_equal(folder, hf.load_model(folder), written.model, validation_tokens(written.spec))
    return "the logits of the written weights equal the run's bit for bit"


def _check_equal(folder: Path, again: Model, model: Model, ids: Tensor) -> None:
    """Raise HeadwayError unless the model that was read back has the logits of the run on ids [B, S]."""
    with torch.no_grad():
        if not torch.equal(probe_logits(again, ids), probe_logits(model, ids)):
            raise HeadwayError(
                f"{folder}: the logits of the written weights differ from the run's; the folder was removed. Please "
                "report this with the spec"
            )


def readme(config: hf.ExportedConfig) -> str:
    """Text of README.md for a folder in Headway's own format that is not that of a run."""
    if config.model.is_encoder_decoder:
        source = f"{config.source[0].upper()}{config.source[1:]}"
        return (
            f"# Weights of a {config.attention.type} encoder-decoder\n\n{source}.\n\n"
            "safetensors in fp32; config.json holds `model` and `attention` and the sha256 of every file.\n\n"
            f"{USE['encoder_decoder']}"
        )
    return (
        f"# Weights of a {config.attention.type} decoder\n\n{config.source[0].upper()}{config.source[1:]}.\n\n"
        "safetensors in fp32; config.json holds the decoder's `model` and `attention` and the sha256 of every file.\n\n"
        f"{USE['']}"
    )


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
