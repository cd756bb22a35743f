"""Config of the data of a run, and of a corpus for `headway data build`.

Sizes are in tokens unless the name has another unit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_VOCABULARY = 1 << 24  # tokens; the embedding has a row for each


class StrictModel(BaseModel):
    """Base of these configs: frozen, keyword-only; unknown keys and implicit type conversions are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataError(Exception):
    """A corpus, a tokenizer or a shard is invalid. The message says what to do next."""

    exit_code = 65


# ---------------------------------------------------------------- data of a run


def _checked_remote(remote: str | None) -> str | None:
    """Raise ValueError, which does not repeat the address, if it contains a secret or is no web address of a folder."""
    if remote is None:
        return None
    try:
        parts = urlsplit(remote)
        web, host = parts.scheme in ("http", "https"), parts.hostname
        _ = parts.port
    except ValueError:
        raise ValueError("is no address (host or port are malformed); write it as https://host/folder") from None
    if parts.password is not None or (web and parts.username is not None):
        raise ValueError(
            "contains a login, which run folders and messages would show; leave it out, and give the login for http(s) "
            "in ~/.netrc, or for other schemes as their client reads it (keys, variables in launch.env)"
        )
    if web and not host:
        raise ValueError("names no host; write it as https://host/folder")
    if web and (parts.query or parts.fragment):
        raise ValueError(
            "has a query (?) or a fragment (#), but it is the address of a folder, to which names of files are added; "
            "leave that out"
        )
    return remote


Remote = Annotated[
    str | None,
    AfterValidator(_checked_remote),
    Field(description="URL or folder from which shards are fetched on demand"),
]
CacheBytes = Annotated[
    int | None,
    Field(
        gt=0,
        description="size limit of the shards in `path`; those used least recently are deleted. none: no limit",
    ),
]


class Fetched(StrictModel):
    """A dataset, and the remote whose cache it is."""

    path: str = Field(min_length=1, description="folder of the built dataset (or the local cache when `remote` is set)")
    remote: Remote = None
    cache_bytes: CacheBytes = None

    @model_validator(mode="after")
    def _check_cache(self) -> Self:
        if self.cache_bytes is not None and self.remote is None:
            raise ValueError(
                "cache_bytes: limits the cache of a remote, and without a remote `path` is the dataset itself; set "
                "remote, or leave cache_bytes out"
            )
        return self


class MdsSource(Fetched):
    """Tokenized shards built by `headway data build`."""

    type: Literal["mds"]


class PairsSource(Fetched):
    """Pairs of a prompt and a target, from a dataset built from a corpus of pairs."""

    type: Literal["pairs"]
    loss: Literal["targets", "all"] = Field(default="targets", description="what is predicted; all: prompts too")
    long: Literal["cut", "leave_out"] = Field(
        default="cut",
        description="pairs of more than seq_len + 1 tokens. cut: their prompt loses its end, and those whose target "
        "alone is too long are left out and counted; leave_out: all of them are left out and counted",
    )


_SMALLEST_SHARE = 1 / 2048


class MixPart(Fetched):
    """A dataset of a mixture."""

    weight: float = Field(gt=0, description="share of the tokens, relative to the other weights")
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="default: the folder's")

    def title(self) -> str:
        """The name in records and reports."""
        return self.name or Path(self.path).name


class MixStage(StrictModel):
    """Other weights from a number of training tokens on."""

    from_tokens: int = Field(gt=0)
    weights: tuple[float, ...] = Field(description="one for each dataset, in their order; 0 leaves one out")


