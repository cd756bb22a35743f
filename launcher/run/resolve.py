"""Read the vocabulary size and the fingerprint of a spec from its data. Every shard is verified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headway.data.config import DataError, Datasets, MdsSource, MixSource, PairsSource, SyntheticSource, datasets_of
from headway.launcher.base import console
from headway.launcher.base.errors import SpecError
from headway.launcher.run.run_dir import RunDir, read_mapping
from headway.launcher.spec.layouts import check_vocabulary
from headway.launcher.spec.spec import Spec

if TYPE_CHECKING:
    from headway.data.verify import DatasetInfo


def resolve(spec: Spec) -> tuple[Spec, dict[str, Any]]:
    """The spec with its vocabulary size and the hash of its start filled in, and information about the data.

    Verifies every shard, the initial weights (`weights` of the information), and the checkpoint that a branch starts
    from (`branch`); both are None for a run that continues from its own checkpoint. Raises DataError for damaged data,
    SpecError for a vocabulary that is too small for the data, and what `with_initial` and `with_parent` raise.
    """
    source = spec.data.source
    if isinstance(source, SyntheticSource):
        if spec.data.validation:
            raise SpecError("data.validation: synthetic data have no tokenizer; leave it out")
        info: dict[str, Any] = {"fingerprint": None, "vocab_size": source.vocab_size}
    else:
        from headway.data.verify import verify_source

        found, datasets = verify_source(
            source, seq_len=spec.data.seq_len, shuffle_window=spec.data.shuffle_window, progress=console.progress
        )
        info = {
            "fingerprint": found.fingerprint,
            "vocab_size": found.vocab_size,
            "train_tokens": found.train_tokens,
            "unigram_entropy_nats": found.unigram_entropy_nats,
            "validation_bytes_per_token": found.validation_bytes_per_token,
            "lossy_documents": found.lossy_documents,
        }
        sets = _validation_sets(spec, datasets)
        info["validation_sets"] = {
            name: {"fingerprint": one.fingerprint, "bytes_per_token": one.validation_bytes_per_token}
            for name, one in sets.items()
        }
        info["validation_overlap"] = _overlaps(source, sets, datasets)
        if isinstance(source, PairsSource):
            info |= _pairs(spec)
    size = spec.model.vocab_size
    if size is not None and size < info["vocab_size"]:
        raise SpecError(
            f"model.vocab_size: {size} is smaller than the {info['vocab_size']} tokens of the data; use "
            f"{info['vocab_size']}, or leave it out to take it from the data"
        )
    model = spec.model.model_copy(update={"vocab_size": size or info["vocab_size"]})
    spec = spec.model_copy(update={"model": model})
    check_vocabulary(spec)
    if spec.init.weights is not None:
        from headway.launcher.run.initial_weights import with_initial

        spec, info["weights"] = with_initial(spec)
    if spec.init.run is not None:
        from headway.launcher.run.branching import with_parent

        spec, info["branch"] = with_parent(spec, info["fingerprint"])
    return spec, info


def _pairs(spec: Spec) -> dict[str, Any]:
    """What becomes of the pairs (`pairs`), and the tokens of an epoch (`train_tokens`), padding included.

    Raises DataError if no pair of a split fits a sequence.
    """
    from dataclasses import asdict

    from headway.data.loader import open_source
    from headway.data.manifest import SPLITS
    from headway.data.packed_pairs import PackedPairs

    found: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        opened = open_source(spec.data, split=split)
        assert isinstance(opened, PackedPairs)
        facts, found[split] = opened.facts, asdict(opened.facts)
        opened.close()
        lost = [f"{facts.cut:,} cut at the end of their prompt"] if facts.cut else []
        keys = "data.source.long, data.seq_len" + (", data.encoder_tokens" if spec.data.encoder_tokens else "")
        lost += [f"{facts.left_out:,} left out as too long ({keys})"] if facts.left_out else []
        console.note(
            f"data: {facts.pairs:,} of {facts.pairs + facts.left_out:,} pairs for {split} in {facts.sequences:,} "
            f"sequences, {facts.padding:.1%} padding{''.join(f'; {part}' for part in lost)}"
        )
    return {"pairs": found, "train_tokens": found["train"]["sequences"] * spec.data.seq_len}


def _validation_sets(spec: Spec, datasets: Sequence[DatasetInfo]) -> dict[str, DatasetInfo]:
    """Name -> the dataset of each validation set: those of a mixture, and those of `data.validation`."""
    from headway.data.verify import check_same_tokenizer, verify

    source = spec.data.source
    found: dict[str, DatasetInfo] = {}
    if isinstance(source, MixSource):
        found = {part.title(): info for part, info in zip(source.sources, datasets, strict=True)}
    for name, path in spec.data.validation.items():
        if name in found:
            raise SpecError(f"data.validation.{name}: is the name of a dataset of the mixture too; use another name")
        loss = source.loss if isinstance(source, PairsSource) else "targets"
        info = verify(MdsSource(type="mds", path=path), seq_len=spec.data.seq_len, loss=loss, progress=console.progress)
        check_same_tokenizer(datasets[0], info, f"data.validation.{name}")
        if "pairs" in info.manifest and not spec.data.document_mask:
            raise DataError(f"data.validation.{name}: {path} is a dataset of pairs; it needs data.document_mask: true")
        found[name] = info
    return found


def _overlaps(source: Datasets, sets: dict[str, DatasetInfo], datasets: Sequence[DatasetInfo]) -> list[dict[str, Any]]:
    """Validation sets with documents that another dataset of the run trains on, which an alert names."""
    from headway.data.overlap import overlap

    parts = zip(datasets_of(source), datasets, strict=True)
    remote = [info for part, info in parts if part.remote is not None]
    told: list[dict[str, Any]] = []
    for name, info in sets.items():
        for other in datasets:
            if info in remote or other in remote:
                continue
            if info.fingerprint == other.fingerprint:  # a build holds its own splits apart
                continue
            found = overlap(info.path, other.path)
            if not found.shared:
                continue
            told.append({"set": name, "dataset": str(other.path), "compared": found.compared, "shared": found.shared})
            console.alert(
                f"VALIDATION IS TRAINED ON: {found.shared:,} of {found.compared:,} compared validation documents of "
                f"{name} ({info.path}) are also in the training split of {other.path}, so its loss counts what is "
                "learned by heart. Build one of them without these documents (docs/data.md, Validation sets)"
            )
    return told


def check_same_data(run: RunDir, info: dict[str, Any]) -> None:
    """Raise SpecError if the run was trained on data with another fingerprint."""
    before = read_mapping(run.card).get("data_fingerprint")
    if before is not None and before != info["fingerprint"]:
        raise SpecError(
            f"{run.path}: this run was started on other data (fingerprint {str(before)[:16]}, now "
            f"{str(info['fingerprint'])[:16]}); restore that dataset, or give another run_dir=..."
        )
