"""Packing of pairs: every pair once, only targets predicted, and the losses of a sequence are those of its pairs."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from headway.data.build import build
from headway.data.config import DataConfig, DataError, MdsSource, PairsSource
from headway.data.corpus.config import CorpusConfig
from headway.data.loader import IGNORED, Loader, collate, open_source
from headway.data.manifest import PROMPTS_NAME
from headway.data.mds import MdsSplit
from headway.data.packed_pairs import PackedPairs, best_fit
from headway.data.validation import validation_data
from headway.model.attention.rgqa import RgqaConfig
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder

SEQ_LEN = 48
WORDS = ["the", "of", "and", "a", "to", "in", "is", "was", "that", "for", "with", "heat"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 pairs in several shards: some of more than SEQ_LEN tokens, some whose target alone is that long."""
    folder, rng = tmp_path_factory.mktemp("packed-pairs"), random.Random(3)
    rows = []
    for n in range(300):
        sizes = rng.choice([(4, 2), (9, 4), (30, 5), (80, 6), (3, 60)])
        prompt, target = (" ".join(rng.choices(WORDS, k=rng.randint(1, size))) for size in sizes)
        rows.append({"p": f"{n} {prompt}", "t": target})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "name": "pairs",
        "corpus": {"type": "pairs", "paths": [str(folder / "rows.jsonl")], "prompt": "p", "target": "t"},
        "tokenizer": {"type": "train_bpe", "vocab_size": 300},
        "validation_fraction": 0.2,
        "shard_bytes": 6000,
    }
    build(CorpusConfig.model_validate(settings), out=folder / "dataset")
    return folder / "dataset"


def config(root: Path, *, long: Any = "cut", loss: Any = "targets", **changes: Any) -> DataConfig:
    source = PairsSource(type="pairs", path=str(root), long=long, loss=loss)
    return DataConfig(**{"source": source, "seq_len": SEQ_LEN, "workers": 0, "shuffle_window": 2, "seed": 5, **changes})


def opened(cfg: DataConfig, split: Literal["train", "validation"] = "train") -> PackedPairs:
    source = open_source(cfg, split=split)
    assert isinstance(source, PackedPairs)
    return source


def expected(root: Path, *, long: str = "cut") -> dict[bytes, tuple[list[int], int]]:
    """By tokens: each pair of the training that fits, as the rule cuts it, and how many tokens its prompt has left."""
    documents, room = MdsSplit(root, "train"), SEQ_LEN + 1
    assert documents.prompts is not None and documents.manifest.pairs is not None
    separator, found = documents.manifest.pairs.separator_ids, {}
    for number in range(len(documents)):
        ids, first = documents.tokens(number).tolist(), int(documents.prompts[number])
        prompt, target = ids[: first - len(separator)], ids[first:]
        if long == "leave_out" and len(ids) > room:
            continue
        prompt = prompt[: room - len(separator) - len(target)] if len(ids) > room else prompt
        if not prompt or len(separator) + len(target) + 1 > room:
            continue
        whole = [*prompt, *separator, *target]
        found[np.array(whole, dtype="<i8").tobytes()] = whole, len(prompt) + len(separator)
    return found


@pytest.mark.parametrize("long", ["cut", "leave_out"])
def test_an_epoch_has_every_pair_once_and_only_targets_are_predicted(long: Any, pairs: Path) -> None:
    source, wanted = opened(config(pairs, long=long)), expected(pairs, long=long)
    seen: set[bytes] = set()
    padding = 0
    for position in range(source.num_sequences):
        sample = source.sample(source.index(position))
        assert len(sample.tokens) == SEQ_LEN + 1 and sample.targets is not None
        predicted = np.zeros(SEQ_LEN, dtype=bool)
        for segment in range(int(sample.segments.max()) + 1):
            places = np.flatnonzero(sample.segments == segment)
            key = sample.tokens[places].astype("<i8").tobytes()
            if key not in wanted:  # padding is last and one repeated token
                assert places[-1] == SEQ_LEN and set(sample.tokens[places]) == {sample.tokens[-1]}
                padding += len(places)
                continue
            assert key not in seen
            seen.add(key)
            predicted[places[0] + wanted[key][1] - 1 : places[-1]] = True
        np.testing.assert_array_equal(sample.targets, predicted)
    total = len(MdsSplit(pairs, "train"))
    assert seen == set(wanted)
    assert (source.facts.pairs, source.facts.left_out) == (len(seen), total - len(seen)) and source.facts.left_out > 9
    assert source.facts.padding == pytest.approx(padding / (source.num_sequences * (SEQ_LEN + 1)), abs=1e-12)
    assert 0 < source.facts.padding < 0.15 and (source.facts.cut > 9) == (long == "cut")