class MixSource(StrictModel):
    """Several datasets with one tokenizer, mixed by weights in tokens."""

    type: Literal["mix"]
    sources: tuple[MixPart, ...] = Field(min_length=2, max_length=256)
    stages: tuple[MixStage, ...] = ()

    @property
    def weights(self) -> tuple[float, ...]:
        """Those of the first stage."""
        return tuple(part.weight for part in self.sources)

    @model_validator(mode="after")
    def _check(self) -> MixSource:
        titles = [part.title() for part in self.sources]
        if twice := sorted({title for title in titles if titles.count(title) > 1}):
            raise ValueError(f"sources: two datasets are called {twice[0]}; give one of them a `name`")
        begins = [stage.from_tokens for stage in self.stages]
        if begins != sorted(set(begins)):
            raise ValueError("stages: from_tokens must increase from stage to stage")
        for weights in (self.weights, *(stage.weights for stage in self.stages)):
            if len(weights) != len(titles) or any(weight < 0 for weight in weights) or not any(weights):
                raise ValueError(
                    f"stages: weights {list(weights)} for {len(titles)} datasets; give one of at least 0 for each, and "
                    "not only zeros"
                )
            for title, weight in zip(titles, weights, strict=True):
                if 0 < weight < _SMALLEST_SHARE * sum(weights):
                    raise ValueError(
                        f"sources: {title} has {weight / sum(weights):.2e} of the weights; the smallest share is "
                        f"1/2048, so increase its weight or leave it out"
                    )
        return self


class SyntheticSource(StrictModel):
    """A seeded infinite source with an exactly known minimum loss. Needs no files.

    mqar: Multi-query associative recall: `pairs` key-value pairs, then `queries` of the keys; predict their values.
    copy: A random string of `span` tokens, then the same string again; predict the repetition.
    induction: A random string of `span` distinct tokens, then `queries` of them; predict the token that followed each
        one in the string.

    Only predictable tokens have a loss. Layout and math: `headway.data.synthetic`.
    """

    type: Literal["synthetic"]
    task: Literal["mqar", "copy", "induction"]
    vocab_size: int = Field(default=64, ge=8, le=65_536)
    pairs: int = Field(default=8, ge=1, description="mqar: number of key-value pairs")
    queries: int = Field(default=8, ge=1, description="mqar, induction: number of tokens to predict")
    span: int = Field(default=16, ge=1, description="copy: tokens to repeat; induction: length of the string")

    @model_validator(mode="after")
    def _check(self) -> SyntheticSource:
        if self.task == "mqar" and self.queries > self.pairs:
            raise ValueError(f"queries: {self.queries} is more than the {self.pairs} pairs; use queries <= pairs")
        keys = (self.vocab_size - 1) // 2
        if self.task == "mqar" and self.pairs > keys:
            raise ValueError(
                f"pairs: {self.pairs} different keys do not fit a vocabulary of {self.vocab_size}; "
                f"use pairs <= {keys} or vocab_size >= {2 * self.pairs + 1}"
            )
        if self.task == "induction" and self.span > self.vocab_size - 1:
            raise ValueError(
                f"span: {self.span} different tokens do not fit a vocabulary of {self.vocab_size}; "
                f"use span <= {self.vocab_size - 1} or vocab_size >= {self.span + 1}"
            )
        if self.task == "induction" and self.queries >= self.span:
            raise ValueError(
                f"queries: {self.queries} of {self.span} shown tokens, but the last one has no token after it; "
                f"use queries <= {self.span - 1} or span >= {self.queries + 1}"
            )
        return self

    @property
    def problem_length(self) -> int:
        """Tokens of one problem, answers included."""
        match self.task:
            case "mqar":
                return 2 * (self.pairs + self.queries)
            case "copy":
                return 2 * self.span + 1
            case "induction":
                return self.span + 2 * self.queries


Datasets = MdsSource | PairsSource | MixSource
AnySource = Datasets | SyntheticSource


def datasets_of(source: AnySource) -> tuple[MdsSource, ...]:
    """The datasets that a source reads; none for a synthetic one."""
    if isinstance(source, SyntheticSource):
        return ()
    parts = source.sources if isinstance(source, MixSource) else (source,)
    return tuple(MdsSource(type="mds", path=p.path, remote=p.remote, cache_bytes=p.cache_bytes) for p in parts)


