"""Log-probabilities of given tokens under a model, in batches.

A row is a sequence of token ids, of which those from `first` on are predicted. Rows longer than the model's limit are
cut into windows: every token is predicted once, and the last window has as much context as fits. Shorter rows are
padded at their end, which changes nothing for a causal model. An encoder-decoder reads the source of a row too, whose
padding it does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from numpy.typing import NDArray

from headway.launcher.exchange.steps import padded

if TYPE_CHECKING:
    import torch

    from headway.launcher.exchange.opened import Opened

BATCH_TOKENS = 4096
"""Tokens of a batch, with padding."""
_HEAD_ROWS = 1024
"""Predictions whose logits are held at once."""
_SHARED = 32
"""Tokens of a context from which it is worth to compute it once for several continuations (on a CPU)."""


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids, at least two; those from `first` on, at least 1, are predicted.

    source: What the encoder of an encoder-decoder reads, at least one id; empty for a decoder.
    """

    ids: Sequence[int]
    first: int
    source: Sequence[int] = ()

    @property
    def inputs(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the model reads: the source, and all tokens except for the last one."""
        return tuple(self.source), tuple(self.ids[:-1])


@dataclass(frozen=True, slots=True)
class Predicted:
    """For each predicted token its log-probability in nats, and whether it was the most likely one."""

    log_p: NDArray[np.float64]
    best: NDArray[np.bool_]

    @property
    def total(self) -> float:
        return float(self.log_p.sum())


def windows(length: int, first: int, limit: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end) of each window: inputs are the tokens begin .. end - 2, predicted are those first .. end - 1.

    A window has at most `limit` inputs. All predictions together are those of `first` .. length - 1, each once.
    """
    while first < length:
        end = min(length, max(first + limit, limit + 1))
        yield max(0, end - 1 - limit), first, end
        first = end


class Scorer:
    """Scores rows with a model. `limit`: the most input tokens of a pass (of an encoder-decoder: of its decoder); by
    default those of a training sequence.
    """

    def __init__(self, model: Opened, *, limit: int | None = None, batch_tokens: int = BATCH_TOKENS) -> None:
        self._model = model.model
        most = limit or model.target_limit
        self.limit = min(most, model.positions or most)
        self._batch_tokens = batch_tokens
        self._device = next(model.model.parameters()).device
        self._digest = xxhash.xxh64(f"limit {self.limit}")

    @property
    def digest(self) -> str:
        """Hash of all rows that were scored, and of the limit."""
        return self._digest.hexdigest()

    def score(self, rows: Sequence[Row], done: Callable[[int], None] = lambda tokens: None) -> list[Predicted]:
        """The predictions of each row, in the given order. `done` is told how many tokens were predicted."""
        parts: list[Row] = []
        owners: list[int] = []
        for number, row in enumerate(rows):
            self._digest.update(np.array([row.first, *row.ids], dtype="<i8").tobytes())
            if row.source:
                self._digest.update(np.array([-1, *row.source], dtype="<i8").tobytes())
            for begin, first, end in windows(len(row.ids), row.first, self.limit):
                parts.append(Row(row.ids[begin:end], first - begin, row.source))
                owners.append(number)
        found: list[Predicted | None] = [None] * len(parts)
        alone, groups = self._grouped(parts)
        for group in groups:
            for number, predicted in zip(group, self._after_one_context([parts[i] for i in group]), strict=True):
                found[number] = predicted
                done(len(predicted.log_p))
        for batch in self._batches(parts, alone):
            for number, predicted in zip(batch, self._together([parts[i] for i in batch]), strict=True):
                found[number] = predicted
                done(len(predicted.log_p))
        whole: list[list[Predicted]] = [[] for _ in rows]
        for owner, predicted in zip(owners, found, strict=True):
            assert predicted is not None
            whole[owner].append(predicted)
        return [_joined(predicted) for predicted in whole]

    def _grouped(self, parts: list[Row]) -> tuple[list[int], list[list[int]]]:
        """Rows to be computed whole, and groups that share a context of some length, which is computed once."""
        from headway.model.decoder import Decoder

        if self._device.type != "cpu" or not isinstance(self._model, Decoder):
            return [*range(len(parts))], []
        by_context: dict[tuple[int, ...], list[int]] = {}
        for number, part in enumerate(parts):
            by_context.setdefault(tuple(part.ids[: part.first]), []).append(number)
        alone: list[int] = []
        groups: list[list[int]] = []
        for context, members in by_context.items():
            inputs = {tuple(parts[i].ids[:-1]) for i in members}
            if len(context) >= _SHARED and len(inputs) > 1:
                groups.append(members)
            else:
                alone += members
        return alone, groups

    def _batches(self, parts: list[Row], numbers: list[int]) -> Iterator[list[int]]:
        """Rows of similar length; rows with the same inputs are in one batch."""
        order = sorted(numbers, key=lambda i: (-len(parts[i].source), -len(parts[i].ids), parts[i].inputs))
        batch: list[int] = []
        inputs: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        longest = 0  # input of the batch
        for number in order:
            own = parts[number].inputs
            widest = len(parts[batch[0] if batch else number].source) + max(longest, len(own[1]))
            if batch and own not in inputs and (len(inputs) + 1) * widest > self._batch_tokens:
                yield batch
                batch, inputs, longest = [], set(), 0
            batch.append(number)
            inputs.add(own)
            longest = max(longest, len(own[1]))
        if batch:
            yield batch

    def _together(self, rows: list[Row]) -> list[Predicted]:
        """Rows of a batch. Those that differ in their last token only share a pass."""
        import torch

        places: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        for row in rows:
            places.setdefault(row.inputs, len(places))
        length = max(len(inputs) for _, inputs in places)
        tokens = torch.zeros(len(places), length, dtype=torch.int64)
        for (_, inputs), place in places.items():
            tokens[place, : len(inputs)] = torch.tensor(inputs)
        with torch.inference_mode():
            hidden = self._hidden(tokens.to(self._device), [source for source, _ in places])
            chosen = [hidden[places[row.inputs], row.first - 1 : len(row.ids) - 1] for row in rows]
            return self._predicted(torch.cat(chosen), rows)

    def _hidden(self, tokens: torch.Tensor, sources: Sequence[Sequence[int]]) -> torch.Tensor:
        """What the head projects, [rows, S, d], of tokens [rows, S]; `sources` of an encoder-decoder."""
        from headway.model.decoder import Decoder

        if isinstance(self._model, Decoder):
            return self._model.hidden(tokens)
        ids, segments = padded(sources)
        return self._model.hidden(ids.to(self._device), tokens, segments)

    def _after_one_context(self, rows: list[Row]) -> list[Predicted]:
        """Rows that share their first tokens: the context is computed once, then all continuations in one pass."""
        import torch

        from headway.model.decoder import Decoder

        assert isinstance(self._model, Decoder), "`_grouped` makes no groups for an encoder-decoder"
        decoder, first = self._model, rows[0].first
        longest = max(len(row.ids) - 1 - first for row in rows)
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        for place, row in enumerate(rows):
            own = torch.tensor(row.ids[first:-1], dtype=torch.int64)
            tokens[place, : len(own)] = own
        with torch.inference_mode():
            cache = decoder.new_cache(first)
            context = torch.tensor([list(rows[0].ids[:first])], device=self._device)
            last = decoder.hidden(context, cache=cache)[:, -1:]
            hidden = decoder.hidden(tokens.to(self._device), cache=cache.repeated(len(rows), longest))
            hidden = torch.cat([last.expand(len(rows), -1, -1), hidden], 1)
            return self._predicted(torch.cat([hidden[i, : len(r.ids) - first] for i, r in enumerate(rows)]), rows)

    def _predicted(self, hidden: torch.Tensor, rows: list[Row]) -> list[Predicted]:
        """hidden [N, d]: the states from which the tokens of all rows are predicted, row after row."""
        import torch

        labels = torch.tensor([id for row in rows for id in row.ids[row.first :]], device=self._device)
        log_p: list[torch.Tensor] = []
        best: list[torch.Tensor] = []
        for states, wanted in zip(hidden.split(_HEAD_ROWS), labels.split(_HEAD_ROWS), strict=True):
            logits = self._model.project(states).float()
            of_label = logits.gather(1, wanted[:, None])[:, 0]
            log_p.append((of_label - logits.logsumexp(-1)).double())
            best.append(of_label >= logits.amax(-1))
        counts = [len(row.ids) - row.first for row in rows]
        parts = zip(torch.cat(log_p).cpu().split(counts), torch.cat(best).cpu().split(counts), strict=True)
        return [Predicted(p.numpy(), hits.numpy()) for p, hits in parts]


def _joined(parts: list[Predicted]) -> Predicted:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return Predicted(np.zeros(0), np.zeros(0, dtype=np.bool_))
    return Predicted(np.concatenate([p.log_p for p in parts]), np.concatenate([p.best for p in parts]))
