"""`headway import`: convert a model of Hugging Face's format to weights for generation and training, with a spec."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import equal, no_grad

from headway.data import tokenizer as tokenizers
from headway.launcher.base import console
from headway.launcher.base.errors import HeadwayError, NoInputError, SpecError, printable
from headway.launcher.base.new_folder import new_folder, refuse_taken
from headway.launcher.exchange.export import readme, said
from headway.launcher.exchange.hf_check import (
    differences,
    is_installed,
    load_library,
    load_llama,
    load_ours,
    random_tokens,
)
from headway.launcher.exchange.hub import Hub, is_remote, repository
from headway.launcher.exchange.import_t5 import compare_t5, read_t5
from headway.launcher.run.codec import token_of
from headway.launcher.run.run_dir import brief, flatten
from headway.launcher.spec.merge import format_value
from headway.model.decoder import Decoder
from headway.model.huggingface import folder as hf
from headway.model.huggingface import form, llama, t5
from headway.model.huggingface.folder import TensorFiles, WeightsError, as_fp32
from headway.model.huggingface.llama import LlamaShape, is_derived, llama_name, older_form, read_llama_config
from headway.model.huggingface.values import first_problem
from headway.model.seq2seq.build import Model, probe_logits
from headway.model.seq2seq.model import EncoderDecoder

SPEC = "model.yaml"
_PROBES = 100
"""Tokens that are tried as texts, if the tokenizer does not know the letter a."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """What a folder holds: a model in fp32, and its config. `llama`: the shape of a Llama; None for other forms."""

    model: Model
    exported: hf.ExportedConfig
    llama: LlamaShape | None

    @property
    def decoder(self) -> Decoder:
        """The model, if it is a decoder. Raises WeightsError."""
        return hf.the_decoder(self.model, self.exported.source)


def import_hf(source: Path | str, out: Path) -> int:
    """Write the weights of `source` into the new folder `out`: in fp32, with config, tokenizer and spec.

    `source`: a folder with a Llama, a T5 or a HeadwayForCausalLM, or hf://OWNER/NAME[@REVISION] of the Hugging Face
    hub, which may hold Headway's own format too. Logits are compared with those of transformers if that is installed.
    Raises NoInputError if `source` is not there, WeightsError if it has another architecture or is incomplete,
    SpecError if `out` exists, HeadwayError if logits differ, HubError if the hub refuses. After an error `out` does not
    exist.
    """
    refuse_taken(out, option="--to")
    if is_remote(source):
        with Hub().downloaded(repository(source, option="FOLDER"), out) as (folder, repo):
            return _import(folder, out, name=str(repo))
    folder = Path(source)
    if not folder.is_dir():
        raise NoInputError(
            f"{source}: no such folder; name one with config.json and model.safetensors, or hf://OWNER/NAME"
        )
    return _import(folder, out, name=None)


def _import(source: Path, out: Path, *, name: str | None) -> int:
    """`name`: what `source` was downloaded from."""
    raw = read_raw(source)
    if raw.get("format") == hf.FORMAT:
        if name is None:
            raise SpecError(f"{source}: these weights are already in Headway's format; use them without import")
        exported = hf.read_exported(source)
        foreign = Foreign(model=hf.load_model(source), exported=exported, llama=None)
        what = f"{name}: {exported.source}"
    else:
        foreign = read_foreign(source, raw)
        kind = llama.ARCHITECTURE if foreign.llama else t5.ARCHITECTURE if t5.is_t5(raw) else form.ARCHITECTURE
        what = f"{kind} of " + (name or f"the folder {printable(source.resolve().name)}")
    model, exported = foreign.model, foreign.exported.model_copy(update={"source": what})
    with new_folder(out, option="--to") as folder:
        with console.progress("write tensors", lines=False):
            files = hf.write_tensors(folder, model.state_dict(), max_shard_bytes=hf.MAX_SHARD_BYTES)
        if (source / hf.TOKENIZER).exists():
            shutil.copyfile(source / hf.TOKENIZER, folder / hf.TOKENIZER)
            files.append(hf.TOKENIZER)
        hf.write_exported(folder, exported, files)
        (folder / "README.md").write_text(readme(exported), encoding="utf-8")
        (folder / SPEC).write_text(spec_text(exported, out, folder), encoding="utf-8")
        again = hf.load_model(folder)
        result = _compared(source, again, foreign, raw)
    parameters = sum(p.numel() for p in model.parameters())
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


def read_foreign(source: Path, raw: Mapping[str, Any]) -> Foreign:
    """A Llama, a T5, or a model in Headway's own form of Hugging Face's format. `raw`: contents of its config.json.

    Raises WeightsError if it has another architecture or is incomplete.
    """
    if form.is_form(raw):
        decoder, exported = form.load_form(source, raw)
        _check_tokenizer(source, exported.eos_token_id, exported.vocab_size)
        return Foreign(model=decoder, exported=exported, llama=None)
    if t5.is_t5(raw):
        model, exported = read_t5(source, raw)
        _check_tokenizer(source, exported.eos_token_id, exported.vocab_size)
        return Foreign(model=model, exported=exported, llama=None)
    decoder, shape, bos = read_llama(source, raw)
    exported = hf.ExportedConfig(
        source=f"LlamaForCausalLM in {printable(str(source), 300)}",
        model=shape.model,
        attention=shape.attention,
        vocab_size=shape.vocab_size,
        seq_len=shape.seq_len,
        tokens=0,
        bos_token_id=bos,
        eos_token_id=shape.eos_token_id,
        files={},
    )
    return Foreign(model=decoder, exported=exported, llama=shape)


def read_llama(source: Path, raw: Mapping[str, Any]) -> tuple[Decoder, LlamaShape, int | None]:
    """(decoder in fp32 and evaluation mode, its shape, the token that begins every text or None) of a Llama.

    `raw`: contents of its config.json. Raises WeightsError if it has another architecture or is incomplete.
    """
    try:
        shape = read_llama_config(raw)
    except ValueError as e:
        raise WeightsError(f"{source / hf.CONFIG}: {first_problem(e)}") from None
    tensors = TensorFiles(source)
    decoder = hf.the_decoder(hf.build_for(tensors, shape.model, shape.attention, vocab_size=shape.vocab_size), source)
    fill(decoder.eval().requires_grad_(False), tensors, shape)
    return decoder, shape, _first_token(source, shape)


def _compared(source: Path, model: Model, foreign: Foreign, raw: Mapping[str, Any]) -> str:
    """Result of the comparison of logits with transformers, as text. Raises HeadwayError if they differ.

    Releases before 5 skip `rope_parameters` without a word, so they get the base in the form that they know.
    """
    exported, shape = foreign.exported, foreign.llama
    tokens = {"random": random_tokens(exported.vocab_size, exported.seq_len)}
    if raw.get("format") == hf.FORMAT:
        with no_grad():
            if not equal(probe_logits(model, tokens["random"]), probe_logits(foreign.model, tokens["random"])):
                raise HeadwayError(f"{source}: logits differ after the import; nothing was written. Please report this")
        return "the logits of the written weights equal those of the repository bit for bit"
    if not is_installed():
        return "logits not compared: transformers is not installed"
    with console.progress("compare logits with transformers", lines=False):
        library = load_library()
        if isinstance(model, EncoderDecoder):
            return said(compare_t5(source, model, exported, library))
        decoder = hf.the_decoder(model, source)
        if shape is None:
            return said(differences(source, load_ours(source, library), decoder, tokens, tolerance=0))
        config = older_form(raw) if raw.get("rope_parameters") or raw.get("rope_scaling") else None
        return said(differences(source, load_llama(source, library, config=config), decoder, tokens))


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
            tensor.copy_(as_fp32(files[llama_name(name)], llama_name(name), source))
            bar.update()
    head = llama_name("head")
    if head in derived and not bool((as_fp32(files[head], head, source) == state["embedding"]).all()):
        raise WeightsError(
            f"{source}: {head} differs from the embedding, but config.json says that they are tied; use a complete "
            f"checkpoint, or fix tie_word_embeddings"
        )


def _check_tokenizer(source: Path, eos_id: int | None, vocab_size: int) -> Any:
    """The tokenizer of the folder, or None without one. Raises WeightsError if it does not fit."""
    file = source / hf.TOKENIZER
    if not file.exists():
        return None
    hf.read_small(file)
    if eos_id is not None:
        token_of(file, eos_id)
    tokenizer = tokenizers.open_file(file)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise WeightsError(
            f"{file}: contains token {largest}, but config.json has a vocab_size of {vocab_size}; use the "
            f"tokenizer of this checkpoint, or remove it"
        )
    return tokenizer


def _first_token(source: Path, shape: LlamaShape) -> int | None:
    """The token that tokenizer.json puts before every text, or None. Raises WeightsError if the file does not fit."""
    tokenizer = _check_tokenizer(source, shape.eos_token_id, shape.vocab_size)
    if tokenizer is None:
        return None
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
        f"{source / hf.TOKENIZER}: cannot encode its own tokens; use the tokenizer of this checkpoint, or remove it to "
        "import the weights alone"
    )


def spec_text(config: hf.ExportedConfig, out: Path, folder: Path) -> str:
    """Text of a spec with model, attention and init, for the folder `out`. The user adds the other sections.

    `folder`: where the weights lie now, with their config.json.
    """
    sections = {
        "model": config.model.model_dump(mode="json"),
        "attention": brief(config.attention),
        # The spec is in the folder of the weights: this path leads there from the folder of the spec.
        "init": {"weights": f"../{out.resolve().name}", "sha256": hf.sha256_of(folder / hf.CONFIG)},
    }
    lines = [
        f"# The {config.source}. A spec that begins with `base: FOLDER/{SPEC}` starts from its weights.",
        f"# Add data (with this tokenizer, at most {config.seq_len} tokens per sequence), optimizer and train.",
    ]
    if config.model.is_encoder_decoder:
        lines.append("# data.encoder_tokens says how many tokens of a sequence the encoder reads.")
    for section, values in sections.items():
        lines += ["", f"{section}:"]
        lines += [f"  {key}: {format_value(value)}" for key, value in flatten(values).items()]
    return "\n".join(lines) + "\n"
