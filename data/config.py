"""Config of the data of a run. That of a build is in `headway.data.corpus.config`.

Sizes are in tokens unless the name has another unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

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
        description="pairs of more than seq_len + 1 tokens, or for an encoder_decoder prompts of more than "
        "encoder_tokens. cut: their prompt loses its end, and those whose target alone is too long are left out and "
        "counted; leave_out: all of them are left out and counted",
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
        description="model.type encoder_decoder: first tokens of each sequence, which the encoder reads (of pairs: "
        "their prompts); the decoder reads and predicts the others",
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
        if self.encoder_tokens is not None and isinstance(self.source, PairsSource) and self.source.loss == "all":
            raise ValueError(
                "source.loss: all predicts prompts too, which the encoder of encoder_tokens reads; use targets, or a "
                "decoder"
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
