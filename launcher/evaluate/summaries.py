"""Generated targets of pairs, such as summaries, compared with the given ones by ROUGE.

A prompt is continued as training showed it: prompt and separator, without a token before them. One that leaves no room
for the new tokens loses tokens at its end, as in training. Of an encoder-decoder, the encoder reads the prompt, and the
decoder continues the tokens that start a target. ROUGE is that of the package rouge-score (extra `eval`) with
Porter's stemmer: Lin, 2004, https://aclanthology.org/W04-1013.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from headway.data.config import DataError, PairsSource
from headway.data.corpus.config import SEPARATOR, PairsCorpus
from headway.data.manifest import MANIFEST_NAME, read_manifest
from headway.data.packed_pairs import shortened
from headway.launcher.base import console
from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.base.loss_unit import PER_TARGET
from headway.launcher.evaluate.measure import Measure, bootstrapped, ratio, share
from headway.launcher.evaluate.scorer import Scorer
from headway.launcher.evaluate.texts import TextSource, check_tokenizer, note_left_out, pair_row, start_and_source
from headway.launcher.exchange.opened import Opened
from headway.launcher.exchange.search import Search, search

INSTALL = "install it with `pip install -c constraints.txt rouge-score`"
ROUGES = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True, slots=True)
class Pair:
    """`prompt`: ids with those of the separator at their end. `target`: ids with that of the end."""

    prompt: list[int]
    target: list[int]
    text: str  # of the target


@dataclass(frozen=True, kw_only=True)
class Summaries:
    """What to continue and how. `fields`: those of prompt and target in files. `texts`: file for what was generated.

    `separator`: text between prompt and target of files; None: that of the model's own pairs.
    """

    sources: tuple[TextSource, ...]
    how: Search
    fields: tuple[str, str]
    texts: Path | None = None
    separator: str | None = None

    def check(self) -> None:
        """Raises SpecError if the package or pairs are missing, NoInputError without the file."""
        if self.texts is not None and not self.sources:
            raise SpecError("--texts-out: there is nothing to generate; name pairs with --summaries, or leave it out")
        if self.sources and importlib.util.find_spec("rouge_score") is None:
            raise SpecError(f"--summaries: needs the package rouge-score; {INSTALL}")
        if self.separator is not None and all(_is_dataset(source.path) for source in self.sources):
            raise SpecError("--separator: is for files of --summaries; a dataset of pairs has its own, so leave it out")
        for source in self.sources:
            if not source.path.exists():
                raise NoInputError(
                    f"--summaries {source.path}: no such file or folder; name a dataset of pairs or a file of them"
                )


def evaluate_summaries(
    model: Opened, source: TextSource, asked: Summaries, *, limit: int | None, done: Callable[[int], None]
) -> list[Measure]:
    """ROUGE-1, -2 and -L (mean F1, bootstrap intervals over pairs), the share of continuations that end, and the loss
    of the given targets, of the first `limit` pairs.

    Raises SpecError if the model knows no text or the new tokens do not fit it, DataError if a dataset has texts
    instead of pairs or another tokenizer.
    """
    pairs, separator = read_pairs(model, source, asked.fields, limit, text=asked.separator)
    prompts, sources = _prompts(model, pairs, separator, asked.how)
    room = (
        f"the encoder reads at most {model.source_limit} tokens, as in training"
        if sources is not None
        else f"{asked.how.tokens} new tokens fit the {_limit(model)} positions of a training sequence"
    )
    kept = [len(ids) for ids in prompts] if sources is None else [len(ids) + separator for ids in sources]
    if cut := sum(size < len(pair.prompt) for size, pair in zip(kept, pairs, strict=True)):
        console.note(f"note: {source.name}: {cut:,} of {len(pairs):,} prompts are cut at their end, so that {room}")
    found = search(model.model, prompts, asked.how, eos_id=model.codec.eos_id, sources=sources, done=done)
    given, generated = [pair.text for pair in pairs], [model.codec.decode([*each.ids]) for each in found]
    scores = rouge_scores(given, generated)
    if asked.texts is not None:
        _write(asked.texts, source.name, given, generated, scores)
    digest = xxhash.xxh64(repr(asked.how))
    for number, (ids, pair) in enumerate(zip(prompts, pairs, strict=True)):
        digest.update(repr((ids, pair.text) if sources is None else (sources[number], ids, pair.text)).encode())
    measures = [bootstrapped(f"{source.name}/{name}", values, unit="F1") for name, values in scores.items()]
    measures.append(share(f"{source.name}/ended", [each.ended for each in found], chance=None))
    return [*(replace(m, digest=digest.hexdigest()) for m in measures), _loss(model, source, pairs, separator)]


def read_pairs(
    model: Opened, source: TextSource, fields: tuple[str, str], limit: int | None, *, text: str | None = None
) -> tuple[list[Pair], int]:
    """(the first `limit` pairs of a source, tokens of the separator). Raises as `evaluate_summaries` does.

    `text`: the separator of files.
    """
    codec = model.codec
    if codec.tokenizer is None or codec.eos_id is None:
        raise SpecError(
            f"--summaries {source.path}: this model knows token ids, not text (synthetic data, or weights without a "
            "tokenizer); train it on text"
        )
    if _is_dataset(source.path):
        found, separator = _of_dataset(model, source.path)
    else:
        found, separator = _of_files(model, source.path, fields, _separator(model, source) if text is None else text)
    pairs = [*islice(found, limit)]
    if not pairs:
        raise DataError(f"{source.path}: has no pair; name another file or dataset")
    return pairs, separator


def _is_dataset(path: Path) -> bool:
    return (path / MANIFEST_NAME).is_file()


def _separator(model: Opened, source: TextSource) -> str:
    """That of the model's own pairs, or the default one, with a note if nothing says which one training had."""
    own = model.data
    if own is not None and isinstance(own.source, PairsSource):
        known = read_manifest(Path(own.source.path).expanduser()).pairs
        return SEPARATOR if known is None else known.separator
    if own is None and not model.is_encoder_decoder:
        console.note(
            f"note: {source.name}: weights do not say which separator their prompts had in training, so prompts end "
            f"with the default one, {SEPARATOR!r}; if training had another one, give it with --separator"
        )
    return SEPARATOR


