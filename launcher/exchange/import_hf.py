"""`headway import`: convert a Hugging Face Llama to weights for generation and training, with a spec of its model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, float32

from headway.data import tokenizer as tokenizers
from headway.launcher.base import console
from headway.launcher.base.errors import NoInputError, SpecError, printable
from headway.launcher.base.new_folder import new_folder, refuse_taken
from headway.launcher.exchange.export import readme, said
from headway.launcher.exchange.llama_check import differences, is_installed, load_library, load_llama, random_tokens
from headway.launcher.run.codec import token_of
from headway.launcher.run.run_dir import flatten
from headway.launcher.spec.merge import format_value
from headway.model.decoder import Decoder
from headway.model.huggingface import folder as hf
from headway.model.huggingface.folder import TensorFiles, WeightsError
from headway.model.huggingface.llama import LlamaShape, is_derived, llama_name, older_form, read_llama_config

SPEC = "model.yaml"
_DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16")
_PROBES = 100
"""Tokens that are tried as texts, if the tokenizer does not know the letter a."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def import_hf(source: Path, out: Path) -> int:
    """Write the Llama in the folder `source` into the new folder `out`: weights in fp32, config, tokenizer, spec.

    Its logits are compared with those of transformers if that is installed. Raises NoInputError if `source` is not a
    folder, WeightsError if it has another architecture or is incomplete, SpecError if `out` exists, HeadwayError if
    logits differ. After an error `out` does not exist.
    """
    if not source.is_dir():
        raise NoInputError(f"{source}: no such folder; name one with config.json and model.safetensors")
    refuse_taken(out, option="--to")
    raw = read_raw(source)
    if raw.get("format") == hf.FORMAT:
        raise SpecError(f"{source}: these weights are already in Headway's format; use them without import")
    decoder, shape, bos = read_llama(source, raw)
    with new_folder(out, option="--to") as folder:
        with console.progress("write tensors", lines=False):
            files = hf.write_tensors(folder, decoder.state_dict(), max_shard_bytes=hf.MAX_SHARD_BYTES)
        if (source / hf.TOKENIZER).exists():
            shutil.copyfile(source / hf.TOKENIZER, folder / hf.TOKENIZER)
            files.append(hf.TOKENIZER)
        exported = hf.ExportedConfig(
            source=f"LlamaForCausalLM of the folder {printable(source.resolve().name)}",
            model=shape.model,
            attention=shape.attention,
            vocab_size=shape.vocab_size,
            seq_len=shape.seq_len,
            tokens=0,
            bos_token_id=bos,
            eos_token_id=shape.eos_token_id,
            files={},
        )
        hf.write_exported(folder, exported, files)
        (folder / "README.md").write_text(readme(exported), encoding="utf-8")
        (folder / SPEC).write_text(_spec_text(exported, out, folder), encoding="utf-8")
        result = _compared(source, hf.load_exported(folder), shape, raw)
    parameters = sum(p.numel() for p in decoder.parameters())
    if console.wants_json():
        console.emit({"out": str(out), "parameters": parameters, "spec": str(out / SPEC), "check": result})
        return 0
    console.result(f"{out}: {parameters:,} parameters; {result}")
    console.say(f"to train from these weights, begin a spec with `base: {out / SPEC}`")
    return 0


def read_raw(source: Path) -> dict[str, Any]:
    """Contents of the config.json of a folder of weights. Raises WeightsError if there is none, or pickles only."""
    _refuse_pickles(source)
    return hf.read_config(source)


def read_llama(source: Path, raw: Mapping[str, Any]) -> tuple[Decoder, LlamaShape, int | None]:
    """(decoder in fp32 and evaluation mode, its shape, the token that begins every text or None) of a Llama.

    `raw`: contents of its config.json. Raises WeightsError if it has another architecture or is incomplete.
    """
    try:
        shape = read_llama_config(raw)
    except ValueError as e:
        raise WeightsError(f"{source / hf.CONFIG}: {_first(e)}") from None
    tensors = TensorFiles(source)
    decoder = hf.build_for(tensors, shape.model, shape.attention, vocab_size=shape.vocab_size)
    fill(decoder.eval().requires_grad_(False), tensors, shape)
    return decoder, shape, _first_token(source, shape)


