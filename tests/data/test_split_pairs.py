"""Pairs for an encoder-decoder: prompts for the encoder, targets for the decoder, and nothing between other pairs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from headway.data.build import build
from headway.data.config import DataConfig, DataError, MdsSource, PairsSource
from headway.data.corpus.config import CorpusConfig
from headway.data.loader import IGNORED, Loader, MicroBatch, collate, open_source
from headway.data.mds import MdsSplit
from headway.data.split_pairs import SplitPairs, best_fit_in_both
from headway.data.validation import validation_data
from headway.model.attention.gqa import GqaConfig
from headway.model.attention.wgqa import WgqaConfig
from headway.model.config import ModelConfig
from headway.model.seq2seq.model import EncoderDecoder

SEQ_LEN, SOURCE = 56, 32
WORDS = ["the", "of", "and", "a", "to", "in", "is", "was", "that", "for", "with", "heat"]


def built(folder: Path, separator: str, *, count: int = 300) -> Path:
    rng, rows = random.Random(3), []
    for n in range(count):
        sizes = rng.choice([(4, 2), (9, 4), (30, 5), (80, 6), (3, 60)])
        prompt, target = (" ".join(rng.choices(WORDS, k=rng.randint(1, size))) for size in sizes)
        rows.append({"p": f"{n} {prompt}", "t": target})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [str(folder / "rows.jsonl")]
    settings = {
        "name": "pairs",
        "corpus": {"type": "pairs", "paths": paths, "prompt": "p", "target": "t", "separator": separator},
        "tokenizer": {"type": "train_bpe", "vocab_size": 300},
        "validation_fraction": 0.2,
        "shard_bytes": 6000,
    }
    build(CorpusConfig.model_validate(settings), out=folder / "dataset")
    return folder / "dataset"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 pairs in several shards: some prompts of more than SOURCE tokens, some targets longer than the decoder's."""
    return built(tmp_path_factory.mktemp("split-pairs"), " ->")


def config(root: Path, *, long: Any = "cut", **changes: Any) -> DataConfig:
    source = PairsSource(type="pairs", path=str(root), long=long)
    common = {"seq_len": SEQ_LEN, "encoder_tokens": SOURCE, "workers": 0, "shuffle_window": 2, "seed": 5}
    return DataConfig(**{"source": source, **common, **changes})


def opened(cfg: DataConfig, split: Literal["train", "validation"] = "train") -> SplitPairs:
    source = open_source(cfg, split=split)
    assert isinstance(source, SplitPairs)
    return source


Parts = tuple[tuple[int, ...], tuple[int, ...]]


def expected(root: Path, *, long: str = "cut") -> dict[Parts, tuple[int, bool]]:
    """(ids of the encoder, ids of the decoder) of each pair of the training that fits -> (tokens of the target, whether
    the prompt is cut).
    """
    documents, found = MdsSplit(root, "train"), {}
    assert documents.prompts is not None and documents.manifest.pairs is not None
    separator = documents.manifest.pairs.separator_ids
    for number in range(len(documents)):
        ids, first = documents.tokens(number).tolist(), int(documents.prompts[number])
        prompt, target = ids[: first - len(separator)], ids[first:]
        start = separator or [documents.manifest.eos_id]
        if len(start) + len(target) > SEQ_LEN - SOURCE + 1 or (long == "leave_out" and len(prompt) > SOURCE):
            continue
        found[tuple(prompt[:SOURCE]), (*start, *target)] = len(target), len(prompt) > SOURCE
    return found