def _of_dataset(model: Opened, root: Path) -> tuple[Iterator[Pair], int]:
    from headway.data.mds import MdsSplit

    manifest, codec = read_manifest(root), model.codec
    if manifest.pairs is None:
        raise DataError(
            f"--summaries {root}: is a dataset of texts, without targets; use --text {root}, or name a dataset that "
            "was built from pairs"
        )
    check_tokenizer(model, root, manifest)
    split = MdsSplit(root, "validation")

    def pairs() -> Iterator[Pair]:
        assert split.prompts is not None
        for number, end in enumerate(split.prompts.tolist()):
            ids = split.tokens(number).tolist()
            yield Pair(ids[:end], ids[end:], codec.decode(ids[end:-1]))

    return pairs(), len(manifest.pairs.separator_ids)


def _of_files(model: Opened, path: Path, fields: tuple[str, str], text: str) -> tuple[Iterator[Pair], int]:
    from headway.data.corpus.pairs import row_pairs
    from headway.data.corpus.read import find_files

    codec = model.codec
    assert codec.tokenizer is not None and codec.eos_id is not None
    corpus = PairsCorpus(type="pairs", paths=[str(path)], prompt=fields[0], target=fields[1], separator=text)
    (separator,), encode, eos_id = codec.tokenizer.encode([text]), codec.tokenizer.encode, codec.eos_id
    files = find_files(corpus)
    note_left_out(path, "pairs", files)

    def pairs() -> Iterator[Pair]:
        for row in row_pairs(corpus, files, keys=("--fields", "--fields")):
            if row.problem is not None or row.prompt_bytes is None:
                raise DataError(f"{row.origin}: is no pair ({row.problem}); remove it from {path}")
            prompt, target = row.text[: row.prompt_bytes], row.text[row.prompt_bytes + len(text.encode()) :]
            of_prompt, of_target = encode([prompt.decode(), target.decode()])
            yield Pair([*of_prompt, *separator], [*of_target, eos_id], target.decode())

    return pairs(), len(separator)


def _limit(model: Opened) -> int:
    return min(model.target_limit, model.positions or model.target_limit)


def _prompts(
    model: Opened, pairs: Sequence[Pair], separator: int, how: Search
) -> tuple[list[list[int]], list[list[int]] | None]:
    """(what the decoder continues, what the encoder of an encoder-decoder reads)."""
    if model.is_encoder_decoder:
        both = [start_and_source(model, pair.prompt, separator) for pair in pairs]
        longest = max(len(start) for start, _ in both)
        if longest + how.tokens - 1 > _limit(model):  # the last new token is not read
            raise SpecError(
                f"--new-tokens {how.tokens}: are more than the {_limit(model)} tokens of the decoder in a training "
                f"sequence, of which {longest} start a target; use at most {_limit(model) + 1 - longest}"
            )
        return [start for start, _ in both], [source for _, source in both]
    room = _limit(model) + 1 - how.tokens  # the last new token is not read
    if room < separator + 1:
        most = _limit(model) - separator
        raise SpecError(
            f"--new-tokens {how.tokens}: leaves no room for a prompt in the {_limit(model)} positions of a training "
            f"sequence; use at most {most}"
        )
    return [shortened(pair.prompt, separator, room) for pair in pairs], None


def _loss(model: Opened, source: TextSource, pairs: Sequence[Pair], separator: int) -> Measure:
    """Nats per target token of the given targets, their end included, as in training."""
    scorer = Scorer(model)
    predicted = scorer.score([pair_row(model, pair.prompt, pair.target, separator, scorer.limit) for pair in pairs])
    losses = ratio(
        f"{source.name}/loss", [-p.total for p in predicted], [len(p.log_p) for p in predicted], unit=PER_TARGET
    )
    return replace(losses, digest=scorer.digest)


def rouge_scores(given: Sequence[str], generated: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """F1 of each pair of texts, [pairs], by name. ROUGE-Lsum, by lines, only if a given text has several."""
    package: Any = importlib.import_module("rouge_score.rouge_scorer")
    names = [*ROUGES, *(["rougeLsum"] if any("\n" in text for text in given) else [])]
    scorer = package.RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(target, prediction) for target, prediction in zip(given, generated, strict=True)]
    return {name: np.array([score[name].fmeasure for score in scores], dtype=np.float64) for name in names}


def _write(
    file: Path, name: str, given: Sequence[str], generated: Sequence[str], scores: dict[str, NDArray[np.float64]]
) -> None:
    """Append a line of JSON for each pair."""
    with file.open("a", encoding="utf-8") as stream:
        for number, (target, text) in enumerate(zip(given, generated, strict=True)):
            row = {"of": name, "target": target, "generated": text}
            row |= {rouge: round(float(values[number]), 6) for rouge, values in scores.items()}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
