"""The global batch of a step does not depend on ranks, micro-batches, workers and the first step of the loader."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from headway.data.config import DataConfig, DataError, MdsSource, SyntheticSource
from headway.data.loader import IGNORED, Loader, StepBatch, open_source, validation_batches, validation_spread
from headway.data.packed import PackedText

GLOBAL_BATCH, SEQ_LEN = 8, 32
STEPS = range(5)
SYNTHETIC = SyntheticSource(type="synthetic", task="mqar")


def data(source: MdsSource | SyntheticSource, **changes: Any) -> DataConfig:
    settings: dict[str, Any] = {"source": source, "seq_len": SEQ_LEN, "workers": 0, "shuffle_window": 2, "seed": 11}
    return DataConfig(**(settings | changes))


def loader(cfg: DataConfig, rank: int = 0, ranks: int = 1, micro: int = 2, **kwargs: Any) -> Loader:
    settings: dict[str, Any] = {"split": "train", "global_batch": GLOBAL_BATCH, "micro_batch": micro}
    return Loader(cfg, **(settings | kwargs), dp_rank=rank, dp_size=ranks)


def rows(batch: StepBatch) -> list[torch.Tensor]:
    """tokens, labels and segments of all micro batches, [sequences, S]."""
    tensors = [(micro.tokens, micro.labels, micro.segments) for micro in batch.micro]
    return [torch.cat([t for t in column if t is not None]) for column in zip(*tensors, strict=True)]


def take(cfg: DataConfig, rank: int, ranks: int, micro: int, start: int = 0) -> list[StepBatch]:
    with loader(cfg, rank, ranks, micro, start_step=start) as batches:
        return [next(batches) for _ in STEPS]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (4, 1)])
@pytest.mark.parametrize("kind", ["text", "synthetic"])
def test_the_global_batch_is_the_same_for_any_ranks_micro_batches_and_workers(
    kind: str, ranks: int, micro: int, workers: int, source: MdsSource
) -> None:
    chosen = source if kind == "text" else SYNTHETIC
    expected = [loader(data(chosen), micro=GLOBAL_BATCH).batch(step) for step in STEPS]
    parts = [take(data(chosen, workers=workers), rank, ranks, micro) for rank in range(ranks)]
    for step, whole in zip(STEPS, expected, strict=True):
        mine = [part[step] for part in parts]
        assert [batch.step for batch in mine] == [step] * ranks
        assert all(micro_batch.tokens.shape == (micro, SEQ_LEN) for batch in mine for micro_batch in batch.micro)
        for column, expected_column in zip(zip(*map(rows, mine), strict=True), rows(whole), strict=True):
            torch.testing.assert_close(torch.cat(column), expected_column, rtol=0, atol=0)
        assert sum(batch.digest for batch in mine) % 2**64 == whole.digest
        assert sum(batch.targets for batch in mine) == whole.targets


def test_tokens_labels_and_digest_match_their_definitions(source: MdsSource) -> None:
    cfg = data(source)
    packed = open_source(cfg, split="train")
    batch = loader(cfg).batch(3)
    tokens, labels, segments = rows(batch)
    assert (tokens.dtype, labels.dtype, segments.dtype) == (torch.int64, torch.int64, torch.int32)
    digest = 0
    for place in range(GLOBAL_BATCH):
        sample = packed.sample(packed.index(3 * GLOBAL_BATCH + place))
        assert tokens[place].tolist() == sample.tokens[:-1].tolist()
        assert segments[place].tolist() == sample.segments[:-1].tolist()
        other = sample.segments[1:] != sample.segments[:-1]
        assert labels[place].tolist() == np.where(other, IGNORED, sample.tokens[1:].astype(np.int64)).tolist()
        text = place.to_bytes(8, "little") + sample.tokens.astype("<u4").tobytes() + sample.segments.tobytes()
        digest += xxhash.xxh64_intdigest(text)
    assert batch.digest == digest % 2**64
    assert batch.targets == int((labels != IGNORED).sum()) < labels.numel()


def test_no_token_predicts_into_another_document(source: MdsSource) -> None:
    cfg = data(source, seq_len=64)
    boundaries = 0
    for step in range(30):
        tokens, labels, segments = rows(loader(cfg).batch(step))
        ends = tokens[:, :-1] == 0  # the end-of-document token, which no text contains
        boundaries += int(ends.sum())
        assert (labels[:, :-1][ends] == IGNORED).all()
        assert torch.equal(ends, segments[:, 1:] != segments[:, :-1])
        # The end itself is predicted, from the last token of its own document.
        assert (labels[:, :-1][tokens[:, 1:] == 0] == 0).all()
    assert boundaries > 10


def test_without_the_mask_documents_run_together(source: MdsSource) -> None:
    masked = rows(loader(data(source, seq_len=64)).batch(0))
    batch = loader(data(source, seq_len=64, document_mask=False)).batch(0)
    assert all(micro.segments is None for micro in batch.micro)
    labels = torch.cat([micro.labels for micro in batch.micro])
    tokens = torch.cat([micro.tokens for micro in batch.micro])
    assert torch.equal(tokens, masked[0])
    assert torch.equal(labels[:, :-1], tokens[:, 1:]) and IGNORED not in labels
    assert batch.targets == GLOBAL_BATCH * 64


def test_an_epoch_holds_every_sequence_once(source: MdsSource) -> None:
    cfg = data(source)
    packed = open_source(cfg, split="train")
    assert isinstance(packed, PackedText)
    steps = packed.num_sequences  # GLOBAL_BATCH epochs
    reader = loader(cfg)
    everything = torch.cat([rows(reader.batch(step))[0] for step in range(-(-steps // GLOBAL_BATCH))])[:steps]
    stored = {tuple(packed.sample(index).tokens[:-1].tolist()) for index in range(steps)}
    found = [tuple(row.tolist()) for row in everything]
    assert len(found) == len(stored) == len(set(found)) == steps
    assert set(found) == stored


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 4, 1000])
def test_starting_at_a_step_continues_as_if_never_stopped(start: int, workers: int, source: MdsSource) -> None:
    cfg = data(source, workers=workers)
    resumed = take(cfg, 0, 1, 2, start=start)
    reader = loader(data(source))
    for batch, step in zip(resumed, range(start, start + len(STEPS)), strict=True):
        again = reader.batch(step)
        assert (batch.step, batch.digest) == (step, again.digest)
        assert all(torch.equal(a, b) for a, b in zip(rows(batch), rows(again), strict=True))


def test_the_digest_sees_order_and_content(source: MdsSource) -> None:
    digests = {loader(data(source, seed=seed)).batch(step).digest for seed in range(3) for step in range(3)}
    assert len(digests) == 9
    assert loader(data(source)).batch(0).digest != loader(data(source, document_mask=False)).batch(0).digest


def test_validation_reads_the_stored_order_once_and_ends(source: MdsSource) -> None:
    for workers in (0, 2):
        cfg = data(source, workers=workers)
        packed = open_source(cfg, split="validation")
        assert packed.num_sequences is not None
        with loader(cfg, split="validation") as reader:
            found = torch.cat([rows(batch)[0] for batch in reader])
        assert len(found) == packed.num_sequences // GLOBAL_BATCH * GLOBAL_BATCH > 0
        for index in range(len(found)):
            assert found[index].tolist() == packed.sample(index).tokens[:-1].tolist()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_while_preparing_reaches_the_consumer(
    workers: int, source: MdsSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = loader(data(source, workers=workers))
    prepare = reader.batch

    def fail_at_two(step: int) -> StepBatch:
        if step == 2:
            raise DataError("the shard went away")
        return prepare(step)

    monkeypatch.setattr(reader, "batch", fail_at_two)
    assert [next(reader).step, next(reader).step] == [0, 1]
    for _ in range(2):
        with pytest.raises(DataError, match="the shard went away"):
            next(reader)
    reader.close()


def test_threads_are_daemons_and_end_with_close(source: MdsSource) -> None:
    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("data-")]

    reader = loader(data(source, workers=3))
    next(reader)
    assert len(threads()) == 3 and all(thread.daemon for thread in threads())
    reader.close()
    assert threads() == []
    reader.close()


def test_no_more_batches_are_prepared_than_configured(source: MdsSource, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = loader(data(source, workers=2, prefetch=3))
    prepare, asked, enough = reader.batch, [], threading.Event()

    def count(step: int) -> StepBatch:
        asked.append(step)
        if len(asked) == 4:
            enough.set()
        return prepare(step)

    monkeypatch.setattr(reader, "batch", count)
    next(reader)
    assert enough.wait(10)
    enough.wait(0.2)
    assert sorted(asked) == [0, 1, 2, 3]
    reader.close()


def test_waiting_is_measured(source: MdsSource) -> None:
    reader = loader(data(source))
    next(reader)
    assert 0 < reader.wait_s < 5


def test_a_global_batch_that_does_not_divide_is_refused(source: MdsSource) -> None:
    with pytest.raises(DataError, match="8 sequences do not divide into 3 ranks with micro-batches of 2"):
        loader(data(source), ranks=3)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("kind", ["text", "synthetic"])
def test_validation_is_the_same_tokens_for_any_ranks(kind: str, micro: int, ranks: int, source: MdsSource) -> None:
    cfg = data(source if kind == "text" else SYNTHETIC)
    packed = open_source(cfg, split="validation")
    sequences = 11
    parts = [
        validation_batches(cfg, tokens=sequences * SEQ_LEN + 5, micro_batch=micro, dp_rank=rank, dp_size=ranks)
        for rank in range(ranks)
    ]
    assert len({len(part) for part in parts}) == 1  # the same number of forward passes on every rank
    assert all(batch.tokens.shape == (micro, SEQ_LEN) for part in parts for batch in part)
    tokens = torch.cat([batch.tokens for part in parts for batch in part])
    labels = torch.cat([batch.labels for part in parts for batch in part])
    real = (labels != IGNORED).any(dim=1)
    available = packed.num_sequences or sequences
    spread = [number * available // sequences for number in range(sequences)]
    assert len(set(spread)) == sequences and (kind == "synthetic" or spread[-1] > sequences)  # not just the first ones
    assert tokens[real].tolist() == [packed.sample(index).tokens[:-1].tolist() for index in spread]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_every_target_of_a_validation_is_counted_for_its_document(masked: bool, ranks: int, source: MdsSource) -> None:
    cfg = data(source).model_copy(update={"document_mask": masked})
    packed = PackedText(source.path, split="validation", seq_len=SEQ_LEN, seed=0, shuffle_window=1)
    owner = np.repeat(np.arange(len(packed.document_ends)), np.diff(packed.document_ends, prepend=0))
    sequences = packed.num_sequences - 1
    wanted = [number * packed.num_sequences // sequences for number in range(sequences)]
    expected = np.concatenate([owner[i * SEQ_LEN + 1 : (i + 1) * SEQ_LEN + 1] for i in wanted])
    parts = [
        validation_spread(cfg, tokens=sequences * SEQ_LEN, micro_batch=4, dp_rank=rank, dp_size=ranks)
        for rank in range(ranks)
    ]
    labels = torch.cat([batch.labels for part in parts for batch in part.batches])
    real = (labels != IGNORED).any(dim=1)
    found = torch.cat([numbers for part in parts for numbers in part.documents])[real].flatten().numpy()
    known, places = np.unique(expected, return_inverse=True)
    assert len(known) > 3 and all(part.count >= len(known) for part in parts)
    # Numbers follow the order of the split. The document of a first token without a label may have a number too.
    numbers = np.unique(found)
    assert len(numbers) == len(known) and np.array_equal(numbers[places], found)
    assert numbers[-1] < parts[0].count and len({part.count for part in parts}) == 1


def test_each_problem_of_a_synthetic_task_is_a_document() -> None:
    part = validation_spread(data(SYNTHETIC), tokens=5 * SEQ_LEN, micro_batch=5, dp_rank=0, dp_size=1)
    task = open_source(data(SYNTHETIC), split="validation")
    segments = np.stack([task.sample(index).segments[1:] for index in range(5)])
    count = int(segments.max()) + 1
    assert part.count == 5 * count and torch.equal(
        part.documents[0], torch.from_numpy(segments + count * np.arange(5)[:, None])
    )


def test_validation_takes_at_most_what_the_split_has(source: MdsSource) -> None:
    cfg = data(source)
    packed = open_source(cfg, split="validation")
    batches = validation_batches(cfg, tokens=10**9, micro_batch=4, dp_rank=0, dp_size=1)
    real = sum(int((batch.labels != IGNORED).any(dim=1).sum()) for batch in batches)
    assert real == packed.num_sequences
    with pytest.raises(DataError, match="31 is less than one sequence of 32 tokens"):
        validation_batches(cfg, tokens=31, micro_batch=4, dp_rank=0, dp_size=1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_ranks_and_workers_go_on_exactly_from_any_place_in_an_epoch(
    ranks: int, workers: int, source: MdsSource
) -> None:
    cfg = data(source, workers=workers)
    sequences = open_source(cfg, split="train").num_sequences
    assert sequences is not None and sequences % GLOBAL_BATCH, "an epoch ends inside a batch"
    end = sequences // GLOBAL_BATCH
    reference = loader(data(source))
    for start in (end // 3, end // 3 + 5, end // 2, end - 2, end, end + 1, 2 * end):  # also again in the same epoch
        parts = [take(cfg, rank, ranks, 1, start) for rank in range(ranks)]
        for step, mine in enumerate(zip(*parts, strict=True), start=start):
            assert {batch.step for batch in mine} == {step}
            assert sum(batch.sequences for batch in mine) == GLOBAL_BATCH
            assert sum(batch.digest for batch in mine) % 2**64 == reference.batch(step).digest


@pytest.mark.parametrize("wrong", [{"sequences": 7}, {"step": 1}])
@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_ends_before_the_training_is_an_error(
    workers: int, wrong: dict[str, int], source: MdsSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = loader(data(source, workers=workers))
    short = replace(reader.batch(0), **wrong)
    monkeypatch.setattr(reader, "batch", lambda _: short)
    with reader, pytest.raises(DataError, match=r"step 1: got .* instead of 8: the data ended before"):
        next(reader)


def test_waiting_ends_before_the_launcher_would_end_the_rank(
    source: MdsSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    for config_s, given_s, expected_s in ((0.2, None, 0.2), (100, 0.2, 0.2), (0.2, 100, 0.2)):
        reader = loader(data(source, workers=1, retry_s=0.1, timeout_s=config_s), timeout_s=given_s)
        hangs = threading.Event()
        monkeypatch.setattr(reader, "batch", lambda _, hangs=hangs: hangs.wait(60))
        with pytest.raises(DataError, match=rf"step 1 was not ready after {expected_s} s, waiting for no file"):
            next(reader)
        hangs.set()
        reader.close()
    with pytest.raises(ValueError, match=r"retry_s: .* use retry_s < 2 or timeout_s > 2"):
        data(source, retry_s=2, timeout_s=2)