@pytest.mark.parametrize("long", ["cut", "leave_out"])
def test_an_epoch_has_every_pair_once_and_only_targets_are_predicted(long: Any, pairs: Path) -> None:
    source, wanted = opened(config(pairs, long=long)), expected(pairs, long=long)
    seen: set[Parts] = set()
    padding = 0
    for position in range(source.num_sequences):
        sample = source.sample(source.index(position))
        assert len(sample.tokens) == SEQ_LEN + 1 and sample.targets is not None
        predicted = np.zeros(SEQ_LEN, dtype=bool)
        in_source, in_target = sample.segments[:SOURCE], sample.segments[SOURCE:]
        last = int(in_source.max())
        for segment in range(last + 1):
            places = SOURCE + np.flatnonzero(in_target == segment)
            prompt = tuple(sample.tokens[:SOURCE][in_source == segment].tolist())
            pair = prompt, tuple(sample.tokens[places].tolist())
            assert pair in wanted and pair not in seen
            assert (np.diff(places) == 1).all() and (np.diff(np.flatnonzero(in_source == segment)) == 1).all()
            seen.add(pair)
            predicted[places[-1] - wanted[pair][0] : places[-1]] = True
        assert set(in_source) <= {*range(last + 1), -1} and set(in_target) <= set(range(last + 2))
        padding += int((in_source == -1).sum() + (in_target == last + 1).sum())
        np.testing.assert_array_equal(sample.targets, predicted)
    total = len(MdsSplit(pairs, "train"))
    assert seen == set(wanted)
    facts, cut = source.facts, sum(cut for _, cut in wanted.values())
    assert (facts.pairs, facts.cut, facts.left_out) == (len(seen), cut, total - len(seen))
    assert facts.sequences == source.num_sequences
    assert facts.padding == pytest.approx(padding / (facts.sequences * (SEQ_LEN + 1)), abs=1e-12)
    assert facts.left_out > 9 and 0 < facts.padding < 0.4 and (facts.cut > 9) == (long == "cut")


def test_the_order_is_that_of_texts_over_the_sequences_of_each_shard(pairs: Path) -> None:
    source = opened(config(pairs))
    assert sum(source.sequences_per_shard()) == source.num_sequences and len(source.sequences_per_shard()) > 3
    order = [source.index(n) for n in range(2 * source.num_sequences)]
    half = len(order) // 2
    assert sorted(order[:half]) == sorted(order[half:]) == list(range(half)) and order[:half] != order[half:]
    again = opened(config(pairs))
    assert order == [again.index(n) for n in range(len(order))]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 2), (2, 4), (2, 1), (4, 2)])
def test_ranks_read_the_parts_of_one_batch_and_a_loader_can_start_at_any_step(
    ranks: int, micro: int, pairs: Path
) -> None:
    def batches(ranks: int, micro: int, *, start_step: int = 0) -> list[tuple[int, int, list[list[int]]]]:
        parts = []
        for rank in range(ranks):
            place: Any = {"dp_rank": rank, "dp_size": ranks, "micro_batch": micro, "start_step": start_step}
            with Loader(config(pairs), split="train", global_batch=8, **place) as loader:
                parts.append([next(loader) for _ in range(start_step, 4)])
        found = []
        for step in zip(*parts, strict=True):
            whole = [torch.cat([whole_rows(m) for m in part.micro]) for part in step]
            digest, targets = sum(part.digest for part in step) % (1 << 64), sum(part.targets for part in step)
            found.append((digest, targets, torch.cat(whole).tolist()))
        return found

    found = batches(ranks, micro)
    assert found == batches(1, 8) and len({digest for digest, *_ in found}) == 4
    assert batches(ranks, micro, start_step=2) == found[2:]
    assert all(targets == sum(row.count(1) for row in labelled(rows)) for _, targets, rows in found)


def whole_rows(batch: MicroBatch) -> Tensor:
    assert batch.source is not None and batch.source_segments is not None and batch.segments is not None
    return torch.cat([batch.source, batch.source_segments, batch.tokens, batch.segments, batch.labels], 1)


def labelled(rows: list[list[int]]) -> list[list[int]]:
    return [[int(label != IGNORED) for label in row[SOURCE - SEQ_LEN :]] for row in rows]


# ------------------------------------------------------------ the model reads only its own pair


def model_of(positions: Any, attention: Any = None) -> EncoderDecoder:
    shape: Any = {"width": 20, "layers": 2, "encoder_layers": 2, "ffn_width": 24, "init_std": 0.4}
    config = ModelConfig(type="encoder_decoder", positions=positions, **shape)
    attention = attention or GqaConfig(heads=4, kv_heads=2, head_dim=6)
    return EncoderDecoder(config, attention, vocab_size=300, seed=1).double().eval()


