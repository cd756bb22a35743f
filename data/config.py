"""What a run says about its data, and what `headway data build` says about a corpus.

Sizes are in tokens unless a name says otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class StrictModel(BaseModel):
    """Frozen, keyword-only, refuses unknown keys and silent type changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataError(Exception):
    """A corpus, a tokenizer or a shard is not what it should be. The message says what to do next."""

    exit_code = 65


# ---------------------------------------------------------------- what a run reads


class MdsSource(StrictModel):
    """Tokenised shards made by `headway data build`."""

    type: Literal["mds"]
    path: str = Field(min_length=1, description="folder of the built dataset (or the local cache when `remote` is set)")
    remote: str | None = Field(default=None, description="where the dataset is fetched from, shard by shard, when set")


class SyntheticSource(StrictModel):
    """A seeded endless source whose loss floor is known exactly; needs no files.

    `mqar` is multi-query associative recall: `pairs` key-value pairs, then `queries` keys whose values are asked for.
    `copy` repeats a random string of `span` tokens; `induction` shows a random string of `span` different tokens, then
    `queries` of them again: the token after the second showing of a token is the one after its first showing. Only
    tokens that can be predicted carry a loss. Layout and math: `headway.data.synthetic`.
    """

    type: Literal["synthetic"]
    task: Literal["mqar", "copy", "induction"]
    vocab_size: int = Field(default=64, ge=8, le=65_536)
    pairs: int = Field(default=8, ge=1, description="mqar: key-value pairs shown")
    queries: int = Field(default=8, ge=1, description="mqar, induction: tokens asked for")
    span: int = Field(default=16, ge=1, description="copy: tokens to repeat; induction: tokens shown")

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


class DataConfig(StrictModel):
    """Where tokens come from and how they are packed into sequences."""

    source: Annotated[MdsSource | SyntheticSource, Field(discriminator="type")]
    seq_len: int = Field(ge=2, le=1 << 20, description="tokens per packed sequence")
    document_mask: bool = Field(default=True, description="a token never attends to or predicts into another document")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="order of the data; nothing else depends on it")
    workers: int = Field(default=1, ge=0, le=64, description="threads that prepare batches ahead; 0 prepares inline")
    prefetch: int = Field(default=2, ge=1, le=64, description="steps prepared ahead of the one being trained")
    shuffle_window: int = Field(default=8, ge=1, description="shards whose sequences are mixed with each other")
    retry_s: float = Field(
        default=5.0, ge=0, le=3600, description="a shard that cannot be read is tried again for so long"
    )
    timeout_s: float = Field(
        default=240.0,
        gt=0,
        le=86_400,
        description="a batch that does not come in so long, or in 4/5 of launch.hang_s or launch.timeout_s, is an "
        "error; needs workers >= 1",
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.retry_s >= self.timeout_s:
            raise ValueError(
                f"retry_s: a shard that is tried again for {self.retry_s:g} s outlasts timeout_s {self.timeout_s:g}, "
                f"which would not say why; use retry_s < {self.timeout_s:g} or timeout_s > {self.retry_s:g}"
            )
        if isinstance(self.source, SyntheticSource) and self.source.problem_length > self.seq_len + 1:
            need = self.source.problem_length - 1
            raise ValueError(
                f"seq_len: one {self.source.task} problem needs {need} tokens, more than seq_len {self.seq_len}; "
                f"use seq_len >= {need} or a smaller problem"
            )
        return self


# ---------------------------------------------------------------- what a corpus build reads


class StdlibCorpus(StrictModel):
    """The source of the Python standard library that runs Headway: real text on every machine."""

    type: Literal["stdlib"]


class TextCorpus(StrictModel):
    """Plain UTF-8 text files, one document each."""

    type: Literal["text"]
    paths: list[str] = Field(min_length=1, description="files, folders or glob patterns")


class JsonlCorpus(StrictModel):
    """JSON lines, one document a line; `.gz`, `.xz` and `.zst` are read as they are."""

    type: Literal["jsonl"]
    paths: list[str] = Field(min_length=1)
    field: str = "text"


class ParquetCorpus(StrictModel):
    """Parquet files, one document a row."""

    type: Literal["parquet"]
    paths: list[str] = Field(min_length=1)
    field: str = "text"


class HuggingFaceCorpus(StrictModel):
    """A dataset of the Hugging Face hub (needs `pip install 'headway[hf]'` and a network, or a local cache)."""

    type: Literal["huggingface"]
    dataset: str
    subset: str | None = None
    revision: str | None = Field(
        default=None, description="commit or tag of the dataset; set it to build the same twice"
    )
    split: str = "train"
    field: str = "text"


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


class CorpusConfig(StrictModel):
    """`headway data build`: text in, tokenizer and MDS shards and a manifest out."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    corpus: Annotated[
        StdlibCorpus | TextCorpus | JsonlCorpus | ParquetCorpus | HuggingFaceCorpus, Field(discriminator="type")
    ]
    tokenizer: Annotated[TrainTokenizer | TokenizerFile, Field(discriminator="type")]
    out: str | None = Field(default=None, description="folder of the dataset; default datasets/NAME")
    validation_fraction: float = Field(default=0.05, gt=0, lt=1, description="share of documents, chosen by hash")
    min_document_bytes: int = Field(default=1, ge=0, description="shorter documents are left out and counted")
    bad_documents: Literal["error", "skip"] = Field(
        default="error", description="what to do with a document that is empty or not UTF-8; `skip` counts them"
    )
    shard_bytes: int = Field(default=16 << 20, ge=4096, description="size limit of one shard, uncompressed")
    compression: Literal["zstd"] | None = Field(default=None, description="shards are compressed with zstd when set")

    def out_dir(self) -> Path:
        return Path(self.out or f"datasets/{self.name}")