def test_with_all_tokens_only_the_first_of_a_pair_and_padding_are_not_predicted(pairs: Path) -> None:
    plain, whole = opened(config(pairs)), opened(config(pairs, loss="all"))
    for number in range(0, plain.num_sequences, 7):
        of_targets, of_all = plain.sample(number), whole.sample(number)
        np.testing.assert_array_equal(of_all.tokens, of_targets.tokens)
        batch, count = collate([of_all], masked=True)
        last = int(of_all.segments.max())
        is_padding = set(of_all.tokens[of_all.segments == last]) == {of_all.tokens[-1]}
        held = of_all.segments < (last if is_padding else last + 1)
        same = of_all.segments[1:] == of_all.segments[:-1]
        np.testing.assert_array_equal(batch.labels[0].numpy() != IGNORED, held[1:] & same)
        assert of_targets.targets is not None and count > int(of_targets.targets.sum())


def test_the_order_is_that_of_texts_over_the_sequences_of_each_shard(pairs: Path) -> None:
    source = opened(config(pairs))
    assert sum(source.sequences_per_shard()) == source.num_sequences and len(source.sequences_per_shard()) > 3
    order = [source.index(n) for n in range(2 * source.num_sequences)]
    half = len(order) // 2
    assert sorted(order[:half]) == sorted(order[half:]) == list(range(half)) and order[:half] != order[half:]
    assert order == [opened(config(pairs)).index(n) for n in range(len(order))]
    assert order != [opened(config(pairs, seed=6)).index(n) for n in range(len(order))]
    validation = opened(config(pairs), "validation")
    assert [validation.index(n) for n in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("packed", [False, True])
def test_losses_of_packed_pairs_are_those_of_each_pair_alone(packed: bool, pairs: Path) -> None:
    """float64; gradients too. Rotary tables are fp32, so other positions move scores by about 1e-7."""
    source = opened(config(pairs))
    attention = RgqaConfig(heads=4, kv_heads=2, head_dim=6, top_k=1)
    model = ModelConfig(width=20, layers=2, ffn_width=28, init_std=0.3, positions="rope" if packed else "none")
    decoder = Decoder(model, attention, vocab_size=300, seed=1).double()
    alone = Decoder(model, attention, vocab_size=300, seed=1).double()
    batch, count = collate([source.sample(n) for n in range(6)], masked=True)
    total = decoder(batch.tokens, batch.labels, batch.segments)
    total.loss_sum.backward()
    targets, losses = 0, []
    for number in range(6):
        sample = source.sample(number)
        for segment in range(int(sample.segments.max()) + 1):
            places = np.flatnonzero(sample.segments == segment)
            tokens = torch.from_numpy(sample.tokens[places].astype(np.int64))
            labels = tokens[1:].clone()
            assert sample.targets is not None
            labels[~torch.from_numpy(sample.targets[places[:-1]])] = IGNORED
            if (labels != IGNORED).any():
                out = alone(tokens[None, :-1], labels[None])
                out.loss_sum.backward()
                losses.append(out.loss_sum.detach())
                targets += int(out.targets)
    assert len(losses) > 12 and targets == count == int(total.targets)
    tolerance = 1e-6 if packed else 1e-12
    torch.testing.assert_close(total.loss_sum, sum(losses, torch.zeros(())), rtol=tolerance, atol=0)
    for (name, a), b in zip(decoder.named_parameters(), alone.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=10 * tolerance * float(b.grad.abs().max()), msg=name)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 2), (2, 4), (2, 1), (4, 2)])
def test_ranks_read_the_parts_of_one_batch_and_count_its_targets(ranks: int, micro: int, pairs: Path) -> None:
    def batches(ranks: int, micro: int) -> list[tuple[int, int]]:
        found = []
        for step in range(4):
            parts = []
            for rank in range(ranks):
                with Loader(
                    config(pairs), split="train", global_batch=8, micro_batch=micro, dp_rank=rank, dp_size=ranks
                ) as loader:
                    parts.append(loader.batch(step))
            labels = torch.cat([m.labels for part in parts for m in part.micro])
            targets = sum(part.targets for part in parts)
            assert targets == int((labels != IGNORED).sum()) > 0
            found.append((sum(part.digest for part in parts) % (1 << 64), targets))
        return found

    found = batches(ranks, micro)
    assert found == batches(1, 8) and len({digest for digest, _ in found}) == 4