def batch_of(root: Path, count: int) -> MicroBatch:
    source = opened(config(root))
    return collate([source.sample(n) for n in range(count)], masked=True, encoder_tokens=SOURCE)[0]


def parts(batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """source, tokens, source segments, segments."""
    assert batch.source is not None and batch.source_segments is not None and batch.segments is not None
    return batch.source, batch.tokens, batch.source_segments, batch.segments


@pytest.mark.parametrize("positions", ["none", "relative_t5", "rope"])
def test_losses_and_gradients_of_packed_pairs_are_those_of_each_pair_alone(positions: Any, pairs: Path) -> None:
    """float64. Rotary tables are fp32, so with them other places move scores by about 1e-7."""
    attention = WgqaConfig(heads=4, kv_heads=2, head_dim=6, weights="column", start="random")
    packed, alone = model_of(positions, attention), model_of(positions, attention)
    batch = batch_of(pairs, 3)
    source, tokens, source_segments, segments = parts(batch)
    total = packed(source, tokens, batch.labels, source_segments, segments)
    total.loss_sum.backward()
    losses: list[Tensor] = []
    for row in range(3):
        for segment in range(int(source_segments[row].max()) + 1):
            own, theirs = source_segments[row] == segment, segments[row] == segment
            out = alone(source[row, own][None], tokens[row, theirs][None], batch.labels[row, theirs][None])
            out.loss_sum.backward()
            losses.append(out.loss_sum.detach())
    assert len(losses) > 5
    tolerance = 1e-6 if positions == "rope" else 1e-12
    torch.testing.assert_close(total.loss_sum, sum(losses, torch.zeros(())), rtol=tolerance, atol=0)
    for (name, a), b in zip(packed.named_parameters(), alone.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=20 * tolerance * float(b.grad.abs().max()), msg=name)


@pytest.mark.parametrize("positions", ["none", "relative_t5", "rope"])
def test_other_pairs_and_padding_change_nothing_at_all(positions: Any, pairs: Path) -> None:
    model, batch = model_of(positions), batch_of(pairs, 4)
    source, tokens, source_segments, segments = parts(batch)
    with torch.no_grad():
        before = model.logits(source, tokens, source_segments, segments)
        checked = 0
        for segment in range(int(source_segments.max()) + 1):
            own = source_segments == segment
            theirs = (segments == segment) & own.any(1, keepdim=True)  # else it is the decoder's padding
            others = torch.where(own, source, (source + 17) % 300), torch.where(theirs, tokens, (tokens + 29) % 300)
            after = model.logits(*others, source_segments, segments)
            assert after[theirs].equal(before[theirs]) and not after[~theirs].eq(before[~theirs]).all(-1).any()
            other = torch.where(own, (source + 17) % 300, source)
            after = model.logits(other, tokens, source_segments, segments)
            assert after[~theirs].equal(before[~theirs])
            assert not after[theirs].eq(before[theirs]).all(-1).any()  # its own prompt changes every token
            checked += int(theirs.any(1).sum())
    assert checked > 6


# ------------------------------------------------------------ validation


def test_every_pair_is_a_document_of_the_validation_with_its_own_targets(pairs: Path) -> None:
    data = validation_data(config(pairs), tokens=10**6, micro_batch=4, dp_rank=0, dp_size=1)
    owners = torch.cat([of[b.labels != IGNORED] for of, b in zip(data.documents, data.batches, strict=True)])
    documents = MdsSplit(pairs, "validation")
    assert documents.prompts is not None
    targets = documents.lengths - documents.prompts
    fits = targets + opened(config(pairs)).separator_tokens <= SEQ_LEN - SOURCE + 1
    sizes = torch.bincount(owners)
    assert sorted(sizes[sizes > 0].tolist()) == sorted(targets[fits].tolist()) and 0 < fits.sum() < len(fits)


def test_a_set_of_pairs_beside_a_text_is_split_too(pairs: Path, dataset: Path) -> None:
    ranks: dict[str, int] = {"tokens": 4 * SEQ_LEN, "micro_batch": 4, "dp_rank": 0, "dp_size": 1}
    source = MdsSource(type="mds", path=str(dataset))
    of_text = DataConfig(
        source=source, seq_len=SEQ_LEN, encoder_tokens=SOURCE, validation={"pairs": str(pairs)}, workers=0
    )
    mixed, alone = validation_data(of_text, **ranks), validation_data(config(pairs), **ranks)
    ours = [*mixed.batches][-len(alone.batches) :]
    assert [whole_rows(b).tolist() for b in ours] == [whole_rows(b).tolist() for b in alone.batches]
    assert list(mixed.sets) == ["pairs"] and len(mixed.sets["pairs"]) == len(alone.main)


# ------------------------------------------------------------ packing, and what is refused


@pytest.mark.parametrize("seed", range(5))
def test_items_of_two_sizes_are_packed_once_in_few_bins(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rooms = (int(rng.integers(10, 600)), int(rng.integers(5, 200)))
    sizes = np.stack([rng.integers(1, room + 1, 300) // rng.integers(1, 6, 300) for room in rooms], 1)
    bins = best_fit_in_both(sizes, rooms)
    assert sorted(item for each in bins for item in each) == list(range(300))
    assert all((sizes[each].sum(0) <= rooms).all() for each in bins)
    assert bins == sorted(bins) and all(each == sorted(each) for each in bins)
    least = max(-(-int(sizes[:, part].sum()) // room) for part, room in enumerate(rooms))
    assert least <= len(bins) <= 1.5 * least + 1


def test_packing_is_by_both_sizes() -> None:
    """Of 10 and 4: an item that fits one part only does not share a bin; the fuller bin comes first."""
    assert best_fit_in_both(np.array([[6, 1], [5, 1], [4, 4]]), (10, 4)) == [[0], [1], [2]]
    # The third of them would fit beside the first too, but the second bin is fuller.
    assert best_fit_in_both(np.array([[9, 1], [6, 2], [1, 1], [3, 1]]), (10, 4)) == [[0], [1, 2, 3]]
    assert best_fit_in_both(np.array([[9, 1], [6, 2], [1, 1], [3, 2]]), (10, 4)) == [[0, 2], [1, 3]]


def test_without_a_separator_the_end_token_starts_a_target(tmp_path: Path) -> None:
    root = built(tmp_path, "", count=60)
    source, wanted = opened(config(root)), expected(root)
    sample = source.sample(0)
    first = sample.tokens[sample.segments == 0].tolist()
    size = int((sample.segments[:SOURCE] == 0).sum())
    assert (tuple(first[:size]), tuple(first[size:])) in wanted
    assert first[size] == first[-1] == MdsSplit(root, "train").manifest.eos_id


def test_parts_that_no_pair_fits_are_errors(pairs: Path) -> None:
    documents = MdsSplit(pairs, "train")
    assert documents.prompts is not None and documents.manifest.pairs is not None
    separator = len(documents.manifest.pairs.separator_ids)
    sources, targets = documents.prompts - separator, documents.lengths - documents.prompts + separator
    shortest = int(targets.min())
    assert opened(config(pairs, seq_len=SOURCE + shortest - 1)).facts.pairs > 0
    with pytest.raises(DataError, match=rf"too few for every target .* seq_len >= {SOURCE + shortest - 1}, or shorter"):
        opened(config(pairs, seq_len=SOURCE + shortest - 2))
    least = int(sources.min())
    assert opened(config(pairs, encoder_tokens=least, long="leave_out")).facts.pairs > 0
    with pytest.raises(DataError, match=rf"encoder_tokens >= {least}, or data.source.long: cut"):
        opened(config(pairs, encoder_tokens=least - 1, long="leave_out"))
    assert opened(config(pairs, encoder_tokens=least - 1)).facts.cut > 200
