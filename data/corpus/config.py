"""What a dataset is built from: corpora, tokenizer, validation (the file of `headway data build`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from headway.data.config import StrictModel


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
    shard_bytes: int = Field(
        default=16 << 20, ge=4096, lt=1 << 32, description="size limit of one shard, uncompressed; below 4 GiB"
    )  # offsets in a shard are uint32
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