def test_a_set_of_pairs_is_evaluated_beside_a_text_and_the_other_way_round(pairs: Path, dataset: Path) -> None:
    ranks = {"tokens": 4 * SEQ_LEN, "micro_batch": 4, "dp_rank": 0, "dp_size": 1}
    of_text = DataConfig(source=MdsSource(type="mds", path=str(dataset)), seq_len=SEQ_LEN)
    mixed = validation_data(of_text.model_copy(update={"validation": {"pairs": str(pairs)}}), **ranks)
    alone = validation_data(config(pairs), **ranks)
    ours = [*mixed.batches][-len(alone.batches) :]
    assert [b.labels.tolist() for b in ours] == [b.labels.tolist() for b in alone.batches]
    assert list(mixed.sets) == ["pairs"] and len(mixed.sets["pairs"]) == len(alone.main)
    assert (mixed.batches[0].labels != IGNORED).float().mean() > 0.9 > (ours[0].labels != IGNORED).float().mean()


def test_every_pair_is_a_document_of_the_validation_with_its_own_targets(pairs: Path) -> None:
    source = opened(config(pairs), "validation")
    numbers = [source.documents(index) for index in range(source.num_sequences)]
    assert [a.stop for a in numbers[:-1]] == [b.start for b in numbers[1:]] and numbers[0].start == 0
    data = validation_data(config(pairs), tokens=10**6, micro_batch=4, dp_rank=0, dp_size=1)
    owners = torch.cat([of[b.labels != IGNORED] for of, b in zip(data.documents, data.batches, strict=True)])
    documents = MdsSplit(pairs, "validation")
    assert documents.prompts is not None and source.facts.left_out > 0
    sizes = sorted(torch.bincount(owners)[torch.bincount(owners) > 0].tolist())
    targets = documents.lengths - documents.prompts
    fits = targets + source.separator_tokens + 1 <= SEQ_LEN + 1
    assert sizes == sorted(targets[fits].tolist())


def test_a_sequence_that_no_pair_fits_is_an_error(pairs: Path) -> None:
    documents = MdsSplit(pairs, "train")
    assert documents.prompts is not None and documents.manifest.pairs is not None
    smallest = int((documents.lengths - documents.prompts).min()) + len(documents.manifest.pairs.separator_ids)
    assert opened(config(pairs, seq_len=smallest)).facts.pairs > 0
    with pytest.raises(DataError, match=rf"too short for every pair .* seq_len >= {smallest:,}, or shorter targets"):
        opened(config(pairs, seq_len=smallest - 1))
    shortest = int(documents.lengths.min()) - 1
    with pytest.raises(DataError, match=rf"seq_len >= {shortest:,}, or data.source.long: cut"):
        opened(config(pairs, seq_len=shortest - 1, long="leave_out"))


def test_pairs_need_the_document_mask_and_a_dataset_of_pairs(pairs: Path, dataset: Path) -> None:
    with pytest.raises(ValueError, match="document_mask: false lets pairs attend to each other"):
        config(pairs, document_mask=False)
    with pytest.raises(DataError, match="has texts; use type: mds"):
        opened(config(dataset))


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_packs_every_item_once_in_few_bins(seed: int) -> None:
    rng = random.Random(seed)
    room = rng.choice([10, 50, 1025])
    sizes = [rng.randint(1, room) for _ in range(rng.choice([1, 7, 400]))]
    bins = best_fit(sizes, room)
    assert sorted(item for each in bins for item in each) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in each) <= room for each in bins)
    assert bins == sorted(bins) and all(each == sorted(each) for each in bins)
    assert len(bins) <= 11 / 9 * max(sum(size > room / 2 for size in sizes), -(-sum(sizes) // room)) + 4
    assert best_fit([5, 5, 4, 4, 2], 10) == [[0, 1], [2, 3, 4]]


def test_a_remote_dataset_of_pairs_is_fetched_with_its_prompts(pairs: Path, tmp_path: Path) -> None:
    source = PairsSource(type="pairs", path=str(tmp_path / "cache"), remote=str(pairs))
    fetched, local = opened(config(pairs).model_copy(update={"source": source})), opened(config(pairs))
    for number in (0, local.num_sequences - 1):
        for ours, theirs in zip(
            asdict(fetched.sample(number)).values(), asdict(local.sample(number)).values(), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    fetched.close()
    assert (tmp_path / "cache/train" / PROMPTS_NAME).is_file() and fetched.facts == local.facts