def with_paths(source: Datasets, paths: Sequence[str]) -> Datasets:
    """The source with other paths of its datasets, in their order."""
    if isinstance(source, MdsSource | PairsSource):
        return source.model_copy(update={"path": paths[0]})
    parts = [part.model_copy(update={"path": path}) for part, path in zip(source.sources, paths, strict=True)]
    return source.model_copy(update={"sources": tuple(parts)})


ValidationName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]


class UnreachableError(DataError):
    """A remote did not give a file in a few attempts, but may do so later."""


class DataConfig(StrictModel):
    """Source of the tokens, packing into sequences, and loading."""

    source: Annotated[AnySource, Field(discriminator="type")]
    validation: dict[ValidationName, str] = Field(
        default_factory=dict,
        max_length=64,
        description="name -> folder of a dataset, whose validation split is evaluated beside the validation",
    )
    seq_len: int = Field(ge=2, le=1 << 20, description="tokens per packed sequence")
    encoder_tokens: int | None = Field(
        default=None,
        ge=1,
        description="model.type encoder_decoder: first tokens of each sequence, which the encoder reads; the decoder "
        "reads and predicts the others",
    )
    document_mask: bool = Field(default=True, description="a token never attends to or predicts into another document")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="seed of the data order only")
    workers: int = Field(default=1, ge=0, le=64, description="threads that prefetch batches; 0: no prefetching")
    prefetch: int = Field(default=2, ge=1, le=64, description="steps prepared ahead of the one being trained")
    shuffle_window: int = Field(default=8, ge=1, description="number of shards whose sequences are shuffled together")
    retry_s: float = Field(default=5.0, ge=0, le=3600, description="seconds to retry a shard that cannot be read")
    timeout_s: float = Field(
        default=240.0,
        gt=0,
        le=86_400,
        description="seconds after which waiting for a batch is an error, at most 4/5 of launch.hang_s and "
        "launch.timeout_s; needs workers >= 1",
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.retry_s >= self.timeout_s:
            raise ValueError(
                f"retry_s: retrying a shard for {self.retry_s:g} s exceeds timeout_s {self.timeout_s:g}, whose error "
                f"would hide the reason; use retry_s < {self.timeout_s:g} or timeout_s > {self.retry_s:g}"
            )
        if self.encoder_tokens is not None and self.encoder_tokens >= self.seq_len:
            raise ValueError(
                f"encoder_tokens: {self.encoder_tokens} leave the decoder none of the {self.seq_len} tokens of a "
                f"sequence; use at most {self.seq_len - 1}, or a larger seq_len"
            )
        if self.encoder_tokens is not None and isinstance(self.source, PairsSource):
            raise ValueError(
                "encoder_tokens: cuts sequences at one place, and sequences of source.type pairs hold several pairs; "
                "use a decoder, or source.type mds"
            )
        if isinstance(self.source, PairsSource) and not self.document_mask:
            raise ValueError("document_mask: false lets pairs attend to each other; use true with source.type pairs")
        if isinstance(self.source, SyntheticSource) and self.source.problem_length > self.seq_len + 1:
            need = self.source.problem_length - 1
            raise ValueError(
                f"seq_len: one {self.source.task} problem needs {need} tokens, more than seq_len {self.seq_len}; "
                f"use seq_len >= {need} or a smaller problem"
            )
        return self


# ---------------------------------------------------------------- corpus of a build


class StdlibCorpus(StrictModel):
    """The source code of the running Python's standard library: real text that is available on every machine."""

    type: Literal["stdlib"]


class BytePieces(StrictModel):
    """Documents of `bytes` bytes; a character is never cut."""

    bytes: int = Field(ge=16, le=32 << 20)


class TextCorpus(StrictModel):
    """Plain UTF-8 text files, one document each or cut into documents."""

    type: Literal["text"]
    paths: list[str] = Field(min_length=1, description="files, folders or glob patterns")
    document: Literal["file", "blank_line", "line"] | BytePieces = Field(
        default="file",
        description="what a document is: a file, a paragraph that ends at a blank line, a line, or `bytes: N`",
    )


class JsonlCorpus(StrictModel):
    """JSON lines, one document per line; `.gz`, `.xz` and `.zst` files are decompressed."""

    type: Literal["jsonl"]
    paths: list[str] = Field(min_length=1)
    field: str = "text"


class ParquetCorpus(StrictModel):
    """Parquet files, one document per row."""

    type: Literal["parquet"]
    paths: list[str] = Field(min_length=1)
    field: str = "text"


class _HubRows(StrictModel):
    """Which rows of a dataset of the Hugging Face hub (`pip install 'headway[hf]'`; a network, or a local cache)."""

    subset: str | None = None
    revision: str | None = Field(default=None, description="commit or tag; set it for reproducible builds")
    split: str = "train"


class HuggingFaceCorpus(_HubRows):
    """A dataset of the Hugging Face hub (needs `pip install 'headway[hf]'` and a network, or a local cache)."""

    type: Literal["huggingface"]
    dataset: str
    field: str = "text"


SEPARATOR = "\n\nSummary:\n"
Separator = Annotated[str, Field(max_length=1000, description="between prompt and target, as part of the prompt")]


class PairsCorpus(_HubRows):
    """Pairs of a prompt and a target, one per row of files (JSONL, Parquet) or of a dataset of the hub.

    With `article`, the target is the first line of a text that is not blank, and the prompt is the rest. Articles of
    one line are left out and counted.
    """

    type: Literal["pairs"]
    paths: list[str] | None = Field(default=None, min_length=1, description=".jsonl (compressed or not) and .parquet")
    dataset: str | None = Field(default=None, description="name of a dataset of the hub, instead of `paths`")
    prompt: str | None = Field(default=None, min_length=1, description="field of the prompt")
    target: str | None = Field(default=None, min_length=1, description="field of the target")
    article: str | None = Field(default=None, min_length=1, description="field of articles, instead of both")
    separator: Separator = SEPARATOR

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.paths is None) == (self.dataset is None):
            raise ValueError("give `paths` (files) or `dataset` (of the hub), one of them")
        if self.paths is not None and (self.subset, self.revision, self.split) != (None, None, "train"):
            raise ValueError("subset, revision, split: are of a dataset of the hub; leave them out beside `paths`")
        pair = (self.prompt is not None) + (self.target is not None)
        if pair != (0 if self.article is not None else 2):
            raise ValueError("give the fields `prompt` and `target`, or the field `article` alone")
        if self.prompt is not None and self.prompt == self.target:
            raise ValueError(f"target: {self.target!r} is the prompt too; name the field of the target")
        return self

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that are read of a row: that of the article, or those of prompt and target."""
        return tuple(field for field in (self.article, self.prompt, self.target) if field is not None)


class StdlibFunctionsCorpus(StrictModel):
    """Pairs that every machine has: functions of the standard library, and the first sentence of their docstring."""

    type: Literal["stdlib_functions"]
    separator: Separator = "\n\n# Summary:\n"


class TrainTokenizer(StrictModel):
    """Train a byte-level BPE tokenizer on the training documents of the corpus."""

    type: Literal["train_bpe"]
    vocab_size: int = Field(ge=257, le=1 << 20)
    max_train_bytes: int = Field(default=256 << 20, ge=1, description="bytes of text the merges are learned from")


class TokenizerFile(StrictModel):
    """Use a given `tokenizer.json` (Hugging Face tokenizers format)."""

    type: Literal["file"]
    path: str
    eos_token: str = Field(default="<|endoftext|>", description="the token that ends a document")
    lossy: Literal["refuse", "allow"] = Field(
        default="refuse", description="reaction to documents that their tokens do not give back"
    )


class ValidationPart(StrictModel):
    """Which documents are for validation, instead of some that are selected by hash. One of the keys is given."""

    last: float | None = Field(
        default=None, gt=0, lt=1, description="fraction of the text, by bytes, at the end of the corpus"
    )
    paths: list[str] | None = Field(
        default=None, min_length=1, description="own files, folders or glob patterns, of the type of the corpus"
    )
    split: str | None = Field(default=None, description="own split of a dataset of the hub")

    @model_validator(mode="after")
    def _one(self) -> ValidationPart:
        if sum(value is not None for value in (self.last, self.paths, self.split)) != 1:
            raise ValueError("give one of `last: 10%` (the end of the text), `paths` (own files) and `split` (hub)")
        return self


_LAST = re.compile(r"\s*(?:last\s+)?([0-9.]+)\s*%\s*")


def _last_part(value: object) -> object:
    """`last 10 %` and `last: 10%` as fractions."""
    if isinstance(value, str) and (found := _LAST.fullmatch(value)) and "last" in value:
        return {"last": float(found[1]) / 100}
    if isinstance(value, dict) and isinstance(last := value.get("last"), str) and (found := _LAST.fullmatch(last)):
        return {**value, "last": float(found[1]) / 100}
    return value


FileCorpus = StdlibCorpus | StdlibFunctionsCorpus | TextCorpus | JsonlCorpus | ParquetCorpus | PairsCorpus
AnyCorpus = FileCorpus | HuggingFaceCorpus


def is_of_hub(corpus: AnyCorpus) -> bool:
    """Whether a corpus has rows of a dataset of the hub, and no files."""
    return isinstance(corpus, HuggingFaceCorpus) or (isinstance(corpus, PairsCorpus) and corpus.dataset is not None)


def is_stdlib(corpus: AnyCorpus) -> bool:
    """Whether a corpus is made from the standard library of the running Python."""
    return isinstance(corpus, StdlibCorpus | StdlibFunctionsCorpus)


class CorpusConfig(StrictModel):
    """Config of `headway data build`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    corpus: Annotated[AnyCorpus, Field(discriminator="type")]
    tokenizer: Annotated[TrainTokenizer | TokenizerFile, Field(discriminator="type")]
    out: str | None = Field(default=None, description="folder of the dataset; default datasets/NAME")
    validation_fraction: float = Field(default=0.05, gt=0, lt=1, description="fraction of documents, selected by hash")
    validation: Annotated[ValidationPart | None, BeforeValidator(_last_part)] = Field(
        default=None,
        description="instead of validation_fraction: `last: 10%` of the text, `paths` of own files, or `split` of a "
        "dataset of the hub",
    )
    min_document_bytes: int = Field(default=1, ge=0, description="shorter documents are skipped and counted")
    bad_documents: Literal["error", "skip"] = Field(
        default="error", description="reaction to documents that are empty or not UTF-8; skip: skip and count them"
    )
    shard_bytes: int = Field(default=16 << 20, ge=4096, description="size limit of one shard, uncompressed")
    compression: Literal["zstd"] | None = Field(default=None, description="shards are compressed with zstd when set")

    @model_validator(mode="after")
    def _check_validation(self) -> CorpusConfig:
        if self.validation is None:
            return self
        if "validation_fraction" in self.model_fields_set:
            raise ValueError("validation_fraction: has no effect beside `validation`; remove one of them")
        hub = is_of_hub(self.corpus)
        has_files = not hub and not is_stdlib(self.corpus)
        if (self.validation.paths is not None and not has_files) or (self.validation.split is not None and not hub):
            raise ValueError(
                f"validation: a corpus of type {self.corpus.type} has no such validation; use "
                + ("`split: NAME` or " if hub else "`paths: [...]` or " if has_files else "")
                + "`last: 10%`, or validation_fraction"
            )
        return self

    def validation_corpus(self) -> AnyCorpus | None:
        """The corpus of the validation documents, if they have one of their own."""
        if self.validation is None or self.validation.last is not None or is_stdlib(self.corpus):
            return None
        return self.corpus.model_copy(update=self.validation.model_dump(exclude_none=True))

    @property
    def separator(self) -> str | None:
        """Text between prompt and target; None for a corpus of texts."""
        return self.corpus.separator if isinstance(self.corpus, PairsCorpus | StdlibFunctionsCorpus) else None

    def out_dir(self) -> Path:
        return Path(self.out or f"datasets/{self.name}")