def _compared(source: Path, decoder: Decoder, shape: LlamaShape, raw: Mapping[str, Any]) -> str:
    """Result of the comparison of logits with transformers, as text. Raises HeadwayError if they differ.

    Releases before 5 skip `rope_parameters` without a word, so they get the base in the form that they know.
    """
    if not is_installed():
        return "logits not compared: transformers is not installed"
    tokens = {"random": random_tokens(shape.vocab_size, shape.seq_len)}
    with console.progress("compare logits with transformers", lines=False):
        config = older_form(raw) if raw.get("rope_parameters") or raw.get("rope_scaling") else None
        llama = load_llama(source, load_library(), config=config)
        return said(differences(source, llama, decoder, tokens))


def _refuse_pickles(source: Path) -> None:
    if any((source / name).exists() for name in (hf.WEIGHTS, hf.INDEX)):
        return
    pickles = sorted(path.name for path in source.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise WeightsError(
            f"{source / pickles[0]}: is a pickle, and loading a pickle can execute code; use the safetensors version "
            "of the checkpoint, or ask its author for one"
        )


def fill(decoder: Decoder, files: TensorFiles, shape: LlamaShape) -> None:
    """Copy a Llama's tensors into the decoder. Raises WeightsError for missing or unknown tensors and wrong shapes."""
    state, source = decoder.state_dict(), files.folder
    wanted = {llama_name(name): tuple(tensor.shape) for name, tensor in state.items()}
    derived = {name for name in set(files) - set(wanted) if is_derived(name, files[name], shape)}
    files.check(wanted | {name: files.shape(name) for name in derived})
    with console.progress("read tensors", len(state), "tensors") as bar:
        for name, tensor in state.items():
            tensor.copy_(_as_fp32(files[llama_name(name)], llama_name(name), source))
            bar.update()
    head = llama_name("head")
    if head in derived and not bool((_as_fp32(files[head], head, source) == state["embedding"]).all()):
        raise WeightsError(
            f"{source}: {head} differs from the embedding, but config.json says that they are tied; use a complete "
            f"checkpoint, or fix tie_word_embeddings"
        )


def _as_fp32(tensor: Tensor, name: str, source: Path) -> Tensor:
    if str(tensor.dtype) not in _DTYPES:
        raise WeightsError(
            f"{source}: {name} is {tensor.dtype}; use a checkpoint in float32, or one in bfloat16 or float16"
        )
    if not bool(tensor.isfinite().all()):
        raise WeightsError(f"{source}: {name} has NaN or Inf values; restore the folder, or use another one")
    return tensor.to(float32)


def _first_token(source: Path, shape: LlamaShape) -> int | None:
    """The token that tokenizer.json puts before every text, or None. Raises WeightsError if the file does not fit."""
    file = source / hf.TOKENIZER
    if not file.exists():
        return None
    hf.read_small(file)
    if shape.eos_token_id is not None:
        token_of(file, shape.eos_token_id)
    tokenizer = tokenizers.open_file(file)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= shape.vocab_size:
        raise WeightsError(
            f"{file}: contains token {largest}, but config.json has a vocab_size of {shape.vocab_size}; use the "
            f"tokenizer of this checkpoint, or remove it"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for text in ("a", *sorted(tokenizer.get_vocab(with_added_tokens=False), key=len)[:_PROBES]):
        try:
            plain, whole = (tokenizer.encode(text, add_special_tokens=special).ids for special in (False, True))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # this text is not in its vocabulary
            continue
        begins = len(whole) > len(plain) and whole[1 : len(plain) + 1] == plain
        return whole[0] if begins else None
    raise WeightsError(
        f"{file}: cannot encode its own tokens; use the tokenizer of this checkpoint, or remove it to import the "
        "weights alone"
    )


def _spec_text(config: hf.ExportedConfig, out: Path, folder: Path) -> str:
    """Text of a spec with model, attention and init. The user adds the other sections."""
    model = config.model.model_dump(mode="json")
    attention = config.attention.model_dump(mode="json", exclude_defaults=True)
    sections = {
        "model": model,
        "attention": {"type": config.attention.type, **attention},
        # The spec is in the folder of the weights: this path leads there from the folder of the spec.
        "init": {"weights": f"../{out.resolve().name}", "sha256": hf.sha256_of(folder / hf.CONFIG)},
    }
    lines = [
        f"# The {config.source}. A spec that begins with `base: FOLDER/{SPEC}` starts from its weights.",
        f"# Add data (with this tokenizer, at most {config.seq_len} tokens per sequence), optimizer and train.",
    ]
    for section, values in sections.items():
        lines += ["", f"{section}:"]
        lines += [f"  {key}: {format_value(value)}" for key, value in flatten(values).items()]
    return "\n".join(lines) + "\n"


def _first(error: ValueError) -> str:
    """The first problem of a validation error, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    return str(error)
