"""Spans of tensors: copies between layouts, the files that hold them, and what is refused."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from headway.parallel import saver
from headway.parallel.config import CheckpointConfig, CheckpointError
from headway.parallel.layout import Layout
from headway.parallel.manifest import Checkpoint, FileEntry, Manifest
from headway.parallel.tensors.image import SPANS, HostBuffer, write_image
from headway.parallel.tensors.reader import Tensors, copy_span
from headway.parallel.tensors.spans import Span, copy_shared, shared, whole


def elements(tensor: torch.Tensor, span: Span) -> torch.Tensor:
    """What a span holds, by plain slices."""
    part = tensor if span.ranks == 1 else tensor.chunk(span.ranks, span.dim)[span.rank]
    return part.reshape(-1)[span.start : span.stop].clone()


def ranges(shape: tuple[int, ...], dim: int, ranks: int, pieces: int, chance: random.Random) -> list[Span]:
    """Spans that hold a tensor exactly once: each tensor-parallel part in `pieces` ranges of random sizes."""
    found = []
    size = whole(shape).size // ranks
    for rank in range(ranks):
        bounds = sorted([0, size, *(chance.randrange(size + 1) for _ in range(pieces - 1))])
        part = Span(shape=shape, dim=dim, ranks=ranks, rank=rank, start=0, stop=size)
        found += [replace(part, start=a, stop=b) for a, b in itertools.pairwise(bounds)]
    return found


CUTS = [
    ((12, 7), 0),
    ((7, 12), 1),
    ((3, 12, 5), 1),
    ((5, 3, 12), 2),
    ((12,), 0),
]


@pytest.mark.parametrize(("shape", "dim"), CUTS)
def test_elements_go_from_any_ranges_of_any_parts_to_any_others(shape, dim):
    tensor, chance = torch.arange(whole(shape).size, dtype=torch.float32).view(shape), random.Random(1)
    for trial in range(60):
        ranks, other = chance.choice((1, 2, 3, 4)), chance.choice((1, 2, 3, 4, 6))
        held = ranges(shape, dim if ranks > 1 else 0, ranks, 1 + trial % 4, chance)
        for wanted in ranges(shape, dim if other > 1 else 0, other, 1 + trial % 3, chance):
            target = torch.full((wanted.size,), -1.0)
            for span in held:
                copy_shared(elements(tensor, span), target, shared(span, wanted))
            assert torch.equal(target, elements(tensor, wanted)), (held, wanted)


def test_a_scalar_and_one_element_are_spans_too():
    for shape in ((), (1,), (1, 1)):
        target = torch.zeros(1)
        copy_shared(torch.full((1,), 3.0), target, shared(whole(shape), whole(shape)))
        assert target.item() == 3.0


# ---------------------------------------------------------------- files


def test_an_image_is_the_file_that_the_safetensors_library_reads(tmp_path):
    held = {
        "param/a": (whole((2, 3)), torch.randn(2, 3)),
        "param/cut": (Span(shape=(4, 6), dim=1, ranks=2, rank=1, start=2, stop=7), torch.randn(5)),
        "buffer/bytes": (whole((3,)), torch.tensor([1, 2, 3], dtype=torch.uint8)),
        "buffer/steps": (whole(()), torch.tensor(7)),
        "buffer/half": (whole((3,)), torch.randn(3).bfloat16()),
        "param/turned": (whole((3, 2)), torch.randn(2, 3).t()),
    }
    image = HostBuffer(pinned=False).image(held)
    assert image.spans == 1 and image.whole == sorted(held.keys() - {"param/cut"})
    size, digest = write_image(tmp_path / "a", image)
    body = (tmp_path / "a").read_bytes()
    assert (size, digest) == (len(body), xxhash.xxh3_128_hexdigest(body))
    found = load_file(tmp_path / "a")
    assert found.keys() == held.keys()
    for key, (_, tensor) in held.items():
        assert torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype


def test_a_file_without_parts_is_the_one_that_the_library_writes(tmp_path):
    held = {"b": torch.randn(3), "a": torch.randn(2, 2), "c": torch.tensor([1, 2])}
    image = HostBuffer(pinned=False).image({key: (whole(tuple(t.shape)), t) for key, t in held.items()})
    write_image(tmp_path / "ours", image)
    save_file(held, tmp_path / "library")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


def test_the_memory_of_a_save_is_used_again_by_the_next_one():
    buffer = HostBuffer(pinned=False)
    large, small = torch.randn(1000), torch.randn(10)
    first = buffer.image({"x": (whole((1000,)), large)}).data
    again = buffer.image({"x": (whole((10,)), small)}).data
    assert again.data_ptr() == first.data_ptr() and torch.equal(again.view(torch.float32), small)
    assert again.numel() == small.nbytes
    grown = buffer.image({"x": (whole((1000,)), large), "y": (whole((10,)), small)}).data
    assert grown.numel() == large.nbytes + small.nbytes


def test_memory_that_cannot_be_locked_is_used_all_the_same(monkeypatch):
    empty, asked = torch.empty, []

    def refusing(*args, pin_memory=False, **kwargs):
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*args, **kwargs)

    buffer, x = HostBuffer(pinned=True), torch.randn(10)
    monkeypatch.setattr(torch, "empty", refusing)
    assert torch.equal(buffer.image({"x": (whole((10,)), x)}).data.view(torch.float32), x)
    assert True in asked


def stored(folder: Path, files: list[dict[str, tuple[Span, torch.Tensor]]]) -> Checkpoint:
    """A checkpoint of these files."""
    folder.mkdir()
    entries = {}
    for i, held in enumerate(files):
        image = HostBuffer(pinned=False).image(held)
        size, digest = write_image(folder / f"f{i}", image)
        entries[f"f{i}"] = FileEntry(bytes=size, xxh3_128=digest, tensors=image.whole, spans=image.spans)
    manifest = Manifest(format=3, step=1, layout={}, state={}, files=entries)
    return Checkpoint(path=folder, step=1, manifest=manifest)


@pytest.mark.parametrize(("shape", "dim"), CUTS)
def test_a_checkpoint_gives_whole_tensors_and_any_span_from_the_files_of_ranks(tmp_path, shape, dim):
    tensor, chance = torch.randn(shape), random.Random(2)
    held = ranges(shape, dim, 2, 3, chance)
    gain = torch.randn(5)
    files: list[dict[str, tuple[Span, torch.Tensor]]] = [{"param/x": (s, elements(tensor, s))} for s in held if s.size]
    files[1]["param/gain"] = (whole((5,)), gain)
    tensors = Tensors(stored(tmp_path / "step", files[::-1]))
    assert set(tensors) == {"param/x", "param/gain"} and len(tensors) == 2
    assert tensors.shape("param/x") == shape and tensors.shape("param/gain") == (5,)
    assert torch.equal(tensors["param/x"], tensor) and torch.equal(tensors["param/gain"], gain)
    for wanted in ranges(shape, dim, 4, 2, chance):
        target = torch.zeros(wanted.size)
        copy_span(tensors, "param/x", wanted, target)
        plain = torch.zeros(wanted.size)
        copy_span({"param/x": tensor}, "param/x", wanted, plain)  # of tensors that are in no checkpoint
        assert torch.equal(target, elements(tensor, wanted)) and torch.equal(plain, target)


def test_a_tensor_that_was_cut_along_another_dimension_is_read_too(tmp_path):
    tensor = torch.randn(4, 6)
    held = [Span(shape=(4, 6), dim=1, ranks=2, rank=rank, start=0, stop=12) for rank in (0, 1)]
    tensors = Tensors(stored(tmp_path / "step", [{"x": (s, elements(tensor, s))} for s in held]))
    wanted = Span(shape=(4, 6), dim=0, ranks=2, rank=1, start=3, stop=11)
    target = torch.zeros(8)
    tensors.copy("x", wanted, target)
    assert torch.equal(target, elements(tensor, wanted))


def test_only_files_that_hold_wanted_elements_are_read(tmp_path, monkeypatch):
    tensor = torch.randn(8, 4)
    held = [Span(shape=(8, 4), start=a, stop=a + 8) for a in range(0, 32, 8)]
    found = stored(tmp_path / "step", [{"x": (s, elements(tensor, s))} for s in held])
    tensors = Tensors(found)
    read = list[str]()
    real = tensors._stored
    monkeypatch.setattr(tensors, "_stored", lambda key, path: read.append(path.name) or real(key, path))
    target = torch.zeros(8)
    tensors.copy("x", Span(shape=(8, 4), start=12, stop=20), target)
    assert torch.equal(target, tensor.view(-1)[12:20]) and read == ["f1", "f2"]


HALVES = [Span(shape=(4, 6), start=0, stop=12), Span(shape=(4, 6), start=12, stop=24)]
COLUMNS = [Span(shape=(4, 6), dim=1, ranks=2, rank=rank, start=0, stop=12) for rank in (0, 1)]


@pytest.mark.parametrize(
    "spans",
    [
        HALVES[:1],
        HALVES[1:],
        [HALVES[0], replace(HALVES[1], start=13)],
        [HALVES[0], replace(HALVES[1], start=11)],
        [*HALVES, HALVES[1]],
        COLUMNS[:1],
        COLUMNS[1:],
        [COLUMNS[0], replace(COLUMNS[1], stop=11)],
        [COLUMNS[0], COLUMNS[0], COLUMNS[1]],
        [COLUMNS[0], replace(COLUMNS[1], dim=0)],
        [HALVES[0], COLUMNS[1]],
        [HALVES[0], replace(HALVES[1], shape=(6, 4))],
        [*HALVES, whole((4, 6))],
    ],
    ids=str,
)
def test_files_that_do_not_hold_each_element_once_are_refused_by_name(tmp_path, spans):
    files = [{"param/x": (s, torch.zeros(s.shape) if s.is_whole else torch.zeros(s.size))} for s in spans]
    with pytest.raises(CheckpointError, match=r"step.*param/x") as caught:
        Tensors(stored(tmp_path / "step", files))
    assert "use another checkpoint" in str(caught.value) or "restore it from a copy" in str(caught.value)


def test_a_span_of_another_shape_is_refused(tmp_path):
    tensors = Tensors(stored(tmp_path / "step", [{"x": (s, torch.zeros(12))} for s in HALVES]))
    with pytest.raises(CheckpointError, match=r"x is \[4, 6\], not \[6, 4\]"):
        tensors.copy("x", Span(shape=(6, 4), start=0, stop=0), torch.zeros(0))


@pytest.mark.parametrize(
    "said",
    [
        None,
        "",
        "[]",
        "{}",
        '{"x": 1}',
        '{"x": {"shape": [4, 6]}}',
        '{"x": {"shape": [4, 6], "start": -1}}',
        '{"x": {"shape": [4, 6], "start": 13}}',
        '{"x": {"shape": [4, 6], "start": 0, "ranks": 5}}',
        '{"x": {"shape": [4, 6], "start": 0, "ranks": 2, "rank": 2}}',
        '{"x": {"shape": [4, 6], "start": 0, "ranks": 2, "dim": 2}}',
        '{"x": {"shape": [4, 6], "start": 0, "ranks": 0}}',
        '{"x": {"shape": [4, -6], "start": 0}}',
        '{"x": {"shape": [], "start": 0}}',
        '{"x": {"shape": [4, 6], "start": 0, "more": 1}}',
        '{"y": {"shape": [4, 6], "start": 0}}',
        '{"x": {"shape": [4, 6], "start": "0"}}',
        '{"x": {"shape": [' + "9" * 400 + '], "start": 0}}',
        "[" * 100_000,
    ],
    ids=lambda said: str(said)[:60],
)
def test_a_file_that_describes_its_parts_wrongly_is_named(tmp_path, said):
    (tmp_path / "step").mkdir()
    path = tmp_path / "step" / "f0"
    save_file({"x": torch.zeros(12)}, path, metadata=None if said is None else {SPANS: said})
    entry = FileEntry(bytes=path.stat().st_size, xxh3_128="0" * 32, tensors=[], spans=1)
    manifest = Manifest(format=3, step=1, layout={}, state={}, files={"f0": entry})
    with pytest.raises(CheckpointError) as caught:
        Tensors(Checkpoint(path=path.parent, step=1, manifest=manifest))
    incomplete = str(path.parent) in str(caught.value) and "exactly once" in str(caught.value)
    assert str(path) in str(caught.value) or incomplete


def test_a_stored_matrix_is_no_span(tmp_path):
    (tmp_path / "step").mkdir()
    path = tmp_path / "step" / "f0"
    save_file({"x": torch.zeros(2, 6)}, path, metadata={SPANS: json.dumps({"x": {"shape": [4, 6], "start": 0}})})
    entry = FileEntry(bytes=path.stat().st_size, xxh3_128="0" * 32, tensors=[], spans=1)
    manifest = Manifest(format=3, step=1, layout={}, state={}, files={"f0": entry})
    with pytest.raises(CheckpointError, match=r"f0: its list of spans is not valid .*stored as \[2, 6\]"):
        Tensors(Checkpoint(path=path.parent, step=1, manifest=manifest))


# ---------------------------------------------------------------- saves


class Held:
    """What a save reads of an engine: the spans of two tensors."""

    def __init__(self, *spans: tuple[str, Span]) -> None:
        self.spans = spans

    def buffers(self) -> dict[str, Any]:
        return {}

    def read_spans(self):
        for key, span in self.spans:
            yield key, span, torch.ones(span.size)


ALONE = Layout(rank=0, local_rank=0, device=torch.device("cpu"))


def test_a_save_whose_ranks_leave_elements_out_fails(tmp_path):
    for spans, error in (
        ([("param/x", HALVES[0])], "the ranks wrote 12 elements of tensors with 24"),
        ([("param/x", HALVES[0]), ("param/y", replace(HALVES[0], stop=0))], "wrote 12 elements of tensors with 48"),
        ([("param/x", whole((4, 6)))], None),
    ):
        saving = saver.Saver(tmp_path, Held(*spans), ALONE, CheckpointConfig(), about={})
        saving.start(1, {})
        found = saving.commit().error
        assert found is None if error is None else error in str(found)


def test_a_host_without_memory_for_the_copy_is_a_failed_save(tmp_path, monkeypatch):
    def none_left(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    saving = saver.Saver(tmp_path, Held(("param/x", whole((4, 6)))), ALONE, CheckpointConfig(), about={})
    with monkeypatch.context() as patch:
        patch.setattr(HostBuffer, "image", none_left)
        saving.start(1, {})
        assert saving.written
        outcome = saving.commit()
    assert "can't allocate memory" in str(outcome.error) and outcome.mend == "Free memory of the host"
    assert list(tmp_path.iterdir()) == []
    saving.start(2, {})
    assert saving.commit().error is None
